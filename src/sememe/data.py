"""Text files and datasets → documents → (N, T) token blocks, and the order of training."""

from __future__ import annotations

import codecs
import contextlib
import copy
import functools
import itertools
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sememe.errors import DataError, reason
from sememe.paths import locate, shown

PIECE_CHARS = 200_000
BATCH = 16  # pieces, which the tokenizer works on in parallel
HUB_TIMEOUT_S = 5
Encoder = Callable[[list[str]], list[Any]]
Rows = Iterator[tuple[int, Any]]  # each with the number that a message names


# Files and datasets → texts


def read_texts(source: str, field: str = "text") -> list[str]:
    """The documents of a source, in order: a .txt is one; a .jsonl, a .parquet or the train split
    of a dataset on the Hub has one in `field` of each row. `file.jsonl#response` names the field.

    An empty row stays, as "". Raises DataError when the source is missing, unreadable, of another
    kind, lacks the field, holds what is no text, or has no text at all."""
    _, name, field = locate(source, field)
    texts = [text for _, (text,) in read_rows(name, (field,))]
    if not any(text.strip() for text in texts):
        raise DataError(
            f"{source} is empty, it has no character other than white space: need some text. "
            "try: another file or another field"
        )
    return texts


def read_rows(name: str, fields: tuple[str, ...]) -> Iterator[tuple[str, list[str]]]:
    """Each row of a file or dataset: how a message names it, and the text of each field."""
    path = locate(name)[0]
    suffix = path and path.suffix
    if path is not None and not (path.is_file() and suffix in READERS):
        kind = "a folder" if path.is_dir() else f"a file {suffix or 'without a suffix'}"
        raise DataError(
            f"{name} is {kind}: need one of {', '.join(READERS)}, or a datasets id. "
            "try: one JSON object per line in a .jsonl, or plain text in a .txt"
        )
    place = name
    try:
        for number, row in READERS[suffix](path) if path else _hub_rows(name):
            place = f"{name} {'line' if suffix == '.jsonl' else 'row'} {number}"
            if suffix == ".jsonl":
                row = json.loads(row)
            yield place, [_text(row, field, place) for field in fields]
    except (OSError, ValueError, NotImplementedError) as fault:  # pyarrow's are among these
        raise DataError(
            f"{place} cannot be read ({reason(fault)}): need a file that may be read, of UTF-8 "
            "text, of a JSON object per line, or an intact .parquet. try: mend or drop that line, "
            "check its permissions, or iconv -f latin1 -t utf-8"
        ) from fault


def _txt_rows(path: Path) -> Rows:
    yield 0, {"text": path.read_bytes().decode("utf-8-sig")}


def jsonl_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """The lines that hold a row, with their numbers in the file, without a byte order mark."""
    # As bytes, since only \n ends a line: a JSON string may hold other line ends.
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            line = line.removeprefix(codecs.BOM_UTF8)
            if line.strip():
                yield number, line


def _parquet_rows(path: Path) -> Rows:
    import pyarrow.parquet as pq

    batches = pq.ParquetFile(path).iter_batches()
    yield from enumerate(row for batch in batches for row in batch.to_pylist())


READERS = {".txt": _txt_rows, ".jsonl": jsonl_lines, ".parquet": _parquet_rows}


def _hub_rows(name: str) -> Rows:
    if Path(name).suffix in READERS or not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name, re.ASCII):
        raise DataError(
            f"{shown(name)} does not exist: need a file of {', '.join(READERS)}, or a datasets id. "
            "try: a path from the current folder; a text itself goes into a .txt file"
        )
    import datasets
    from huggingface_hub import HfApi
    from huggingface_hub.errors import OfflineModeIsEnabled

    try:
        # load_dataset alone retries for 23 s before it says that there is no network; it is quick
        # where the user wants the cached copy.
        with contextlib.suppress(OfflineModeIsEnabled):
            HfApi().dataset_info(name, timeout=HUB_TIMEOUT_S)
        yield from enumerate(datasets.load_dataset(name, split="train"))
    except Exception as fault:
        raise DataError(
            f"{name} is no file here and could not be loaded with datasets ({reason(fault)}): need "
            "a file, or a dataset id and a network connection. "
            "try: HF_HUB_OFFLINE=1 for one that was loaded before"
        ) from fault


