"""Which request is read or goes on next: rows of one model, and the jobs that wait for one.

An iteration takes one step of all rows that run and reads one chunk of the prompts that are
joining, so neither starves the other. Jobs come in order; one is let in when a row is free and the
cache that it can come to at most fits, so none has to be thrown out again."""

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sememe.engine.checks import check_request
from sememe.engine.holding import Policy
from sememe.engine.requests import Iteration, Job, Progress, Request, TokenLogprob
from sememe.engine.sampling import choose, logprobs
from sememe.models.loading import longest_text
from sememe.models.stepping import NULL, rows_of, slot_bytes


@dataclass(eq=False)
class Running:
    """A job that has a row, or reads its prompt for one."""

    job: Job
    bytes: int
    since: float
    seconds: dict[str, float] = field(default_factory=dict)
    new: list[int] = field(default_factory=list)

    @property
    def next(self) -> int:
        """The token that its row reads in the next step."""
        return self.new[-1]

    def clock(self, name: str) -> None:
        """Counts the time since the last call as that of `name`."""
        now = time.perf_counter()
        self.seconds[name], self.since = now - self.since, now


@dataclass(eq=False)
class Joining:
    """Prompts that are read together, in a cache of their own. `groups`: those who go on from each
    of them; choices of one request read theirs once."""

    groups: list[list[Running]]
    cache: object = None
    done: int = 0
    last_11D: Tensor | None = None  # of a prompt whose tokens' probabilities are wanted

    @property
    def members(self) -> list[Running]:
        return [member for group in self.groups for member in group]

    @property
    def requests(self) -> list[Request]:
        """One of each prompt."""
        return [group[0].job.request for group in self.groups]


