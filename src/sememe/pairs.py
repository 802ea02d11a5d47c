"""Rows or documents → pairs of a source u and a target y → (N, U) and (N, Y) token tensors."""

from __future__ import annotations

import bisect
import itertools
import math
import re
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from sememe.errors import DataError
from sememe.keys import Data
from sememe.options import checked
from sememe.rows import IGNORED
from sememe.texts import byte_counts, encoder, read_rows, read_texts

SOURCE_SHARE = 0.25
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
    target_bytes_N: Tensor | None = None
    """UTF-8 bytes of each target without what was cut; None where the pairs are not of a text."""
    cut: int = 0
    """Pairs of which a side was too long."""

    def __len__(self) -> int:
        return len(self.source_NU)

    def rows(self, index: Tensor | slice) -> PairTensors:
        """Some of the pairs, in the order of `index`."""
        tensors = {name: value for name, value in vars(self).items() if torch.is_tensor(value)}
        return replace(self, **{name: value[index] for name, value in tensors.items()})

    def joined(self, bos: int) -> tuple[Tensor, Tensor, Tensor]:
        """(N, 1 + U + Y) ids of BOS, source and target without a gap, their mask, and labels: -100
        but for the target."""
        ids, mask = self._after(bos)
        labels = torch.cat([torch.full_like(ids, IGNORED), self.target_NY], 1)
        ids = torch.cat([ids, self.target_NY.clamp(min=0)], 1)
        mask = torch.cat([mask, self.target_NY != IGNORED], 1)
        order = mask.argsort(dim=1, descending=True, stable=True)
        return tuple(x.gather(1, order) for x in (ids, mask, labels))

    def prompts(self, bos: int) -> tuple[Tensor, Tensor]:
        """(N, 1 + U) ids of BOS and source, padded on the left, and their mask."""
        ids, mask = self._after(bos)
        order = mask.argsort(dim=1, stable=True)
        return tuple(x.gather(1, order) for x in (ids, mask))

    def _after(self, bos: int) -> tuple[Tensor, Tensor]:
        return (
            F.pad(self.source_NU, (1, 0), value=bos),
            F.pad(self.source_mask_NU, (1, 0), value=1),
        )

    def source_texts(self, tokenizer) -> list[str]:
        """The sources as they are written, without what was cut."""
        return _decoded(tokenizer, self.source_NU, self.source_mask_NU == 1)

    def target_texts(self, tokenizer) -> list[str]:
        """The targets as they are written, without what was cut."""
        return _decoded(tokenizer, self.target_NY, self.target_NY != IGNORED)


def _decoded(tokenizer, ids_NT: Tensor, real_NT: Tensor) -> list[str]:
    rows = [ids_T[real_T] for ids_T, real_T in zip(ids_NT, real_NT, strict=True)]
    return tokenizer.batch_decode(rows, skip_special_tokens=True)


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
        data = checked(Data, recipe["data"])
        if not (data.fields or data.source_share or recipe.get("system") == "planner"):
            return None
        share = data.source_share or SOURCE_SHARE
        return cls(data.fields, share, recipe["source_length"], recipe["target_length"])

    def load(
        self,
        source: str,
        tokenizer,
        max_pairs: int | None = None,
        min_tokens: float = math.inf,
    ) -> PairTensors:
        """The first pairs of a text: at most `max_pairs`, or as few as have `min_tokens` target
        tokens. Raises DataError."""
        if self.fields:
            pairs = read_pairs(source, self.fields)
        else:
            pairs = self._cut(read_texts(source), tokenizer)
        tensors = pair_tensors(pairs[:max_pairs], tokenizer, self.source_length, self.target_length)
        tokens_N = (tensors.target_NY != IGNORED).sum(1).cumsum(0)
        return tensors.rows(slice(0, int((tokens_N < min_tokens).sum()) + 1))

    def _cut(self, texts: list[str], tokenizer) -> list[Pair]:
        """Pieces whose two sides about fill their tokens."""
        sample = max(texts, key=len)[:SAMPLE_CHARS]
        tokens = max(1, len(tokenizer(sample, add_special_tokens=False)["input_ids"]))
        share = self.source_share
        room = min(self.source_length / share, self.target_length / (1 - share))
        return cut_pairs(texts, share, max(2, int(FILLED * room * len(sample) / tokens)))


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
    pieces = [piece for text in texts for piece in _pieces(text, piece_chars)]
    cuts = [_nearest(_word_ends(piece), round(len(piece) * source_share)) for piece in pieces]
    return [Pair(piece[:at], piece[at:]) for piece, at in zip(pieces, cuts, strict=True) if at]


def _pieces(text: str, chars: int) -> list[str]:
    """Pieces of about equal length, `chars` or less, give or take a word; a stretch without white
    space stays whole."""
    count = -(-len(text) // chars)
    ends = _word_ends(text) if count > 1 else []
    inner = {_nearest(ends, round(len(text) * number / count)) for number in range(1, count)}
    return [text[start:end] for start, end in itertools.pairwise(sorted({0, len(text)} | inner))]


def _word_ends(text: str) -> list[int]:
    """Where white space begins between two words."""
    return [match.start() for match in re.finditer(r"(?<=\S)\s+(?=\S)", text)]


def _nearest(ends: list[int], at: int) -> int:
    """Of sorted ends the one nearest to `at`, the first of two; 0 where there is none."""
    index = bisect.bisect_right(ends, at)
    return min(ends[max(index - 1, 0) : index + 1], key=lambda end: abs(end - at), default=0)


def pair_tensors(
    pairs: list[Pair], tokenizer, source_length: int, target_length: int
) -> PairTensors:
    """Token ids of the pairs, as wide as the longest within `source_length` and `target_length`.

    A source that is too long keeps its end, a target its beginning. The tokenizer's eos, if it has
    one, ends each target that is not cut and has room for it. A model adds its own BOS, so lengths
    do not count one. Raises DataError where there is no pair."""
    if not pairs:
        raise DataError("no text has two words to cut between: need a pair. try: another file")
    source_texts, target_texts = zip(*pairs, strict=True)
    sources, targets = map(encoder(tokenizer), (source_texts, target_texts))
    eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    source_rows = [torch.tensor(encoding.ids[-source_length:]) for encoding in sources]
    target_rows = [torch.tensor((encoding.ids + eos)[:target_length]) for encoding in targets]
    source_NU = pad_sequence(source_rows, True, IGNORED, padding_side="left")
    bytes_N = [
        int(byte_counts(text, encoding.offsets)[:target_length].sum())
        for text, encoding in zip(target_texts, targets, strict=True)
    ]
    return PairTensors(
        source_NU.clamp(min=0),
        (source_NU != IGNORED).long(),
        pad_sequence(target_rows, True, IGNORED),
        torch.tensor(bytes_N),
        sum(
            len(source) > source_length or len(target) > target_length
            for source, target in zip(sources, targets, strict=True)
        ),
    )
