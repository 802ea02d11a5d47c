"""Online concepts: (B, T) ids → (B, T, V) logits, with part of the layers on the concepts alone
(docs/online.md).

    ids ─ embed ─ shallow (all tokens) ─ h ─┬─ writer ─ z or NULL ─ e ─ middle (concepts only) ─ c
                                            └─ deep over [concepts ≤ t ; tail(t)] ─ norm ─ lm_head ─ p(x_{t+1})

One forward serves training, prefill, chunks and decoding; without a cache it costs T shallow, T ·
rate middle and T deep layer applications. Suffixes as in `concepts`."""

from collections.abc import Iterator
from dataclasses import dataclass
from operator import attrgetter

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers.generation import GenerationMode
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from sememe.backbone.cache import ConceptCache, NoCache
from sememe.backbone.calling import CACHE, check_forward, name_cache, take_cache
from sememe.backbone.split import Rope, Spine
from sememe.concepts.bridge import NoBridge, TailBridge
from sememe.concepts.codebook import vocabulary_blocks
from sememe.concepts.dial import Dial
from sememe.concepts.masks import FLEX, Lanes
from sememe.concepts.segments import Chunk
from sememe.concepts.writer import NULL, ConceptWriter, WriteDecision, inner
from sememe.models.adapted import AdaptedModel, boundary_targets
from sememe.models.configuration import OnlineConfig

BRIDGE_TOKENS = 16384  # at most, that the bridge and a fitted boundary are started from


