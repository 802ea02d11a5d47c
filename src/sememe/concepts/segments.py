"""Segments: (B, T) write decisions ⇄ packed (B, C) concepts.

A segment is a tail of normal tokens together with the concept that closes it. Concepts are packed
to the left so that the middle layers run on C = T · rate positions; rows with fewer concepts than
the longest are padded."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

Rope = dict[str, tuple[Tensor, Tensor]]  # cos and sin of each kind of layer, (1 or B, T, …)


@dataclass
class Chunk:
    """Consecutive tokens of a batch of texts, as every slice of a forward sees them."""

    embed_BTD: Tensor
    position_BT: Tensor  # places in the texts
    valid_BT: Tensor  # False on padding
    real: np.ndarray  # the same on the host
    rope: Rope | None = None
    ids_BT: Tensor | None = None

    @classmethod
    def of(
        cls,
        embed_BTD: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        tokens: np.ndarray | int = 0,
        ids_BT: Tensor | None = None,
    ) -> "Chunk":
        """The last T columns of `attention_mask`, 0 on padding. Places are counted after the (B,)
        `tokens` that each row has had before, if `position_ids` do not say them."""
        shape, device = embed_BTD.shape[:2], embed_BTD.device
        real = np.ones(shape, bool)
        if attention_mask is not None:
            real = attention_mask[:, -shape[1] :].bool().cpu().numpy()
        if position_ids is None:
            place = (real.cumsum(1) - 1).clip(min=0) + np.reshape(tokens, (-1, 1))
            position_ids = torch.from_numpy(place)
        position_BT = position_ids.to(device).expand(shape)
        return cls(embed_BTD, position_BT, torch.from_numpy(real).to(device), real, ids_BT=ids_BT)

    def split(self, size: int) -> Iterator["Chunk"]:
        """Parts of at most so many tokens."""
        for start in range(0, self.real.shape[1], size):
            fields = self.embed_BTD, self.position_BT, self.valid_BT, self.real
            yield Chunk(*(x[:, start : start + size] for x in fields))

    @property
    def padded(self) -> bool:
        return not self.real.all()

    def from_left(self, x_BTD: Tensor, before_BD: Tensor) -> Tensor:
        """(B, 1 + T, D): what stands before the chunk, and the chunk, with each place of padding
        taken by the last that is none. So the neighbour to the left of token t is at t, also where
        rows that ended at different places are continued as a batch."""
        x_BSD = torch.cat([before_BD.unsqueeze(1).to(x_BTD), x_BTD], 1)
        if not self.padded:
            return x_BSD
        index_S = torch.arange(x_BSD.shape[1], device=x_BSD.device)
        index_BS = (F.pad(self.valid_BT, (1, 0)) * index_S).cummax(1).values
        return x_BSD.take_along_dim(index_BS.unsqueeze(-1), 1)


class Tails(NamedTuple):
    """Normal tokens of a batch that no concept has closed yet, in their order: their shallow
    states, places in the texts, and which entries are such tokens (on the host)."""

    h_BnD: Tensor
    position_Bn: Tensor
    real: np.ndarray

    @classmethod
    def none(cls, like_BD: Tensor) -> "Tails":
        """Those of `B` rows ahead of their texts."""
        h_BnD = like_BD[:, None][:, :0]
        position_Bn = torch.zeros(h_BnD.shape[:2], dtype=torch.long, device=like_BD.device)
        return cls(h_BnD, position_Bn, np.zeros(h_BnD.shape[:2], bool))

    def then(self, h_BTD: Tensor, chunk: Chunk, written: np.ndarray) -> tuple["Tails", "Tails"]:
        """With a chunk's tokens behind them: those that its concepts close, and those that stay
        open."""
        both = Tails(
            torch.cat([self.h_BnD.to(h_BTD), h_BTD], 1),
            torch.cat([self.position_Bn, chunk.position_BT], 1),
            np.concatenate([self.real, chunk.real & ~written], 1),
        )
        closes = np.pad(written, ((0, 0), (self.real.shape[1], 0)))
        closed = closes[:, ::-1].cumsum(1)[:, ::-1] > 0
        return both.keep(closed), both.keep(~closed)

    def keep(self, selected: np.ndarray) -> "Tails":
        """The (B, n) selected entries, packed to the left."""
        selected = selected & self.real
        if selected.all():
            return self
        if not selected.any():
            return Tails(*(x[:, :0] for x in self))
        longest = int(selected.sum(1).max(initial=0))
        order = np.argsort(~selected, axis=1, kind="stable")[:, :longest]
        index_Bn = torch.from_numpy(order).to(self.h_BnD.device)
        return Tails(
            self.h_BnD.take_along_dim(index_Bn.unsqueeze(-1), 1),
            self.position_Bn.take_along_dim(index_Bn, 1),
            np.take_along_axis(selected, order, 1),
        )

    def join(self, other: "Tails") -> "Tails":
        """The other's rows behind these."""
        return Tails(*(_cat_rows(*pair) for pair in zip(self, other, strict=True)))

    def put(self, rows: np.ndarray, other: "Tails") -> "Tails":
        """With those rows from the other."""
        order = np.arange(len(self.real))
        order[rows] = len(order) + np.arange(len(rows))
        both = self.join(other)[torch.from_numpy(order).to(self.h_BnD.device)]
        longest = int(both.real.sum(1).max(initial=0))
        return Tails(*(x[:, :longest] for x in both))

    def __getitem__(self, rows) -> "Tails":
        """Those rows: a tensor of indices or a slice."""
        on_host = rows if isinstance(rows, slice) else rows.cpu().numpy()
        return Tails(self.h_BnD[rows], self.position_Bn[rows], self.real[on_host])


