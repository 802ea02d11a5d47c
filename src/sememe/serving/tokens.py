"""Log-probabilities of tokens in the shapes of OpenAI's two routes."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from sememe.detokenize import INCOMPLETE, Detokenizer, decode

if TYPE_CHECKING:
    from sememe.engine import TokenLogprob

LOWEST = -9999.0
"""For what has no probability at all: JSON has no infinity."""


def finite(logprob: float) -> float:
    return max(logprob, LOWEST)


class TokenTable:
    """`logprobs` of the completions route, of one choice; call it in the order of the text.

    Args:
        prompt: with `echo` its tokens, which come first."""

    def __init__(self, tokenizer, prompt: Sequence[int] = ()):
        self.tokenizer = tokenizer
        self.prompt = list(prompt)
        self.count = self.offset = 0
        self.place = Detokenizer(tokenizer, skip_special_tokens=False)

    def __call__(self, logprobs: Sequence["TokenLogprob | None"]) -> dict[str, list[Any]]:
        table: dict[str, list[Any]] = {
            name: [] for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset")
        }
        for known in logprobs:
            # The first token of a prompt has no probability.
            token = self.prompt[self.count] if known is None else known.token
            self.count += 1
            table["tokens"].append(decode(self.tokenizer, [token]))
            table["token_logprobs"].append(None if known is None else finite(known.logprob))
            table["top_logprobs"].append(None if known is None else self._top(known))
            table["text_offset"].append(self.offset)
            self.offset += len(self.place.add(token))
        return table

    def _top(self, known: "TokenLogprob") -> dict[str, float]:
        """Texts of tokens may be equal, as those of half characters: the likeliest counts."""
        top: dict[str, float] = {}
        for token, logprob in [*known.top, (known.token, known.logprob)]:
            top.setdefault(decode(self.tokenizer, [token]), finite(logprob))
        return top


def chat_logprobs(tokenizer, logprobs: Sequence["TokenLogprob"]) -> dict[str, Any]:
    """`logprobs` of the chat route."""

    def entry(token: int, logprob: float) -> dict[str, Any]:
        text = decode(tokenizer, [token])
        code = None if INCOMPLETE in text else list(text.encode())
        return {"token": text, "logprob": finite(logprob), "bytes": code}

    content = [
        entry(known.token, known.logprob) | {"top_logprobs": [entry(*pair) for pair in known.top]}
        for known in logprobs
    ]
    return {"content": content, "refusal": None}
