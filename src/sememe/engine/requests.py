"""What is wanted of an engine, and what it gives, a step at a time."""

import itertools
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

MAX_SEED = 2**63 - 1


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
    finish: str | None = None
    """`stop`, `length`, `cancelled` or `error`; None while it goes on."""
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
    """`prefill` and `decode`, those that took place."""
    middle_rows: int = 0
    """Rows that the middle layers ran for in this step."""


NUMBERS = itertools.count()


@dataclass(eq=False)
class Job:
    """A request on its way. `sink` is called in the engine's thread."""

    request: Request
    sink: Callable[[Progress], None]
    number: int = field(default_factory=NUMBERS.__next__)
    cancelled: bool = False
