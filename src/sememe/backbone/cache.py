"""A transformers Cache whose layers keep all tokens (shallow), concepts (middle), concepts + tail
(deep).

Keys and values are written at (row, slot) of preallocated buffers. Slots are counted in each row by
itself, so padding and rows of other lengths leave no holes: in the shallow slice by token, in the
middle by concept, in the deep `[concepts…, tail…]`: a new concept takes the first tail slot and the
tail's length falls to 0, so dropping a tail moves no memory.

For each slice of a forward the cache says where its entries go and which keys its queries meet
(`shallow`, `middle`, `deep`). `NoCache` answers the same where nothing is kept."""

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from sememe.concepts.masks import Lane, Lanes
from sememe.concepts.segments import Chunk
from sememe.concepts.writer import Memory, WriteDecision

GROWTH = 32  # slots added when a buffer is full: one copy in 32 tokens, and few slots in reserve


class SlotLayer(CacheLayerMixin):
    """Keys and values of one layer, (B, heads, capacity + 1, head_dim); the last slot takes what is
    not kept."""

    is_sliding = False
    is_compileable = False

    def __init__(self, lane: "SliceCache"):
        super().__init__()
        self.lane = lane

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        rows = self.lane.position.shape[0]
        self.keys, self.values = (
            x.new_zeros(rows, x.shape[1], self.lane.capacity + 1, x.shape[3])
            for x in (key_states, value_states)
        )
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args, **kwargs
    ) -> tuple[Tensor, Tensor]:
        """Writes (b, heads, n, head_dim) at the lane's slots; returns what this step's queries may
        look at."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        lane = self.lane
        if self.keys.shape[2] < lane.capacity + 1:
            self.keys, self.values = (_grow(x, lane.capacity + 1) for x in (self.keys, self.values))
        if lane.before is None:
            self._write(key_states, value_states)
            rows = slice(None) if lane.rows is None else lane.rows
            return self.keys[rows, :, : lane.used], self.values[rows, :, : lane.used]
        seen = tuple(
            torch.cat([old[:, :, : lane.before], new], 2)
            for old, new in ((self.keys, key_states), (self.values, value_states))
        )
        self._write(key_states, value_states)
        return seen

    def _write(self, key_states: Tensor, value_states: Tensor) -> None:
        row_b1, slot = self.lane.row_b1, self.lane.slot
        self.keys[row_b1, :, slot] = key_states.transpose(1, 2).to(self.keys.dtype)
        self.values[row_b1, :, slot] = value_states.transpose(1, 2).to(self.values.dtype)

    def get_seq_length(self) -> int:
        return self.lane.used

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.lane.used + query_length, 0

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length  # its name up to transformers 5.1x

    def take_rows(self, rows: Tensor) -> None:
        if self.is_initialized:
            self.keys, self.values = self.keys[rows], self.values[rows]


def _grow(x: Tensor, size: int) -> Tensor:
    """Longer slot axis (dim 2, or 1 for (B, n)); the trash slot at the end needs no copy."""
    dim = 2 if x.dim() == 4 else 1
    shape = list(x.shape)
    shape[dim] = size
    out = x.new_zeros(shape)
    out.narrow(dim, 0, x.shape[dim] - 1).copy_(x.narrow(dim, 0, x.shape[dim] - 1))
    return out


class SliceCache:
    """What the layers of one slice share: which slot is whose.

    `position`, `valid`: (B, capacity + 1) of each slot. `used`: slots that any row uses after this
    step's write. `expected`: slots to make room for when it grows next. `slot`, `rows`, `before`:
    the plan of the step in progress, see `plan`."""

    def __init__(self, layers: int, batch: int, device: torch.device):
        self.capacity, self.used, self.expected = 0, 0, 0
        self.position = torch.zeros(batch, 1, dtype=torch.long, device=device)
        self.valid = torch.zeros(batch, 1, dtype=torch.bool, device=device)
        self.layers = [SlotLayer(self) for _ in range(layers)]
        self.slot = self.rows = self.row_b1 = self.before = None

    def plan(
        self,
        slot: np.ndarray,
        position: Tensor,
        length: np.ndarray,
        rows: np.ndarray | None = None,
        keep_before: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Sets where the next (b, n) entries go (slot -1: not kept) before the slice's layers run.

        `length`: (B,) slots in use in each row from now on; a dropped tail ends its slots'
        validity. `rows`: the rows of the batch that take part, None for all. `keep_before`: queries
        see the slots as they were before, followed by the new entries (a chunk in which entries are
        dropped before its end); else the slots after writing. Returns position and validity of the
        cached slots that the queries see."""
        device = self.position.device
        used = int(length.max())
        self.before = self.used if keep_before else None
        if keep_before:
            seen = self.position[:, : self.used].clone(), self.valid[:, : self.used].clone()
        if used > self.capacity:
            self.capacity = max(used + (0 if self.used == 0 else GROWTH), self.expected)
            self.position = _grow(self.position, self.capacity + 1)
        self.slot = torch.from_numpy(np.where(slot < 0, self.capacity, slot)).to(device)
        self.rows = None if rows is None else torch.from_numpy(rows).to(device)
        self.used = used
        if rows is None:
            row_b = torch.arange(len(self.position), device=device)
        else:
            row_b = self.rows
        self.row_b1 = row_b[:, None]
        self.position[self.row_b1, self.slot] = position
        length_B1 = torch.from_numpy(length).to(device)[:, None]
        self.valid = torch.arange(self.capacity + 1, device=device) < length_B1
        if keep_before:
            return seen
        some = slice(None) if rows is None else self.rows
        return self.position[some, :used], self.valid[some, :used]

    def take_rows(self, rows: Tensor) -> None:
        self.position, self.valid = self.position[rows], self.valid[rows]
        for layer in self.layers:
            layer.take_rows(rows)


