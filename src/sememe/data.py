"""Text files → documents → (N, T) token blocks, and the order in which a run sees them."""

from __future__ import annotations

import codecs
import copy
import difflib
import functools
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sememe.errors import DataError
from sememe.paths import locate, shown, unreadable

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SUFFIXES = (".txt", ".jsonl", ".parquet")
PIECE_CHARS = 200_000
HUB_TIMEOUT_S = 5


def read_texts(source: str, field: str = "text", split: str = "train") -> list[str]:
    """The documents of a source, in order: a .txt is one; a .jsonl or .parquet has one per row, in
    `field`.

    `file.jsonl#response` names the field. What is no file is a `datasets` id; `split` is for those.
    An empty row stays, as "", so that two fields of one file keep their pairs. Raises DataError
    when the source is missing, unreadable, of another kind, lacks the field, holds what is no text,
    or has no text at all."""
    path, name, field = locate(source, field)
    if path is None:
        if Path(name).suffix in SUFFIXES or not re.fullmatch(
            r"\w[\w.-]*(/\w[\w.-]*)?", name, re.ASCII
        ):
            raise _missing(source, name)
        texts = _from_datasets(name, field, split)
    elif path.is_dir() or path.suffix not in SUFFIXES:
        kind = "a folder" if path.is_dir() else f"a file {path.suffix or 'without a suffix'}"
        raise DataError(
            f"{source} is {kind}: need one of {', '.join(SUFFIXES)}, or a datasets id. "
            "try: one JSON object per line in a .jsonl, or plain text in a .txt"
        )
    else:
        try:
            texts = _READERS[path.suffix](path, field)
        except OSError as fault:
            raise unreadable(source, fault) from fault
    if not any(text.strip() for text in texts):
        raise DataError(
            f"{source} is empty, it has no character other than white space: need some text. "
            "try: another file or another field"
        )
    return texts


def _read_txt(path: Path, field: str) -> list[str]:
    raw = path.read_bytes()
    try:
        return [raw.decode("utf-8-sig")]
    except UnicodeDecodeError as fault:
        line = raw.count(b"\n", 0, fault.start) + 1
        raise DataError(
            f"{path} is not UTF-8, line {line} has the byte 0x{raw[fault.start]:02x}: need UTF-8 "
            "text. try: iconv -f latin1 -t utf-8"
        ) from fault


def _read_jsonl(path: Path, field: str) -> list[str]:
    texts = []
    for number, line in jsonl_lines(path):
        try:
            row = json.loads(line.decode("utf-8"))
        except ValueError as fault:  # UnicodeDecodeError and JSONDecodeError are both
            raise DataError(
                f"{path} line {number} is not JSON ({fault}): need one JSON object per line. "
                "try: mend or drop that line"
            ) from fault
        if not isinstance(row, dict):
            raise DataError(
                f"{path} line {number} holds a {type(row).__name__}: need a JSON object with "
                f'the field {field!r}. try: {{"{field}": "…"}}'
            )
        texts.append(_field(row, field, f"{path} line {number}"))
    return texts


def jsonl_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """The lines that hold a row, with their numbers in the file; a byte order mark at the beginning
    is left out."""
    with path.open(
        "rb"
    ) as file:  # bytes: only \n ends a line, a JSON string may hold other line ends
        for number, line in enumerate(file, start=1):
            line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
            if line.strip():
                yield number, line


def _field(row: dict[str, Any], field: str, where: str) -> str:
    if field not in row:
        raise DataError(
            f"{where} has no field {field!r}, it has {_listed(row)}: need the field's name. "
            f"try: FILE#{_close(field, row) or next(iter(row), 'field')}"
        )
    if row[field] is None:
        raise DataError(
            f"{where} has null in {field!r}: need text in every row. try: drop that row"
        )
    if not isinstance(row[field], str):
        raise DataError(
            f"{where} has a {type(row[field]).__name__} in {field!r}: need text. "
            "try: another field, or turn it into a string"
        )
    return check_text(row[field], f"{where}, field {field!r},")


