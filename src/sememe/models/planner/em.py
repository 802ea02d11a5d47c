"""Hard EM: for each training pair (u, y) the plan z* with the highest

    S(z) = log p(y | z) + planner_weight · log p(z | u)        nats of the whole text and plan

among the candidates of `proposers.py`. The present plan is a candidate too, is scored anew, and
stays in a tie: at equal parameters S never falls. The model is in eval mode, or dropout scores too.

Suffixes: N pairs · B of a batch · n candidates of a pair · R different candidates of a batch · P
slots of a plan."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from rapidfuzz.distance import Levenshtein
from torch import Tensor

from sememe.concepts.plan import PlanShape
from sememe.errors import TrainingError
from sememe.keys import Em
from sememe.models.planner.losses import in_chunks
from sememe.models.planner.model import PlannerForCausalLM
from sememe.models.planner.proposers import PROPOSERS, PairBatch
from sememe.options import checked
from sememe.pairs import PairTensors

TOKENS_AT_ONCE = 2**14  # that planner and executor read in one pass
ROUNDS = 3  # of search in `best_plans`, each from the plans of the one before
Tick = Callable[[int], None]


class Scores(NamedTuple):
    """(B, n) each, in nats; `total` is S. `first`: no candidate before it in its row is the same
    plan."""

    total: Tensor
    target: Tensor
    plan: Tensor
    first: Tensor


@torch.no_grad()
def score(
    model: PlannerForCausalLM, batch: PairBatch, plan_BnP: Tensor, planner_weight: float = 1.0
) -> Scores:
    """S of all candidates of all rows at once. Raises CheckpointError for a candidate that is no
    plan of this model."""
    rows, count, slots = plan_BnP.shape
    row_m1 = torch.arange(rows, device=plan_BnP.device).repeat_interleave(count)[:, None]
    # Proposers repeat each other: each different plan of a row is scored once.
    keyed_RP, which_m = torch.cat([row_m1, plan_BnP.flatten(0, 1)], 1).unique(
        dim=0, return_inverse=True
    )

    def log_probs(keyed_rP: Tensor) -> Tensor:
        row_r, plan_rP = keyed_rP[:, 0], keyed_rP[:, 1:]
        target_r = -model.target_nll(plan_rP, batch.target_BY[row_r]).sum(1)
        plan_r = model.plan_log_prob(plan_rP, batch.context.pick(row_r))
        return torch.stack([target_r, plan_r], 1)

    tokens = batch.context.slots.length + slots + batch.target_BY.shape[1]
    both_R2 = in_chunks(log_probs, TOKENS_AT_ONCE // tokens, keyed_RP)
    target_Bn, plan_Bn = both_R2[which_m].view(rows, count, 2).unbind(2)
    which_Bn = which_m.view(rows, count)
    same_Bnn = which_Bn.unsqueeze(2) == which_Bn.unsqueeze(1)
    total_Bn = target_Bn + planner_weight * plan_Bn
    return Scores(total_Bn, target_Bn, plan_Bn, ~same_Bnn.tril(-1).any(2))


def e_step(
    model: PlannerForCausalLM,
    pairs: PairTensors,
    plan_NP: Tensor,
    index_n: Tensor,
    em: Em,
    seed: int,
    tick: Tick = lambda n: None,
) -> dict[str, float]:
    """Puts better plans of the pairs `index_n` into `plan_NP`, in place, a batch at a time, and
    returns the mean of each figure of `best_of`. `tick` is given the size of each batch.

    Raises:
        TrainingError: a score is not finite."""
    base = int(torch.randint(2**31, (), generator=torch.Generator().manual_seed(seed)))
    figures: list[dict[str, Tensor]] = []
    for index_B in index_n.split(em.batch):
        # A batch draws for itself: what the others drew makes no difference.
        own = torch.Generator().manual_seed(base + 2**31 * int(index_B[0]))
        best_BP, figures_B = _search(model, pairs.rows(index_B), plan_NP[index_B], em, own)
        plan_NP[index_B] = best_BP.to(plan_NP)
        figures.append(figures_B)
        tick(len(index_B))
    all_n = {key: torch.cat([x[key] for x in figures]).double() for key in figures[0]}
    means = {key: float(x_n.nanmean()) for key, x_n in all_n.items() if not x_n.isnan().all()}
    return means | {"em_examples": float(len(index_n))}


@torch.no_grad()
def _search(
    model: PlannerForCausalLM,
    pairs: PairTensors,
    present_BP: Tensor,
    em: Em,
    generator: torch.Generator,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The best of all candidates for each of a few pairs: see `best_of`."""
    batch = PairBatch.of(model, pairs)
    present_BP = present_BP.to(model.device).long()
    plans, origin_n = [present_BP.unsqueeze(1)], [None]
    for name, count in em.proposers.items():
        if count > 0:
            plans.append(PROPOSERS[name](model, batch, present_BP, count, generator))
            origin_n += [name] * plans[-1].shape[1]
    plan_BnP = torch.cat(plans, 1)
    scores = score(model, batch, plan_BnP, em.planner_weight)
    if not bool(torch.isfinite(scores.total).all()):
        raise TrainingError(
            "a plan's score is not finite: need finite weights. try: a lower learning rate"
        )
    return best_of(model.plans.shape, plan_BnP, scores, origin_n)


