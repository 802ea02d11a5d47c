"""WordBins: (…,) words with their places in a segment → (…, D) what a code says of them, and votes
for words back.

A code of 12 bits cannot name two words of 50,000. It need not: whoever reads it knows the text
before, and asks only which of the likely words it is. So words are put into bins, such that those
that the base takes for one another lie in different ones, and a code names a bin for each word of
its segment. A source is then sent at little more than what it is uncertain by to one who knows its
context (Slepian and Wolf 1973), where clusters of like words would name what the context tells
already.

How many codes a segment's length has, and how many bins each of its places, follows from the
configuration alone; which word lies in which bin is fitted to a base's predictions. N counts
lengths, P places, L different numbers of bins."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from sememe.concepts.news import turn

RIVALS = 64  # likeliest words that a word is compared with where it stands
SWEEPS = 2


@dataclass
class Rivals:
    """Of each word, the words that are taken for it, and how much: rows `start[w]` to `start[w +
    1]`."""

    start: np.ndarray
    other: np.ndarray
    weight: np.ndarray
    seen: np.ndarray  # (V,) how often each word stands in the text


class Confusion:
    """Collects, position by position, how likely another word would have been taken for the one
    that stands there."""

    def __init__(self, vocab: int):
        self.vocab, self.key, self.weight, self.ids = vocab, [], [], []

    def add(self, log_p_nV: Tensor, ids_n: Tensor) -> None:
        """A base's predictions and the (n,) words that stood there."""
        top_nM, other_nM = log_p_nV.topk(min(RIVALS, self.vocab), -1)
        own_n1 = log_p_nV.gather(-1, ids_n.unsqueeze(-1))
        self.weight.append(
            torch.sigmoid(top_nM - own_n1).flatten().float().cpu()
        )  # of the two, when only they are left
        self.key.append((ids_n.unsqueeze(-1) * self.vocab + other_nM).flatten().cpu())
        self.ids.append(ids_n.cpu())

    def rivals(self) -> Rivals:
        """All of it, both ways round."""
        key_n, weight_n = torch.cat(self.key), torch.cat(self.weight)
        a_n, b_n = key_n // self.vocab, key_n % self.vocab
        apart_n = a_n != b_n
        key_n = torch.cat([key_n[apart_n], (b_n * self.vocab + a_n)[apart_n]])
        key_n, order_n = key_n.sort()
        pair_m, which_n = torch.unique_consecutive(key_n, return_inverse=True)
        weight_m = torch.zeros(len(pair_m)).index_add_(
            0, which_n, torch.cat([weight_n[apart_n]] * 2)[order_n]
        )
        start = np.searchsorted((pair_m // self.vocab).numpy(), np.arange(self.vocab + 1))
        seen = torch.bincount(torch.cat(self.ids), minlength=self.vocab)
        return Rivals(start, (pair_m % self.vocab).numpy(), weight_m.numpy(), seen.numpy())


def sort_words(rivals: Rivals, bins: int) -> np.ndarray:
    """(V,) a bin for each word: the commonest first, each where its rivals weigh least, a second
    time when all have theirs. Words that no context calls for fill the bins that the text uses
    least."""
    vocab = len(rivals.seen)
    bin_V, use, rate = np.full(vocab, -1), np.zeros(bins), rivals.seen + 0.01
    order, small = np.argsort(-rate, kind="stable"), 1e-6 / max(1.0, rate.sum())
    for sweep in range(SWEEPS):
        for word in order:
            first, last = rivals.start[word], rivals.start[word + 1]
            if sweep and first == last:
                continue
            if sweep:
                use[bin_V[word]] -= rate[word]
            near = bin_V[rivals.other[first:last]]
            cost = small * use
            if len(near):
                known = near >= 0
                cost = cost + np.bincount(
                    near[known], weights=rivals.weight[first:last][known], minlength=bins
                )
            bin_V[word] = cost.argmin()
            use[bin_V[word]] += rate[word]
    return bin_V


def allot(codes: int, lengths: int, rate: float, even: bool) -> list[int]:
    """Codes for each length of a segment, by how many tokens it is expected to cover: `even` ones
    are 1 / rate long, others end anywhere with the same chance. Each length has some, for a dial
    that is moved."""
    n = np.arange(1, lengths + 1)
    share = np.clip(1 - np.abs(n - 1 / rate), 0, 1) if even else n * rate * (1 - rate) ** (n - 1)
    share = share if share.sum() > 0 else np.ones(lengths)
    least = max(1, min(codes // 64, codes // (2 * lengths)))
    return [least + int((codes - lengths * least) * x) for x in share / share.sum()]


def radices(codes: int, places: int, even: bool) -> list[int]:
    """Bins at each of the places of a segment, with a product of at most `codes`. Where segments
    are not `even`, they end at a word that is hard to foretell: it has twice the bits of
    another."""
    weight = [1.0] * (places - 1) + [1.0 if even else 2.0]
    found = [max(1, int(codes ** (w / sum(weight)) + 1e-9)) for w in weight]
    for i in reversed(range(places)):
        if math.prod(found) // found[i] * (found[i] + 1) <= codes:
            found[i] += 1
    return found


class WordBins(nn.Module):
    """Segments of n words as sums of one of few vectors for each place, turned by the place
    (`news.turn`)."""

    def __init__(
        self, width: int, vocab: int, codes: int, stages: int, lengths: int, rate: float, even: bool
    ):
        super().__init__()
        self.counts = allot(codes, lengths, rate, even)
        self.stage = [
            [p * stages // n if n >= stages else p for p in range(n)] for n in range(1, lengths + 1)
        ]
        self.bins = [
            [
                b
                for g in range(stages)
                if (here := stage.count(g))
                for b in radices(count, here, even)
            ]
            for count, stage in zip(self.counts, self.stage, strict=True)
        ]
        self.kinds = sorted({b for bins in self.bins for b in bins if b > 1})
        kind = torch.full((lengths, lengths), -1)
        for n, bins in enumerate(self.bins):
            for p, b in enumerate(bins):
                kind[n, p] = self.kinds.index(b) if b > 1 else -1
        self.register_buffer("kind_NP", kind, persistent=False)
        self.register_buffer(
            "bin_LV", torch.zeros(max(1, len(self.kinds)), vocab, dtype=torch.int32)
        )
        most = max(self.kinds, default=1)
        basis_DB = torch.randn(width, most, generator=torch.Generator().manual_seed(1))
        basis_DB = (
            torch.linalg.qr(basis_DB)[0] if most <= width else basis_DB / basis_DB.norm(dim=0)
        )
        self.register_buffer("basis_BD", basis_DB.T.contiguous() * width**0.5)

    def start(self, rivals: Rivals) -> None:
        """Puts the words into bins."""
        for kind, bins in enumerate(self.kinds):
            self.bin_LV[kind] = torch.from_numpy(sort_words(rivals, bins)).to(self.bin_LV)

    def forward(self, ids: Tensor, place: Tensor, length: Tensor) -> Tensor:
        """(…, D) of words at places of segments of these lengths."""
        kind = self._kind(place, length)
        vector = self.basis_BD[self.bin_LV[kind.clamp(min=0), ids].long()]
        return turn(vector * (kind >= 0).unsqueeze(-1), place)

    def votes(self, x: Tensor, place: Tensor, length: Tensor) -> Tensor:
        """(…, V): 1 for each word in the bin that a segment's vector (…, D), turned back by the
        place, names; near 0 for all others."""
        x_nD, kind_n = x.flatten(0, -2), self._kind(place, length).flatten()
        parts, rows = [], []
        for kind in kind_n.unique().tolist():
            row_m = (kind_n == kind).nonzero().flatten()
            rows.append(row_m)
            if kind < 0:
                parts.append(x_nD.new_zeros(len(row_m), self.bin_LV.shape[1]))
                continue
            basis_bD = self.basis_BD[: self.kinds[kind]].to(x_nD.dtype)
            score_bm = basis_bD @ x_nD[row_m].T / x_nD.shape[1]
            parts.append(score_bm.index_select(0, self.bin_LV[kind].long()).T)
        votes_nV = parts[0] if len(parts) == 1 else torch.cat(parts)[torch.cat(rows).argsort()]
        return votes_nV.view(*x.shape[:-1], -1)

    def _kind(self, place: Tensor, length: Tensor) -> Tensor:
        most = len(self.kind_NP)
        return self.kind_NP[length.clamp(1, most) - 1, place.clamp(0, most - 1)]

    def codes(self, stage: int, length: int) -> Tensor:
        """(n, D) all segments of that length that a stage tells apart, without those of the other
        stages."""
        total_nD = torch.zeros(1, self.basis_BD.shape[1], device=self.basis_BD.device)
        for p, (b, g) in enumerate(zip(self.bins[length - 1], self.stage[length - 1], strict=True)):
            if g == stage and b > 1:
                place_b = torch.full((b,), p, device=total_nD.device)
                total_nD = (total_nD.unsqueeze(1) + turn(self.basis_BD[:b], place_b)).flatten(0, 1)
        return total_nD
