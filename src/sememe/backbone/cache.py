"""A transformers Cache whose layers keep all tokens (shallow), or concepts and the last `max_tail`
normal tokens (middle, deep).

Keys and values are written at (row, slot) of preallocated buffers. Slots are counted in each row by
itself, so padding and rows of other lengths leave no holes: in the shallow slice by token, in the
others `[ring…, concepts…]`: the n-th normal token stands at slot n modulo the ring's size, in the
place of one that nobody sees any more, so dropping a tail moves no memory.

For each slice of a forward the cache says where its entries go and which keys its queries meet
(`shallow`, `middle`, `deep`). `NoCache` says the same where nothing is kept."""

import copy

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import Cache

from sememe.concepts.masks import Lane, Lanes
from sememe.concepts.segments import Chunk, Tails
from sememe.concepts.writer import Memory, WriteDecision

Rows = slice | np.ndarray
ALL = slice(None)
GROWTH = 32  # slots added when a buffer is full: one copy in 32 tokens, and few slots in reserve


class SliceCache:
    """Keys and values of the layers of one slice, (2, rows, heads, capacity + 1, head_dim); the
    last slot takes what is not kept. The first B rows are in use.

    `length`: (B,) slots behind the ring that each row uses. `tails`: (B,) normal tokens that the
    ring has been given. `reserve`: slots to have at least when it grows next.

    Args:
        ring: slots for normal tokens.
        strict: some that the ring still holds are hidden from the queries."""

    is_compileable = is_croppable = is_sliding = False

    def __init__(self, batch: int, device: torch.device, ring: int = 0, strict: bool = False):
        self.ring = ring
        self.strict = strict
        self.length, self.tails = np.zeros((2, batch), np.int64)
        self.position = torch.zeros(batch, 1, dtype=torch.long, device=device)
        self.states: dict[int, Tensor] = {}  # of each layer
        self.reserve = 0

    def used(self, rows: Rows = ALL) -> int:
        """Slots that some of the rows uses."""
        longest = int(self.length[rows].max(initial=0))
        return longest and self.ring + longest

    @property
    def capacity(self) -> int:
        return self.position.shape[1] - 1

    def ring_slots(self, number: np.ndarray, real: np.ndarray, total: np.ndarray) -> np.ndarray:
        """Where normal tokens with those numbers go; -1 where they are none, or are no longer seen
        when a row has had `total` of them."""
        stays = real & (number >= total[:, None] - self.ring)
        return np.where(stays, number % max(self.ring, 1), -1)

    def plan(
        self,
        lanes: Lanes,
        slot: np.ndarray,
        length: np.ndarray,
        tails: np.ndarray | None = None,
        rows: Rows = ALL,
    ) -> Lanes:
        """Sets where the next (b, n) keys go (slot -1: not kept), before the slice's layers run;
        the lanes, with all keys that the queries meet.

        One query a row meets the slots as they are afterwards, which takes no copy. Of several some
        may be dropped before the last, so they meet the slots as they were, followed by the new.

        Args:
            lanes: the new entries, as they meet each other where nothing was before them.
            length: (b,) slots behind the ring in use in each row from now on.
            tails: (b,) normal tokens that the ring has been given by then.
            rows: the b rows of the batch, which those of the lanes are among."""
        device, key = self.position.device, lanes.key
        of_batch = torch.arange(len(self.length), device=device)[rows]
        whole = rows is ALL and isinstance(lanes.rows, slice)
        self.rows = slice(len(self.length)) if whole else of_batch[lanes.rows]
        self.several = lanes.query.position.shape[1] > 1
        self.met = before = self.used(rows)
        if self.several:
            lanes = lanes._replace(key=self._keys().then(key), plain=lanes.plain and before == 0)
        self.length[rows] = length
        if tails is not None:
            self.tails[rows] = tails
        if (used := self.used()) > self.capacity:
            size = max(used + GROWTH * bool(before), self.reserve)
            self.position = F.pad(self.position, (0, size - self.capacity))
        self.row_b1 = of_batch[lanes.rows, None]
        self.slot = torch.from_numpy(np.where(slot < 0, self.capacity, slot)).to(device)[lanes.rows]
        self.position[self.row_b1, self.slot] = key.position
        if self.several:
            return lanes
        self.met = self.used(rows)
        # Nobody looks at a slot that is empty in its row: all of them are as long as the longest.
        full = (length == length.max(initial=0)) & (self.tails[rows] >= self.ring)
        plain = not self.strict and bool(full[slot[:, 0] >= 0].all())
        return lanes._replace(key=self._keys(), plain=plain, recent=None)

    def _keys(self) -> Lane:
        """What is in the slots."""
        position = self.position[self.rows, : self.met]
        slot_S = torch.arange(position.shape[1], device=position.device)
        rows = self.rows if isinstance(self.rows, slice) else self.rows.cpu().numpy()
        length_b1, latest_b1 = (
            torch.from_numpy(x[rows, None]).to(position.device)
            for x in (self.length, self.tails - 1)
        )
        number = latest_b1 - (latest_b1 - slot_S) % max(self.ring, 1)
        concept = (slot_S >= self.ring).expand_as(position)
        valid = torch.where(concept, slot_S - self.ring < length_b1, number >= 0)
        return Lane(position, number, number, concept, valid)

    def update(self, layer: int, new: Tensor) -> Tensor:
        """Writes (2, b, heads, n, head_dim) keys and values; returns those that their queries
        meet."""
        stored = self.states.get(layer)
        if stored is None:
            stored = new.new_zeros(2, len(self.position), new.shape[2], 0, new.shape[4])
        missing = self.capacity + 1 - stored.shape[3]
        # The former last slot needs no clearing: none is in use before it is written.
        if missing > 0:
            stored = self.states[layer] = F.pad(stored, (0, 0, 0, missing))
        before = stored[:, self.rows, :, : self.met]
        met = torch.cat([before, new], 3) if self.several else None
        stored[:, self.row_b1, :, self.slot] = new.permute(1, 3, 0, 2, 4).to(stored.dtype)
        return met if self.several else stored[:, self.rows, :, : self.met]

    def take_rows(self, rows: Tensor) -> None:
        self.length, self.tails = self.length[rows.cpu()], self.tails[rows.cpu()]
        self.position = self.position[rows]
        self.states = {layer: stored[:, rows] for layer, stored in self.states.items()}

    # ---- rows that come and go ----

    def join(self, other: "SliceCache") -> None:
        """The other's rows behind these."""
        before, count = len(self.length), len(other.length)
        slots = max(self.capacity, other.capacity) - self.capacity
        rows = max(0, before + count - len(self.position))
        rows = rows and max(rows, before)  # twice as many: one copy in as many rows that come
        self.position = F.pad(self.position, (0, slots, 0, rows))
        self._write(slice(before, before + count), other)
        self.length = np.concatenate([self.length, other.length])
        self.tails = np.concatenate([self.tails, other.tails])

    def _write(self, rows: slice, other: "SliceCache", of: slice = ALL) -> None:
        """Those rows from the other's."""
        width = other.capacity
        self.position[rows, :width] = other.position[of, :width]
        for layer, source in other.states.items():
            stored = self.states.get(layer)
            if stored is None:
                stored = source.new_zeros(2, 0, source.shape[2], 0, source.shape[4])
            grown = len(self.position) - stored.shape[1], self.capacity + 1 - stored.shape[3]
            if max(grown) > 0:
                stored = F.pad(stored, (0, 0, 0, grown[1], 0, 0, 0, grown[0]))
            width = source.shape[3] - 1
            stored[:, rows, :, :width] = source[:, of, :, :width]
            self.states[layer] = stored

    def leave(self, row: int) -> None:
        """Drops that row; the last one takes its place, so that no other is copied."""
        last = len(self.length) - 1
        if row != last:
            self._write(slice(row, row + 1), self, slice(last, last + 1))
            self.length[row], self.tails[row] = self.length[last], self.tails[last]
        self.length, self.tails = self.length[:last].copy(), self.tails[:last].copy()
        self._shrink()

    def _shrink(self) -> None:
        """Gives back what the longest and most rows so far took, once a quarter of it is in use."""
        slots, rows = self.used() + GROWTH, max(1, 2 * len(self.length))
        if self.capacity > 4 * slots:
            self.position = self.position[:, : slots + 1].clone()
            self.states = {n: x[:, :, :, : slots + 1].clone() for n, x in self.states.items()}
        if len(self.position) > 2 * rows:
            self.position = self.position[:rows].clone()
            self.states = {n: x[:, :rows].clone() for n, x in self.states.items()}


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
    padding)."""

    rows: Rows = ALL

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
        place = self.tokens[:, None] + chunk.real.cumsum(1) - 1
        total = self.tokens + chunk.real.sum(1)
        # With a window only the first token of a text and the last ones are kept, in a ring.
        ring = window or int(total.max(initial=1))
        stays = chunk.real & ((place == 0) | (place >= total[:, None] - ring))
        slot = np.where(place == 0, 0, 1 + (place - 1) % ring)
        lanes, slot = super().shallow(chunk, window), np.where(stays, slot, -1)
        return self.slices[0].plan(lanes, slot, np.minimum(total, ring + 1), rows=self.rows)

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
        return sum(x.nbytes for part in self.slices for x in part.states.values())

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
        names = ("last_BD", "open_segment")
        for own, new in [(getattr(self.memory, n), getattr(part.memory, n)) for n in names]:
            own[index] = new.to(own)
        self.last_concept_BD[index] = part.last_concept_BD.to(self.last_concept_BD)
        self.tails = self.tails.put(rows, part.tails)

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
