"""Checkpoints that are whole or do not count: a seal of hashes, written last."""

import contextlib
from pathlib import Path

from sememe import storage
from sememe.errors import CheckpointError
from sememe.evaluation.results import put
from sememe.report.files import read_json

SEAL = "seal.json"


def seal(folder: Path) -> None:
    """Writes the hash of every file in `folder`."""
    files = [path for path in sorted(folder.iterdir()) if path.is_file() and path.name != SEAL]
    put(folder / SEAL, {path.name: storage.sha256(path) for path in files})


def last_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint. Unsealed or damaged ones are passed over: a resumed run writes
    them again."""
    return next(filter(_is_whole, _newest_first(folder)), None)


def rotate(folder: Path) -> None:
    """Removes all checkpoints but the last two, and nothing that somebody else put into them. (The
    Trainer would also take `checkpoint-1-mine` for one of its own.)"""
    for path in _newest_first(folder)[2:]:
        for name in (*_hashes(path), SEAL):  # in this order: half of one is not whole
            (path / name).unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            path.rmdir()


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))


def _newest_first(folder: Path) -> list[Path]:
    """Those with a seal."""
    paths = [path.parent for path in folder.glob(f"checkpoint-*/{SEAL}")]
    return sorted((path for path in paths if path.name[11:].isdecimal()), key=step_of, reverse=True)


def _is_whole(folder: Path) -> bool:
    paths = {folder / name: sha256 for name, sha256 in _hashes(folder).items()}
    return bool(paths) and all(
        path.is_file() and storage.sha256(path) == sha256 for path, sha256 in paths.items()
    )


def _hashes(folder: Path) -> dict[str, str]:
    """File → its hash, as sealed; empty where the seal itself is damaged."""
    with contextlib.suppress(CheckpointError):
        return read_json(folder / SEAL)
    return {}
