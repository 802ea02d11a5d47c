"""SegmentReader: (…, D) concept states and (…,) places in their segments → what a decompressor is
told of each token.

It is told in two ways: by what is added to the embedding of the token before, for the layers to
use, and by votes for words that are added to what lm_head reads, so that codes learn from the words
in one step. How long its segment is each concept says itself, by a mark in its state: were ends
guessed, all behind one mistake would be shifted."""

import torch
from torch import Tensor, nn

from sememe.concepts.news import turn

# of a coordinate's deviation: further apart than contents are, so that a code stands for one length
MARK = 3.0


class SegmentReader(nn.Module):
    """Reads concepts in normalised coordinates, in which a segment of n tokens has mark n, one of
    `lengths` orthogonal ones."""

    def __init__(self, width: int, lengths: int):
        super().__init__()
        self.state = nn.Linear(width, width)
        self.place = nn.Embedding(lengths, width)
        self.vote = nn.Linear(width, width, bias=False)
        self.register_buffer(
            "scale", torch.ones(())
        )  # of the embeddings: one learning rate fits every base
        self.register_buffer("gain", torch.zeros(()))
        random_DN = torch.randn(width, lengths, generator=torch.Generator().manual_seed(0))
        self.register_buffer("marks", torch.linalg.qr(random_DN)[0].T.contiguous())
        for p in (self.state.bias, self.place.weight, self.vote.weight):
            nn.init.zeros_(p)

    @torch.no_grad()
    def start(self, scale: float) -> None:
        """States of scale 1 become a random rotation of themselves, which says nothing that the
        embeddings say already, at a tenth of their scale, since votes are all that is understood at
        first (docs/log.md)."""
        self.scale.fill_(scale)
        nn.init.orthogonal_(self.state.weight, gain=0.1)

    def marked(self, x: Tensor, length: Tensor) -> Tensor:
        """(…, D) contents and (…,) lengths → the same with their lengths' marks."""
        mark = self.marks.float()[length.clamp(1, len(self.marks)) - 1]
        return self.content(x) + MARK * x.shape[-1] ** 0.5 * mark

    def content(self, x: Tensor) -> Tensor:
        """(…, D) states without any mark."""
        marks_ND = self.marks.to(x.dtype)
        return x - (x @ marks_ND.T) @ marks_ND

    def length(self, x: Tensor) -> Tensor:
        """(…,) lengths of the segments that (…, D) states stand for."""
        return (x.float() @ self.marks.float().T).argmax(-1) + 1

    def forward(self, x: Tensor, place: Tensor) -> Tensor:
        return self.scale.to(x.dtype) * (self.state(x) + self.place(place))

    def votes(self, x: Tensor, place: Tensor) -> Tensor:
        """(…, D), to be added to what lm_head reads: the token's news as the concept has it, for
        the words that are like it."""
        return self.gain.to(x.dtype) * self.vote(turn(self.content(x), -place))
