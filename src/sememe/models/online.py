"""Online concepts: (B, T) ids → (B, T, V) logits, with part of the layers on the concepts alone
(docs/concepts.md).

    ids ─ embed ─ shallow (all tokens) ─ h ─┬─ head ─ z or NULL ─ code ─ e ─ middle (concepts only) ─ c
                                            └─ deep over [concepts ≤ t ; tail(t)] ─ norm ─ lm_head ─ p(x_{t+1})

One forward serves training, prefill, chunks and decoding; without a cache it costs T shallow, T ·
rate middle and T deep layer applications. Suffixes as in `concepts`."""

from dataclasses import dataclass
from operator import attrgetter

import numpy as np
import torch
from torch import Tensor
from transformers.generation import GenerationMode
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from sememe.backbone.cache import ConceptCache, deep_slots, ring_slots
from sememe.backbone.calling import CACHE, check_places, name_cache, take_cache
from sememe.backbone.split import Rope, Spine
from sememe.concepts.anchor import TokenAnchor
from sememe.concepts.bridge import TailBridge
from sememe.concepts.codebook import ConceptEmbedding
from sememe.concepts.dial import Dial
from sememe.concepts.gate import GateState, RateGate
from sememe.concepts.head import HEADS
from sememe.concepts.masks import FLEX, Lane
from sememe.concepts.pool import SegmentPool
from sememe.concepts.segments import Packing
from sememe.models.adapted import AdaptedModel
from sememe.models.configuration import OnlineConfig
from sememe.models.starting import Starting
from sememe.models.writing import NULL, Step, Writing, all_concepts, past_padding


@dataclass
class OnlineOutput(CausalLMOutputWithPast):
    """`concept_ids` (B, T): the id written at each position; NULL -1, unquantised (the sink) -2."""

    concept_ids: Tensor | None = None

    if CACHE != "cache":  # before transformers 5.24
        cache = property(attrgetter(CACHE))


