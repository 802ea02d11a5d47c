"""The engine's thread: it alone touches the model. Others hand it jobs and take their progress."""

import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedModel

from sememe.engine.holding import measured_policy
from sememe.engine.requests import Iteration, Job, Progress, Request, TokenLogprob
from sememe.engine.scheduler import Scheduler
from sememe.engine.text import TextStream
from sememe.errors import DataError, SememeError
from sememe.models import OnlineForCausalLM
from sememe.models.loading import check_rate, longest_text
from sememe.models.stepping import slot_bytes

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


class Engine:
    """Requests in, their progress out, in a thread of its own.

    Args:
        model: an online model, a control or a base, in eval mode.
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
        chunk: int = 128,
        cache_bytes: int | None = None,
        hold: bool = True,
    ):
        self.model = model
        self.tokenizer = tokenizer
        self.max_waiting = max_rows + max_queue
        limit = float("inf") if cache_bytes is None else cache_bytes
        holds = hold and isinstance(model, OnlineForCausalLM)
        policy = measured_policy(model) if holds else None
        self.scheduler = Scheduler(model, max_rows, chunk, limit, policy)
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

    def submit(self, request: Request, sink: Callable[[Progress], None]) -> Job:
        """`sink` is called in the engine's thread, as often as there is something new, the last
        time with `finish`.

        Raises:
            DataError, SememeError: a request that the model cannot serve.
            QueueFull: too many are waiting."""
        check_request(self.model, request)

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
        """Tokens that a prompt and what is written may have together."""
        return longest_text(self.model.config, bos=False)

    def bytes_at(self, tokens: int, concepts: int) -> tuple[int, int]:
        """Bytes of keys and values of a text of so many tokens and concepts, in this model and in
        its base."""
        layers = self.model.config.get_text_config().num_hidden_layers
        own = self.scheduler.rows.bytes_at(tokens, concepts)
        return own, tokens * layers * slot_bytes(self.model)

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
            stream = TextStream(self.tokenizer, request.prompt, stops)
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
        return Request(self.tokenizer(text).input_ids, **({"ends": self.ends} | settings))

    # ---- the engine's thread ----

    def _run(self) -> None:
        scheduler = self.scheduler
        while True:
            # Waits for a job where there is nothing else to do.
            wait = scheduler.idle and not self.stopping
            try:
                while (job := self.incoming.get(block=wait)) is not None:
                    scheduler.add(job)
                    wait = False
            except queue.Empty:
                pass
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
    if progress.finish is not None and not stream.stopped:
        answer.text += stream.end()
        answer.finish = progress.finish
    if stream.stopped:
        answer.finish = "stop"


def check_request(model: PreTrainedModel, request: Request) -> None:
    """Raises DataError for a prompt that is empty, of tokens that are none, or too long, or for a
    bias of such tokens: one bad row would end those of all others.
    RecipeError or CheckpointError for a rate that cannot be had."""
    vocabulary = model.get_input_embeddings().num_embeddings
    if not request.prompt or not all(0 <= token < vocabulary for token in request.prompt):
        raise DataError(
            f"the prompt has {len(request.prompt)} tokens: need at least one, each from 0 to "
            f"{vocabulary - 1}. try: the model's own tokenizer"
        )
    if not all(0 <= token < vocabulary for token in request.sampling.logit_bias):
        raise DataError(
            f"logit_bias names a token that is none: need ids from 0 to {vocabulary - 1}. "
            "try: the model's own tokenizer"
        )
    if not 0 <= (request.logprobs or 0) <= vocabulary:
        raise DataError(
            f"got logprobs of {request.logprobs} tokens: need at most {vocabulary}. try: fewer"
        )
    longest = longest_text(model.config, bos=False)
    if len(request.prompt) + request.max_tokens > longest:
        raise DataError(
            f"the prompt has {len(request.prompt)} tokens and {request.max_tokens} are to be "
            f"written: need at most {longest} together. try: a shorter prompt, or fewer max_tokens"
        )
    if request.rate is not None:
        check_rate(model.config, request.rate, "the model")
