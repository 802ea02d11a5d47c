"""Where the E-step's candidates come from: present plans (B, P) → (B, n, P) plans that may be
better.

A proposer is a function with its line in `PROPOSERS`. Candidates are valid plans on the model's
device; random ones depend on the generator alone. They may repeat each other or the present plan.
Suffixes: B rows · n candidates · P slots · M ids of the largest type · D width."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sememe.concepts.plan import NULL, PlanShape
from sememe.models.planner.beam import PlanSearch
from sememe.models.planner.losses import in_chunks
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


Proposer = Callable[[PlannerForCausalLM, PairBatch, Tensor, int, torch.Generator], Tensor]


def beam(model, batch: PairBatch, present_BP: Tensor, count: int, generator) -> Tensor:
    """The planner's most likely plans, by beam search."""
    return PlanSearch(num_beams=count, num_return=count)(model, batch.context)[0]


def diverse(model, batch: PairBatch, present_BP: Tensor, count: int, generator) -> Tensor:
    """Likely plans that differ from each other, by diverse beam search."""
    return PlanSearch(num_return=count, diversity=DIVERSITY)(model, batch.context)[0]


def sample(model, batch: PairBatch, present_BP: Tensor, count: int, generator) -> Tensor:
    """Draws from the planner."""
    search = PlanSearch(num_return=count, do_sample=True, generator=generator)
    return search(model, batch.context)[0]


def edit(model, batch: PairBatch, present_BP: Tensor, count: int, generator) -> Tensor:
    """The present plan with one or two random edits, never itself."""
    shape = model.plans.shape
    plans = [
        _edit_some(shape, plan, generator)
        for plan in shape.unpack(present_BP)
        for _ in range(count)
    ]
    return shape.pack(plans).view(len(present_BP), count, -1).to(model.device)


def _edit_some(
    shape: PlanShape, plan: list[list[int]], generator: torch.Generator
) -> list[list[int]]:
    edited = plan
    for _ in range(1 + _draw(MAX_EDITS, generator)):
        edited = edit_once(shape, edited, generator)
    # The second edit may have taken the first one back.
    return edited if edited != plan else edit_once(shape, edited, generator)


def edit_once(
    shape: PlanShape, plan: list[list[int]], generator: torch.Generator
) -> list[list[int]]:
    """Another plan: one id replaced, inserted or deleted, or two different ones of a type
    exchanged."""
    possible = [
        (kind, i)
        for i, ids in enumerate(plan)
        for kind, can in (
            ("replace", len(ids) > 0),
            ("insert", len(ids) < shape.lengths[i]),
            ("delete", len(ids) > 0),
            ("swap", len(set(ids)) > 1),
        )
        if can
    ]
    kind, i = possible[_draw(len(possible), generator)]
    ids = list(plan[i])
    if kind == "insert":
        ids.insert(_draw(len(ids) + 1, generator), _draw(shape.sizes[i], generator))
    elif kind == "delete":
        del ids[_draw(len(ids), generator)]
    elif kind == "replace":
        slot = _draw(len(ids), generator)
        other = _draw(shape.sizes[i] - 1, generator)
        ids[slot] = other + (other >= ids[slot])  # any id but the present one
    else:
        pairs = [(a, b) for a in range(len(ids)) for b in range(a) if ids[a] != ids[b]]
        a, b = pairs[_draw(len(pairs), generator)]
        ids[a], ids[b] = ids[b], ids[a]
    return [*plan[:i], ids, *plan[i + 1 :]]


def _draw(count: int, generator: torch.Generator) -> int:
    return int(torch.randint(count, (), generator=generator))


def gradient(model, batch: PairBatch, present_BP: Tensor, count: int, generator) -> Tensor:
    """The present plan with one id replaced: those replacements that the gradient of log p(y | z)
    promises most of (HotFlip, arXiv 1712.06751)."""
    gain_BPM = swap_gains(model, present_BP, batch.target_BY)
    gain_Bn1, best_Bn1 = (
        x_Bn.unsqueeze(2)
        for x_Bn in gain_BPM.flatten(1).topk(min(count, gain_BPM[0].numel()), dim=1)
    )
    plan_BnP = present_BP.unsqueeze(1).repeat(1, best_Bn1.shape[1], 1)
    size = gain_BPM.shape[2]
    swapped_BnP = plan_BnP.scatter(2, best_Bn1 // size, best_Bn1 % size)
    # There may be too few replacements.
    return torch.where(torch.isfinite(gain_Bn1), swapped_BnP, plan_BnP)


@torch.enable_grad()
def swap_gains(model: PlannerForCausalLM, plan_BP: Tensor, target_BY: Tensor) -> Tensor:
    """(B, P, M) nats that log p(y | z) gains to first order if a slot's id becomes another; -inf
    where it has none, for the id itself and past the type's vocabulary."""
    shape = model.plans.shape
    max_size = max(shape.sizes)

    def gains(plan_bP: Tensor, target_bY: Tensor) -> Tensor:
        e_bPD = model.plan_embeddings(plan_bP).detach().requires_grad_()
        log_p = model.target_log_prob(plan_bP, target_bY, e_bPD).sum()
        (slope_bPD,) = torch.autograd.grad(log_p, e_bPD)
        # d log p / d e · (e_other − e_present), for every other id of the slot's type
        other = [
            shape.of_type(slope_bPD.mT, i).mT @ model.plans.table(i).detach().T
            for i in range(shape.types)
        ]
        other_bPM = torch.cat(
            [F.pad(x, (0, max_size - x.shape[-1]), value=-torch.inf) for x in other], 1
        )
        present_bP1 = (slope_bPD * e_bPD.detach()).sum(-1, keepdim=True)
        itself_bPM = F.one_hot(plan_bP.clamp(min=0), max_size).bool()
        impossible_bPM = itself_bPM | (plan_bP == NULL).unsqueeze(-1)
        return (other_bPM - present_bP1).masked_fill(impossible_bPM, -torch.inf)

    rows = model.rows_at_once(target_BY.shape[1])  # whose logits fit, with their gradients
    return in_chunks(gains, rows, plan_BP, target_BY)


PROPOSERS: dict[str, Proposer] = {
    "beam": beam,
    "diverse": diverse,
    "sample": sample,
    "edit": edit,
    "gradient": gradient,
}