def best_of(
    shape: PlanShape, plan_BnP: Tensor, scores: Scores, origin_n: list[str | None]
) -> tuple[Tensor, dict[str, Tensor]]:
    """(B, P) the best candidates, the present plan being the first, and what is known of each row,
    (B,) on the CPU; nan where it does not apply. `origin`: who proposed each candidate.

    em_score, em_target, em_plan: S, log p(y | z*) and log p(z* | u). em_margin: S(z*) - S(best
    other plan). em_flips: 1 where the plan changed; of those em_edits, the edit distance, and
    em_by_NAME, 1 where NAME proposed it. em_staleness: S(z* new) - S(z* old), both scored now.
    em_entropy: of the softmax of S over the different candidates, em_candidates of them."""
    total_Bn = scores.total.float().masked_fill(~scores.first, -torch.inf)
    top_B, best_B = total_Bn.max(1)
    best_B = best_B.masked_fill(total_Bn[:, 0] == top_B, 0)
    rows_B = torch.arange(len(best_B), device=best_B.device)
    best_BP = plan_BnP[rows_B, best_B]
    rival_B = total_Bn.index_put((rows_B, best_B), total_Bn.new_tensor(-torch.inf)).amax(1)
    edits_B = _edit_distance(shape, plan_BnP[:, 0], best_BP).to(top_B)
    flipped_B = edits_B > 0
    figures = {
        "em_score": top_B,
        "em_target": scores.target[rows_B, best_B],
        "em_plan": scores.plan[rows_B, best_B],
        "em_margin": (top_B - rival_B).masked_fill(rival_B == -torch.inf, torch.nan),
        "em_flips": flipped_B,
        "em_edits": edits_B.masked_fill(~flipped_B, torch.nan),
        "em_staleness": top_B - total_Bn[:, 0],
        "em_entropy": torch.distributions.Categorical(logits=total_Bn).entropy(),
        "em_candidates": scores.first.sum(1),
    }
    for name in dict.fromkeys(origin_n[1:]):
        by_n = torch.tensor([origin == name for origin in origin_n], device=best_B.device)
        figures[f"em_by_{name}"] = by_n[best_B].float().masked_fill(~flipped_B, torch.nan)
    return best_BP, {key: x_B.float().cpu() for key, x_B in figures.items()}


def _edit_distance(shape: PlanShape, a_BP: Tensor, b_BP: Tensor) -> Tensor:
    """(B,) ids put in, taken out or replaced between two plans, type by type."""
    plans = zip(shape.unpack(a_BP), shape.unpack(b_BP), strict=True)
    return torch.tensor([sum(map(Levenshtein.distance, a, b)) for a, b in plans])


@torch.no_grad()
def greedy_plans(model: PlannerForCausalLM, pairs: PairTensors, batch: int = 8) -> Tensor:
    """(N, P) the planner's own plans of the sources, on the CPU."""
    parts = zip(pairs.source_NU.split(batch), pairs.source_mask_NU.split(batch), strict=True)
    return torch.cat([model.plan(*source)[0][:, 0].cpu() for source in parts])


def best_plans(
    model: PlannerForCausalLM,
    pairs: PairTensors,
    em: dict[str, Any],
    tick: Tick = lambda n: None,
    rounds: int = ROUNDS,
) -> Tensor:
    """(N, P) z* of pairs that nobody trains on: the best plans that `rounds` of E-steps find with
    the targets in view, from the planner's own. `em`: the recipe's search, as plain values."""
    options = checked(Em, em)
    plan_NP = greedy_plans(model, pairs, options.batch)
    for index_B in torch.arange(len(pairs)).split(options.batch):
        for number in range(rounds):
            e_step(model, pairs, plan_NP, index_B, options, number)
        tick(len(index_B))
    return plan_NP
