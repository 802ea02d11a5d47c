"""A transformers Cache whose layers keep all tokens (shallow), or concepts and the last `max_tail`
normal tokens (middle, deep).

For each slice of a forward the cache says where its entries go and which keys its queries meet
(`shallow`, `middle`, `deep`). `NoCache` says the same where nothing is kept."""

import copy
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import Cache

from sememe.backbone.saved import save_cache
from sememe.backbone.slices import ALL, GROWTH, Rows, SliceCache
from sememe.concepts.gate import GateState
from sememe.concepts.masks import Lane, Lanes
from sememe.concepts.segments import Chunk, Tails
from sememe.concepts.writer import Memory, WriteDecision


class NoCache:
    """A forward whose keys are its own entries alone. `memory`, `last_concept_BD`, `tails`: what
    rows start with; `max_tail`, `segment`: as configured, which normal tokens are seen."""

    for_layers: Cache | None = None

    def __init__(
        self, memory: Memory, last_concept_BD: Tensor, tails: Tails, max_tail: int, segment: str
    ):
        self.memory = memory
        self.last_concept_BD = last_concept_BD
        self.tails = tails
        self.max_tail = max_tail
        self.segment = segment

    def shallow(self, chunk: Chunk, window: int | None) -> Lanes:
        """All tokens, causal; with a `window` each sees that many, itself among them, and the first
        of the text."""
        lane = Lane.causal(chunk.position_BT, chunk.valid_BT)
        return Lanes(lane, lane, not chunk.padded, window)

    def middle(self, chunk: Chunk, decision: WriteDecision, closed: Tails) -> Lanes:
        """Concepts, causal, each at its own place in the text, and keys of the tails that they
        close. Padding comes after all of the concepts."""
        pack, device = decision.pack, chunk.position_BT.device
        query = Lane.causal(pack.pack(chunk.position_BT), pack.valid_BC)
        first_BT = torch.from_numpy(self.numbers(chunk, decision)[1]).to(device)
        query = query._replace(first=pack.pack(first_BT))
        number, real = (torch.from_numpy(x).to(device) for x in (self.closed(closed), closed.real))
        key = query.then(Lane.tail(closed.position_Bn, number, real))
        return Lanes(query, key, plain=not closed.real.any())

    def deep(self, chunk: Chunk, decision: WriteDecision) -> Lanes:
        """Each token sees the concepts up to it, and the last normal tokens."""
        number, first = (
            torch.from_numpy(x).to(chunk.position_BT.device) for x in self.numbers(chunk, decision)
        )
        lane = Lane(chunk.position_BT, number, first, decision.written_BT, chunk.valid_BT)
        return Lanes(lane, lane, bool(decision.written.all()))

    def numbers(self, chunk: Chunk, decision: WriteDecision) -> tuple[np.ndarray, np.ndarray]:
        """(B, T) numbers of the chunk's normal tokens in their texts, of a concept that of the last
        one before it; and of the first one that each sees."""
        gate = self.memory.gate
        count = gate.normal[:, None] + (chunk.real & ~decision.written).cumsum(1)
        if self.segment != "none":
            return count - 1, count - self.max_tail
        closed = np.where(decision.written, count, gate.closed[:, None])
        return count - 1, np.maximum.accumulate(closed, 1)

    def closed(self, tails: Tails) -> np.ndarray:
        """(B, n) numbers of tails that the chunk's first concepts close."""
        return self.memory.gate.closed[:, None] + np.arange(tails.real.shape[1])

    def remember(
        self, memory: Memory, last_concept_BD: Tensor, tails: Tails, ids_BT: Tensor
    ) -> None:
        """Keeps what the next chunk needs beside keys and values."""

    def reserve(self, tokens: int, concepts: int, window: int | None) -> None:
        """Room for what comes next."""

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0


