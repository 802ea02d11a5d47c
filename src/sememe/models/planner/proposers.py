"""Where the E-step's candidates come from: present plans (B, P) → (B, n, P) plans that may be
better.

A proposer is a function with its line in `PROPOSERS`. Candidates are valid plans on the model's
device; random ones depend on the generator alone. They may repeat each other or the present plan.
Suffixes: B rows · n candidates · P slots · M ids of the largest type · D width."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Generator, Tensor

from sememe.concepts.plan import NULL, PlanShape
from sememe.models.planner.beam import PlanSearch
from sememe.models.planner.model import PlannerForCausalLM
from sememe.models.planner.slots import Context
from sememe.pairs import PairTensors

DIVERSITY = 1.0  # nats that a diverse beam loses for repeating another's concept
MAX_EDITS = 2


class PairBatch(NamedTuple):
    """(B, Y) targets with -100 after their end, and the planner's KV cache of the sources."""

    target_BY: Tensor
    context: Context

    @classmethod
    def of(cls, model: PlannerForCausalLM, pairs: PairTensors) -> PairBatch:
        context = model.encode_source(pairs.source_NU, pairs.source_mask_NU)
        return cls(pairs.target_NY.to(model.device), context)


Proposer = Callable[[PlannerForCausalLM, PairBatch, Tensor, int, Generator], Tensor]


def search(**options) -> Proposer:
    """The planner's plans, as `PlanSearch` finds them by these options."""

    def propose(model, batch: PairBatch, present_BP: Tensor, count: int, generator) -> Tensor:
        plan_search = PlanSearch(num_return=count, generator=generator, **options)
        return plan_search(model, batch.context)[0]

    return propose


def edit(model, batch: PairBatch, present_BP: Tensor, count: int, generator) -> Tensor:
    """The present plan with one or two random edits, never itself."""
    shape = model.plans.shape
    plans = []
    for plan in shape.unpack(present_BP):
        for _ in range(count):
            edited = plan
            for _ in range(1 + _draw(MAX_EDITS, generator)):
                edited = edit_once(shape, edited, generator)
            # The second edit may have taken the first one back.
            plans.append(edited if edited != plan else edit_once(shape, edited, generator))
    return shape.pack(plans).view(len(present_BP), count, -1).to(model.device)


def edit_once(shape: PlanShape, plan: list[list[int]], generator: Generator) -> list[list[int]]:
    """Another plan: one id replaced, inserted or deleted, or two different ones of a type
    exchanged."""
    choices = []
    for i, ids in enumerate(plan):
        possible = {
            "replace": len(ids) > 0,
            "insert": len(ids) < shape.lengths[i],
            "delete": len(ids) > 0,
            "swap": len(set(ids)) > 1,
        }
        choices += [(name, i) for name in possible if possible[name]]
    name, i = choices[_draw(len(choices), generator)]
    ids = list(plan[i])
    if name == "swap":
        pairs = [(a, b) for a in range(len(ids)) for b in range(a) if ids[a] != ids[b]]
        a, b = pairs[_draw(len(pairs), generator)]
        ids[a], ids[b] = ids[b], ids[a]
    elif name == "insert":
        ids.insert(_draw(len(ids) + 1, generator), _draw(shape.sizes[i], generator))
    else:
        old = ids.pop(slot := _draw(len(ids), generator))
        if name == "replace":
            other = _draw(shape.sizes[i] - 1, generator)
            ids.insert(slot, other + (other >= old))  # any id but the present one
    return [*plan[:i], ids, *plan[i + 1 :]]


def _draw(count: int, generator: Generator) -> int:
    return int(torch.randint(count, (), generator=generator))


def gradient(model, batch: PairBatch, present_BP: Tensor, count: int, generator) -> Tensor:
    """The present plan with one id replaced: those replacements that the gradient of log p(y | z)
    promises most of (HotFlip, arXiv 1712.06751)."""
    gain_BPM = swap_gains(model, present_BP, batch.target_BY)
    ids = gain_BPM.shape[2]
    gain_Bn, best_Bn = gain_BPM.flatten(1).topk(min(count, gain_BPM[0].numel()), dim=1)
    best_Bn1 = best_Bn.unsqueeze(2)
    plan_BnP = present_BP.unsqueeze(1).repeat(1, best_Bn.shape[1], 1)
    swapped_BnP = plan_BnP.scatter(2, best_Bn1 // ids, best_Bn1 % ids)
    # There may be too few replacements.
    return torch.where(torch.isfinite(gain_Bn).unsqueeze(2), swapped_BnP, plan_BnP)


@torch.enable_grad()
def swap_gains(model: PlannerForCausalLM, plan_BP: Tensor, target_BY: Tensor) -> Tensor:
    """(B, P, M) nats that log p(y | z) gains to first order if a slot's id becomes another; -inf
    where it has none, for the id itself and what the type has not, `<EOS>` too."""
    codes = model.plans
    e_BPD = codes(plan_BP).detach().requires_grad_()
    nll = model.target_nll(plan_BP, target_BY, e_BPD).sum()
    slope_BPD = -torch.autograd.grad(nll, e_BPD)[0]
    # d log p / d e · (e_other − e_present), for every other id of the slot's type
    other_BPV = slope_BPD @ codes.to_states(codes.weight.detach()).T
    present_BP1 = (slope_BPD * e_BPD.detach()).sum(-1, keepdim=True)
    gain_BPM = codes.of_type(other_BPV, codes.shape.kind_P) - present_BP1
    gain_BPM[..., -1] = -torch.inf
    itself_BP1 = plan_BP.clamp(min=0).unsqueeze(-1)
    gain_BPM = gain_BPM.scatter(-1, itself_BP1, -torch.inf)
    return gain_BPM.masked_fill((plan_BP == NULL).unsqueeze(-1), -torch.inf)


PROPOSERS: dict[str, Proposer] = {
    "beam": search(),  # its most likely plans
    "diverse": search(diversity=DIVERSITY),  # likely plans that differ from each other
    "sample": search(do_sample=True),
    "edit": edit,
    "gradient": gradient,
}