def _text(row: Any, field: str, place: str) -> str:
    """The field of a row."""
    row = row if isinstance(row, dict) else {}
    text = row.get(field)
    if not isinstance(text, str):
        raise DataError(
            f"{place} has {f'{type(text).__name__} in' if field in row else 'no field'} {field!r}, "
            f"it has {', '.join(map(repr, row)) or 'none'}: need text in every row. try: drop "
            "that row, or FILE#FIELD for another field"
        )
    return check_text(text, f"{place}, field {field!r},")


def check_text(text: str, place: str) -> str:
    """The text itself. Raises DataError for half of a surrogate pair, legal in JSON, which no
    tokenizer and no file takes."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as fault:
        raise DataError(
            f"{place} has half of a character ({text[fault.start]!r}) at character {fault.start}: "
            "need text that UTF-8 can hold. try: drop it, or "
            "text.encode('utf-8', 'replace').decode()"
        ) from fault
    return text


# Texts → token blocks


def encoder(tokenizer) -> Encoder:
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
    start = end_character = 0
    while start < len(ids):
        limit = end = min(start + window, len(ids))
        # A byte-level tokenizer spells an emoji with several tokens, which should stay together. A
        # window that is too short for them cuts the character all the same.
        while start < end < len(ids) and offsets[end][0] < offsets[end - 1][1]:
            end -= 1
        end = limit if end == start else end
        start_character = end_character
        end_character = characters if end == len(ids) else max(end_character, offsets[end - 1][1])
        yield ids[start:end], (start_character, end_character)
        start = end


def byte_counts(text: str, offsets: list[tuple[int, int]], skipped: int = 0) -> Tensor:
    """(n,) long: UTF-8 bytes of the text that each of its tokens stands for; their sum is all of
    it. `skipped`: characters at its beginning that `offsets` do not count.

    A token ends where its last character does, so what stands between two tokens counts with the
    second. Tokens of one character share its bytes: decoded one by one they would be replacement
    characters."""
    if not offsets:
        return torch.zeros(0, dtype=torch.long)
    byte_n = np.cumsum([0, *map(len, map(str.encode, text))])
    end_n = np.maximum.accumulate(np.array(offsets)[:, 1]) + skipped
    end_n[-1] = len(text)
    # The last token of each character ends at a known byte; those before it are spread evenly.
    last_n = np.append(np.flatnonzero(np.diff(end_n)), len(end_n) - 1)
    known_n = np.append(0, byte_n[end_n[last_n]])
    bytes_n = np.interp(np.arange(len(end_n)), np.append(-1, last_n), known_n)
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


def token_blocks(texts: list[str], tokenizer, length: int, limit: int | None = None) -> Tensor:
    """(N, length) long: the texts as one stream of at most `limit` tokens, cut into full blocks.

    The tokenizer's eos, if it has one, stands between texts; blank texts and the remainder are
    dropped. Tokenising stops soon after `limit`. Raises DataError when there is not one full
    block."""
    # Tensors one by one: a list of all ids would take several times their memory.
    ids = [torch.tensor(ids) for ids, *_ in _encoded(texts, tokenizer, limit)]
    return _cut(ids, length, limit)


def text_blocks(texts: list[str], tokenizer, length: int, limit: int | None = None) -> TextBlocks:
    """The blocks of `token_blocks` with the bytes that they stand for, to measure on."""
    ids, byte_n, parts = [], [], []
    for piece_ids, text, offsets, skipped in _encoded(texts, tokenizer, limit):
        counts_n = byte_counts(text, offsets, skipped)
        ids.append(torch.tensor(piece_ids))
        byte_n += [counts_n.new_zeros(len(piece_ids) - len(counts_n)), counts_n]
        parts.append(text)
    ids_NT = _cut(ids, length, limit)
    bytes_NT = torch.cat(byte_n)[: ids_NT.numel()].view_as(ids_NT)
    return TextBlocks(ids_NT, bytes_NT, "".join(parts).encode()[: int(bytes_NT.sum())])


def _cut(ids: list[Tensor], length: int, limit: int | None) -> Tensor:
    ids_n = torch.cat([torch.zeros(0, dtype=torch.long), *ids])[:limit]
    count = len(ids_n) // length * length
    if not count:
        raise DataError(
            f"{'the limit leaves' if len(ids_n) == limit else 'the text has'} {len(ids_n)} tokens: "
            f"need at least {length}, one block. try: more text, a higher limit or shorter blocks"
        )
    return ids_n[:count].view(-1, length)


def _encoded(
    texts: list[str], tokenizer, limit: int | None
) -> Iterator[tuple[list[int], str, list[tuple[int, int]], int]]:
    """Of each piece that has tokens, until there are `limit`: its ids, after an eos where it begins
    a text other than the first; the piece; the characters of each token; and how many characters
    these do not count."""
    encode = encoder(tokenizer)
    adds_space = _adds_space(encode)
    eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    count = 0
    pieces = _pieces(texts)
    while (limit is None or count < limit) and (batch := list(itertools.islice(pieces, BATCH))):
        # Where the tokenizer puts a space before a text by itself, a piece must not bring its own.
        skips = [int(adds_space and not first and text.startswith(" ")) for first, text in batch]
        encodings = encode([text[skip:] for skip, (_, text) in zip(skips, batch, strict=True)])
        for skip, (first, text), encoding in zip(skips, batch, encodings, strict=True):
            if encoding.ids:
                ids = [*(eos if first and count else []), *encoding.ids]
                count += len(ids)
                yield ids, text, encoding.offsets, skip


def _pieces(texts: list[str]) -> Iterator[tuple[bool, str]]:
    """All but blank texts, cut where tokenizers cut too: before a lone space, else after a lone
    newline; each piece with whether it begins a text.

    A space belongs to the word after it in every byte-level and sentencepiece rule; a newline often
    belongs to the punctuation before it. Next to more white space neither is sure, so those come
    last."""
    rules = (r"(?s:.*\S)(?= \S)", r"(?s:.*\S)\n(?=\S)", r"(?s:.*\S)(?=\s)", r"(?s:.*)")
    for text in filter(str.strip, texts):
        start = 0
        while len(text) - start > PIECE_CHARS:
            window = text[start : start + PIECE_CHARS]
            piece = next(filter(None, (re.match(rule, window) for rule in rules))).group()
            yield start == 0, piece
            start += len(piece)
        yield start == 0, text[start:]


def _adds_space(encode: Encoder) -> bool:
    """Whether the tokenizer puts a space before a text, as that of Llama 2 does."""
    whole, first, second, spaced = (x.ids for x in encode(["one two", "one", "two", " two"]))
    return first + second == whole != first + spaced


def block_order(num_blocks: int, steps: int, batch: int, seed: int) -> Tensor:
    """(steps * batch,) long: which block each row of each step sees; every epoch is shuffled anew.

    Equal seeds give equal orders on every machine, and a longer run begins as a shorter one
    does."""
    needed = steps * batch
    shuffled = [torch.empty(0, dtype=torch.long)]
    for epoch in range(-(-needed // num_blocks)):
        generator = torch.Generator().manual_seed(seed + epoch)
        shuffled.append(torch.randperm(num_blocks, generator=generator))
    return torch.cat(shuffled)[:needed]
