"""First plans, before anything is learned: targets (N, Y) → (N, P) ids that the base can read from
the first step on, since their embeddings begin as those of words in the targets.

`key_word_plans`: an id is a word, and a plan names the rarest words of its text. `piece_plans`: an
id is a cluster of word embeddings, and a plan says which cluster each piece of its text is in.
Concepts that began as states from half way up were not read at all after 60k tokens
(docs/log.md). Suffixes: N pairs · M different targets · B of them · Y target tokens · L pieces of
a type · P slots · D width · K ids · V vocabulary of the base."""

import itertools
import math
import re
from collections import Counter

import torch
from torch import Tensor

from sememe.concepts.kmeans import assign, kmeans
from sememe.concepts.plan import NULL, PlanShape
from sememe.errors import DataError
from sememe.keys import Recipe
from sememe.models.planner.losses import in_chunks
from sememe.models.planner.model import PlannerForCausalLM
from sememe.pairs import PairTensors

MIN_TEXTS = 2  # that a word must stand in: from one alone nobody learns anything
WORD = re.compile(r"[^\W_]+")  # letters and digits
TOKENS_AT_ONCE = 2**13
PIECES_PER_ID = 64  # that k-means looks at
# The best of some k-means counts: with few ids one start in three leaves two kinds of text
# together.
STARTS = 4


def first_plans(recipe: Recipe, model: PlannerForCausalLM, pairs: PairTensors, tokenizer) -> Tensor:
    """(N, P) int32 plans that a run begins with. Read off the targets, unless they are drawn; the
    model's vocabularies begin as what they mean.

    Raises DataError where the targets do not tell pairs apart, or have no words in common."""
    if recipe.plan.begins == "words":
        return key_word_plans(model, pairs, tokenizer).int()
    if recipe.plan.begins == "random":
        return random_plans(model.plans.shape, len(pairs), recipe.seed).int()
    return piece_plans(model, pairs, recipe.seed).int()


def random_plans(shape: PlanShape, count: int, seed: int = 0) -> Tensor:
    """(N, P) full plans of ids that are all as likely."""
    size_P = torch.tensor(shape.sizes)[shape.kind_P]
    share_NP = torch.rand(count, shape.slots, generator=torch.Generator().manual_seed(seed))
    return (share_NP * size_P).long()


# ---- plans of key words ----


@torch.no_grad()
def key_word_plans(model: PlannerForCausalLM, pairs: PairTensors, tokenizer) -> Tensor:
    """(N, P) plans of the rarest words that each target has among a type's, in the order in which
    they first come; the vocabularies begin as the words' embeddings, as far as there are words.

    Words that carry most are those of type 0, and so on: types go from words that many texts share
    to words of few.

    Raises DataError: all plans of some type would be empty."""
    codes, shape = model.plans, model.plans.shape
    texts = [list(dict.fromkeys(WORD.findall(text))) for text in pairs.target_texts(tokenizer)]
    different = set(map(tuple, texts))
    count = Counter(word for text in different for word in text)
    rarity = {word: math.log(len(different) / n) for word, n in count.items() if n >= MIN_TEXTS}
    ranked = iter(sorted(rarity, key=lambda word: (-count[word] * rarity[word] ** 2, word)))
    plans: list[list[list[int]]] = [[] for _ in texts]
    for i, (size, length) in enumerate(zip(shape.sizes, shape.lengths, strict=True)):
        number = {word: n for n, word in enumerate(itertools.islice(ranked, size))}
        if not number:
            raise DataError(
                f"{len(different)} different targets have {len(rarity)} words that stand in "
                f"{MIN_TEXTS} of them, and type {i} of {shape.sizes} ids gets none: need more "
                "words. try: more pairs, or plan.begins=pieces"
            )
        ids = tokenizer([f" {word}" for word in number], add_special_tokens=False).input_ids
        words = [model.spine.embed(torch.tensor(x, device=model.device)).mean(0) for x in ids]
        codes.begin(i, codes.to_frame(torch.stack(words)))
        for plan, text in zip(plans, texts, strict=True):
            known = [word for word in text if word in number]
            rarest = sorted(known, key=rarity.get, reverse=True)[:length]
            plan.append([number[word] for word in known if word in rarest])
    return shape.pack(plans)


# ---- plans of pieces ----


