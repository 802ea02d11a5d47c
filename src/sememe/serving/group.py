"""The engine's requests that one HTTP request is made of, and what they come to, piece by piece."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from sememe.errors import SememeError
from sememe.serving.errors import ApiError, bad, internal
from sememe.serving.service import Service

if TYPE_CHECKING:
    from sememe.engine import Job, Progress, Request, TextStream, TokenLogprob

log = logging.getLogger("sememe.serving")


@dataclass(eq=False)
class Choice:
    """One of the texts that are written."""

    index: int
    request: "Request"
    stream: "TextStream"
    job: "Job | None" = None
    text: str = ""
    tokens: list[int] = field(default_factory=list)
    concept_ids: list[int] = field(default_factory=list)
    logprobs: list["TokenLogprob | None"] = field(default_factory=list)
    read: int = 0  # tokens
    concepts: int = 0
    written: int = 0  # tokens
    result: Any = None
    finish: str | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    started: bool = False
    last: float | None = None  # when the last token came
    over: bool = False  # the engine has no part in it any more


@dataclass
class Piece:
    """What is new of a choice."""

    choice: Choice
    text: str = ""
    logprobs: list["TokenLogprob | None"] = field(default_factory=list)
    place: int = 0
    """In the text, of the token that the first of the concept ids belongs to."""
    concept_ids: list[int] = field(default_factory=list)
    result: Any = None
    finish: str | None = None


class Group:
    """Use `events` once, and `close` whatever happens.

    Args:
        release: gives one place of the service back; called once for each request.
        stops: strings that end a text."""

    def __init__(
        self,
        service: Service,
        requests: Sequence["Request"],
        release: Callable[[], None],
        stops: Sequence[str] = (),
    ):
        self.service = service
        self.loop = asyncio.get_running_loop()
        self.begin = self.loop.time()
        self.release = release
        self.arrived: asyncio.Queue[tuple[Choice, Progress]] = asyncio.Queue()
        self.choices = [
            Choice(index, request, service.engine.stream(request, stops))
            for index, request in enumerate(requests)
        ]
        self.reason: ApiError | None = None
        service.groups.add(self)

    # ---- between the threads ----

    def submit(self) -> None:
        """Hands all of them to the engine, or none: what it refuses is an ApiError."""
        for choice in self.choices:
            try:
                choice.job = self.service.engine.submit(choice.request, self._sink(choice))
            except SememeError as error:
                for other in self.choices[choice.index :]:
                    other.over = True
                    self.release()
                self.close()
                raise refusal(error) from error

    def _sink(self, choice: Choice) -> Callable[["Progress"], None]:
        def sink(progress: "Progress") -> None:
            # Called in the engine's thread, which a closed event loop must not stop.
            if not self.loop.is_closed():
                self.loop.call_soon_threadsafe(self._take_in, choice, progress)

        return sink

    def _take_in(self, choice: Choice, progress: "Progress") -> None:
        """A place is free when the engine says so, whether or not somebody still listens."""
        if progress.finish is not None:
            choice.over = True
            self.release()
        self.arrived.put_nowait((choice, progress))

    def cancel(self, reason: ApiError | None = None) -> None:
        """Their rows are free within a step. `reason`: what the client is told."""
        self.reason = self.reason or reason
        for choice in self.choices:
            if choice.job is not None and not choice.over:
                self.service.engine.cancel(choice.job)

    def close(self) -> None:
        """Ends what still runs."""
        self.cancel()
        self.service.groups.discard(self)

    # ---- what comes of them ----

    async def events(self) -> AsyncIterator[Piece | None]:
        """Pieces as they come; None where nothing has for a while.

        Raises:
            ApiError: it is over for another reason than the text's end."""
        waiting = len(self.choices)
        while waiting:
            message = await self._next()
            if message is None:
                yield None
                continue
            choice, progress = message
            piece = self._piece(choice, progress)
            waiting -= progress.finish is not None
            if piece is not None:
                yield piece
        self.service.metrics.whole.observe(self.loop.time() - self.begin)

    @property
    def started(self) -> bool:
        """Whether none of them waits for a row."""
        return all(choice.started or choice.over for choice in self.choices)

    async def finish(self) -> None:
        """Waits until all is through. Raises as `events` does."""
        async for _ in self.events():
            pass
        self.close()

    async def _next(self) -> tuple[Choice, "Progress"] | None:
        quiet = self.loop.time() + self.service.settings.keepalive
        while True:
            end = min(quiet, self._last_moment())
            try:
                async with asyncio.timeout_at(end):
                    return await self.arrived.get()
            except TimeoutError:
                if end == quiet:
                    return None

    def _last_moment(self) -> float:
        """When it is over unless something comes. Raises ApiError where it is over already."""
        settings, now = self.service.settings, self.loop.time()
        end = self.begin + settings.deadline
        if end <= now:
            raise self._end(deadline(settings.deadline))
        if self.started:
            return end
        queued = self.begin + settings.queue_timeout
        if queued <= now and self.arrived.empty():
            raise self._end(queue_timeout(settings.queue_timeout))
        return min(end, queued)

    def _end(self, reason: ApiError) -> ApiError:
        self.cancel(reason)
        return reason

    def _piece(self, choice: Choice, progress: "Progress") -> Piece | None:
        """Adds what is new to the choice."""
        self._times(choice, progress)
        choice.seconds |= progress.seconds
        if choice.finish is not None:  # stopped by a string; the rest says nothing
            return None
        piece = Piece(choice, place=len(choice.concept_ids))
        piece.concept_ids, piece.logprobs = progress.concept_ids, progress.logprobs
        piece.result = progress.result
        if progress.result is not None:
            choice.result = progress.result
        choice.concept_ids += progress.concept_ids
        choice.logprobs += progress.logprobs
        choice.tokens += progress.tokens
        self._count(choice, progress)
        piece.text = choice.stream.add(progress.tokens)
        if progress.finish in ("stop", "length") and not choice.stream.stopped:
            piece.text += choice.stream.end()
        elif progress.finish is not None and not choice.stream.stopped:
            raise self._end(self._fault(progress))
        if choice.stream.stopped:
            choice.finish = "stop"
            if progress.finish is None:
                self.service.engine.cancel(choice.job)
        else:
            choice.finish = progress.finish
        choice.text += piece.text
        piece.finish = choice.finish
        new = progress.tokens or progress.concept_ids or progress.result is not None
        return piece if new or piece.finish else None

    def _fault(self, progress: "Progress") -> ApiError:
        """Why the engine has ended it."""
        if progress.finish == "cancelled":
            return self.reason or gone()
        if progress.finish == "refused":
            return bad(None, progress.error, "invalid_request")
        # The sentence may hold a path of this machine: it is for the log.
        log.error("the engine: %s", progress.error)
        return internal()

    def _times(self, choice: Choice, progress: "Progress") -> None:
        metrics, now = self.service.metrics, self.loop.time()
        if not choice.started and progress.finish != "cancelled":
            choice.started = True
            metrics.queued.observe(progress.seconds.get("queue", 0.0))
            if choice.index % self.per_prompt == 0:
                metrics.prompt_tokens.inc(len(choice.request.prompt))
        if progress.tokens and choice.finish is None:
            if choice.last is None:
                metrics.first_token.observe(now - self.begin)
            else:
                metrics.gap.observe(now - choice.last)
            choice.last = now

    per_prompt = 1
    """Choices that share a prompt."""

    def _count(self, choice: Choice, progress: "Progress") -> None:
        metrics = self.service.metrics
        read = len(progress.concept_ids) + progress.read
        concepts = sum(concept != -1 for concept in progress.concept_ids) + progress.concepts
        written = len(progress.tokens) + progress.written
        choice.read += read
        choice.concepts += concepts
        choice.written += written
        metrics.generation_tokens.inc(written)
        metrics.reading(read, concepts)

    # ---- of all of them, at the end ----

    def totals(self) -> dict[str, Any]:
        return {"usage": self.usage(), "sememe": self.sememe()}

    def usage(self) -> dict[str, int]:
        prompt = sum(len(x.request.prompt) for x in self.choices[:: self.per_prompt])
        new = sum(x.written for x in self.choices)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": new,
            "total_tokens": prompt + new,
        }

    def sememe(self) -> dict[str, Any]:
        """What stands beside `usage`. Times are those of the slowest."""
        tokens, concepts = (sum(getattr(x, n) for x in self.choices) for n in ("read", "concepts"))
        fields: dict[str, Any] = {"concepts": concepts, "rate": concepts / max(1, tokens)}
        sizes = [self.service.engine.bytes_at(x.read, x.concepts) for x in self.choices]
        if None not in sizes:
            fields["cache_bytes"], fields["base_cache_bytes"] = map(sum, zip(*sizes, strict=True))
        for name in ("queue", "prefill", "decode"):
            fields[f"{name}_s"] = max(x.seconds.get(name, 0.0) for x in self.choices)
        return fields


def refusal(error: SememeError) -> ApiError:
    """What the engine does not take."""
    from sememe.engine import EngineStopped, QueueFull

    if isinstance(error, QueueFull):
        return ApiError(429, "queue_full", str(error), retry=1)
    if isinstance(error, EngineStopped):
        return ApiError(503, "engine_stopped", str(error), retry=5)
    name = getattr(error, "name", None)
    return bad(name, str(error).replace("--rate", "sememe.rate"), "invalid_request")


def deadline(seconds: float) -> ApiError:
    return ApiError(
        504,
        "deadline",
        f"the answer took longer than {seconds:g} s: need a shorter one. try: fewer max_tokens",
    )


def queue_timeout(seconds: float) -> ApiError:
    return ApiError(
        503,
        "queue_timeout",
        f"no row was free for {seconds:g} s: need a less busy server. try: again later",
        retry=5,
    )


def gone() -> ApiError:
    return ApiError(408, "client_gone", "the client has gone: need one that waits. try: again")
