"""Progress bars: one place for how they look on a terminal and where there is none. Imports nothing
large."""

import sys
from typing import Any

from tqdm import auto, std


class _Lines(std.tqdm):
    """For a file, a pipe or a log: a whole line every half minute instead of control codes."""

    @staticmethod
    def status_printer(file):
        def write(text: str) -> None:
            if text:
                print(text, file=file, flush=True)

        return write

    def moveto(self, n: int) -> None:
        """A bar inside another has lines of its own."""

    def close(self) -> None:
        if not self.disable:
            self.display()  # how far it came; `close` of a bar would add control codes
            self.disable = True
            self._decr_instances(self)


def bar(**options: Any) -> std.tqdm:
    """A tqdm on stderr, with the time that is left."""
    if (
        sys.stderr.isatty()
        or not issubclass(auto.tqdm, std.tqdm)
        or "notebook" in auto.tqdm.__module__
    ):
        return auto.tqdm(**options)
    return _Lines(**options | {"mininterval": 30, "miniters": 1})
