"""The E-step: pairs and their incumbents → the best of all candidates for each, and figures that
say how the search goes.

The incumbent is always a candidate, scored anew, and keeps its place in a tie: at equal parameters
S never falls. Suffixes: N examples of the step · B of a batch · n candidates · P slots."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sememe.concepts.plan import PlanShape
from sememe.errors import RecipeError, TrainingError
from sememe.models.planner import PlannerForCausalLM
from sememe.pairs import PairTensors
from sememe.training.em.propose import PROPOSERS, Batch
from sememe.training.em.score import score
from sememe.training.em.store import MOVES, SCORES, Assignments

ORIGINS = (None, *PROPOSERS)  # what `proposer` in the store's moves counts; 0 is the incumbent


@dataclass
class EStep:
    """A search for better plans.

    proposers: how many candidates each of `PROPOSERS` makes for an example.
    batch: examples searched together.
    price: nats of the text that a nat of the plan costs.
    """

    proposers: dict[str, int] = field(default_factory=lambda: {"beam": 4, "sample": 4, "edit": 8})
    batch: int = 16
    price: float = 1.0

    def __post_init__(self):
        unknown = sorted(set(self.proposers) - set(PROPOSERS))
        if unknown:
            raise RecipeError(
                f"em.proposers names {', '.join(unknown)}: need some of {', '.join(PROPOSERS)}. "
                "try: edit: 8"
            )
        if min(self.proposers.values(), default=0) < 0 or sum(self.proposers.values()) < 1:
            raise RecipeError(
                f"em.proposers = {self.proposers}: need counts from 0, and one candidate in all. "
                "try: edit: 8"
            )
        if self.batch < 1 or self.price < 0:
            raise RecipeError(
                f"em.batch = {self.batch} and em.price = {self.price}: need at least 1, and at "
                "least 0. "
                "try: em.batch=16 em.price=1"
            )

    def run(
        self,
        model: PlannerForCausalLM,
        pairs: PairTensors,
        store: Assignments,
        index_N: Tensor,
        generator: torch.Generator,
        tick: Callable[[int], None] | None = None,
    ) -> dict[str, float]:
        """Searches the examples `index_N`, a batch at a time, writes what it finds and completes
        the store's step.

        Interrupted, it goes on with the batches that were not written, and with the same generator
        and parameters ends as if it had never stopped. Examples without a plan start from the
        planner's own. The model is put into `eval` meanwhile.

        Returns `figures`. `tick` is told how many examples each batch had.

        Raises:
            TrainingError: a score is not finite."""
        seed = int(torch.randint(2**31, (), generator=generator))
        with _evaluating(model):
            for index_B in index_N.cpu().split(self.batch):
                left_B = index_B[~store.searched(index_B)]
                if len(left_B):
                    # By place, not by what was drawn before: a batch comes out alike whether the
                    # ones before it ran now or not.
                    own = torch.Generator().manual_seed(seed + 2**31 * int(index_B[0]))
                    store.write(
                        left_B,
                        *self.search(
                            model,
                            pairs.rows(left_B),
                            store.read(left_B),
                            store.assigned(left_B),
                            own,
                        ),
                    )
                if tick:
                    tick(len(index_B))
        found = figures(store, index_N.cpu())
        store.finish_step()
        return found

    @torch.no_grad()
    def search(
        self,
        model: PlannerForCausalLM,
        pairs: PairTensors,
        incumbent_BP: Tensor,
        known_B: Tensor,
        generator: torch.Generator,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(B, P) best plans, (B, 4) scores and (B, 5) moves as the store keeps them, on the CPU.

        `known` (B,) bool: the incumbent is one. Where not, the planner's greedy plan takes its
        place, and nothing moved."""
        device = model.device
        read = model.read_source(pairs.source_NU, pairs.source_mask_NU)
        batch = Batch(pairs.source_NU, pairs.source_mask_NU, pairs.target_NY.to(device), read)
        incumbent_BP, known_B = incumbent_BP.to(device), known_B.to(device)
        if not bool(known_B.all()):
            greedy_BP = model.plan(batch.source, batch.mask, read=read)[0][:, 0]
            incumbent_BP = torch.where(known_B[:, None], incumbent_BP, greedy_BP)
        asked = {name: count for name, count in self.proposers.items() if count > 0}
        plan_BnP = torch.cat(
            [
                incumbent_BP.unsqueeze(1),
                *(
                    PROPOSERS[name]().propose(model, batch, incumbent_BP, count, generator)
                    for name, count in asked.items()
                ),
            ],
            1,
        )
        origin_n = torch.tensor(
            [0, *(ORIGINS.index(name) for name, count in asked.items() for _ in range(count))],
            device=device,
        )
        s = score(model, *batch[:3], plan_BnP, read, self.price)
        if not bool(torch.isfinite(s.total).all()):
            raise TrainingError(
                "a plan's score is not finite: need finite weights. try: a lower learning rate"
            )
        return best_of(model.plans.shape, plan_BnP, s, origin_n, known_B)


