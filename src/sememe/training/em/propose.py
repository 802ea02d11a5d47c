"""Where candidates come from: incumbents (B, P) → (B, n, P) plans that may be better.

Each proposer is a small class with `propose` and a name in `PROPOSERS`. Candidates are valid plans;
they may repeat each other or the incumbent, which costs nothing: equal plans are scored once.
Suffixes: B rows · n candidates · P slots · M ids of the largest type · D width."""

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from sememe.concepts.plan import NULL, PlanShape
from sememe.models.planner import LOGITS_AT_ONCE, PlannerForCausalLM
from sememe.models.planning import SourceRead


class Batch(NamedTuple):
    """(B, U) sources with their mask, (B, Y) targets with -100 behind, and the planner's reading of
    the sources."""

    source: Tensor
    mask: Tensor | None
    target: Tensor
    read: SourceRead


class Proposer(Protocol):
    """What an entry of `PROPOSERS` is."""

    def propose(
        self,
        model: PlannerForCausalLM,
        batch: Batch,
        incumbent_BP: Tensor,
        count: int,
        generator: torch.Generator,
    ) -> Tensor:
        """(B, count, P) candidates on the model's device. Random ones depend on `generator`, of the
        CPU, alone."""


@dataclass
class Beam:
    """What the planner finds most likely."""

    def propose(self, model, batch, incumbent_BP, count, generator):
        return model.plan(
            batch.source, batch.mask, num_beams=count, num_return=count, read=batch.read
        )[0]


@dataclass
class Diverse:
    """What it finds likely, each in another way. `diversity`: nats lost by repeating another's
    concept."""

    diversity: float = 1.0

    def propose(self, model, batch, incumbent_BP, count, generator):
        return model.plan(
            batch.source, batch.mask, num_return=count, diversity=self.diversity, read=batch.read
        )[0]


@dataclass
class Sample:
    """What it draws."""

    temperature: float = 1.0

    def propose(self, model, batch, incumbent_BP, count, generator):
        return model.plan(
            batch.source,
            batch.mask,
            num_return=count,
            do_sample=True,
            temperature=self.temperature,
            generator=generator,
            read=batch.read,
        )[0]


@dataclass
class Edit:
    """The incumbent with one or two changes, never itself: an id replaced, put in or taken out, or
    two exchanged."""

    most: int = 2

    def propose(self, model, batch, incumbent_BP, count, generator):
        shape = model.plans.shape
        made = [
            self._edited(shape, row, generator)
            for row in shape.unpack(incumbent_BP)
            for _ in range(count)
        ]
        return shape.pack(made).view(len(incumbent_BP), count, -1).to(model.device)

    def _edited(
        self, shape: PlanShape, row: list[list[int]], generator: torch.Generator
    ) -> list[list[int]]:
        made = row
        for _ in range(1 + _draw(self.most, generator)):
            made = edit(shape, made, generator)
        return (
            made if made != row else edit(shape, made, generator)
        )  # the second change took the first one back


def edit(shape: PlanShape, row: list[list[int]], generator: torch.Generator) -> list[list[int]]:
    """A plan with one change that any of its types allows; it is another plan."""
    ways = [
        (way, i)
        for i, ids in enumerate(row)
        for way, can in (
            ("replace", len(ids) > 0),
            ("insert", len(ids) < shape.lengths[i]),
            ("delete", len(ids) > 0),
            ("swap", len(set(ids)) > 1),
        )
        if can
    ]
    way, i = ways[_draw(len(ways), generator)]
    ids = list(row[i])
    if way == "insert":
        ids.insert(_draw(len(ids) + 1, generator), _draw(shape.sizes[i], generator))
    elif way == "delete":
        del ids[_draw(len(ids), generator)]
    elif way == "replace":
        at = _draw(len(ids), generator)
        other = _draw(shape.sizes[i] - 1, generator)
        ids[at] = other + (other >= ids[at])
    else:
        pairs = [(a, b) for a in range(len(ids)) for b in range(a) if ids[a] != ids[b]]
        a, b = pairs[_draw(len(pairs), generator)]
        ids[a], ids[b] = ids[b], ids[a]
    return [*row[:i], ids, *row[i + 1 :]]


def _draw(count: int, generator: torch.Generator) -> int:
    return int(torch.randint(count, (), generator=generator))


@dataclass
class Gradient:
    """The incumbent with one id replaced: those replacements that the gradient of log p(y | z)
    promises most of (HotFlip, arXiv 1712.06751)."""

    def propose(self, model, batch, incumbent_BP, count, generator):
        gain_BPM = swap_gains(model, incumbent_BP, batch.target)
        gain_Bn, best_Bn = gain_BPM.flatten(1).topk(min(count, gain_BPM[0].numel()), dim=1)
        slot_Bn1, id_Bn1 = (
            x.unsqueeze(-1) for x in (best_Bn // gain_BPM.shape[2], best_Bn % gain_BPM.shape[2])
        )
        same_BnP = incumbent_BP.to(model.device).unsqueeze(1).expand(-1, best_Bn.shape[1], -1)
        made_BnP = torch.where(
            torch.isfinite(gain_Bn).unsqueeze(-1), same_BnP.scatter(2, slot_Bn1, id_Bn1), same_BnP
        )
        fill_BnP = same_BnP[:, :1].expand(
            -1, count - made_BnP.shape[1], -1
        )  # fewer ids than were asked for
        return torch.cat([made_BnP, fill_BnP], 1)


@torch.enable_grad()
def swap_gains(model: PlannerForCausalLM, plan_BP: Tensor, target_BY: Tensor) -> Tensor:
    """(B, P, M) nats that log p(y | z) gains to first order if a slot's id becomes another; -inf
    where it has none, for the id itself and behind the type's vocabulary."""
    shape, device, most = model.plans.shape, model.device, max(model.plans.shape.sizes)
    plan_BP, target_BY, gains = plan_BP.to(device), target_BY.to(device), []
    rows = max(
        1, LOGITS_AT_ONCE // (max(1, target_BY.shape[1]) * model.config.text_config.vocab_size)
    )
    for plan_bP, target_bY in zip(plan_BP.split(rows), target_BY.split(rows), strict=True):
        e_bPD = model.plan_embeddings(plan_bP).detach().requires_grad_()
        (slope_bPD,) = torch.autograd.grad(
            model.target_log_prob(plan_bP, target_bY, e_bPD).sum(), e_bPD
        )
        now_bP1 = (slope_bPD * e_bPD.detach()).sum(-1, keepdim=True)
        of_type = [
            shape.of_type(slope_bPD.mT, i).mT @ model.plans.table(i).detach().T
            for i in range(shape.types)
        ]
        there = torch.cat([F.pad(x, (0, most - x.shape[-1]), value=-torch.inf) for x in of_type], 1)
        own = F.one_hot(plan_bP.clamp(min=0), most).bool() | (plan_bP == NULL).unsqueeze(-1)
        gains.append((there - now_bP1).masked_fill(own, -torch.inf).detach())
    return torch.cat(gains)


PROPOSERS: dict[str, type[Proposer]] = {
    "beam": Beam,
    "diverse": Diverse,
    "sample": Sample,
    "edit": Edit,
    "gradient": Gradient,
}
