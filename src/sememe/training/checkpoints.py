"""Checkpoints that are whole or do not count: a seal of hashes, written last."""

import hashlib
import json
import os
import shutil
from pathlib import Path

SEAL = "seal.json"


def seal(folder: Path) -> None:
    """Writes the hash of every file in `folder`, after they are on the disk."""
    digests = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.name != SEAL):
        with path.open("rb") as file:
            digests[str(path.relative_to(folder))] = hashlib.file_digest(file, "sha256").hexdigest()
            os.fsync(file.fileno())
    temporary = folder / (SEAL + ".tmp")
    temporary.write_text(json.dumps(digests, indent=2))
    os.replace(temporary, folder / SEAL)


def last_checkpoint(folder: Path, clean: bool = True) -> Path | None:
    """The newest whole checkpoint. Unsealed or damaged ones are passed over, and removed with `clean`."""
    found = sorted(folder.glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1]), reverse=True)
    for path in found:
        if _whole(path):
            return path
        if clean:
            shutil.rmtree(path)
    return None


def _whole(folder: Path) -> bool:
    try:
        digests = json.loads((folder / SEAL).read_text())
        return all(hashlib.sha256((folder / name).read_bytes()).hexdigest() == want for name, want in digests.items())
    except (OSError, ValueError):
        return False
