"""SegmentReader: (…, D) concept states and (…,) places in their segments → what a decompressor is told of each token.

It is told in two ways: by what is added to the embedding of the token before, for the layers to use, and by votes for words
that are added to what lm_head reads, so that codes learn from the words in one step.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sememe.concepts.news import turn


class SegmentReader(nn.Module):
    """What the decompressor is told of a segment: (…, D) concept states and (…,) places → (…, D), to be added to embeddings."""

    def __init__(self, width: int, places: int):
        super().__init__()
        self.state = nn.Linear(width, width)
        self.place = nn.Embedding(places, width)
        self.vote = nn.Linear(width, width, bias=False)
        self.register_buffer("scale", torch.ones(()))  # of the embeddings: one learning rate fits every base
        self.register_buffer("gain", torch.zeros(()))
        self.close = nn.Linear(2 * width, 1)
        self.close_at = nn.Embedding(places, 1)
        for p in (self.state.bias, self.place.weight, self.vote.weight, self.close.weight, self.close.bias, self.close_at.weight):
            nn.init.zeros_(p)

    @torch.no_grad()
    def start(self, scale: float) -> None:
        """States of scale 1 become a random rotation of themselves, which says nothing that the embeddings say already, at a
        tenth of their scale, since votes are all that is understood at first (docs/log.md)."""
        self.scale.fill_(scale)
        nn.init.orthogonal_(self.state.weight, gain=0.1)

    @torch.no_grad()
    def start_ends(self, place_n: Tensor, ends_n: Tensor) -> None:
        """Log-odds of ending at each place, as counted over (n,) places and whether segments ended there."""
        count_P = self.close_at.weight.new_zeros(2, len(self.close_at.weight))
        count_P.index_put_((ends_n.long(), place_n), torch.ones_like(place_n, dtype=count_P.dtype), accumulate=True)
        self.close_at.weight.copy_(((count_P[1] + 0.5) / (count_P[0] + 0.5)).log().unsqueeze(1))

    def forward(self, x: Tensor, place: Tensor) -> Tensor:
        return self.scale.to(x.dtype) * (self.state(x) + self.place(place))

    def votes(self, x: Tensor, place: Tensor) -> Tensor:
        """(…, D), to be added to what lm_head reads: the token's news as the concept has it, for the words that are like it."""
        return self.gain.to(x.dtype) * self.vote(turn(x, -place))

    def closes(self, h: Tensor, embed: Tensor, place: Tensor) -> Tensor:
        """(…,) log-odds that a segment ends with a token: from the state that predicted it, its embedding and its place. Where
        all segments are equally long, the place is enough."""
        both = torch.cat([F.rms_norm(x.float(), x.shape[-1:]) for x in (h, embed)], -1)
        seen = F.linear(both, self.close.weight.float(), self.close.bias.float())
        return (seen + self.close_at(place).float()).squeeze(-1)
