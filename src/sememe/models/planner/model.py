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

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from sememe.backbone.adapters import adapter, add_lora
from sememe.backbone.split import Spine
from sememe.concepts.masks import allow
from sememe.concepts.plan import IGNORED, NULL, PlanCodes, straight_through
from sememe.errors import CheckpointError, RecipeError
from sememe.models.adapted import AdaptedModel
from sememe.models.configuration import PlannerConfig
from sememe.models.planner.beam import PlanSearch, draw
from sememe.models.planner.signals import SignalProbe
from sememe.models.planner.slots import Context, Slots
from sememe.models.settling import settled

PLANNER, EXECUTOR = "planner", "executor"
FRAME_ROWS = 4096  # embeddings that mean and scale are taken from
LOGITS_AT_ONCE = 2**25  # of texts whose logits are not kept: 128 MB


@dataclass
class PlannerOutput(CausalLMOutputWithPast):
    """`logits` (B, Y, V) of each target token. `target_nll`: nats per target token; `plan_nll`:
    nats per concept, `<EOS>` included; `plan_logits`: (B, C, M); `plan_ids`: the plan that was
    read; `signal_nll`: nats per label, summed over the signals. In training the planner is reached
    through `loss` alone."""

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
    # Recomputed layers would meet whichever adapter is on by then.
    supports_gradient_checkpointing = False
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

    def add_adapters(self) -> None:
        config = self.config
        lora = config.lora_rank, config.lora_alpha, config.lora_dropout, config.lora_first
        for name in (PLANNER, EXECUTOR):
            add_lora(self.backbone, *lora, name=name)

    def merged(self):
        """Raises CheckpointError: two adapters cannot be folded into one base."""
        raise CheckpointError(
            "a planner's two adapters cannot be folded into one base: need it as it was saved. "
            "try: sememe generate on the run itself"
        )

    @torch.no_grad()
    def start_plans(self, seed: int = 0) -> None:
        """New modules as if drawn from the base's embeddings; all concepts about equally likely."""
        table = self.get_input_embeddings().weight
        if table.is_meta:
            return  # weights come from a file
        step = max(1, len(table) // FRAME_ROWS)
        ids = torch.arange(0, len(table), step, device=table.device)
        self.plans.start(Spine(self.backbone).embed(ids), seed)
        if self.probes is not None:
            generator = torch.Generator().manual_seed(seed + 1)
            self.probes.weight.copy_(torch.randn(self.probes.weight.shape, generator=generator))

    def run(
        self, x_BnD: Tensor, query: Slots, key: Slots, cache: DynamicCache | None = None
    ) -> Tensor:
        """(B, n, D) last states by the adapter that is on. `key`: the cached slots and these."""
        spine = Spine(self.backbone)
        attention = self.backbone.config._attn_implementation

        def mask(window: int | None) -> Tensor | None:
            return allow(query.sees(key, window), x_BnD.dtype, attention)

        rope = spine.rope(x_BnD, query.position)
        return spine.run(0, len(spine), x_BnD, query.position, rope, mask, cache)

    # ---- the planner ----

    def source_inputs(self, source_BU: Tensor, source_mask: Tensor | None) -> tuple[Tensor, Slots]:
        """(B, S, D) inputs, each row's padding on its left and then its BOS, whatever side the
        padding was on; a source that is too long keeps its end."""
        source_BU = source_BU.to(self.device)
        mask_BU = torch.ones_like(source_BU) if source_mask is None else source_mask.to(self.device)
        order_BU = mask_BU.long().argsort(dim=1, stable=True)
        if self.config.plan_max_source is not None:
            order_BU = order_BU[:, -self.config.plan_max_source :]
        mask_BU = mask_BU.gather(1, order_BU).bool()
        first_B1 = (~mask_BU).sum(1, keepdim=True)
        valid_BS = F.pad(mask_BU, (1, 0)).scatter(1, first_B1, True)
        ids_BS = F.pad(source_BU.gather(1, order_BU), (1, 0)).scatter(1, first_B1, self.bos)
        position_BS = (valid_BS.cumsum(1) - 1).clamp(min=0)
        return Spine(self.backbone).embed(ids_BS), Slots.text(position_BS, valid_BS)

    def encode_source(self, source_BU: Tensor, source_mask: Tensor | None = None) -> Context:
        """The planner's KV cache of (B, U) sources, for all plans that are searched or scored."""
        x_BSD, slots = self.source_inputs(source_BU, source_mask)
        context = Context(DynamicCache(), slots)
        with adapter(self.backbone, PLANNER):
            self.run(x_BSD, slots, slots, context.cache)
        return context

    def _plan_slots(self, plan_BP: Tensor, start_B1: Tensor, first: int, parallel: bool) -> Slots:
        """The C slots of plans whose first separator is at position `start` in RoPE, and number
        `first` in the sequence. Types in parallel are seen by themselves alone."""
        kind_C, position_C, _ = self.plans.shape.layout(plan_BP.device)
        slots = Slots.text(start_B1 + position_C, self.plans.shape.valid(plan_BP), first)
        return slots._replace(kind=kind_C.expand_as(slots.order)) if parallel else slots

    def _query_slots(self, asked_BI: Tensor, start_B1: Tensor, first: int) -> Slots:
        """Slots of the m - 1 queries of each type, which see what precedes its concept number
        `asked`, and ask for the ones after that."""
        shape, device, count = self.plans.shape, asked_BI.device, self.config.multi_token - 1
        kind_n = torch.arange(shape.types, device=device).repeat_interleave(count)
        further_n = torch.arange(1, count + 1, device=device).repeat(shape.types)
        asked_Bn = asked_BI[:, kind_n]
        slots = Slots.text(start_B1 + asked_Bn + further_n)
        return slots._replace(
            order=first + shape.separators(device)[kind_n] + asked_Bn,
            kind=kind_n.expand_as(asked_Bn),
            query=slots.valid,
        )

    def plan_states(
        self,
        source_BU: Tensor | None,
        source_mask: Tensor | None,
        plan_BP: Tensor,
        context: Context | None = None,
        asked_BI: Tensor | None = None,
    ) -> Tensor:
        """(B, C, D) last states at the plan's inputs, teacher forced; with `asked` (B, I) those of
        the queries after them, all of type 0 first. `context`: what `encode_source` made of b
        sources, in their place; plans of source 0 first, B / b for each."""
        dtype = self.backbone.dtype
        x_BnD = self.plans.inputs(self.plan_embeddings(plan_BP)).to(dtype)
        if context is None:
            x_BSD, source = self.source_inputs(source_BU, source_mask)
        else:
            rows = torch.arange(len(context.slots.position), device=self.device)
            context = context.pick(rows.repeat_interleave(len(plan_BP) // len(rows)))
            x_BSD, source = x_BnD[:, :0], context.slots
        start_B1 = source.position[:, -1:] + 1
        slots = self._plan_slots(plan_BP, start_B1, source.length, self.config.parallel)
        if asked_BI is not None:
            kind_I = torch.arange(self.plans.shape.types, device=self.device)
            query_BnD = self.query_inputs(kind_I).flatten(0, 1).expand(len(plan_BP), -1, -1)
            x_BnD = torch.cat([x_BnD, query_BnD], 1)
            slots = slots.then(self._query_slots(asked_BI, start_B1, source.length))
        key = source.then(slots)
        x_BnD = torch.cat([x_BSD, x_BnD], 1)
        with adapter(self.backbone, PLANNER):
            if context is None:
                h_BnD = self.run(x_BnD, key, key)
            else:
                h_BnD = self.run(x_BnD, slots, key, context.cache)
        return h_BnD[:, x_BSD.shape[1] :]

    def normed(self, h: Tensor) -> Tensor:
        """(…, D) last states at scale 1, past the base's own last norm, fp32."""
        return F.rms_norm(Spine(self.backbone).decoder.norm(h).float(), h.shape[-1:])

    def query_inputs(self, kind_R: Tensor) -> Tensor:
        """(R, m - 1, D) inputs that ask for concepts further on."""
        x_nD = self.plans.to_states(self.probes.weight)
        return self.plans.of_type(x_nD, kind_R[:, None]).to(self.backbone.dtype)

    def plan_logits(
        self,
        source_BU: Tensor | None,
        source_mask: Tensor | None,
        plan_BP: Tensor,
        context: Context | None = None,
    ) -> Tensor:
        """(B, C, M) teacher forced: at each separator and concept, of what comes next in its type,
        `<EOS>` last. After the end of a type, and after its last slot, they mean nothing: see
        `PlanShape.targets`. `context` as in `plan_states`."""
        h_BCD = self.plan_states(source_BU, source_mask, plan_BP, context)
        return self.plans.logits(self.normed(h_BCD))

    def plan_log_prob(self, plan_BP: Tensor, context: Context) -> Tensor:
        """(B,) log p(z | u) in nats, with the `<EOS>` of each type that is not full."""
        logits_BCM = self.plan_logits(None, None, plan_BP, context)
        return -nll(logits_BCM, self.plans.shape.targets(plan_BP)).sum(1)

    # ---- the executor ----

    def plan_embeddings(self, plan_BP: Tensor) -> Tensor:
        """(B, P, D) fp32 states of a plan's concepts, as `executor_logits` takes them too. Raises
        CheckpointError for ids that this model has no concept for."""
        return self.plans(self.plans.shape.check(plan_BP))

    def prefix(
        self, plan_BP: Tensor, plan_embeddings: Tensor | None = None
    ) -> tuple[Tensor, Slots]:
        """(B, 1 + C + 1, D) what precedes a text in the executor: BOS, plan, last separator."""
        e_BPD = self.plan_embeddings(plan_BP)
        e_BPD = e_BPD if plan_embeddings is None else plan_embeddings
        zero_B1 = torch.zeros_like(plan_BP[:, :1])
        bos_B1D = Spine(self.backbone).embed(zero_B1 + self.bos)
        last_B1D = self.plans.last_separator().expand_as(bos_B1D)
        x_BnD = torch.cat([bos_B1D, self.plans.inputs(e_BPD), last_B1D], 1).to(bos_B1D.dtype)
        plan = self._plan_slots(plan_BP, zero_B1, 1, parallel=False)
        last = Slots.text(zero_B1 + max(self.plans.shape.lengths), first=x_BnD.shape[1] - 1)
        return x_BnD, Slots.text(zero_B1).then(plan, last)

    def _executor_states(
        self, plan_BP: Tensor, target_BY: Tensor, plan_embeddings: Tensor | None
    ) -> Tensor:
        """(B, Y, D) last states that predict each target token."""
        x_BnD, slots = self.prefix(plan_BP, plan_embeddings)
        before_BT = target_BY[:, :-1]
        # Ignored tokens stand at the end, where nobody sees them: any id will do.
        text_BTD = Spine(self.backbone).embed(before_BT.masked_fill(before_BT < 0, self.bos))
        further_T = torch.arange(1, before_BT.shape[1] + 1, device=plan_BP.device)
        slots = slots.then(Slots.text(slots.position[:, -1:] + further_T, first=slots.length))
        with adapter(self.backbone, EXECUTOR):
            h_BnD = self.run(torch.cat([x_BnD, text_BTD], 1), slots, slots)
        return h_BnD[:, x_BnD.shape[1] - 1 :][:, : target_BY.shape[1]]

    def executor_logits(
        self, plan_BP: Tensor, target_BY: Tensor, plan_embeddings: Tensor | None = None
    ) -> Tensor:
        """(B, Y, V) logits of each target token, given the plan and the tokens before it.
        `plan_embeddings` (B, P, D): read in the place of the concepts' own states; slots that are
        NULL in the plan stay unseen."""
        h_BYD = self._executor_states(plan_BP, target_BY, plan_embeddings)
        return Spine(self.backbone).logits(h_BYD)

    def target_nll(
        self, plan_BP: Tensor, target_BY: Tensor, plan_embeddings: Tensor | None = None
    ) -> Tensor:
        """(B, Y) nats of each target token, 0 where it is -100. There are never the logits of more
        than a few rows."""
        h_BYD = self._executor_states(plan_BP, target_BY, plan_embeddings)
        logits = Spine(self.backbone).logits
        rows = self.rows_at_once(target_BY.shape[1])
        return in_chunks(lambda h, target: nll(logits(h), target), rows, h_BYD, target_BY)

    def target_log_prob(
        self, plan_BP: Tensor, target_BY: Tensor, plan_embeddings: Tensor | None = None
    ) -> Tensor:
        """(B,) log p(y | z) in nats."""
        return -self.target_nll(plan_BP, target_BY, plan_embeddings).sum(1)

    def rows_at_once(self, tokens: int) -> int:
        """Texts of so many tokens whose logits fit into memory."""
        return LOGITS_AT_ONCE // (max(1, tokens) * self.config.text_config.vocab_size)

    # ---- losses ----

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        plan_ids: Tensor | None = None,
        labels: Tensor | None = None,
        signals: dict[str, Tensor] | None = None,
        **kwargs,
    ) -> PlannerOutput:
        """The plan from the source and the text from the plan, both teacher forced. `loss`: nats
        per target token, and `plan_weight` times nats per concept, `plan_signals` times nats per
        label of what probes of the plan tell of the text.

        Args:
            input_ids, attention_mask: (B, U) the source, and 0 on its padding.
            plan_ids: (B, P); None for the planner's own, greedy.
            labels: (B, Y) the text, -100 after its end; None for the plan's part alone.
            signals: of the texts, `SignalReader`'s labels; None to leave them out."""
        self.refuse_unknown(kwargs)
        config, dial = self.config, self.dial
        if plan_ids is None:
            plan_ids = self.plan(input_ids, attention_mask)[0][:, 0]
        out = self._plan_losses(input_ids, attention_mask, plan_ids, alone=labels is None)
        if labels is None:
            return out
        e_BPD = self.plan_embeddings(plan_ids)
        if dial.straight_through and torch.is_grad_enabled():
            e_BPD = straight_through(
                e_BPD, self.plans.soft(out.plan_logits, config.code_temperature)
            )
        extra = dial.plan_weight * out.loss
        if signals is not None and self.signals is not None:
            out.signal_nll = sum(self.signals(self.plans.means(plan_ids, e_BPD), signals).values())
            extra = extra + config.plan_signals * out.signal_nll
        if self.training and config.plan_dropout > 0:
            lost_B1 = torch.rand(len(plan_ids), 1, device=plan_ids.device) < config.plan_dropout
            plan_ids = plan_ids.masked_fill(lost_B1, NULL)
        out.logits = self.executor_logits(plan_ids, labels, e_BPD)
        total = nll(out.logits, labels).sum()
        tokens = (labels != IGNORED).sum().clamp(min=1)
        out.target_nll = total / tokens
        # Of a batch in several parts the Trainer says how many tokens all of them have.
        count = kwargs.get("num_items_in_batch")
        out.loss = (total + extra * tokens) / (tokens if count is None else count)
        if self.training:
            # Nothing is left without a gradient, so that Adam counts the same steps for all.
            trained = (p.float().sum() for p in self.parameters() if p.requires_grad)
            out.loss = out.loss + sum(trained) * 0.0
        return out

    def _plan_losses(
        self, source_BU: Tensor, source_mask: Tensor | None, plan_BP: Tensor, alone: bool
    ) -> PlannerOutput:
        """Logits and cross entropy of the plan; `loss`: with that of the queries. `alone`: no text
        is written from it."""
        dial, shape = self.dial, self.plans.shape
        asked_BI = None
        if self.probes is not None and self.training:  # they learn at random places
            counts_BI = shape.counts(plan_BP)
            random_BI = torch.rand(counts_BI.shape, device=counts_BI.device)
            asked_BI = (random_BI * (counts_BI + 1)).long()
        wanted = dial.plan_weight > 0 or dial.straight_through
        with torch.set_grad_enabled(torch.is_grad_enabled() and wanted):
            h_BnD = self.plan_states(source_BU, source_mask, plan_BP, asked_BI=asked_BI)
            h_BCD = h_BnD[:, : shape.slots + shape.types]
            logits_BCM = self.plans.logits(self.normed(h_BCD))
            target_BC = shape.targets(plan_BP)
            plan_nll = mean_nll(logits_BCM, target_BC)
            loss = plan_nll
            if asked_BI is not None:
                h_BInD = h_BnD[:, h_BCD.shape[1] :].unflatten(1, (shape.types, -1))
                loss = plan_nll + self._query_loss(h_BInD, asked_BI, target_BC)
        if self.training and not alone and not dial.straight_through and loss.requires_grad:
            # The text does not depend on the planner's activations: its gradients are taken now, so
            # that they need not wait for the executor's.
            loss = settled(loss, self.parameters())
            plan_nll = plan_nll.detach()
            logits_BCM = logits_BCM.detach()
        return PlannerOutput(loss=loss, plan_nll=plan_nll, plan_logits=logits_BCM, plan_ids=plan_BP)

    def _query_loss(self, h_BInD: Tensor, asked_BI: Tensor, target_BC: Tensor) -> Tensor:
        """Nats per concept of those that the queries ask for."""
        shape = self.plans.shape
        h_BInD = self.normed(h_BInD)
        logits = [self.plans.logits_of(h_BInD[:, i], i) for i in range(shape.types)]
        further_n = torch.arange(1, h_BInD.shape[2] + 1, device=h_BInD.device)
        position_BIn = asked_BI.unsqueeze(-1) + further_n
        input_BIn = shape.separators(h_BInD.device)[:, None] + position_BIn
        wanted_Bn = target_BC.gather(1, input_BIn.flatten(1).clamp(max=target_BC.shape[1] - 1))
        length_I1 = torch.tensor(shape.lengths, device=h_BInD.device)[:, None]
        past_BIn = position_BIn >= length_I1  # that is another type's, or nobody's
        wanted_Bn = wanted_Bn.masked_fill(past_BIn.flatten(1), IGNORED)
        return mean_nll(torch.cat(logits, 1), wanted_Bn)

    # ---- use ----

    def limit(self, budget: Sequence[int]) -> None:
        """Concepts of each type at most from now on: a number for each, or one for all. Raises
        RecipeError for others."""
        self.dial.budget = self.budget_of(budget)

    def budget_of(self, budget: int | Sequence[int] | None) -> tuple[int, ...]:
        """A number for each type; None for what `limit` set."""
        lengths = self.plans.shape.lengths
        if budget is None:
            return self.dial.budget
        given = [budget] if isinstance(budget, int) else list(budget)
        wanted = given * len(lengths) if len(given) == 1 else given
        if len(wanted) != len(lengths) or min(wanted) < 0:
            raise RecipeError(
                f"a budget of {', '.join(map(str, given))} concepts: need one number, or one for "
                f"each of {len(lengths)} types, of at least 0. "
                f"try: --rate {','.join(map(str, lengths))}"
            )
        return tuple(map(min, wanted, lengths))

    def plan(
        self, source_BU: Tensor, source_mask: Tensor | None = None, **search
    ) -> tuple[Tensor, Tensor]:
        """(B, n, P) plans of (B, U) sources and their (B, n) log-probabilities in nats: those that
        `PlanSearch(**search)` finds; greedy without options."""
        with torch.no_grad():
            return PlanSearch(**search)(self, self.encode_source(source_BU, source_mask))

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
        spine, cache = Spine(self.backbone), DynamicCache()
        stops = torch.tensor(self.stops, device=self.device)
        x_BnD, query = self.prefix(plan_BP.to(self.device))
        key = query
        unfinished_B = torch.ones(len(plan_BP), dtype=torch.bool, device=self.device)
        columns: list[Tensor] = []
        with adapter(self.backbone, EXECUTOR):
            while len(columns) < max_new_tokens and bool(unfinished_B.any()):
                logits_BV = spine.logits(self.run(x_BnD, query, key, cache)[:, -1])
                if do_sample:
                    token_B = draw(logits_BV, temperature, generator)
                else:
                    token_B = logits_BV.argmax(-1)
                unfinished_B = unfinished_B & ~torch.isin(token_B, stops)
                columns.append(torch.where(unfinished_B, token_B, NULL))
                x_BnD = spine.embed(token_B[:, None])
                query = Slots.text(key.position[:, -1:] + 1, first=key.length)
                key = key.then(query)
        if not columns:
            return [[] for _ in plan_BP]
        return [row_T[row_T != NULL].tolist() for row_T in torch.stack(columns, 1)]

    @property
    def stops(self) -> list[int]:
        """Ids that end a text."""
        ids = self.generation_config.eos_token_id
        ids = self.config.text_config.eos_token_id if ids is None else ids
        return [] if ids is None else list(ids) if isinstance(ids, list | tuple) else [ids]

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        max_new_tokens: int | None = None,
        *,
        plan_ids: Tensor | None = None,
        return_plan: bool = False,
        **search,
    ):
        """Plans (unless `plan_ids` (B, P) are given), then writes: (B, U + new) ids as
        transformers' own `generate`, filled up with the end of text. With `return_plan` (ids,
        plans). `search`: options of `PlanSearch`; drawing is for plans and texts."""
        options = PlanSearch(**search)
        if plan_ids is None:
            plan_ids = options(self, self.encode_source(input_ids, attention_mask))[0][:, 0]
        length = max_new_tokens or self.generation_config.max_new_tokens or 128
        texts = self.write(
            plan_ids,
            length,
            do_sample=options.do_sample,
            temperature=options.temperature,
            generator=options.generator,
        )
        fill = (self.stops or [0])[0]
        width = min(length, max(map(len, texts), default=0) + bool(self.stops))
        rows = [row + [fill] * (width - len(row)) for row in texts]
        new_BY = torch.tensor(rows, dtype=torch.long, device=self.device).view(len(rows), width)
        ids = torch.cat([input_ids.to(self.device), new_BY], 1)
        return (ids, plan_ids) if return_plan else ids


def nll(logits_BTV: Tensor, target_BT: Tensor) -> Tensor:
    """(B, T) nats, 0 where the target is -100."""
    logits_nV = logits_BTV.flatten(0, 1).float()
    return F.cross_entropy(logits_nV, target_BT.flatten(), reduction="none").view(target_BT.shape)


def mean_nll(logits_BTV: Tensor, target_BT: Tensor) -> Tensor:
    """Nats for each target that counts."""
    return nll(logits_BTV, target_BT).sum() / (target_BT != IGNORED).sum().clamp(min=1)


def in_chunks(function: Callable[..., Tensor], rows: int, *tensors: Tensor) -> Tensor:
    """`function` of a few rows of all tensors at a time, put together."""
    chunks = zip(*(x.split(max(1, rows)) for x in tensors), strict=True)
    return torch.cat([function(*chunk) for chunk in chunks])
