"""Hard EM: for each training pair (u, y) the plan z* with the highest

    S(z) = log p(y | z) + planner_weight · log p(z | u)        nats of the whole text and plan

among the candidates of `proposers.py`. The present plan is a candidate too, is scored anew, and
stays in a tie: at equal parameters S never falls. The model is in eval mode, or dropout scores too.

Suffixes: N pairs · B of a batch · n candidates of a pair · R different candidates of a batch · P
slots of a plan."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sememe.backbone.processes import gathered, process_count, rank_of_process
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


@torch.no_grad()
def score(
    model: PlannerForCausalLM, batch: PairBatch, plan_BnP: Tensor, planner_weight: float = 1.0
) -> Tensor:
    """(3, B, n) S, log p(y | z) and log p(z | u) of all candidates of all rows, in nats; -inf for
    one that repeats another before it in its row.

    Raises:
        CheckpointError: a candidate is no plan of this model.
        TrainingError: a score is not finite."""
    same_Bnn = (plan_BnP.unsqueeze(2) == plan_BnP.unsqueeze(1)).all(3)
    first_Bn = ~same_Bnn.tril(-1).any(2)

    def log_probs(row_r: Tensor, plan_rP: Tensor) -> Tensor:
        target_r = -model.target_nll(plan_rP, batch.target_BY[row_r]).sum(1)
        plan_r = model.plan_log_prob(plan_rP, batch.context.pick(row_r))
        return torch.stack([target_r + planner_weight * plan_r, target_r, plan_r], 1).float()

    tokens = batch.context.slots.length + plan_BnP.shape[2] + batch.target_BY.shape[1]
    row_R = first_Bn.nonzero()[:, 0]
    scores_R3 = in_chunks(log_probs, TOKENS_AT_ONCE // tokens, row_R, plan_BnP[first_Bn])
    if not bool(torch.isfinite(scores_R3).all()):
        raise TrainingError(
            "a plan's score is not finite: need finite weights. try: a lower learning rate"
        )
    scores_Bn3 = scores_R3.new_full((*first_Bn.shape, 3), -torch.inf)
    scores_Bn3[first_Bn] = scores_R3
    return scores_Bn3.movedim(2, 0)


@torch.no_grad()
def e_step(
    model: PlannerForCausalLM,
    pairs: PairTensors,
    plan_NP: Tensor,
    index_n: Tensor,
    em: Em,
    seed: int,
    tick: Tick = lambda n: None,
    shared: bool = False,
) -> dict[str, float]:
    """Puts better plans of the pairs `index_n` into `plan_NP`, in place, a batch at a time, and
    returns the mean of each figure of `best_of`. `tick` is given the size of each batch. `shared`:
    every process takes this E-step with the same arguments, and searches its share of the batches.

    Raises:
        TrainingError: a score is not finite."""
    base = int(torch.randint(2**31, (), generator=torch.Generator().manual_seed(seed)))
    rank, processes = (rank_of_process(), process_count()) if shared else (0, 1)
    results: list[tuple[Tensor, Tensor, dict[str, Tensor]]] = []
    for index_B in index_n.split(em.batch)[rank::processes]:
        # A batch draws for itself: what the others drew makes no difference.
        generator = torch.Generator().manual_seed(base + 2**31 * int(index_B[0]))
        batch = PairBatch.of(model, pairs.rows(index_B))
        present_BP = plan_NP[index_B].to(model.device).long()
        plans, origin_n = [present_BP.unsqueeze(1)], [None]
        for name, count in em.proposers.items():
            if count > 0:
                plans.append(PROPOSERS[name](model, batch, present_BP, count, generator))
                origin_n += [name] * plans[-1].shape[1]
        plan_BnP = torch.cat(plans, 1)
        score_3Bn = score(model, batch, plan_BnP, em.planner_weight)
        best_BP, figures_B = best_of(plan_BnP, score_3Bn, origin_n)
        results.append((index_B, best_BP.to(plan_NP), figures_B))
        tick(len(index_B))
    results = gathered(results) if shared else results
    for index_B, best_BP, _ in results:
        plan_NP[index_B] = best_BP
    figures = [figures_B for _, _, figures_B in results]
    all_n = {key: torch.cat([x[key] for x in figures]).double() for key in figures[0]}
    return {key: float(x_n.nanmean()) for key, x_n in all_n.items() if not x_n.isnan().all()}


def best_of(
    plan_BnP: Tensor, score_3Bn: Tensor, origin_n: list[str | None]
) -> tuple[Tensor, dict[str, Tensor]]:
    """(B, P) the best candidates, the present plan being the first, and what is known of each row,
    (B,) on the CPU; nan where it does not apply. `origin`: who proposed each candidate.

    em_score, em_target, em_plan: S, log p(y | z*) and log p(z* | u). em_margin: S(z*) - S(best
    other plan). em_flips: 1 where the plan changed; of those em_by_NAME, 1 where NAME proposed it.
    em_staleness: S(z* new) - S(z* old), both scored now. em_candidates: different ones."""
    total_Bn = score_3Bn[0]
    top_B, best_B = total_Bn.max(1)
    best_B = best_B.masked_fill(total_Bn[:, 0] == top_B, 0)
    rows_B = torch.arange(len(best_B), device=best_B.device)
    score_B, target_B, plan_B = score_3Bn[:, rows_B, best_B]
    rival_B = total_Bn.scatter(1, best_B[:, None], -torch.inf).amax(1)
    figures = {
        "em_score": score_B,
        "em_target": target_B,
        "em_plan": plan_B,
        "em_margin": (top_B - rival_B).masked_fill(rival_B == -torch.inf, torch.nan),
        "em_flips": best_B > 0,
        "em_staleness": top_B - total_Bn[:, 0],
        "em_candidates": torch.isfinite(total_Bn).sum(1),
    }
    for name in dict.fromkeys(origin_n[1:]):
        by_n = torch.tensor([origin == name for origin in origin_n], device=best_B.device)
        figures[f"em_by_{name}"] = by_n[best_B].float().masked_fill(best_B == 0, torch.nan)
    return plan_BnP[rows_B, best_B], {key: x_B.float().cpu() for key, x_B in figures.items()}


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