def _cat_rows(first: Tensor | np.ndarray, second: Tensor | np.ndarray):
    """(A, n, …) and (B, m, …) → (A + B, max(n, m), …), filled up with 0 at the end."""
    length = max(first.shape[1], second.shape[1])
    if isinstance(first, np.ndarray):
        return np.concatenate(
            [np.pad(x, ((0, 0), (0, length - x.shape[1]))) for x in (first, second)]
        )
    ends = [[0, 0] * (x.dim() - 2) + [0, length - x.shape[1]] for x in (first, second)]
    return torch.cat([F.pad(x, end) for x, end in zip((first, second), ends, strict=True)])


class Packing(NamedTuple):
    """Where the packed concepts come from. `index_BC` are token positions, `valid_BC` is False on
    the padding; `rank_BT`: how many concepts were written before each position."""

    index_BC: Tensor
    valid_BC: Tensor
    rank_BT: Tensor
    written_BT: Tensor

    def pack(self, x_BTn: Tensor) -> Tensor:
        """(B, T, …) → (B, C, …): the rows of the positions that wrote. Padding repeats some
        position."""
        return x_BTn.take_along_dim(_like(self.index_BC, x_BTn), 1)

    def unpack(self, c_BCn: Tensor, h_BTn: Tensor) -> Tensor:
        """(B, C, …) → (B, T, …): that of the concept where one was written, `h` elsewhere."""
        rank_BT1 = _like(self.rank_BT.clamp(max=c_BCn.shape[1] - 1), c_BCn)
        c_BTn = c_BCn.take_along_dim(rank_BT1, 1).to(h_BTn.dtype)
        return torch.where(_like(self.written_BT, h_BTn), c_BTn, h_BTn)

    def before(self, c_BCD: Tensor, first_BD: Tensor) -> tuple[Tensor, Tensor]:
        """(B, C, D) → (B, T, D): the state of the last concept before each position, `first_BD`
        ahead of all of them; and (B, D) the last one of all."""
        c_BnD = torch.cat([first_BD.unsqueeze(1).to(c_BCD), c_BCD], 1)
        return c_BnD.take_along_dim(self.rank_BT.unsqueeze(-1), 1), self._last(c_BnD)

    def pool(
        self, x_BTD: Tensor, weight_BT: Tensor, *, before: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Weighted mean of each segment's states, (B, C, D) fp32, and of the open segment the sum
        and the weight, (B, D + 1).

        Segment k ends with the k-th concept. `before` is what an earlier chunk left open. Sums go
        by segment, not by differences of running sums: those lose digits on long texts, and chunks
        would not equal one pass."""
        x_BTn = F.pad(x_BTD.float(), (0, 1), value=1.0) * weight_BT.float().unsqueeze(-1)
        if before is None:
            before = torch.zeros_like(x_BTn[:, 0])
        total_BSn = F.pad(before.unsqueeze(1), (0, 0, 0, self.index_BC.shape[1]))
        total_BSn = total_BSn.scatter_add(1, self.rank_BT.unsqueeze(-1).expand_as(x_BTn), x_BTn)
        mean_BCD = total_BSn[:, :-1, :-1] / total_BSn[:, :-1, -1:].clamp(min=1e-6)
        return mean_BCD, self._last(total_BSn)

    def _last(self, x_BSn: Tensor) -> Tensor:
        """(B, 1 + C, n) → (B, n): what stands after each row's concepts."""
        return x_BSn.take_along_dim(self.valid_BC.sum(1)[:, None, None], 1).squeeze(1)


def _like(index_Bn: Tensor, x: Tensor) -> Tensor:
    """With as many dimensions as `x`."""
    return index_Bn.view(*index_Bn.shape, *[1] * (x.dim() - 2))


def packing(written_BT: Tensor) -> Packing:
    """The packing of a (B, T) bool tensor of write decisions. C is the largest count, and at least
    1."""
    count_BT = written_BT.cumsum(1)
    index_BT = torch.argsort(written_BT.int(), dim=1, descending=True, stable=True)
    index_BC = index_BT[:, : max(int(count_BT[:, -1].max()), 1)]
    valid_BC = torch.arange(index_BC.shape[1], device=written_BT.device) < count_BT[:, -1:]
    return Packing(index_BC, valid_BC, count_BT - written_BT.long(), written_BT)


def tail_lengths(written_BT: Tensor, valid_BT: Tensor) -> Tensor:
    """(B, T) number of normal tokens since the last concept, 0 where one is written. Padding counts
    as 0."""
    total_BT = (valid_BT & ~written_BT).cumsum(1)
    return (total_BT - (total_BT * written_BT).cummax(1).values) * valid_BT
