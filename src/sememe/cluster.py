"""Ray on this machine, for one command: it takes orders from that alone, and leaves nothing."""

import contextlib
import logging
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from sememe.errors import SememeError, needs_extra, reason

OBJECT_STORE = 150_000_000  # bytes in memory; what is more goes to the disk


SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    # Without clusters of machines it listens at 127.0.0.1, on Linux too; a replica does not.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    # Nor may other users of this machine, or other machines, run code in it.
    "RAY_AUTH_MODE": "token",
    # Each line that a process prints, as it is.
    "RAY_DEDUP_LOGS": "0",
    "RAY_COLOR_PREFIX": "0",
}


@contextlib.contextmanager
def cluster(processes: int, *, prints: bool = False, **settings: str) -> Iterator[None]:
    """Ray is up inside of the block, with so many worker processes in mind.

    Args:
        prints: whether what the processes print is printed here.
        settings: environment variables of all its processes, beside those that it needs.

    Raises:
        SememeError: the extra is not installed, or Ray does not start."""
    # Each process has its share of the cores: OpenMP would give all of them to each.
    settings["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS") or str(
        max(1, (os.cpu_count() or 1) // processes)
    )
    # One that comes by the environment is not written to the home folder.
    settings["RAY_AUTH_TOKEN"] = os.environ.get("RAY_AUTH_TOKEN") or secrets.token_hex(32)
    # Read when Ray is imported, and by every process that it starts.
    with _environment(SETTINGS | settings):
        ray = _imported()
        # Not TMPDIR: the paths of sockets within may have 107 characters at most.
        place = "/tmp" if os.name == "posix" else None
        folder = Path(tempfile.mkdtemp(prefix="sememe-", dir=place))
        try:
            _start(ray, processes, prints, folder)
            yield
        finally:
            ray.shutdown()
            for _ in range(20):  # until the last process writes no more
                shutil.rmtree(folder, ignore_errors=True)
                if not folder.exists():
                    break
                time.sleep(0.1)


@contextlib.contextmanager
def _environment(settings: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _imported():
    with needs_extra("ray"):
        import ray
    return ray


def _start(ray, processes: int, prints: bool, folder: Path) -> None:
    import psutil

    own = psutil.Process()
    before = own.children(recursive=True)
    for last in (False, True):
        try:
            ray.init(
                address="local",
                num_cpus=processes + 1,  # which it counts and does not reserve
                include_dashboard=False,
                object_store_memory=OBJECT_STORE,
                logging_level=logging.ERROR,
                log_to_driver=prints,
                _node_ip_address="127.0.0.1",
                _temp_dir=str(folder),
            )
            return
        # On a busy machine it takes longer than the half minute after which Ray raises this.
        except Exception as error:
            # It leaves what did come up.
            for process in set(own.children(recursive=True)).difference(before):
                with contextlib.suppress(psutil.Error):
                    process.kill()
            if last:
                raise SememeError(
                    f"Ray does not start ({reason(error)}): need memory, and a machine that is "
                    "less busy. try: again, or one process"
                ) from error
