"""How good plans are: (B, n, P) candidates → S(z) = log p(y | z) + price · log p(z | u), (B, n)
nats.

All candidates of all rows at once, each different one only once, over one reading of the sources.
Suffixes: B rows · n candidates of a row · R different ones of all rows · P slots · U source tokens
· Y target tokens."""

from typing import NamedTuple

import torch
from torch import Tensor

from sememe.models.planner import PlannerForCausalLM
from sememe.models.planning import SourceRead

TOKENS_AT_ONCE = 2**14  # that the executor reads in one pass
CACHE_AT_ONCE = 2**29  # bytes of copies of the sources' cache


class Scores(NamedTuple):
    """(B, n) each, in nats; `total` is S. `which`: equal for equal plans of a row, and for no
    others."""

    total: Tensor
    target: Tensor
    plan: Tensor
    which: Tensor

    def first(self) -> Tensor:
        """(B, n) bool: no candidate before it in its row is the same plan."""
        same_Bnn = self.which.unsqueeze(2) == self.which.unsqueeze(1)
        return ~same_Bnn.tril(-1).any(2)


@torch.no_grad()
def score(
    model: PlannerForCausalLM,
    source_BU: Tensor,
    source_mask: Tensor | None,
    target_BY: Tensor,
    plan_BnP: Tensor,
    read: SourceRead | None = None,
    price: float = 1.0,
) -> Scores:
    """S of candidates, in the model's present mode: put it into `eval`, or dropout scores too.

    Args:
        target_BY: -100 behind its end.
        read: what `read_source` made of the source, which is then not read again.
        price: what a nat of the plan costs, in nats of the text.

    Raises:
        CheckpointError: a candidate is no plan of this model.
    """
    device, (rows, count, _) = model.device, plan_BnP.shape
    row_B = torch.arange(rows, device=device)
    named_Rm = torch.cat(
        [row_B.repeat_interleave(count)[:, None], plan_BnP.to(device).flatten(0, 1)], 1
    )
    named_Rm, which_m = named_Rm.unique(dim=0, return_inverse=True)
    row_R, plan_RP = named_Rm[:, 0], named_Rm[:, 1:]
    read, target_BY = read or model.read_source(source_BU, source_mask), target_BY.to(device)
    some = max(1, TOKENS_AT_ONCE // (plan_RP.shape[1] + target_BY.shape[1]))
    target_R = torch.cat(
        [
            model.target_log_prob(plan_rP, target_BY[row_r])
            for plan_rP, row_r in zip(plan_RP.split(some), row_R.split(some), strict=True)
        ]
    )
    cached = sum(
        x.element_size() * x.numel()
        for layer in read.cache.layers
        for x in (layer.keys, layer.values)
    )
    some = max(
        1, CACHE_AT_ONCE * rows // max(1, 2 * cached)
    )  # the rows' copy, and the one that the plan is added to
    plan_R = torch.cat(
        [
            model.plan_log_prob(None, None, plan_rP, read=read.pick(row_r))
            for plan_rP, row_r in zip(plan_RP.split(some), row_R.split(some), strict=True)
        ]
    )
    which_Bn = which_m.view(rows, count)
    return Scores(
        *(x_R[which_Bn] for x_R in (target_R + price * plan_R, target_R, plan_R)), which_Bn
    )
