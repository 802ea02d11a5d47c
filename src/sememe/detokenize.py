"""Token ids → text, token by token: no character falls apart, and no space is lost."""

from collections.abc import Sequence

INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
"""What a tokenizer decodes the bytes of half a character to."""


def decode(tokenizer, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
    """The text of ids. Spaces before full stops stay, or the text of some would not begin the text
    of more."""
    return tokenizer.decode(
        ids, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
    )


class Detokenizer:
    """Tokens come one by one, and each gives the text that it completes.

    A character of several tokens comes with the last of them, the others give ''. Each is decoded
    behind what came just before it: alone, a word of a SentencePiece vocabulary loses the space
    that it begins with."""

    def __init__(self, tokenizer, skip_special_tokens: bool = False):
        self.tokenizer = tokenizer
        self.skip_special_tokens = skip_special_tokens
        self.before: list[int] = []
        self.held: list[int] = []

    def add(self, token: int) -> str:
        """The text that is complete with this token."""
        self.held.append(token)
        text = self.rest()
        if not text or text.endswith(INCOMPLETE):
            return ""
        self.before, self.held = self.held, []
        return text

    def rest(self) -> str:
        """The text that is held back, half characters as the tokenizer decodes them."""
        known = decode(self.tokenizer, self.before, self.skip_special_tokens)
        return decode(self.tokenizer, self.before + self.held, self.skip_special_tokens)[
            len(known) :
        ]


def pieces(tokenizer, ids: Sequence[int]) -> list[str]:
    """The text of ids cut into one piece a token, special tokens among them: put together, the
    pieces are the whole text. Half characters at its ends, where a block of tokens was cut out of a
    longer text, are left out."""
    stream = Detokenizer(tokenizer)
    cut = [stream.add(token) for token in ids]
    if cut:
        cut[-1] += stream.rest()
    return [piece.strip(INCOMPLETE) for piece in cut]
