"""Windows of text → lists of concept ids → windows, batch by batch, and what the ids cost."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sememe.concepts.codebook import count_digits
from sememe.evaluation.quality import code_use

Tick = Callable[[int], None]
Lists = list[list[int]]


def compress(model, ids_NT: Tensor, batch: int) -> Lists:
    """The concept ids of each row of (N, T) windows."""
    return [ids for ids_BT in ids_NT.split(batch) for ids in model.compress(ids_BT)]


def decompress(
    model, concepts: Lists, batch: int, tick: Tick = lambda n: None, tokens: int = 0
) -> Lists:
    """The token ids of each list; ticks `tokens` for each."""
    rebuilt: Lists = []
    for start in range(0, len(concepts), batch):
        rebuilt += model.decompress(concepts[start : start + batch])
        tick(tokens * len(concepts[start : start + batch]))
    return rebuilt


def written_again(model, ids_NT: Tensor, window: int | None = None, batch: int = 16) -> Lists:
    """The (N, T) texts as the model writes them from their concepts, `window` tokens at a time
    (None: all at once)."""
    windows = ids_NT.split(window or ids_NT.shape[1], 1)
    parts = [decompress(model, compress(model, ids_Nw, batch), batch) for ids_Nw in windows]
    return [list(itertools.chain.from_iterable(row)) for row in zip(*parts, strict=True)]


def shuffled(concepts: Lists, seed: int = 0) -> Lists:
    """All ids permuted over all lists; each list stays as long as it was."""
    flat = [i for ids in concepts for i in ids]
    order = iter(torch.randperm(len(flat), generator=torch.Generator().manual_seed(seed)).tolist())
    return [[flat[next(order)] for _ in ids] for ids in concepts]


def price(
    concepts: Lists, tokens: int, num_concepts: int, codes_per_concept: int
) -> dict[str, Any]:
    """What lists of concepts cost for `tokens` tokens. A concept is `codes_per_concept` ids, and
    every one counts."""
    flat = torch.tensor([i for ids in concepts for i in ids], dtype=torch.long)
    ids, use = (
        len(flat) * codes_per_concept,
        code_use(count_digits(flat, num_concepts, codes_per_concept)),
    )
    return {
        "concept_rate": len(flat) / tokens,
        "ids_per_token": ids / tokens,
        "compression_ratio": tokens / max(1, ids),
        "bits_per_token": ids * math.log2(num_concepts) / tokens,
        "bits_per_token_used": len(flat) * (use["bits_per_concept"] or 0.0) / tokens,
        "bits_per_concept": use["bits_per_concept"],
        "code_perplexity_by_stage": use["code_perplexity_by_stage"],
    }
