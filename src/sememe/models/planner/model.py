"""Planner and executor: (B, U) source → (B, P) plan → (B, Y) text, (B, Y, V) logits.

    BOS u SEP_1 z¹… SEP_2 z²… ─ base + adapter "planner" ─ p(z | u)
    BOS   SEP_1 z¹… SEP_2 z²… SEP_text y… ─ base + adapter "executor" ─ p(y | z)

One frozen base, two adapters; the executor never sees u. Each type has a vocabulary and an `<EOS>`
of its own. Positions start again at each type: its separator stands at 0 and its j-th concept at j
(in the planner counted from the end of u), and the text behind the longest type, whatever the plan.
Slots behind a type's end are seen by nobody. Suffixes as in `concepts/plan.py`; U source tokens · S
= 1 + U with the BOS · Y text tokens · n columns of one pass."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from sememe.backbone.adapters import adapter, add_lora
from sememe.backbone.split import Spine
from sememe.concepts.masks import Lane, allow, segment_mask
from sememe.concepts.plan import NULL, PlanCodes, straight_through
from sememe.errors import CheckpointError
from sememe.models.adapted import AdaptedModel
from sememe.models.configuration import PlannerConfig
from sememe.models.planner.beam import EXECUTOR, PLANNER, Columns, Planning, SourceContext
from sememe.models.planner.signals import SignalProbe
from sememe.models.settling import settled

FRAME_ROWS = 4096  # embeddings that mean and scale are taken from
LOGITS_AT_ONCE = 2**25  # of a text's log-probability without gradient: 128 MB


@dataclass
class PlannerOutput(CausalLMOutputWithPast):
    """`logits` (B, Y, V) of each target token. `target_nll`: nats per target token; `plan_nll`:
    nats per concept, `<EOS>` included; `plan_logits`: (B, L_i + 1, K_i + 1) of each type;
    `plan_ids`: the plan that was read; `signal_nll`: nats per label, summed over the signals. In
    training the planner is reached through `loss` alone."""

    target_nll: Tensor | None = None
    plan_nll: Tensor | None = None
    plan_logits: tuple[Tensor, ...] | None = None
    plan_ids: Tensor | None = None
    signal_nll: Tensor | None = None


@dataclass
class Dial:
    """What may change while a planner runs; everything else is its configuration's.

    plan_weight: of the plan's own cross entropy in the loss.
    straight_through: what the executor reads passes its gradient on to the planner.
    budget: concepts of each type at most, where a call says nothing else."""

    plan_weight: float
    straight_through: bool
    budget: tuple[int, ...] | None = None


class PlannerForCausalLM(Planning, AdaptedModel):
    """The base with two adapters, and the plan's vocabularies between them."""

    config_class = PlannerConfig
    supports_gradient_checkpointing = (
        False  # recomputed layers would meet whichever adapter is on by then
    )
    foldable = False
    _keep_in_fp32_modules_strict = [
        *AdaptedModel._keep_in_fp32_modules_strict,
        r"^(plans|probes|signals)\b",
    ]

    def __init__(self, config: PlannerConfig, backbone=None):
        super().__init__(config, backbone)
        config.check()
        self.dial = Dial(config.plan_weight, config.straight_through)
        width = config.text_config.hidden_size
        self.plans = PlanCodes(config.plan_shape, width)
        self.probes = (
            nn.Embedding(config.multi_token - 1, width) if config.multi_token > 1 else None
        )
        self.signals = (
            SignalProbe(len(config.plan_sizes) * width) if config.plan_signals > 0 else None
        )
        self.start_plans(config.seed)
        self.finish()

    def add_adapters(self) -> None:
        config = self.config
        for name in (PLANNER, EXECUTOR):
            add_lora(
                self.backbone,
                config.lora_rank,
                config.lora_alpha,
                config.lora_dropout,
                config.lora_first,
                name=name,
            )

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
        self.plans.start(
            Spine(self.backbone).embed(torch.arange(0, len(table), step, device=table.device)), seed
        )
        if self.probes is not None:
            self.probes.weight.copy_(
                torch.randn(
                    self.probes.weight.shape, generator=torch.Generator().manual_seed(seed + 1)
                )
            )

    def run(
        self,
        spine: Spine,
        x_BnD: Tensor,
        query: Columns,
        key: Columns,
        cache: DynamicCache | None = None,
    ) -> Tensor:
        """(B, n, D) last states of inputs at `query`, by the adapter that is on. `key`: the cached
        columns and these."""
        attention = self.backbone.config._attn_implementation

        def mask(window: int | None) -> Tensor:
            ahead = query.position[:, :, None] - key.position[:, None, :]
            seen = segment_mask(query.lane, key.lane)
            seen &= (~key.probe[:, None, :] | query.probe[:, :, None] & (ahead >= 0)).unsqueeze(1)
            if window is not None:  # in places, which start again with each type
                seen &= ((ahead < window) | ~query.lane.valid[:, :, None]).unsqueeze(1)
            return allow(seen, x_BnD.dtype, attention)

        return spine.run(
            0, len(spine), x_BnD, query.position, spine.rope(x_BnD, query.position), mask, cache
        )

    # ---- the planner ----

    def source_columns(
        self, source_BU: Tensor, source_mask: Tensor | None
    ) -> tuple[Tensor, Columns, Tensor]:
        """(B, S) ids with the BOS ahead of each row's own, whatever side its padding was on; their
        columns; (B, 1) lengths."""
        mask_BU = (
            torch.ones_like(source_BU)
            if source_mask is None
            else source_mask.to(source_BU.device).long()
        )
        order_BU = mask_BU.argsort(dim=1, stable=True)
        source_BU, mask_BU = source_BU.gather(1, order_BU), mask_BU.gather(1, order_BU)
        if self.config.plan_max_source is not None:
            source_BU, mask_BU = (
                x[:, -self.config.plan_max_source :] for x in (source_BU, mask_BU)
            )
        length_B1 = mask_BU.sum(1, keepdim=True) + 1
        first_B1 = source_BU.shape[1] + 1 - length_B1
        valid_BS = F.pad(mask_BU.bool(), (1, 0)).scatter(1, first_B1, True)
        ids_BS = F.pad(source_BU, (1, 0), value=self.bos).scatter(1, first_B1, self.bos)
        return ids_BS, Columns.plain((valid_BS.cumsum(1) - 1).clamp(min=0), valid_BS), length_B1

    def _plan_columns(
        self, plan_BP: Tensor, start_B1: Tensor, first: int, parallel: bool
    ) -> Columns:
        """The C columns of plans whose separators stand at `start`. `first`: columns ahead of
        them."""
        index_C, kind_C, place_C = self.plans.shape.layout(plan_BP.device)
        here = torch.ones_like(plan_BP[:, :1], dtype=torch.bool).expand(-1, self.plans.shape.types)
        valid_BC = torch.cat([here, plan_BP != NULL], 1)[:, index_C]
        columns = Columns.plain(start_B1 + place_C, valid_BC)
        lane = Lane(
            columns.lane.position + first,
            kind_C.expand_as(valid_BC),
            torch.full_like(valid_BC, not parallel),
            valid_BC,
        )
        return columns._replace(lane=lane)

    def _planner_states(
        self,
        source_BU,
        source_mask,
        plan_BP: Tensor,
        context: SourceContext | None = None,
        anchor_BI: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """(B, C, D) states at the plan's columns, and with `anchor` (B, I, m - 1, D) of probes
        behind those places."""
        shape, spine = self.plans.shape, Spine(self.backbone)
        x_BCD = self.plans.columns(self.plans(shape.check(plan_BP)))
        if context is None:
            ids_BS, source, length_B1 = self.source_columns(source_BU.to(self.device), source_mask)
            x_BSD, cache = spine.embed(ids_BS), None
        else:
            context = context.pick(
                torch.arange(len(context.length_B1), device=self.device).repeat_interleave(
                    len(plan_BP) // len(context.length_B1)
                )
            )
            source, length_B1, cache = context.key, context.length_B1, context.cache
            x_BSD = spine.embed(torch.zeros_like(plan_BP[:, :0]))
        plan = self._plan_columns(
            plan_BP, length_B1, source.position.shape[1], self.config.parallel
        )
        if anchor_BI is not None:
            x_BCD, plan = self._with_probes(
                x_BCD, plan, anchor_BI, length_B1, source.position.shape[1]
            )
        key = source.then(plan)
        with adapter(self.backbone, PLANNER):
            x_BnD = torch.cat([x_BSD, x_BCD.to(x_BSD.dtype)], 1)
            h_BnD = self.run(spine, x_BnD, key if context is None else plan, key, cache)[
                :, x_BSD.shape[1] :
            ]
        columns = shape.slots + shape.types
        return h_BnD[:, :columns], None if anchor_BI is None else h_BnD[:, columns:].unflatten(
            1, (shape.types, -1)
        )

    def _with_probes(
        self, x_BCD: Tensor, plan: Columns, anchor_BI: Tensor, length_B1: Tensor, first: int
    ):
        """The plan's columns, and behind them m - 1 probes for each type that see what stands up to
        its `anchor` place."""
        shape, device = self.plans.shape, x_BCD.device
        batch, count = len(x_BCD), self.config.multi_token - 1
        kind_n = torch.arange(shape.types, device=device).repeat_interleave(count)
        probe_BnD = self.probe_states(kind_n[::count]).flatten(0, 1).expand(batch, -1, -1)
        start_I = torch.tensor([shape.columns(i).start for i in range(shape.types)], device=device)
        ahead_n = torch.arange(1, count + 1, device=device).repeat(shape.types)
        anchor_Bn = anchor_BI[:, kind_n]
        yes_Bn = torch.ones_like(anchor_Bn, dtype=torch.bool)
        lane = Lane(
            first + start_I[kind_n] + anchor_Bn,
            kind_n.expand_as(anchor_Bn),
            torch.zeros_like(yes_Bn),
            yes_Bn,
        )
        return torch.cat([x_BCD, probe_BnD], 1), plan.then(
            Columns(length_B1 + anchor_Bn + ahead_n, lane, yes_Bn)
        )

    def _normed(self, h: Tensor) -> Tensor:
        """(…, D) last states at scale 1, past the base's own last norm, fp32."""
        return F.rms_norm(Spine(self.backbone).decoder.norm(h).float(), h.shape[-1:])

    def _type_logits(self, h_BCD: Tensor) -> list[Tensor]:
        with torch.autocast(h_BCD.device.type, enabled=False):
            x_BCD = self._normed(h_BCD)
            return [
                one.logits(x_BCD[:, self.plans.shape.columns(i)])
                for i, one in enumerate(self.plans.types)
            ]

    def plan_logits(
        self,
        source_BU: Tensor | None,
        source_mask: Tensor | None,
        plan_BP: Tensor,
        context: SourceContext | None = None,
    ) -> list[Tensor]:
        """(B, L_i + 1, K_i + 1) for each type, teacher forced: at its separator and its concepts,
        of what comes next, `<EOS>` last. Behind the end of a type, and behind its last slot, they
        mean nothing: see `PlanShape.targets`.

        With `context`, of b sources, in the place of the source: plans of source 0 first, B / b for
        each."""
        return self._type_logits(self._planner_states(source_BU, source_mask, plan_BP, context)[0])

    def plan_log_prob(self, plan_BP: Tensor, context: SourceContext) -> Tensor:
        """(B,) log p(z | u) in nats, with the `<EOS>` of each type that is not full. Plans of
        source 0 first, as many for each source."""
        logits, shape = self.plan_logits(None, None, plan_BP, context), self.plans.shape
        return -sum(_nll(x, shape.targets(plan_BP, i)).sum(1) for i, x in enumerate(logits))

    def separator_states(self, kind_R: Tensor) -> Tensor:
        """(R, 1, D) inputs that open a type."""
        x_RD = (
            self.plans.to_states(self.plans.separator[kind_R])
            + self.plans.scale * self.plans.kind[kind_R].float()
        )
        return x_RD.unsqueeze(1).to(self.backbone.dtype)

    def probe_states(self, kind_R: Tensor) -> Tensor:
        """(R, m - 1, D) inputs that ask for concepts further on."""
        x_RnD = self.plans.to_states(self.probes.weight) + (
            self.plans.scale * self.plans.kind[kind_R].float()
        ).unsqueeze(1)
        return x_RnD.to(self.backbone.dtype)

    def concept_states(self, ids_R: Tensor, kind_R: Tensor, kinds: list[int]) -> Tensor:
        """(R, 1, D) inputs of concepts, each of its row's type."""
        x_RD = self.plans.scale * self.plans.kind[kind_R].float()
        for i in kinds:
            row_R1 = (kind_R == i).unsqueeze(1)
            x_RD = (
                x_RD + row_R1 * self.plans.table(i)[ids_R.clamp(max=self.plans.shape.sizes[i] - 1)]
            )
        return x_RD.unsqueeze(1).to(self.backbone.dtype)

    def choice_logits(self, h_RnD: Tensor, kind_R: Tensor, kinds: list[int]) -> Tensor:
        """(R, n, M) logits of each row's type, `<EOS>` in the last place and -inf where its
        vocabulary ends."""
        x_RnD, most = self._normed(h_RnD), max(self.plans.shape.sizes)
        with torch.autocast(x_RnD.device.type, enabled=False):
            out_RnM = x_RnD.new_full((*x_RnD.shape[:2], most + 1), -torch.inf)
            for i in kinds:
                of_R = kind_R == i
                logits_rnK = self.plans.types[i].logits(x_RnD[of_R])
                ahead_rn = F.pad(
                    logits_rnK[..., :-1], (0, most - logits_rnK.shape[-1] + 1), value=-torch.inf
                )
                out_RnM[of_R] = torch.cat([ahead_rn, logits_rnK[..., -1:]], -1)
        return out_RnM

    # ---- the executor ----

    def plan_embeddings(self, plan_BP: Tensor) -> Tensor:
        """(B, P, D) fp32 states of a plan's concepts, as `executor_logits` takes them too. Raises
        CheckpointError for ids that this model has no concept for."""
        return self.plans(self.plans.shape.check(plan_BP))

    def prefix(
        self, plan_BP: Tensor, plan_embeddings: Tensor | None = None
    ) -> tuple[Tensor, Columns]:
        """(B, 1 + C + 1, D) what the executor reads ahead of a text, and its columns."""
        spine, zero_B1 = Spine(self.backbone), torch.zeros_like(plan_BP[:, :1])
        e_BPD = self.plan_embeddings(plan_BP)
        e_BPD = e_BPD if plan_embeddings is None else plan_embeddings
        bos_B1D = spine.embed(zero_B1 + self.bos)
        last_B1D = self.plans.last_separator().expand(len(plan_BP), 1, -1)
        x_BnD = torch.cat(
            [bos_B1D, self.plans.columns(e_BPD).to(bos_B1D.dtype), last_B1D.to(bos_B1D.dtype)], 1
        )
        columns = self._plan_columns(plan_BP, zero_B1, 1, parallel=False)
        one = Columns.plain(zero_B1, torch.ones_like(zero_B1, dtype=torch.bool))
        last = one._replace(
            position=zero_B1 + max(self.plans.shape.lengths),
            lane=one.lane._replace(position=zero_B1 + x_BnD.shape[1] - 1),
        )
        return x_BnD, one.then(columns).then(last)

    def _executor_states(
        self, plan_BP: Tensor, target_BY: Tensor, plan_embeddings: Tensor | None
    ) -> Tensor:
        """(B, Y, D) last states that predict each target token."""
        spine, (x_BnD, columns) = Spine(self.backbone), self.prefix(plan_BP, plan_embeddings)
        before_BT = target_BY[:, :-1]
        before_BT = before_BT.masked_fill(
            before_BT < 0, self.bos
        )  # ignored ones stand at the end: nobody sees them
        at_T = torch.arange(1, before_BT.shape[1] + 1, device=plan_BP.device)
        text = Columns.plain(
            columns.position[:, -1:] + at_T, torch.ones_like(before_BT, dtype=torch.bool)
        )
        text = text._replace(lane=text.lane._replace(position=columns.lane.position[:, -1:] + at_T))
        columns = columns.then(text)
        with adapter(self.backbone, EXECUTOR):
            h_BnD = self.run(spine, torch.cat([x_BnD, spine.embed(before_BT)], 1), columns, columns)
        return h_BnD[:, x_BnD.shape[1] - 1 :][:, : target_BY.shape[1]]

    def executor_logits(
        self, plan_BP: Tensor, target_BY: Tensor, plan_embeddings: Tensor | None = None
    ) -> Tensor:
        """(B, Y, V) logits of each target token, given the plan and the tokens before it.
        `plan_embeddings` (B, P, D): read in the place of the concepts' own states; slots that are
        NULL in the plan stay unseen."""
        return Spine(self.backbone).logits(
            self._executor_states(plan_BP, target_BY, plan_embeddings)
        )

    def target_log_prob(
        self, plan_BP: Tensor, target_BY: Tensor, plan_embeddings: Tensor | None = None
    ) -> Tensor:
        """(B,) log p(y | z) in nats, -100 ignored. The logits of a few rows at a time are ever
        there."""
        spine = Spine(self.backbone)
        h_BYD = self._executor_states(plan_BP, target_BY, plan_embeddings)
        return in_chunks(
            lambda h_bYD, target_bY: -_nll(spine.logits(h_bYD), target_bY).sum(1),
            self.rows_at_once(target_BY.shape[1]),
            h_BYD,
            target_BY,
        )

    def rows_at_once(self, tokens: int) -> int:
        """Texts of so many tokens whose logits fit into memory."""
        return LOGITS_AT_ONCE // (max(1, tokens) * self.config.text_config.vocab_size)

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
            labels: (B, Y) the text, -100 behind its end; None for the plan's part alone.
            signals: of the texts, `SignalReader`'s labels; None to leave them out."""
        self.refuse_unknown(kwargs)
        config, dial, shape = self.config, self.dial, self.plans.shape
        if plan_ids is None:
            plan_ids = self.plan(input_ids, attention_mask)[0][:, 0]
        anchor_BI = None
        if self.probes is not None and self.training:
            counts_BI = shape.counts(plan_ids)
            anchor_BI = (
                torch.rand(counts_BI.shape, device=counts_BI.device) * (counts_BI + 1)
            ).long()
        with torch.set_grad_enabled(
            torch.is_grad_enabled() and (dial.plan_weight > 0 or dial.straight_through)
        ):
            h_BCD, probe_BInD = self._planner_states(
                input_ids, attention_mask, plan_ids, anchor_BI=anchor_BI
            )
            logits = self._type_logits(h_BCD)
            target = [shape.targets(plan_ids, i) for i in range(shape.types)]
            plan_nll = sum(_nll(x, t).sum() for x, t in zip(logits, target, strict=True)) / sum(
                (t != -100).sum() for t in target
            )
            term = (
                plan_nll
                if anchor_BI is None
                else plan_nll + self._probe_loss(probe_BInD, anchor_BI, target)
            )
        if (
            self.training
            and labels is not None
            and not dial.straight_through
            and term.requires_grad
        ):
            # The executor has nothing to do with the planner's activations: they do not wait for
            # its own.
            term, plan_nll, logits = (
                settled(term, self.parameters()),
                plan_nll.detach(),
                [x.detach() for x in logits],
            )
        out = PlannerOutput(plan_nll=plan_nll, plan_logits=tuple(logits), plan_ids=plan_ids)
        if labels is None:
            out.loss = term
            return out
        e_BPD = None
        if dial.straight_through and torch.is_grad_enabled():
            with torch.autocast(h_BCD.device.type, enabled=False):
                e_BPD = straight_through(
                    self.plan_embeddings(plan_ids), self.plans.soft(logits, config.code_temperature)
                )
        if signals is not None and self.signals is not None:
            x_BF = self.plans.means(
                plan_ids, self.plan_embeddings(plan_ids) if e_BPD is None else e_BPD
            )
            with torch.autocast(x_BF.device.type, enabled=False):
                out.signal_nll = sum(self.signals(x_BF, signals).values())
        if self.training and config.plan_dropout > 0:
            lost_B1 = torch.rand(len(plan_ids), 1, device=plan_ids.device) < config.plan_dropout
            plan_ids = plan_ids.masked_fill(lost_B1, NULL)
        out.logits = self.executor_logits(plan_ids, labels, e_BPD)
        nll, own = _nll(out.logits, labels).sum(), (labels != -100).sum().clamp(min=1)
        count = own if kwargs.get("num_items_in_batch") is None else kwargs["num_items_in_batch"]
        beside = dial.plan_weight * term + (
            0 if out.signal_nll is None else config.plan_signals * out.signal_nll
        )
        out.target_nll, out.loss = nll / own, (nll + beside * own) / count
        if self.training:  # every rank's gradients in step, whatever its batch used
            out.loss = (
                out.loss + sum(p.float().sum() for p in self.parameters() if p.requires_grad) * 0.0
            )
        return out

    def _probe_loss(self, h_BInD: Tensor, anchor_BI: Tensor, target: list[Tensor]) -> Tensor:
        """Nats per concept of those that the probes are asked for."""
        ahead_n, total, count = torch.arange(1, h_BInD.shape[2] + 1, device=h_BInD.device), 0.0, 0
        with torch.autocast(h_BInD.device.type, enabled=False):
            for i, one in enumerate(self.plans.types):
                at_Bn = anchor_BI[:, i, None] + ahead_n
                want_BT = F.pad(target[i], (0, len(ahead_n)), value=-100)
                want_Bn = want_BT.gather(1, at_Bn)
                total = total + _nll(one.logits(self._normed(h_BInD[:, i])), want_Bn).sum()
                count = count + (want_Bn != -100).sum()
        return total / count.clamp(min=1)


def _nll(logits_BTV: Tensor, target_BT: Tensor) -> Tensor:
    """(B, T) nats, 0 where the target is -100."""
    return F.cross_entropy(
        logits_BTV.flatten(0, 1).float(), target_BT.flatten(), reduction="none"
    ).view(target_BT.shape)


def in_chunks(function: Callable[..., Tensor], rows: int, *tensors: Tensor) -> Tensor:
    """`function` of a few rows of all tensors at a time, put together."""
    chunks = zip(*(x.split(max(1, rows)) for x in tensors), strict=True)
    return torch.cat([function(*chunk) for chunk in chunks])
