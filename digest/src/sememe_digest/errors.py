"""What goes wrong because of the input or the network: one sentence that says got, need, try."""


class DigestError(Exception):
    """A fault that the user can mend; printed without a traceback.

    Write the message as one sentence that names what was got, what is needed and what to try."""

    exit_code = 2


class ConfigError(DigestError):
    """A configuration that cannot be used."""


class NothingRead(DigestError):
    """No feed could be read: nothing is written."""

    exit_code = 5


class Unreachable(DigestError):
    """A request that was not answered, or not in time."""

    exit_code = 5


class Unreadable(DigestError):
    """An answer that is not what was asked for: a cut feed, HTML for a PDF, a wrong count."""

    exit_code = 5


class EndpointError(DigestError):
    """A language model's endpoint that refuses every request alike."""

    exit_code = 4


def reason(error: BaseException) -> str:
    """The first line of an error's message, or its type when it has none."""
    lines = str(error).strip().splitlines()
    return lines[0].strip()[:300] if lines else type(error).__name__
