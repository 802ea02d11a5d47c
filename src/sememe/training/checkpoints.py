"""Checkpoints that are whole or do not count: a seal of hashes, written last."""

import contextlib
import os
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

from sememe import storage
from sememe.errors import CheckpointError
from sememe.evaluation.results import put
from sememe.report.files import read_json

SEAL = "seal.json"
OWN = (SEAL, "*.json", "*.safetensors", ".*", "*.pt", "*.pth", "*.bin")
"""Files of a checkpoint, in the order in which they are removed; the last three are those of
earlier releases. What else lies in one is somebody else's."""


def seal(folder: Path) -> None:
    """Writes the hash of every file in `folder`, when all of them are on the disk."""
    files = [path for path in sorted(folder.iterdir()) if path.is_file() and path.name != SEAL]
    for path in files:
        with path.open("rb") as file:
            os.fsync(file.fileno())
    put(folder / SEAL, {path.name: storage.sha256(path) for path in files})


def last_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint."""
    return next((path for path in _newest_first(folder) if not _fault(path)), None)


def resume_point(folder: Path, say: Callable[[str], None]) -> Path | None:
    """The newest whole checkpoint; None where a run begins. Damaged ones get another name, from the
    first process, so that none of it is written over.

    Raises CheckpointError where there are damaged checkpoints alone: no run starts over unasked."""
    for path in _newest_first(folder):
        fault = _fault(path)
        if not fault:
            return path
        if os.environ.get("RANK", "0") == "0":
            names = (path.with_name(f"{path.name}.damaged-{n}") for n in count(1))
            aside = path.rename(next(name for name in names if not name.exists()))
            say(f"{fault}: not resumed from, and kept as {aside.name}")
    if damaged := sorted(folder.glob("checkpoint-*.damaged-*")):
        raise CheckpointError(
            f"{folder} holds no whole checkpoint, but damaged ones ({damaged[-1].name}): need one "
            "that is as it was saved, or none, to start over at step 1. try: another --out, or "
            "move the damaged ones elsewhere"
        )
    return None


def rotate(folder: Path) -> None:
    """Removes all checkpoints but the last two, and nothing that somebody else put into them. (The
    Trainer would also take `checkpoint-1-mine` for one of its own.)"""
    for path in _newest_first(folder)[2:]:
        _remove(path)


def remove_unsealed(folder: Path) -> None:
    """Removes checkpoints that were being written or removed when a process was killed."""
    for path in _numbered(folder):
        if not (path / SEAL).is_file():
            _remove(path)


def _remove(checkpoint: Path) -> None:
    """The seal first: what is left of a checkpoint then is unsealed, not damaged."""
    for name in OWN:
        for path in checkpoint.glob(name):
            if not path.is_dir():
                path.unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        checkpoint.rmdir()


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))


def _numbered(folder: Path) -> Iterator[Path]:
    return (path for path in folder.glob("checkpoint-*") if path.name[11:].isdecimal())


def _newest_first(folder: Path) -> list[Path]:
    """Those with a seal."""
    return sorted(
        (path for path in _numbered(folder) if (path / SEAL).is_file()),
        key=step_of,
        reverse=True,
    )


def _fault(checkpoint: Path) -> str:
    """The first damaged file of a checkpoint and what is wrong with it; nothing where it is
    whole."""
    hashes = {}
    with contextlib.suppress(CheckpointError, RecursionError):
        hashes = read_json(checkpoint / SEAL)
    if not (isinstance(hashes, dict) and hashes):
        return f"{checkpoint / SEAL} is damaged (it holds no hashes)"
    faults = ((name, storage.difference(checkpoint / name, str(x))) for name, x in hashes.items())
    return next((f"{checkpoint / name} is damaged ({x})" for name, x in faults if x), "")
