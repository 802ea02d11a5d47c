"""Rows or documents → pairs (u, y) of a source and a target → (N, U) and (N, Y) token tensors."""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from sememe.data import byte_counts, encoder, jsonl_lines, read_texts
from sememe.errors import DataError
from sememe.paths import locate

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

OPENING = 0.25
IGNORED = -100
FILLED = 0.85  # of the tokens that a pair may have, so that few pieces of a text are cut
SAMPLE_CHARS = 20_000  # of a text, for the characters that one of its tokens takes


class Pair(NamedTuple):
    source: str
    target: str


@dataclass(frozen=True)
class PairTensors:
    """Sources right-aligned under their mask, targets left-aligned with -100 behind; no BOS
    anywhere."""

    source_NU: Tensor
    source_mask_NU: Tensor
    target_NY: Tensor
    cut_sources: int = 0
    cut_targets: int = 0
    target_bytes_N: Tensor | None = None
    """UTF-8 bytes of each target, of what was cut none; None where the pairs are not of a text."""

    def __len__(self) -> int:
        return len(self.source_NU)

    def rows(self, index: Tensor | slice) -> PairTensors:
        """Some of the pairs, in the order of `index`; how many were cut stays that of all."""
        return PairTensors(
            self.source_NU[index],
            self.source_mask_NU[index],
            self.target_NY[index],
            self.cut_sources,
            self.cut_targets,
            None if self.target_bytes_N is None else self.target_bytes_N[index],
        )

    def joined(self, bos: int) -> tuple[Tensor, Tensor, Tensor]:
        """(N, 1 + U + Y) ids of BOS, source and target without a gap, their mask, and labels: -100
        but for the target."""
        one_N1 = torch.ones_like(self.source_NU[:, :1])
        mask = torch.cat([one_N1, self.source_mask_NU, (self.target_NY != IGNORED).long()], 1)
        ids = torch.cat([one_N1 * bos, self.source_NU, self.target_NY.clamp(min=0)], 1)
        labels = torch.cat(
            [one_N1 * IGNORED, torch.full_like(self.source_NU, IGNORED), self.target_NY], 1
        )
        order = mask.argsort(dim=1, descending=True, stable=True)
        return tuple(x.gather(1, order) for x in (ids, mask, labels))

    def opened(self, bos: int) -> tuple[Tensor, Tensor]:
        """(N, 1 + U) ids of BOS and source, padded on the left, and their mask."""
        first_N1 = self.source_NU.shape[1] - self.source_mask_NU.sum(1, keepdim=True)
        ids = torch.cat([torch.zeros_like(first_N1), self.source_NU], 1).scatter(1, first_N1, bos)
        mask = torch.cat([torch.zeros_like(first_N1), self.source_mask_NU], 1).scatter(
            1, first_N1, 1
        )
        return ids, mask

    def target_texts(self, tokenizer: PreTrainedTokenizerBase) -> list[str]:
        """The targets as they are written, what was cut left out."""
        return [
            tokenizer.decode(row[row != IGNORED], skip_special_tokens=True)
            for row in self.target_NY
        ]

    def cut(self) -> str | None:
        """One sentence on what was cut, if anything was."""
        if not self.cut_sources and not self.cut_targets:
            return None
        return (
            f"of {len(self)} pairs, {self.cut_sources} sources keep their last "
            f"{self.source_NU.shape[1]} tokens and "
            f"{self.cut_targets} targets their first {self.target_NY.shape[1]}"
        )


