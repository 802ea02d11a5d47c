"""Checkpoints that are whole or do not count: a seal of hashes, written last."""

import json
import re
import shutil
from pathlib import Path

from sememe import storage
from sememe.report.files import read_json

SEAL = "seal.json"
OWN = re.compile(
    r"(model\.safetensors|manifest\.json).*|(config|generation_config|trainer_state|seal)\.json"
    r"|(optimizer|scheduler|scaler)\.pt|rng_state.*\.pth|training_args\.bin|plans\.safetensors"
    r"|\..*\.tmp"
)
"""Names in a checkpoint, whole or cut off while it was saved. One that holds anything else is not
deleted."""


def seal(folder: Path) -> None:
    """Writes the hash of every file in `folder`."""
    files = [path for path in sorted(folder.iterdir()) if path.is_file() and path.name != SEAL]
    hashes = {path.name: storage.sha256(path) for path in files}
    storage.write(folder / SEAL, json.dumps(hashes, indent=2).encode())


def last_checkpoint(folder: Path, clean: bool = True) -> Path | None:
    """The newest whole checkpoint. Unsealed or damaged ones are passed over, and removed with
    `clean`."""
    for path in _newest_first(folder):
        if _is_whole(path):
            return path
        if clean:
            _remove(path)
    return None


def rotate(folder: Path) -> None:
    """Removes all sealed checkpoints but the last two. (The Trainer would also take
    `checkpoint-1-mine` for one of its own.)"""
    sealed = [path for path in _newest_first(folder) if (path / SEAL).is_file()]
    for path in sealed[2:]:
        _remove(path)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))


def _newest_first(folder: Path) -> list[Path]:
    paths = [path for path in folder.glob("checkpoint-*") if path.name[11:].isdecimal()]
    return sorted((path for path in paths if path.is_dir()), key=step_of, reverse=True)


def _remove(checkpoint: Path) -> None:
    """Deletes a checkpoint, but nothing that somebody else put there."""
    only_own = all(OWN.fullmatch(path.name) for path in checkpoint.iterdir())
    if only_own and not checkpoint.is_symlink():
        shutil.rmtree(checkpoint)


def _is_whole(folder: Path) -> bool:
    hashes = read_json(folder / SEAL)
    paths = {folder / name: value for name, value in hashes.items()}
    return bool(paths) and all(
        path.is_file() and storage.sha256(path) == value for path, value in paths.items()
    )
