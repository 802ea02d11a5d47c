"""Works: requests whose rows do not share steps. Each is done from its beginning to its end, one
after another, a step at a time."""

import time
from abc import abstractmethod
from collections.abc import Generator
from contextlib import closing, contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel

from sememe.engine.checks import check_planned
from sememe.engine.requests import Progress, Request, Sampling
from sememe.engine.scheduler import Running, Scheduler
from sememe.errors import Interrupted, SememeError
from sememe.models.loading import longest_text
from sememe.models.planner.beam import PlanSearch
from sememe.models.planner.executor import tokens_from

Steps = Generator[Progress]
"""Of a work; the last one has a `finish`. What it raises as SememeError refuses the request."""


class Works(Scheduler):
    """One job at a time."""

    continues = False

    def reset(self) -> None:
        """Forgets the job that runs."""
        self.running: list[Running] = []
        self.joining = None
        self.work: Steps | None = None

    @abstractmethod
    def steps(self, request: Any) -> Steps:
        """What is to be done for a request."""

    def bytes_at(self, tokens: int, concepts: int) -> None:
        """Nothing is kept from step to step that the next job would meet."""

    def slice_bytes(self) -> dict[str, int]:
        return {}

    def _advance(self) -> tuple[dict[str, float], int]:
        if not self.running:
            if not self.queue:
                return {}, 0
            self._begin()
        (member,), start = self.running, time.perf_counter()
        # Every pass of the model runs this layer, so a step of many passes ends within one.
        layer = self.model.spine.decoder.layers[0]
        try:
            with layer.register_forward_pre_hook(self._interrupt):
                progress = next(self.work)
        except Interrupted:
            self._leave(member, "cancelled")
        except SememeError as error:
            self._leave(member, "refused", Progress(error=str(error)))
        else:
            if "prefill" not in member.seconds:
                member.clock("prefill")
            if progress.finish is None:
                member.job.sink(progress)
            else:
                self._leave(member, progress.finish, progress)
        return {"work": time.perf_counter() - start}, 0

    def _begin(self) -> None:
        job, since = self.queue.popleft()
        member = Running(job, 0, since)
        member.clock("queue")
        # Known as running first: should it fail, `fail` ends it.
        self.running = [member]
        self.work = self.steps(job.request)
        job.sink(Progress(seconds=dict(member.seconds)))

    def _interrupt(self, *_: Any) -> None:
        """Also those that wait and are gone give their places back."""
        self.take_in()
        self._drop_waiting()
        if any(member.job.cancelled for member in self.running):
            raise Interrupted("cancelled")

    def _leave(self, member: Running, finish: str, progress: Progress | None = None) -> None:
        self.work.close()
        self.reset()
        self._finish(member, finish, progress or Progress())


class PlannerWorks(Works):
    """Plans, and the texts that are written from them."""

    @property
    def longest(self) -> int:
        """Tokens that a source with its BOS may have beside a plan, and a text too."""
        shape = self.model.config.plan_shape
        return longest_text(self.model.config) - shape.slots - shape.types - 1

    def check(self, request: Request) -> None:
        check_planned(self.model, request, self.longest)

    def steps(self, request: Request) -> Steps:
        model, shape = self.model, self.model.config.plan_shape
        first = Progress()
        if request.plan is None:
            with limited(model, request.budget):
                prompt_1U = torch.tensor([request.prompt])
                plans_1RP, _ = model.plan(prompt_1U, **search(request.sampling))
            plan_1P = plans_1RP[:, 0].cpu()
            first.read = len(request.prompt)
        else:
            plan_1P = shape.pack([[list(ids) for ids in request.plan]])
        (first.result,) = shape.unpack(plan_1P)
        first.concepts = sum(map(len, first.result))
        yield first
        wanted = PlanSearch(**search(request.sampling))
        with closing(tokens_from(model, plan_1P, wanted)) as text:
            for number, token_1 in enumerate(text, 1):
                # The one before it was read.
                progress = Progress(read=int(number > 1), finish="stop")
                if (token := int(token_1)) not in request.ends:
                    progress.tokens = [token]
                    progress.finish = "length" if number == request.max_tokens else None
                yield progress


@contextmanager
def limited(model: PreTrainedModel, budget: Any):
    """So many concepts of each type at most inside; None: as the model has it."""
    before = model.dial.budget
    try:
        if budget is not None:
            model.limit(budget)
        yield
    finally:
        model.dial.budget = before


def search(sampling: Sampling) -> dict[str, Any]:
    """Options of `PlanSearch`, with draws from their beginning: those of a text are the same
    whether its plan was drawn or given."""
    if sampling.temperature == 0:
        return {}
    # The second word of a seed tells the choices of one request apart (`Service.requests`).
    mixed = (sampling.seed ^ (sampling.seed >> 64) * 0x9E3779B97F4A7C15) % 2**64
    generator = torch.Generator().manual_seed(mixed)
    return {"do_sample": True, "temperature": sampling.temperature, "generator": generator}
