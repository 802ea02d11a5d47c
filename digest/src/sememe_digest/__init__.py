"""A daily digest of arXiv: feeds in, ranked papers, checked summaries, pages and feeds out."""

import re

__version__ = "0.1.0"


class DigestError(Exception):
    """A fault of the input or the network, printed as one sentence; `code` is the exit code."""

    def __init__(self, got: str, need: str, remedy: str = "again later", code: int = 2):
        super().__init__(f"{got}: need {need}. try: {remedy}")
        self.code = code


def kind(error: Exception) -> str:
    """The name of an error in words, `file not found error`: its text is for programmers."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])|\B(?=[A-Z][a-z])", " ", type(error).__name__).lower()
