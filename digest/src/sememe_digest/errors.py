"""What goes wrong because of the input or the network."""

import re


class DigestError(Exception):
    """A fault that the user can mend, printed as one sentence; `code` is the exit code."""

    def __init__(self, got: str, need: str, remedy: str = "again later", code: int = 2):
        super().__init__(f"{got}: need {need}. try: {remedy}")
        self.code = code


def kind(error: Exception) -> str:
    """The name of an error in words, `file not found error`: its text is for programmers."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", " ", type(error).__name__).lower()
