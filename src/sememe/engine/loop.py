"""The engine's thread: it alone touches the model. Others hand it jobs and take their progress."""

import queue
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedModel

from sememe.engine.coding import CompressorWorks
from sememe.engine.holding import measured_policy
from sememe.engine.requests import Iteration, Job, Progress, Request, TokenLogprob
from sememe.engine.scheduler import Scheduler
from sememe.engine.text import TextStream
from sememe.engine.works import PlannerWorks
from sememe.errors import SememeError
from sememe.models import OnlineForCausalLM

WORKS = {"planner": PlannerWorks, "compressor": CompressorWorks}
"""By system, of those whose requests do not share steps."""
FAILURES = 3  # in a row, after which the engine gives up


class QueueFull(SememeError):
    """So many requests wait already."""


class EngineStopped(SememeError):
    """Nothing is worked on any more."""


@dataclass
class Answer:
    """What came of a request."""

    text: str
    tokens: list[int] = field(default_factory=list)
    concept_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob | None] = field(default_factory=list)
    finish: str = "length"
    plan: Any = None


class Engine:
    """Requests in, their progress out, in a thread of its own.

    Args:
        model: of any system, in eval mode. A compressor takes works of `coding.py`, the others
            a `Request`; those of a planner and a compressor are done one after another.
        max_rows: requests that run at the same time.
        max_queue: requests that wait beside them.
        chunk: tokens of prompts that are read between two steps of the others.
        cache_bytes: of all rows together at most; None: no limit.
        hold: whether rows that write a concept wait for each other where that pays."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any,
        *,
        max_rows: int = 16,
        max_queue: int = 64,
        chunk: int = 512,
        cache_bytes: int | None = None,
        hold: bool = True,
    ):
        self.model = model
        self.tokenizer = tokenizer
        self.max_waiting = max_rows + max_queue
        limit = float("inf") if cache_bytes is None else cache_bytes
        holds = hold and max_rows > 1 and isinstance(model, OnlineForCausalLM)
        policy = measured_policy(model) if holds else None
        kind = WORKS.get(getattr(model.config, "system", None), Scheduler)
        self.scheduler = kind(model, max_rows, chunk, limit, policy)
        self.scheduler.take_in = self._take_in
        self.incoming: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self.pending = 0
        self.lock = threading.Lock()
        self.failures = 0
        self.stopping = self.stopped = False
        self.thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self.thread.start()

    # ---- from any thread ----

    @property
    def alive(self) -> bool:
        """Whether requests are still worked on."""
        return self.thread.is_alive() and not self.stopped

    def submit(self, request: Any, sink: Callable[[Progress], None]) -> Job:
        """`sink` is called in the engine's thread, as often as there is something new, the last
        time with `finish`.

        Raises:
            DataError, SememeError: a request that the model cannot serve.
            QueueFull: too many are waiting."""
        self.scheduler.check(request)

        def ended(progress: Progress) -> None:
            if progress.finish is not None:
                with self.lock:
                    self.pending -= 1
            sink(progress)

        job = Job(request, ended)
        with self.lock:
            if not self.alive:
                raise EngineStopped(
                    f"the engine has stopped after {FAILURES} faults in a row: need a new one. "
                    "try: start it again, and read its log"
                )
            if self.pending >= self.max_waiting:
                raise QueueFull(
                    f"{self.pending} requests are running or waiting: need a place among "
                    f"{self.max_waiting}. try: the same again in a moment"
                )
            self.pending += 1
            self.incoming.put(job)
        return job

    def observe(self, on_iteration: Callable[[Iteration], None]) -> None:
        """`on_iteration` is called in the engine's thread after each iteration."""
        self.scheduler.on_iteration = on_iteration

    @property
    def ends(self) -> frozenset[int]:
        """Tokens that end a text of this model."""
        ends = self.model.generation_config.eos_token_id
        return frozenset([ends] if isinstance(ends, int) else ends or ())

    @property
    def longest(self) -> int:
        """Tokens that a prompt and what is written may have together, or of a planner each."""
        return self.scheduler.longest

    def bytes_at(self, tokens: int, concepts: int) -> tuple[int, int] | None:
        """Bytes of keys and values of a text of so many tokens and concepts, in this model and in
        its base; None where nothing is kept."""
        return self.scheduler.bytes_at(tokens, concepts)

    def tokens(self, text: str) -> list[int]:
        """Of a prompt. A planner begins every source itself."""
        options = {} if self.scheduler.continues else {"add_special_tokens": False}
        return self.tokenizer(text, **options).input_ids

    def stream(self, request: Any, stops: Sequence[str] = ()) -> TextStream:
        """The text of a request's new tokens."""
        before = request.prompt if self.scheduler.continues else ()
        return TextStream(self.tokenizer, before, stops)

    def cancel(self, job: Job) -> None:
        """Its row is free within a step; `sink` still gets a last call."""
        job.cancelled = True

    def close(self) -> None:
        """Finishes what runs, and ends the thread."""
        self.stopping = True
        self.incoming.put(None)
        self.thread.join()

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *error) -> None:
        self.close()

    def generate(
        self, prompts: Sequence[str | Request], stops: Sequence[str] = (), **settings: Any
    ) -> list[Answer]:
        """Answers to all of them, in their order. `settings`: those of a `Request`, for prompts
        that are text."""
        answers = [Answer("") for _ in prompts]
        waiting = threading.Semaphore(0)
        slots = threading.Semaphore(self.max_waiting)
        for prompt, answer in zip(prompts, answers, strict=True):
            slots.acquire()
            request = prompt if isinstance(prompt, Request) else self._request(prompt, settings)
            stream = self.stream(request, stops)
            jobs: list[Job] = []

            def sink(progress, answer=answer, stream=stream, jobs=jobs) -> None:
                collect(answer, stream, progress)
                if stream.stopped:
                    for job in jobs:
                        job.cancelled = True
                if progress.finish is not None:
                    slots.release()
                    waiting.release()

            jobs.append(self.submit(request, sink))
        for _ in prompts:
            waiting.acquire()
        return answers

    def _request(self, text: str, settings: dict[str, Any]) -> Request:
        return Request(self.tokens(text), **({"ends": self.ends} | settings))

    # ---- the engine's thread ----

    def _run(self) -> None:
        scheduler = self.scheduler
        while True:
            # Waits for a job where there is nothing else to do.
            self._take_in(wait=scheduler.idle and not self.stopping)
            if scheduler.idle:
                if self.stopping:
                    return
                continue
            try:
                scheduler.iterate()
                self.failures = 0
            except Exception as error:  # whatever it is: those under way end, the others go on
                self.failures += 1
                scheduler.fail(f"{type(error).__name__}: {error}")
                if self.failures >= FAILURES:
                    self._give_up()
                    return

    def _take_in(self, wait: bool = False) -> None:
        with suppress(queue.Empty):
            while (job := self.incoming.get(block=wait)) is not None:
                self.scheduler.add(job)
                wait = False

    def _give_up(self) -> None:
        """Answers to all that still wait; `submit` takes no more."""
        with self.lock:
            self.stopped = True
        jobs = [job for job, _ in self.scheduler.queue]
        while not self.incoming.empty():
            jobs.append(self.incoming.get())
        for job in filter(None, jobs):
            job.sink(Progress(finish="error", error="the engine has stopped"))


def collect(answer: Answer, stream: TextStream, progress: Progress) -> None:
    """Adds to the answer what is new."""
    if stream.stopped:
        answer.finish = "stop"
        return
    answer.text += stream.add(progress.tokens)
    answer.tokens += progress.tokens
    answer.concept_ids += progress.concept_ids
    answer.logprobs += progress.logprobs
    answer.plan = answer.plan or progress.result
    if progress.finish is not None and not stream.stopped:
        answer.text += stream.end()
        answer.finish = progress.finish
    if stream.stopped:
        answer.finish = "stop"