def check_text(text: str, where: str) -> str:
    """The text itself. Raises DataError for half of a surrogate pair, legal in JSON, which no
    tokenizer and no file takes."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as fault:
        raise DataError(
            f"{where} has half of a character ({text[fault.start]!r}) at character {fault.start}: "
            "need text that "
            "UTF-8 can hold. try: drop it, or text.encode('utf-8', 'replace').decode()"
        ) from fault
    return text


def _read_parquet(path: Path, field: str) -> list[str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        names = pq.read_schema(path).names
        column = (
            pq.read_table(path, columns=[field]).column(0).to_pylist() if field in names else []
        )
    except pa.ArrowException as fault:
        raise DataError(
            f"{path} is not a readable parquet file ({str(fault).splitlines()[0]}): need an "
            "intact one. try: write it again"
        ) from fault
    if field not in names:
        _field(dict.fromkeys(names), field, str(path))
    return [_field({field: text}, field, f"{path} row {row}") for row, text in enumerate(column)]


_READERS = {".txt": _read_txt, ".jsonl": _read_jsonl, ".parquet": _read_parquet}


def _from_datasets(source: str, field: str, split: str) -> list[str]:
    try:
        import datasets
    except ImportError as fault:
        raise DataError(
            f"{shown(source)} is no file here, and the datasets library is missing: need a file or "
            "that "
            f"library.{_similar(Path(source))} try: pip install datasets"
        ) from fault
    from huggingface_hub import HfApi
    from huggingface_hub.errors import OfflineModeIsEnabled

    try:
        # Asked first because load_dataset alone retries for 23 s before it says that there is no
        # network.
        HfApi().dataset_info(source, timeout=HUB_TIMEOUT_S)
    except OfflineModeIsEnabled:
        pass  # the user wants the cached copy, and then load_dataset is quick
    except Exception as fault:
        raise _unloaded(source, fault) from fault
    try:
        rows = datasets.load_dataset(source, split=split)
    except Exception as fault:
        raise _unloaded(source, fault) from fault
    if field not in rows.column_names:
        _field(dict.fromkeys(rows.column_names), field, f"{source}, split {split!r},")
    return [
        _field({field: text}, field, f"{source} row {row}") for row, text in enumerate(rows[field])
    ]


def _unloaded(source: str, fault: Exception) -> DataError:
    said = (str(fault).strip() or type(fault).__name__).splitlines()[0]
    return DataError(
        f"{shown(source)} is no file here and could not be loaded with datasets ({said}): need a "
        "file "
        f"or a dataset id and a network connection.{_similar(Path(source))} "
        "try: a .txt or .jsonl file, or HF_HUB_OFFLINE=1 for a copy loaded before"
    )


def _missing(source: str, name: str) -> DataError:
    path = Path(name)
    hint = "check the path, it counts from the current folder"
    if path.suffix not in SUFFIXES and re.search(r"\s", source):
        hint = "put a text into a .txt file, and name that file"
    return DataError(
        f"{shown(source)} does not exist: need a file of {', '.join(SUFFIXES)}.{_similar(path)} "
        f"try: {hint}"
    )


def _similar(path: Path) -> str:
    try:
        names = {entry.name: entry for entry in path.parent.iterdir() if entry.suffix in SUFFIXES}
    except (OSError, ValueError):  # ValueError: a NUL in the name
        return ""
    close = difflib.get_close_matches(path.name, names, n=3, cutoff=0.6)
    return f" Did you mean {' or '.join(str(names[name]) for name in close)}?" if close else ""


def _close(name: str, names: Any) -> str | None:
    return next(iter(difflib.get_close_matches(name, list(names), n=1, cutoff=0.5)), None)


def _listed(names: Any) -> str:
    return ", ".join(repr(name) for name in names) or "none"


class Spread(NamedTuple):
    """Ids of a tokenizer that does not tell which characters they stand for: as if all stood for
    equally many."""

    ids: list[int]
    offsets: list[tuple[int, int]]


def encoder(tokenizer: PreTrainedTokenizerBase) -> Callable[[list[str]], list[Any]]:
    """Texts → for each its `ids`, no special ones, and their `offsets`, the characters [from, to)
    that each stands for."""
    if getattr(tokenizer, "is_fast", False):
        plain = copy.deepcopy(tokenizer.backend_tokenizer)
        plain.post_processor = None  # adds nothing, and trims no white space off the offsets
        plain.no_truncation()
        plain.no_padding()
        # Many short documents in one call: the tokenizer then works on them in parallel.
        return functools.partial(plain.encode_batch, add_special_tokens=False)

    def encode(texts: list[str]) -> list[Spread]:
        rows = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        return [
            Spread(
                ids,
                [
                    (len(text) * i // len(ids), len(text) * (i + 1) // len(ids))
                    for i in range(len(ids))
                ],
            )
            for text, ids in zip(texts, rows, strict=True)
        ]

    return encode


def byte_counts(text: str, offsets: list[tuple[int, int]], unread: int = 0) -> Tensor:
    """(n,) long: UTF-8 bytes of the text that each of its tokens stands for; their sum is all of
    it.

    A token ends where its last character does, so what stands between two tokens counts with the
    second. Tokens of one character share its bytes: decoded one by one they would be replacement
    characters. `unread`: characters ahead of those that `offsets` count from."""
    if not offsets:
        return torch.zeros(0, dtype=torch.long)
    point_n = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    byte_n = np.append(0, np.cumsum(1 + (point_n > 0x7F) + (point_n > 0x7FF) + (point_n > 0xFFFF)))
    end_n = np.maximum.accumulate(np.array(offsets)[:, 1]) + unread
    end_n[-1] = len(text)
    last_n = np.append(
        np.flatnonzero(np.diff(end_n)), len(end_n) - 1
    )  # the last token of each character that has several
    bytes_n = np.interp(
        np.arange(len(end_n)), np.append(-1, last_n), np.append(0, byte_n[end_n[last_n]])
    )
    return torch.from_numpy(np.diff(bytes_n.astype(np.int64), prepend=0))


@dataclass(frozen=True)
class TextBlocks:
    """Blocks of token ids, and the bytes of the source that they stand for."""

    ids_NT: Tensor
    bytes_NT: Tensor
    """UTF-8 bytes of text that each token stands for: 0 for the eos between documents."""
    text: bytes
    """Of all blocks, one behind the other."""

    def windows(self) -> list[bytes]:
        """The text of each block; one that is cut inside a character has a part of its bytes."""
        ends = [0, *self.bytes_NT.sum(1).cumsum(0).tolist()]
        return [self.text[start:end] for start, end in itertools.pairwise(ends)]


def token_blocks(
    texts: list[str], tokenizer: PreTrainedTokenizerBase, length: int, limit: int | None = None
) -> Tensor:
    """(N, length) long: the documents as one stream of at most `limit` tokens, cut into full
    blocks.

    The tokenizer's eos, if it has one, stands between documents; blank documents and the remainder
    are dropped. Tokenising stops soon after `limit`. Raises DataError when there is not one full
    block."""
    return _blocks((piece.ids for piece in _stream(texts, tokenizer, length, limit)), length, limit)


def text_blocks(
    texts: list[str], tokenizer: PreTrainedTokenizerBase, length: int, limit: int | None = None
) -> TextBlocks:
    """The blocks of `token_blocks` with the bytes that they stand for, to measure on."""
    pieces = list(_stream(texts, tokenizer, length, limit))
    ids_NT = _blocks((piece.ids for piece in pieces), length, limit)
    bytes_NT = torch.cat([piece.byte_counts() for piece in pieces])[: ids_NT.numel()].view_as(
        ids_NT
    )
    return TextBlocks(
        ids_NT, bytes_NT, b"".join(piece.text.encode() for piece in pieces)[: int(bytes_NT.sum())]
    )


def _blocks(parts: Iterable[list[int]], length: int, limit: int | None) -> Tensor:
    # Tensors one by one: a list of all ids would take several times their memory.
    stream = torch.cat(
        [torch.empty(0, dtype=torch.long), *(torch.tensor(ids, dtype=torch.long) for ids in parts)]
    )[:limit]
    count = len(stream)
    if count < length:
        raise DataError(
            f"{'the limit leaves' if count == limit else 'the text has'} {count} tokens: need at "
            f"least {length}, one block. try: more text, a higher limit or shorter blocks"
        )
    return stream[: count // length * length].view(-1, length)


class _Piece(NamedTuple):
    """A piece of a document as read; `ids` begin with the eos where it ends the document before."""

    text: str
    ids: list[int]
    encoded: Any
    unread: int

    def byte_counts(self) -> Tensor:
        counts_n = byte_counts(self.text, self.encoded.offsets, self.unread)
        return torch.cat([torch.zeros(len(self.ids) - len(counts_n), dtype=torch.long), counts_n])


def _stream(
    texts: list[str], tokenizer: PreTrainedTokenizerBase, length: int, limit: int | None
) -> Iterator[_Piece]:
    """The pieces of all documents, until there are `limit` tokens."""
    if length < 1:
        raise DataError(
            f"a block of {length} tokens was asked for: need at least 1. try: length=512"
        )
    eos, count, encode, adds_space = (
        tokenizer.eos_token_id,
        0,
        encoder(tokenizer),
        _adds_space(tokenizer),
    )
    for batch in _batches(texts):
        # Where the tokenizer puts a space ahead by itself, that of the piece is left unread.
        unread = [int(adds_space and not opens and piece.startswith(" ")) for opens, piece in batch]
        found = encode([piece[skip:] for skip, (_, piece) in zip(unread, batch, strict=True)])
        for skip, (opens, piece), encoded in zip(unread, batch, found, strict=True):
            ids = [eos, *encoded.ids] if opens and count and eos is not None else encoded.ids
            count += len(ids)
            yield _Piece(piece if encoded.ids else "", ids, encoded, skip)
        if limit is not None and count >= limit:
            return


def _batches(texts: list[str]) -> Iterator[list[tuple[bool, str]]]:
    """Pieces of ~PIECE_CHARS characters together, each with whether it opens a document."""
    batch: list[tuple[bool, str]] = []
    chars = 0
    for text in texts:
        if not text.strip():
            continue
        for number, piece in enumerate(_pieces(text)):
            batch.append((number == 0, piece))
            chars += len(piece)
            if chars >= PIECE_CHARS:
                yield batch
                batch, chars = [], 0
    if batch:
        yield batch


def _pieces(text: str) -> Iterator[str]:
    """The text cut where tokenizers cut too: before a lone space, else after a lone newline.

    A space belongs to the word after it in every byte-level and sentencepiece rule; a newline often
    belongs to the punctuation before it. Next to more white space neither is sure, so those come
    last."""
    start = 0
    while len(text) - start > PIECE_CHARS:
        window = text[start : start + PIECE_CHARS]
        for rule in (r"(?s:.*\S)(?= \S)", r"(?s:.*\S)\n(?=\S)", r"(?s:.*\S)(?=\s)"):
            if cut := re.match(rule, window):
                break
        end = start + (cut.end() if cut else PIECE_CHARS)
        yield text[start:end]
        start = end
    yield text[start:]


def _adds_space(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether it puts a space before a text, as llama 2 does: a piece must then not bring one
    too."""

    def ids(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    whole = ids("one two")
    return whole != ids("one") + ids(" two") and whole == ids("one") + ids("two")


def block_order(num_blocks: int, steps: int, batch: int, seed: int) -> torch.Tensor:
    """(steps * batch,) long: which block each place of each step sees; every epoch is shuffled
    anew.

    Equal seeds give equal orders on every machine, and a longer run begins as a shorter one does.
    Raises DataError when there is no block."""
    if num_blocks < 1:
        raise DataError(
            f"there are {num_blocks} blocks: need at least 1. try: more text or shorter blocks"
        )
    need = steps * batch
    epochs = -(-need // num_blocks)
    shuffled = [
        torch.randperm(num_blocks, generator=torch.Generator().manual_seed(seed + epoch))
        for epoch in range(epochs)
    ]
    return torch.cat([torch.empty(0, dtype=torch.long), *shuffled])[:need]
