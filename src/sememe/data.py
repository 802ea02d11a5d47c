"""Texts → (N, T) token blocks, and the order of training."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sememe.errors import RecipeError
from sememe.keys import Recipe
from sememe.paths import names_of
from sememe.rows import BlockRows, Mixture, Ordered, Row, Rows, rows_of


@dataclass(frozen=True)
class TextBlocks:
    """Blocks of token ids, and the bytes of their sources that they stand for."""

    ids_NT: Tensor
    bytes_NT: Tensor
    """UTF-8 bytes of text that each token stands for: 0 for the eos between documents."""
    text: bytes | None
    """Of all blocks, one after the other; None where there are tokens alone, or several sources."""
    counted_NT: Tensor | None = None
    """Which tokens are measured; None: all."""
    counts: dict[str, int] | None = None
    """How many of the blocks are of each source, in their order; None where there is one."""

    def __len__(self) -> int:
        return len(self.ids_NT)

    def windows(self) -> list[bytes]:
        """The text of each block; one that is cut inside a character has a part of its bytes."""
        ends = [0, *self.bytes_NT.sum(1).cumsum(0).tolist()]
        return [self.text[start:end] for start, end in itertools.pairwise(ends)]


def heldout_blocks(source: str | list[str], tokenizer, length: int, tokens: int) -> TextBlocks:
    """About the first `tokens` tokens of a source, or of several, an equal share and at least a row
    of each, in rows of at most `length`; those that are shorter are filled up with -100. Raises
    DataError."""
    names = names_of(source)
    tokens = max(tokens // len(names), length)
    sources = [rows_of(name, tokenizer, length, tokens) for name in names]
    parts = [_first(rows, length, tokens) for rows in sources]
    ids_NT, bytes_NT, counted_NT = (
        torch.from_numpy(np.stack(arrays)) for arrays in zip(*itertools.chain(*parts), strict=True)
    )
    counted_NT = counted_NT if any(rows.ragged for rows in sources) else None
    text = counts = None
    if not isinstance(source, str):
        counts = dict(zip(names, map(len, parts), strict=True))
    elif isinstance(sources[0], BlockRows) and sources[0].in_memory:
        text = sources[0].shards.text[: int(bytes_NT.sum())]
    return TextBlocks(ids_NT, bytes_NT, text, counted_NT, counts)


def _first(rows: Rows, length: int, tokens: int) -> list[Row]:
    """About so many tokens of them, and at least one row, all filled up to `length`."""
    first, total = [], 0
    for row in (rows[n] for n in range(len(rows))):
        total += len(row.ids)
        if total > tokens and first:
            break
        first.append(row.padded(length))
    return first


def block_order(num_blocks: int, steps: int, batch: int, seed: int) -> Tensor:
    """(steps * batch,) long: which block each row of each step sees; every epoch is shuffled anew.

    Equal seeds give equal orders on every machine, and a longer run begins as a shorter one
    does."""
    epochs = -(-steps * batch // num_blocks)
    generators = (torch.Generator().manual_seed(seed + epoch) for epoch in range(epochs))
    orders = [torch.randperm(num_blocks, generator=generator) for generator in generators]
    return torch.cat(orders)[: steps * batch]


def rows_and_heldout(
    recipe: Recipe, tokenizer, ragged: bool, say: Callable[[str], None]
) -> tuple[Ordered | Mixture, TextBlocks]:
    """The rows of running text that a recipe trains on, in their order, and those that it is
    measured on.

    Args:
        ragged: whether the system takes rows of different lengths.
        say: is told which texts go on behind what the run can see.

    Raises:
        DataError: missing, empty or too short text.
        RecipeError: documents or conversations row by row, for a system that takes blocks."""
    train, length, seed = recipe.data.train, recipe.sequence_length, recipe.seed
    count = recipe.steps * recipe.batch_size
    weights = {train: 1.0} if isinstance(train, str) else train
    sources = [rows_of(source, tokenizer, length, count * length) for source in weights]
    for source, rows in zip(weights, sources, strict=True):
        if isinstance(rows, BlockRows) and rows.in_memory and not rows.shards.whole:
            say(
                f"{source}: only its first {len(rows.shards):,} tokens are trained on. try: sememe "
                "tokenize, whose folder is drawn from all over: few long documents teach little"
            )
    rows = Mixture(sources, list(weights.values()), seed)
    if len(sources) == 1 and isinstance(sources[0], BlockRows) and sources[0].in_memory:
        order_n = block_order(len(sources[0]), recipe.steps, recipe.batch_size, seed)
        rows = Ordered(sources[0], order_n)
    heldout = heldout_blocks(recipe.data.heldout, tokenizer, length, recipe.heldout_tokens)
    has_ragged = rows.ragged or heldout.counted_NT is not None
    if has_ragged and (recipe.distil or not ragged):
        raise RecipeError(
            f"system = {recipe.system}{', distil' * (recipe.distil > 0)} cannot be trained on "
            "documents or conversations row by row: need blocks of text. try: sememe tokenize "
            "without --documents, or system=online without distil"
        )
    return rows, heldout
