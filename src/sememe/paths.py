"""What a user names on disk: whether it can be a path, whether it is there, and how it is printed."""

from pathlib import Path

from sememe.errors import SememeError

SHOWN = 80  # characters of a name in a message


def usable(name: str | Path) -> Path:
    """The path that a user names, `~` expanded, whether or not it is there.

    Raises SememeError for what no path can be (too long, a `~user` that is unknown, a NUL), or may not be looked at.
    """
    try:
        path = Path(name).expanduser()
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return path
    except (OSError, RuntimeError, ValueError) as fault:
        why = getattr(fault, "strerror", None) or str(fault)
        raise SememeError(f"{shown(name)} cannot be used as a path ({why}): need that of a file or folder. "
                          "try: a shorter name, in a folder of your own") from fault
    return path


def existing(name: str | Path) -> Path | None:
    """The path that a user names, `~` expanded, where something is there; None for any other text, of any length.

    Raises SememeError where it may not be looked at.
    """
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
