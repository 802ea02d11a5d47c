"""Online concepts: (B, T) ids → (B, T, V) logits, with part of the layers on the concepts alone (docs/concepts.md).

    ids ─ embed ─ shallow (all tokens) ─ h ─┬─ head ─ z or NULL ─ code ─ e ─ middle (concepts only) ─ c
                                            └─ deep over [concepts ≤ t ; tail(t)] ─ norm ─ lm_head ─ p(x_{t+1})

One forward serves training, prefill, chunks and decoding; without a cache it costs T shallow, T · rate middle and
T deep layer applications. Suffixes as in `concepts`.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers.modeling_outputs import CausalLMOutputWithPast

from sememe.backbone.cache import ConceptCache, deep_slots
from sememe.backbone.split import Spine
from sememe.concepts.anchor import TokenAnchor
from sememe.concepts.bridge import TailBridge
from sememe.concepts.codebook import ConceptEmbedding
from sememe.concepts.gate import GateState, RateGate
from sememe.concepts.head import HEADS
from sememe.concepts.masks import Lane, allow, segment_mask
from sememe.concepts.segments import Packing
from sememe.models.adapted import AdaptedModel
from sememe.models.configuration import OnlineConfig
from sememe.models.starting import Starting
from sememe.models.writing import NULL, Step, Writing


@dataclass
class OnlineOutput(CausalLMOutputWithPast):
    """`concept_ids` (B, T): the id written at each position; NULL -1, unquantised (the sink) -2.
    `term`: what the codes added to `loss`, if anything."""

    concept_ids: Tensor | None = None
    term: Tensor | None = None


class OnlineForCausalLM(Starting, Writing, AdaptedModel):
    """The base, split in three, with a ConceptHead, a ConceptEmbedding and a RateGate between the slices."""

    config_class = OnlineConfig

    def __init__(self, config: OnlineConfig, backbone=None):
        super().__init__(config, backbone)
        config.check()
        width = config.text_config.hidden_size
        self.head = HEADS[config.head](width, config.num_concepts, config.codes_per_concept)
        self.codes = ConceptEmbedding(config.num_concepts, width, config.codes_per_concept, config.shared_map)
        self.gate = RateGate(config.boundary, width, config.gate_noise)
        self.bridge = TailBridge(width) if config.bridge else None
        self.anchor = TokenAnchor(width) if config.anchor else None
        self.finish()

    @property
    def spine(self) -> Spine:
        return Spine(self.backbone)

    # ---- forward ----

    def forward(self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None,
                position_ids: Tensor | None = None, past_key_values: ConceptCache | None = None,
                inputs_embeds: Tensor | None = None, labels: Tensor | None = None, use_cache: bool | None = None,
                logits_to_keep: int = 0, ablation: str | None = None, **kwargs) -> OnlineOutput:
        """Logits of the next token at every position.

        Args:
            input_ids: (B, T) token ids, or `inputs_embeds` (B, T, D).
            attention_mask: (B, past + T), 0 on padding; left and right padding both work.
            position_ids: (B, T); default: counted from the first real token.
            past_key_values: a ConceptCache (`new_cache`), grown in place.
            labels: (B, T) targets, -100 ignored; shifted inside, as in transformers.
            logits_to_keep: logits of the last n positions only; 0 for all.
            ablation: replace the codes, see `concepts/ablation.py`: `zero`, `shuffle` (across the batch), `random`,
                `swap` (with the next row) or `drop:SHARE`; `@SEED` behind it for another draw.
        """
        spine = self.spine
        h_BTD = spine.embed(input_ids) if inputs_embeds is None else inputs_embeds
        cache = past_key_values
        if cache is None and use_cache:
            cache = self.new_cache(h_BTD.shape[0])
        step = self._step(spine, h_BTD, attention_mask, position_ids, cache)
        h_BTD = self._shallow(spine, h_BTD, step)

        read = self._read(h_BTD, step)
        written_BT, pack = read.written_BT, read.pack
        e_BCD, ids_BC, term = self._write(read, step, ablation)
        c_BCD = self._middle(spine, e_BCD, pack, written_BT, step)
        known_BCD = self._known(c_BCD, read)
        tail_BTD, last_BD = self._tail(h_BTD, known_BCD, read, cache)
        if self.training:
            c_BCD = self._confidence(c_BCD, known_BCD, h_BTD, read)
        d_BTD = pack.unpack(c_BCD, written_BT, tail_BTD)
        d_BTD = self._deep(spine, d_BTD, written_BT, step, read.state)

        ids_BT = torch.full_like(step.position_BT.expand(written_BT.shape), NULL)
        ids_BT = ids_BT.scatter(1, pack.index_BC, torch.where(pack.valid_BC, ids_BC, NULL))
        if cache is not None:
            cache.gate_state, cache.last_hidden_BD = read.state, h_BTD[:, -1].detach()
            cache.last_concept_BD, cache.open_segment = last_BD, read.open_segment
            cache.record(ids_BT)
        logits = spine.logits(d_BTD[:, -logits_to_keep:] if logits_to_keep else d_BTD)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=logits.shape[-1], **kwargs)
            if term is not None:
                items = kwargs.get("num_items_in_batch")  # of a whole step, which may be computed in parts
                term = term if items is None else term * (labels[:, 1:] != -100).sum() / items
                loss = loss + term
        return OnlineOutput(loss=loss, logits=logits, past_key_values=cache, concept_ids=ids_BT, term=term)

    def _step(self, spine: Spine, h_BTD: Tensor, attention_mask, position_ids, cache) -> Step:
        batch, length = h_BTD.shape[:2]
        before = 0 if cache is None else cache.get_seq_length()
        if attention_mask is None or bool(attention_mask[:, -length:].all()):
            valid_BT = torch.ones(batch, length, dtype=torch.bool, device=h_BTD.device)
            padded = cache is not None and cache.padded
        else:
            valid_BT = attention_mask[:, -length:].bool().to(h_BTD.device)
            padded = True
        if cache is not None:
            cache.padded = padded
        if position_ids is None:
            position_BT = (valid_BT.cumsum(1) - 1).clamp(min=0)
            if cache is not None:
                position_BT = position_BT + torch.from_numpy(cache.gate_state.tokens).to(position_BT)[:, None]
        else:
            position_BT = position_ids.to(h_BTD.device).expand(batch, length)
        plain = self.config.rate >= 1 and not padded and before == 0
        written_before = np.zeros(batch, np.int64) if cache is None else cache.concepts
        return Step(h_BTD, position_BT, spine.rope(h_BTD, position_BT), valid_BT, plain, padded, cache, written_before)

    def _shallow(self, spine: Spine, h_BTD: Tensor, step: Step) -> Tensor:
        """All tokens, causal."""
        split, cache, length = self.config.split, step.cache, h_BTD.shape[1]
        query = _all_concepts(step.position_BT, step.valid_BT)
        key = query
        if cache is not None:
            lane, end = cache.shallow, cache.get_seq_length() + length
            slot = torch.arange(end - length, end, device=h_BTD.device).expand(h_BTD.shape[:2])
            lane.plan(slot, step.position_BT, end)
            lane.valid[:, end - length : end] = step.valid_BT
            key = _all_concepts(lane.position[:, :end], lane.valid[:, :end])
        free = not step.padded and (length == 1 or key is query)
        return spine.run(0, split[0], h_BTD, step.position_BT, step.rope, self._mask(query, key, free), cache)

    def _middle(self, spine: Spine, e_BCD: Tensor, pack: Packing, written_BT: Tensor, step: Step) -> Tensor:
        """Concepts only, causal, each at its own place in the text."""
        first, last = self.config.split[0], sum(self.config.split[:2])
        cache, rows = step.cache, None
        position_BC = pack.pack(step.position_BT)
        rope = {kind: tuple(pack.pack(x.expand(len(e_BCD), -1, -1)) for x in pair) for kind, pair in step.rope.items()}
        query = key = _all_concepts(position_BC, pack.valid_BC)
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
            lane.plan(slot, position_BC, int(count_B.max()), rows, length_B=count_B)
            some = slice(None) if rows is None else rows
            key = _all_concepts(lane.position[some, : lane.used], lane.valid[some, : lane.used])
        free = not ragged and (e_BCD.shape[1] == 1 or cache is None or int(step.written_before.max()) == 0)
        free = free or step.plain
        c_BCD = spine.run(first, last, e_BCD, position_BC, rope, self._mask(query, key, free), cache)
        return c_BCD if rows is None else every.index_copy(0, rows, c_BCD)

    def _deep(self, spine: Spine, d_BTD: Tensor, written_BT: Tensor, step: Step, state: GateState) -> Tensor:
        """One state per position: concepts ≤ t and the tail of t."""
        split, cache, length = self.config.split, step.cache, d_BTD.shape[1]
        before = torch.from_numpy(step.written_before).to(d_BTD.device)[:, None]
        query = key = Lane(step.position_BT, before + written_BT.cumsum(1), written_BT, step.valid_BT)
        free = step.plain
        if cache is not None:
            lane, written = cache.deep, written_BT.cpu().numpy()
            slot, tail = deep_slots(written, step.valid_BT.cpu().numpy(), step.written_before, cache.tail)
            total_B = state.concepts + tail
            keep_before = length > 1
            old_position, old_valid = lane.position[:, : lane.used].clone(), lane.valid[:, : lane.used]
            lane.plan(torch.from_numpy(slot).to(d_BTD.device), step.position_BT, int(total_B.max()), None, keep_before,
                      length_B=total_B)
            cache.tail = tail
            if keep_before:
                old_concept = torch.arange(old_position.shape[1], device=d_BTD.device) < before
                old = Lane(old_position, before.expand(old_position.shape), old_concept, old_valid)
                key = Lane(*(torch.cat([a, b], 1) for a, b in zip(old, query, strict=True)))
            else:
                key = _all_concepts(lane.position[:, : lane.used], lane.valid[:, : lane.used])
                free = len(d_BTD) == 1 and not step.padded
        return spine.run(split[0] + split[1], sum(split), d_BTD, step.position_BT, step.rope,
                         self._mask(query, key, free), cache)

    def _mask(self, query: Lane, key: Lane, free: bool):
        """Mask of one slice for each sliding window. `free`: plain causal, or a single query that may see all."""
        attention = self.backbone.config._attn_implementation

        def make(window: int | None) -> Tensor | None:
            if free and attention == "sdpa" and (window is None or int(key.position.max()) < window):
                return None
            return allow(segment_mask(query, key, window), self.dtype, attention)

        return make

    def new_cache(self, batch: int) -> ConceptCache:
        """An empty cache for `batch` rows."""
        cache = ConceptCache(tuple(self.config.split), batch, self.device, GateState.start(batch),
                             self.config.text_config.hidden_size)
        if self.bridge is not None:
            cache.last_concept_BD = self.bridge.concept_mean.expand(batch, -1)
        return cache

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, generation_mode, batch_size, *args):
        if model_kwargs.get("past_key_values") is not None or generation_config.use_cache is False:
            return super()._prepare_cache_for_generation(
                generation_config, model_kwargs, generation_mode, batch_size, *args
            )
        if generation_config.cache_implementation is not None:
            raise ValueError(
                f"cache_implementation = {generation_config.cache_implementation!r}: the concept cache is the only one "
                "that fits this model. try: leave it out"
            )
        rows = batch_size * max(generation_config.num_beams or 1, generation_config.num_return_sequences or 1)
        model_kwargs["past_key_values"] = self.new_cache(rows)


def _all_concepts(position: Tensor, valid: Tensor) -> Lane:
    """A lane on which the segment rule is plain causal attention."""
    return Lane(position, torch.zeros_like(position), torch.ones_like(valid), valid)