@dataclass
class OnlineOutput(CausalLMOutputWithPast):
    """`concept_ids` (B, T): the id written at each position; NULL -1, unquantised (the sink) -2."""

    concept_ids: Tensor | None = None

    if CACHE != "cache":  # before transformers 5.24
        cache = property(attrgetter(CACHE))


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
        self.writer = ConceptWriter(config, width, self.dial)
        self.bridge = TailBridge(width) if config.bridge else NoBridge()
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
        x_BTD = spine.embed(input_ids) if inputs_embeds is None else inputs_embeds
        drops = self.training and getattr(spine.decoder.layers[0], "gradient_checkpointing", False)
        if cache is None and use_cache and not drops:  # checkpointed layers would leave it empty
            cache = self.new_cache(x_BTD.shape[0])
        if cache is not None:
            self._check_cache(cache, x_BTD.shape[0])
        seen = 0 if cache is None else cache.get_seq_length()
        attentions = kwargs.get("output_attentions") or self.config.output_attentions
        check_forward(x_BTD.shape, attention_mask, position_ids, seen, attentions)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states

        keys = NoCache() if cache is None else cache
        parts = []
        for start, end in self._chunks(x_BTD.shape[1], cache):
            mask, place = attention_mask, position_ids
            if mask is not None:
                mask = mask[:, : mask.shape[1] - x_BTD.shape[1] + end]
            if place is not None:
                place = place[:, start:end]
            spine.record = [] if output_hidden_states else None
            chunk = Chunk.of(x_BTD[:, start:end], mask, place, keys.tokens)
            parts.append(self._through(spine, chunk, keys, ablation))
        d_BTD, ids_BT, hidden = zip(*parts, strict=True)
        d_BTD = torch.cat(d_BTD, 1)
        # slice(-0, None): all
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = spine.logits(d_BTD[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=logits.shape[-1], **kwargs)
        states = hidden[0]  # those in the graph, where there is one chunk
        if len(hidden) > 1:
            states = tuple(torch.cat(parts, 1) for parts in zip(*hidden, strict=True))
        return OnlineOutput(
            loss=loss,
            logits=logits,
            hidden_states=states if output_hidden_states else None,
            concept_ids=torch.cat(ids_BT, 1),
            **{CACHE: cache},
        )

    def _chunks(self, length: int, cache: ConceptCache | None) -> Iterator[tuple[int, int]]:
        """(start, end) of what is read at a time: with a cache a long text goes in parts, so that
        no mask grows with its square."""
        size = self.config.prefill_chunk
        if cache is None or self.training or not size:
            size = length
        if size < length:
            concepts = round(length * self.dial.rate)
            cache.expect(length, concepts, self.config.shallow_window)
        return ((start, min(start + size, length)) for start in range(0, length, size))

    def _through(
        self, spine: Spine, chunk: Chunk, cache: ConceptCache | NoCache, ablation: str | None
    ) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """All three slices over one chunk: (B, T, D) last states, (B, T) ids, and what each layer
        left if it is recorded."""
        chunk.rope = spine.rope(chunk.embed_BTD, chunk.position_BT)
        h_BTD = self._shallow(spine, chunk, cache)

        decision = self.writer.decide(h_BTD, chunk, cache.memory)
        e_BCD, ids_BC = self.writer.write(decision, ablation)
        c_BCD = self._middle(spine, e_BCD, chunk, decision, cache)

        last_BD = cache.last_concept(self.bridge.first(h_BTD))
        tail_BTD, last_BD = self.bridge.tails(h_BTD, c_BCD, decision, last_BD)
        if self.training:
            c_BCD = self._teach_gate(c_BCD, h_BTD, decision)
        x_BTD = decision.pack.unpack(c_BCD, decision.written_BT, tail_BTD)
        lanes = cache.deep(chunk, decision)
        d_BTD = self._run(spine, 2, x_BTD, chunk.position_BT, chunk.rope, lanes, cache)

        pack = decision.pack
        ids_BT = torch.full_like(chunk.position_BT, NULL)
        ids_BT = ids_BT.scatter(1, pack.index_BC, torch.where(pack.valid_BC, ids_BC, NULL))
        cache.remember(decision, last_BD, ids_BT)
        return d_BTD, ids_BT, self._hidden_states(spine, chunk, decision)

    def _shallow(self, spine: Spine, chunk: Chunk, cache: ConceptCache | NoCache) -> Tensor:
        lanes = cache.shallow(chunk, self.config.shallow_window)
        return self._run(spine, 0, chunk.embed_BTD, chunk.position_BT, chunk.rope, lanes, cache)

    def _middle(
        self,
        spine: Spine,
        e_BCD: Tensor,
        chunk: Chunk,
        decision: WriteDecision,
        cache: ConceptCache | NoCache,
    ) -> Tensor:
        lanes = cache.middle(chunk, decision)
        if lanes is None:
            return e_BCD
        position_BC, rope = chunk.packed(decision.pack)
        return self._run(spine, 1, e_BCD, position_BC, rope, lanes, cache)

    def _run(
        self,
        spine: Spine,
        number: int,
        x_BnD: Tensor,
        position_Bn: Tensor,
        rope: Rope,
        lanes: Lanes,
        cache: ConceptCache | NoCache,
    ) -> Tensor:
        """Slice `number` of the layers over the rows that take part; others stay as they are."""
        first = sum(self.config.split[:number])
        last = first + self.config.split[number]
        every, rows = x_BnD, lanes.rows
        if rows is not None:
            x_BnD, position_Bn = x_BnD[rows], position_Bn[rows]
            rope = {kind: tuple(x[rows] for x in pair) for kind, pair in rope.items()}
        masks = lanes.masks(self.backbone.config._attn_implementation, self.dtype)
        x_BnD = spine.run(
            first, last, x_BnD, position_Bn, rope, masks, cache if cache.layers else None
        )
        return x_BnD if rows is None else every.index_copy(0, rows, x_BnD)

    def _teach_gate(self, c_BCD: Tensor, h_BTD: Tensor, decision: WriteDecision) -> Tensor:
        """The same concepts, with gradient for the gate. Interpolated after the middle layers so
        that what they read stays discrete."""
        # A zero term of the new modules keeps every rank's gradients in step when its batch used no
        # code.
        new = [p for name, p in self.named_parameters() if p.requires_grad and "lora_" not in name]
        c_BCD = c_BCD + (sum(p.float().sum() for p in new) * 0.0).to(c_BCD.dtype)
        if self.dial.rate >= 1 or not self.writer.gate.boundary.learned:
            return c_BCD
        with torch.no_grad():
            tail_BCD = self.bridge.at_concepts(h_BTD, c_BCD, decision)
        return self.writer.confidence(c_BCD, tail_BCD, decision)

    def _hidden_states(
        self, spine: Spine, chunk: Chunk, decision: WriteDecision
    ) -> tuple[Tensor, ...]:
        """(B, T, D) × (layers + 1), as transformers has them: the embeddings, what each layer left,
        the last one normed. A token that writes nothing skips the middle layers: there it is what
        the shallow slice left."""
        if spine.record is None:
            return ()
        shallow, middle, deep = self.config.split
        left = spine.record
        h_BTD, states = left[shallow - 1], [chunk.embed_BTD, *left[:shallow]]
        for c_bCD in left[shallow : len(left) - deep]:
            c_BCD = c_bCD
            if len(c_bCD) < len(h_BTD):  # only the rows that wrote went through
                rows = decision.written_BT.any(1).nonzero()[:, 0]
                c_BCD = h_BTD.new_zeros(len(h_BTD), *c_bCD.shape[1:]).index_copy(0, rows, c_bCD)
            states.append(decision.pack.unpack(c_BCD, decision.written_BT, h_BTD))
        states += [h_BTD] * (1 + shallow + middle - len(states))  # no row wrote
        return *states, *left[len(left) - deep : -1], spine.decoder.norm(left[-1])

    # ---- cache ----

    def new_cache(self, batch: int) -> ConceptCache:
        """An empty cache for `batch` rows."""
        memory = self.writer.memory(batch)
        return ConceptCache(tuple(self.config.split), memory, self.bridge.first(memory.last_BD))

    def _check_cache(self, cache, batch: int) -> None:
        """Raises ValueError for a cache that is not this model's, or has other rows."""
        if not isinstance(cache, ConceptCache):
            raise ValueError(
                f"the cache is a {type(cache).__name__}: need this model's own. try: "
                f"new_cache({batch})"
            )
        if len(cache.tail) != batch:
            raise ValueError(
                f"the cache has {len(cache.tail)} rows, the batch has {batch}: need one for each, "
                f"beams and num_return_sequences counted. try: new_cache({batch})"
            )

    def _prepare_cache_for_generation(
        self, generation_config, model_kwargs, generation_mode, batch_size, *args
    ):
        if generation_mode == GenerationMode.ASSISTED_GENERATION:
            raise ValueError(
                "assisted decoding takes tokens back, and tails that a concept closed cannot come "
                "back. try: generate without assistant_model, prompt_lookup_num_tokens and "
                "assistant_early_exit"
            )
        if name_cache(model_kwargs) is not None or generation_config.use_cache is False:
            return super()._prepare_cache_for_generation(
                generation_config, model_kwargs, generation_mode, batch_size, *args
            )
        if generation_config.cache_implementation is not None:
            raise ValueError(
                f"cache_implementation = {generation_config.cache_implementation!r}: the concept "
                "cache is the only one that fits this model. try: leave it out"
            )
        rows = max(generation_config.num_beams or 1, generation_config.num_return_sequences or 1)
        model_kwargs[CACHE] = self.new_cache(batch_size * rows)

    # ---- start, from (N, T) blocks of training text, without gradient ----

    @torch.no_grad()
    def start_frame(self, ids_NT: Tensor, rate: float | None = None) -> dict[str, float]:
        """Sets the frame of the codes, the gate's scores and threshold, and the bridge as it fits
        `rate`. Returns shares of variance explained."""
        h_NTD = self.shallow_states(ids_NT, "calibrate: gate")
        shares = self.writer.start_frame(h_NTD, boundary_targets(self, ids_NT))
        if self.bridge.fitted:
            with self.dial.at(rate=rate or self.dial.rate):
                shares |= self._start_bridge(ids_NT)
        return shares

    @torch.no_grad()
    def start_codes(self, ids_NT: Tensor, seed: int = 0) -> dict[str, float]:
        """Codebook and head by k-means of the shallow states of the text and of the whole
        vocabulary in random order: rare words need codes too, and a little text has few of them
        (docs/log.md)."""
        texts = ids_NT, vocabulary_blocks(ids_NT, self.config.text_config.vocab_size, seed)
        states = [self._code_states(text_NT) for text_NT in texts]
        h_ND, token_NF = (torch.cat(x) for x in zip(*states, strict=True))
        with tqdm(desc="calibrate: codes", disable=None, leave=False) as bar:
            shares = self.writer.start_codes(h_ND, token_NF, seed, bar.update)
        self.calibrate_gate(ids_NT)
        return shares

    @torch.no_grad()
    def calibrate_gate(self, ids_NT: Tensor) -> None:
        """Sets the gate's score distribution to that of the text."""
        if self.writer.gate.boundary.scored:
            self.writer.start_gate(self.shallow_states(ids_NT))

    @torch.no_grad()
    def written_inputs(self, ids_NT: Tensor) -> Tensor:
        """(n, D) normalised states that the codes stand for where the gate writes."""
        return torch.cat(
            [
                self.writer.inputs(self.writer.decide(h_BTD, chunk))[0]
                for chunk, h_BTD in self._shallow_batches(ids_NT)
            ]
        )

    def _code_states(self, ids_NT: Tensor) -> tuple[Tensor, Tensor]:
        """(n, D) states that codes stand for, and the embeddings that an anchor reads: at every
        position but the sinks, or where the readout sums up segments at those that write."""
        states, tokens = [], []
        for chunk, h_BTD in self._shallow_batches(ids_NT, "calibrate: states"):
            if self.writer.readout.summed and self.writer.readout.tokens > 1:
                decision = self.writer.decide(h_BTD, chunk)
                states.append(decision.h_BCD[decision.coded_BC].float())
                tokens.append(decision.token_BCF[decision.coded_BC])
            else:
                states.append(inner(h_BTD).float())
                tokens.append(inner(chunk.embed_BTD))
        return torch.cat(states), torch.cat(tokens)

    def _start_bridge(self, ids_NT: Tensor) -> dict[str, float]:
        """Least squares from the shallow states and last concepts of tail positions to the states
        that the base itself would enter the deep slice with. Concepts are continuous here; LoRA is
        still zero, so the base is the teacher."""
        spine, states, lasts, targets = self.spine, [], [], []
        blocks_NT = ids_NT[: max(1, BRIDGE_TOKENS // ids_NT.shape[1])]
        for chunk, h_BTD in self._shallow_batches(blocks_NT, "calibrate: bridge"):
            decision = self.writer.decide(h_BTD, chunk)
            c_BCD = self._middle(spine, decision.h_BCD, chunk, decision, NoCache())
            last_BTD = decision.pack.last(c_BCD, decision.written_BT)
            lanes = NoCache().shallow(chunk, None)
            target_BTD = self._run(spine, 1, h_BTD, chunk.position_BT, chunk.rope, lanes, NoCache())
            # Behind the sink alone there is no concept to read.
            tail_BT = ~decision.written_BT & (decision.written_BT.cumsum(1) > 1)
            for parts, x in ((states, h_BTD), (lasts, last_BTD), (targets, target_BTD)):
                parts.append(x[tail_BT].float())
        if sum(map(len, states)) == 0:
            return {}
        share = self.bridge.start(torch.cat(states), torch.cat(lasts), torch.cat(targets))
        return {"bridge_explains": share}

    def shallow_states(self, ids_NT: Tensor, name: str | None = None) -> Tensor:
        """(N, T, D) fp32 outputs of the shallow slice."""
        return torch.cat([h_BTD.float() for _, h_BTD in self._shallow_batches(ids_NT, name)])

    def _shallow_batches(
        self, ids_NT: Tensor, name: str | None = None, tokens: int = 1024
    ) -> Iterator[tuple[Chunk, Tensor]]:
        """(chunk, (B, T, D) outputs of the shallow slice), batch by batch, as in evaluation; with
        a bar of that `name`."""
        spine, was_training = self.spine, self.training
        self.eval()
        parts = ids_NT.to(self.device).split(max(1, tokens // ids_NT.shape[1]))
        off = True if name is None else None  # None: only in pipes
        for ids_BT in tqdm(parts, desc=name, unit="batch", disable=off, leave=False):
            chunk = Chunk.of(spine.embed(ids_BT))
            chunk.rope = spine.rope(chunk.embed_BTD, chunk.position_BT)
            yield chunk, self._shallow(spine, chunk, NoCache())
        self.train(was_training)
