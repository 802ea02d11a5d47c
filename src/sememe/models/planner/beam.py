"""Search for plans: a KV cache of sources → (B, n, P) plans and their log-probabilities, greedy, by
beams, by diverse beams or by sampling.

A plan is written type by type, each within its own vocabulary, its `<EOS>` included. Types that are
written in parallel are rows of their own, so that one step serves all of them. Suffixes as in
`concepts/plan.py`; B sources · Q problems: a source's type in the making, or its whole plan · n
hypotheses of a problem · R = Q · n rows of the search · M the largest K_i, and `<EOS>`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sememe.backbone.adapters import adapter
from sememe.concepts.plan import NULL
from sememe.errors import RecipeError
from sememe.models.planner.slots import Context

if TYPE_CHECKING:
    from sememe.models.planner.model import PlannerForCausalLM


PLANNER = "planner"  # the adapter that plans


@dataclass
class PlanSearch:
    """How plans are searched for, and what comes back. Where there are fewer plans than are to be
    returned, the best one fills up.

    num_beams: hypotheses kept; at least `num_return`. 1 is greedy.
    num_return: plans of each source, the best first (samples as drawn).
    diversity: nats that a hypothesis loses for each one before it that chooses the same concept in
        the same step; 0 for plain beams (diverse beam search with groups of one, arXiv 1610.02424).
    do_sample, temperature, generator: draws instead. Log-probabilities are those at temperature
        1."""

    num_beams: int = 1
    num_return: int = 1
    diversity: float = 0.0
    do_sample: bool = False
    temperature: float = 1.0
    generator: torch.Generator | None = None

    def __post_init__(self):
        counts = min(self.num_beams, self.num_return)
        if self.temperature <= 0 or counts < 1 or self.diversity < 0:
            raise RecipeError(
                f"temperature = {self.temperature}, num_beams = {self.num_beams}, num_return = "
                f"{self.num_return}, diversity = {self.diversity}: need above 0, at least 1, 1 and "
                "0. try: temperature=1 num_beams=4"
            )

    @property
    def count(self) -> int:
        """n."""
        return self.num_return if self.do_sample else max(self.num_beams, self.num_return)

    @property
    def independent(self) -> bool:
        """Hypotheses do not compete: each goes on from itself."""
        return self.do_sample or self.diversity > 0 or self.count == 1

    @torch.no_grad()
    def __call__(self, model: PlannerForCausalLM, context: Context) -> tuple[Tensor, Tensor]:
        """(B, num_return, P) plans of the sources in `context`, and their log-probabilities."""
        shape, count = model.plans.shape, self.count
        each = [[i] for i in range(shape.types)]
        groups = [list(range(shape.types))] if model.config.parallel else each
        hypotheses = Hypotheses(model, context, self, len(groups[0]))
        with adapter(model.backbone, PLANNER):
            for types in groups:
                hypotheses.write(types)
        sources = len(context.inputs_BnD)
        plan_BInP = hypotheses.plan_RP.view(sources, -1, count, shape.slots)
        score_BIn = hypotheses.score_Qn.view(sources, -1, count)
        plan_BnP, score_Bn = self._combine(plan_BInP, score_BIn)
        if self.independent and model.config.multi_token > 1:
            # Concepts were chosen from what was known some concepts earlier: score them anew.
            score_Bn = model.plan_log_prob(plan_BnP.flatten(0, 1), context).view_as(score_Bn)
        if not self.do_sample:
            plan_BnP, score_Bn = _best_first(plan_BnP, score_Bn)
        return plan_BnP[:, : self.num_return], score_Bn[:, : self.num_return]

    def choose(self, total_QnM: Tensor, log_p_QnM: Tensor, open_Qn: Tensor) -> Tensor:
        """(Q, n) which of the n · M extensions the hypotheses become. `log_p` is of the next id
        alone, `total` with all before it."""
        _, count, ids = log_p_QnM.shape
        if not self.independent:
            return total_QnM.flatten(1).topk(count, dim=1).indices
        if self.do_sample:
            id_Qn = draw(log_p_QnM, self.temperature, self.generator)
        else:
            taken_QM = torch.zeros_like(log_p_QnM[:, 0])
            chosen = []
            for h in range(count):
                penalised_QM = log_p_QnM[:, h] - self.diversity * taken_QM
                id_Q1 = penalised_QM.argmax(-1, keepdim=True)
                taken_QM = taken_QM.scatter_add(1, id_Q1, open_Qn[:, h : h + 1].to(taken_QM))
                chosen.append(id_Q1)
            id_Qn = torch.cat(chosen, 1)
        return id_Qn + ids * torch.arange(count, device=id_Qn.device)

    def _combine(self, plan_BInP: Tensor, score_BIn: Tensor) -> tuple[Tensor, Tensor]:
        """Hypotheses of types that were written in parallel: the n best of all combinations, or
        each with its own number."""
        if self.independent:
            return plan_BInP.amax(1), score_BIn.sum(1)
        plan_BnP, score_Bn = plan_BInP[:, 0], score_BIn[:, 0]
        for i in range(1, plan_BInP.shape[1]):
            pairs_Bm = (score_Bn.unsqueeze(2) + score_BIn[:, i].unsqueeze(1)).flatten(1)
            score_Bn, best_Bn = pairs_Bm.topk(self.count, dim=1)
            first_BnP = _pick(plan_BnP, best_Bn // self.count)
            # A type's slots are NULL in the plans of the others.
            plan_BnP = torch.maximum(first_BnP, _pick(plan_BInP[:, i], best_Bn % self.count))
        return plan_BnP, score_Bn


class Hypotheses:
    """Plans in the making, n for each of Q problems: R = Q · n rows over one KV cache.

    A problem is a source (its types are written one after another) or one type of a source (all
    types are written at once). A step runs some of the inputs that a teacher-forced pass over the
    plans would have: those that the cache does not hold yet."""

    def __init__(
        self, model: PlannerForCausalLM, context: Context, search: PlanSearch, together: int
    ):
        count = search.count
        self.model = model
        self.search = search
        self.context = context.repeated(together * count)
        self.source = self.context.slots
        rows = len(self.context.inputs_BnD)
        self.plan_RP = torch.full((rows, model.plans.shape.slots), NULL, device=model.device)
        self.score_Qn = torch.zeros(rows // count, count, device=model.device)
        if not search.independent:
            self.score_Qn[:, 1:] = -torch.inf  # all start alike; one is enough
        self.pending: list[Tensor] = []  # (R,) inputs that the cache does not hold yet

    def write(self, types: list[int]) -> None:
        """Writes types to their ends: the one of all problems, or those of each source's problems
        in turn."""
        shape = self.model.plans.shape
        problems, count = self.score_Qn.shape
        kind_T = torch.tensor(types, device=self.plan_RP.device)
        self.kind_R = kind_T.repeat_interleave(count).repeat(problems // len(types))
        offsets = [shape.offset(i) for i in range(shape.types)]
        self.length_R, self.budget_R, self.offset_R = (
            torch.tensor(x, device=kind_T.device)[self.kind_R]
            for x in (shape.lengths, self.model.dial.budget, offsets)
        )
        # A hypothesis is open while its type is neither ended by <EOS> nor full.
        self.open_R = torch.isfinite(self.score_Qn).flatten()
        separator_R = self.offset_R + self.kind_R  # its number among the inputs
        self.pending.append(separator_R)
        longest = max(shape.lengths[i] for i in types)
        step = self.model.config.multi_token if self.search.independent else 1
        for first in range(0, longest, step):
            at_once = min(step, longest - first)
            logits_RnM = self.next_logits(types, first, at_once)
            for j in range(at_once):
                self.append(first + j, logits_RnM[:, j])
                # What is in none of the rows need not go through the base.
                if bool(self.open_R.any()):
                    self.pending.append(separator_R + first + j + 1)
            if not bool(self.open_R.any()):
                break

    def next_logits(self, types: list[int], first: int, count: int) -> Tensor:
        """(R, count, M) of concept number `first` of each row's type and of those after it."""
        model, context, queries = self.model, self.context, count - 1
        anchor_RI = torch.full_like(self.plan_RP[:, : model.plans.shape.types], first)
        x_RnD, slots = model.plan_inputs(self.plan_RP, self.source, anchor_RI)
        own = model.plans.shape.slots + model.plans.shape.types
        ask_R = own + self.kind_R * (model.config.multi_token - 1)
        inputs = [*self.pending, *(ask_R + n for n in range(queries))]
        self.pending = []
        # Of a type that is written out in parallel to a longer one there are no more inputs.
        input_Rn = torch.stack(inputs, 1).clamp(max=x_RnD.shape[1] - 1)
        index = torch.arange(len(input_Rn), device=input_Rn.device)[:, None], input_Rn
        query = slots.pick(index)
        key = context.slots.then(query)
        h_RnD = model.run(x_RnD[index], query, key, context.cache)
        context.slots = key
        if queries:  # they leave the cache again
            context.slots = key.pick((slice(None), slice(-queries)))
            context.cache.crop(-queries)
        x_bTnD = model.normed(h_RnD[:, -count:]).unflatten(0, (-1, len(types), self.search.count))
        logits = [model.plans.logits_of(x_bTnD[:, k], i) for k, i in enumerate(types)]
        return torch.stack(logits, 1).flatten(0, 2)

    def append(self, j: int, logits_RM: Tensor) -> None:
        """Concept number j, or `<EOS>`, of every open hypothesis: chosen, and put into the
        plans."""
        eos = logits_RM.shape[1] - 1
        self.open_R &= j < self.length_R
        log_p_RM = logits_RM.log_softmax(-1)
        log_p_RM[:, :-1].masked_fill_((j >= self.budget_R)[:, None], -torch.inf)
        # One that is closed goes on as it is: its <EOS> costs nothing, all else is impossible.
        closed_M = torch.full_like(log_p_RM[0], -torch.inf)
        closed_M[-1] = 0.0
        log_p_RM = torch.where(self.open_R[:, None], log_p_RM, closed_M)
        log_p_QnM = log_p_RM.view(*self.score_Qn.shape, -1)
        total_QnM = self.score_Qn.unsqueeze(-1) + log_p_QnM
        chosen_Qn = self.search.choose(total_QnM, log_p_QnM, self.open_R.view_as(self.score_Qn))
        self.score_Qn = total_QnM.flatten(1).gather(1, chosen_Qn)
        if not self.search.independent:
            self.follow(chosen_Qn // (eos + 1))
        id_R = (chosen_Qn % (eos + 1)).flatten()
        self.open_R = self.open_R & (id_R < eos) & torch.isfinite(self.score_Qn).flatten()
        slot_R1 = (self.offset_R + j).clamp(max=self.plan_RP.shape[1] - 1)[:, None]
        written_RP = self.plan_RP.scatter(1, slot_R1, id_R[:, None])
        self.plan_RP = torch.where(self.open_R[:, None], written_RP, self.plan_RP)

    def follow(self, parent_Qn: Tensor) -> None:
        """Each hypothesis goes on from its parent."""
        problems, count = parent_Qn.shape
        first_Q1 = count * torch.arange(problems, device=parent_Qn.device)[:, None]
        rows_R = (first_Q1 + parent_Qn).flatten()
        self.context.cache.batch_select_indices(rows_R)
        self.context.slots = self.context.slots.pick(rows_R)
        self.plan_RP = self.plan_RP[rows_R]
        self.open_R = self.open_R[rows_R]


def draw(logits: Tensor, temperature: float, generator: torch.Generator | None) -> Tensor:
    """(…,) samples of the softmax of (…, M) logits, by Gumbel noise: a generator of any device will
    do."""
    device = logits.device if generator is None else generator.device
    noise = torch.rand(logits.shape, generator=generator, device=device).to(logits.device)
    wait = -torch.log(noise.clamp(min=1e-20))
    return (logits.float() / temperature - torch.log(wait.clamp(min=1e-20))).argmax(-1)


def _pick(plan_BnP: Tensor, index_Bm: Tensor) -> Tensor:
    return plan_BnP.gather(1, index_Bm.unsqueeze(-1).expand(-1, -1, plan_BnP.shape[2]))


def _best_first(plan_BnP: Tensor, score_Bn: Tensor) -> tuple[Tensor, Tensor]:
    """Sorted; the best one fills up where there are fewer."""
    score_Bn, order_Bn = score_Bn.sort(dim=1, descending=True, stable=True)
    plan_BnP = _pick(plan_BnP, order_Bn)
    none_Bn = score_Bn == -torch.inf
    plan_BnP = torch.where(none_Bn.unsqueeze(-1), plan_BnP[:, :1], plan_BnP)
    return plan_BnP, torch.where(none_Bn, score_Bn[:, :1], score_Bn)
