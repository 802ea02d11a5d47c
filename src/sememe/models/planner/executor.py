"""The executor: (B, P) plans → (B, Y) texts, by the base with its adapter of that name.

Suffixes as in `model.py`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import DynamicCache

from sememe.backbone.adapters import adapter
from sememe.backbone.split import Spine
from sememe.concepts.plan import NULL
from sememe.models.planner.beam import PlanSearch, draw
from sememe.models.planner.slots import Slots, plan_slots

if TYPE_CHECKING:
    from sememe.models.planner.model import PlannerForCausalLM

EXECUTOR = "executor"


def prefix(
    model: PlannerForCausalLM, plan_BP: Tensor, e_BPD: Tensor | None = None
) -> tuple[Tensor, Slots]:
    """(B, 1 + C + 1, D) what precedes a text: BOS, plan, last separator. `e`: read instead of the
    concepts' own states."""
    plans = model.plans
    own_BPD = plans(plan_BP)
    zero_B1 = torch.zeros_like(plan_BP[:, :1])
    bos_B1D = Spine(model.backbone).embed(zero_B1 + model.bos)
    x_BCD = plans.inputs(own_BPD if e_BPD is None else e_BPD)
    last_B1D = plans.last_separator().expand_as(bos_B1D)
    plan = plan_slots(plans.shape, plan_BP, zero_B1, first=1)
    last = Slots.of(zero_B1 + max(plans.shape.lengths), 1 + plan.length)
    x_BnD = torch.cat([bos_B1D, x_BCD, last_B1D], 1).to(bos_B1D.dtype)
    return x_BnD, Slots.of(zero_B1, 0).then(plan, last)


def target_states(
    model: PlannerForCausalLM, plan_BP: Tensor, target_BY: Tensor, e_BPD: Tensor | None = None
) -> Tensor:
    """(B, Y, D) last states that predict each target token, teacher forced."""
    x_BnD, slots = prefix(model, plan_BP, e_BPD)
    before_BT = target_BY[:, :-1]
    # Ignored tokens stand at the end, where nobody sees them: any id will do.
    text_BTD = Spine(model.backbone).embed(before_BT.masked_fill(before_BT < 0, model.bos))
    slots = slots.then(slots.then_text(before_BT.shape[1]))
    with adapter(model.backbone, EXECUTOR):
        h_BnD = model.run(torch.cat([x_BnD, text_BTD], 1), slots, slots)
    return h_BnD[:, x_BnD.shape[1] - 1 :][:, : target_BY.shape[1]]


@torch.no_grad()
def write(
    model: PlannerForCausalLM, plan_BP: Tensor, max_new_tokens: int, search: PlanSearch
) -> list[list[int]]:
    """The token ids that each row's plan is written out as, up to its end of text, which is left
    out; greedy, or sampled as `search` samples plans."""
    spine, cache = Spine(model.backbone), DynamicCache()
    stops = torch.tensor(model.stops, device=model.device)
    x_BnD, query = prefix(model, plan_BP.to(model.device))
    key = query
    unfinished_B = torch.ones(len(plan_BP), dtype=torch.bool, device=model.device)
    text_BY = torch.empty(len(plan_BP), 0, dtype=torch.long, device=model.device)
    with adapter(model.backbone, EXECUTOR):
        while text_BY.shape[1] < max_new_tokens and bool(unfinished_B.any()):
            logits_BV = spine.logits(model.run(x_BnD, query, key, cache)[:, -1])
            token_B = logits_BV.argmax(-1)
            if search.do_sample:
                token_B = draw(logits_BV, search.temperature, search.generator)
            unfinished_B = unfinished_B & ~torch.isin(token_B, stops)
            text_BY = torch.cat([text_BY, torch.where(unfinished_B, token_B, NULL)[:, None]], 1)
            x_BnD = spine.embed(token_B[:, None])
            query = key.then_text(1)
            key = key.then(query)
    return [row_Y[row_Y != NULL].tolist() for row_Y in text_BY]
