"""The executor: (B, P) plans → (B, Y) texts, by the base with its adapter of that name.

Suffixes as in `model.py`."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import closing
from itertools import takewhile
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import DynamicCache

from sememe.backbone.adapters import adapter
from sememe.models.planner.beam import PlanSearch
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
    zero_B1 = torch.zeros_like(plan_BP[:, :1])
    bos_B1D = model.spine.embed(zero_B1 + model.bos)
    x_BCD = plans.inputs(plans(plan_BP) if e_BPD is None else e_BPD)
    last_B1D = plans.to_states(plans.separator[-1]).expand_as(bos_B1D)
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
    text_BTD = model.spine.embed(before_BT.masked_fill(before_BT < 0, model.bos))
    slots = slots.then(slots.then_text(before_BT.shape[1]))
    with adapter(model.backbone, EXECUTOR):
        h_BnD = model.run(torch.cat([x_BnD, text_BTD], 1), slots, slots)
    return h_BnD[:, x_BnD.shape[1] - 1 :][:, : target_BY.shape[1]]


@torch.no_grad()
def tokens_from(
    model: PlannerForCausalLM, plan_BP: Tensor, search: PlanSearch
) -> Generator[Tensor]:
    """(B,) the next token of each row's text, as long as one is asked for; greedy, or sampled as
    `search` samples plans."""
    spine, cache = model.spine, DynamicCache()
    x_BnD, query = prefix(model, plan_BP.to(model.device))
    key = query
    with adapter(model.backbone, EXECUTOR):
        while True:
            h_BnD = model.run(x_BnD, query, key, cache)
            yield (token_B := search.draw(spine.logits(h_BnD[:, -1])))
            x_BnD, query = spine.embed(token_B[:, None]), key.then_text(1)
            key = key.then(query)


def write(
    model: PlannerForCausalLM, plan_BP: Tensor, max_new_tokens: int, search: PlanSearch
) -> list[list[int]]:
    """The token ids that each row's plan is written out as, up to its end of text, which is left
    out."""
    tokens, stops = [], torch.tensor(model.stops, device=model.device)
    unfinished_B = torch.ones(len(plan_BP), dtype=torch.bool, device=model.device)
    with closing(tokens_from(model, plan_BP, search)) as text:
        while len(tokens) < max_new_tokens and bool(unfinished_B.any()):
            tokens.append(token_B := next(text))
            unfinished_B &= ~torch.isin(token_B, stops)
    rows = torch.stack(tokens, 1).tolist()
    return [list(takewhile(lambda token: token not in model.stops, row)) for row in rows]
