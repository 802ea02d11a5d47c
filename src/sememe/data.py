"""Text files and datasets → documents → (N, T) token blocks, and the order of training."""

from __future__ import annotations

import codecs
import copy
import functools
import itertools
import json
import re
import reprlib
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sememe.errors import DataError, reason
from sememe.paths import locate, shown

PIECE_CHARS = 200_000
BATCH = 16  # pieces, which the tokenizer works on in parallel
NEED_FILE = "need one of .txt, .jsonl, .parquet, or a datasets id"


# Files and datasets → texts


def read_texts(source: str) -> list[str]:
    """The documents of a source, in order: a .txt is one; a .jsonl, a .parquet or the train split
    of a dataset on the Hub has one in the field `text` of each row; `file.jsonl#response` names
    another field.

    An empty row stays, as "". Raises DataError when the source is missing, unreadable, of another
    kind, lacks the field, holds what is no text, or has no text at all."""
    _, name, field = locate(source)
    texts = [text for _, (text,) in read_rows(name, (field,))]
    if not any(map(str.strip, texts)):
        raise DataError(
            f"{source} is empty, it has no character other than white space: need some text. "
            "try: another file or another field"
        )
    return texts


def read_rows(name: str, fields: tuple[str, ...]) -> Iterator[tuple[str, list[str]]]:
    """Each row of a file or dataset: how a message names it, and the text of each field."""
    place = name
    try:
        for number, row in _rows(name):
            place = f"{name} line {number}"
            if isinstance(row, bytes):
                row = json.loads(row)
            yield place, [_text(row, field, place) for field in fields]
    # pyarrow's are among these.
    except (OSError, ValueError, NotImplementedError, RecursionError) as fault:
        raise DataError(
            f"{place} cannot be read ({reason(fault)}): need a file that may be read, of UTF-8 "
            "text, of a JSON object per line, or an intact .parquet. try: mend or drop that line, "
            "check its permissions, or iconv -f latin1 -t utf-8"
        ) from fault


def _rows(name: str) -> Iterable[tuple[int, Any]]:
    """Rows with the numbers that a message names; those of a .jsonl as bytes."""
    path = locate(name)[0]
    if path is None:
        return _hub_rows(name)
    suffix = path.suffix if path.is_file() else None
    if suffix == ".txt":
        return [(1, {"text": path.read_bytes().decode("utf-8-sig")})]
    if suffix == ".jsonl":
        return jsonl_lines(path)
    if suffix == ".parquet":
        import pyarrow.parquet as pq

        return enumerate(pq.read_table(path).to_pylist(), start=1)
    raise DataError(
        f"{name} is a {'folder' if suffix is None else f'file {suffix}'}: {NEED_FILE}. "
        "try: one JSON object per line in a .jsonl"
    )


def jsonl_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """The lines that hold a row, with their numbers in the file, without a byte order mark."""
    # As bytes, since only \n ends a line: a JSON string may hold other line ends.
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            line = line.removeprefix(codecs.BOM_UTF8)
            if line.strip():
                yield number, line


def _hub_rows(name: str) -> Iterable[tuple[int, Any]]:
    file = name.endswith((".txt", ".jsonl", ".parquet"))
    if file or not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name, re.ASCII):
        raise DataError(
            f"{shown(name)} does not exist: {NEED_FILE}. try: a path from the current folder; a "
            "text itself goes into a .txt file"
        )
    import datasets

    try:
        return enumerate(datasets.load_dataset(name, split="train"), start=1)
    except Exception as fault:
        raise DataError(
            f"{name} is no file here and could not be loaded with datasets ({reason(fault)}): need "
            "a file, or a dataset id and a network connection. "
            "try: HF_HUB_OFFLINE=1 for one that was loaded before"
        ) from fault


def _text(row: Any, field: str, place: str) -> str:
    """The field of a row."""
    text = row.get(field) if isinstance(row, dict) else None
    if not isinstance(text, str):
        raise DataError(
            f"{place} has no field {field!r} of text, it has {reprlib.repr(row)}: need text in "
            "every row. try: drop that row, or FILE#FIELD for another field"
        )
    return check_text(text, place)


def check_text(text: str, place: str) -> str:
    """The text itself. Raises DataError for half of a surrogate pair, legal in JSON, which no
    tokenizer and no file takes."""
    try:
        text.encode()
    except UnicodeEncodeError as fault:
        raise DataError(
            f"{place} has half of a character at character {fault.start}: need text that UTF-8 can "
            "hold. try: drop it, or text.encode('utf-8', 'replace').decode()"
        ) from fault
    return text


# Texts → token blocks