class OnlineForCausalLM(Starting, Writing, AdaptedModel):
    """The base, split in three, with a ConceptHead, a ConceptEmbedding and a RateGate between the
    slices."""

    config_class = OnlineConfig
    kernels = (*AdaptedModel.kernels, FLEX)
    _supports_flex_attn = True
    tells_work = True

    def __init__(self, config: OnlineConfig, backbone=None):
        super().__init__(config, backbone)
        config.check()
        width = config.text_config.hidden_size
        self.dial = Dial(config.rate, config.quantise)
        self.head = HEADS[config.head](width, config.num_concepts, config.codes_per_concept)
        self.codes = ConceptEmbedding(config.num_concepts, width, config.codes_per_concept)
        self.gate = RateGate(config.boundary, width)
        self.bridge = TailBridge(width) if config.bridge else None
        self.anchor = TokenAnchor(width, 2 if config.pool else 1) if config.anchor else None
        self.pool = SegmentPool(width) if config.pool else None
        self.finish()

    @property
    def spine(self) -> Spine:
        return Spine(self.backbone)

    # ---- forward ----

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: ConceptCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        output_hidden_states: bool | None = None,
        ablation: str | None = None,
        **kwargs,
    ) -> OnlineOutput:
        """Logits of the next token at every position.

        Args:
            input_ids: (B, T) token ids, or `inputs_embeds` (B, T, D).
            attention_mask: (B, past + T), 0 on padding; left and right padding both work.
            position_ids: (B, T); default: counted from the first real token.
            cache: a ConceptCache (`new_cache`), grown in place; `past_key_values` is its former
                name.
            labels: (B, T) targets, -100 ignored; shifted inside, as in transformers.
            use_cache: True starts a cache; without it none is made.
            logits_to_keep: logits of the last n positions only, or of these indices; 0 for all.
            output_hidden_states: return what each layer left too, see `_hidden_states`.
            ablation: replace the codes, see `concepts/ablation.py`: `zero`, `shuffle` (across the
                batch), `random`, `swap` (with the next row) or `drop:SHARE`; `@SEED` behind it for
                another draw.

        Raises:
            ValueError: an argument that would be ignored, tokens that do not go on from the cache,
                several texts in a row."""
        spine, cache = self.spine, take_cache(cache, kwargs)
        self.refuse_unknown(kwargs)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError(
                "forward takes either input_ids or inputs_embeds, got both or neither. try: "
                "input_ids alone"
            )
        h_BTD = spine.embed(input_ids) if inputs_embeds is None else inputs_embeds
        drops = self.training and getattr(spine.decoder.layers[0], "gradient_checkpointing", False)
        if cache is None and use_cache and not drops:  # checkpointed layers would leave it empty
            cache = self.new_cache(h_BTD.shape[0])
        _check(
            h_BTD,
            attention_mask,
            position_ids,
            cache,
            kwargs.get("output_attentions") or self.config.output_attentions,
        )
        record = (
            self.config.output_hidden_states
            if output_hidden_states is None
            else output_hidden_states
        )
        length, size = h_BTD.shape[1], self.config.prefill_chunk
        if cache is None or self.training or not size:
            size = length
        if size < length:
            cache.expect(length, round(length * self.dial.rate), self.config.shallow_window)
        parts = []
        for start in range(0, length, size):
            end = min(start + size, length)
            mask = (
                attention_mask
                if attention_mask is None
                else attention_mask[:, : attention_mask.shape[1] - length + end]
            )
            place = position_ids if position_ids is None else position_ids[:, start:end]
            spine.record = [] if record else None
            parts.append(self._through(spine, h_BTD[:, start:end], mask, place, cache, ablation))
        d_BTD, ids_BT = (torch.cat([part[i] for part in parts], 1) for i in (0, 1))
        kept = (
            slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        )  # slice(-0, None): all
        logits = spine.logits(d_BTD[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=logits.shape[-1], **kwargs)
        hidden = parts[0][2]
        if record and len(parts) > 1:
            hidden = tuple(
                torch.cat(states, 1) for states in zip(*(part[2] for part in parts), strict=True)
            )
        return OnlineOutput(
            loss=loss,
            logits=logits,
            hidden_states=hidden,
            concept_ids=ids_BT,
            **{CACHE: cache},
        )

    def _hidden_states(
        self, spine: Spine, step: Step, written_BT: Tensor, pack: Packing
    ) -> tuple[Tensor, ...]:
        """(B, T, D) × (layers + 1), as transformers has them: the embeddings, what each layer left,
        the last one normed. A token that writes nothing skips the middle layers: there it is what
        the shallow slice left."""
        shallow, middle, deep = self.config.split
        left = spine.record
        h_BTD, states = left[shallow - 1], [step.embed_BTD, *left[:shallow]]
        for c_bCD in left[shallow : len(left) - deep]:
            c_BCD = c_bCD
            if len(c_bCD) < len(h_BTD):  # only the rows that wrote went through
                c_BCD = h_BTD.new_zeros(len(h_BTD), *c_bCD.shape[1:]).index_copy(
                    0, written_BT.any(1).nonzero()[:, 0], c_bCD
                )
            states.append(pack.unpack(c_BCD, written_BT, h_BTD))
        states += [h_BTD] * (1 + shallow + middle - len(states))  # no row wrote
        return *states, *left[len(left) - deep : -1], spine.decoder.norm(left[-1])

    def _through(
        self,
        spine: Spine,
        h_BTD: Tensor,
        attention_mask,
        position_ids,
        cache: ConceptCache | None,
        ablation,
    ):
        """All three slices over one chunk: (B, T, D) last states, (B, T) ids, and what each
        layer left if it is recorded."""
        step = self._step(spine, h_BTD, attention_mask, position_ids, cache)
        h_BTD = self._shallow(spine, h_BTD, step)
        read = self._read(h_BTD, step)
        written_BT, pack = read.written_BT, read.pack
        e_BCD, ids_BC = self._write(read, step, ablation)
        c_BCD = self._middle(spine, e_BCD, pack, written_BT, step)
        known_BCD = self._known(c_BCD, read)
        tail_BTD, last_BD = self._tail(h_BTD, known_BCD, read, cache)
        if self.training:
            c_BCD = self._confidence(c_BCD, known_BCD, h_BTD, read)
        d_BTD = self._deep(spine, c_BCD, tail_BTD, pack, written_BT, step, read.state)

        ids_BT = torch.full_like(step.position_BT.expand(written_BT.shape), NULL)
        ids_BT = ids_BT.scatter(1, pack.index_BC, torch.where(pack.valid_BC, ids_BC, NULL))
        if cache is not None:
            ahead_B1D = cache.last_hidden_BD.to(h_BTD).unsqueeze(1)
            real_BSD = (
                past_padding(torch.cat([ahead_B1D, h_BTD], 1), step.valid_BT)
                if step.padded
                else h_BTD
            )
            cache.gate_state, cache.last_hidden_BD = read.state, real_BSD[:, -1].detach()
            cache.last_concept_BD, cache.open_segment = last_BD, read.open_segment
            cache.record(ids_BT)
        return (
            d_BTD,
            ids_BT,
            self._hidden_states(spine, step, written_BT, pack) if spine.record else None,
        )

    def _shallow(self, spine: Spine, h_BTD: Tensor, step: Step) -> Tensor:
        """All tokens, causal; with `shallow_window` each sees that many, itself among them, and the
        first of the text."""
        cache, length, window = step.cache, h_BTD.shape[1], self.config.shallow_window
        query = key = all_concepts(step.position_BT, step.valid_BT)
        free = not step.padded
        if cache is not None:
            lane, before = cache.shallow, cache.get_seq_length()
            if window:
                slot, length_B = ring_slots(
                    step.valid_BT.cpu().numpy(), cache.gate_state.tokens, window
                )
                slot = torch.from_numpy(slot).to(h_BTD.device)
                seen = lane.plan(
                    slot, step.position_BT, int(length_B.max()), None, length > 1, length_B
                )
            else:
                column = torch.arange(before, before + length, device=h_BTD.device)
                seen = lane.plan(
                    torch.where(step.valid_BT, column, -1), step.position_BT, before + length
                )
            old = all_concepts(*seen)
            key = old.then(query) if lane.before is not None else old
            free = free and (length == 1 or before == 0)
            window = window if length > 1 else None  # the ring holds what the one query may see
        mask = self._mask(query, key, free, window)
        return spine.run(0, self.config.split[0], h_BTD, step.position_BT, step.rope, mask, cache)

    def _middle(
        self, spine: Spine, e_BCD: Tensor, pack: Packing, written_BT: Tensor, step: Step
    ) -> Tensor:
        """Concepts only, causal, each at its own place in the text."""
        first, last = self.config.split[0], sum(self.config.split[:2])
        cache, rows = step.cache, None
        position_BC = pack.pack(step.position_BT)
        rope = _packed(step.rope, pack)
        query = key = all_concepts(position_BC, pack.valid_BC)
        ragged = step.padded or len(e_BCD) > 1
        if cache is not None:
            count_B = step.written_before + written_BT.sum(1).cpu().numpy()
            wrote = np.flatnonzero(count_B > step.written_before)
            if len(wrote) == 0:
                return e_BCD
            if written_BT.shape[1] == 1 and len(wrote) < len(count_B):
                rows = torch.from_numpy(wrote).to(e_BCD.device)
            before = torch.from_numpy(step.written_before).to(e_BCD.device)
            rank_BC = torch.arange(e_BCD.shape[1], device=e_BCD.device)
            slot = torch.where(pack.valid_BC, before[:, None] + rank_BC, -1)
            every, lane = e_BCD, cache.middle
            if rows is not None:
                slot, position_BC, e_BCD = slot[rows], position_BC[rows], e_BCD[rows]
                rope = {kind: tuple(x[rows] for x in pair) for kind, pair in rope.items()}
                query = Lane(*(field[rows] for field in query))
            key = all_concepts(
                *lane.plan(slot, position_BC, int(count_B.max()), rows, length_B=count_B)
            )
        free = not ragged and (
            e_BCD.shape[1] == 1 or cache is None or int(step.written_before.max()) == 0
        )
        free = free or step.plain
        c_BCD = spine.run(
            first, last, e_BCD, position_BC, rope, self._mask(query, key, free), cache
        )
        return c_BCD if rows is None else every.index_copy(0, rows, c_BCD)

    def _deep(
        self,
        spine: Spine,
        c_BCD: Tensor,
        tail_BTD: Tensor,
        pack: Packing,
        written_BT: Tensor,
        step: Step,
        state: GateState,
    ) -> Tensor:
        """Concepts ≤ t and the tail of t, one state per position: (B, T, D)."""
        split, cache = self.config.split, step.cache
        before = torch.from_numpy(step.written_before).to(c_BCD.device)[:, None]
        entry = Lane(step.position_BT, before + written_BT.cumsum(1), written_BT, step.valid_BT)
        d_BTD = pack.unpack(c_BCD, written_BT, tail_BTD)
        query, key, free, several = entry, entry, step.plain, d_BTD.shape[1] > 1
        if cache is not None:
            lane = cache.deep
            slot, tail = deep_slots(
                entry.concept.cpu().numpy(),
                step.valid_BT.cpu().numpy(),
                step.written_before,
                cache.tail,
            )
            total_B = state.concepts + tail
            seen = lane.plan(
                torch.from_numpy(slot).to(d_BTD.device),
                entry.position,
                int(total_B.max()),
                None,
                several,
                total_B,
            )
            cache.tail = tail
            if lane.before is not None:
                old_concept = torch.arange(seen[0].shape[1], device=d_BTD.device) < before
                old = Lane(seen[0], before.expand(seen[0].shape), old_concept, seen[1])
                key = old.then(query)
            else:
                key = all_concepts(*seen)
                free = len(d_BTD) == 1 and not step.padded
        return spine.run(
            split[0] + split[1],
            sum(split),
            d_BTD,
            entry.position,
            step.rope,
            self._mask(query, key, free),
            cache,
        )

    def new_cache(self, batch: int) -> ConceptCache:
        """An empty cache for `batch` rows."""
        width = self.config.text_config.hidden_size
        cache = ConceptCache(
            tuple(self.config.split),
            batch,
            self.device,
            GateState.start(batch),
            width,
            2 * width if self.config.pool else width,
        )
        if self.bridge is not None:
            cache.last_concept_BD = self.bridge.concept_mean.expand(batch, -1)
        return cache

    def _prepare_cache_for_generation(
        self, generation_config, model_kwargs, generation_mode, batch_size, *args
    ):
        if generation_mode == GenerationMode.ASSISTED_GENERATION:
            raise ValueError(
                "assisted decoding takes tokens back, and tails that a concept closed cannot come "
                "back. "
                "try: generate without assistant_model, prompt_lookup_num_tokens and "
                "assistant_early_exit"
            )
        if name_cache(model_kwargs) is not None or generation_config.use_cache is False:
            return super()._prepare_cache_for_generation(
                generation_config, model_kwargs, generation_mode, batch_size, *args
            )
        if generation_config.cache_implementation is not None:
            raise ValueError(
                f"cache_implementation = {generation_config.cache_implementation!r}: the concept "
                "cache is the only one "
                "that fits this model. try: leave it out"
            )
        rows = batch_size * max(
            generation_config.num_beams or 1, generation_config.num_return_sequences or 1
        )
        model_kwargs[CACHE] = self.new_cache(rows)


def _packed(rope: Rope, pack: Packing) -> Rope:
    """That of the concepts, from that of the tokens."""
    rows = len(pack.index_BC)
    return {
        kind: tuple(pack.pack(x.expand(rows, -1, -1)) for x in pair) for kind, pair in rope.items()
    }


def _check(
    h_BTD: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    cache,
    output_attentions: bool | None,
) -> None:
    """Raises ValueError for what some models take and this one cannot."""
    batch, length = h_BTD.shape[:2]
    if output_attentions:
        raise ValueError(
            "output_attentions: the slices attend over different lists of keys, and there is no "
            "(T, T) table of "
            "weights to return. try: output_hidden_states, or concept_ids"
        )
    if attention_mask is not None and (
        attention_mask.dim() != 2 or attention_mask.shape[1] < length
    ):
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}: need ({batch}, past + "
            f"{length}), 0 on "
            "padding. try: the mask that the tokenizer returns"
        )
    if cache is not None and not isinstance(cache, ConceptCache):
        raise ValueError(
            f"the cache is a {type(cache).__name__}: need this model's own. try: new_cache({batch})"
        )
    if cache is not None and len(cache.tail) != batch:
        raise ValueError(
            f"the cache has {len(cache.tail)} rows, the batch has {batch}: need one for each, "
            "beams and "
            f"num_return_sequences counted. try: new_cache({batch})"
        )
    check_places(
        length, attention_mask, position_ids, 0 if cache is None else cache.get_seq_length()
    )
