"""A transformers Cache whose layers keep all tokens (shallow), concepts (middle), concepts + tail
(deep).

Keys and values are written at (row, slot) of preallocated buffers. Slots are counted in each row by
itself, so padding and rows of other lengths leave no holes: in the shallow slice by token, in the
middle by concept, in the deep `[concepts…, tail…]`: a new concept takes the first tail slot and the
tail's length falls to 0, so dropping a tail moves no memory.

For each slice of a forward the cache says where its entries go and which keys its queries meet
(`shallow`, `middle`, `deep`). `NoCache` says the same where nothing is kept."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import Cache

from sememe.concepts.masks import Lane, Lanes
from sememe.concepts.segments import Chunk, Tails
from sememe.concepts.writer import Memory, WriteDecision

GROWTH = 32  # slots added when a buffer is full: one copy in 32 tokens, and few slots in reserve


class SliceCache:
    """Keys and values of the layers of one slice, (2, B, heads, capacity + 1, head_dim); the last
    slot takes what is not kept.

    `length`: (B,) slots that each row uses. `reserve`: slots to have at least when it grows next.
    """

    is_compileable = is_croppable = is_sliding = False

    def __init__(self, batch: int, device: torch.device):
        self.length = np.zeros(batch, np.int64)
        self.position = torch.zeros(batch, 1, dtype=torch.long, device=device)
        self.states: dict[int, Tensor] = {}  # of each layer
        self.reserve = 0

    @property
    def used(self) -> int:
        """Slots that some row uses."""
        return int(self.length.max(initial=0))

    @property
    def capacity(self) -> int:
        return self.position.shape[1] - 1

    def plan(
        self,
        lanes: Lanes,
        slot: np.ndarray,
        length: np.ndarray,
        concepts: np.ndarray | None = None,
    ) -> Lanes:
        """Sets where the next (b, n) entries go (slot -1: not kept), before the slice's layers run;
        the lanes, with the keys that these entries meet.

        One entry a row meets the slots as they are afterwards, which takes no copy. Of several some
        may be dropped before the last, so they meet the slots as they were, followed by each other.

        Args:
            lanes: the entries, as they meet each other where nothing was before them.
            length: (B,) slots in use in each row from now on; what a dropped tail had is free.
            concepts: (B,) slots of each row that are concepts until then; all of them by default.
        """
        device, before = self.position.device, self.used
        concepts = self.length if concepts is None else concepts
        self.rows, self.several = lanes.rows, slot.shape[1] > 1
        if self.several:
            key = self._keys(self.length, concepts).then(lanes.query)
            lanes = lanes._replace(key=key, plain=lanes.plain and before == 0)
        self.before, self.length = before, length
        if self.used > self.capacity:
            size = max(self.used + GROWTH * bool(before), self.reserve)
            self.position = F.pad(self.position, (0, size - self.capacity))
        self.row_b1 = torch.arange(len(length), device=device)[self.rows, None]
        self.slot = torch.from_numpy(np.where(slot < 0, self.capacity, slot)).to(device)[self.rows]
        self.position[self.row_b1, self.slot] = lanes.query.position
        if self.several:
            return lanes
        # Nobody looks at a slot that is empty in its row: all of them are as long as the longest.
        plain = bool((length[slot[:, 0] >= 0] == self.used).all())
        return lanes._replace(key=self._keys(length, length), plain=plain, recent=None)

    def settle(self, length: np.ndarray) -> None:
        """Rows that have more than `length` entries get that many: the last one, a concept that has
        seen its tail, takes the place of the tail's first."""
        rows = np.flatnonzero(length < self.length)
        if len(rows):
            stay, came, row_r = (
                torch.from_numpy(x[rows]).to(self.position.device)
                for x in (length - 1, self.length - 1, np.arange(len(length)))
            )
            for stored in (*self.states.values(), self.position[None, :, None, :, None]):
                stored[:, row_r, :, stay] = stored[:, row_r, :, came]
            self.length = length

    def _keys(self, length: np.ndarray, concepts: np.ndarray) -> Lane:
        """What is in the slots."""
        position = self.position[self.rows, : int(length.max(initial=0))]
        slot_S = torch.arange(position.shape[1], device=position.device)
        valid, concept = (
            slot_S < torch.from_numpy(count).to(position.device)[self.rows, None]
            for count in (length, concepts)
        )
        return Lane(position, position, concept, valid)

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
        met = torch.cat([stored[:, :, :, : self.before], new], 3) if self.several else None
        stored[:, self.row_b1, :, self.slot] = new.permute(1, 3, 0, 2, 4).to(stored.dtype)
        return met if self.several else stored[:, self.rows, :, : self.used]

    def take_rows(self, rows: Tensor) -> None:
        self.length, self.position = self.length[rows.cpu()], self.position[rows]
        self.states = {layer: stored[:, rows] for layer, stored in self.states.items()}


