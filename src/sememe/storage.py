"""Writing files: whole or not at all, and where they are links, pipes or devices, into those."""

import contextlib
import errno
import hashlib
import json
import os
import re
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path

from sememe.errors import CheckpointError, SememeError, reason
from sememe.reading import read_object

WEIGHTS = "model.safetensors"
MANIFEST = "manifest.json"
PARTS = ("*config.json", "*.safetensors", "*.index.json", "*token*", "vocab*", "merges*", "*.jinja")
"""Files that a model or base consists of, as transformers reads them. Others may lie beside them,
and change."""
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
DISK_ERRORS = FULL | {errno.EROFS, errno.EACCES, errno.EIO}
DISK_FAULTS = re.compile(r"os error \d|No space left|File too large|I/O error|PytorchStreamWriter")
"""What libraries say that write by themselves (safetensors, tokenizers, torch)."""


def sha256(path: Path) -> str:
    """The hash of a file's bytes, read in parts."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path: what is written there takes the place of `path` when the block ends, unless
    it ends with an error. A symbolic link stays, and its target is replaced. Its mode is that of
    the file it replaces, else what the umask says, whatever writes it."""
    target = Path(os.path.realpath(path))
    temporary = target.with_name(f".{target.name[:50]}.{os.getpid()}.tmp")
    try:
        temporary.touch()
        mode = (target if target.exists() else temporary).stat().st_mode
        yield temporary
        with temporary.open("rb+") as file:  # else a crash after the rename may leave an empty file
            os.fsync(file.fileno())
        temporary.chmod(mode & 0o7777)
        os.replace(temporary, target)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def write(path: Path, content: bytes) -> None:
    """Writes a file so that it is whole, or as it was before; into a pipe or a device. Raises
    OSError."""
    try:
        if path.exists() and not path.is_file():
            path.write_bytes(content)
            return
        with replacing(path) as temporary:
            temporary.write_bytes(content)
    except OSError as fault:
        fault.filename = str(path)  # a full disk names none, or the temporary one
        raise


def check(path: Path) -> None:
    """Raises SememeError where `path` cannot be written, before the work whose result it is for."""
    folder = Path(os.path.realpath(path)).parent
    try:
        writable = os.access(path if path.exists() else folder, os.W_OK) and not path.is_dir()
    except OSError as fault:  # a name that is too long
        raise unwritable(path, fault) from fault
    if not writable:
        raise unwritable(path, "it is a folder, or in one that does not exist or is read-only")


def unwritable(
    path: Path | str, fault: Exception | str, advice: str = "another folder"
) -> SememeError:
    """The sentence for a path that cannot be written."""
    why = getattr(fault, "strerror", None) or (fault if isinstance(fault, str) else reason(fault))
    return SememeError(
        f"could not write {path} ({why}): need free space in a folder that can be written to. "
        f"try: {advice}"
    )


def unusable(fault: OSError) -> SememeError:
    """The sentence for whatever path the operating system refused."""
    path = "the output" if fault.filename is None else f"{fault.filename!s:.200}"
    if fault.errno in FULL:
        return unwritable(path, fault)
    return SememeError(
        f"{path} cannot be used ({fault.strerror}): need a path that can be read or written. "
        "try: another path, or other permissions"
    )


@contextlib.contextmanager
def writing(folder: Path, advice: str = "another folder") -> Iterator[None]:
    """A disk that is full, or cannot be written for another reason, is a SememeError, in whatever
    library it shows."""
    hook = threading.excepthook
    # TensorBoard writes in a thread, and raises in this one again what it met there.
    threading.excepthook = lambda args: None if _is_of_disk(args.exc_value) else hook(args)
    try:
        yield
    except Exception as fault:
        if isinstance(fault, SememeError) or not _is_of_disk(fault):
            raise
        raise unwritable(folder, fault, advice) from fault
    finally:
        threading.excepthook = hook


def _is_of_disk(fault: BaseException | None) -> bool:
    """The libraries agree in no type of exception."""
    known = isinstance(fault, OSError) and fault.errno in DISK_ERRORS
    return known or DISK_FAULTS.search(str(fault)) is not None


def remove_temporaries(folder: Path) -> None:
    """Removes what a process that was killed, or safetensors in it, was about to write."""
    for name in (".*.tmp", ".tmp*"):
        for path in folder.glob(name):
            path.unlink(missing_ok=True)


def write_manifest(folder: Path, names: Iterable[str] = PARTS, **more: str) -> None:
    """The hash of every file in `folder` that a model consists of, or that `names` has, in a file
    beside them that is written last."""
    paths = {path for name in names for path in folder.glob(name)}
    files = {p.name: sha256(p) for p in sorted(paths) if p.is_file() and p.name[0] != "."}
    write(folder / MANIFEST, json.dumps({"files": files, **more}, indent=2).encode())


def check_manifest(folder: Path, only: str | None = None, required: bool = True) -> dict[str, str]:
    """The hashes of the manifest. Raises CheckpointError unless the files in `folder`, or the one
    named, have them: one flipped bit in a safetensors file goes unnoticed nearly always, and one in
    the name of a JSON key leaves a default in its place. Without `required` there may be no
    manifest, as in runs of earlier releases."""
    if not (required or (folder / MANIFEST).is_file()):
        return {}
    hashes = _hashes(folder)
    for name, wanted in hashes.items():
        if only not in (None, name):
            continue
        if fault := difference(folder / name, wanted):
            raise CheckpointError(
                f"{folder / name} is corrupt ({fault}): need the file as it was saved. try: copy, "
                "pull or train it again in a new folder"
            )
    return hashes


def difference(path: Path, wanted: str) -> str:
    """What is wrong with a file that is to have a hash; nothing where it has."""
    try:
        actual = sha256(path) if path.is_file() else None
    except OSError as error:  # it went meanwhile, or cannot be read
        return reason(error)
    if actual is None:
        return "the file is missing"
    return "" if actual == wanted else f"sha256 {actual[:12]}…, it was {wanted:.12}…"


def _hashes(folder: Path) -> dict[str, str]:
    """File → its hash, as the manifest in `folder` has it."""
    try:
        manifest = read_object(folder / MANIFEST)
        # Earlier releases: the weights alone, or as an object with their hash.
        files = manifest.get("files") or {WEIGHTS: manifest[WEIGHTS]}
        return {name: str(x["sha256"] if isinstance(x, dict) else x) for name, x in files.items()}
    except (OSError, ValueError, LookupError, AttributeError, TypeError, RecursionError) as error:
        raise CheckpointError(
            f"{folder} holds no finished model ({reason(error)}): need {WEIGHTS} and the "
            f"{MANIFEST} that was saved with it. try: RUN/model of a finished run"
        ) from error
