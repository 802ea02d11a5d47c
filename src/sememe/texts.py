"""Text files and datasets → rows, whole or in parts → documents → tokens. Imports no torch: it is
what each of several processes that tokenise needs."""

from __future__ import annotations

import codecs
import contextlib
import copy
import functools
import itertools
import json
import re
import reprlib
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sememe.errors import DataError, reason
from sememe.paths import locate, shown

# A tokenizer that puts a space before each text has another token at every cut, so there are few.
PIECE_CHARS = 200_000
BATCH = 4  # pieces, which the tokenizer works on in parallel: each takes some 20 MB meanwhile
READ = 1 << 20  # bytes of a file, or of the pages of a .parquet
ROWS = 64  # of a .parquet, which may be long
UTF8 = (0, 0x80, 0x800, 0x10000)  # code points from which on UTF-8 has a byte more
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


def read_rows(
    name: str, fields: tuple[str, ...], part: Part | None = None, convert: Callable | None = None
) -> Iterator[tuple[str, list[str]]]:
    """Each row of a file or dataset, or of a part of a file: how a message names it, and the text
    of each field, or what `convert` makes of it."""
    place = name
    try:
        for number, row in _rows(name, part):
            place = f"{name} line {number}"
            if isinstance(row, bytes):
                row = json.loads(row)
            yield place, [(convert or _text)(row, field, place) for field in fields]
    except FAULTS as fault:
        raise _unreadable(place, fault) from fault


# pyarrow's are among these.
FAULTS = (OSError, ValueError, NotImplementedError, RecursionError)


def _unreadable(place: str, fault: Exception) -> DataError:
    return DataError(
        f"{place} cannot be read ({reason(fault)}): need a file that may be read, of UTF-8 "
        "text, of a JSON object per line, or an intact .parquet. try: mend or drop that line, "
        "check its permissions, or iconv -f latin1 -t utf-8"
    )


def has_conversations(source: str) -> bool:
    """Whether the first row has a list in the field, which is not text."""
    _, name, field = locate(source)
    lists = read_rows(name, (field,), convert=lambda row, *_: isinstance(row[field], list))
    with contextlib.suppress(LookupError, TypeError, DataError):
        return not name.endswith(".txt") and any(next(lists, ("", ()))[1])
    return False


def _rows(name: str, part: Part | None = None) -> Iterable[tuple[int, Any]]:
    """Rows with the numbers that a message names; those of a .jsonl as bytes."""
    path = locate(name)[0]
    if path is None:
        return _hub_rows(name)
    suffix = path.suffix if path.is_file() else None
    if suffix == ".txt":
        return [(1, {"text": path.read_bytes().decode("utf-8-sig")})]
    if suffix == ".jsonl":
        return jsonl_lines(path, part)
    if suffix == ".parquet":
        return _parquet_rows(path, part)
    raise no_text(name, suffix)


def no_text(name: str, suffix: str | None) -> DataError:
    """The sentence for a folder, or a file of another kind."""
    return DataError(
        f"{name} is a {'folder' if suffix is None else f'file {suffix}'}: {NEED_FILE}. "
        "try: one JSON object per line in a .jsonl"
    )


def jsonl_lines(path: Path, part: Part | None = None) -> Iterator[tuple[int, bytes]]:
    """The lines that hold a row, with their numbers in the file, without a byte order mark."""
    start, end, first, _ = part or Part(0, sys.maxsize)
    # As bytes, since only \n ends a line: a JSON string may hold other line ends.
    with path.open("rb") as file:
        file.seek(start)
        for number, line in enumerate(file, start=first):
            start += len(line)
            line = line.removeprefix(codecs.BOM_UTF8)
            if line.strip():
                yield number, line
            if start >= end:
                return


