"""First plans, before anything is learned: targets (N, Y) → (N, P) ids, each of which stands for a
word that its text contains.

An id is a word of the targets and begins as the mean of its pieces' embeddings, which the base can
read from the first step on. A text's plan names the rarest words that it has among a type's, in the
order in which they first come. The words that carry most are those of type 0, and so on: types go
from words that many texts share to words of few. Suffixes: V vocabulary of the base · K ids · P
slots · D width."""

import math
from collections import Counter

import torch

from sememe.backbone.split import Spine
from sememe.concepts.plan import PlanShape
from sememe.errors import DataError
from sememe.models.planner import PlannerForCausalLM
from sememe.pairs import IGNORED, PairTensors

LEAST = 2  # texts that a word must stand in: from one alone nobody learns anything
SPACE = "Ġ▁ "  # what pieces of BPE and SentencePiece begin with where a word does


@torch.no_grad()
def word_plans(model: PlannerForCausalLM, pairs: PairTensors, pieces_V: list[str]) -> torch.Tensor:
    """(N, P) plans of the targets, and the tables of `model.plans` started from the words'
    embeddings. Equal targets get equal plans; a text with fewer such words has fewer concepts.
    Where there are fewer words than ids, the other ids keep what they have.

    pieces_V: how the tokenizer writes each id (`convert_ids_to_tokens`).

    Raises:
        DataError: all plans of some type would be empty."""
    shape: PlanShape = model.plans.shape
    texts = [words_of(row, pieces_V) for row in pairs.target_NY.tolist()]
    spelled = {word: ids for text in reversed(texts) for word, ids in text.items()}
    once = set(map(tuple, texts))
    count, different = Counter(word for text in once for word in text), len(once)
    news = {word: math.log(different / n) for word, n in count.items() if n >= LEAST}
    ranked = sorted(news, key=lambda word: (-count[word] * news[word] ** 2, word))
    tables, start = [], 0
    for i, size in enumerate(shape.sizes):
        tables.append({word: number for number, word in enumerate(ranked[start : start + size])})
        start += size
        if not tables[i]:
            raise DataError(
                f"{different} different targets have {len(ranked)} words that stand in {LEAST} of "
                f"them, and type {i} "
                f"of {shape.sizes} ids gets none: need more words. try: more pairs, or "
                "plan.begins=pieces"
            )
        _start_table(model, i, [spelled[word] for word in tables[i]])
    plans = [
        [_named(text, table, most, news) for table, most in zip(tables, shape.lengths, strict=True)]
        for text in texts
    ]
    return shape.pack(plans)


def words_of(ids: list[int], pieces_V: list[str]) -> dict[str, list[int]]:
    """Each word of a text, letters and digits alone, in the order in which they first come; with
    its token ids there."""
    words: list[list[int]] = []
    inside = False
    for token in ids:
        if token == IGNORED:
            break
        bare = _bare(pieces_V[token])
        if not bare.isalnum():
            inside = False
        elif inside and bare == pieces_V[token]:
            words[-1].append(token)
        else:
            words.append([token])
            inside = True
    found: dict[str, list[int]] = {}
    for spelling in words:
        found.setdefault("".join(_bare(pieces_V[token]) for token in spelling), spelling)
    return found


def _bare(piece: str) -> str:
    return piece.lstrip(SPACE)


def _named(
    text: dict[str, list[int]], table: dict[str, int], most: int, news: dict[str, float]
) -> list[int]:
    known = [word for word in text if word in table]
    kept = set(sorted(known, key=lambda word: -news[word])[:most])
    return [table[word] for word in known if word in kept]


def _start_table(model: PlannerForCausalLM, i: int, spelled: list[list[int]]) -> None:
    embed = Spine(model.backbone).embed
    word_KD = torch.stack(
        [embed(torch.tensor(ids, device=model.device)).float().mean(0) for ids in spelled]
    )
    model.plans.types[i].begin(model.plans.to_frame(word_KD))
