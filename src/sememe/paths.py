"""What a user names on disk: whether it can be a path and is there, what tells a text from others,
how it is printed."""

import hashlib
from pathlib import Path

from sememe.errors import DataError, SememeError

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
        why = getattr(fault, "strerror", None) or str(fault)
        raise SememeError(
            f"{shown(name)} cannot be used as a path ({why}): need that of a file or folder. "
            "try: a shorter name, in a folder of your own"
        ) from fault
    return path


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


def locate(source: str, field: str = "text") -> tuple[Path | None, str, str]:
    """The file that a source names (None where there is none), its name and the field:
    `file.jsonl#response` names one, but a file may have a # in its own name."""
    name, _, named = source.rpartition("#")
    path = existing(source)
    if path is None and name and named:
        path = existing(name)
        if (
            path is not None or "/" not in named
        ):  # else the # is in a folder's name, and nothing is there
            source, field = name, named
    return path, source, field


def source_sha256(source: str) -> str:
    """What tells a source from others, under any name: sha256 of the bytes of the file and of the
    field that is read; of a datasets id, of its name. Raises DataError where the file cannot be
    read."""
    path, name, field = locate(source)
    if path is None or path.is_dir():
        return hashlib.sha256(f"{name}#{field}".encode("utf-8", "surrogatepass")).hexdigest()
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256")
    except OSError as fault:
        raise unreadable(source, fault) from fault
    digest.update(b"" if path.suffix == ".txt" else f"#{field}".encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def unreadable(source: str, fault: OSError) -> DataError:
    """The sentence for a file that is there and cannot be read."""
    return DataError(
        f"{source} cannot be read ({fault}): need a readable file. try: check its permissions"
    )
