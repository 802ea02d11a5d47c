"""SegmentPool: the mean of a segment's tail → what it adds to the state that the concept's codes
are read from.

A concept closes its segment: the tail's own states are gone for everything behind it, and the
middle slice never sees them. Read from the writing position alone, a concept stands for one token;
the tokens between are lost (docs/log.md)."""

import torch
from torch import Tensor, nn

# untrained SmolLM2, R=2: best of 0, 0.3 and 0.6; from zero the map is not found in 10⁵ tokens
# (docs/log.md)
SHARE = 0.3


class SegmentPool(nn.Module):
    """One D × D map, in the codebook's normalised coordinates; it starts as a share of the mean
    itself."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(SHARE * torch.eye(width))

    def forward(self, tail_BCD: Tensor) -> Tensor:
        """(B, C, D) normalised mean tail states, 0 for an empty tail → (B, C, D) fp32, to be
        added."""
        return tail_BCD.float() @ self.weight.float()
