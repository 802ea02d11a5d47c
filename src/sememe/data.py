"""Text files → documents → (N, T) token blocks, and the order in which a run sees them."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sememe.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SUFFIXES = (".txt", ".jsonl", ".parquet")
PIECE_CHARS = 200_000
HUB_TIMEOUT_S = 5


def read_texts(source: str, field: str = "text", split: str = "train") -> list[str]:
    """The documents of a source, in order: a .txt is one; a .jsonl or .parquet has one per row, in `field`.

    `file.jsonl#response` names the field. What is no file is a `datasets` id; `split` is for those. An empty
    row stays, as "", so that two fields of one file keep their pairs. Raises DataError when the source is
    missing, unreadable, of another kind, lacks the field, or has no text at all.
    """
    name, _, named = source.rpartition("#")
    if name and named and not Path(source).expanduser().exists():
        source, field = name, named
    path = Path(source).expanduser()
    if not path.exists():
        if path.suffix in SUFFIXES or not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", source, re.ASCII):
            raise _missing(path)
        texts = _from_datasets(source, field, split)
    elif path.is_dir() or path.suffix not in SUFFIXES:
        kind = "a folder" if path.is_dir() else f"a file {path.suffix or 'without a suffix'}"
        raise DataError(f"{source} is {kind}: need one of {', '.join(SUFFIXES)}, or a datasets id. "
                        "try: one JSON object per line in a .jsonl, or plain text in a .txt")
    else:
        try:
            texts = _READERS[path.suffix](path, field)
        except OSError as fault:
            raise DataError(f"{source} cannot be read ({fault}): need a readable file. "
                            "try: check its permissions") from fault
    if not any(text.strip() for text in texts):
        raise DataError(f"{source} is empty, it has no character other than white space: need some text. "
                        "try: another file or another field")
    return texts


def _read_txt(path: Path, field: str) -> list[str]:
    raw = path.read_bytes()
    try:
        return [raw.decode("utf-8-sig")]
    except UnicodeDecodeError as fault:
        line = raw.count(b"\n", 0, fault.start) + 1
        raise DataError(f"{path} is not UTF-8, line {line} has the byte 0x{raw[fault.start]:02x}: need UTF-8 "
                        "text. try: iconv -f latin1 -t utf-8") from fault


def _read_jsonl(path: Path, field: str) -> list[str]:
    texts = []
    with path.open("rb") as file:  # bytes: only \n ends a line, a JSON string may hold other line ends
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except ValueError as fault:  # UnicodeDecodeError and JSONDecodeError are both
                raise DataError(f"{path} line {number} is not JSON ({fault}): need one JSON object per line. "
                                "try: mend or drop that line") from fault
            if not isinstance(row, dict):
                raise DataError(f"{path} line {number} holds a {type(row).__name__}: need a JSON object with "
                                f'the field {field!r}. try: {{"{field}": "…"}}')
            texts.append(_field(row, field, f"{path} line {number}"))
    return texts


def _field(row: dict[str, Any], field: str, where: str) -> str:
    if field not in row:
        raise DataError(f"{where} has no field {field!r}, it has {_listed(row)}: need the field's name. "
                        f"try: FILE#{_close(field, row) or next(iter(row), 'field')}")
    if not isinstance(row[field], str):
        raise DataError(f"{where} has a {type(row[field]).__name__} in {field!r}: need text. "
                        "try: another field, or turn it into a string")
    return row[field]


def _read_parquet(path: Path, field: str) -> list[str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        names = pq.read_schema(path).names
        column = pq.read_table(path, columns=[field]).column(0).to_pylist() if field in names else []
    except pa.ArrowException as fault:
        raise DataError(f"{path} is not a readable parquet file ({str(fault).splitlines()[0]}): need an "
                        "intact one. try: write it again") from fault
    if field not in names:
        _field(dict.fromkeys(names), field, str(path))
    return [_field({field: text}, field, f"{path} row {row}") for row, text in enumerate(column)]


_READERS = {".txt": _read_txt, ".jsonl": _read_jsonl, ".parquet": _read_parquet}


def _from_datasets(source: str, field: str, split: str) -> list[str]:
    try:
        import datasets
    except ImportError as fault:
        raise DataError(f"{source} is no file here, and the datasets library is missing: need a file or that "
                        f"library.{_similar(Path(source))} try: pip install datasets") from fault
    from huggingface_hub import HfApi
    from huggingface_hub.errors import OfflineModeIsEnabled

    try:
        # Asked first because load_dataset alone retries for 23 s before it says that there is no network.
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
    return [_field({field: text}, field, f"{source} row {row}") for row, text in enumerate(rows[field])]


def _unloaded(source: str, fault: Exception) -> DataError:
    said = (str(fault).strip() or type(fault).__name__).splitlines()[0]
    return DataError(f"{source} is no file here and could not be loaded with datasets ({said}): need a file "
                     f"or a dataset id and a network connection.{_similar(Path(source))} "
                     "try: a .txt or .jsonl file, or HF_HUB_OFFLINE=1 for a copy loaded before")


def _missing(path: Path) -> DataError:
    return DataError(f"{path} does not exist: need a file of {', '.join(SUFFIXES)}.{_similar(path)} "
                     "try: check the path, it counts from the current folder")


def _similar(path: Path) -> str:
    try:
        names = {entry.name: entry for entry in path.parent.iterdir() if entry.suffix in SUFFIXES}
    except OSError:
        return ""
    close = difflib.get_close_matches(path.name, names, n=3, cutoff=0.6)
    return f" Did you mean {' or '.join(str(names[name]) for name in close)}?" if close else ""


def _close(name: str, names: Any) -> str | None:
    return next(iter(difflib.get_close_matches(name, list(names), n=1, cutoff=0.5)), None)


def _listed(names: Any) -> str:
    return ", ".join(repr(name) for name in names) or "none"


def token_blocks(texts: list[str], tokenizer: PreTrainedTokenizerBase, length: int, limit: int | None = None
                 ) -> torch.Tensor:
    """(N, length) long: the documents as one stream of at most `limit` tokens, cut into full blocks.

    The tokenizer's eos, if it has one, stands between documents; blank documents and the remainder are
    dropped. Tokenising stops soon after `limit`. Raises DataError when there is not one full block.
    """
    if length < 1:
        raise DataError(f"a block of {length} tokens was asked for: need at least 1. try: length=512")
    eos, count, stream = tokenizer.eos_token_id, 0, []
    for batch in _batches(texts, _adds_space(tokenizer)):
        # Many short documents in one call: the tokenizer then works on them in parallel.
        encoded = tokenizer([piece for _, piece in batch], add_special_tokens=False, verbose=False)
        for (opens, _), ids in zip(batch, encoded["input_ids"], strict=True):
            if opens and count and eos is not None:
                ids = [eos, *ids]
            stream.append(torch.tensor(ids, dtype=torch.long))
            count += len(ids)
        if limit is not None and count >= limit:
            count = limit
            break
    if count < length:
        raise DataError(f"{'the limit leaves' if count == limit else 'the text has'} {count} tokens: need at "
                        f"least {length}, one block. try: more text, a higher limit or shorter blocks")
    blocks = count // length
    return torch.cat(stream)[: blocks * length].view(blocks, length)


def _batches(texts: list[str], adds_space: bool) -> Iterator[list[tuple[bool, str]]]:
    """Pieces of ~PIECE_CHARS characters together, each with whether it opens a document."""
    batch: list[tuple[bool, str]] = []
    chars = 0
    for text in texts:
        if not text.strip():
            continue
        for number, piece in enumerate(_pieces(text)):
            if number and adds_space and piece.startswith(" "):
                piece = piece[1:]
            batch.append((number == 0, piece))
            chars += len(piece)
            if chars >= PIECE_CHARS:
                yield batch
                batch, chars = [], 0
    if batch:
        yield batch


def _pieces(text: str) -> Iterator[str]:
    """The text cut where tokenizers cut too: before a lone space, else after a lone newline.

    A space belongs to the word after it in every byte-level and sentencepiece rule; a newline often belongs
    to the punctuation before it. Next to more white space neither is sure, so those come last.
    """
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
    """Whether it puts a space before a text, as llama 2 does: a piece must then not bring one too."""
    def ids(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    whole = ids("one two")
    return whole != ids("one") + ids(" two") and whole == ids("one") + ids("two")


def block_order(num_blocks: int, steps: int, batch: int, seed: int) -> torch.Tensor:
    """(steps * batch,) long: which block each place of each step sees; every epoch is shuffled anew.

    Equal seeds give equal orders on every machine, and a longer run begins as a shorter one does. Raises
    DataError when there is no block.
    """
    if num_blocks < 1:
        raise DataError(f"there are {num_blocks} blocks: need at least 1. try: more text or shorter blocks")
    need = steps * batch
    epochs = -(-need // num_blocks)
    shuffled = [torch.randperm(num_blocks, generator=torch.Generator().manual_seed(seed + epoch))
                for epoch in range(epochs)]
    return torch.cat([torch.empty(0, dtype=torch.long), *shuffled])[:need]