class NoCache:
    """A forward whose keys are its own entries alone."""

    tokens = None
    memory = None
    layers = ()

    def shallow(self, chunk: Chunk, window: int | None) -> Lanes:
        """All tokens, causal; with a `window` each sees that many, itself among them, and the first
        of the text."""
        lane = Lane.causal(chunk.position_BT, chunk.valid_BT)
        return Lanes(lane, lane, not chunk.padded, window)

    def middle(self, chunk: Chunk, decision: WriteDecision) -> Lanes:
        """Concepts, causal, each at its own place in the text."""
        lane = Lane.causal(decision.pack.pack(chunk.position_BT), decision.pack.valid_BC)
        return Lanes(lane, lane, _equal(decision.written.sum(1)))

    def deep(self, chunk: Chunk, decision: WriteDecision) -> Lanes:
        """Each token sees the concepts up to it, and the tail that it lies in."""
        lane = _deep_lane(chunk, decision)
        return Lanes(lane, lane, bool(decision.written.all()))

    def last_concept(self, first_BD: Tensor) -> Tensor:
        """(B, D) middle state of the last concept, `first_BD` where there is none."""
        return first_BD

    def remember(self, decision: WriteDecision, last_BD: Tensor, ids_BT: Tensor) -> None:
        """Keeps what the next chunk needs beside keys and values."""


