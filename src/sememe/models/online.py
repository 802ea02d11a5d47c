"""Online concepts: (B, T) ids → (B, T, V) logits, with part of the layers on the concepts alone
(docs/online.md).

    ids ─ embed ─ shallow (all tokens) ─ h ─┬─ writer ─ z or NULL ─ e ─ middle (concepts only) ─ c
                                            └─ deep over [concepts ≤ t ; tail(t)] ─ p(x_{t+1})

One forward serves training, prefill, chunks and decoding; without a cache it costs T shallow, T ·
rate middle and T deep layer applications. Suffixes as in `concepts`."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers.cache_utils import Cache
from transformers.generation import GenerationMode
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from sememe.backbone.cache import ConceptCache, NoCache
from sememe.backbone.calling import CACHE, check_forward, name_cache, take_cache
from sememe.backbone.exact import ExactEmbedding, computed_in
from sememe.backbone.saved import load_cache
from sememe.backbone.split import Rope, Spine, split_rope
from sememe.backbone.tails import KeysValues, TailKeys, check_keys, keys_values
from sememe.concepts.bridge import NoBridge, TailBridge
from sememe.concepts.codebook import vocabulary_blocks
from sememe.concepts.dial import Dial, evaluating
from sememe.concepts.masks import FLEX, Lanes
from sememe.concepts.segments import Chunk, Tails
from sememe.concepts.writer import NULL, ConceptWriter, WriteDecision, inner
from sememe.models.adapted import AdaptedModel
from sememe.models.configuration import OnlineConfig
from sememe.models.fitting import boundary_targets
from sememe.models.losses import loss_and_logits

TOKENS_AT_ONCE = 1024  # of the texts that the model is started from


@dataclass
class OnlineOutput(CausalLMOutputWithPast):
    """`concept_ids` (B, T): the id written at each position; NULL -1, unquantised (the sink) -2."""

    concept_ids: Tensor | None = None

    if CACHE != "cache":  # before transformers 5.24
        cache = property(attrgetter(CACHE))


class Begun(NamedTuple):
    """Tokens that have passed the shallow slice: what the others go on from."""

    chunk: Chunk
    h_BTD: Tensor
    decision: WriteDecision
    e_BCD: Tensor
    ids_BC: Tensor


class OnlineForCausalLM(AdaptedModel):
    """The base, split in three, with a ConceptWriter and a bridge between the slices."""

    config_class = OnlineConfig
    kernels = (*AdaptedModel.kernels, FLEX)
    _supports_flex_attn = True

    def __init__(self, config: OnlineConfig, backbone=None):
        super().__init__(config, backbone)
        config.check()
        width = config.text_config.hidden_size
        self.dial = Dial(config.rate, config.quantise)
        self.spine = Spine(self.backbone)
        self.writer = ConceptWriter(config, width, self.dial)
        self.bridge = TailBridge(width, config.bridge_hidden) if config.bridge else NoBridge()
        self.exact_embedding = ExactEmbedding()
        self.finish()

    @classmethod
    def check_base(cls, backbone, config) -> None:
        super().check_base(backbone, config)
        if config.segment == "both":
            check_keys(backbone)

    # ---- what stays exact in 16 bits ----

    def exact_modules(self) -> Iterable[nn.Module]:
        """The shallow slice: rounded to 16 bits, its states move 2 % of the ids, and an id that
        changes costs more than the rounding of all other layers (docs/log.md)."""
        return self.spine.decoder.layers[: self.config.split[0]]

    def cast(self, dtype: torch.dtype):
        table = self.get_input_embeddings()
        before_VD = table.weight.data
        super().cast(dtype)
        self.exact_embedding.keep(before_VD, table.weight)
        return self

    @property
    def exact(self) -> torch.dtype:
        """That of the shallow slice."""
        return computed_in(self.spine.decoder.layers[0])

    def embed(self, ids_BT: Tensor) -> Tensor:
        """(B, T) ids → (B, T, D), as the shallow slice takes them."""
        return self.exact_embedding(self.get_input_embeddings(), ids_BT, self.exact)

    # ---- forward ----

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cache: ConceptCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        ablation: str | None = None,
        **kwargs,
    ) -> OnlineOutput:
        """Logits of the next token at every position; None in training where all of them would be
        too many to hold (`loss_and_logits`).

        Args:
            input_ids: (B, T) token ids, or `inputs_embeds` (B, T, D).
            attention_mask: (B, past + T), 0 on padding; left and right padding both work.
            cache: a ConceptCache (`new_cache`), grown in place; `past_key_values` is its former
                name. `use_cache=True` starts one; without it none is made.
            labels: (B, T) targets, -100 ignored; shifted inside, as in transformers.
            logits_to_keep: logits of the last n positions only, or of these indices; 0 for all.
            ablation: replace the codes, see `concepts/ablation.py`: `zero`, `shuffle` (across the
                batch), `random`, `swap` (with the next row) or `drop:SHARE`; `@SEED` behind it for
                another draw.
            kwargs: `position_ids` (B, T), by default counted from the first real token; and what
                `loss_function` takes.

        Raises ValueError for an argument that would be ignored, tokens that do not go on from the
        cache, several texts in a row."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError(
                "forward takes either input_ids or inputs_embeds, got both or neither. try: "
                "input_ids alone"
            )
        embed_BTD = self.embed(input_ids) if inputs_embeds is None else inputs_embeds.to(self.exact)
        cache = self._cache(take_cache(cache, kwargs), embed_BTD, kwargs.get("use_cache"))
        text = self._text(embed_BTD, attention_mask, cache, kwargs)
        whole = self.training or cache.for_layers is None or not self.config.prefill_chunk
        chunks = [text] if whole else text.split(self.config.prefill_chunk)
        parts = [self.end(self.begin(chunk, cache, ablation), cache) for chunk in chunks]
        d_BTD, ids_BT = (torch.cat(part, 1) for part in zip(*parts, strict=True))
        # slice(-0, None): all
        last = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        normed_BTD = self.spine.decoder.norm(d_BTD[:, last])
        loss, logits = loss_and_logits(self, normed_BTD, labels, **kwargs)
        return OnlineOutput(
            loss=loss, logits=logits, concept_ids=ids_BT, **{CACHE: cache.for_layers}
        )

    def begin(self, chunk: Chunk, cache: NoCache, ablation: str | None = None) -> Begun:
        """Consecutive tokens through the shallow slice and the writer."""
        chunk.rope = self.spine.rope(chunk.embed_BTD, chunk.position_BT)
        h_BTD = self._shallow(chunk, cache)
        decision = self.writer.decide(h_BTD, chunk, cache.memory)
        return Begun(chunk, h_BTD, decision, *self.writer.write(decision, ablation))

    def end(self, begun: Begun, cache: NoCache) -> tuple[Tensor, Tensor]:
        """Their way through the middle and the deep slice: (B, T, D) last states, and the (B, T)
        ids that they write."""
        chunk, h_BTD, decision, e_BCD, ids_BC = begun
        if self.exact != self.dtype:  # from here on 16 bits do
            h_BTD, e_BCD = h_BTD.to(self.dtype), e_BCD.to(self.dtype)
            chunk.rope = self.spine.rope(h_BTD, chunk.position_BT)
        closed, tails = self._tails(h_BTD, chunk, decision, cache)
        c_BCD = self._middle(e_BCD, chunk, decision, cache, closed)

        teaches = self.training and self.writer.gate.boundary.learned  # by both of a place's states
        last_BD = cache.last_concept_BD
        tail_BTD, last_BD = self.bridge.tails(h_BTD, c_BCD, decision, last_BD, everywhere=teaches)
        if self.training:
            c_BCD = self._teach_gate(c_BCD, tail_BTD, decision)
        x_BTD = decision.pack.unpack(c_BCD, tail_BTD)
        lanes = cache.deep(chunk, decision)
        d_BTD = self._run(2, x_BTD, chunk.rope, lanes, cache.for_layers)

        ids_BT = decision.pack.unpack(ids_BC, torch.full_like(chunk.position_BT, NULL))
        cache.remember(decision.memory, last_BD, tails, ids_BT)
        return d_BTD, ids_BT

    def _shallow(self, chunk: Chunk, cache: NoCache) -> Tensor:
        lanes = cache.shallow(chunk, self.config.shallow_window)
        return self._run(0, chunk.embed_BTD, chunk.rope, lanes, cache.for_layers)

    def _tails(
        self, h_BTD: Tensor, chunk: Chunk, decision: WriteDecision, cache: NoCache
    ) -> tuple[Tails, Tails]:
        """Those that concepts of the chunk see in the middle slice, and those that stay open; none
        unless `segment: both`."""
        if self.config.segment != "both":
            return cache.tails, cache.tails
        return cache.tails.then(h_BTD, chunk, decision.written)

    def _middle(
        self, e_BCD: Tensor, chunk: Chunk, decision: WriteDecision, cache: NoCache, closed: Tails
    ) -> Tensor:
        if not decision.written.any():
            return e_BCD
        lanes, for_layers = cache.middle(chunk, decision, closed), cache.for_layers
        x_bCD, rows, closed = e_BCD[lanes.rows], lanes.rows, closed[lanes.rows]
        # Together: dynamic rope goes by the largest position that it is shown.
        position_bn = torch.cat([lanes.query.position, closed.position_Bn], 1)
        rope, tail_rope = split_rope(self.spine.rope(x_bCD, position_bn), x_bCD.shape[1])
        if closed.real.any():
            for_layers = TailKeys(for_layers, self._tail_keys(closed.h_BnD, tail_rope))
        c_bCD = self._run(1, x_bCD, rope, lanes, for_layers)
        return c_bCD if isinstance(rows, slice) else e_BCD.index_copy(0, rows, c_bCD)

    def _tail_keys(self, h_BnD: Tensor, rope: Rope) -> Callable[[int], KeysValues]:
        """For each middle layer, keys and values of tail tokens with these shallow states. On their
        way through the slice the states are taken to move straight to the bridged ones."""
        first, last = self._layers(1)
        step_BnD = (self.bridge.alone(h_BnD) - h_BnD) / (last - first)

        def of_layer(layer: int) -> KeysValues:
            x_BnD = h_BnD + (layer - first) * step_BnD
            kind = self.spine.kinds[layer]
            return keys_values(self.spine.decoder.layers[layer], x_BnD, rope[kind])

        return of_layer

    def _layers(self, number: int) -> tuple[int, int]:
        """[first, last) layer of a slice."""
        return sum(self.config.split[:number]), sum(self.config.split[: number + 1])

    def _run(
        self, number: int, x_BnD: Tensor, rope: Rope, lanes: Lanes, for_layers: Cache | None
    ) -> Tensor:
        """Slice `number` of the layers."""
        first, last = self._layers(number)
        masks = lanes.masks(self.backbone.config._attn_implementation, x_BnD.dtype)
        return self.spine.run(first, last, x_BnD, lanes.query.position, rope, masks, for_layers)

    def _teach_gate(self, c_BCD: Tensor, tail_BTD: Tensor, decision: WriteDecision) -> Tensor:
        """The same concepts, with gradient for the gate. Interpolated after the middle layers so
        that what they read stays discrete."""
        # A zero term of the new modules keeps every rank's gradients in step when its batch used no
        # code.
        new = [p for name, p in self.named_parameters() if p.requires_grad and "lora_" not in name]
        c_BCD = c_BCD + (sum(p.float().sum() for p in new) * 0.0).to(c_BCD.dtype)
        if self.dial.rate >= 1 or not self.writer.gate.boundary.learned:
            return c_BCD
        return self.writer.confidence(c_BCD, decision.pack.pack(tail_BTD), decision)

    # ---- what a forward is given ----

    def _text(
        self, embed_BTD: Tensor, attention_mask: Tensor | None, cache: NoCache, named: dict
    ) -> Chunk:
        """The new tokens. Raises ValueError for arguments that fit neither them nor the cache."""
        self.refuse_unknown(named, frozenset({"position_ids"}))
        unsupported = named.get("output_attentions") or named.get("output_hidden_states")
        position_ids, before = named.get("position_ids"), cache.get_seq_length()
        check_forward(embed_BTD.shape, attention_mask, position_ids, before, unsupported)
        return Chunk.of(embed_BTD, attention_mask, position_ids, cache.memory.gate.tokens)

    def new_cache(self, batch: int, keeps: bool = True) -> ConceptCache | NoCache:
        """An empty cache for `batch` rows, or one that keeps nothing."""
        memory = self.writer.memory(batch)
        first_BD, tails = self.bridge.first(memory.last_BD), Tails.none(memory.last_BD)
        start = memory, first_BD, tails, self.config.max_tail, self.config.segment
        if not keeps:
            return NoCache(*start)
        cache = ConceptCache(self.config.split, *start)
        cache.model_sha256 = self.source_sha256
        return cache

    def load_cache(self, path: str | Path) -> tuple[ConceptCache, Tensor]:
        """What `cache.save` wrote: the cache and the (B, T) token ids of its text. Raises
        CheckpointError: no such file, one that was changed, one of another model or dtype."""
        return load_cache(self, Path(path))

    def _cache(self, cache, embed_BTD: Tensor, use_cache: bool | None) -> NoCache:
        """The one that is given, with room for these tokens, or a new one. Raises ValueError where
        it does not fit."""
        batch, length = embed_BTD.shape[:2]
        if cache is None:
            layer = self.spine.decoder.layers[0]
            # Checkpointed layers would leave it empty.
            drops = self.training and getattr(layer, "gradient_checkpointing", False)
            cache = self.new_cache(batch, keeps=bool(use_cache and not drops))
        elif not isinstance(cache, ConceptCache) or len(cache.concept_ids) != batch:
            rows = len(getattr(cache, "concept_ids", ()))
            raise ValueError(
                f"the cache is a {type(cache).__name__} with {rows} rows, the batch has {batch}: "
                "need this model's own, with one row for each, beams and num_return_sequences "
                f"counted. try: new_cache({batch})"
            )
        if 0 < self.config.prefill_chunk < length:
            cache.reserve(length, round(length * self.dial.rate), self.config.shallow_window)
        return cache

    def _prepare_cache_for_generation(
        self, generation_config, model_kwargs, generation_mode, batch_size, *args
    ):
        if generation_mode == GenerationMode.ASSISTED_GENERATION:
            raise ValueError(
                "assisted decoding takes tokens back, and tails that a concept closed cannot come "
                "back. try: generate without assistant_model, prompt_lookup_num_tokens and "
                "assistant_early_exit"
            )
        if name_cache(model_kwargs) is None and generation_config.use_cache is not False:
            beams, texts = generation_config.num_beams, generation_config.num_return_sequences
            model_kwargs[CACHE] = self.new_cache(batch_size * max(beams or 1, texts or 1))
        return super()._prepare_cache_for_generation(
            generation_config, model_kwargs, generation_mode, batch_size, *args
        )

    # ---- start, from (N, T) blocks of training text, without gradient ----

    @torch.no_grad()
    def start_frame(self, ids_NT: Tensor) -> dict[str, float]:
        """Sets the frame of the codes, the gate's scores and threshold, and the bridge as it fits
        the dial's rate. Returns shares of variance explained."""
        targets_nT = boundary_targets(self, ids_NT)
        shares = self.writer.start_frame(self.shallow_states(ids_NT), targets_nT)
        return shares | self._start_bridge(ids_NT) if self.bridge.fitted else shares

    @torch.no_grad()
    def start_codes(self, ids_NT: Tensor, seed: int = 0) -> dict[str, float]:
        """Codebook and head by k-means of the shallow states of the text and of the whole
        vocabulary in random order: rare words need codes too, and a little text has few of them
        (docs/log.md)."""
        texts = ids_NT, vocabulary_blocks(ids_NT, self.config.text_config.vocab_size, seed)
        states = [pair for text_NT in texts for pair in self._code_states(text_NT)]
        h_ND, token_NF = (torch.cat(x) for x in zip(*states, strict=True))
        shares = self.writer.start_codes(h_ND, token_NF, seed)
        self.calibrate_gate(ids_NT)
        return shares

    @torch.no_grad()
    def calibrate_gate(self, ids_NT: Tensor) -> None:
        """Sets the gate's score distribution to that of the text."""
        self.writer.start_gate(self.shallow_states(ids_NT))

    @torch.no_grad()
    def written_inputs(self, ids_NT: Tensor) -> Tensor:
        """(n, D) normalised states that the codes stand for where the gate writes."""
        batches = self._shallow_batches(ids_NT)
        decisions = (self.writer.decide(h_BTD, text) for text, h_BTD in batches)
        return torch.cat([self.writer.inputs(decision)[0] for decision in decisions])

    def _code_states(self, ids_NT: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """(n, D) states that codes stand for, and the embeddings that an anchor reads: at every
        position but the sinks, or where the readout reads tails at those that write."""
        for text, h_BTD in self._shallow_batches(ids_NT):
            if self.writer.readout.tokens > 1:
                decision = self.writer.decide(h_BTD, text)
                coded_BC = decision.coded_BC
                yield decision.h_BCD[coded_BC].float(), decision.token_BCF[coded_BC]
            else:
                yield inner(h_BTD).float(), inner(text.embed_BTD)

    def _start_bridge(self, ids_NT: Tensor) -> dict[str, float]:
        """A fit from the shallow states and last concepts of tail positions to the states that the
        base itself would enter the deep slice with. Concepts are continuous here; LoRA is still
        zero, so the base is the teacher."""
        parts = []
        for text, h_BTD in self._shallow_batches(ids_NT):
            cache = self.new_cache(len(h_BTD), keeps=False)
            decision = self.writer.decide(h_BTD, text)
            written_BT = decision.written_BT
            closed, _ = self._tails(h_BTD, text, decision, cache)
            c_BCD = self._middle(decision.h_BCD, text, decision, cache, closed)
            last_BTD, _ = decision.pack.before(c_BCD, cache.last_concept_BD)
            target_BTD = self._run(1, h_BTD, text.rope, cache.shallow(text, None), None)
            # After the sink alone there is no concept to read.
            tail_BT = ~written_BT & (written_BT.cumsum(1) > 1)
            parts.append([x_BTD[tail_BT].float() for x_BTD in (h_BTD, last_BTD, target_BTD)])
        states = [torch.cat(part) for part in zip(*parts, strict=True)]
        return {"bridge_explains": self.bridge.start(*states)} if len(states[0]) else {}

    @torch.no_grad()
    def shallow_states(self, ids_NT: Tensor) -> Tensor:
        """(N, T, D) fp32 outputs of the shallow slice."""
        return torch.cat([h_BTD.float() for _, h_BTD in self._shallow_batches(ids_NT)])

    def _shallow_batches(
        self, ids_NT: Tensor, tokens: int = TOKENS_AT_ONCE
    ) -> Iterator[tuple[Chunk, Tensor]]:
        """(chunk, (B, T, D) outputs of the shallow slice), batch by batch, as in evaluation."""
        parts = ids_NT.to(self.device).split(max(1, tokens // ids_NT.shape[1]))
        with evaluating(self):
            # None: no bar where stderr is a pipe.
            for ids_BT in tqdm(parts, "shallow states", disable=None, leave=False):
                text = Chunk.of(self.embed(ids_BT))
                text.rope = self.spine.rope(text.embed_BTD, text.position_BT)
                yield text, self._shallow(text, self.new_cache(len(ids_BT), keeps=False))
