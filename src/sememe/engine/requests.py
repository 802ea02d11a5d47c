"""What is wanted of an engine, and what it gives, a step at a time."""

import itertools
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sememe.errors import SememeError

MAX_SEED = 2**63 - 1


class Unserved(SememeError):
    """A field of a request that the model cannot do what it says with.

    Args:
        name: of the field."""

    def __init__(self, name: str, message: str):
        super().__init__(message)
        self.name = name


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. Draws depend on the seed and the place in the text alone."""

    temperature: float = 0.0
    """0 is greedy."""
    top_p: float = 1.0
    """The likeliest tokens that together have this probability."""
    top_k: int = 0
    """The k likeliest tokens; 0 for all."""
    seed: int = field(default_factory=lambda: secrets.randbelow(MAX_SEED))
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Added to the logits of these tokens."""
    presence_penalty: float = 0.0
    """Taken off the logit of a token that was written already."""
    frequency_penalty: float = 0.0
    """The same for each time that it was."""


GREEDY = Sampling(seed=0)


@dataclass(frozen=True)
class Request:
    """A text to go on from."""

    prompt: Sequence[int]
    """Token ids, at least one."""
    max_tokens: int = 16
    sampling: Sampling = GREEDY
    ends: frozenset[int] = frozenset()
    """Tokens that end the text; they are not given out."""
    logprobs: int | None = None
    """Log-probabilities of each new token and of so many likeliest ones beside it; None for
    none."""
    echo: bool = False
    """Those of the prompt's tokens too."""
    rate: float | None = None
    """Concepts per token; None: as the model was trained."""
    plan: Sequence[Sequence[int]] | None = None
    """Of a planner: ids of each type that the text is written from; None: the planner's own."""
    budget: Sequence[int] | None = None
    """Of a planner: concepts of each type at most, a number for each or one for all."""


@dataclass(frozen=True)
class TokenLogprob:
    """Of one token, in nats, before temperature and filters."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    """The likeliest tokens, the likeliest first."""


@dataclass
class Progress:
    """What a request has come to since the last time."""

    tokens: list[int] = field(default_factory=list)
    """New ones."""
    concept_ids: list[int] = field(default_factory=list)
    """Of each token that was read since, prompt first; NULL -1, the sink -2. The last token that a
    request writes is never read."""
    logprobs: list[TokenLogprob | None] = field(default_factory=list)
    """Of each new token, if they were asked for, and of the token that ends the text; before them,
    with `echo`, those of the prompt, of which the first has none."""
    read: int = 0
    """Tokens that were read, where `concept_ids` does not say it."""
    concepts: int = 0
    """And the concepts that were written."""
    written: int = 0
    """And new tokens, where `tokens` does not say them."""
    result: Any = None
    """A plan, as ids of each type, or what a work has come to."""
    finish: str | None = None
    """`stop`, `length`, `cancelled`, `refused` (a fault of the request) or `error`; None while it
    goes on."""
    error: str | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    """At the start, when nothing else is known yet: `queue`; at the end `prefill` and `decode`
    too."""


@dataclass(frozen=True)
class Iteration:
    """What the engine has done in one iteration, and how full it is after it."""

    rows: int
    waiting: int
    cache_bytes: dict[str, int]
    """Of all rows, by slice."""
    seconds: dict[str, float]
    """`prefill` and `decode`, or `work`, those that took place."""
    middle_rows: int = 0
    """Rows that the middle layers ran for in this step."""


NUMBERS = itertools.count()


@dataclass(eq=False)
class Job:
    """A request, or a work (`works.py`), on its way. `sink` is called in the engine's thread."""

    request: Any
    sink: Callable[[Progress], None]
    number: int = field(default_factory=NUMBERS.__next__)
    cancelled: bool = False
