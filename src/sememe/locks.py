"""One command at a time in a folder or at a file, by a lock of the operating system: it ends with
the process that holds it, however that ends, so that none is ever stale."""

import contextlib
import os
import platform
import time
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from sememe.errors import SememeError
from sememe.paths import usable

LOCK = ".lock"
WAIT_S = 1  # for one that is just ending


@contextlib.contextmanager
def only_user(path: Path, lock: Path | None = None) -> Iterator[None]:
    """Inside nobody else does this with `path`: a run folder, new or not, or with `lock` anything
    that the lock file stands for. The same thread may do it again. Of several processes that train
    one model the first holds it for all. Where nothing can be written nothing is locked.

    Raises SememeError where it is in use, which says by whom."""
    file = usable(lock or path / LOCK)
    guard = FileLock(file, timeout=WAIT_S, is_singleton=True, on_acquired=_sign)
    # A folder is made for a run alone: a file in one that is not there is refused.
    can_hold = lock is None or file.parent.is_dir()
    holds = can_hold and os.environ.get("RANK", "0") == "0"
    new = holds and not file.parent.exists()
    try:
        if holds:
            file.parent.mkdir(parents=True, exist_ok=True)
            guard.acquire()
    except Timeout as error:
        raise SememeError(
            f"{path} is in use by {_holder(file)}: need one that nobody works on. try: wait until "
            "it is done, or another folder"
        ) from error
    except OSError:  # who needs to write here will say so
        holds = False
    try:
        yield
    finally:
        if holds:
            if guard.lock_counter == 1:
                file.unlink(missing_ok=True)
            guard.release()
        if new:
            with contextlib.suppress(OSError):  # unless something was written into it
                file.parent.rmdir()


def _sign(descriptor: int) -> None:
    """Writes into a lock who holds it."""
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    text = f"process {os.getpid()} on {platform.node()} since {since}"
    os.ftruncate(descriptor, 0)
    os.write(descriptor, text.encode())


def _holder(file: Path) -> str:
    with contextlib.suppress(OSError):
        return file.read_text(encoding="utf-8", errors="replace")[:200] or "another process"
    return "another process"
