"""Checkpoints that are whole or do not count: a seal of hashes, written last."""

import fnmatch
import hashlib
import json
import os
import re
import shutil
from pathlib import Path

from sememe import storage

SEAL = "seal.json"
PARTS = (
    "model.safetensors*",
    "config.json",
    "generation_config.json",
    "manifest.json*",
    "optimizer.pt",
    "scheduler.pt",
    "scaler.pt",
    "rng_state*.pth",
    "training_args.bin",
    "trainer_state.json",
    "plans.safetensors",
    SEAL,
    ".*.tmp",
)
"""What a checkpoint's folder holds, whole or cut off while it was saved. One that holds anything
else is not deleted."""
KEPT = 2


def seal(folder: Path) -> None:
    """Writes the hash of every file in `folder`, after they are on the disk."""
    digests = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.name != SEAL):
        with path.open("rb") as file:
            digests[str(path.relative_to(folder))] = hashlib.file_digest(file, "sha256").hexdigest()
            os.fsync(file.fileno())
    storage.write(folder / SEAL, json.dumps(digests, indent=2).encode())


def last_checkpoint(folder: Path, clean: bool = True) -> Path | None:
    """The newest whole checkpoint. Unsealed or damaged ones are passed over, and removed with
    `clean`."""
    for path in _newest_first(folder):
        if _whole(path):
            return path
        if clean:
            _remove(path)
    return None


def rotate(folder: Path) -> None:
    """Removes all sealed checkpoints but the last two. (The Trainer would also take
    `checkpoint-1-mine` for one of its own.)"""
    sealed = [path for path in _newest_first(folder) if (path / SEAL).is_file()]
    for path in sealed[KEPT:]:
        _remove(path)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))


def _newest_first(folder: Path) -> list[Path]:
    """What is called checkpoint-<digits> and nothing more."""
    found = [
        path
        for path in folder.glob("checkpoint-*")
        if re.fullmatch("checkpoint-[0-9]+", path.name) and path.is_dir()
    ]
    return sorted(found, key=step_of, reverse=True)


def _remove(checkpoint: Path) -> None:
    """Deletes a checkpoint, but nothing that somebody else put there."""
    names = [path.name for path in checkpoint.iterdir()]
    if not checkpoint.is_symlink() and all(
        any(fnmatch.fnmatch(name, part) for part in PARTS) for name in names
    ):
        shutil.rmtree(checkpoint)


def _whole(folder: Path) -> bool:
    try:
        digests = json.loads((folder / SEAL).read_text(encoding="utf-8"))
        return all(
            hashlib.sha256((folder / name).read_bytes()).hexdigest() == want
            for name, want in digests.items()
        )
    except (OSError, ValueError):
        return False
