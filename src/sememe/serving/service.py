"""The model behind the routes: its engine, who may come in, and what is counted."""

import asyncio
import logging
import secrets
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from sememe.serving.errors import ApiError, bad
from sememe.serving.metrics import Metrics
from sememe.serving.protocol import Sampled
from sememe.serving.settings import Settings

if TYPE_CHECKING:
    from sememe.engine import Engine, Request
    from sememe.serving.group import Group

log = logging.getLogger("sememe.serving")

TEXT = ("text", "nll")
SERVES = {"compressor": ("codes",), "planner": ("text",)}
"""What models of a system can be asked for; all others: TEXT."""
ROUTES = {"text": "completions or chat", "codes": "the routes compress and decompress"}
TINY = 1e-6  # a smaller temperature is greedy: logits over it overflow


class Service:
    """Used in the event loop's thread alone. `engine` is None while the model is loaded.

    Args:
        name: what clients call the model."""

    def __init__(self, settings: Settings, name: str):
        self.settings = settings
        self.name = name
        self.metrics = Metrics()
        self.created = int(time.time())
        self.facts: dict[str, Any] = {}
        self.engine: Engine | None = None
        self.draining = False
        self.used = 0
        """Places of requests that run, wait, or are about to."""
        self.groups: set[Group] = set()
        # One thread: a long text does not stop the event loop, and several do not share a core.
        self.reader = ThreadPoolExecutor(1, "tokenise")

    def start(self, engine: "Engine") -> None:
        """Requests are served from now on."""
        from sememe.engine import describe

        self.facts = describe(engine)
        engine.observe(self.metrics.iteration)
        self.engine = engine

    def close(self) -> None:
        self.reader.shutdown(cancel_futures=True)
        if self.engine is not None:
            self.engine.close()

    # ---- who may come in ----

    @property
    def fault(self) -> tuple[str, str] | None:
        """Why nothing is served at the moment, as code and sentence."""
        if self.draining:
            return "shutting_down", "the server is shutting down: need another one. try: later"
        if self.engine is None:
            return "loading", "the model is being loaded: need some seconds. try: again in a moment"
        if not self.engine.alive:
            return "engine_stopped", "the engine has stopped: need a new start. try: read its log"
        return None

    def check(self, model: str | None, wanted: str = "text") -> None:
        """Raises ApiError, 503, 404 or 400, for a request that cannot be served at all. `wanted`:
        `text` that is written, `nll` of one that is read, or `codes`."""
        if self.fault is not None:
            raise ApiError(503, *self.fault, retry=5)
        self.check_name(model)
        system = self.facts["system"]
        if wanted not in SERVES.get(system, TEXT):
            kind = "a base" if system == "base" else f"of system {system}"
            raise bad(
                "model",
                f"the model is {kind}, which does not serve this route: need another model. try: "
                f"{ROUTES[SERVES.get(system, TEXT)[0]]}",
                "wrong_system",
            )

    def check_name(self, model: str | None) -> None:
        """Raises ApiError, 404."""
        if model is not None and model != self.name:
            raise ApiError(
                404,
                "model_not_found",
                f"there is no such model: need {self.name}. try: model={self.name}",
                "model",
            )

    @contextmanager
    def reserve(self, count: int) -> Iterator[Callable[[], None]]:
        """Takes places for the group that is made inside; what it yields gives one back. Before
        anything is worked out, so that a refusal costs nothing; where no group comes of it all of
        them are free again.

        Raises:
            ApiError: 429; or 400 for more than there are at all."""
        capacity = self.settings.capacity
        if count > capacity:
            raise bad(
                "n",
                f"got {count} texts to write in one request: need at most {capacity}. try: several "
                "requests",
            )
        if self.used + count > capacity:
            raise ApiError(
                429,
                "queue_full",
                f"{self.used} of {capacity} places are taken: need {count}. try: again in a moment",
                retry=1,
            )
        self.used += count
        try:
            yield self._release
        except BaseException:
            self.used -= count
            raise

    def _release(self) -> None:
        self.used -= 1

    # ---- what the engine is handed ----

    async def tokenise(self, function: Callable[..., list[int]], *args: Any) -> list[int]:
        """Runs it beside the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self.reader, function, *args)

    def tokens(self, text: str) -> list[int]:
        return self.engine.tokens(text)

    def requests(self, sent: Sampled, prompt: list[int], **own: Any) -> list["Request"]:
        """One for each choice, with seeds of their own: the first one's is the client's."""
        from sememe.engine import Request, Sampling

        bias = {int(key): value for key, value in (sent.logit_bias or {}).items()}
        temperature = 1.0 if sent.temperature is None else sent.temperature
        values = {
            "temperature": temperature if temperature >= TINY else 0.0,
            "top_p": 1.0 if sent.top_p is None else sent.top_p,
            "top_k": max(0, sent.top_k or 0),
            "logit_bias": bias,
            "presence_penalty": sent.presence_penalty or 0.0,
            "frequency_penalty": sent.frequency_penalty or 0.0,
        }
        seed = secrets.randbits(64) if sent.seed is None else sent.seed % 2**64
        own["ends"] = self.engine.ends
        own |= {name: getattr(sent.sememe, name, None) for name in ("rate", "plan", "budget")}
        # The second word of the key: choices of one request never share draws.
        seeds = [seed + (number << 64) for number in range(sent.choices)]
        return [Request(prompt, sampling=Sampling(seed=seed, **values), **own) for seed in seeds]
