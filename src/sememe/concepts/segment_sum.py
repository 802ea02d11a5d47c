"""One state of each segment of a compressor: (B, T, D) vectors of tokens → (B, C, D) sums, in which
each token can still be told from the others.

Each token's vector is rotated by an angle of its position in the segment, as RoPE rotates queries
(arXiv 2104.09864), and they are added up. Rotated back by a position, the sum is that token's
vector and, in other directions, the rest."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sememe.concepts.bins import WordBins, rotate
from sememe.concepts.readout import NoAnchor
from sememe.concepts.segments import Chunk, Packing, tail_lengths

# Of a coordinate's deviation: further apart than contents, so that a code stands for one length.
MARK = 3.0


class TokenReader(nn.Module):
    """What a code is to say of each token, in normalised coordinates: which word it is, and what
    the compressor's layers make of it in its text, by a map that starts at 0 and is trained."""

    def __init__(self, width: int):
        super().__init__()
        self.context = nn.Parameter(torch.zeros(width, width))
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("scale", torch.ones(()))

    def normalise(self, embedding: Tensor) -> Tensor:
        """(…, D) embeddings → (…, D) fp32."""
        return (embedding.float() - self.mean.float()) / self.scale.float()

    def forward(self, embed_BTD: Tensor, h_BTD: Tensor) -> Tensor:
        """(B, T, D) of tokens, from their embeddings and the states at them."""
        return self.normalise(embed_BTD) + F.linear(h_BTD.float(), self.context.float())


class SegmentSum(nn.Module):
    """Readout of a compressor (`readout.py`): what the tokens of a segment add up to, as its layers
    read them or the vectors of their bins, each rotated by its offset in the segment.

    How long its segment is each state says itself, by one of `lengths` orthogonal marks: were ends
    predicted, everything after a wrong one would be shifted.

    Args:
        bins: of words, where codes name bins; None where they say what was read.
        weighted: tokens count by the scores that made the segment end."""

    summed = 0  # nothing is left open: a text's last token ends a segment

    def __init__(self, width: int, lengths: int, bins: WordBins | None, weighted: bool):
        super().__init__()
        self.anchor = NoAnchor()
        self.bins = bins
        self.tokens = TokenReader(width) if bins is None else None
        self.weighted = weighted and bins is None
        random_DN = torch.randn(width, lengths, generator=torch.Generator().manual_seed(0))
        self.register_buffer("marks", torch.linalg.qr(random_DN)[0].T.contiguous())

    def forward(self, h_BTD, chunk, pack, written_BT, score_BT, open_segment, codes):
        """(B, C, D) states for the codes, twice, and nothing that is left open."""
        weight_BT = chunk.valid_BT * score_BT if self.weighted else chunk.valid_BT
        h_BCD = self.states(h_BTD, chunk, pack, written_BT, weight_BT, codes)
        return h_BCD, h_BCD, None

    def states(
        self, h_BTD, chunk: Chunk, pack: Packing, written_BT, weight_BT, codes, more_BCD=0.0
    ) -> Tensor:
        """(B, C, D) states of segments: weighted, n times the mean of their tokens; with
        `more_BCD` added, in normalised coordinates."""
        with torch.autocast(h_BTD.device.type, enabled=False):
            part_BTD, _, length_BC = self.parts(h_BTD, chunk, pack, written_BT)
            mean_BCD, _ = pack.pool(part_BTD, weight_BT)
            x_BCD = mean_BCD * length_BC.unsqueeze(-1) + more_BCD
            return codes.to_states(self.mark(x_BCD, length_BC))

    def parts(
        self, h_BTD, chunk: Chunk, pack: Packing, written_BT
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(B, T, D) what each token adds to its segment, rotated; (B, T) its offset there; and
        (B, C) how many tokens each segment has, the one that ends it among them."""
        length_BC = F.pad(pack.index_BC, (1, 0), value=-1).diff(dim=1)
        offset_BT = F.pad(tail_lengths(written_BT, chunk.valid_BT)[:, :-1], (1, 0))
        if self.bins is None:
            part_BTD = rotate(self.tokens(chunk.embed_BTD, h_BTD), offset_BT)
        else:
            # For each token how many segments have ended before it.
            rank_BT = written_BT.cumsum(1) - written_BT.long()
            length_BT = length_BC.gather(1, rank_BT.clamp(max=length_BC.shape[1] - 1))
            part_BTD = self.bins(chunk.ids_BT, offset_BT, length_BT)
        return part_BTD, offset_BT, length_BC

    def mark(self, x: Tensor, length: Tensor) -> Tensor:
        """(…, D) normalised states and (…,) lengths → the same with the marks of their lengths."""
        mark = self.marks.float()[length.clamp(1, len(self.marks)) - 1]
        return self.content(x) + MARK * x.shape[-1] ** 0.5 * mark

    def content(self, x: Tensor) -> Tensor:
        """(…, D) normalised states without any mark."""
        marks_ND = self.marks.to(x.dtype)
        return x - (x @ marks_ND.T) @ marks_ND

    def length(self, x: Tensor) -> Tensor:
        """(…,) lengths of the segments that (…, D) normalised states stand for."""
        return (x.float() @ self.marks.float().T).argmax(-1) + 1
