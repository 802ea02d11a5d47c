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

from sememe.concepts.bins import WordBins, rotate
from sememe.concepts.readout import NoAnchor, TokenAnchor
from sememe.concepts.segments import Chunk, Packing, tail_lengths

# Of a coordinate's deviation: further apart than contents, so that a code stands for one length.
MARK = 3.0


class NextEmbedding(TokenAnchor):
    """A linear prediction of the next token's embedding from (…, D) states, started by least
    squares."""

    def __init__(self, width: int):
        super().__init__(width)
        # Of the embeddings: one learning rate fits every base.
        self.register_buffer("unit", torch.ones(()))

    def news(self, embed_BSD: Tensor, h_BSD: Tensor) -> Tensor:
        """(B, S, D) of tokens, from their embeddings and the states at them."""
        with torch.autocast(h_BSD.device.type, enabled=False):
            next_BSD = self.unit.float() * self(h_BSD)
        return embed_BSD.float() - F.pad(next_BSD, (0, 0, 1, 0))[:, :-1]

    def start(self, h_ND: Tensor, embed_ND: Tensor) -> dict[str, float]:
        """Fits (N, D) embeddings to the states before them. Returns the share of their variance
        explained."""
        self.unit.copy_(embed_ND.square().mean().sqrt())
        (share,) = super().start(h_ND, embed_ND / self.unit).values()
        return {"foretold": share}


class SegmentSum(nn.Module):
    """Readout of a compressor (`readout.py`): what the tokens of a segment add up to, their news or
    the vectors of their bins, each rotated by its offset in the segment.

    How long its segment is each state says itself, by one of `lengths` orthogonal marks: were ends
    predicted, everything after a wrong one would be shifted.

    Args:
        bins: of words, where codes name bins; None where they hold news.
        weighted: news count by the scores that made the segment end."""

    summed = 0  # nothing is left open: a text's last token ends a segment

    def __init__(self, width: int, lengths: int, bins: WordBins | None, weighted: bool):
        super().__init__()
        self.anchor = NoAnchor()
        self.bins = bins
        self.weighted = weighted and bins is None
        random_DN = torch.randn(width, lengths, generator=torch.Generator().manual_seed(0))
        self.register_buffer("marks", torch.linalg.qr(random_DN)[0].T.contiguous())

    def forward(self, news_BTD, chunk, pack, written_BT, score_BT, open_segment, codes):
        """(B, C, D) states for the codes, twice, and nothing that is left open."""
        weight_BT = chunk.valid_BT * score_BT if self.weighted else chunk.valid_BT
        h_BCD = self.states(news_BTD, chunk, pack, written_BT, weight_BT, codes)
        return h_BCD, h_BCD, None

    def states(
        self, news_BTD, chunk: Chunk, pack: Packing, written_BT, weight_BT, codes, more_BCD=0.0
    ) -> Tensor:
        """(B, C, D) states of segments: weighted, n times the mean of their tokens; with what is
        added to them in normalised coordinates."""
        with torch.autocast(news_BTD.device.type, enabled=False):
            # Tokens of each segment, the one that ends it among them; for each token how many have
            # ended before it.
            length_BC = F.pad(pack.index_BC, (1, 0), value=-1).diff(dim=1)
            rank_BT = written_BT.cumsum(1) - written_BT.long()
            length_BT = length_BC.gather(1, rank_BT.clamp(max=length_BC.shape[1] - 1))
            offset_BT = F.pad(tail_lengths(written_BT, chunk.valid_BT)[:, :-1], (1, 0))
            if self.bins is None:
                part_BTD = rotate(news_BTD, offset_BT)
            else:
                part_BTD = codes.scale.float() * self.bins(chunk.ids_BT, offset_BT, length_BT)
            mean_BCD, _ = pack.pool(part_BTD, weight_BT)
            x_BCD = codes.normalise(mean_BCD * length_BC.unsqueeze(-1)) + more_BCD
            return codes.to_states(self.mark(x_BCD, length_BC))

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
