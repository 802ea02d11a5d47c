"""Planner in use: (B, U) source ids → (B, n, P) plans → text, both with a KV cache, all rows at
once.

A plan is searched type by type, each within its own vocabulary, its `<EOS>` included. Types that
are written in parallel are rows of their own, so that one step serves all of them. Suffixes as in
`concepts/plan.py`; U source tokens · S = 1 + U with the BOS · n columns of one pass, or hypotheses
of a row · R rows of a search · M the largest K_i, and `<EOS>`."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache

from sememe.backbone.adapters import adapter
from sememe.backbone.split import Spine
from sememe.concepts.masks import Lane
from sememe.concepts.plan import NULL
from sememe.errors import RecipeError

PLANNER, EXECUTOR = "planner", "executor"


class Columns(NamedTuple):
    """Where (B, n) inputs stand: `position` in RoPE; in `lane` the order of the columns is
    `position`, the type is `written`, and `concept` says that every type may see this one. `probe`:
    a query for a concept further on, which only its like see."""

    position: Tensor
    lane: Lane
    probe: Tensor

    @classmethod
    def plain(cls, position: Tensor, valid: Tensor) -> "Columns":
        """Columns that everything behind them may see."""
        order = torch.arange(position.shape[1], device=position.device).expand_as(position)
        lane = Lane(order, torch.full_like(order, -1), torch.ones_like(valid), valid)
        return cls(position, lane, torch.zeros_like(valid))

    def then(self, other: "Columns") -> "Columns":
        return Columns(
            torch.cat([self.position, other.position], 1),
            self.lane.then(other.lane),
            torch.cat([self.probe, other.probe], 1),
        )

    def pick(self, index) -> "Columns":
        return Columns(
            self.position[index], Lane(*(x[index] for x in self.lane)), self.probe[index]
        )


@dataclass
class SourceContext:
    """A source as the planner has read it, for any number of plans."""

    cache: DynamicCache
    key: Columns
    length_B1: Tensor  # with the BOS

    def bytes(self) -> int:
        """Of the cache."""
        tensors = [x for layer in self.cache.layers for x in (layer.keys, layer.values)]
        return sum(x.element_size() * x.numel() for x in tensors)

    def pick(self, rows: Tensor) -> "SourceContext":
        """The same for these rows, with a cache of its own."""
        cache = DynamicCache()
        for i, layer in enumerate(self.cache.layers):
            cache.update(layer.keys[rows], layer.values[rows], i)
        return SourceContext(cache, self.key.pick(rows), self.length_B1[rows])


@dataclass
class Choice:
    """How the next concept is chosen: the best `beams` of all hypotheses, each its own way with
    `diversity`, or by sampling.

    Diverse: hypothesis h loses `diversity` nats for each one before it that has chosen the same
    concept in this step (diverse beam search, arXiv 1610.02424, with groups of one)."""

    beams: int
    diversity: float = 0.0
    sample: bool = False
    temperature: float = 1.0
    generator: torch.Generator | None = None

    @property
    def alone(self) -> bool:
        """Hypotheses do not compete."""
        return self.sample or self.diversity > 0

    def __call__(
        self, score_QnM: Tensor, step_QnM: Tensor, open_Qn: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(Q, n) parents and (Q, n) choices. `step`: log-probabilities of this step's choices,
        `score`: with all before them."""
        count = step_QnM.shape[1]
        parent_Qn = torch.arange(count, device=step_QnM.device).expand_as(open_Qn)
        if self.sample:
            return parent_Qn, pick_one(step_QnM, self.temperature, self.generator)
        if self.diversity > 0:
            taken_QM, chosen = torch.zeros_like(step_QnM[:, 0]), []
            for h in range(count):
                choice_Q1 = (step_QnM[:, h] - self.diversity * taken_QM).argmax(-1, keepdim=True)
                taken_QM = taken_QM.scatter_add(1, choice_Q1, open_Qn[:, h : h + 1].to(taken_QM))
                chosen.append(choice_Q1)
            return parent_Qn, torch.cat(chosen, 1)
        best_Qn = score_QnM.flatten(1).topk(count, dim=1).indices
        return best_Qn // step_QnM.shape[2], best_Qn % step_QnM.shape[2]


