"""Hard EM: for each training pair (u, y) the plan z* with the highest

    S(z) = log p(y | z) + planner_weight · log p(z | u)        nats of the whole text and plan

among the candidates of `proposers.py`. The present plan is a candidate too, is scored anew, and
stays in a tie: at equal parameters S never falls.

Suffixes: N pairs · B of a batch · n candidates of a pair · R different candidates of a batch · P
slots of a plan."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from rapidfuzz.distance import Levenshtein
from torch import Tensor

from sememe.concepts.plan import PlanShape
from sememe.errors import TrainingError
from sememe.models.planner.losses import in_chunks
from sememe.models.planner.model import PlannerForCausalLM
from sememe.models.planner.proposers import PROPOSERS, PairBatch
from sememe.pairs import PairTensors

TOKENS_AT_ONCE = 2**14  # that the executor reads in one pass
CACHE_AT_ONCE = 2**29  # bytes of copies of the sources' KV cache
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
    """S of all candidates of all rows at once, in the model's present mode: put it into `eval`, or
    dropout scores too. Raises CheckpointError for a candidate that is no plan of this model."""
    rows, count, slots = plan_BnP.shape
    row_m = torch.arange(rows, device=plan_BnP.device).repeat_interleave(count)
    # Proposers repeat each other: each different plan of a row is scored once.
    keyed_Rm, which_m = torch.cat([row_m[:, None], plan_BnP.flatten(0, 1)], 1).unique(
        dim=0, return_inverse=True
    )
    row_R, plan_RP = keyed_Rm[:, 0], keyed_Rm[:, 1:]
    target_R = in_chunks(
        lambda plan_rP, row_r: model.target_log_prob(plan_rP, batch.target_BY[row_r]),
        TOKENS_AT_ONCE // (slots + batch.target_BY.shape[1]),
        plan_RP,
        row_R,
    )
    # Twice: the rows' copy of the cache, and the one that the plan is appended to.
    bytes_of_a_row = max(1, 2 * batch.context.bytes() // rows)
    plan_R = in_chunks(
        lambda plan_rP, row_r: model.plan_log_prob(plan_rP, batch.context.pick(row_r)),
        CACHE_AT_ONCE // bytes_of_a_row,
        plan_RP,
        row_R,
    )
    which_Bn = which_m.view(rows, count)
    same_Bnn = which_Bn.unsqueeze(2) == which_Bn.unsqueeze(1)
    scores = (x_R[which_Bn] for x_R in (target_R + planner_weight * plan_R, target_R, plan_R))
    return Scores(*scores, ~same_Bnn.tril(-1).any(2))


@dataclass
class EStep:
    """A search for better plans.

    proposers: how many candidates each of `PROPOSERS` makes for a pair.
    batch: pairs that are searched together.
    planner_weight: of the plan's log-probability in S."""

    proposers: dict[str, int] = field(default_factory=lambda: {"beam": 4, "sample": 4, "edit": 8})
    batch: int = 8
    planner_weight: float = 1.0

    def run(
        self,
        model: PlannerForCausalLM,
        pairs: PairTensors,
        plan_NP: Tensor,
        index_n: Tensor,
        seed: int,
        tick: Tick = lambda n: None,
    ) -> dict[str, float]:
        """Puts better plans of the pairs `index_n` into `plan_NP`, in place, a batch at a time, and
        returns the mean of each figure of `best_of`. `tick` is given the size of each batch.

        Raises:
            TrainingError: a score is not finite."""
        base = int(torch.randint(2**31, (), generator=torch.Generator().manual_seed(seed)))
        figures: list[dict[str, Tensor]] = []
        with evaluating(model):
            for index_B in index_n.split(self.batch):
                # A batch draws for itself: what the others drew makes no difference.
                own = torch.Generator().manual_seed(base + 2**31 * int(index_B[0]))
                best_BP, figures_B = self.search(model, pairs.rows(index_B), plan_NP[index_B], own)
                plan_NP[index_B] = best_BP.to(plan_NP)
                figures.append(figures_B)
                tick(len(index_B))
        all_n = {key: torch.cat([x[key] for x in figures]).double() for key in figures[0]}
        means = {key: float(x_n.nanmean()) for key, x_n in all_n.items() if not x_n.isnan().all()}
        return means | {"em_examples": float(len(index_n))}

    @torch.no_grad()
    def search(
        self,
        model: PlannerForCausalLM,
        pairs: PairTensors,
        present_BP: Tensor,
        generator: torch.Generator,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The best of all candidates for each of a few pairs: see `best_of`."""
        batch = PairBatch.of(model, pairs)
        present_BP = present_BP.to(model.device).long()
        proposed = {
            name: PROPOSERS[name](model, batch, present_BP, count, generator)
            for name, count in self.proposers.items()
            if count > 0
        }
        plan_BnP = torch.cat([present_BP.unsqueeze(1), *proposed.values()], 1)
        scores = score(model, batch, plan_BnP, self.planner_weight)
        if not bool(torch.isfinite(scores.total).all()):
            raise TrainingError(
                "a plan's score is not finite: need finite weights. try: a lower learning rate"
            )
        origin_n = [None, *(name for name, x in proposed.items() for _ in range(x.shape[1]))]
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
    best_B1 = total_Bn.argmax(1, keepdim=True)
    best_B1 = torch.where(total_Bn[:, :1] == total_Bn.gather(1, best_B1), 0, best_B1)
    best_BP = plan_BnP.gather(1, best_B1.unsqueeze(-1).expand(-1, -1, plan_BnP.shape[2])).squeeze(1)
    top_B, target_B, plan_B = (
        x_Bn.gather(1, best_B1).squeeze(1) for x_Bn in (total_Bn, scores.target, scores.plan)
    )
    rival_B = total_Bn.scatter(1, best_B1, -torch.inf).amax(1)
    edits_B = _edit_distance(shape, plan_BnP[:, 0], best_BP).to(top_B)
    flipped_B = edits_B > 0
    figures = {
        "em_score": top_B,
        "em_target": target_B,
        "em_plan": plan_B,
        "em_margin": torch.where(torch.isfinite(rival_B), top_B - rival_B, torch.nan),
        "em_flips": flipped_B,
        "em_edits": torch.where(flipped_B, edits_B, torch.nan),
        "em_staleness": top_B - total_Bn[:, 0],
        "em_entropy": torch.distributions.Categorical(logits=total_Bn).entropy(),
        "em_candidates": scores.first.sum(1),
    }
    for name in dict.fromkeys(filter(None, origin_n)):
        by_n = torch.tensor([origin == name for origin in origin_n], device=total_Bn.device)
        by_B = by_n[best_B1.squeeze(1)].float()
        figures[f"em_by_{name}"] = torch.where(flipped_B, by_B, torch.nan)
    return best_BP, {key: x_B.float().cpu() for key, x_B in figures.items()}


def _edit_distance(shape: PlanShape, a_BP: Tensor, b_BP: Tensor) -> Tensor:
    """(B,) ids put in, taken out or replaced between two plans, type by type."""
    plans = zip(shape.unpack(a_BP), shape.unpack(b_BP), strict=True)
    return torch.tensor([sum(map(Levenshtein.distance, a, b)) for a, b in plans])


@torch.no_grad()
def greedy_plans(
    model: PlannerForCausalLM, pairs: PairTensors, batch: int = 8, tick: Tick = lambda n: None
) -> Tensor:
    """(N, P) the planner's own plans of the sources, on the CPU."""
    plans = []
    for index_B in torch.arange(len(pairs)).split(batch):
        some = pairs.rows(index_B)
        plans.append(model.plan(some.source_NU, some.source_mask_NU)[0][:, 0].cpu())
        tick(len(index_B))
    return torch.cat(plans)


def best_plans(
    model: PlannerForCausalLM,
    pairs: PairTensors,
    em: dict[str, Any] | None = None,
    tick: Tick = lambda n: None,
    rounds: int = ROUNDS,
    seed: int = 0,
) -> Tensor:
    """(N, P) z* of pairs that nobody trains on: the best plans that `rounds` of E-steps find with
    the targets in view, from the planner's own. `em`: the recipe's search, as plain values."""
    known = ("proposers", "batch", "planner_weight")
    step = EStep(**{key: value for key, value in (em or {}).items() if key in known})
    plan_NP = greedy_plans(model, pairs, step.batch)
    for index_B in torch.arange(len(pairs)).split(step.batch):
        for number in range(rounds):
            step.run(model, pairs, plan_NP, index_B, seed * 1_000_003 + number)
        tick(len(index_B))
    return plan_NP


@contextlib.contextmanager
def evaluating(model: PlannerForCausalLM):
    """`model` in eval mode inside, and as it was again afterwards."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