class Scheduler:
    """Not for several threads.

    Args:
        max_rows: that run at the same time.
        chunk: tokens of prompts that are read between two steps.
        cache_bytes: of all rows together at most.
        policy: which rows that write a concept wait for each other; None: none do."""

    def __init__(
        self,
        model: PreTrainedModel,
        max_rows: int,
        chunk: int,
        cache_bytes: float,
        policy: Policy | None = None,
    ):
        self.model = model
        self.max_rows = max_rows
        self.chunk = chunk
        self.cache_bytes = cache_bytes
        self.policy = policy
        self.queue: deque[tuple[Job, float]] = deque()
        self.on_iteration: Callable[[Iteration], None] | None = None
        self.take_in: Callable[[], None] = lambda: None  # adds the jobs that have come since
        self.reset()

    def reset(self) -> None:
        """Forgets all rows."""
        self.rows = rows_of(self.model)
        self.running: list[Running] = []
        self.joining: Joining | None = None
        self.calm = True  # no chunk was read since the last step

    # ---- what it can serve ----

    continues = True
    """Whether what is written goes on from the prompt."""

    @property
    def longest(self) -> int:
        """Tokens that a prompt and what is written may have together."""
        return longest_text(self.model.config, bos=False)

    def check(self, request: Request) -> None:
        """Raises SememeError for what the model cannot serve: one bad row would end those of all
        others."""
        check_request(self.model, request)

    def bytes_at(self, tokens: int, concepts: int) -> tuple[int, int] | None:
        """As `Engine.bytes_at`."""
        layers = self.model.config.get_text_config().num_hidden_layers
        own = self.rows.bytes_at(tokens, concepts)
        return own, tokens * layers * slot_bytes(self.model)

    def slice_bytes(self) -> dict[str, int]:
        """Bytes of all rows, by slice."""
        return self.rows.slice_bytes()

    # ---- from the engine's loop ----

    @property
    def active(self) -> list[Running]:
        """Jobs with a row, or reading."""
        return self.running + (self.joining.members if self.joining else [])

    @property
    def idle(self) -> bool:
        return not (self.queue or self.active)

    def add(self, job: Job) -> None:
        self.queue.append((job, time.perf_counter()))

    @torch.inference_mode()
    def iterate(self) -> None:
        """A chunk of prompts, and a step."""
        self._drop_cancelled()
        seconds, middle_rows = self._advance()
        if self.on_iteration is not None:
            sizes = self.slice_bytes()
            self.on_iteration(
                Iteration(len(self.active), len(self.queue), sizes, seconds, middle_rows)
            )

    def _advance(self) -> tuple[dict[str, float], int]:
        """Returns the seconds of what was done, and how many rows have written a concept."""
        if self.joining is None:
            self._admit()
        seconds, middle_rows, start = {}, 0, time.perf_counter()
        # The step comes first: rows that wait for others would wait for a chunk too.
        if self.running:
            middle_rows = self._step()
            seconds["decode"] = time.perf_counter() - start
        self.calm = self.joining is None
        if self.joining is not None:
            start = time.perf_counter()
            self._read()
            seconds["prefill"] = time.perf_counter() - start
        return seconds, middle_rows

    # ---- jobs come and go ----

    def _drop_waiting(self) -> None:
        for job, since in [pair for pair in self.queue if pair[0].cancelled]:
            self.queue.remove((job, since))
            job.sink(Progress(finish="cancelled"))

    def _drop_cancelled(self) -> None:
        self._drop_waiting()
        for member in [x for x in self.running if x.job.cancelled]:
            self._leave(member, "cancelled")
        # Of those that read together one goes when all are through: the others of its cache go on.
        if self.joining is not None and all(x.job.cancelled for x in self.joining.members):
            joining, self.joining = self.joining, None
            for member in joining.members:
                self._finish(member, "cancelled", Progress())

    def _admit(self) -> None:
        """The next jobs: a long prompt alone, or several that fit a chunk together."""
        groups: list[list[Running]] = []
        members, longest = [], 0
        while self.queue and len(self.running) + len(members) < self.max_rows:
            job, since = self.queue[0]
            request = job.request
            same = bool(groups) and same_reading(request, members[-1].job.request)
            length = max(longest, len(request.prompt))
            full = length * (len(groups) + 1) > self.chunk or request.echo
            if groups and not same and (full or members[-1].job.request.echo):
                break
            size = self.rows.bytes_of(len(request.prompt) + request.max_tokens, request.rate)
            used = sum(x.bytes for x in self.running + members)
            if used + size > self.cache_bytes and self.running + members:
                break
            self.queue.popleft()
            members.append(Running(job, size, since))
            members[-1].clock("queue")
            job.sink(Progress(seconds=dict(members[-1].seconds)))
            longest = length
            if same:
                groups[-1].append(members[-1])
            else:
                groups.append([members[-1]])
        if groups:
            # Known as joining first: should there be no memory for the cache, `fail` ends them.
            self.joining = Joining(groups)
            self.joining.cache = self.rows.start([x.rate for x in self.joining.requests])

    def _leave(self, member: Running, finish: str, progress: Progress | None = None) -> None:
        """Ends a job that has a row; the last row takes its place."""
        row = self.running.index(member)
        self.rows.leave(row)
        self.running[row] = self.running[-1]
        self.running.pop()
        self._finish(member, finish, progress or Progress())

    @staticmethod
    def _finish(member: Running, finish: str, progress: Progress) -> None:
        member.clock("decode")
        progress.finish, progress.seconds = finish, member.seconds
        member.job.sink(progress)

    def fail(self, error: str) -> None:
        """Ends all jobs that are under way."""
        active = self.active
        self.reset()
        for member in active:
            self._finish(member, "error", Progress(error=error))

    # ---- the model ----

    def _read(self) -> None:
        """The next chunk of the prompts that are joining; after the last one they have rows."""
        joining, requests = self.joining, self.joining.requests
        prompts = [x.prompt for x in requests]
        part = slice(joining.done, joining.done + self.chunk)
        texts = prompts if len(prompts) > 1 else [prompts[0][part]]
        d_BTD, concept_ids = self.rows.read(joining.cache, texts)
        joining.done += d_BTD.shape[1]
        known = self._echo(joining, texts[0], d_BTD) if requests[0].echo else []
        counts = [len(group) for group in joining.groups]
        progress = [
            Progress(concept_ids=list(ids), logprobs=list(known))
            for ids, count in zip(concept_ids, counts, strict=True)
            for _ in range(count)
        ]
        if joining.done < max(map(len, prompts)):
            for member, new in zip(joining.members, progress, strict=True):
                member.job.sink(new)
            return
        # Only then no longer joining: should it fail, `fail` ends them.
        self.rows.join(joining.cache, counts)
        self.joining = None
        self.running += joining.members
        for member in joining.members:
            member.clock("prefill")
        last_BD = d_BTD[:, -1].repeat_interleave(torch.tensor(counts, device=d_BTD.device), 0)
        self._write(joining.members, self.rows.logits(last_BD), progress)

    def _echo(self, joining: Joining, text: Sequence[int], d_1TD: Tensor) -> list:
        """Log-probabilities of a prompt's tokens; of the first of all there is none."""
        before, joining.last_11D = joining.last_11D, d_1TD[:, -1:]
        states = d_1TD[:, :-1] if before is None else torch.cat([before, d_1TD[:, :-1]], 1)
        top = joining.requests[0].logprobs or 0
        tokens = text[1:] if before is None else text
        known: list[TokenLogprob | None] = [None] * (len(text) - len(tokens))
        return known + logprobs(self.rows.logits(states[0]), tokens, top) if tokens else known

    def _step(self) -> int:
        """Returns how many rows have written a concept."""
        tokens = [self.running[row].next for row in self.rows.ready]
        hold = ()
        # A step before or after a chunk is long in coming already: nobody waits at it.
        if self.policy is not None and self.joining is None and self.calm:
            hold = self.policy(len(self.running), float(self.rows.rate_B.mean()))
        stepped = self.rows.step(tokens, *hold)
        members = [self.running[row] for row in stepped.rows]
        progress = [Progress(concept_ids=[concept]) for concept in stepped.concept_n]
        self._write(members, stepped.logits_nV, progress)
        return sum(concept != NULL for concept in stepped.concept_n)

    def _write(self, members: list[Running], logits_nV: Tensor, progress: list[Progress]) -> None:
        """A token for each of these rows."""
        requests = [x.job.request for x in members]
        tokens = choose(logits_nV, requests, [x.new for x in members])
        for n, (member, request, token) in enumerate(zip(members, requests, tokens, strict=True)):
            finish = None
            if len(member.new) == request.max_tokens:  # 0 of them are wanted
                finish = "length"
            else:
                if request.logprobs is not None:
                    progress[n].logprobs += logprobs(logits_nV[n, None], [token], request.logprobs)
                if token in request.ends:
                    finish = "stop"
                else:
                    member.new.append(token)
                    progress[n].tokens.append(token)
                    finish = "length" if len(member.new) == request.max_tokens else None
            if member.job.cancelled:
                finish = "cancelled"
            if finish is None:
                member.job.sink(progress[n])
            else:
                self._leave(member, finish, progress[n])


def same_reading(one: Request, other: Request) -> bool:
    """Whether the prompt of both is read alike. Requests that only happen to say the same do not
    count: how soon an answer begins must not tell what others have asked."""
    names = ("rate", "echo", "logprobs")
    return one.prompt is other.prompt and all(
        getattr(one, name) == getattr(other, name) for name in names
    )
