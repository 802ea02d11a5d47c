"""Segments: (B, T) write decisions ⇄ packed (B, C) concepts.

A segment is a tail of normal tokens together with the concept that closes it. Concepts are packed to the left
so that the middle layers run on C = T · rate positions; rows with fewer concepts than the longest are padded.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Packing(NamedTuple):
    """Where the packed concepts come from. `index_BC` are token positions, `valid_BC` is False on the padding."""

    index_BC: Tensor
    valid_BC: Tensor

    def pack(self, x_BTn: Tensor) -> Tensor:
        """(B, T, …) → (B, C, …): the rows of the positions that wrote. Padding repeats some position."""
        index = self.index_BC
        while index.dim() < x_BTn.dim():
            index = index.unsqueeze(-1)
        return x_BTn.gather(1, index.expand(-1, -1, *x_BTn.shape[2:]))

    def unpack(self, c_BCD: Tensor, written_BT: Tensor, h_BTD: Tensor) -> Tensor:
        """(B, C, D) → (B, T, D): the concept's state where one was written, `h_BTD` elsewhere."""
        rank_BT = (written_BT.cumsum(1) - 1).clamp(min=0)
        back_BTD = c_BCD.gather(1, rank_BT.unsqueeze(-1).expand(-1, -1, c_BCD.shape[-1]))
        return torch.where(written_BT.unsqueeze(-1), back_BTD.to(h_BTD.dtype), h_BTD)


def packing(written_BT: Tensor) -> Packing:
    """The packing of a (B, T) bool tensor of write decisions. C is the largest count, and at least 1."""
    count_B = written_BT.sum(1)
    longest = max(int(count_B.max()), 1)
    index_BC = torch.argsort(written_BT.int(), dim=1, descending=True, stable=True)[:, :longest]
    valid_BC = torch.arange(longest, device=written_BT.device) < count_B[:, None]
    return Packing(index_BC, valid_BC)


def tail_lengths(written_BT: Tensor, valid_BT: Tensor) -> Tensor:
    """(B, T) number of normal tokens since the last concept, 0 where one is written. Padding counts as 0."""
    normal_BT = (valid_BT & ~written_BT).long()
    total_BT = normal_BT.cumsum(1)
    at_last_BT = torch.where(written_BT, total_BT, torch.zeros_like(total_BT)).cummax(1).values
    return (total_BT - at_last_BT) * valid_BT
