"""Names of files as users type them: whether one can be a path, what is there, which content."""

import hashlib
import os
from pathlib import Path

from sememe.errors import SememeError

SHOWN = 80  # characters of a name in a message


def usable(name: str | Path) -> Path:
    """The path that a user names, `~` expanded, whether or not it is there.

    Raises SememeError for what no path can be (too long, a `~user` that is unknown, a NUL), or may
    not be looked at."""
    try:
        path = Path(name).expanduser()
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return path
    except (OSError, RuntimeError, ValueError) as fault:
        raise SememeError(
            f"{shown(name)} cannot be used as a path ({getattr(fault, 'strerror', None) or fault}):"
            " need that of a file or folder. try: a shorter name, in a folder of your own"
        ) from fault
    return path


def home() -> Path:
    """Where what is not of one run is kept: bases, and parts of work that is not finished."""
    return usable(os.environ.get("SEMEME_HOME") or "~/.cache/sememe")


def existing(name: str | Path) -> Path | None:
    """The path that a user names, `~` expanded, where something is there; None for any other text,
    of any length.

    Raises SememeError where it may not be looked at."""
    try:
        path = usable(name)
    except SememeError as error:
        if isinstance(error.__cause__, PermissionError):
            raise
        return None
    return path if path.exists() else None


def shown(name: str | Path) -> str:
    """A name as typed, its beginning alone where it is long: it may be a whole text."""
    text = str(name)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}… ({len(text)} characters)"


def names_of(sources: str | list[str]) -> list[str]:
    """One source, or several, each once."""
    return [sources] if isinstance(sources, str) else [*dict.fromkeys(sources)]


def locate(source: str) -> tuple[Path | None, str, str]:
    """The file that a source names (None where there is none), its name and the field, `text`
    where none is named: `file.jsonl#response` names one, but a file may have a # in its own
    name."""
    name, _, field = source.rpartition("#")
    path = existing(source)
    if path is not None or not (name and field) or "/" in field:  # the # is in a folder's name
        return path, source, "text"
    return existing(name), name, field


def content_file(path: Path | None) -> Path | None:
    """The file that tells what a source is: itself, or of a folder of token shards the manifest,
    which has the hash of each; None where there is none."""
    file = path / "manifest.json" if path is not None and path.is_dir() else path
    return file if file is not None and file.is_file() else None


def source_sha256(source: str) -> str:
    """What tells a source from others, under any name: the hash of a file's bytes and of the field
    that is read; of a folder of token shards that of its manifest; of a datasets id, that of its
    name."""
    path, name, field = locate(source)
    if file := content_file(path):
        with file.open("rb") as content:
            digest = hashlib.file_digest(content, "sha256")
    else:
        digest = hashlib.sha256(name.encode("utf-8", "replace"))
    if path is None or path.suffix != ".txt":
        digest.update(f"#{field}".encode("utf-8", "replace"))
    return digest.hexdigest()
