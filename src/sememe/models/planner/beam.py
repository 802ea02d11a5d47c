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
from sememe.models.planner.slots import Context, Slots

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
        types = model.plans.shape.types
        together = types if model.config.parallel else 1
        hypotheses = Hypotheses(model, context, self, together)
        with adapter(model.backbone, PLANNER):
            if model.config.parallel:
                hypotheses.write(list(range(types)))
            else:
                for i in range(types):
                    hypotheses.write([i])
        sources = len(context.inputs_BnD)
        plan_BInP = hypotheses.plan_RP.view(sources, together, self.count, -1)
        score_BIn = hypotheses.score_Qn.view(sources, together, self.count)
        plan_BnP, score_Bn = plan_BInP[:, 0], score_BIn[:, 0]
        for i in range(1, together):
            plan_BnP, score_Bn = self._combine(plan_BnP, score_Bn, plan_BInP[:, i], score_BIn[:, i])
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

    def _combine(
        self, plan_BnP: Tensor, score_Bn: Tensor, other_BnP: Tensor, other_Bn: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Hypotheses of types that were written in parallel: the n best of all pairs, or each with
        its own number."""
        if self.independent:
            return torch.maximum(plan_BnP, other_BnP), score_Bn + other_Bn
        pairs_Bm = (score_Bn.unsqueeze(2) + other_Bn.unsqueeze(1)).flatten(1)
        score_Bn, best_Bn = pairs_Bm.topk(self.count, dim=1)
        first, second = best_Bn // self.count, best_Bn % self.count
        return torch.maximum(_pick(plan_BnP, first), _pick(other_BnP, second)), score_Bn


class Hypotheses:
    """Plans in the making, n for each of Q problems: R = Q · n rows over one KV cache.

    A problem is a source (its types are written one after another) or one type of a source (all
    types are written at once)."""

    def __init__(
        self, model: PlannerForCausalLM, context: Context, search: PlanSearch, together: int
    ):
        shape, device, count = model.plans.shape, model.device, search.count
        self.model = model
        self.search = search
        self.context = context.repeated(together * count)
        self.start_R1 = self.context.slots.position[:, -1:] + 1  # where types begin, in RoPE
        self.plan_RP = torch.full((len(self.start_R1), shape.slots), NULL, device=device)
        self.score_Qn = torch.zeros(len(self.plan_RP) // count, count, device=device)
        if not search.independent:
            self.score_Qn[:, 1:] = -torch.inf  # all start alike; one is enough
        self.pending: list[tuple[Tensor, Slots]] = []  # inputs that the cache does not hold yet

    def write(self, types: list[int]) -> None:
        """Writes types to their ends: the one of all problems, or those of each source's problems
        in turn."""
        model, shape = self.model, self.model.plans.shape
        problems, count = self.score_Qn.shape
        kind_R = torch.tensor(types, device=model.device).repeat_interleave(count)
        kind_R = kind_R.repeat(problems // len(types))
        offsets = [shape.offset(i) for i in range(shape.types)]
        self.length_R, self.budget_R, self.offset_R = (
            torch.tensor(x, device=kind_R.device)[kind_R]
            for x in (shape.lengths, model.dial.budget, offsets)
        )
        # A hypothesis is open while its type is neither ended by <EOS> nor full.
        self.open_R = torch.isfinite(self.score_Qn).flatten()
        self.feed(
            model.plans.separator_inputs(kind_R).unsqueeze(1), 0, torch.ones_like(self.open_R)
        )
        longest = max(shape.lengths[i] for i in types)
        step = model.config.multi_token if self.search.independent else 1
        for first in range(0, longest, step):
            at_once = min(step, longest - first)
            h_RnD = self.next_states(kind_R, first, at_once)
            logits_RnM = model.plans.row_logits(model.normed(h_RnD), kind_R, types)
            for j in range(at_once):
                self.append(kind_R, first + j, logits_RnM[:, j])
            if not bool(self.open_R.any()):
                break
        # What is in none of the rows need not go through the base.
        self.pending = [x for x in self.pending if bool(x[1].valid.any())]

    def feed(self, x_RnD: Tensor, position: int, valid_R: Tensor, query: bool = False) -> None:
        """Inputs for the next pass, from `position` of their type on. Queries all stand after the
        input before them, in parallel."""
        first = self.context.slots.length + sum(slots.length for _, slots in self.pending)
        further_n = torch.arange(position, position + x_RnD.shape[1], device=x_RnD.device)
        valid_Rn = valid_R[:, None].expand(-1, len(further_n))
        slots = Slots.text(self.start_R1 + further_n, valid_Rn, first)
        if query:
            slots = slots._replace(order=torch.full_like(slots.order, first - 1), query=valid_Rn)
        self.pending.append((x_RnD.to(self.model.backbone.dtype), slots))

    def next_states(self, kind_R: Tensor, first: int, count: int) -> Tensor:
        """(R, count, D) last states that the next concepts are predicted from, number `first` and
        those after it."""
        queries = count - 1
        if queries:
            x_RnD = self.model.query_inputs(kind_R)[:, :queries]
            self.feed(x_RnD, first + 1, torch.ones_like(self.open_R), query=True)
        inputs, slots = zip(*self.pending, strict=True)
        self.pending = []
        query = slots[0].then(*slots[1:])
        key = self.context.slots.then(query)
        h_RnD = self.model.run(torch.cat(inputs, 1), query, key, self.context.cache)
        self.context.slots = key
        if queries:  # they leave the cache again
            self.context.slots = key.pick((slice(None), slice(-queries)))
            for layer in self.context.cache.layers:
                layer.keys = layer.keys[:, :, :-queries]
                layer.values = layer.values[:, :, :-queries]
        return h_RnD[:, -count:]

    def append(self, kind_R: Tensor, j: int, logits_RM: Tensor) -> None:
        """Concept number j, or `<EOS>`, of every open hypothesis: chosen, put into the plans and
        fed."""
        model, shape = self.model, self.model.plans.shape
        problems, count = self.score_Qn.shape
        self.open_R &= j < self.length_R
        log_p_RM = logits_RM.log_softmax(-1)
        log_p_RM[:, :-1].masked_fill_((j >= self.budget_R)[:, None], -torch.inf)
        # One that is closed goes on as it is: its <EOS> costs nothing, all else is impossible.
        closed_M = torch.full_like(log_p_RM[0], -torch.inf)
        closed_M[-1] = 0.0
        log_p_RM = torch.where(self.open_R[:, None], log_p_RM, closed_M)
        log_p_QnM = log_p_RM.view(problems, count, -1)
        total_QnM = self.score_Qn.unsqueeze(-1) + log_p_QnM
        chosen_Qn = self.search.choose(total_QnM, log_p_QnM, self.open_R.view(problems, count))
        self.score_Qn = total_QnM.flatten(1).gather(1, chosen_Qn)
        eos = log_p_RM.shape[1] - 1
        id_R = (chosen_Qn % (eos + 1)).flatten()
        if not self.search.independent:
            self.follow(chosen_Qn // (eos + 1))
        self.open_R = self.open_R & (id_R < eos) & torch.isfinite(self.score_Qn).flatten()
        id_R = id_R.masked_fill(~self.open_R, 0)
        slot_R1 = (self.offset_R + j).clamp(max=shape.slots - 1)[:, None]
        written_RP = self.plan_RP.scatter(1, slot_R1, id_R[:, None])
        self.plan_RP = torch.where(self.open_R[:, None], written_RP, self.plan_RP)
        self.feed(model.plans.concept_inputs(id_R, kind_R).unsqueeze(1), j + 1, self.open_R)

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