def best_of(
    shape: PlanShape, plan_BnP: Tensor, s, origin_n: Tensor, known_B: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Of candidates with the incumbent ahead and their `Scores`: plans, `SCORES` and `MOVES`, on
    the CPU. `origin` (n,): who proposed each."""
    total_Bn = s.total.float().masked_fill(~s.first(), -torch.inf)  # a copy is no rival
    best_B1 = total_Bn.argmax(1, keepdim=True)
    best_B1 = torch.where(total_Bn[:, :1] == total_Bn.gather(1, best_B1), 0, best_B1)
    plan_BP = plan_BnP.gather(1, best_B1.unsqueeze(-1).expand(-1, -1, plan_BnP.shape[2])).squeeze(1)
    rival_B1 = total_Bn.scatter(1, best_B1, -torch.inf).amax(1, keepdim=True)
    top_B1 = total_Bn.gather(1, best_B1)
    margin_B1 = torch.where(
        torch.isfinite(rival_B1), top_B1 - rival_B1, torch.nan
    )  # no other plan: no margin
    scores_B4 = torch.cat(
        [top_B1, s.target.gather(1, best_B1), s.plan.gather(1, best_B1), margin_B1], 1
    )
    log_p_Bn = total_Bn.log_softmax(1)
    entropy_B = -(log_p_Bn.exp() * log_p_Bn.masked_fill(~torch.isfinite(log_p_Bn), 0)).sum(1)
    edits_B = torch.tensor(
        [
            distance(*rows)
            for rows in zip(*(shape.unpack(x) for x in (plan_BnP[:, 0], plan_BP)), strict=True)
        ]
    )
    moves = [
        edits_B.to(total_Bn),
        (top_B1 - total_Bn[:, :1]).squeeze(1),
        entropy_B,
        s.first().sum(1),
        origin_n[best_B1.squeeze(1)],
    ]
    moves_B5 = torch.stack([x.to(total_Bn) for x in moves], 1)
    moves_B5[~known_B] = moves_B5[~known_B].index_fill(
        1, torch.tensor([0, 1, 4], device=moves_B5.device), torch.nan
    )
    return plan_BP.cpu(), scores_B4.float().cpu(), moves_B5.float().cpu()


def figures(store: Assignments, index_N: Tensor) -> dict[str, float]:
    """What the step in progress did to these examples, as far as it got; a figure that nothing is
    known for is left out.

    em_score, em_target, em_plan: means of S, log p(y | z*) and log p(z* | u). em_margin: of S(z*) -
    S(best other plan). em_flips: share of the plans that changed. em_edits: mean edit distance of
    those. em_by_NAME: share of them that it proposed. em_staleness: mean of S(z*_new) - S(z*_old),
    both scored now. em_entropy: of the softmax of S over the different candidates, em_candidates of
    them. em_examples: how many were searched."""
    index_N = index_N[store.searched(index_N)]
    rows = torch.cat([store.scores(index_N), store.moves(index_N)], 1).double()
    column = dict(zip((*SCORES, *MOVES), rows.unbind(1), strict=True))
    flipped_N = column["edits"] > 0
    changed = torch.where(column["edits"].isnan(), torch.nan, flipped_N.double())
    by = torch.where(flipped_N, column["proposer"], torch.nan)
    said = {
        "em_score": column["score"],
        "em_target": column["target"],
        "em_plan": column["plan"],
        "em_margin": column["margin"],
        "em_flips": changed,
        "em_edits": torch.where(flipped_N, column["edits"], torch.nan),
        "em_staleness": column["gain"],
        "em_entropy": column["entropy"],
        "em_candidates": column["candidates"],
    }
    said |= {
        f"em_by_{name}": torch.where(by.isnan(), by, (by == number).double())
        for number, name in enumerate(ORIGINS)
        if name and bool((by == number).any())
    }
    known = {name: x[~x.isnan()] for name, x in said.items()}
    return {name: float(x.mean()) for name, x in known.items() if len(x)} | {
        "em_examples": float(len(index_N))
    }


def distance(a: list[list[int]], b: list[list[int]]) -> int:
    """Ids put in, taken out or replaced between two plans, type by type (Levenshtein)."""
    total = 0
    for x, y in zip(a, b, strict=True):
        row = list(range(len(y) + 1))
        for i, p in enumerate(x, start=1):
            last, row[0] = row[0], i
            for j, q in enumerate(y, start=1):
                last, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, last + (p != q))
        total += row[-1]
    return total


@contextlib.contextmanager
def _evaluating(model: PlannerForCausalLM):
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