class NoCache:
    """A forward whose keys are its own entries alone. `memory`, `last_concept_BD`, `tails`: what
    rows start with; `segment`: whether a concept sees the tail that it closes in the deep slice."""

    for_layers: Cache | None = None

    def __init__(self, memory: Memory, last_concept_BD: Tensor, tails: Tails, segment: bool):
        self.memory = memory
        self.last_concept_BD = last_concept_BD
        self.tails = tails
        self.segment = segment

    def shallow(self, chunk: Chunk, window: int | None) -> Lanes:
        """All tokens, causal; with a `window` each sees that many, itself among them, and the first
        of the text."""
        lane = Lane.causal(chunk.position_BT, chunk.valid_BT)
        return Lanes(lane, lane, not chunk.padded, window)

    def middle(self, chunk: Chunk, decision: WriteDecision) -> Lanes:
        """Concepts, causal, each at its own place in the text. Padding comes after all of them."""
        lane = Lane.causal(decision.pack.pack(chunk.position_BT), decision.pack.valid_BC)
        # If they see tails, then that behind the concept before.
        lane = lane._replace(start=F.pad(lane.position[:, :-1], (1, 0)))
        return Lanes(lane, lane, plain=True)

    def deep(self, chunk: Chunk, decision: WriteDecision) -> Lanes:
        """Each token sees the concepts up to it, and the tail that it lies in; a concept the one
        that it closes, if it sees its segment."""
        # What is left of an earlier chunk's tail is still open: it is seen until a concept comes.
        place_BT = chunk.position_BT * decision.written_BT
        if self.segment:
            place_BT = F.pad(place_BT[:, :-1], (1, 0))
        start_BT = place_BT.cummax(1).values
        lane = Lane(chunk.position_BT, start_BT, decision.written_BT, chunk.valid_BT)
        return Lanes(lane, lane, bool(decision.written.all()))

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

    def __init__(self, split: tuple[int, int, int], *start):
        NoCache.__init__(self, *start)
        last_concept_BD = self.last_concept_BD
        batch, device = len(last_concept_BD), last_concept_BD.device
        self.slices = [SliceCache(batch, device) for _ in split]
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
        return self.slices[0].plan(
            super().shallow(chunk, window), np.where(stays, slot, -1), np.minimum(total, ring + 1)
        )

    def middle(self, chunk: Chunk, decision: WriteDecision) -> Lanes:
        length = decision.memory.gate.concepts
        slot = self.concepts[:, None] + np.arange(decision.pack.index_BC.shape[1])
        slot = np.where(slot < length[:, None], slot, -1)
        lanes, writes = super().middle(chunk, decision), slot[:, 0] >= 0
        if slot.shape[1] == 1 and not writes.all():  # only the rows that write take part
            rows = torch.from_numpy(writes.nonzero()[0]).to(chunk.position_BT.device)
            lanes = lanes._replace(query=lanes.query[rows], rows=rows)
        return self.slices[1].plan(lanes, slot, length)

    def deep(self, chunk: Chunk, decision: WriteDecision) -> Lanes:
        gate = decision.memory.gate
        length = gate.concepts + gate.tail
        # Tokens from each to the chunk's end, itself among them: those of the open tail stay.
        left = chunk.real[:, ::-1].cumsum(1)[:, ::-1]
        tail = np.where(chunk.real & (left <= gate.tail[:, None]), length[:, None] - left, -1)
        rank = self.concepts[:, None] + decision.written.cumsum(1) - 1
        slot = np.where(decision.written, rank, tail)
        if self.segment and slot.shape[1] == 1:
            # One that writes meets its tail, so it stands behind it until `remember`.
            end = self.concepts + self.memory.gate.tail
            length = np.where(decision.written[:, 0], end + 1, length)
            slot = np.where(decision.written, end[:, None], slot)
        return self.slices[2].plan(super().deep(chunk, decision), slot, length, self.concepts)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args, **kwargs
    ) -> tuple[Tensor, Tensor]:
        """What a layer's attention calls."""
        new = torch.stack([key_states, value_states])
        return self.layers[layer_idx].update(layer_idx, new).unbind(0)

    def remember(
        self, memory: Memory, last_concept_BD: Tensor, tails: Tails, ids_BT: Tensor
    ) -> None:
        self.slices[2].settle(memory.gate.concepts + memory.gate.tail)
        self.memory = memory
        self.last_concept_BD = last_concept_BD
        self.tails = tails
        self.concept_ids = torch.cat([self.concept_ids, ids_BT], 1)

    def reserve(self, tokens: int, concepts: int, window: int | None) -> None:
        """Room for a prompt that comes in chunks, at once: a cache that grew with each would be
        copied as often, and leave holes of its former sizes in the heap. `window`: the shallow
        slice's."""
        shallow, *others = self.slices
        total = shallow.used + tokens
        shallow.reserve = min(total, window + 1) if window else total
        for part in others:  # the deep tail, too, is in the reserve
            part.reserve = part.used + concepts + GROWTH

    def bytes(self) -> int:
        """Bytes of all keys and values, summed from the tensors."""
        return sum(x.nbytes for part in self.slices for x in part.states.values())

    # ---- what `generate` asks of a cache ----

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens and padding: an attention mask is as wide."""
        return self.concept_ids.shape[1]

    get_query_offset = get_seq_length

    def batch_select_indices(self, indices: Tensor) -> None:
        rows = torch.as_tensor(indices).to(self.concept_ids.device)
        for part in self.slices:
            part.take_rows(rows)
        self.memory = self.memory.select(rows)
        self.tails = self.tails[rows]
        self.concept_ids = self.concept_ids[rows]
        self.last_concept_BD = self.last_concept_BD[rows]

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