def encoder(tokenizer) -> Callable[[list[str]], list[Any]]:
    """Texts → for each its `ids`, no special ones, and their `offsets`, the characters [from, to)
    that each stands for. Raises DataError for a tokenizer that does not know these."""
    if not getattr(tokenizer, "is_fast", False):
        raise DataError(
            f"{type(tokenizer).__name__} does not tell which characters its tokens stand for: need "
            "a tokenizer of the tokenizers library. try: another base"
        )
    plain = copy.deepcopy(tokenizer.backend_tokenizer)
    plain.post_processor = None  # adds nothing, and trims no white space off the offsets
    plain.no_truncation()
    plain.no_padding()
    return functools.partial(plain.encode_batch, add_special_tokens=False)


def token_windows(
    encoding, characters: int, window: int
) -> Iterator[tuple[list[int], tuple[int, int]]]:
    """The windows of a text, as token ids and the characters [from, to) that they stand for: put
    together, they are all of it."""
    ids, offsets = encoding.ids, encoding.offsets
    start = start_character = 0
    while start < len(ids):
        limit = end = min(start + window, len(ids))
        # A byte-level tokenizer spells an emoji with several tokens, which should stay together. A
        # window that is too short for them cuts the character all the same.
        while start < end < len(ids) and offsets[end][0] < offsets[end - 1][1]:
            end -= 1
        end = end if end > start else limit
        end_character = max(start_character, offsets[end - 1][1]) if end < len(ids) else characters
        yield ids[start:end], (start_character, end_character)
        start, start_character = end, end_character


def byte_counts(text: str, offsets: list[tuple[int, int]]) -> Tensor:
    """(n,) long: UTF-8 bytes of the text that each of its tokens stands for; their sum is all of
    it.

    A token ends where its last character does, so what stands between two tokens counts with the
    second. Tokens of one character share its bytes: decoded one by one they would be replacement
    characters."""
    byte_n = np.cumsum([0, *map(len, map(str.encode, text))])
    end_n = np.maximum.accumulate([end for _, end in offsets])
    end_n[-1] = len(text)
    # The last token of each character ends at a known byte; those before it are spread evenly.
    last_n = np.flatnonzero(np.diff(end_n, append=-1))
    known_n = byte_n[end_n[last_n]]
    bytes_n = np.interp(np.arange(len(end_n)), [-1, *last_n], [0, *known_n])
    return torch.from_numpy(np.diff(bytes_n.astype(np.int64), prepend=0))


@dataclass(frozen=True)
class TextBlocks:
    """Blocks of token ids, and the bytes of the source that they stand for."""

    ids_NT: Tensor
    bytes_NT: Tensor
    """UTF-8 bytes of text that each token stands for: 0 for the eos between documents."""
    text: bytes
    """Of all blocks, one after the other."""

    def __len__(self) -> int:
        return len(self.ids_NT)

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
    encode = encoder(tokenizer)
    eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    pieces = (
        (eos if number and not match.start() else [], match.group())
        for number, text in enumerate(filter(str.strip, texts))
        for match in _pieces(text)
    )
    ids, byte_n, parts = [], [], []
    count = 0
    while count < limit and (batch := list(itertools.islice(pieces, BATCH))):
        encodings = encode([piece for _, piece in batch])
        for (before, piece), encoding in zip(batch, encodings, strict=True):
            if not encoding.ids:
                continue
            # Tensors one by one: a list of all ids would take several times their memory.
            ids.append(torch.tensor(before + encoding.ids))
            byte_n.append(F.pad(byte_counts(piece, encoding.offsets), (len(before), 0)))
            parts.append(piece)
            count += len(ids[-1])
    blocks = min(count, limit) // length
    if not blocks:
        raise DataError(
            f"the text has {count} tokens: need at least {length}, one block. "
            "try: more text or shorter blocks"
        )
    ids_NT, bytes_NT = (torch.cat(x)[: blocks * length].view(blocks, -1) for x in (ids, byte_n))
    return TextBlocks(ids_NT, bytes_NT, "".join(parts).encode()[: int(bytes_NT.sum())])


def _pieces(text: str) -> Iterator[re.Match]:
    """A text cut where tokenizers cut too: before a lone space, else after a lone newline.

    A space belongs to the word after it in every byte-level and sentencepiece rule; a newline often
    belongs to the punctuation before it. Next to more white space neither is sure, so those come
    last."""
    longest = f".{{1,{PIECE_CHARS}}}"
    ends = (r"\Z", r"(?<=\S)(?= \S)", r"(?<=\S\n)(?=\S)", r"(?=\s)", "")
    return re.finditer("|".join(longest + end for end in ends), text, re.DOTALL)


def block_order(num_blocks: int, steps: int, batch: int, seed: int) -> Tensor:
    """(steps * batch,) long: which block each row of each step sees; every epoch is shuffled anew.

    Equal seeds give equal orders on every machine, and a longer run begins as a shorter one
    does."""
    epochs = -(-steps * batch // num_blocks)
    generators = (torch.Generator().manual_seed(seed + epoch) for epoch in range(epochs))
    orders = [torch.randperm(num_blocks, generator=generator) for generator in generators]
    return torch.cat(orders)[: steps * batch]