@dataclass(frozen=True)
class PairForm:
    """How pairs are had of a text: `fields` of a row, or each document cut at `opening`; and their
    tokens at most."""

    fields: tuple[str, str] | None = None
    opening: float = OPENING
    source_length: int = 128
    target_length: int = 128

    @classmethod
    def of(cls, recipe: dict[str, Any]) -> PairForm | None:
        """That of a recipe's plain values; None where it trains on running text."""
        data = recipe.get("data", {})
        source, target, opening = (data.get(key) for key in ("source", "target", "opening"))
        if source is None and opening is None and recipe.get("system") != "planner":
            return None
        fields = None if source is None or target is None else (source, target)
        return cls(
            fields,
            OPENING if opening is None else opening,
            recipe["source_length"],
            recipe["target_length"],
        )

    def load(
        self,
        spec: str,
        tokenizer: PreTrainedTokenizerBase,
        most: int | None = None,
        tokens: int | None = None,
    ) -> PairTensors:
        """The first pairs of a text: `most` of them, or as few as have `tokens` target tokens.
        Raises DataError."""
        pairs = read_pairs(
            spec, self.fields, self.opening, None if self.fields else self._chars(spec, tokenizer)
        )
        made = pair_tensors(pairs[:most], tokenizer, self.source_length, self.target_length)
        if tokens is None:
            return made
        counted_N = (made.target_NY != IGNORED).sum(1).cumsum(0)
        return made.rows(slice(0, int((counted_N < tokens).sum()) + 1))

    def _chars(self, spec: str, tokenizer: PreTrainedTokenizerBase) -> int:
        """Of a piece whose two parts about fill their tokens."""
        text = max(read_texts(spec), key=len)[:SAMPLE_CHARS]
        tokens = len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        most = min(self.source_length / self.opening, self.target_length / (1 - self.opening))
        return max(2, int(FILLED * most * len(text) / max(1, tokens)))


def read_pairs(
    spec: str,
    fields: tuple[str, str] | None = None,
    opening: float = OPENING,
    chars: int | None = None,
    split: str = "train",
) -> list[Pair]:
    """The pairs of a .jsonl, .parquet, .txt or datasets id.

    With `fields`, u and y are two fields of a row. Without, each document is cut in front of white
    space: its first `opening` share is u, the rest y, and u + y is the document; one of more than
    `chars` characters gives several pairs, one for each piece of about equal length. Documents with
    nothing to cut between give none.

    Raises:
        DataError: what `read_texts` raises; an empty field; no pair at all."""
    if fields is None:
        return _cut_pairs(spec, read_texts(spec, split=split), opening, chars)
    source, target = fields
    path, name, _ = locate(spec)
    if name != spec:
        raise DataError(
            f"{spec} names the field {spec[len(name) + 1 :]!r}, and source = {source}, target = "
            f"{target} name two "
            f"more: need one way. try: {name}"
        )
    if source == target:
        raise DataError(
            f"source and target are both the field {source!r} of {spec}: need two fields. "
            "try: source: instruction, target: response; or neither, to cut the text"
        )
    if Path(spec).suffix == ".txt":
        raise DataError(
            f"{spec} is plain text, it has no fields {source!r} and {target!r}: need a .jsonl or "
            ".parquet with them. "
            "try: leave source and target out, then each text is cut at `opening`"
        )
    columns = [read_texts(spec, field, split) for field in fields]
    for row, pair in enumerate(zip(*columns, strict=True)):
        for field, text in zip(fields, pair, strict=True):
            if not text.strip():
                raise DataError(
                    f"{spec} {_place(path, row)} has nothing in {field!r}: need some text in both "
                    f"{source!r} and "
                    f"{target!r}. try: drop that row"
                )
    return [Pair(*texts) for texts in zip(*columns, strict=True)]


def _place(path: Path | None, row: int) -> str:
    """Where a row of a jsonl is, blank lines counted; of anything else, its number."""
    if path is None or path.suffix != ".jsonl":
        return f"row {row}"
    return f"line {next(itertools.islice(jsonl_lines(path), row, None))[0]}"


def _cut_pairs(spec: str, texts: list[str], opening: float, chars: int | None) -> list[Pair]:
    if not 0 < opening < 1:
        raise DataError(
            f"opening = {opening}: need a share of each document, between 0 and 1. try: {OPENING}"
        )
    if chars is not None and chars < 2:
        raise DataError(f"pieces of {chars} characters: need at least 2. try: 1000")
    pairs = []
    for text in texts:
        for piece in _pieces(text, chars):
            at = _cut(piece, opening)
            if at is not None:
                pairs.append(Pair(piece[:at], piece[at:]))
    if not pairs:
        raise DataError(
            f"{spec} has no document of two words to cut between: need longer ones. try: another "
            "file"
        )
    return pairs


