"""The files of a base before they are used: regular, of sizes that fit each other, and as they were
at first use."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import math
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import safe_open

from sememe import storage
from sememe.errors import BaseError, SememeError, UnsafeError
from sememe.paths import home, shown
from sememe.reading import JSON_BYTES, read_object, regular

CONFIG = "config.json"
WEIGHTS = "*.safetensors"
MAX_LAYERS = 10_000  # more than any decoder has
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
HEADER_BYTES = 16 << 20  # that of 10,000 tensors has 1.2 MB
SIZE = re.compile(r"^(num|n)_|_(size|dim|rank)$|^d_|layers$")
"""Names of the numbers in a configuration that parts of a model are as many, or as large, as."""


def check_files(folder: Path) -> None:
    """Raises SememeError unless all that a base is read from are regular files, of sizes that such
    files have: nothing else has a hash, or an end."""
    refuse_pickles(folder)
    for path in _files(folder):
        regular(path, None if path.match(WEIGHTS) else JSON_BYTES)
    if (folder / "adapter_config.json").exists():  # transformers would put it on unasked
        raise BaseError(
            f"{folder} holds an adapter over a base: need a base alone. try: merge_and_unload() of "
            "peft, and save_pretrained into another folder"
        )


def refuse_pickles(folder: Path) -> None:
    """Raises UnsafeError where the weights in `folder` are pickles alone."""
    pickles = [path.name for pattern in PICKLES for path in folder.glob(pattern)]
    if pickles and not weights_of(folder):
        raise UnsafeError(
            f"{folder} has its weights in {pickles[0]}, which may hold any program and would run "
            "it: need *.safetensors. try: a base that comes with them"
        )


def hashes(folder: Path) -> dict[str, str]:
    """The sha256 of each file that the base in `folder` is read from, by its name."""
    check_files(folder)
    return {path.name: sha256(path) for path in _files(folder)}


def sha256(path: Path) -> str:
    """The hash of a file's bytes; of one that is as it was a moment ago, by its size and times, in
    this process, without reading it again."""
    status = path.stat()
    return _sha256(path, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


@functools.lru_cache(1000)
def _sha256(path: Path, *status: int) -> str:
    return storage.sha256(path)


def _files(folder: Path) -> list[Path]:
    """Those of a base, sorted by name; not what was written beside them by a training run."""
    paths = {
        path for pattern in storage.PARTS for path in folder.glob(pattern) if not path.is_dir()
    }
    return sorted(path for path in paths if not path.name.startswith("."))


# Sizes


def check_sizes(folder: Path) -> int:
    """How many numbers the weights in `folder` are, by their headers. Raises BaseError where
    config.json speaks of more or larger layers than these can be: all of them would be built before
    anything is missing."""
    _check_index(folder)
    shapes = [shape for path in weights_of(folder) for shape in shapes_of(path).values()]
    total = sum(map(math.prod, shapes))
    config, inner = read_object(folder / CONFIG), None
    if config.get("base") is not None:  # adapters: what is in them is built as the base's own file
        inner = config.pop("text_config", None)
    limits = ((config, len(shapes), total), (inner, MAX_LAYERS, sys.maxsize))
    for part, layers, numbers in limits:
        for name, value in _sizes(part):
            limit = layers if "layer" in name else numbers
            if value > limit or (value < 0 and name.endswith("layers")):
                raise BaseError(
                    f"{folder / CONFIG} says {name} = {value}, but the weights beside it are "
                    f"{len(shapes)} tensors of {total} numbers: need a configuration of these "
                    "weights. try: download it again"
                )
    return total


def check_total(folder: Path, parameters: int, total: int) -> None:
    """Raises BaseError where a model has more than twice as many `parameters` as the weights have
    numbers: those that are missing would be drawn."""
    if parameters > 2 * total:
        raise BaseError(
            f"{folder / CONFIG} is of a model of {parameters} parameters, but the weights beside "
            f"it have {total}: need a configuration of these weights. try: download it again"
        )


def _check_index(folder: Path) -> None:
    """Raises BaseError where the index of the weights names others than those beside it."""
    for path in folder.glob("*.safetensors.index.json"):
        names = {*map(str, dict(read_object(path)["weight_map"]).values())}
        if others := sorted(names - {beside.name for beside in weights_of(folder)}):
            outside = any(Path(name).name != name for name in others)
            raise (UnsafeError if outside else BaseError)(
                f"{path} names {shown(others[0])}, which is not beside it: need the weights that "
                "belong to it in the same folder. try: download it again"
            )


def weights_of(folder: Path) -> list[Path]:
    return sorted(folder.glob(WEIGHTS))


def shapes_of(path: Path) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor in a file, by its name. Raises BaseError or SafetensorError where
    its header is none."""
    with regular(path).open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
    if length > HEADER_BYTES:
        raise BaseError(
            f"{path} has a header of {length} bytes: need at most {HEADER_BYTES}. try: download it "
            "again"
        )
    with safe_open(path, "pt") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 - no mapping


def _sizes(config: Any) -> Iterator[tuple[str, int]]:
    """The numbers in a configuration, and the ones in it, by which a model is large."""
    for name, value in config.items() if isinstance(config, dict) else ():
        yield from _sizes(value)
        if isinstance(value, int) and SIZE.search(name):
            yield name, value


# As it was at first use


def check_held(folder: Path) -> None:
    """Raises BaseError where files of a base are not as they were when it was loaded first. The
    folder may be read-only, so their hashes lie in SEMEME_HOME, by its path."""
    record = _record(folder)
    if record is None or not record.is_file() or is_listed(folder):
        return
    held, now = read_object(record)["files"], hashes(folder)
    changed = sorted(name for name in held.keys() | now.keys() if held.get(name) != now.get(name))
    if changed:
        raise BaseError(
            f"{folder} is not as it was at its first use ({', '.join(changed)} differ): need the "
            "files as they were then. try: download it again, or, if it was changed on purpose, rm "
            f"{record}"
        )


def hold(folder: Path) -> None:
    """Keeps the hashes of a base that was loaded, unless it has a manifest of all its files. Where
    they cannot be kept the base can be used all the same."""
    record = _record(folder)
    if record is None or record.is_file() or is_listed(folder):
        return
    content = {"folder": str(folder.resolve()), "files": hashes(folder)}
    with contextlib.suppress(OSError):
        record.parent.mkdir(parents=True, exist_ok=True)
        storage.write(record, json.dumps(content, indent=1).encode())


def is_listed(folder: Path) -> bool:
    """Whether the folder has a manifest with more in it than the weights."""
    path = folder / storage.MANIFEST
    return path.is_file() and CONFIG in str(read_object(path))


def _record(folder: Path) -> Path | None:
    """Where the hashes of a base are kept; None where no home can be had."""
    name = hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()
    with contextlib.suppress(SememeError):
        return home() / "first-use" / f"{name[:32]}.json"
    return None
