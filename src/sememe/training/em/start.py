"""First plans, before anything is learned: targets (N, Y) → (N, P) ids, by k-means of the words in
their pieces.

A text's plan for a type of L concepts says which words stand in each of its L pieces of equal
length: a concept begins as the mean embedding of a cluster's words, rare ones above all, which the
base can read from the first step on. Concepts that began as states from half way up were not read
at all after 60k tokens (docs/log.md). Suffixes: N pairs · M different targets · B of them · Y
target tokens · L pieces · P slots · D width · K ids."""

import torch
from torch import Tensor

from sememe.backbone.split import Spine
from sememe.concepts.kmeans import assign, kmeans
from sememe.concepts.plan import NULL, PlanShape
from sememe.errors import CheckpointError, DataError
from sememe.models.planner import PlannerForCausalLM
from sememe.pairs import PairTensors

TOKENS_AT_ONCE = 2**13
POINTS = 64  # pieces per id that k-means looks at
# of k-means, the best of which counts: with few ids one start in three leaves two kinds of text
# together
STARTS = 4
STATES_AT_ONCE = 2**27  # numbers kept meanwhile: 512 MB


@torch.no_grad()
def start_plans(
    model: PlannerForCausalLM, pairs: PairTensors, shape: PlanShape, seed: int = 0
) -> Tensor:
    """(N, P) plans of the targets, and the tables of `model.plans` started from the centroids, each
    at the scale that the base's embeddings have in the tables' frame. Equal targets get equal
    plans. A target shorter than L tokens has fewer concepts.

    Where there are fewer pieces than ids, that many ids are used; the others keep the vectors they
    have.

    Raises:
        DataError: all plans would be the same in some type: the targets are, or there is only one.
        CheckpointError: the model has plans of another shape."""
    if shape != model.plans.shape:
        raise CheckpointError(
            f"plans of sizes {shape.sizes} and lengths {shape.lengths} for a model of "
            f"{model.plans.shape.sizes} and {model.plans.shape.lengths}: need the model's own. "
            "try: model.plans.shape"
        )
    target_MY, which_N = pairs.target_NY.unique(
        dim=0, return_inverse=True
    )  # a text is read once, in one batch
    weight_V = _rarity(target_MY, model.config.text_config.vocab_size)
    order_M = torch.randperm(len(target_MY), generator=torch.Generator().manual_seed(seed))
    enough = max(
        -(-POINTS * size // length) for size, length in zip(shape.sizes, shape.lengths, strict=True)
    )
    fit = min(enough, max(1, STATES_AT_ONCE // (shape.slots * model.plans.mean.numel())))
    rows = max(1, TOKENS_AT_ONCE // (target_MY.shape[1] + 1))
    plan_MP, kept, frames = torch.full((len(target_MY), shape.slots), NULL), [], None
    for some in (order_M[:fit], order_M[fit:]):
        for index_B in some.split(rows) if len(some) else ():
            pieces = [
                _pieces(*_words(model, target_MY[index_B], weight_V), length)
                for length in shape.lengths
            ]
            if frames is None:
                kept.append(pieces)
            else:
                plan_MP[index_B] = _nearest(pieces, frames)
        if frames is None:
            of_type = [
                tuple(map(torch.cat, zip(*one, strict=True))) for one in zip(*kept, strict=True)
            ]
            frames = [
                _start_table(model, i, x_MLD, there_ML, seed + i)
                for i, (x_MLD, there_ML) in enumerate(of_type)
            ]
            plan_MP[some] = _nearest(of_type, frames)
            kept, of_type = [], []
    for i in range(shape.types):
        used = shape.of_type(plan_MP, i).unique()
        if int((used != NULL).sum()) < 2:
            raise DataError(
                f"{len(pairs)} pairs have {len(target_MY)} different targets, and all get the same "
                f"plan in type {i}: "
                "need targets that differ. try: more pairs"
            )
    return shape.check(plan_MP[which_N])


def _rarity(target_MY: Tensor, vocab: int) -> Tensor:
    """(V,) squared information of each token among the targets, 1 in the mean over their tokens."""
    count_V = torch.bincount(target_MY[target_MY >= 0], minlength=vocab).double()
    weight_V = (count_V.sum() / count_V.clamp(min=1)).log().square()
    mean = (weight_V * count_V).sum() / count_V.sum().clamp(min=1)
    return (weight_V / mean if mean > 0 else torch.ones_like(weight_V)).float()


def _words(model: PlannerForCausalLM, target_BY: Tensor, weight_V: Tensor) -> tuple[Tensor, Tensor]:
    """(B, Y, D) fp32 embeddings of the targets' tokens in the tables' frame, times their weights,
    and (B,) lengths."""
    ids_BY, plans = target_BY.clamp(min=0), model.plans
    x_BYD = plans.to_frame(Spine(model.backbone).embed(ids_BY.to(model.device)))
    return x_BYD * weight_V[ids_BY].to(x_BYD).unsqueeze(-1), (target_BY >= 0).sum(1).to(
        model.device
    )


def _pieces(h_BYD: Tensor, length_B: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """(B, L, D) means over `most` pieces of each text, as equal as whole tokens allow, or over as
    many as it has tokens; (B, L) which are there."""
    count_B1, length_B1 = length_B.clamp(max=most)[:, None], length_B[:, None]
    place_Y = torch.arange(h_BYD.shape[1], device=h_BYD.device)
    piece_BY = place_Y * count_B1 // length_B1.clamp(min=1)
    member_BLY = (piece_BY.unsqueeze(1) == torch.arange(most, device=h_BYD.device)[:, None]) & (
        place_Y < length_B1
    ).unsqueeze(1)
    weight_BLY = member_BLY.to(h_BYD)
    tokens_BL = weight_BLY.sum(2)
    return weight_BLY @ h_BYD / tokens_BL.clamp(min=1).unsqueeze(-1), tokens_BL > 0


def _start_table(
    model: PlannerForCausalLM, i: int, x_MLD: Tensor, there_ML: Tensor, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(L, D) means and (D,) scale of the pieces of type i, and (K', D) centroids in that frame,
    which the table's first K' rows take over."""
    # Each slot's own mean: ids would be spent on saying which slot it is, which is known (0.64 nats
    # of 3.6, with it 0.43; what chance makes of as few pieces is 0.12). Each dimension's own scale:
    # or a few huge ones are all that counts.
    weight_ML1 = there_ML.unsqueeze(-1).to(x_MLD)
    mean_LD = (x_MLD * weight_ML1).sum(0) / weight_ML1.sum(0).clamp(min=1)
    x_nD = (x_MLD - mean_LD)[there_ML]
    scale_D = x_nD.std(0, correction=0).clamp(min=1e-6)
    x_nD, count = x_nD / scale_D, min(len(x_nD), model.plans.shape.sizes[i])
    tried = [kmeans(x_nD, count, seed=seed + 1000 * again)[0] for again in range(STARTS)]
    left = [float(assign(x_nD, centroid_KD)[1].sum()) for centroid_KD in tried]
    # The first of those that are as good: two starts often end in one place, and rounding should
    # not choose whose numbers count.
    centroid_KD = next(
        centroid_KD
        for centroid_KD, one in zip(tried, left, strict=True)
        if one <= min(left) * 1.001 + 1e-6
    )
    model.plans.types[i].begin(centroid_KD * scale_D)
    return mean_LD, scale_D, centroid_KD


def _nearest(
    pieces: list[tuple[Tensor, Tensor]], frames: list[tuple[Tensor, Tensor, Tensor]]
) -> Tensor:
    """(B, P) ids of the nearest centroids of all types' pieces, on the CPU."""
    found = []
    for (x_BLD, there_BL), (mean_LD, scale_D, centroid_KD) in zip(pieces, frames, strict=True):
        id_BL = assign(((x_BLD - mean_LD) / scale_D).flatten(0, 1), centroid_KD)[0].view(
            there_BL.shape
        )
        found.append(id_BL.masked_fill(~there_BL, NULL))
    return torch.cat(found, 1).cpu()