def _pieces(text: str, chars: int | None) -> list[str]:
    """Pieces of about equal length, `chars` or less, give or take a word; a stretch without white
    space stays whole."""
    if chars is None or len(text) <= chars:
        return [text]
    count = -(-len(text) // chars)
    places = [round(len(text) * number / count) for number in range(1, count)]
    ends = [_near(text, at, max(at - chars // 2, 0), at + chars // 2) for at in places]
    edges = sorted({0, len(text), *(end for end in ends if end is not None)})
    return [text[start:end] for start, end in itertools.pairwise(edges)]


def _cut(text: str, opening: float) -> int | None:
    """Where u ends, next to the asked share, so that u and y both have a word."""
    inner = len(text) - len(text.lstrip()), len(text.rstrip())
    return _near(text, round(len(text) * opening), *inner)


def _near(text: str, at: int, start: int = 0, end: int | None = None) -> int | None:
    """The beginning of white space behind a word that is nearest to `at`, within (start, end)."""
    end = len(text) if end is None else min(end, len(text))
    before = re.match(r"(?s:.*)\S(?=\s)", text[start : min(at + 1, end)])
    behind = re.compile(r"(?<=\S)\s").search(text, max(at, start + 1), end)
    found = [start + before.end()] if before else []
    if behind:
        found.append(behind.start())
    return min(found, key=lambda place: abs(place - at), default=None)


def pair_tensors(
    pairs: list[Pair], tokenizer: PreTrainedTokenizerBase, source_length: int, target_length: int
) -> PairTensors:
    """Token ids of the pairs, as wide as the longest within `source_length` and `target_length`.

    A source that is too long keeps its end, a target its beginning. The tokenizer's eos, if it has
    one, ends each target that is not cut and has room for it. A model adds its own BOS, so lengths
    do not count one.

    Raises:
        DataError: no pair, a length below 1, or a pair that has no token."""
    if source_length < 1 or target_length < 1:
        raise DataError(
            f"{source_length} source tokens and {target_length} target tokens: need at least 1 "
            "each. "
            "try: source_length=128, target_length=128"
        )
    if not pairs:
        raise DataError("there are no pairs: need at least one. try: another file")
    encode = encoder(tokenizer)
    sources, encoded = (encode([pair[side] for pair in pairs]) for side in (0, 1))
    sources, targets = ([one.ids for one in side] for side in (sources, encoded))
    for number, (source, target) in enumerate(zip(sources, targets, strict=True)):
        if not source or not target:
            raise DataError(
                f"the {'target' if source else 'source'} of pair {number} has no token: need text "
                "that the "
                "tokenizer knows. try: leave that pair out"
            )
    cut_sources, cut_targets = (
        sum(len(ids) > limit for ids in side)
        for side, limit in ((sources, source_length), (targets, target_length))
    )
    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    ending = [] if eos is None else [eos]
    sources = [ids[-source_length:] for ids in sources]
    bytes_N = torch.tensor(
        [
            int(byte_counts(pair.target, one.offsets)[:target_length].sum())
            if len(one.ids) > target_length
            else len(pair.target.encode())
            for pair, one in zip(pairs, encoded, strict=True)
        ]
    )
    targets = [ids + ending if len(ids) < target_length else ids[:target_length] for ids in targets]
    pad = pad if pad is not None else eos if eos is not None else 0
    source_NU = _padded(sources, pad, left=True)
    mask_NU = _padded([[1] * len(ids) for ids in sources], 0, left=True)
    return PairTensors(
        source_NU, mask_NU, _padded(targets, IGNORED, left=False), cut_sources, cut_targets, bytes_N
    )


def _padded(rows: list[list[int]], fill: int, left: bool) -> Tensor:
    padded = torch.full((len(rows), max(map(len, rows))), fill, dtype=torch.long)
    for out, ids in zip(padded, rows, strict=True):
        out[len(out) - len(ids) if left else 0 :][: len(ids)] = torch.tensor(ids)
    return padded