class ConceptCache(Cache):
    """The online model's cache. What decides about the next token lives here too, so that beams,
    batches and continued generation carry it along: the writer's memory, the last concept's state,
    the ids written so far."""

    def __init__(self, split: tuple[int, int, int], memory: Memory, last_concept_BD: Tensor):
        batch, device = len(last_concept_BD), last_concept_BD.device
        self.slices = [SliceCache(layers, batch, device) for layers in split]
        super().__init__(layers=[layer for one in self.slices for layer in one.layers])
        self.memory = memory
        self.tail = np.zeros(batch, np.int64)  # normal tokens in each row's deep tail
        self._last_concept_BD = last_concept_BD
        self._ids = torch.empty(batch, 0, dtype=torch.long, device=device)
        self._columns = 0

    @property
    def tokens(self) -> np.ndarray:
        """(B,) tokens read so far, without padding."""
        return self.memory.gate.tokens

    @property
    def concepts(self) -> np.ndarray:
        """(B,) concepts written so far."""
        return self.memory.gate.concepts

    @property
    def concept_ids(self) -> Tensor:
        """(B, columns seen) ids written so far, in text order."""
        return self._ids[:, : self._columns]

    # ---- one forward ----

    def shallow(self, chunk: Chunk, window: int | None) -> Lanes:
        """As `NoCache` has it, over the tokens of all chunks."""
        several = chunk.real.shape[1] > 1
        query = Lane.causal(chunk.position_BT, chunk.valid_BT)
        slot, length = shallow_slots(chunk.real, self.tokens, window)
        keep_before = bool(window) and several
        seen = Lane.causal(
            *self.slices[0].plan(slot, chunk.position_BT, length, keep_before=keep_before)
        )
        plain = not chunk.padded and (not self.tokens.any() if several else _equal(length))
        key = seen.then(query) if keep_before else seen
        # The ring holds what a single query may see.
        return Lanes(query, key, plain, window if several else None)

    def middle(self, chunk: Chunk, decision: WriteDecision) -> Lanes | None:
        """As `NoCache` has it. In a step of one token only the rows that write take part; None
        where none does."""
        pack, before = decision.pack, self.concepts
        count = decision.written.sum(1)
        if not count.any():
            return None
        length = before + count
        rank = np.arange(pack.index_BC.shape[1])
        slot = np.where(rank < count[:, None], before[:, None] + rank, -1)
        query = Lane.causal(pack.pack(chunk.position_BT), pack.valid_BC)
        rows, reach = None, length
        if chunk.real.shape[1] == 1 and not count.all():
            rows = np.flatnonzero(count)
            rows_n = torch.from_numpy(rows).to(chunk.position_BT.device)
            query = Lane.causal(query.position[rows_n], query.valid[rows_n])
            slot, reach = slot[rows], length[rows]
        key = Lane.causal(*self.slices[1].plan(slot, query.position, length, rows))
        # Nobody looks at a slot that is empty in its row: all of them reach as far as the longest.
        plain = reach.min() == length.max() and (slot.shape[1] == 1 or not before.any())
        return Lanes(query, key, bool(plain), rows=self.slices[1].rows)

    def deep(self, chunk: Chunk, decision: WriteDecision) -> Lanes:
        """As `NoCache` has it, over the concepts and the tails of all chunks."""
        several = chunk.real.shape[1] > 1
        before = self.concepts
        slot, self.tail = deep_slots(decision.written, chunk.real, before, self.tail)
        length = before + decision.written.sum(1) + self.tail
        query = _deep_lane(chunk, decision, before)
        position, valid = self.slices[2].plan(slot, chunk.position_BT, length, keep_before=several)
        if not several:
            plain = _equal(length) and not chunk.padded
            return Lanes(query, Lane.causal(position, valid), plain)
        before_B1 = torch.from_numpy(before).to(position.device)[:, None]
        concept = torch.arange(position.shape[1], device=position.device) < before_B1
        seen = Lane(position, before_B1.expand(position.shape), concept, valid)
        plain = bool(decision.written.all()) and not self.tokens.any()
        return Lanes(query, seen.then(query), plain)

    def last_concept(self, first_BD: Tensor) -> Tensor:
        return self._last_concept_BD

    def remember(self, decision: WriteDecision, last_BD: Tensor, ids_BT: Tensor) -> None:
        """Keeps what the next chunk needs beside keys and values."""
        self.memory = decision.memory
        self._last_concept_BD = last_BD
        end = self._columns + ids_BT.shape[1]
        if end > self._ids.shape[1]:
            room = self._ids.new_empty(self._ids.shape[0], end + GROWTH - self._ids.shape[1])
            self._ids = torch.cat([self._ids, room], 1)
        self._ids[:, self._columns : end] = ids_BT
        self._columns = end

    def expect(self, tokens: int, concepts: int, window: int | None) -> None:
        """Room for a prompt that comes in chunks, at once: a cache that grew with each would be
        copied as often, and leave holes of its former sizes in the heap. `window`: the shallow
        slice's."""
        shallow, middle, deep = self.slices
        length = shallow.used + tokens
        shallow.expected = min(length, window + 1) if window else length
        for one in (middle, deep):  # the deep tail, too, is in the reserve
            one.expected = one.used + concepts + GROWTH

    def bytes(self) -> int:
        """Bytes of all keys and values, summed from the tensors."""
        return sum(
            x.nbytes
            for layer in self.layers
            if layer.is_initialized
            for x in (layer.keys, layer.values)
        )

    # ---- what `generate` asks of a cache ----

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns, padding among them: an attention mask is as wide."""
        return self._columns

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return self._columns

    def _take_rows(self, rows: Tensor) -> None:
        rows = rows.to(self._ids.device)
        for one in self.slices:
            one.take_rows(rows)
        self.memory = self.memory.select(rows)
        self.tail = self.tail[rows.cpu().numpy()]
        self._ids, self._last_concept_BD = self._ids[rows], self._last_concept_BD[rows]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._take_rows(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._take_rows(torch.arange(len(self._ids)).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._take_rows(torch.as_tensor(indices))

    def crop(self, tokens_to_remove: int) -> None:
        """Refused: dropped tails cannot come back, so neither assisted nor contrastive decoding can
        roll back."""
        raise ValueError(
            "a concept cache cannot be cropped: tails that a concept closed are gone. "
            "try: generate without assistant_model / prompt_lookup_num_tokens"
        )

    def reset(self) -> None:
        raise ValueError("a concept cache cannot be reset. try: a new one, new_cache(batch)")


def _equal(length: np.ndarray) -> bool:
    """Whether no row has empty slots behind its own."""
    return bool((length == length[0]).all()) if len(length) else True


def _deep_lane(chunk: Chunk, decision: WriteDecision, before: np.ndarray | None = None) -> Lane:
    """The tokens as entries of the deep slice. `before`: (B,) concepts of earlier chunks."""
    count = decision.written.cumsum(1)
    if before is not None:
        count = before[:, None] + count
    count_BT = torch.from_numpy(count).to(chunk.valid_BT.device)
    return Lane(chunk.position_BT, count_BT, decision.written_BT, chunk.valid_BT)


def deep_slots(written: np.ndarray, valid: np.ndarray, concepts: np.ndarray, tail: np.ndarray):
    """Deep-cache slots of a chunk, (B, T), -1 where an entry dies before the chunk ends; and the
    tails after it."""
    rank = concepts[:, None] + np.cumsum(written, 1) - 1
    after_last = np.cumsum(written[:, ::-1], 1)[:, ::-1] == 0  # no concept at or after this place
    normal = valid & after_last
    any_written = written.any(1)
    start = rank[:, -1:] + 1 + np.where(any_written, 0, tail)[:, None]
    slot = np.where(written, rank, np.where(normal, start + np.cumsum(normal, 1) - 1, -1))
    return slot, np.where(any_written, 0, tail) + normal.sum(1)


def shallow_slots(valid: np.ndarray, tokens: np.ndarray, window: int | None = None):
    """Shallow-cache slots of a chunk, (B, T), -1 for padding; and (B,) slots in use after it. With
    a `window` only the first token of a text and the last `window` are kept, in a ring: -1 also for
    what falls out before the chunk ends.

    `tokens`: (B,) real tokens before the chunk."""
    place = tokens[:, None] + np.cumsum(valid, 1) - 1
    total = tokens + valid.sum(1)
    if window is None:
        return np.where(valid, place, -1), total
    kept = valid & ((place == 0) | (place >= total[:, None] - window))
    slot = np.where(place == 0, 0, 1 + (place - 1) % window)
    return np.where(kept, slot, -1), np.minimum(total, window + 1)
