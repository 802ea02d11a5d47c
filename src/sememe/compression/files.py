"""Text files ⇄ codes.json, with unfinished work kept beside what is to be written."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sememe.compression.codes import Codes, is_codes, write_whole
from sememe.compression.opening import check_writer, opened
from sememe.compression.use import compress_texts, decompress_codes
from sememe.data import read_texts
from sememe.errors import CodesError, Interrupted
from sememe.paths import locate, usable


def compress_file(
    model: str,
    source: str,
    out: Path,
    window: int | None = None,
    batch: int = 16,
    rate: float | None = None,
    base: str | None = None,
) -> dict[str, Any]:
    """`compress` of a text file into codes.json; returns its figures. Raises CodesError where `out`
    would write over anything but codes, and Interrupted at Ctrl-C."""
    check_place(out, source)
    if out.exists() and not is_codes(out):
        raise CodesError(
            f"{out} is there and holds no codes: need a new file, or codes to write over. try: "
            f"--out {out}.json"
        )
    texts = read_texts(source)
    with interruptible(out), opened(model, None, base, rate) as use:
        codes, found, partial = compress_texts(use, texts, window, batch, out, progress=True)
        codes.save(out)
        partial.close(finished=True)
    return {
        "model": str(model),
        "data": str(source),
        "out": str(out),
        "bytes": out.stat().st_size,
        **found,
    }


def decompress_file(
    model: str,
    source: Path,
    out: Path | None = None,
    batch: int = 16,
    base: str | None = None,
    beams: int | None = None,
) -> tuple[dict[str, Any], str]:
    """`decompress` of codes.json into a .txt (of one document) or .jsonl; returns its figures, and
    what the file holds.

    Without `out` nothing is written. Raises CodesError where `out` is there, and Interrupted at
    Ctrl-C."""
    codes = Codes.load(source)
    single = len(codes.documents) == 1
    if out is not None:
        check_place(out, source)
        if out.exists():
            raise CodesError(
                f"{out} is there: need a new file, no text is written over. try: another --out, or "
                f"rm {out}"
            )
        if out.suffix != ".jsonl" and not (single and out.suffix == ".txt"):
            raise CodesError(
                f"{out} for {len(codes.documents)} document(s): need a .jsonl, or for a single one "
                "a .txt. "
                f"try: --out {out.stem}.jsonl"
            )
    with (
        interruptible(out),
        opened(model, None, base, check=lambda writer: check_writer(codes, writer)) as use,
    ):
        texts, found, partial = decompress_codes(use, codes, batch, out, True, beams)
        as_text = single and (out is None or out.suffix == ".txt")
        content = (
            texts[0]
            if as_text
            else "".join(json.dumps({"text": x}, ensure_ascii=False) + "\n" for x in texts)
        )
        if out is not None:
            write_whole(out, content)
        partial.close(finished=True)
    return {
        "model": str(model),
        "codes": str(source),
        "out": None if out is None else str(out),
        **found,
    }, content


def check_place(out: Path, source: str | Path) -> None:
    """Raises CodesError where `out` cannot be written, before anything is worked on."""
    usable(out)
    if (out.exists() and not out.is_file()) or not out.parent.is_dir():
        what = (
            "is a folder, a pipe or a device"
            if out.exists()
            else f"is in {out.parent}, which is no folder"
        )
        raise CodesError(
            f"{out} {what}: need a file in a folder that is there. try: --out codes.json"
        )
    read = locate(str(source))[0]
    if out.exists() and read is not None and out.samefile(read):
        raise CodesError(
            f"--out {out} is the file that is read: need another one. try: --out "
            f"{out.stem}-2{out.suffix}"
        )


@contextlib.contextmanager
def interruptible(out: Path | None) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt as stop:
        kept = None if out is None else out.with_name(out.name + ".partial")
        begun = kept is not None and kept.is_file()
        raise Interrupted(
            f"stopped; the same command goes on with {kept}"
            if begun
            else "stopped; nothing is kept"
        ) from stop