def pick_one(logits: Tensor, temperature: float, generator: torch.Generator | None) -> Tensor:
    """(…,) samples of the softmax of (…, M) logits, by Gumbel noise: a generator of any device will
    do."""
    device = logits.device if generator is None else generator.device
    noise = torch.rand(logits.shape, generator=generator, device=device).to(logits.device)
    wait = -torch.log(noise.clamp(min=1e-20))
    return (logits.float() / temperature - torch.log(wait.clamp(min=1e-20))).argmax(-1)


@dataclass
class Search:
    """Hypotheses in the making, n for each of Q problems: R = Q n rows over one cache."""

    model: "Planning"
    read: SourceContext
    plan_RP: Tensor
    score_Qn: Tensor
    waiting: list[tuple[Tensor, Columns]] = field(
        default_factory=list
    )  # inputs that the cache does not hold yet

    def feed(self, x_RnD: Tensor, place_n: Tensor, valid_Rn: Tensor, probe: bool = False) -> None:
        """Inputs for the next pass. `place_n`: their places in the type."""
        ahead = self.read.key.position.shape[1] + sum(
            columns.position.shape[1] for _, columns in self.waiting
        )
        position_Rn = self.read.length_B1 + place_n
        columns = Columns.plain(position_Rn, valid_Rn)
        order_Rn = columns.lane.position + ahead
        if probe:
            order_Rn = torch.full_like(order_Rn, ahead - 1)
        lane = columns.lane._replace(position=order_Rn)
        self.waiting.append((x_RnD, Columns(position_Rn, lane, torch.full_like(valid_Rn, probe))))

    def states(self, probes: int) -> Tensor:
        """(R, 1 + probes, D) last states of what was fed. Probes leave the cache again."""
        x_RnD = torch.cat([x for x, _ in self.waiting], 1)
        query = self.waiting[0][1]
        for _, columns in self.waiting[1:]:
            query = query.then(columns)
        spine, read, key = Spine(self.model.backbone), self.read, self.read.key.then(query)
        h_RnD = self.model.run(spine, x_RnD, query, key, read.cache)
        self.waiting, read.key = [], key
        if probes:
            read.key = key.pick((slice(None), slice(-probes)))
            for layer in read.cache.layers:
                layer.keys, layer.values = layer.keys[:, :, :-probes], layer.values[:, :, :-probes]
        return h_RnD[:, -1 - probes :]

    def pick(self, parent_Qn: Tensor) -> None:
        """Each hypothesis goes on from its parent."""
        count = parent_Qn.shape[1]
        rows = (
            torch.arange(len(parent_Qn), device=parent_Qn.device)[:, None] * count + parent_Qn
        ).flatten()
        self.read.cache.batch_select_indices(rows)
        self.read.key = self.read.key.pick(rows)
        self.plan_RP = self.plan_RP[rows]

    def write(self, kind_R: Tensor, choice: Choice, least: list[int], most: list[int]) -> None:
        """Writes a type to its end, in row r type kind_R[r]."""
        model, device, (rows, count) = (
            self.model,
            kind_R.device,
            (len(kind_R), self.score_Qn.shape[1]),
        )
        shape, group = (
            model.plans.shape,
            model.config.multi_token if choice.beams == 1 or choice.alone else 1,
        )
        kinds = sorted(set(kind_R.tolist()))
        least_R, most_R, length_R, offset_R = (
            torch.tensor(x, device=device)[kind_R]
            for x in (least, most, shape.lengths, [shape.offset(i) for i in range(shape.types)])
        )
        open_R, longest = (
            torch.isfinite(self.score_Qn).flatten(),
            max(shape.lengths[i] for i in kinds),
        )
        self.feed(
            model.separator_states(kind_R),
            torch.tensor([0], device=device),
            torch.ones_like(open_R)[:, None],
        )
        for start in range(0, longest, group):
            ahead = min(group, longest - start)
            if ahead > 1:
                place_n = torch.arange(start + 1, start + ahead, device=device)
                here_Rn = torch.ones_like(open_R)[:, None].expand(rows, ahead - 1)
                self.feed(model.probe_states(kind_R)[:, : ahead - 1], place_n, here_Rn, probe=True)
            logits_RnM = model.choice_logits(self.states(ahead - 1), kind_R, kinds)
            for j in range(start, start + ahead):
                open_R = open_R & (j < length_R)
                step_RM = logits_RnM[:, j - start].log_softmax(-1)
                step_RM[:, -1].masked_fill_(j < least_R, -torch.inf)
                step_RM[:, :-1].masked_fill_((j >= most_R)[:, None], -torch.inf)
                stay_M = F.pad(step_RM.new_full((step_RM.shape[1] - 1,), -torch.inf), (0, 1))
                step_QnM = torch.where(open_R[:, None], step_RM, stay_M).unflatten(0, (-1, count))
                score_QnM = self.score_Qn.unsqueeze(-1) + step_QnM
                parent_Qn, choice_Qn = choice(score_QnM, step_QnM, open_R.view(-1, count))
                if not choice.alone and count > 1:
                    self.pick(parent_Qn)
                    open_R = open_R.view(-1, count).gather(1, parent_Qn).flatten()
                    score_QnM = score_QnM.gather(1, parent_Qn.unsqueeze(-1).expand_as(score_QnM))
                self.score_Qn = score_QnM.gather(2, choice_Qn.unsqueeze(-1)).squeeze(-1)
                open_R = (
                    open_R
                    & (choice_Qn.flatten() < step_RM.shape[1] - 1)
                    & torch.isfinite(self.score_Qn).flatten()
                )
                chosen_R = choice_Qn.flatten().masked_fill(~open_R, 0)
                slot_R1 = (offset_R + j).clamp(max=shape.slots - 1)[:, None]
                self.plan_RP = torch.where(
                    open_R[:, None],
                    self.plan_RP.scatter(1, slot_R1, chosen_R[:, None]),
                    self.plan_RP,
                )
                self.feed(
                    model.concept_states(chosen_R, kind_R, kinds),
                    torch.tensor([j + 1], device=device),
                    open_R[:, None],
                )
            if not bool(open_R.any()):
                self.waiting = [
                    (x, columns) for x, columns in self.waiting if bool(columns.lane.valid.any())
                ]
                return


