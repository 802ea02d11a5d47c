"""What goes wrong because of the input or the network."""


class DigestError(Exception):
    """A fault that the user can mend, printed as one sentence; `code` is the exit code."""

    def __init__(self, got: str, need: str, remedy: str = "again later", code: int = 2):
        super().__init__(f"{got}: need {need}. try: {remedy}")
        self.code = code
