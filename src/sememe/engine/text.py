"""Tokens → text as it may be shown: whole characters, and nothing of a stop string."""

from collections.abc import Sequence

from sememe.detokenize import INCOMPLETE, Detokenizer


class TextStream:
    """The text of new tokens, piece by piece. `stopped`: a stop string has come; it and what is
    behind it are not given out.

    Args:
        prompt: token ids before the new ones; alone, the first new token may lose its space.
        stops: strings that end the text."""

    def __init__(self, tokenizer, prompt: Sequence[int], stops: Sequence[str] = ()):
        self.detokenizer = Detokenizer(tokenizer, skip_special_tokens=True)
        self.detokenizer.before = list(prompt[-8:])
        self.stops = [stop for stop in stops if stop]
        self.held = ""
        self.stopped = False

    def add(self, tokens: Sequence[int]) -> str:
        """What may be shown by now."""
        if self.stopped:
            return ""
        self.held += "".join(map(self.detokenizer.add, tokens))
        return self._release(self._overlap())

    def end(self) -> str:
        """The rest."""
        if self.stopped:
            return ""
        self.held += self.detokenizer.rest().rstrip(INCOMPLETE)
        self._overlap()
        return self._release(0)

    def _overlap(self) -> int:
        """Looks for stop strings; how many characters at the end may be the beginning of one."""
        spans = ((self.held.find(stop), len(stop)) for stop in self.stops)
        # The one that ends first: how many characters a token brings must make no difference.
        matches = [(at + length, at) for at, length in spans if at >= 0]
        if matches:
            self.held, self.stopped = self.held[: min(matches)[1]], True
            return 0
        return max((_shared(self.held, stop) for stop in self.stops), default=0)

    def _release(self, back: int) -> str:
        cut = len(self.held) - back
        text, self.held = self.held[:cut], self.held[cut:]
        return text


def _shared(text: str, stop: str) -> int:
    """Length of the longest end of `text` that `stop` begins with, short of all of it."""
    lengths = range(min(len(text), len(stop) - 1), 0, -1)
    return next((n for n in lengths if text.endswith(stop[:n])), 0)
