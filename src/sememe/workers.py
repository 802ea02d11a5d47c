"""Work in several processes, part by part (Ray Data). What each part gives is kept as a file until
all are there: the same command goes on where one was killed."""

import hashlib
import logging
import shutil
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from sememe import storage
from sememe.cluster import cluster
from sememe.errors import SememeError, reason
from sememe.locks import LOCK, only_user
from sememe.paths import home
from sememe.progress import bar

Tensors = dict[str, Tensor]
Work = Callable[[Tensors], Tensors]
BLOCKS = 64  # of parts, for each process: while one has its last block, the others wait


class Worker:
    """One process. `make(*arguments)`: what it works with, a model for instance."""

    def __init__(self, make: Callable[..., Work], arguments: tuple, folder: Path):
        self.work = make(*arguments)
        self.folder = folder

    def __call__(self, block):
        """A pyarrow table of parts; of which those that are there are left out."""
        for number, part in zip(
            *(block[key].to_pylist() for key in ("number", "part")), strict=True
        ):
            path = part_file(self.folder, number)
            if read_part(path) is None:
                content = safetensors.torch.save(self.work(safetensors.torch.load(part)))
                storage.write(path, hashlib.sha256(content).digest() + content)
        return block.select(["number"])


def part_file(folder: Path, number: int) -> Path:
    return folder / f"{number}.part"


def read_part(path: Path) -> Tensors | None:
    """What a part has given; None where that is not there, or not as it was written: its first 32
    bytes are the hash of the others."""
    content = path.read_bytes() if path.is_file() else b""
    if hashlib.sha256(content[32:]).digest() != content[:32]:
        return None
    return safetensors.torch.load(content[32:])


def weights_sha256(state: Tensors) -> str:
    """What tells a model from others."""
    digest = hashlib.sha256()
    for key, value in sorted(state.items()):
        digest.update(key.encode() + value.float().cpu().numpy().tobytes())
    return digest.hexdigest()


def work_in_parts(
    make: Callable[..., Work], arguments: tuple, parts: list[Tensors], workers: int, identity: Any
) -> list[Tensors]:
    """`make(*arguments)(part)` of all parts, in their order, as one process would have them.

    Args:
        identity: with the parts themselves, all that the results depend on: what another command
            left is never taken.

    Raises:
        SememeError: the extra is not installed, Ray does not start, or a process fails."""
    content = [safetensors.torch.save(part) for part in parts]
    digest = hashlib.sha256(repr(identity).encode())
    for part in content:
        digest.update(part)
    folder = home() / "parts" / digest.hexdigest()[:32]
    folder.mkdir(parents=True, exist_ok=True)
    with only_user(folder, folder.with_suffix(LOCK)):
        missing = [
            {"number": number, "part": part}
            for number, part in enumerate(content)
            if read_part(part_file(folder, number)) is None
        ]
        there = len(parts) - len(missing)
        if there:
            print(f"going on: {there} of {len(parts)} parts are there", file=sys.stderr)
        workers = min(workers, len(missing))
        if missing:
            with cluster(workers), bar(total=len(parts), initial=there, unit="part") as shown:
                for count in _finished(make, arguments, folder, missing, workers):
                    shown.update(count)
        results = [read_part(part_file(folder, number)) for number in range(len(parts))]
        shutil.rmtree(folder, ignore_errors=True)
    return results


def _finished(
    make: Callable[..., Work], arguments: tuple, folder: Path, rows: list[dict], workers: int
) -> Iterable[int]:
    """How many more parts are there, again and again until all are."""
    import ray.data

    logging.getLogger("ray.data").setLevel(logging.ERROR)
    ray.data.DataContext.get_current().enable_progress_bars = False
    data = ray.data.from_items(rows, override_num_blocks=min(len(rows), BLOCKS * workers))
    done = data.map_batches(
        Worker,
        fn_constructor_args=(make, arguments, folder),
        concurrency=workers,
        batch_size=1,
        batch_format="pyarrow",
        num_cpus=1,
    )
    try:
        for block in done.iter_batches(batch_size=None, batch_format="pyarrow"):
            yield len(block)
    except ray.exceptions.RayError as error:
        cause = getattr(error, "cause", None) or error
        if isinstance(cause, SememeError):
            raise cause from None
        raise SememeError(
            f"a process has failed ({reason(cause)}): need memory for the model in each. try: the "
            "same command, which goes on, with fewer --workers"
        ) from error