@torch.no_grad()
def piece_plans(model: PlannerForCausalLM, pairs: PairTensors, seed: int = 0) -> Tensor:
    """(N, P) plans of the targets: the plan of a type of L concepts says which words, rare ones
    above all, stand in each of a text's L pieces of equal length. The vocabularies begin as the
    clusters' means, as far as there are pieces; a target of fewer than L tokens has fewer concepts.

    Raises DataError: all plans would be the same in some type."""
    codes, shape = model.plans, model.plans.shape
    target_MY, which_N = pairs.target_NY.to(model.device).unique(dim=0, return_inverse=True)
    vocab = model.config.text_config.vocab_size
    count_V = torch.bincount(target_MY[target_MY >= 0], minlength=vocab)
    # Squared information of each token among the targets: rare words say more.
    weight_V = (count_V.sum() / count_V.clamp(min=1)).log().square()
    number_P = shape.position_C[shape.types :].to(model.device) - 1
    length_P = torch.tensor(shape.lengths, device=model.device)[shape.kind_P]

    def pieces(target_BY: Tensor) -> Tensor:
        """(B, P, D) weighted means of embeddings in the codes' frame over each piece of a text."""
        ids_BY = target_BY.clamp(min=0)
        x_BYD = codes.to_frame(model.spine.embed(ids_BY)) * weight_V[ids_BY].unsqueeze(-1)
        return piece_means(x_BYD, (target_BY >= 0).sum(1), number_P, length_P)

    x_MPD = in_chunks(pieces, TOKENS_AT_ONCE // (target_MY.shape[1] + 1), target_MY)
    present_MP = number_P < (target_MY >= 0).sum(1, keepdim=True)
    # k-means looks at as many texts as give every id enough pieces.
    types = zip(shape.sizes, shape.lengths, strict=True)
    enough = max(-(-PIECES_PER_ID * size // length) for size, length in types)
    some_m = torch.randperm(len(x_MPD), generator=torch.Generator().manual_seed(seed))[:enough]
    # Each slot's own mean: ids would be spent on saying which slot it is, which is known (0.64 nats
    # of 3.6, with it 0.43; what chance makes of as few pieces is 0.12).
    x_MPD -= x_MPD[some_m].sum(0) / present_MP[some_m].sum(0).clamp(min=1).unsqueeze(1)
    plans = []
    types = zip(*(x.split(shape.lengths, 1) for x in (x_MPD, present_MP)), strict=True)
    for i, (x_MLD, present_ML) in enumerate(types):
        x_nD = x_MLD[some_m][present_ML[some_m]]
        # Each dimension's own scale: or a few huge ones are all that counts.
        scale_D = x_nD.std(0, correction=0).clamp(min=1e-6)
        centroid_KD = _best_centroids(x_nD / scale_D, shape.sizes[i], seed + i)
        codes.begin(i, centroid_KD * scale_D)
        id_n = assign((x_MLD / scale_D).flatten(0, 1), centroid_KD)[0]
        plans.append(id_n.view_as(present_ML).masked_fill(~present_ML, NULL))
        if int((plans[-1].unique() != NULL).sum()) < 2:
            raise DataError(
                f"{len(pairs)} pairs have {len(target_MY)} different targets, and all get the same "
                f"plan in type {i}: need targets that differ. try: more pairs"
            )
    return torch.cat(plans, 1)[which_N].cpu()


def piece_means(x_BYD: Tensor, tokens_B: Tensor, number_P: Tensor, length_P: Tensor) -> Tensor:
    """(B, P, D) means over piece number `number` of the `length` pieces of each text, which are as
    equal as whole tokens allow; where it has fewer tokens over as many as it has, then 0."""
    token_Y = torch.arange(x_BYD.shape[1], device=x_BYD.device)
    tokens_B11 = tokens_B[:, None, None]
    piece_BPY = token_Y * tokens_B11.minimum(length_P[:, None]) // tokens_B11.clamp(min=1)
    inside_BPY = (piece_BPY == number_P[:, None]) & (token_Y < tokens_B11)
    weight_BPY = inside_BPY.to(x_BYD)
    return weight_BPY @ x_BYD / weight_BPY.sum(2, keepdim=True).clamp(min=1)


def _best_centroids(x_nD: Tensor, max_count: int, seed: int) -> Tensor:
    """(K, D) centroids of the best of some starts, or the first of those that are as good: two
    starts often end alike, and rounding should not choose whose numbers count."""
    count = min(len(x_nD), max_count)
    starts = [kmeans(x_nD, count, seed=seed + 1000 * again)[0] for again in range(STARTS)]
    losses = [float(assign(x_nD, centroid_KD)[1].sum()) for centroid_KD in starts]
    good = [loss <= min(losses) * 1.001 + 1e-6 for loss in losses]
    return starts[good.index(True)]
