"""Writing files: whole or not at all, and where they are links, pipes or devices, into those."""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from sememe.errors import CheckpointError, SememeError, reason

WEIGHTS = "model.safetensors"
MANIFEST = "manifest.json"


def sha256(path: Path) -> str:
    """The hash of a file's bytes, read in parts."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path: what is written there takes the place of `path` when the block ends, unless
    it ends with an error. A symbolic link stays, and its target is replaced."""
    target = Path(os.path.realpath(path))
    temporary = target.with_name(f".{target.name[:50]}.{os.getpid()}.tmp")
    try:
        yield temporary
        with temporary.open("rb+") as file:  # else a crash after the rename may leave an empty file
            os.fsync(file.fileno())
        if target.exists():
            shutil.copymode(target, temporary)
        os.replace(temporary, target)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def write(path: Path, content: bytes) -> None:
    """Writes a file so that it is whole, or as it was before; into a pipe or a device. Raises
    OSError."""
    if path.exists() and not path.is_file():
        path.write_bytes(content)
        return
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def check(path: Path) -> None:
    """Raises SememeError where `path` cannot be written, before the work whose result it is for."""
    folder = Path(os.path.realpath(path)).parent
    try:
        writable = os.access(path if path.exists() else folder, os.W_OK) and not path.is_dir()
    except OSError as fault:  # a name that is too long
        raise unwritable(path, fault) from fault
    if not writable:
        raise unwritable(path, "it is a folder, or in one that does not exist or is read-only")


def unwritable(path: Path, fault: Exception | str) -> SememeError:
    """The sentence for a path that cannot be written."""
    return SememeError(
        f"could not write {path} ({getattr(fault, 'strerror', None) or fault}): need free space in "
        "a folder that can be written to. try: another folder"
    )


def write_manifest(folder: Path, **more: str) -> None:
    """The hash of the weights in `folder`, in a file beside them that is written last."""
    manifest = {WEIGHTS: sha256(folder / WEIGHTS), **more}
    write(folder / MANIFEST, json.dumps(manifest, indent=2).encode())


def check_manifest(folder: Path) -> str:
    """The hash of the weights in `folder`. Raises CheckpointError unless it is that of their
    manifest: one flipped bit in a safetensors file goes unnoticed nearly always."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        # The second form is that of bases which an earlier release pulled.
        wanted = manifest.get(WEIGHTS) or manifest["files"][WEIGHTS]["sha256"]
        actual = sha256(folder / WEIGHTS)
    except (OSError, ValueError, LookupError, AttributeError) as error:
        raise CheckpointError(
            f"{folder} holds no finished model ({reason(error)}): need {WEIGHTS} and the "
            f"{MANIFEST} that was saved with it. try: RUN/model of a finished run"
        ) from error
    if wanted != actual:
        raise CheckpointError(
            f"{folder / WEIGHTS} is corrupt (sha256 {actual[:12]}…, the manifest says "
            f"{wanted[:12]}…): need the file as it was saved. try: copy, pull or train it again in "
            "a new folder"
        )
    return actual
