"""Word bins: ids with their positions in a segment → (…, D) what a code says of them, and logits
(votes) for words back.

A code of 12 bits cannot name two words of 50,000. It need not: whoever reads it knows the text
before, and asks only which of the likely words it is. So words are put into bins, such that those
that the base confuses with one another lie in different ones, and a code names a bin for each word
of its segment. A source is then sent at little more than its conditional entropy to a decoder that
knows its context (Slepian and Wolf 1973), where clusters of like words would name what the context
says already.

How many codes the segments of each length have, and how many bins each position, follows from the
configuration alone; which word lies in which bin is fitted to a base's predictions. N counts
lengths, P positions, L different numbers of bins."""

import math
from collections.abc import Iterable
from itertools import groupby

import numpy as np
import torch
from torch import Tensor, nn

RIVALS = 64  # likeliest words that a word is compared with where it stands
# Its multiples fill the circle evenly, so that positions have little in common.
GOLDEN = 0.6180339887498949


def rotate(x: Tensor, position: Tensor) -> Tensor:
    """(…, D) states and (…,) positions → the same, rotated in D / 2 planes by the position times
    the angle of each. Minus the position rotates back."""
    a, b = x.chunk(2, -1)
    share_P = (torch.arange(1, a.shape[-1] + 1, device=x.device) * GOLDEN % 1).to(x.dtype)
    angle = torch.pi * share_P * position.unsqueeze(-1)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


def confusion(
    predictions: Iterable[tuple[Tensor, Tensor]], vocab: int
) -> tuple[Tensor, np.ndarray]:
    """How likely a base is to take another word for the one that stands there.

    Args:
        predictions: (n, V) log-probabilities, and the (n,) words that stood there.

    Returns (V, V), symmetric and sparse, row by row: the sum over all positions; and (V,) how often
    each word stood there."""
    parts, count_V = [], torch.zeros(vocab)
    for log_p_nV, ids_n in predictions:
        top_nM, other_nM = log_p_nV.topk(min(RIVALS, vocab), -1)
        own_nM = ids_n.unsqueeze(-1).expand_as(other_nM)
        # The probability of the other word if only these two were left.
        weight_nM = torch.sigmoid(top_nM - log_p_nV.gather(-1, own_nM)).float()
        parts.append([x[other_nM != own_nM].cpu() for x in (own_nM, other_nM, weight_nM)])
        count_V += ids_n.cpu().bincount(minlength=vocab)
    own_m, other_m, weight_m = (torch.cat(x) for x in zip(*parts, strict=True))
    index_2m = torch.stack([own_m, other_m])
    confused_VV = torch.sparse_coo_tensor(
        torch.cat([index_2m, index_2m.flip(0)], 1), weight_m.repeat(2), (vocab, vocab)
    )
    return confused_VV.coalesce(), count_V.double().numpy()


def sort_words(confused_VV: Tensor, count_V: np.ndarray, bins: int) -> np.ndarray:
    """(V,) a bin for each word: the commonest first, each where its rivals weigh least, and a
    second time when all rivals have theirs. Words without rivals fill the bins that are used
    least."""
    row_m, other_m = confused_VV.indices().numpy()
    weight_m = confused_VV.values().numpy()
    start = np.searchsorted(row_m, np.arange(len(count_V) + 1))
    frequency_V = count_V + 0.01
    # Use decides only between bins without rivals.
    small = 1e-6 / max(1.0, frequency_V.sum())
    # Bin 0 is of words that are not sorted yet.
    bin_V = np.zeros(len(frequency_V), int)
    use = np.zeros(1 + bins)
    order = np.argsort(-frequency_V, kind="stable")
    for word in [*order, *order[start[order] < start[order + 1]]]:
        rivals = slice(start[word], start[word + 1])
        use[bin_V[word]] -= frequency_V[word]
        cost = small * use + np.bincount(bin_V[other_m[rivals]], weight_m[rivals], 1 + bins)
        bin_V[word] = 1 + cost[1:].argmin()
        use[bin_V[word]] += frequency_V[word]
    return bin_V - 1