class Planning:
    """Mixin of the planner: how it is used."""

    def limit(self, most: Sequence[int]) -> None:
        """Sets the budget: a number for each type, or one for all. Raises RecipeError for
        others."""
        lengths, wanted = self.plans.shape.lengths, list(most)
        wanted = wanted * len(lengths) if len(wanted) == 1 else wanted
        if len(wanted) != len(lengths) or min(wanted) < 0:
            raise RecipeError(
                f"a budget of {', '.join(map(str, most))} concepts: need one number, or one for "
                "each of "
                f"{len(lengths)} types, of at least 0. try: --budget {','.join(map(str, lengths))}"
            )
        self.dial.budget = tuple(wanted)

    def encode_source(self, source_BU: Tensor, source_mask: Tensor | None = None) -> SourceContext:
        """The planner's pass over (B, U) sources, once for all plans that are to be searched or
        scored."""
        ids_BS, columns, length_B1 = self.source_columns(source_BU.to(self.device), source_mask)
        spine, cache = Spine(self.backbone), DynamicCache()
        with adapter(self.backbone, PLANNER):
            self.run(spine, spine.embed(ids_BS), columns, columns, cache)
        return SourceContext(cache, columns, length_B1)

    def plan(
        self, source_BU: Tensor, source_mask: Tensor | None = None, **search
    ) -> tuple[Tensor, Tensor]:
        """Plans of (B, U) sources: see `search`."""
        with torch.no_grad():
            context = self.encode_source(source_BU, source_mask)
        return self.search(context, **search)

    @torch.no_grad()
    def search(
        self,
        context: SourceContext,
        *,
        num_beams: int = 1,
        num_return: int = 1,
        diversity: float = 0.0,
        do_sample: bool = False,
        temperature: float = 1.0,
        min_length: int | tuple[int, ...] = 0,
        max_length: int | tuple[int, ...] | None = None,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(B, num_return, P) plans and their (B, num_return) log-probabilities in nats, the best
        first (samples as drawn).

        Where fewer plans exist than are asked for, the best one fills up.

        Args:
            num_beams: hypotheses kept; at least `num_return`. 1 is greedy.
            diversity: nats that a hypothesis loses for repeating another's concept; 0 for plain
                beams.
            do_sample, temperature, generator: draws instead. The log-probabilities are those at
                temperature 1.
            min_length, max_length: concepts of each type, or one number for all; the budget, where
                none is set by `limit`. A type is cut to what it can hold."""
        shape, parallel = self.plans.shape, self.config.parallel
        least, most = self._bounds(min_length, max_length)
        if temperature <= 0 or num_beams < 1 or num_return < 1 or diversity < 0:
            raise RecipeError(
                f"temperature = {temperature}, num_beams = {num_beams}, num_return = {num_return}, "
                "diversity = "
                f"{diversity}: need above 0, at least 1, 1 and 0. try: temperature=1 num_beams=4"
            )
        choice = Choice(
            num_return if do_sample else max(num_beams, num_return),
            diversity,
            do_sample,
            temperature,
            generator,
        )
        count = choice.beams
        rows, together = len(context.length_B1), shape.types if parallel else 1
        index_R = torch.arange(rows, device=self.device).repeat_interleave(together * count)
        score_Qn = torch.zeros(rows * together, count, device=self.device)
        if not choice.alone:
            score_Qn[:, 1:] = -torch.inf  # all start alike; one is enough
        search = Search(
            self,
            context.pick(index_R),
            torch.full((len(index_R), shape.slots), NULL, device=self.device),
            score_Qn,
        )
        with adapter(self.backbone, PLANNER):
            if parallel:
                kind_R = (
                    torch.arange(shape.types, device=self.device)
                    .repeat_interleave(count)
                    .repeat(rows)
                )
                search.write(kind_R, choice, least, most)
            else:
                for i in range(shape.types):
                    search.write(torch.full_like(index_R, i), choice, least, most)
        plan_BInP, score_BIn = (
            search.plan_RP.view(rows, together, count, -1),
            search.score_Qn.view(rows, together, count),
        )
        plan_BnP, score_Bn = plan_BInP[:, 0], score_BIn[:, 0]
        for i in range(1, together):
            plan_BnP, score_Bn = _joined(
                plan_BnP, score_Bn, plan_BInP[:, i], score_BIn[:, i], choice.alone
            )
        if self.config.multi_token > 1 and (
            choice.alone or count == 1
        ):  # chosen from what was known some concepts earlier
            flat_RP = plan_BnP.flatten(0, 1)
            score_Bn = self.plan_log_prob(flat_RP, context).view(rows, count)
        if not do_sample:
            score_Bn, order_Bn = score_Bn.sort(dim=1, descending=True, stable=True)
            plan_BnP = plan_BnP.gather(1, order_Bn.unsqueeze(-1).expand_as(plan_BnP))
            none_Bn = score_Bn == -torch.inf
            plan_BnP = torch.where(none_Bn.unsqueeze(-1), plan_BnP[:, :1], plan_BnP)
            score_Bn = torch.where(none_Bn, score_Bn[:, :1], score_Bn)
        return plan_BnP[:, :num_return], score_Bn[:, :num_return]

    def _bounds(self, least, most) -> tuple[list[int], list[int]]:
        shape = self.plans.shape
        most = (self.dial.budget or shape.lengths) if most is None else most
        least, most = ([x] * shape.types if isinstance(x, int) else list(x) for x in (least, most))
        fits = len(least) == len(most) == shape.types
        if fits:
            least, most = (
                [min(a, b) for a, b in zip(x, shape.lengths, strict=True)] for x in (least, most)
            )
        if not fits or min(least) < 0 or any(a > b for a, b in zip(least, most, strict=True)):
            raise RecipeError(
                f"min_length = {least} and max_length = {most}: need 0 ≤ min ≤ max for each of "
                f"{shape.types} types"
                ". try: min_length=0"
            )
        return least, most

    @torch.no_grad()
    def write(
        self,
        plan_BP: Tensor,
        max_new_tokens: int = 128,
        *,
        do_sample: bool = False,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> list[list[int]]:
        """The token ids that each row's plan is written out as, up to its end of text, which is
        left out."""
        spine, cache, stops = (
            Spine(self.backbone),
            DynamicCache(),
            torch.tensor(self.stops, device=self.device),
        )
        x_BnD, query = self.prefix(plan_BP.to(self.device))
        key, position_B1, written = query, query.position[:, -1:], []
        going_B = torch.ones(len(plan_BP), dtype=torch.bool, device=self.device)
        with adapter(self.backbone, EXECUTOR):
            while len(written) < max_new_tokens and bool(going_B.any()):
                h_BD = self.run(spine, x_BnD, query, key, cache)[:, -1]
                logits_BV = spine.logits(h_BD)
                token_B = (
                    pick_one(logits_BV, temperature, generator)
                    if do_sample
                    else logits_BV.argmax(-1)
                )
                going_B = going_B & ~torch.isin(token_B, stops)
                written.append(torch.where(going_B, token_B, NULL))
                x_BnD, position_B1 = spine.embed(token_B[:, None]), position_B1 + 1
                query = Columns.plain(position_B1, torch.ones_like(position_B1, dtype=torch.bool))
                query = query._replace(
                    lane=query.lane._replace(position=key.lane.position[:, -1:] + 1)
                )
                key = key.then(query)
        if not written:
            return [[] for _ in range(len(plan_BP))]
        return [row[row != NULL].tolist() for row in torch.stack(written, 1)]

    @property
    def stops(self) -> list[int]:
        """Ids that end a text."""
        found = self.generation_config.eos_token_id
        found = self.config.text_config.eos_token_id if found is None else found
        return [] if found is None else list(found) if isinstance(found, list | tuple) else [found]

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        max_new_tokens: int | None = None,
        *,
        do_sample: bool = False,
        temperature: float = 1.0,
        num_beams: int = 1,
        min_plan: int | tuple[int, ...] = 0,
        max_plan: int | tuple[int, ...] | None = None,
        plan_ids: Tensor | None = None,
        return_plan: bool = False,
        generator: torch.Generator | None = None,
    ):
        """Plans (unless `plan_ids` (B, P) are given), then writes: (B, U + new) ids as
        transformers' own `generate`, filled up with the end of text. With `return_plan` (ids,
        plans). `num_beams` is for plans; `min_plan`, `max_plan` bound a type."""
        if plan_ids is None:
            plan_ids = self.plan(
                input_ids,
                attention_mask,
                num_beams=num_beams,
                do_sample=do_sample,
                temperature=temperature,
                min_length=min_plan,
                max_length=max_plan,
                generator=generator,
            )[0][:, 0]
        most = max_new_tokens or self.generation_config.max_new_tokens or 128
        texts = self.write(
            plan_ids, most, do_sample=do_sample, temperature=temperature, generator=generator
        )
        fill = self.stops[0] if self.stops else 0
        width = min(most, max((len(row) for row in texts), default=0) + bool(self.stops))
        new_BY = torch.tensor(
            [row + [fill] * (width - len(row)) for row in texts],
            dtype=torch.long,
            device=self.device,
        )
        ids = torch.cat([input_ids.to(self.device), new_BY.view(len(texts), width)], 1)
        return (ids, plan_ids) if return_plan else ids


def _joined(
    plan_BnP: Tensor, score_Bn: Tensor, other_BnP: Tensor, more_Bn: Tensor, alone: bool
) -> tuple[Tensor, Tensor]:
    """Hypotheses of independent types put together: the n best of all pairs, or each with its own
    number."""
    if alone:
        return torch.maximum(plan_BnP, other_BnP), score_Bn + more_Bn
    count = score_Bn.shape[1]
    score_Bn, best_Bn = (score_Bn.unsqueeze(2) + more_Bn.unsqueeze(1)).flatten(1).topk(count, dim=1)
    a, b = (
        x.gather(1, i.unsqueeze(-1).expand_as(x))
        for x, i in ((plan_BnP, best_Bn // count), (other_BnP, best_Bn % count))
    )
    return torch.maximum(a, b), score_Bn
