"""What a text adds to what its past predicts: (…, D) embeddings and the states before them → (…, D)
news, and their sum over a segment, in which each token can still be told from the others.

A code that stands for states of the text repeats what the decoder can predict by itself. So the
predicted part, a linear map of the state before, is subtracted (differential coding), and what is
left of each token is rotated by an angle of its position in the segment, as RoPE rotates queries
(arXiv 2104.09864), and added up. Rotated back by a position, the sum is that token's news and, in
other directions, the rest."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sememe.concepts.fit import explained, linear_fit

# Its multiples fill the circle evenly, so that positions have little in common.
GOLDEN = 0.6180339887498949
# Of a coordinate's deviation: further apart than contents, so that a code stands for one length.
MARK = 3.0


def rotate(x: Tensor, position: Tensor) -> Tensor:
    """(…, D) states and (…,) positions → the same, rotated in D / 2 planes by the position times
    the angle of each. Minus the position rotates back."""
    half = x.shape[-1] // 2
    angle_P = torch.pi * ((torch.arange(half, device=x.device) + 1) * GOLDEN % 1)
    angle = position.unsqueeze(-1).to(x.dtype) * angle_P.to(x.dtype)
    a, b, rest = x.split([half, half, x.shape[-1] - 2 * half], -1)
    return torch.cat(
        [a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos(), rest], -1
    )


class NextEmbedding(nn.Module):
    """(…, D) states → (…, D) fp32: a linear prediction of the next token's embedding, fitted by
    least squares."""

    def __init__(self, width: int):
        super().__init__()
        self.map = nn.Linear(width, width)
        nn.init.zeros_(self.map.weight)
        nn.init.zeros_(self.map.bias)
        # Of the embeddings: one learning rate fits every base.
        self.register_buffer("scale", torch.ones(()))

    def forward(self, h: Tensor) -> Tensor:
        return self.scale.float() * F.linear(
            h.float(), self.map.weight.float(), self.map.bias.float()
        )

    def news(self, embed_BSD: Tensor, h_BSD: Tensor) -> Tensor:
        """(B, S, D) of tokens, from their embeddings and the states at them."""
        return embed_BSD.float() - F.pad(self(h_BSD), (0, 0, 1, 0))[:, :-1]

    @torch.no_grad()
    def start(self, h_ND: Tensor, embed_ND: Tensor) -> float:
        """Fits (N, D) embeddings to the states before them. Returns the share of their variance
        explained."""
        self.scale.copy_(embed_ND.float().square().mean().sqrt())
        embed_ND = embed_ND / self.scale
        weight_DD, bias_D, residual_ND = linear_fit(h_ND, embed_ND)
        self.map.weight.copy_(weight_DD.T)
        self.map.bias.copy_(bias_D)
        return explained(residual_ND, embed_ND)


class SegmentReader(nn.Module):
    """Segments' states (…, D), normalised, and (…,) positions in them → what a decompressor reads
    of each token: in two ways, by what is added to the embedding of the token before, for the
    layers to use, and by votes that are added to what lm_head reads, so that codes learn from the
    words in one step.

    How long its segment is each state says itself, by one of `lengths` orthogonal marks: were ends
    predicted, everything after a wrong one would be shifted."""

    def __init__(self, width: int, lengths: int):
        super().__init__()
        self.state = nn.Linear(width, width)
        self.place = nn.Embedding(lengths, width)
        self.vote = nn.Linear(width, width, bias=False)
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("gain", torch.zeros(()))
        random_DN = torch.randn(width, lengths, generator=torch.Generator().manual_seed(0))
        self.register_buffer("marks", torch.linalg.qr(random_DN)[0].T.contiguous())
        for p in (self.state.bias, self.place.weight, self.vote.weight):
            nn.init.zeros_(p)

    @torch.no_grad()
    def start(self, scale: float) -> None:
        """States become a random rotation of themselves, which says nothing that the embeddings (of
        this `scale`) say already, and a tenth as large, since votes are all that is understood at
        first (docs/log.md)."""
        self.scale.fill_(scale)
        nn.init.orthogonal_(self.state.weight, gain=0.1)

    def mark(self, x: Tensor, length: Tensor) -> Tensor:
        """(…, D) contents and (…,) lengths → the same with the marks of their lengths."""
        mark = self.marks.float()[length.clamp(1, len(self.marks)) - 1]
        return self.content(x) + MARK * x.shape[-1] ** 0.5 * mark

    def content(self, x: Tensor) -> Tensor:
        """(…, D) states without any mark."""
        marks_ND = self.marks.to(x.dtype)
        return x - (x @ marks_ND.T) @ marks_ND

    def length(self, x: Tensor) -> Tensor:
        """(…,) lengths of the segments that (…, D) states stand for."""
        return (x.float() @ self.marks.float().T).argmax(-1) + 1

    def forward(self, x: Tensor, position: Tensor) -> Tensor:
        """(…, D) to be added to the embedding of the token before."""
        return self.scale.to(x.dtype) * (self.state(x) + self.place(position))

    def votes(self, x: Tensor, position: Tensor) -> Tensor:
        """(…, D) to be added to what lm_head reads: the token's news as the segment has it, for the
        words that are like it."""
        return self.gain.to(x.dtype) * self.vote(rotate(self.content(x), -position))
