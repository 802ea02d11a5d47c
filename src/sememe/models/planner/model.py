"""Planner and executor: (B, U) source → (B, P) plan → (B, Y) text, (B, Y, V) logits.

    BOS u SEP_1 z¹… SEP_2 z²… ─ base + adapter "planner" ─ p(z | u)
    BOS   SEP_1 z¹… SEP_2 z²… SEP_text y… ─ base + adapter "executor" ─ p(y | z)

One frozen base, two adapters; the executor never sees u. Each type has a vocabulary and an `<EOS>`
of its own. Positions start again at each type: its separator has position 0 and its j-th concept
position j (in the planner counted from the end of u), and the text follows the longest type,
whatever the plan. Slots after a type's end are seen by nobody. With `multi_token` = m, a step of
the planner writes m concepts: m - 1 learned queries after the last one ask for the others.

Suffixes as in `concepts/plan.py`; U source tokens · S = 1 + U with the BOS · Y text tokens · n
inputs of a pass."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from sememe.backbone.adapters import adapter, add_lora
from sememe.backbone.split import Spine
from sememe.concepts.masks import mask_of
from sememe.concepts.plan import IGNORED, NULL, PlanCodes
from sememe.errors import RecipeError
from sememe.models.adapted import AdaptedModel
from sememe.models.configuration import PlannerConfig
from sememe.models.losses import cross_entropy, token_losses
from sememe.models.planner.beam import PLANNER, PlanSearch
from sememe.models.planner.executor import EXECUTOR, target_states, write
from sememe.models.planner.losses import differentiated, mean_nll
from sememe.models.planner.signals import SignalProbe
from sememe.models.planner.slots import NEVER, Context, Slots, plan_slots

FRAME_ROWS = 4096  # embeddings that mean and scale are taken from


@dataclass
class PlannerOutput(CausalLMOutputWithPast):
    """`logits` (B, Y, V) of each target token; None in training. `target_nll`: nats per target
    token; `plan_nll`: nats per concept, `<EOS>` included; `plan_logits`: (B, P, M); `plan_ids`: the
    plan that was read; `signal_nll`: nats per label, summed over the signals. In training the
    planner is reached through `loss` alone."""

    target_nll: Tensor | None = None
    plan_nll: Tensor | None = None
    plan_logits: Tensor | None = None
    plan_ids: Tensor | None = None
    signal_nll: Tensor | None = None


@dataclass
class PlannerDial:
    """What may change while a planner runs; its configuration never does.

    plan_weight: of the plan's own cross entropy in the loss.
    straight_through: what the executor reads passes its gradient on to the planner.
    budget: concepts of each type at most."""

    plan_weight: float
    straight_through: bool
    budget: tuple[int, ...]


class PlannerForCausalLM(AdaptedModel):
    """The base with two adapters, and the plan's vocabularies between them."""

    config_class = PlannerConfig
    foldable = False
    _keep_in_fp32_modules_strict = [
        *AdaptedModel._keep_in_fp32_modules_strict,
        r"^(plans|probes|signals)\b",
    ]

    def __init__(self, config: PlannerConfig, backbone=None):
        super().__init__(config, backbone)
        config.check()
        shape, width = config.plan_shape, config.text_config.hidden_size
        self.dial = PlannerDial(config.plan_weight, config.straight_through, shape.lengths)
        self.plans = PlanCodes(shape, width)
        self.probes = (
            nn.Embedding(config.multi_token - 1, width) if config.multi_token > 1 else None
        )
        self.signals = SignalProbe(shape.types * width) if config.plan_signals > 0 else None
        self.start_plans(config.seed)
        self.finish()

    @property
    def spine(self) -> Spine:
        """The base, layer by layer."""
        return Spine(self.backbone)

    def add_adapters(self) -> None:
        for name in (PLANNER, EXECUTOR):
            add_lora(self.backbone, self.config, name)

    @torch.no_grad()
    def start_plans(self, seed: int = 0) -> None:
        """New modules as if drawn from the base's embeddings; all concepts about equally likely."""
        vocab = self.config.text_config.vocab_size
        ids = torch.arange(0, vocab, max(1, vocab // FRAME_ROWS), device=self.device)
        self.plans.start(self.spine.embed(ids), seed)
        if self.probes is not None:
            generator = torch.Generator().manual_seed(seed + 1)
            self.probes.weight.copy_(torch.randn(self.probes.weight.shape, generator=generator))

    def run(
        self, x_BnD: Tensor, query: Slots, key: Slots, cache: DynamicCache | None = None
    ) -> Tensor:
        """(B, n, D) last states by the adapter that is on. `key`: the cached slots and these."""
        spine = self.spine
        attention = self.backbone.config._attn_implementation

        def mask(window: int | None) -> Tensor | None:
            def seen(rows: slice) -> Tensor:
                return query.pick((slice(None), rows)).sees(key, window)

            shape = *query.position.shape, key.length
            return mask_of(seen, shape, x_BnD.dtype, attention)

        rope = spine.rope(x_BnD, query.position)
        return spine.run(0, len(spine), x_BnD, query.position, rope, mask, cache)

    # ---- the planner ----

    def source(self, source_BU: Tensor, source_mask: Tensor | None = None) -> Context:
        """(B, U) sources as inputs, the BOS first and then, on the right, what there is of each,
        whatever side the padding was on; a source that is too long keeps its end."""
        source_BU = source_BU.to(self.device)
        mask_BU = torch.ones_like(source_BU) if source_mask is None else source_mask.to(self.device)
        limit = self.config.plan_max_source or source_BU.shape[1]
        last_BU = mask_BU.argsort(dim=1, stable=True)[:, -limit:]
        ids_BS = F.pad(source_BU.gather(1, last_BU), (1, 0), value=self.bos)
        valid_BS = F.pad(mask_BU.gather(1, last_BU), (1, 0), value=1).bool()
        order_S = torch.arange(ids_BS.shape[1], device=self.device)
        slots = Slots.of(valid_BS.cumsum(1) - 1, torch.where(valid_BS, order_S, NEVER))
        return Context(slots, self.spine.embed(ids_BS))

    def encode_source(self, source_BU: Tensor, source_mask: Tensor | None = None) -> Context:
        """(B, U) sources in a KV cache, for all plans that are searched or scored."""
        source = self.source(source_BU, source_mask)
        cache = DynamicCache()
        with adapter(self.backbone, PLANNER):
            self.run(source.inputs_BnD, source.slots, source.slots, cache)
        return Context(source.slots, source.inputs_BnD[:, :0], cache)

    def plan_states(
        self, plan_BP: Tensor, context: Context, anchor_BI: Tensor | None = None
    ) -> Tensor:
        """(B, C, D) last states at the plan's inputs, teacher forced; with `anchor` (B, I) those of
        the queries after them, all of type 0 first. Plans of source 0 first, as many for each."""
        source = context.repeated(len(plan_BP) // len(context.inputs_BnD))
        x_BnD, slots = self.plan_inputs(plan_BP, source.slots, anchor_BI)
        key = source.slots.then(slots)
        query = key if source.cache is None else slots
        with adapter(self.backbone, PLANNER):
            h_BnD = self.run(torch.cat([source.inputs_BnD, x_BnD], 1), query, key, source.cache)
        return h_BnD[:, -x_BnD.shape[1] :]

    def plan_inputs(
        self, plan_BP: Tensor, source: Slots, anchor_BI: Tensor | None = None
    ) -> tuple[Tensor, Slots]:
        """(B, C, D) inputs of plans after their sources; with `anchor` (B, I) also the queries for
        the concepts after number `anchor` of each type, which see what precedes that one:
        (B, C + I (m - 1), D)."""
        shape, x_BnD = self.plans.shape, self.plans.inputs(self.plans(plan_BP))
        start_B1 = source.position[:, -1:] + 1
        slots = plan_slots(shape, plan_BP, start_B1, source.length, self.config.parallel)
        if anchor_BI is not None:
            kind_n, further_n = self.queries()
            query_nD = self.plans.to_states(self.probes(further_n - 1))
            query_BnD = self.plans.typed(query_nD, kind_n).expand(len(x_BnD), -1, -1)
            x_BnD = torch.cat([x_BnD, query_BnD], 1)
            anchor_Bn = anchor_BI[:, kind_n]
            order_Bn = slots.order[:, kind_n] + anchor_Bn
            position_Bn = start_B1 + anchor_Bn + further_n
            slots = slots.then(Slots.of(position_Bn, order_Bn, kind_n, query=True))
        return x_BnD.to(self.dtype), slots

    def queries(self) -> tuple[Tensor, Tensor]:
        """(n,) the type of each query, and how far after the anchor it asks."""
        types, further = self.plans.shape.types, len(self.probes.weight)
        kind_n = torch.arange(types, device=self.device).repeat_interleave(further)
        return kind_n, torch.arange(1, further + 1, device=self.device).repeat(types)

    def normed(self, h: Tensor) -> Tensor:
        """(…, D) last states at scale 1, past the base's own last norm, fp32."""
        return F.rms_norm(self.spine.decoder.norm(h).float(), h.shape[-1:])

    def slot_logits(self, h_BnD: Tensor) -> Tensor:
        """(B, P, M) of what stands in each slot, from `plan_states`."""
        shape = self.plans.shape
        return self.plans.logits(self.normed(h_BnD[:, shape.input_P]), shape.kind_P)

    def plan_logits(self, plan_BP: Tensor, context: Context) -> Tensor:
        """(B, P, M) teacher forced, of what stands in each slot, `<EOS>` last. After the end of a
        type they mean nothing: see `PlanShape.targets`."""
        return self.slot_logits(self.plan_states(plan_BP, context))

    def plan_log_prob(self, plan_BP: Tensor, context: Context) -> Tensor:
        """(B,) log p(z | u) in nats, with the `<EOS>` of each type that is not full."""
        logits_BPM = self.plan_logits(plan_BP, context)
        return -cross_entropy(logits_BPM, self.plans.shape.targets(plan_BP)).sum(1)

    # ---- the executor ----

    def executor_logits(
        self, plan_BP: Tensor, target_BY: Tensor, plan_embeddings: Tensor | None = None
    ) -> Tensor:
        """(B, Y, V) logits of each target token, given the plan and the tokens before it.
        `plan_embeddings` (B, P, D): read instead of the concepts' own states, `self.plans(plan)`;
        slots that are NULL in the plan stay unseen."""
        h_BYD = target_states(self, plan_BP, target_BY, plan_embeddings)
        return self.spine.logits(h_BYD)

    def target_nll(
        self, plan_BP: Tensor, target_BY: Tensor, plan_embeddings: Tensor | None = None
    ) -> Tensor:
        """(B, Y) nats of each target token, 0 where it is -100. There are never the logits of more
        than a few of them."""
        h_BYD = target_states(self, plan_BP, target_BY, plan_embeddings)
        states_BYD = self.spine.decoder.norm(h_BYD)
        return token_losses(self.get_output_embeddings(), target_BY, states_BYD)

    # ---- losses ----

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        plan_ids: Tensor | None = None,
        labels: Tensor | None = None,
        signals: dict[str, Tensor] | None = None,
        concepts_in_batch: Tensor | None = None,
        rows_in_batch: int | None = None,
        **kwargs,
    ) -> PlannerOutput:
        """The plan from the source and the text from the plan, both teacher forced. `loss`: nats
        per target token, and `plan_weight` times nats per concept, `plan_signals` times nats per
        label of what probes of the plan tell of the text.

        Args:
            input_ids, attention_mask: (B, U) the source, and 0 on its padding.
            plan_ids: (B, P); None for the planner's own, greedy.
            labels: (B, Y) the text, -100 after its end; None for the plan's part alone.
            signals: of the texts, `SignalReader`'s labels; None to leave them out.
            concepts_in_batch, rows_in_batch: where this is one part of a batch, concepts and
                `<EOS>` of all of it, and its rows, as `num_items_in_batch` has its target
                tokens."""
        self.refuse_unknown(kwargs)
        config, dial = self.config, self.dial
        if plan_ids is None:
            plan_ids = self.plan(input_ids, attention_mask)[0][:, 0]
        out = self._plan_losses(self.source(input_ids, attention_mask), plan_ids)
        if labels is None:
            return out
        e_BPD = self.plans(plan_ids)
        if dial.straight_through and torch.is_grad_enabled():
            # The concept's state, exactly; backward the gradient of the mixture as well.
            soft_BPD = self.plans.soft(out.plan_logits, config.code_temperature)
            e_BPD = e_BPD + (soft_BPD - soft_BPD.detach())
        extra = dial.plan_weight * out.loss
        if concepts_in_batch is not None:
            own = (self.plans.shape.targets(plan_ids) != IGNORED).sum()
            extra = extra * (own / concepts_in_batch)
        if signals:
            out.signal_nll = sum(self.signals(self.plans.means(plan_ids, e_BPD), signals).values())
            share = len(plan_ids) / (rows_in_batch or len(plan_ids))
            extra = extra + config.plan_signals * share * out.signal_nll
        if self.training and config.plan_dropout > 0:
            lost_B1 = torch.rand(len(plan_ids), 1, device=plan_ids.device) < config.plan_dropout
            plan_ids = plan_ids.masked_fill(lost_B1, NULL)
        if self.training:
            total = self.target_nll(plan_ids, labels, e_BPD).sum()
        else:
            out.logits = self.executor_logits(plan_ids, labels, e_BPD)
            total = cross_entropy(out.logits, labels).sum()
        tokens = (labels != IGNORED).sum().clamp(min=1)
        out.target_nll = total / tokens
        # Of a batch in several parts the Trainer says how many tokens all of them have.
        count = kwargs.get("num_items_in_batch")
        out.loss = total / (tokens if count is None else count) + extra
        if self.training:
            # Nothing is left without a gradient, so that Adam counts the same steps for all.
            trained = (p.float().sum() for p in self.parameters() if p.requires_grad)
            out.loss = out.loss + sum(trained) * 0.0
        return out

    def _plan_losses(self, source: Context, plan_BP: Tensor) -> PlannerOutput:
        """Logits and cross entropy of the plan; `loss`: with that of the queries."""
        dial, shape = self.dial, self.plans.shape
        anchor_BI = None
        if self.probes is not None and self.training:  # they learn at random positions
            counts_BI = shape.counts(plan_BP)
            random_BI = torch.rand(counts_BI.shape, device=counts_BI.device)
            anchor_BI = (random_BI * (counts_BI + 1)).long()
        wanted = dial.plan_weight > 0 or dial.straight_through
        with torch.set_grad_enabled(torch.is_grad_enabled() and wanted):
            h_BnD = self.plan_states(plan_BP, source, anchor_BI)
            logits_BPM = self.slot_logits(h_BnD)
            target_BP = shape.targets(plan_BP)
            loss = plan_nll = mean_nll(logits_BPM, target_BP)
            if anchor_BI is not None:
                queries_BnD = h_BnD[:, shape.types + shape.slots :]
                loss = plan_nll + self._query_loss(queries_BnD, anchor_BI, target_BP)
        if self.training and not dial.straight_through and loss.requires_grad:
            # The text does not depend on the planner's activations: its gradients are taken now, so
            # that they need not wait for the executor's.
            loss = differentiated(loss, self.parameters())
            plan_nll = plan_nll.detach()
            logits_BPM = logits_BPM.detach()
        return PlannerOutput(loss=loss, plan_nll=plan_nll, plan_logits=logits_BPM, plan_ids=plan_BP)

    def _query_loss(self, h_BnD: Tensor, anchor_BI: Tensor, target_BP: Tensor) -> Tensor:
        """Nats per concept of those that the queries ask for."""
        shape = self.plans.shape
        kind_n, further_n = self.queries()
        number_Bn = anchor_BI[:, kind_n] + further_n
        first_n, length_n = (
            torch.as_tensor(x, device=self.device)[kind_n] for x in (shape.first_I, shape.lengths)
        )
        slot_Bn = (first_n + number_Bn).clamp(max=shape.slots - 1)
        wanted_Bn = target_BP.gather(1, slot_Bn).masked_fill(number_Bn >= length_n, IGNORED)
        return mean_nll(self.plans.logits(self.normed(h_BnD), kind_n), wanted_Bn)

    # ---- use ----

    def limit(self, budget: Sequence[float]) -> None:
        """Concepts of each type at most from now on: a number for each, or one for all. Raises
        RecipeError for others."""
        lengths = self.plans.shape.lengths
        wanted = [*budget] * (len(lengths) if len(budget) == 1 else 1)
        if len(wanted) != len(lengths) or any(count < 0 or count % 1 for count in wanted):
            raise RecipeError(
                f"a budget of {budget} concepts: need whole numbers, one for all or one for each "
                f"of {len(lengths)} types. try: --rate {','.join(map(str, lengths))}"
            )
        self.dial.budget = tuple(map(int, wanted))

    def plan(
        self, source_BU: Tensor, source_mask: Tensor | None = None, **search
    ) -> tuple[Tensor, Tensor]:
        """(B, n, P) plans of (B, U) sources and their (B, n) log-probabilities in nats: those that
        `PlanSearch(**search)` finds; greedy without options."""
        with torch.no_grad():
            return PlanSearch(**search)(self, self.encode_source(source_BU, source_mask))

    def write(self, plan_BP: Tensor, max_new_tokens: int = 128, **sampling) -> list[list[int]]:
        """The token ids that each row's plan is written out as, up to its end of text, which is
        left out. `sampling`: do_sample, temperature and generator; greedy without."""
        return write(self, plan_BP, max_new_tokens, PlanSearch(**sampling))

    @property
    def stops(self) -> list[int]:
        """Ids that end a text."""
        ids = self.generation_config.eos_token_id
        return ids if isinstance(ids, list) else [] if ids is None else [ids]

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        max_new_tokens: int = 128,
        **search,
    ) -> Tensor:
        """Plans, and writes the best plan out: (B, U + new) ids as transformers' own `generate`,
        filled up with the end of text. `search`: options of `PlanSearch`; drawing is for plans and
        texts."""
        plan_BP = self.plan(input_ids, attention_mask, **search)[0][:, 0]
        end = [*self.stops, 0][0]
        texts = self.write(plan_BP, max_new_tokens, **search)
        rows = [torch.tensor([*row, end], device=input_ids.device) for row in texts]
        new_BY = pad_sequence(rows, batch_first=True, padding_value=end)[:, :max_new_tokens]
        return torch.cat([input_ids, new_BY], 1)
