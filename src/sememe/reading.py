"""Reading files that may be from anyone: regular ones of a bounded size, with plain data in them.

What is wrong with one is known before any work is done for it."""

import json
import stat
from pathlib import Path
from typing import Any

import yaml

from sememe.errors import SememeError

YAML_BYTES = 32 << 10  # a recipe with every key has 3 KB; PyYAML takes a second for 100 KB
JSON_BYTES = 64 << 20  # the tokenizer.json of 256,000 words has 33 MB
FAULTS = (OSError, ValueError, RecursionError, yaml.YAMLError)
"""What these raise beside SememeError: of text that is not UTF-8, or of data that is none."""


def regular(path: Path, limit: int | None = None) -> Path:
    """The path itself. Raises SememeError unless it is that of a regular file, or of a link to one,
    of at most `limit` bytes: a device has no end, and a pipe waits until somebody writes."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise SememeError(
            f"{path} is a folder, a device or a pipe: need a regular file. try: a copy of it"
        )
    if limit is not None and status.st_size > limit:
        raise SememeError(
            f"{path} has {status.st_size} bytes: need at most {limit} in a file of this kind. try: "
            "the file as it was written"
        )
    return path


def read_text(path: Path, limit: int = JSON_BYTES) -> str:
    """All of a regular file of UTF-8."""
    return regular(path, limit).read_text(encoding="utf-8")


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; a ValueError where it holds anything else."""
    return _mapping(json.loads(read_text(path)))


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping of plain values in a YAML file, empty for an empty file; a ValueError where it
    holds anything else."""
    loader = _PlainLoader(read_text(path, YAML_BYTES))
    try:
        return _mapping(loader.get_single_data() or {})
    finally:
        loader.dispose()


class _PlainLoader(yaml.SafeLoader):
    """No tags but YAML's own, and no aliases, of which nine lines stand for gigabytes."""

    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError(f"an alias, *{self.peek_event().anchor}, and need its value")
        return super().compose_node(parent, index)


def _mapping(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"a {type(value).__name__} where a mapping of keys to values is needed")
    return value
