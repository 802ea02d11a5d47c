"""Segments: (B, T) write decisions ⇄ packed (B, C) concepts.

A segment is a tail of normal tokens together with the concept that closes it. Concepts are packed
to the left so that the middle layers run on C = T · rate positions; rows with fewer concepts than
the longest are padded."""

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
        tokens: np.ndarray | None = None,
        ids_BT: Tensor | None = None,
    ) -> "Chunk":
        """The last T columns of `attention_mask`, 0 on padding. Places are counted behind the
        (B,) `tokens` that each row has had before, if `position_ids` do not say them."""
        batch, length = embed_BTD.shape[:2]
        device = embed_BTD.device
        mask_BT = None if attention_mask is None else attention_mask[:, -length:]
        if mask_BT is None or bool(mask_BT.all()):
            # No padding, which is known without waiting for the device.
            real = np.ones((batch, length), bool)
            valid_BT = torch.ones(batch, length, dtype=torch.bool, device=device)
        else:
            valid_BT = mask_BT.bool().to(device)
            real = valid_BT.cpu().numpy()
        if position_ids is None:
            place = (real.cumsum(1) - 1).clip(min=0)
            if tokens is not None:
                place = place + tokens[:, None]
            position_BT = torch.from_numpy(place).to(device)
        else:
            position_BT = position_ids.to(device).expand(batch, length)
        return cls(embed_BTD, position_BT, valid_BT, real, ids_BT=ids_BT)

    @property
    def padded(self) -> bool:
        return not self.real.all()

    def packed(self, pack: "Packing") -> tuple[Tensor, Rope]:
        """Places and rope of the concepts. Gathered: longrope and dynamic rope choose their base by
        the largest position that they see."""
        rows = len(pack.index_BC)
        rope = {
            kind: tuple(pack.pack(x.expand(rows, -1, -1)) for x in pair)
            for kind, pair in self.rope.items()
        }
        return pack.pack(self.position_BT), rope

    def from_left(self, x_BTD: Tensor, ahead_BD: Tensor | None = None) -> Tensor:
        """(B, 1 + T, D): `ahead_BD`, which stands ahead of the chunk (without it the first token),
        and the chunk, with each place of padding taken by the last that is none. So the neighbour
        to the left of token t is at t, also where rows that ended at different places are continued
        as a batch."""
        ahead_B1D = x_BTD[:, :1] if ahead_BD is None else ahead_BD.unsqueeze(1).to(x_BTD)
        x_BSD = torch.cat([ahead_B1D, x_BTD], 1)
        if not self.padded:
            return x_BSD
        index_BT = torch.arange(1, x_BSD.shape[1], device=x_BSD.device)
        index_BT = index_BT.where(self.valid_BT, 0).cummax(1).values
        index_BS1 = F.pad(index_BT, (1, 0)).unsqueeze(-1)
        return x_BSD.gather(1, index_BS1.expand(-1, -1, x_BSD.shape[2]))


class Packing(NamedTuple):
    """Where the packed concepts come from. `index_BC` are token positions, `valid_BC` is False on
    the padding."""

    index_BC: Tensor
    valid_BC: Tensor

    def pack(self, x_BTn: Tensor) -> Tensor:
        """(B, T, …) → (B, C, …): the rows of the positions that wrote. Padding repeats some
        position."""
        index = self.index_BC
        while index.dim() < x_BTn.dim():
            index = index.unsqueeze(-1)
        return x_BTn.gather(1, index.expand(-1, -1, *x_BTn.shape[2:]))

    def unpack(self, c_BCD: Tensor, written_BT: Tensor, h_BTD: Tensor) -> Tensor:
        """(B, C, D) → (B, T, D): the concept's state where one was written, `h_BTD` elsewhere."""
        c_BTD = self.last(c_BCD, written_BT).to(h_BTD.dtype)
        return torch.where(written_BT.unsqueeze(-1), c_BTD, h_BTD)

    def last(self, c_BCD: Tensor, written_BT: Tensor, before_BD: Tensor | None = None) -> Tensor:
        """(B, C, D) → (B, T, D): the state of the last concept at or before each position,
        `before_BD` ahead of the first (some other state without it)."""
        rank_BT = written_BT.cumsum(1) - 1
        index_BTD = rank_BT.clamp(min=0).unsqueeze(-1).expand(-1, -1, c_BCD.shape[-1])
        last_BTD = c_BCD.gather(1, index_BTD)
        if before_BD is None:
            return last_BTD
        before_B1D = before_BD.unsqueeze(1).to(last_BTD.dtype)
        return torch.where(rank_BT.unsqueeze(-1) >= 0, last_BTD, before_B1D)

    def pool(
        self,
        x_BTD: Tensor,
        weight_BT: Tensor,
        written_BT: Tensor,
        before: tuple[Tensor, Tensor] | None = None,
    ):
        """Weighted mean of each segment's states, (B, C, D) fp32, and the open segment's (sum (B,
        D), weight (B,)).

        Segment k ends with the k-th concept. `before` is what an earlier chunk left open. Sums go
        by segment, not by differences of running sums: those lose digits on long texts, and chunks
        would not equal one pass."""
        batch, _, width = x_BTD.shape
        count_B = written_BT.sum(1)
        segment_BT = written_BT.cumsum(1) - written_BT.long()
        slots = self.index_BC.shape[1] + 1
        weight_BT = weight_BT.float()
        index_BTD = segment_BT.unsqueeze(-1).expand(-1, -1, width)
        total_BSD = x_BTD.new_zeros(batch, slots, width, dtype=torch.float32)
        total_BSD = total_BSD.scatter_add(1, index_BTD, weight_BT.unsqueeze(-1) * x_BTD.float())
        weight_BS = weight_BT.new_zeros(batch, slots).scatter_add(1, segment_BT, weight_BT)
        if before is not None:
            total_BSD = torch.cat([total_BSD[:, :1] + before[0].unsqueeze(1), total_BSD[:, 1:]], 1)
            weight_BS = torch.cat([weight_BS[:, :1] + before[1].unsqueeze(1), weight_BS[:, 1:]], 1)
        row_B = torch.arange(batch, device=x_BTD.device)
        left = total_BSD[row_B, count_B], weight_BS[row_B, count_B]
        return total_BSD[:, :-1] / weight_BS[:, :-1].clamp(min=1e-6).unsqueeze(-1), left


def packing(written_BT: Tensor) -> Packing:
    """The packing of a (B, T) bool tensor of write decisions. C is the largest count, and at least
    1."""
    count_B = written_BT.sum(1)
    longest = max(int(count_B.max()), 1)
    index_BC = torch.argsort(written_BT.int(), dim=1, descending=True, stable=True)[:, :longest]
    valid_BC = torch.arange(longest, device=written_BT.device) < count_B[:, None]
    return Packing(index_BC, valid_BC)


def tail_lengths(written_BT: Tensor, valid_BT: Tensor) -> Tensor:
    """(B, T) number of normal tokens since the last concept, 0 where one is written. Padding counts
    as 0."""
    normal_BT = (valid_BT & ~written_BT).long()
    total_BT = normal_BT.cumsum(1)
    at_last_BT = torch.where(written_BT, total_BT, torch.zeros_like(total_BT)).cummax(1).values
    return (total_BT - at_last_BT) * valid_BT