class ConceptCache(NoCache, Cache):
    """The online model's cache. What decides about the next token lives here too, so that beams,
    batches and continued generation carry it along: the writer's memory, the last concept's state,
    the states of the open tail, if a concept is to see them, the ids written so far, (B, tokens and
    padding). `model_sha256`: of the files that its model was loaded from."""

    rows: Rows = ALL
    model_sha256: str | None = None

    def __init__(self, split: tuple[int, int, int], *start):
        NoCache.__init__(self, *start)
        last_concept_BD = self.last_concept_BD
        batch, device = len(last_concept_BD), last_concept_BD.device
        strict, ring = self.segment == "none", self.max_tail * (self.segment == "both")
        self.slices = [
            SliceCache(batch, device),
            SliceCache(batch, device, ring),
            SliceCache(batch, device, self.max_tail, strict),
        ]
        parts = zip(self.slices, split, strict=True)
        Cache.__init__(self, layers=[part for part, layers in parts for _ in range(layers)])
        self.concept_ids = torch.empty(batch, 0, dtype=torch.long, device=device)

    @property
    def for_layers(self) -> Cache:
        """What layers and outputs are handed."""
        return self

    @property
    def tokens(self) -> np.ndarray:
        """(B,) tokens read so far, without padding."""
        return self.memory.gate.tokens

    @property
    def concepts(self) -> np.ndarray:
        """(B,) concepts written so far."""
        return self.memory.gate.concepts

    # ---- one forward ----

    def shallow(self, chunk: Chunk, window: int | None) -> Lanes:
        lanes = super().shallow(chunk, window)
        return self.slices[0].plan_tokens(lanes, self.tokens, chunk.real, window, self.rows)

    def middle(self, chunk: Chunk, decision: WriteDecision, closed: Tails) -> Lanes:
        part, gate = self.slices[1], decision.memory.gate
        rank = self.concepts[:, None] + np.arange(decision.pack.index_BC.shape[1])
        slot = np.where(rank < gate.concepts[:, None], part.ring + rank, -1)
        lanes, writes = super().middle(chunk, decision, closed), slot[:, 0] >= 0
        if slot.shape[1] == 1 and not writes.all():  # only the rows that write take part
            rows = torch.from_numpy(writes.nonzero()[0]).to(chunk.position_BT.device)
            lanes = lanes._replace(query=lanes.query[rows], key=lanes.key[rows], rows=rows)
        ring = part.ring_slots(self.closed(closed), closed.real, gate.closed)
        slot = np.concatenate([slot, ring], 1)
        return part.plan(lanes, slot, gate.concepts, gate.closed, self.rows)

    def deep(self, chunk: Chunk, decision: WriteDecision) -> Lanes:
        part, gate, written = self.slices[2], decision.memory.gate, decision.written
        number = self.numbers(chunk, decision)[0]
        ring = part.ring_slots(number, chunk.real & ~written, gate.normal)
        rank = self.concepts[:, None] + written.cumsum(1) - 1
        slot = np.where(written, part.ring + rank, ring)
        lanes = super().deep(chunk, decision)
        return part.plan(lanes, slot, gate.concepts, gate.normal, self.rows)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args, **kwargs
    ) -> tuple[Tensor, Tensor]:
        """What a layer's attention calls."""
        new = torch.stack([key_states, value_states])
        return self.layers[layer_idx].update(layer_idx, new).unbind(0)

    def remember(
        self, memory: Memory, last_concept_BD: Tensor, tails: Tails, ids_BT: Tensor
    ) -> None:
        self.memory = memory
        self.last_concept_BD = last_concept_BD
        self.tails = tails
        self.concept_ids = torch.cat([self.concept_ids, ids_BT], 1)

    def reserve(self, tokens: int, concepts: int, window: int | None) -> None:
        """Room for a prompt that comes in chunks, at once: a cache that grew with each would be
        copied as often, and leave holes of its former sizes in the heap. `window`: the shallow
        slice's."""
        shallow, *others = self.slices
        total = shallow.used() + tokens
        shallow.reserve = min(total, window + 1) if window else total
        for part in others:
            part.reserve = max(part.used(), part.ring) + concepts + GROWTH

    def bytes(self) -> int:
        """Bytes of all keys and values, summed from the tensors."""
        return sum(part.bytes() for part in self.slices)

    # ---- in a file (saved.py) ----

    def save(self, path: str | Path, ids_BT: Tensor) -> None:
        """Writes the cache and the text that it is of; `model.load_cache(path)` gives both back, in
        another process too. The dial is the model's, and is not saved.

        Args:
            ids_BT: (B, T) token ids, padding included, as `generate` returned them: those that the
                cache has read, and the last one, which it has not.

        Raises:
            CheckpointError: ids of another shape, or a model that was not loaded from a folder.
            SememeError: the file cannot be written."""
        save_cache(self, ids_BT, Path(path))

    def use(self, gate: GateState, window: int | None) -> None:
        """Sets how many slots rows with these counters use. `window`: the shallow slice's."""
        tokens = gate.tokens if window is None else np.minimum(gate.tokens, window + 1)
        lengths = tokens, gate.concepts, gate.concepts
        tails = 0 * gate.tokens, gate.closed, gate.normal
        for part, length, count in zip(self.slices, lengths, tails, strict=True):
            part.length, part.tails = length.copy(), count.copy()

    # ---- rows that come and go (docs/serving.md) ----

    def at(self, rows: np.ndarray) -> "ConceptCache":
        """Some of the rows, for one forward: keys and values are those of this cache, in place; the
        rest is put back by `put`."""
        part = copy.copy(self)
        index = torch.from_numpy(rows).to(self.last_concept_BD.device)
        part.rows = rows
        part._take(index)
        return part

    def put(self, part: "ConceptCache") -> None:
        """What those rows remember by now."""
        rows = part.rows
        for own, new in zip(self.memory.gate, part.memory.gate, strict=True):
            own[rows] = new
        index = torch.from_numpy(rows).to(self.last_concept_BD.device)
        for own, new in zip(self._row_states, part._row_states, strict=True):
            own[index] = new.to(own)
        self.tails = self.tails.put(rows, part.tails)

    @property
    def _row_states(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.memory.last_BD, self.memory.open_segment, self.last_concept_BD

    def join(self, other: "ConceptCache") -> None:
        """The other's rows behind these."""
        for part, new in zip(self.slices, other.slices, strict=True):
            part.join(new)
        self.memory = self.memory.join(other.memory)
        self.tails = self.tails.join(other.tails)
        self.last_concept_BD = torch.cat([self.last_concept_BD, other.last_concept_BD])
        # Ids are columns of a batch that began together: whoever joins rows keeps ids for himself.
        self.concept_ids = self.concept_ids.new_empty(len(self.last_concept_BD), 0)

    def leave(self, row: int) -> None:
        """Drops that row; the last one takes its place."""
        for part in self.slices:
            part.leave(row)
        order = np.arange(len(self.last_concept_BD))[:-1]
        order[row:][:1] = len(order)
        self._take(torch.from_numpy(order).to(self.last_concept_BD.device))

    def _take(self, rows: Tensor) -> None:
        self.memory = self.memory.select(rows)
        self.tails = self.tails[rows]
        self.concept_ids = self.concept_ids[rows]
        self.last_concept_BD = self.last_concept_BD[rows]

    # ---- what `generate` asks of a cache ----

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens and padding: an attention mask is as wide."""
        return self.concept_ids.shape[1]

    get_query_offset = get_seq_length

    def batch_select_indices(self, indices: Tensor) -> None:
        rows = torch.as_tensor(indices).to(self.concept_ids.device)
        for part in self.slices:
            part.take_rows(rows)
        self._take(rows)

    reorder_cache = batch_select_indices

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.batch_select_indices(torch.arange(len(self.concept_ids)).repeat_interleave(repeats))

    def crop(self, *args) -> None:
        """Refused: dropped tails cannot come back, so neither assisted nor contrastive decoding can
        roll back."""
        raise ValueError(
            "a concept cache cannot be cropped or reset: tails that a concept closed are gone. "
            "try: generate without assistant_model / prompt_lookup_num_tokens, or new_cache(batch)"
        )

    reset = crop
