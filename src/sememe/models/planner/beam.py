"""Search for plans: a KV cache of sources → (B, n, P) plans and their log-probabilities, greedy, by
beams, by diverse beams or by sampling.

A plan is written type by type, each within its own vocabulary, its `<EOS>` included. Types that are
written in parallel are rows of their own, so that one step serves all of them. Suffixes as in
`concepts/plan.py`; B sources · Q problems: a source's type in the making, or its whole plan · n
hypotheses of a problem · R = Q · n rows of the search · S concepts that a step writes."""

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
        types = list(range(model.plans.shape.types))
        groups = [types] if model.config.parallel else [[i] for i in types]
        hypotheses = Hypotheses(model, context, self, len(groups[0]))
        with adapter(model.backbone, PLANNER):
            for kinds in groups:
                hypotheses.write(kinds)
        plan_BnP, score_Bn = hypotheses.combined(len(groups[0]))
        if self.independent and model.config.multi_token > 1:
            # Concepts were chosen from what was known some concepts earlier: score them anew.
            score_Bn = model.plan_log_prob(plan_BnP.flatten(0, 1), context).view_as(score_Bn)
        if not self.do_sample:
            sorted_Bn, order_Bn = score_Bn.sort(dim=1, descending=True, stable=True)
            # The best one fills up where there are fewer.
            order_Bn = torch.where(sorted_Bn == -torch.inf, order_Bn[:, :1], order_Bn)
            plan_BnP, score_Bn = _pick(plan_BnP, order_Bn), score_Bn.gather(1, order_Bn)
        return plan_BnP[:, : self.num_return], score_Bn[:, : self.num_return]

    def choose(self, log_p_QnM: Tensor, open_Qn: Tensor) -> Tensor:
        """(Q, n) next ids of hypotheses that do not compete."""
        if self.do_sample:
            return self.draw(log_p_QnM)
        taken_QM = torch.zeros_like(log_p_QnM[:, 0])
        chosen = []
        for log_p_QM, open_Q in zip(log_p_QnM.unbind(1), open_Qn.unbind(1), strict=True):
            id_Q1 = (log_p_QM - self.diversity * taken_QM).argmax(-1, keepdim=True)
            taken_QM = taken_QM.scatter_add(1, id_Q1, open_Q[:, None].to(taken_QM))
            chosen.append(id_Q1)
        return torch.cat(chosen, 1)

    def draw(self, logits: Tensor) -> Tensor:
        """(…,) the most likely ids of (…, M) logits, or samples of their softmax, by Gumbel noise:
        a generator of any device will do."""
        if self.do_sample:
            device = logits.device if self.generator is None else self.generator.device
            noise = torch.rand(logits.shape, generator=self.generator, device=device)
            wait = -torch.log(noise.to(logits.device).clamp(min=1e-20))
            logits = logits.float() / self.temperature - torch.log(wait.clamp(min=1e-20))
        return logits.argmax(-1)