def codes_by_length(codes: int, lengths: int, rate: float, even: bool) -> list[int]:
    """Codes for each length of a segment, by how many tokens it is expected to cover: `even` ones
    are 1 / rate long, others end anywhere with the same probability. Each length has some, for a
    rate that is changed after training."""
    n = np.arange(1, lengths + 1)
    share = np.clip(1 - np.abs(n - 1 / rate), 0, 1) if even else n * rate * (1 - rate) ** (n - 1)
    floor = max(1, codes // max(64, 2 * lengths))
    return [floor + int((codes - lengths * floor) * x) for x in share / share.sum()]


def bins_by_position(codes: int, positions: int, even: bool) -> list[int]:
    """Bins at each position of a segment, with a product of at most `codes`. Segments that are not
    `even` end at a word that is hard to predict: it has twice the bits of another."""
    bits = [1.0] * (positions - 1) + [1.0 if even else 2.0]
    bins = [max(1, int(codes ** (b / sum(bits)) + 1e-9)) for b in bits]
    for i in reversed(range(positions)):
        if math.prod(bins) // bins[i] * (bins[i] + 1) <= codes:
            bins[i] += 1
    return bins


class WordBins(nn.Module):
    """A segment of n words is a sum of n vectors, each one of few at its position and rotated by
    it."""

    def __init__(self, config, width: int, vocab: int, even: bool):
        super().__init__()
        stages, codes = config.codes_per_concept, config.num_concepts
        self.counts = codes_by_length(codes, config.max_tail + 1, config.bins_rate, even)
        # For each length the (bins, stage) of its positions: a concept of several codes shares the
        # positions out among its stages.
        self.layout: list[list[tuple[int, int]]] = []
        for length, count in enumerate(self.counts, 1):
            stage_P = [min(p, p * stages // length) for p in range(length)]
            parts = [(g, len([*positions])) for g, positions in groupby(stage_P)]
            bins = [(b, g) for g, n in parts for b in bins_by_position(count, n, even)]
            self.layout.append(bins)
        self.sizes = sorted({b for layout in self.layout for b, _ in layout} - {1})
        # Which way of sorting words each position uses; -1 where one bin holds all of them.
        index = {1: -1} | {b: i for i, b in enumerate(self.sizes)}
        rows = [torch.tensor([index[b] for b, _ in layout]) for layout in self.layout]
        size_NP = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1)
        self.register_buffer("size_NP", size_NP, persistent=False)
        bin_LV = torch.zeros(max(1, len(self.sizes)), vocab, dtype=torch.int32)
        self.register_buffer("bin_LV", bin_LV)
        largest = max(self.sizes, default=1)
        basis_DB = torch.randn(width, largest, generator=torch.Generator().manual_seed(1))
        orthogonal = largest <= width
        basis_DB = torch.linalg.qr(basis_DB)[0] if orthogonal else basis_DB / basis_DB.norm(dim=0)
        self.register_buffer("basis_BD", basis_DB.T.contiguous() * width**0.5)

    def start(self, predictions: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Puts the words into bins, by what a base takes them for: see `confusion`."""
        confused_VV, count_V = confusion(predictions, self.bin_LV.shape[1])
        for bin_V, bins in zip(self.bin_LV, self.sizes, strict=False):
            bin_V.copy_(torch.from_numpy(sort_words(confused_VV, count_V, bins)))

    def size(self, position: Tensor, length: Tensor) -> Tensor:
        """Which of the `sizes` positions of segments of these lengths have; -1 for a single bin."""
        longest = len(self.size_NP)
        return self.size_NP[length.clamp(1, longest) - 1, position.clamp(0, longest - 1)]

    def forward(self, ids: Tensor, position: Tensor, length: Tensor) -> Tensor:
        """(…, D) of words at positions of segments of these lengths."""
        size = self.size(position, length)
        vector = self.basis_BD[self.bin_LV[size.clamp(min=0), ids].long()]
        return rotate(vector * (size >= 0).unsqueeze(-1), position)

    def votes(self, x: Tensor, position: Tensor, length: Tensor) -> Tensor:
        """(…, V): 1 for each word in the bin that a segment's vector (…, D), rotated back by the
        position, names; near 0 for all others."""
        size = self.size(position, length)
        votes = x.new_zeros(*size.shape, self.bin_LV.shape[1])
        for i, bins in enumerate(self.sizes):
            here = size == i
            score_mb = x[here] @ self.basis_BD[:bins].to(x.dtype).T / x.shape[-1]
            votes[here] = score_mb.index_select(1, self.bin_LV[i])
        return votes

    def codes(self, stage: int, length: int) -> Tensor:
        """(n, D) all segments of that length that a stage distinguishes, without what the other
        stages say."""
        total_nD = torch.zeros_like(self.basis_BD[:1])
        for p, (b, g) in enumerate(self.layout[length - 1]):
            if g == stage and b > 1:
                vector_bD = rotate(self.basis_BD[:b], total_nD.new_tensor(p))
                total_nD = (total_nD.unsqueeze(1) + vector_bD).flatten(0, 1)
        return total_nD
