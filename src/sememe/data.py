"""Texts → (N, T) token blocks, and the order of training."""

from __future__ import annotations

import itertools
import sys
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sememe.errors import DataError, RecipeError
from sememe.keys import Recipe
from sememe.rows import BlockRows, Mixture, Ordered, rows_of
from sememe.shards import TextShard


@dataclass(frozen=True)
class TextBlocks:
    """Blocks of token ids, and the bytes of the source that they stand for."""

    ids_NT: Tensor
    bytes_NT: Tensor
    """UTF-8 bytes of text that each token stands for: 0 for the eos between documents."""
    text: bytes | None
    """Of all blocks, one after the other; None where there are tokens alone."""
    counted_NT: Tensor | None = None
    """Which tokens are measured; None: all."""

    def __len__(self) -> int:
        return len(self.ids_NT)

    @property
    def measured(self) -> tuple[Tensor, Tensor | None]:
        """The ids, and which of them are measured."""
        return self.ids_NT, self.counted_NT

    def windows(self) -> list[bytes]:
        """The text of each block; one that is cut inside a character has a part of its bytes."""
        ends = [0, *self.bytes_NT.sum(1).cumsum(0).tolist()]
        return [self.text[start:end] for start, end in itertools.pairwise(ends)]


def token_blocks(texts: list[str], tokenizer, length: int, limit: int = sys.maxsize) -> Tensor:
    """(N, length) long: the `text_blocks` without the bytes that they stand for."""
    return text_blocks(texts, tokenizer, length, limit).ids_NT


def text_blocks(texts: list[str], tokenizer, length: int, limit: int = sys.maxsize) -> TextBlocks:
    """The texts as one stream of at most `limit` tokens, cut into full blocks.

    The tokenizer's eos, if it has one, stands between texts; blank texts and the remainder are
    dropped. Tokenising stops soon after `limit`. Raises DataError when there is not one full
    block."""
    shard = TextShard(texts, tokenizer, limit)
    blocks = len(shard) // length
    if not blocks:
        raise DataError(
            f"the text has {len(shard)} tokens: need at least {length}, one block. "
            "try: more text or shorter blocks"
        )
    ids_NT, bytes_NT = (
        torch.from_numpy(shard.read(name, 0, blocks * length)).view(blocks, -1)
        for name in ("tokens", "bytes")
    )
    return TextBlocks(ids_NT, bytes_NT, shard.text[: int(bytes_NT.sum())])


def heldout_blocks(source: str, tokenizer, length: int, tokens: int) -> TextBlocks:
    """About the first `tokens` tokens of a source, in rows of at most `length`; those that are
    shorter are filled up with -100. Raises DataError."""
    tokens = max(tokens, length)
    rows = rows_of(source, tokenizer, length, tokens)
    first, total = [], 0
    for row in (rows[n] for n in range(len(rows))):
        total += len(row.ids)
        if total > tokens and first:
            break
        first.append(row.padded(length))
    ids_NT, bytes_NT, counted_NT = (
        torch.from_numpy(np.stack(arrays)) for arrays in zip(*first, strict=True)
    )
    text = None
    if isinstance(rows, BlockRows) and rows.in_memory:
        text = rows.shards.text[: int(bytes_NT.sum())]
    return TextBlocks(ids_NT, bytes_NT, text, counted_NT if rows.ragged else None)


def block_order(num_blocks: int, steps: int, batch: int, seed: int) -> Tensor:
    """(steps * batch,) long: which block each row of each step sees; every epoch is shuffled anew.

    Equal seeds give equal orders on every machine, and a longer run begins as a shorter one
    does."""
    epochs = -(-steps * batch // num_blocks)
    generators = (torch.Generator().manual_seed(seed + epoch) for epoch in range(epochs))
    orders = [torch.randperm(num_blocks, generator=generator) for generator in generators]
    return torch.cat(orders)[: steps * batch]


def rows_and_heldout(
    recipe: Recipe, tokenizer, ragged: bool
) -> tuple[Ordered | Mixture, TextBlocks]:
    """The rows of running text that a recipe trains on, in their order, and those that it is
    measured on.

    Args:
        ragged: whether the system takes rows of different lengths.

    Raises:
        DataError: missing, empty or too short text.
        RecipeError: documents or conversations row by row, for a system that takes blocks."""
    train, length, seed = recipe.data.train, recipe.sequence_length, recipe.seed
    count = recipe.steps * recipe.batch_size
    weights = {train: 1.0} if isinstance(train, str) else train
    sources = [rows_of(source, tokenizer, length, count * length) for source in weights]
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
