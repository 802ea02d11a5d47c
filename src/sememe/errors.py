"""What goes wrong because of the input: one sentence that says got, need, try."""

import contextlib
from collections.abc import Iterator


class SememeError(Exception):
    """A fault that the user can mend. The command line prints it without a traceback and exits with
    1.

    Write the message as one sentence that names what was got, what is needed and what to try."""

    exit_code = 1


class RecipeError(SememeError):
    """A recipe, or an override of it, that cannot be run."""


class DataError(SememeError):
    """A text file that is missing, empty or unreadable."""


class BaseError(SememeError):
    """A base model that cannot be had, or that this design cannot split."""


class UnsafeError(BaseError):
    """Files that could be used only by running what is in them, or by reading outside their
    folder."""

    exit_code = 2


class CheckpointError(SememeError):
    """A saved model or run that is incomplete, corrupt or of another base."""


class CodesError(SememeError):
    """Compressed text that is not whole, of another model, or cannot be written."""


class TrainingError(SememeError):
    """A run that must stop: figures that are not finite, a full disk."""


class Diverged(TrainingError):
    """A run none of whose last steps could be taken."""

    exit_code = 3


class Interrupted(SememeError):
    """The user stopped the work."""

    exit_code = 130


class Terminated(Interrupted):
    """The machine wants it ended (SIGTERM), and it was: that is no fault."""

    exit_code = 0


@contextlib.contextmanager
def needs_extra(extra: str) -> Iterator[None]:
    """Imports that only work where an extra of this package is installed. Raises SememeError where
    it is not."""
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("sememe"):
            raise
        raise SememeError(
            f"{error.name} is not installed: need the extra {extra}. try: pip install "
            f"'sememe[{extra}]'"
        ) from error


def reason(error: BaseException) -> str:
    """The first line of an error's message, or its type when it has none."""
    lines = str(error).strip().splitlines()
    return lines[0].strip()[:200] if lines else type(error).__name__
