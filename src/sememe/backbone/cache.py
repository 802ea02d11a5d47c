"""A transformers Cache whose layers keep all tokens (shallow), concepts (middle), concepts + tail
(deep).

Keys and values are written at (row, slot) of preallocated buffers. Shallow slots are the columns of
the text, middle slots the ranks of the concepts, deep slots `[concepts…, tail…]`: a new concept
takes the first tail slot and the tail's length falls to 0, so dropping a tail moves no memory."""

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

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
        slot = self.lane.slot
        rows = (
            torch.arange(self.keys.shape[0], device=slot.device)
            if self.lane.rows is None
            else self.lane.rows
        )
        self.keys[rows[:, None], :, slot] = key_states.transpose(1, 2).to(self.keys.dtype)
        self.values[rows[:, None], :, slot] = value_states.transpose(1, 2).to(self.values.dtype)

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
        self.slot = self.rows = self.before = None

    def plan(
        self,
        slot: Tensor,
        position: Tensor,
        used: int,
        rows: Tensor | None = None,
        keep_before: bool = False,
        length_B: np.ndarray | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Sets where the next (b, n) entries go (slot -1: not kept) before the slice's layers run.

        `rows`: the rows of the batch that take part, None for all. `keep_before`: queries see the
        slots as they were before, followed by the new entries (a chunk in which tails die before
        its end); else the slots after writing. `length_B`: slots in use in each row from now on (a
        dropped tail ends its slots' validity); None: those written. Returns position and validity
        of the cached slots that the queries see."""
        self.before = self.used if keep_before else None
        old = (
            (self.position[:, : self.used].clone(), self.valid[:, : self.used].clone())
            if keep_before
            else None
        )
        if used > self.capacity:
            self.capacity = max(used + (0 if self.used == 0 else GROWTH), self.expected)
            self.position, self.valid = (
                _grow(x, self.capacity + 1) for x in (self.position, self.valid)
            )
        self.slot = torch.where(slot < 0, self.capacity, slot)
        self.rows, self.used = rows, used
        row_index = (
            torch.arange(self.position.shape[0], device=slot.device) if rows is None else rows
        )
        self.position[row_index[:, None], self.slot] = position
        if length_B is None:
            self.valid[row_index[:, None], self.slot] = slot >= 0
        else:
            length = torch.from_numpy(length_B).to(slot.device)
            self.valid = torch.arange(self.capacity + 1, device=slot.device) < length[:, None]
        some = slice(None) if rows is None else rows
        return old or (self.position[some, :used], self.valid[some, :used])

    def take_rows(self, rows: Tensor) -> None:
        self.position, self.valid = self.position[rows], self.valid[rows]
        for layer in self.layers:
            layer.take_rows(rows)


class ConceptCache(Cache):
    """The online model's cache. Row state that decides about the next token lives here too, so that
    beams, batches and continued generation carry it along: the gate's counters, the last shallow
    and concept states, what the open segment has summed up, the ids written so far."""

    def __init__(
        self,
        split: tuple[int, int, int],
        batch: int,
        device: torch.device,
        gate_state,
        width: int,
        segment_width: int | None = None,
    ):
        self.shallow, self.middle, self.deep = (SliceCache(n, batch, device) for n in split)
        super().__init__(layers=[*self.shallow.layers, *self.middle.layers, *self.deep.layers])
        self.gate_state = gate_state
        self.tail = np.zeros(batch, np.int64)  # normal tokens in each row's deep tail
        self.last_hidden_BD = torch.zeros(batch, width, device=device)
        self.last_concept_BD = torch.zeros(
            batch, width, device=device
        )  # its middle state, for the bridge
        self.open_segment = (
            torch.zeros(batch, segment_width or width, device=device),
            torch.zeros(batch, device=device),
        )
        self.padded = False
        self._ids = torch.empty(batch, 0, dtype=torch.long, device=device)
        self._columns = 0

    @property
    def concepts(self) -> np.ndarray:
        """(B,) concepts written so far."""
        return self.gate_state.concepts

    def expect(self, tokens: int, concepts: int, window: int | None) -> None:
        """Room for a prompt that comes in chunks, at once: a cache that grew with each would be
        copied as often, and leave holes of its former sizes in the heap. `window`: the shallow
        slice's."""
        shallow = self.shallow.used + tokens
        self.shallow.expected = min(shallow, window + 1) if window else shallow
        for lane in (self.middle, self.deep):  # the deep tail, too, is in the reserve
            lane.expected = lane.used + concepts + GROWTH

    def record(self, ids_BT: Tensor) -> None:
        """Keeps the ids written in this step (codes of
        `models.online.OnlineOutput.concept_ids`)."""
        end = self._columns + ids_BT.shape[1]
        if end > self._ids.shape[1]:
            room = self._ids.new_empty(self._ids.shape[0], end + GROWTH - self._ids.shape[1])
            self._ids = torch.cat([self._ids, room], 1)
        self._ids[:, self._columns : end] = ids_BT
        self._columns = end

    @property
    def concept_ids(self) -> Tensor:
        """(B, tokens seen) ids written so far, in text order."""
        return self._ids[:, : self._columns]

    def bytes(self) -> int:
        """Bytes of all keys and values, summed from the tensors."""
        return sum(
            x.nbytes
            for layer in self.layers
            if layer.is_initialized
            for x in (layer.keys, layer.values)
        )

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self._columns

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return self._columns

    def _take_rows(self, rows: Tensor) -> None:
        host = rows.cpu().numpy()
        for lane in (self.shallow, self.middle, self.deep):
            lane.take_rows(rows)
        self.gate_state = self.gate_state.select(host)
        self.tail, self._ids = self.tail[host], self._ids[rows]
        self.last_hidden_BD, self.last_concept_BD = (
            self.last_hidden_BD[rows],
            self.last_concept_BD[rows],
        )
        self.open_segment = tuple(x[rows] for x in self.open_segment)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._take_rows(beam_idx.to(self._ids.device))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._take_rows(
            torch.arange(len(self._ids), device=self._ids.device).repeat_interleave(repeats)
        )

    def batch_select_indices(self, indices: Tensor) -> None:
        self._take_rows(torch.as_tensor(indices, device=self._ids.device))

    def crop(self, tokens_to_remove: int) -> None:
        """Refused: dropped tails cannot come back, so neither assisted nor contrastive decoding can
        roll back."""
        raise ValueError(
            "a concept cache cannot be cropped: tails that a concept closed are gone. "
            "try: generate without assistant_model / prompt_lookup_num_tokens"
        )

    def reset(self) -> None:
        raise ValueError("a concept cache cannot be reset. try: a new one, new_cache(batch)")


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


def ring_slots(valid: np.ndarray, tokens: np.ndarray, window: int):
    """Shallow-cache slots of a chunk where only the first token of a text and the last `window` are
    kept, (B, T): -1 for padding and for what falls out before the chunk ends; and (B,) slots in use
    after it.

    `tokens`: (B,) real tokens before the chunk."""
    place = tokens[:, None] + np.cumsum(valid, 1) - 1
    total = tokens + valid.sum(1)
    kept = valid & ((place == 0) | (place >= total[:, None] - window))
    return np.where(kept, np.where(place == 0, 0, 1 + (place - 1) % window), -1), np.minimum(
        total, window + 1
    )
