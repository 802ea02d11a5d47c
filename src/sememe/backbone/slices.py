"""Keys and values of the layers of one slice, written at (row, slot) of preallocated buffers.

Slots are counted in each row by itself, so padding and rows of other lengths leave no holes: in the
shallow slice by token, in the others `[ring…, concepts…]`: the n-th normal token stands at slot n
modulo the ring's size, in the place of one that nobody sees any more, so dropping a tail moves no
memory. Rows come and go, and some of them alone may take part in a forward."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sememe.concepts.masks import Lane, Lanes

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

    def plan_tokens(
        self,
        lanes: Lanes,
        before: np.ndarray,
        real: np.ndarray,
        window: int | None,
        rows: Rows = ALL,
    ) -> Lanes:
        """`plan` of a slice that keeps all tokens; with a `window` the first of a text and the last
        ones, in a ring. `before`: (b,) tokens that each row has had; `real`: (b, n), False on
        padding."""
        place = before[:, None] + real.cumsum(1) - 1
        total = before + real.sum(1)
        ring = window or int(total.max(initial=1))
        stays = real & ((place == 0) | (place >= total[:, None] - ring))
        slot = np.where(place == 0, 0, 1 + (place - 1) % ring)
        length = np.minimum(total, ring + 1)
        return self.plan(lanes, np.where(stays, slot, -1), length, rows=rows)

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
        # Of all rows in their order the attention reads a view, not a copy.
        every = rows is ALL or np.array_equal(rows, np.arange(len(self.length)))
        whole = every and isinstance(lanes.rows, slice)
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
        met = torch.cat([stored[:, self.rows, :, : self.met], new], 3) if self.several else None
        stored[:, self.row_b1, :, self.slot] = new.permute(1, 3, 0, 2, 4).to(stored.dtype)
        return met if self.several else stored[:, self.rows, :, : self.met]

    def bytes(self) -> int:
        """Bytes of all keys and values."""
        return sum(stored.nbytes for stored in self.states.values())

    def take_rows(self, rows: Tensor) -> None:
        on_host = rows.cpu().numpy()
        self.length, self.tails = self.length[on_host], self.tails[on_host]
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