def _parquet_rows(path: Path, part: Part | None) -> Iterator[tuple[int, dict]]:
    """Group by group, and a few rows of one at a time."""
    import pyarrow.parquet as pq

    start, end, *_ = part or Part(0, sys.maxsize)
    with pq.ParquetFile(path, buffer_size=READ) as file:
        number = 0
        for group in range(file.num_row_groups):
            rows = file.metadata.row_group(group).num_rows
            if start < number + rows and number < end:
                batches = file.iter_batches(batch_size=ROWS, row_groups=[group])
                every = (row for batch in batches for row in batch.to_pylist())
                wanted = itertools.islice(every, max(0, start - number), end - number)
                yield from enumerate(wanted, start=max(start, number) + 1)
            number += rows


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


# Texts → tokens


def encoder(tokenizer) -> Callable[[list[str]], list[Any]]:
    """Texts → for each its `ids`, no special ones, and their `offsets`, the characters [from, to)
    that each stands for. Raises DataError for a tokenizer that does not know these."""
    if not getattr(tokenizer, "is_fast", False):
        raise DataError(
            f"{type(tokenizer).__name__} does not tell which characters its tokens stand for: need "
            "a tokenizer of the tokenizers library. try: another base"
        )
    return plain_encoder(copy.deepcopy(tokenizer.backend_tokenizer))


def plain_encoder(plain) -> Callable[[list[str]], list[Any]]:
    """`encoder` of a tokenizer of the tokenizers library, which is changed."""
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


def byte_counts(text: str, offsets: list[tuple[int, int]]) -> np.ndarray:
    """(n,) int64: UTF-8 bytes of the text that each of its tokens stands for; their sum is all of
    it.

    A token ends where its last character does, so what stands between two tokens counts with the
    second. Tokens of one character share its bytes: decoded one by one they would be replacement
    characters."""
    points = np.frombuffer(text.encode("utf-32-le"), "<u4")
    byte_n = np.append(0, np.searchsorted(UTF8, points, "right").cumsum())
    end_n = np.maximum.accumulate([end for _, end in offsets])
    end_n[-1] = len(text)
    # The last token of each character ends at a known byte; those before it are spread evenly.
    last_n = np.flatnonzero(np.diff(end_n, append=-1))
    known_n = byte_n[end_n[last_n]]
    bytes_n = np.interp(np.arange(len(end_n)), [-1, *last_n], [0, *known_n])
    return np.diff(bytes_n.astype(np.int64), prepend=0)


# A file in parts, for several processes


class Part(NamedTuple):
    """Bytes [start, end) of a file, or rows of a .parquet."""

    start: int
    end: int
    number: int = 1
    """Of its first line."""
    ends: bool = True
    """Whether its last document ends with it."""


def parts_of(path: Path, field: str, size: int) -> list[Part]:
    """A file in parts of about `size` bytes of text, cut between rows, or where tokenizers cut; a
    blank .txt has none. Raises DataError."""
    cut = {".txt": _text_parts, ".jsonl": _line_parts, ".parquet": _row_parts}.get(path.suffix)
    if cut is None or not path.is_file():
        raise no_text(str(path), path.suffix if path.is_file() else None)
    try:
        return list(cut(path, field, size))
    except FAULTS as fault:
        raise _unreadable(str(path), fault) from fault


def _text_parts(path: Path, field: str, size: int) -> Iterator[Part]:
    with path.open("rb") as file:
        start = end = len(codecs.BOM_UTF8) * (file.read(3) == codecs.BOM_UTF8)
    if not any(map(str.strip, _decoded(path, Part(start, sys.maxsize)))):
        return
    for piece, last in pieces(_decoded(path, Part(start, sys.maxsize))):
        end += len(piece.encode())
        if last or end - start >= size:
            yield Part(start, end, ends=last)
            start = end


def _line_parts(path: Path, field: str, size: int) -> Iterator[Part]:
    start, number = 0, 1
    with path.open("rb") as file:
        while lines := file.read(size) + file.readline():
            yield Part(start, start + len(lines), number)
            start += len(lines)
            number += lines.count(b"\n")


