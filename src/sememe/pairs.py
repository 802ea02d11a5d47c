"""Rows or documents → pairs of a source u and a target y → (N, U) and (N, Y) token tensors."""

from __future__ import annotations

import bisect
import itertools
import re
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from sememe.data import byte_counts, encoder, read_rows, read_texts
from sememe.errors import DataError, RecipeError
from sememe.keys import Data

SOURCE_SHARE = 0.25
IGNORED = -100
FILLED = 0.85  # of the tokens that a pair may have, so that few pieces of a text are cut
SAMPLE_CHARS = 20_000  # of a text, to estimate the characters per token


class Pair(NamedTuple):
    source: str
    target: str


@dataclass(frozen=True)
class PairTensors:
    """Sources right-aligned under their mask, targets left-aligned and padded with -100; no BOS."""

    source_NU: Tensor
    source_mask_NU: Tensor
    target_NY: Tensor
    cut_sources: int = 0
    cut_targets: int = 0
    target_bytes_N: Tensor | None = None
    """UTF-8 bytes of each target without what was cut; None where the pairs are not of a text."""

    def __len__(self) -> int:
        return len(self.source_NU)

    def rows(self, index: Tensor | slice) -> PairTensors:
        """Some of the pairs, in the order of `index`; how many were cut stays that of all."""
        tensors = {name: value for name, value in vars(self).items() if torch.is_tensor(value)}
        return replace(self, **{name: value[index] for name, value in tensors.items()})

    def joined(self, bos: int) -> tuple[Tensor, Tensor, Tensor]:
        """(N, 1 + U + Y) ids of BOS, source and target without a gap, their mask, and labels: -100
        but for the target."""
        ids = torch.cat([self._after(bos), self.target_NY.clamp(min=0)], 1)
        mask = torch.cat(
            [F.pad(self.source_mask_NU, (1, 0), value=1), self.target_NY != IGNORED], 1
        )
        labels = F.pad(self.target_NY, (ids.shape[1] - self.target_NY.shape[1], 0), value=IGNORED)
        order = mask.argsort(dim=1, descending=True, stable=True)
        return ids.gather(1, order), mask.gather(1, order), labels.gather(1, order)

    def prompts(self, bos: int) -> tuple[Tensor, Tensor]:
        """(N, 1 + U) ids of BOS and source, padded on the left, and their mask."""
        mask = F.pad(self.source_mask_NU, (1, 0), value=1)
        order = mask.argsort(dim=1, stable=True)
        return self._after(bos).gather(1, order), mask.gather(1, order)

    def _after(self, bos: int) -> Tensor:
        return F.pad(self.source_NU, (1, 0), value=bos)

    def source_texts(self, tokenizer) -> list[str]:
        """The sources as they are written, without what was cut."""
        rows = zip(self.source_NU, self.source_mask_NU, strict=True)
        ids = [ids_U[mask_U.bool()] for ids_U, mask_U in rows]
        return tokenizer.batch_decode(ids, skip_special_tokens=True)

    def target_texts(self, tokenizer) -> list[str]:
        """The targets as they are written, without what was cut."""
        rows = [row[row != IGNORED] for row in self.target_NY]
        return tokenizer.batch_decode(rows, skip_special_tokens=True)

    def cut(self) -> str:
        """One sentence on what was cut; empty if nothing was."""
        if not self.cut_sources + self.cut_targets:
            return ""
        return (
            f"of {len(self)} pairs, {self.cut_sources} sources keep their last "
            f"{self.source_NU.shape[1]} tokens and {self.cut_targets} targets their first "
            f"{self.target_NY.shape[1]}"
        )


@dataclass(frozen=True)
class PairForm:
    """How a text becomes pairs: two `fields` of a row, or each document cut at `source_share`; and
    the most tokens of each side."""

    fields: tuple[str, str] | None = None
    source_share: float = SOURCE_SHARE
    source_length: int = 128
    target_length: int = 128

    @classmethod
    def of(cls, recipe: dict[str, Any]) -> PairForm | None:
        """That of a recipe's plain values; None where it trains on running text."""
        named = {key for key, value in recipe["data"].items() if value is not None}
        if old := named - Data.model_fields.keys():
            raise RecipeError(
                f"data.{old.pop()} in a recipe of an earlier release: need data.fields or "
                "data.source_share. try: docs/options.md"
            )
        fields, share = (recipe["data"].get(key) for key in ("fields", "source_share"))
        if not fields and share is None and recipe.get("system") != "planner":
            return None
        share = SOURCE_SHARE if share is None else share
        return cls(fields, share, recipe["source_length"], recipe["target_length"])

    def load(
        self,
        source: str,
        tokenizer,
        max_pairs: int | None = None,
        min_tokens: int | None = None,
    ) -> PairTensors:
        """The first pairs of a text: `max_pairs` of them, or as few as have `min_tokens` target
        tokens. Raises DataError."""
        if self.fields:
            pairs = read_pairs(source, self.fields)
        else:
            texts = read_texts(source)
            # Pieces whose two sides about fill their tokens.
            sample = max(texts, key=len)[:SAMPLE_CHARS]
            tokens = len(tokenizer(sample, add_special_tokens=False)["input_ids"])
            share = self.source_share
            room = min(self.source_length / share, self.target_length / (1 - share))
            chars = FILLED * room * len(sample) / max(1, tokens)
            pairs = cut_pairs(texts, share, max(2, int(chars)))
        tensors = pair_tensors(pairs[:max_pairs], tokenizer, self.source_length, self.target_length)
        if min_tokens is None:
            return tensors
        tokens_N = (tensors.target_NY != IGNORED).sum(1).cumsum(0)
        return tensors.rows(slice(0, int((tokens_N < min_tokens).sum()) + 1))


