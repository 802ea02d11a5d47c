"""First plans, before anything is learned: targets (N, Y) → (N, P) ids that the base can read from
the first step on, since their embeddings begin as those of words in the targets.

`key_word_plans`: an id is a word, and a plan names the rarest words of its text. `piece_plans`: an
id is a cluster of word embeddings, and a plan says which cluster each piece of its text is in.
Concepts that began as states from half way up were not read at all after 60k tokens
(docs/log.md). Suffixes: N pairs · M different targets · B of them · Y target tokens · L pieces of
a type · P slots · D width · K ids · V vocabulary of the base."""

import math
from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor

from sememe.backbone.split import Spine
from sememe.concepts.kmeans import assign, kmeans
from sememe.concepts.plan import NULL, PlanShape
from sememe.errors import DataError
from sememe.models.planner.model import PlannerForCausalLM
from sememe.pairs import IGNORED, PairTensors

MIN_TEXTS = 2  # that a word must stand in: from one alone nobody learns anything
SPACE = "Ġ▁ "  # what pieces of BPE and SentencePiece begin with where a word does
TOKENS_AT_ONCE = 2**13
PIECES_PER_ID = 64  # that k-means looks at
# The best of some k-means counts: with few ids one start in three leaves two kinds of text
# together.
STARTS = 4
NUMBERS_AT_ONCE = 2**27  # of the pieces that k-means looks at: 512 MB


# ---- plans of key words ----


@torch.no_grad()
def key_word_plans(model: PlannerForCausalLM, pairs: PairTensors, pieces_V: list[str]) -> Tensor:
    """(N, P) plans of the rarest words that each target has among a type's, in the order in which
    they first come; the vocabularies begin as the words' embeddings, as far as there are words.

    Words that carry most are those of type 0, and so on: types go from words that many texts share
    to words of few. `pieces_V`: how the tokenizer writes each id (`convert_ids_to_tokens`).

    Raises DataError: all plans of some type would be empty."""
    shape: PlanShape = model.plans.shape
    texts = [words_of(row[row != IGNORED].tolist(), pieces_V) for row in pairs.target_NY]
    spelling = {word: ids for text in reversed(texts) for word, ids in text.items()}
    different = set(map(tuple, texts))
    count = Counter(word for text in different for word in text)
    rarity = {word: math.log(len(different) / n) for word, n in count.items() if n >= MIN_TEXTS}
    ranked = sorted(rarity, key=lambda word: (-count[word] * rarity[word] ** 2, word))
    tables = []
    for i, size in enumerate(shape.sizes):
        first = sum(shape.sizes[:i])
        words = ranked[first : first + size]
        if not words:
            raise DataError(
                f"{len(different)} different targets have {len(ranked)} words that stand in "
                f"{MIN_TEXTS} of them, and type {i} of {shape.sizes} ids gets none: need more "
                "words. try: more pairs, or plan.begins=pieces"
            )
        tables.append({word: number for number, word in enumerate(words)})
        model.plans.types[i].begin(_word_embeddings(model, [spelling[word] for word in words]))

    def key_words(text: dict[str, list[int]], table: dict[str, int], length: int) -> list[int]:
        known = [word for word in text if word in table]
        rarest = set(sorted(known, key=lambda word: -rarity[word])[:length])
        return [table[word] for word in known if word in rarest]

    types = list(zip(tables, shape.lengths, strict=True))
    return shape.pack([[key_words(text, *one_type) for one_type in types] for text in texts])


def words_of(ids: list[int], pieces_V: list[str]) -> dict[str, list[int]]:
    """Each word of a text, letters and digits alone, in the order in which they first come; with
    its token ids there."""
    words: list[list[int]] = []
    inside = False
    for token in ids:
        bare = pieces_V[token].lstrip(SPACE)
        if inside and bare.isalnum() and bare == pieces_V[token]:
            words[-1].append(token)
        elif bare.isalnum():
            words.append([token])
        inside = bare.isalnum()
    first: dict[str, list[int]] = {}
    for spelling in words:
        first.setdefault("".join(pieces_V[token].lstrip(SPACE) for token in spelling), spelling)
    return first


def _word_embeddings(model: PlannerForCausalLM, spellings: list[list[int]]) -> Tensor:
    """(K, D) mean embedding of each word's tokens, in the frame of the plan's vocabularies."""
    embed = Spine(model.backbone).embed
    ids = [torch.tensor(spelling, device=model.device) for spelling in spellings]
    return model.plans.to_frame(torch.stack([embed(x).float().mean(0) for x in ids]))


# ---- plans of pieces ----