def _row_parts(path: Path, field: str, size: int) -> Iterator[Part]:
    import pyarrow.parquet as pq

    about = pq.read_metadata(path)
    groups = [about.row_group(number) for number in range(about.num_row_groups)]
    chunks = [group.column(n) for group in groups for n in range(group.num_columns)]
    total = sum(x.total_uncompressed_size for x in chunks if x.path_in_schema == field)
    step = max(1, about.num_rows * size // max(1, total))
    for start in range(0, about.num_rows, step):
        yield Part(start, min(start + step, about.num_rows), start + 1)


def _decoded(path: Path, part: Part) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        with path.open("rb") as file:
            file.seek(part.start)
            while content := file.read(min(READ, part.end - file.tell())):
                yield decoder.decode(content)
            yield decoder.decode(b"", final=True)
    except FAULTS as fault:
        raise _unreadable(str(path), fault) from fault


def part_documents(source: str, part: Part) -> Iterator[tuple[str, bool]]:
    """`documents_of` of a part of a file."""
    path, name, field = locate(source)
    if path.suffix != ".txt":
        return documents_of(text for _, (text,) in read_rows(name, (field,), part))
    return ((piece, last and part.ends) for piece, last in pieces(_decoded(path, part)))


# Texts → tokens of all of them


def documents_of(texts: Iterable[str]) -> Iterator[tuple[str, bool]]:
    """The pieces of all texts that are not blank, and whether each is the last of its text."""
    return (piece for text in texts if text.strip() for piece in pieces([text]))


def pieces(reads: Iterable[str]) -> Iterator[tuple[str, bool]]:
    """A text, as it is read bit by bit, cut where tokenizers cut too: before a lone space, else
    after a lone newline; and whether it ends with that piece.

    A space belongs to the word after it in every byte-level and sentencepiece rule; a newline often
    belongs to the punctuation before it. Next to more white space neither is sure, so those come
    last."""
    longest = f".{{1,{PIECE_CHARS}}}"
    ends = (r"\Z", r"(?<=\S)(?= \S)", r"(?<=\S\n)(?=\S)", r"(?=\s)", "")
    cut = re.compile("|".join(longest + end for end in ends), re.DOTALL)
    text, start, reads = "", 0, iter(reads)
    while True:
        # As much as a piece and the two characters that it may look at behind it.
        while len(text) - start < PIECE_CHARS + 3 and (more := next(reads, None)) is not None:
            text, start = text[start:] + more, 0
        match = cut.match(text, start)
        if match is None:
            return
        start = match.end()
        yield match.group(), start == len(text)


class Tokens(NamedTuple):
    """Ids of consecutive documents, each with the eos behind it."""

    tokens: np.ndarray
    bytes: np.ndarray
    """UTF-8 bytes of text that each stands for: 0 for the eos."""
    starts: np.ndarray
    """Where documents begin; one that goes on from an earlier part, at 0."""


def tokenise(
    stream: Iterator[tuple[str, bool]],
    encode: Callable,
    eos: int | None,
    limit: int = sys.maxsize,
    encoded: Callable[[str], Any] = bool,
) -> Tokens:
    """Tokens of the pieces that `documents_of` gives; soon after `limit` tokens it stops.
    `encoded` is called with each piece that gave some."""
    ids, counts, starts = [], [], []
    total, begins, after = 0, True, [] if eos is None else [eos]
    while total < limit and (batch := list(itertools.islice(stream, BATCH))):
        encodings = encode([piece for piece, _ in batch])
        for (piece, last), encoding in zip(batch, encodings, strict=True):
            if begins:
                starts.append(total)
            begins, end = last, after * last
            if encoding.ids:
                encoded(piece)
                counts.append(byte_counts(piece, encoding.offsets).astype(np.uint32))
            # Arrays one by one: a list of all ids would take several times their memory.
            ids.append(np.array(encoding.ids + end, np.uint32))
            counts.append(np.zeros(len(end), np.uint32))
            total += len(ids[-1])
    empty = np.zeros(0, np.uint32)
    joined = (np.concatenate([empty, *arrays]) for arrays in (ids, counts))
    return Tokens(*joined, np.array(starts, np.uint32))