def read_pairs(source: str, fields: tuple[str, str]) -> list[Pair]:
    """Two fields of each row of a .jsonl, .parquet or dataset. Raises DataError where one is
    empty."""
    pairs = []
    for place, texts in read_rows(source, fields):
        if not all(map(str.strip, texts)):
            raise DataError(
                f"{place} has an empty field: need some text in each. try: drop that row"
            )
        pairs.append(Pair(*texts))
    return pairs


def cut_pairs(texts: list[str], source_share: float, piece_chars: int) -> list[Pair]:
    """Each document cut between two words: u is about `source_share` of it, y the rest, and u + y
    is the document. One of more than `piece_chars` characters gives several pairs, one for each
    piece of about equal length; one of a single word gives none."""
    pairs = []
    for text in texts:
        for piece in _pieces(text, piece_chars):
            at = _nearest(_word_ends(piece.rstrip()), round(len(piece) * source_share))
            if at is not None:
                pairs.append(Pair(piece[:at], piece[at:]))
    return pairs


def _pieces(text: str, chars: int) -> list[str]:
    """Pieces of about equal length, `chars` or less, give or take a word; a stretch without white
    space stays whole."""
    count = -(-len(text) // chars)
    ends = _word_ends(text) if count > 1 else []
    edges = {0, len(text)}
    for number in range(1, count):
        at = round(len(text) * number / count)
        end = _nearest(ends, at)
        if end is not None and abs(end - at) < chars // 2:
            edges.add(end)
    return [text[start:end] for start, end in itertools.pairwise(sorted(edges))]


def _word_ends(text: str) -> list[int]:
    """Where white space begins after a word."""
    return [match.start() for match in re.finditer(r"(?<=\S)\s", text)]


def _nearest(ends: list[int], at: int) -> int | None:
    """Of sorted ends the one nearest to `at`, the first of two."""
    index = bisect.bisect_right(ends, at)
    return min(ends[max(index - 1, 0) : index + 1], key=lambda end: abs(end - at), default=None)


def pair_tensors(
    pairs: list[Pair], tokenizer, source_length: int, target_length: int
) -> PairTensors:
    """Token ids of the pairs, as wide as the longest within `source_length` and `target_length`.

    A source that is too long keeps its end, a target its beginning. The tokenizer's eos, if it has
    one, ends each target that is not cut and has room for it. A model adds its own BOS, so lengths
    do not count one. Raises DataError where there is no pair, or no token in one."""
    if not pairs:
        raise DataError("no text has two words to cut between: need a pair. try: another file")
    encode = encoder(tokenizer)
    source_encodings, target_encodings = map(encode, zip(*pairs, strict=True))
    for number, sides in enumerate(zip(source_encodings, target_encodings, strict=True)):
        if not all(side.ids for side in sides):
            raise DataError(
                f"pair {number} has a side without a token: need text that the tokenizer knows. "
                "try: leave that pair out"
            )
    sources = [encoding.ids for encoding in source_encodings]
    targets = [encoding.ids for encoding in target_encodings]
    bytes_N = [
        int(byte_counts(pair.target, encoding.offsets)[:target_length].sum())
        for pair, encoding in zip(pairs, target_encodings, strict=True)
    ]
    eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    pad = [*eos, 0][0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    return PairTensors(
        _padded([ids[-source_length:] for ids in sources], pad, "left"),
        _padded([[1] * len(ids[-source_length:]) for ids in sources], 0, "left"),
        _padded([(ids + eos)[:target_length] for ids in targets], IGNORED, "right"),
        cut_sources=sum(len(ids) > source_length for ids in sources),
        cut_targets=sum(len(ids) > target_length for ids in targets),
        target_bytes_N=torch.tensor(bytes_N),
    )


def _padded(rows: list[list[int]], fill: int, side: str) -> Tensor:
    return pad_sequence([torch.tensor(ids) for ids in rows], True, fill, padding_side=side)
