"""Writing files: whole or not at all, through links, and into what is there and is no regular
file."""

import contextlib
import errno
import os
import stat
from pathlib import Path

from sememe.errors import SememeError

NO_RENAME = {errno.EACCES, errno.EPERM, errno.EROFS, errno.EBUSY, errno.EXDEV}


def write(path: Path, content: bytes) -> None:
    """Writes a file under a temporary name and renames it, so that it is whole or as it was.

    A symbolic link stays, and its target is written. A pipe or a device is written into, and so is
    a file that may be written in a folder that may not. Raises OSError; no temporary file is left
    behind."""
    there = _stat(path)
    if there is not None and not stat.S_ISREG(there.st_mode):
        path.write_bytes(content)
        return
    target = Path(os.path.realpath(path))
    temporary = target.with_name(f".{target.name[:50]}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if there is not None:
            temporary.chmod(stat.S_IMODE(there.st_mode))
        os.replace(temporary, target)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if there is None or not isinstance(error, OSError) or error.errno not in NO_RENAME:
            raise
        target.write_bytes(
            content
        )  # a folder that is read-only, or a file that is mounted by itself, as in a container


def check(path: Path) -> None:
    """Raises OSError where `write` would, ahead of the work whose result is to be written."""
    there = _stat(path)
    if there is not None and stat.S_ISDIR(there.st_mode):
        raise _fault(errno.EISDIR, path)
    if there is not None and os.access(path, os.W_OK):
        return
    folder = Path(os.path.realpath(path)).parent
    if not folder.is_dir():
        raise _fault(errno.ENOENT, folder)
    if not os.access(folder, os.W_OK | os.X_OK) or (
        there is not None and not stat.S_ISREG(there.st_mode)
    ):
        raise _fault(errno.EACCES, path)


def unwritable(path: Path, error: OSError) -> SememeError:
    """The sentence for a path that `write` or `check` cannot do with."""
    return SememeError(
        f"could not write {path} ({error.strerror or error}): need free space in a folder that can "
        "be written to. "
        "try: another folder"
    )


def _stat(path: Path) -> os.stat_result | None:
    """Of what a link leads to; None where nothing is there."""
    try:
        return os.stat(path)
    except FileNotFoundError:
        return None


def _fault(number: int, path: Path) -> OSError:
    return OSError(number, os.strerror(number), str(path))
