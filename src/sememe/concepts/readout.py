"""Readout: a segment's states → the state that its concept's codes stand for, and what is known of
it already.

The default reads the token that writes. A concept closes its segment, so what the tokens between
say would be lost: `TailPool` adds the mean of the tail, `WeightedSegment` takes the mean of all of
the segment, weighted by the scores that made it end.

A shallow state is mostly word identity. Codes that have to say the word as well have few bits left
for the context. So a concept may be anchored at the token that writes it (`TokenAnchor`): its state
is a linear map of that token's embedding plus the codes, which then say what the context adds."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sememe.concepts.fit import fit
from sememe.concepts.segments import Chunk, Packing

# untrained SmolLM2, R=2: best of 0, 0.3 and 0.6; from zero the map is not found in 10⁵ tokens
# (docs/log.md)
SHARE = 0.3


class NoAnchor(nn.Module):
    """Codes say all of a concept's state."""

    def forward(self, embedding: Tensor) -> Tensor:
        return embedding.new_zeros((), dtype=torch.float32)

    def start(self, embedding_ND: Tensor, x_ND: Tensor) -> dict[str, float]:
        return {}


class TokenAnchor(nn.Module):
    """`W · embedding / scale + b`, in the codebook's normalised coordinates. Started by least
    squares, and trained."""

    def __init__(self, width: int, tokens: int = 1):
        super().__init__()
        self.token = nn.Linear(tokens * width, width)
        for p in self.parameters():
            nn.init.zeros_(p)
        self.register_buffer("scale", torch.ones(()))

    def forward(self, embedding: Tensor) -> Tensor:
        """(…, tokens · D) embeddings → (…, D) fp32 normalised states."""
        x = embedding.float() / self.scale.float()
        return F.linear(x, self.token.weight.float(), self.token.bias.float())

    @torch.no_grad()
    def start(self, embedding_ND: Tensor, x_ND: Tensor) -> dict[str, float]:
        """Fits (N, D) normalised states. Returns the share of their variance explained."""
        self.scale.copy_(embedding_ND.float().square().mean().sqrt().clamp(min=1e-6))
        return {"anchor_explains": fit(self.token, embedding_ND / self.scale, x_ND)}


class Readout(nn.Module):
    """The state of the token that writes.

    `tokens`: embeddings that the anchor reads, of the writing token and of the tail's mean.
    `summed`: widths that are summed up of an open segment, to go on with in the next chunk."""

    tokens = 1
    summed = 0

    def __init__(self, width: int, anchor: bool):
        super().__init__()
        self.anchor = TokenAnchor(width, self.tokens) if anchor else NoAnchor()

    def forward(
        self,
        h_BTD: Tensor,
        chunk: Chunk,
        pack: Packing,
        written_BT: Tensor,
        score_BT: Tensor,
        open_segment: Tensor,
        codes: nn.Module,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(B, C, D) states for the codes, (B, C, tokens · D) embeddings for the anchor, and what
        is left open, as `Packing.pool` has it."""
        return pack.pack(h_BTD), pack.pack(chunk.embed_BTD), open_segment


class WeightedSegment(Readout):
    """The mean of the segment's states, weighted by their scores."""

    summed = 1

    def forward(self, h_BTD, chunk, pack, written_BT, score_BT, open_segment, codes):
        weight_BT = score_BT * chunk.valid_BT
        h_BCD, open_segment = pack.pool(h_BTD, weight_BT, before=open_segment)
        return h_BCD.to(h_BTD.dtype), pack.pack(chunk.embed_BTD), open_segment


class TailPool(Readout):
    """The state of the writing token plus a D × D map of the mean of its tail, in the codebook's
    normalised coordinates. The map starts as a share of the mean itself."""

    tokens = 2
    summed = 2

    def __init__(self, width: int, anchor: bool):
        super().__init__(width, anchor)
        self.pool = nn.Parameter(SHARE * torch.eye(width))

    def forward(self, h_BTD, chunk, pack, written_BT, score_BT, open_segment, codes):
        embed_BTD = chunk.embed_BTD
        both_BT2 = torch.cat([codes.normalise(h_BTD), embed_BTD.float()], -1)
        weight_BT = chunk.valid_BT & ~written_BT
        tail_BC2, open_segment = pack.pool(both_BT2, weight_BT, before=open_segment)
        tail_BCD, words_BCD = tail_BC2.chunk(2, -1)
        h_BCD = pack.pack(h_BTD) + codes.scale.float() * (tail_BCD @ self.pool.float())
        token_BC2 = torch.cat([pack.pack(embed_BTD), words_BCD.to(embed_BTD.dtype)], -1)
        return h_BCD.to(h_BTD.dtype), token_BC2, open_segment
