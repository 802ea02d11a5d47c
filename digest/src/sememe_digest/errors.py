"""What goes wrong because of the input or the network: one sentence that says got, need, try."""


class DigestError(Exception):
    """A fault that the user can mend, printed without a traceback; `code` is the exit code."""

    code = 2


class Unread(DigestError):
    """Something that was not answered, or is not what was asked for."""

    code = 5