@torch.no_grad()
def piece_plans(model: PlannerForCausalLM, pairs: PairTensors, seed: int = 0) -> Tensor:
    """(N, P) plans of the targets: the plan of a type of L concepts says which words, rare ones
    above all, stand in each of a text's L pieces of equal length. The vocabularies begin as the
    clusters' means, as far as there are pieces; a target of fewer than L tokens has fewer concepts.

    Raises DataError: all plans would be the same in some type."""
    shape: PlanShape = model.plans.shape
    target_MY, which_N = pairs.target_NY.unique(dim=0, return_inverse=True)
    weight_V = _rarity(target_MY, model.config.text_config.vocab_size)
    rows = max(1, TOKENS_AT_ONCE // (target_MY.shape[1] + 1))

    def pieces_of(index_M: Tensor):
        """For some rows at a time, (piece_BLD, there_BL) of every type."""
        for index_B in index_M.split(rows):
            words = _weighted_words(model, target_MY[index_B], weight_V)
            yield [_pieces(*words, length) for length in shape.lengths]

    # k-means looks at as many texts as give every id enough pieces, and at no more than fit.
    types = zip(shape.sizes, shape.lengths, strict=True)
    enough = max(-(-PIECES_PER_ID * size // length) for size, length in types)
    count = min(enough, max(1, NUMBERS_AT_ONCE // (shape.slots * model.plans.mean.numel())))
    order_M = torch.randperm(len(target_MY), generator=torch.Generator().manual_seed(seed))
    sample = zip(*pieces_of(order_M[:count]), strict=True)
    clusters = [
        _cluster(model, i, *map(torch.cat, zip(*parts, strict=True)), seed + i)
        for i, parts in enumerate(sample)
    ]
    plans = [
        torch.cat([nearest(*piece) for nearest, piece in zip(clusters, pieces, strict=True)], 1)
        for pieces in pieces_of(torch.arange(len(target_MY)))
    ]
    plan_MP = torch.cat(plans).cpu()
    for i in range(shape.types):
        used = shape.of_type(plan_MP, i).unique()
        if int((used != NULL).sum()) < 2:
            raise DataError(
                f"{len(pairs)} pairs have {len(target_MY)} different targets, and all get the same "
                f"plan in type {i}: need targets that differ. try: more pairs"
            )
    return plan_MP[which_N]


def _rarity(target_MY: Tensor, vocab: int) -> Tensor:
    """(V,) squared information of each token among the targets, 1 in the mean over their tokens."""
    count_V = torch.bincount(target_MY[target_MY >= 0], minlength=vocab).double()
    weight_V = (count_V.sum() / count_V.clamp(min=1)).log().square()
    mean = (weight_V * count_V).sum() / count_V.sum().clamp(min=1)
    return (weight_V / mean.clamp(min=1e-9)).float()


def _weighted_words(
    model: PlannerForCausalLM, target_BY: Tensor, weight_V: Tensor
) -> tuple[Tensor, Tensor]:
    """(B, Y, D) embeddings of the targets' tokens in the frame of the plan's vocabularies, times
    their weights; and (B,) lengths."""
    ids_BY = target_BY.clamp(min=0)
    x_BYD = model.plans.to_frame(Spine(model.backbone).embed(ids_BY.to(model.device)))
    weight_BY1 = weight_V[ids_BY].to(x_BYD).unsqueeze(-1)
    return x_BYD * weight_BY1, (target_BY >= 0).sum(1).to(model.device)


def _pieces(x_BYD: Tensor, length_B: Tensor, max_pieces: int) -> tuple[Tensor, Tensor]:
    """(B, L, D) means over L pieces of each text, as equal as whole tokens allow, or over as many
    as it has tokens; (B, L) bool: which are there."""
    count_B1 = length_B.clamp(max=max_pieces)[:, None]
    length_B1 = length_B[:, None]
    token_Y = torch.arange(x_BYD.shape[1], device=x_BYD.device)
    piece_BY = token_Y * count_B1 // length_B1.clamp(min=1)
    piece_BY = piece_BY.masked_fill(token_Y >= length_B1, NULL)
    piece_L1 = torch.arange(max_pieces, device=x_BYD.device)[:, None]
    weight_BLY = (piece_BY.unsqueeze(1) == piece_L1).to(x_BYD)
    tokens_BL = weight_BLY.sum(2)
    return weight_BLY @ x_BYD / tokens_BL.clamp(min=1).unsqueeze(-1), tokens_BL > 0


def _cluster(
    model: PlannerForCausalLM, i: int, piece_MLD: Tensor, there_ML: Tensor, seed: int
) -> Callable[[Tensor, Tensor], Tensor]:
    """Clusters the pieces of type i, and begins its vocabulary as the clusters' means. Returns what
    gives pieces their ids, (B, L), NULL where there is none."""
    # Each slot's own mean: ids would be spent on saying which slot it is, which is known (0.64 nats
    # of 3.6, with it 0.43; what chance makes of as few pieces is 0.12). Each dimension's own scale:
    # or a few huge ones are all that counts.
    weight_ML1 = there_ML.unsqueeze(-1).to(piece_MLD)
    mean_LD = (piece_MLD * weight_ML1).sum(0) / weight_ML1.sum(0).clamp(min=1)
    x_nD = (piece_MLD - mean_LD)[there_ML]
    scale_D = x_nD.std(0, correction=0).clamp(min=1e-6)
    x_nD = x_nD / scale_D
    count = min(len(x_nD), model.plans.shape.sizes[i])
    starts = [kmeans(x_nD, count, seed=seed + 1000 * again)[0] for again in range(STARTS)]
    losses = [float(assign(x_nD, centroid_KD)[1].sum()) for centroid_KD in starts]
    # The first of those that are as good: two starts often end alike, and rounding should not
    # choose whose numbers count.
    good = [loss <= min(losses) * 1.001 + 1e-6 for loss in losses]
    centroid_KD = starts[good.index(True)]
    model.plans.types[i].begin(centroid_KD * scale_D)

    def nearest(piece_BLD: Tensor, there_BL: Tensor) -> Tensor:
        normed_BLD = (piece_BLD - mean_LD) / scale_D
        id_n = assign(normed_BLD.flatten(0, 1), centroid_KD)[0]
        return id_n.view(there_BL.shape).masked_fill(~there_BL, NULL)

    return nearest