class Hypotheses:
    """Plans in the making, n for each of Q problems, over one KV cache.

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
        rows = len(self.source.position)
        self.plan_RP = torch.full((rows, model.plans.shape.slots), NULL, device=model.device)
        self.score_Qn = torch.zeros(rows // count, count, device=model.device)
        if not search.independent:
            self.score_Qn[:, 1:] = -torch.inf  # all start alike; one is enough
        self.pending: list[Tensor] = []  # (R,) inputs that the cache does not hold yet

    def write(self, kinds: list[int]) -> None:
        """Writes types to their ends: the one of all problems, or those of each source's problems
        in turn."""
        lengths = [self.model.plans.shape.lengths[kind] for kind in kinds]
        problems, count = self.score_Qn.shape
        kind_T = torch.tensor(kinds, device=self.plan_RP.device)
        self.kind_R = kind_T.repeat_interleave(count).repeat(problems // len(kinds))
        # A hypothesis is open while its type is neither ended by <EOS> nor full.
        self.open_R = torch.isfinite(self.score_Qn).flatten()
        self.pending.append(self.kind_R)  # the separators
        step = self.model.config.multi_token if self.search.independent else 1
        for first in range(0, max(lengths), step):
            logits_RSM = self.next_logits(first, min(step, max(lengths) - first))
            for j, logits_RM in enumerate(logits_RSM.unbind(1), first):
                self.append(j, logits_RM)
            if not bool(self.open_R.any()):
                break

    def next_logits(self, first: int, count: int) -> Tensor:
        """(R, S, M) of concept number `first` of each row's type, and of the `count` - 1 after
        it."""
        model, context, queries = self.model, self.context, count - 1
        shape = model.plans.shape
        anchor_RI = torch.full_like(self.plan_RP[:, : shape.types], first)
        x_RnD, slots = model.plan_inputs(self.plan_RP, self.source, anchor_RI if queries else None)
        ask_R = len(shape.kind_C) + self.kind_R * (model.config.multi_token - 1)
        input_Rn = torch.stack([*self.pending, *(ask_R + n for n in range(queries))], 1)
        self.pending = []
        index = torch.arange(len(input_Rn), device=input_Rn.device)[:, None], input_Rn
        query = slots.pick(index)
        key = context.slots.then(query)
        h_RnD = model.run(x_RnD[index], query, key, context.cache)
        context.slots = key
        if queries:  # they leave the cache again
            context.slots = key.pick((slice(None), slice(-queries)))
            context.cache.crop(-queries)
        return model.plans.logits(model.normed(h_RnD[:, -count:]), self.kind_R[:, None])

    def append(self, j: int, logits_RM: Tensor) -> None:
        """Concept number j, or `<EOS>`, of every open hypothesis: chosen, and put into the
        plans."""
        shape, search, (problems, count) = self.model.plans.shape, self.search, self.score_Qn.shape
        first_R, length_R, budget_R = (
            torch.as_tensor(x, device=logits_RM.device)[self.kind_R]
            for x in (shape.first_I, shape.lengths, self.model.dial.budget)
        )
        self.open_R &= j < length_R
        log_p_RM = logits_RM.log_softmax(-1)
        log_p_RM[:, :-1].masked_fill_((j >= budget_R)[:, None], -torch.inf)
        # One that is closed goes on as it is: its <EOS> costs nothing, all else is impossible.
        log_p_RM[~self.open_R] = -torch.inf
        log_p_RM[~self.open_R, -1] = 0.0
        log_p_QnM = log_p_RM.view(problems, count, -1)
        if search.independent:
            id_Qn = search.choose(log_p_QnM, self.open_R.view(problems, count))
            self.score_Qn += log_p_QnM.gather(2, id_Qn.unsqueeze(2)).squeeze(2)
        else:
            total_QnM = self.score_Qn.unsqueeze(-1) + log_p_QnM
            self.score_Qn, best_Qn = total_QnM.flatten(1).topk(count, dim=1)
            parent_Qn, id_Qn = best_Qn // log_p_RM.shape[1], best_Qn % log_p_RM.shape[1]
            first_Q1 = count * torch.arange(problems, device=best_Qn.device)[:, None]
            self.follow((first_Q1 + parent_Qn).flatten())
        id_R = id_Qn.flatten()
        self.open_R &= (id_R < shape.eos) & torch.isfinite(self.score_Qn).flatten()
        # What is in none of the rows need not go through the base.
        if bool(self.open_R.any()):
            # Of a type that is full beside a longer one the last slot stays as it is.
            slot_R = first_R + (length_R - 1).clamp(max=j)
            written_RP = self.plan_RP.scatter(1, slot_R[:, None], id_R[:, None])
            self.plan_RP = torch.where(self.open_R[:, None], written_RP, self.plan_RP)
            self.pending.append(shape.types + slot_R)

    def follow(self, parent_R: Tensor) -> None:
        """Each hypothesis goes on from its parent."""
        self.context.cache.batch_select_indices(parent_R)
        self.context.slots = self.context.slots.pick(parent_R)
        self.plan_RP, self.open_R = self.plan_RP[parent_R], self.open_R[parent_R]

    def combined(self, together: int) -> tuple[Tensor, Tensor]:
        """(B, n, P) plans and their scores, of types that were written in parallel: the n best of
        all combinations, or where hypotheses do not compete each with its own number."""
        count = self.search.count
        score_BIn = self.score_Qn.unflatten(0, (-1, together))
        plan_BInP = self.plan_RP.unflatten(0, (-1, together, count))
        if self.search.independent:
            return plan_BInP.amax(1), score_BIn.sum(1)
        plan_BnP, score_Bn = plan_BInP[:, 0], score_BIn[:, 0]
        for i in range(1, together):
            pairs_Bm = (score_Bn.unsqueeze(2) + score_BIn[:, i].unsqueeze(1)).flatten(1)
            score_Bn, best_Bn = pairs_Bm.topk(count, dim=1)
            other_BnP = _pick(plan_BInP[:, i], best_Bn % count)
            # A type's slots are NULL in the plans of the others.
            plan_BnP = torch.maximum(_pick(plan_BnP, best_Bn // count), other_BnP)
        return plan_BnP, score_Bn


def _pick(plan_BnP: Tensor, index_Bm: Tensor) -> Tensor:
    return plan_BnP.gather(1, index_Bm.unsqueeze(-1).expand(-1, -1, plan_BnP.shape[2]))
