"""ConceptEmbedding: concept ids ⇄ (…, D) states, as a sum of one code from each of G tables
(residual stages).

Codes live in normalised coordinates, `state = mean + scale · Σ_g table_g[digit_g]`, so that one
learning rate fits every base. A concept is one integer in mixed radix, `id = Σ_g digit_g · K^g`;
the first stage is digit 0."""

import itertools
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from sememe.concepts.fit import set_frame
from sememe.concepts.kmeans import assign, kmeans

# Logits start as log-likelihoods of equal Gaussians: they differ by half the difference of squared
# distances, in units of what a stage leaves of a state. At this sharpness neighbouring codes still
# get gradient.
SHARPNESS = 20.0


def digits(ids: Tensor, num_concepts: int, codes_per_concept: int) -> Tensor:
    """(…,) ids ≥ 0 → (…, G) digits, each below K."""
    base_G = num_concepts ** torch.arange(codes_per_concept, device=ids.device)
    return ids.unsqueeze(-1) // base_G % num_concepts


def count_digits(ids_n: Tensor, num_concepts: int, codes_per_concept: int) -> Tensor:
    """(n,) ids ≥ 0 → (G, K) fp32: how often each digit occurs in each stage."""
    digit_nG = digits(ids_n, num_concepts, codes_per_concept)
    counts = [torch.bincount(digit_n, minlength=num_concepts) for digit_n in digit_nG.unbind(-1)]
    return torch.stack(counts).float()


class ConceptEmbedding(nn.Module):
    """G tables of K codes, with the frame (mean, scale) of the states that they stand for."""

    def __init__(self, num_concepts: int, width: int, codes_per_concept: int = 1):
        super().__init__()
        self.num_concepts = num_concepts
        self.codes_per_concept = codes_per_concept
        self.weight = nn.Parameter(torch.randn(codes_per_concept, num_concepts, width))
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("scale", torch.ones(()))

    def start_frame(self, h_ND: Tensor) -> None:
        """Sets mean and scale to those of (N, D) states."""
        set_frame(self.mean, self.scale, h_ND)

    def normalise(self, h: Tensor) -> Tensor:
        """(…, D) hidden states → (…, D) fp32 coordinates in which codes and heads work."""
        return (h.float() - self.mean.float()) / self.scale.float()

    def to_states(self, x: Tensor) -> Tensor:
        """(…, D) normalised coordinates → (…, D) fp32 hidden states."""
        return self.mean.float() + self.scale.float() * x

    def table(self, g: int) -> Tensor:
        """(K, D) fp32 codes of stage g, normalised."""
        return self.weight[g].float()

    def digits(self, ids: Tensor) -> Tensor:
        """(…,) ids ≥ 0 → (…, G) digits."""
        return digits(ids, self.num_concepts, self.codes_per_concept)

    def by_stage(self, ids: Tensor) -> Tensor:
        """(…,) ids ≥ 0 → (…, G, D) fp32 codes of each stage, normalised."""
        digits = self.digits(ids).unbind(-1)
        return torch.stack([self.table(g)[digit] for g, digit in enumerate(digits)], -2)

    def combine(self, digits: Tensor) -> Tensor:
        """(…, G) digits → (…,) int64 ids."""
        return sum(x.long() * self.num_concepts**g for g, x in enumerate(digits.unbind(-1)))

    def forward(self, ids: Tensor) -> Tensor:
        """(…,) ids → (…, D) fp32 states."""
        return self.to_states(self.by_stage(ids).sum(-2))


@torch.no_grad()
def start_from_states(
    codes: ConceptEmbedding,
    head: nn.Module,
    x_ND: Tensor,
    seed: int = 0,
    tables: Sequence[Tensor | None] = (),
) -> dict[str, float | list[float]]:
    """Codebook and head from (N, D) normalised states, stage by stage: k-means of what the stages
    before have left, or the (K, D) table that is given for a stage, and its nearest-centroid
    classifier.

    Returns the number of states used and the share of their variance that the codes leave, at the
    end and by stage."""
    r_ND, spread, shares = x_ND, x_ND.square().sum(1).mean(), []
    for g, table_KD in itertools.zip_longest(range(codes.codes_per_concept), tables):
        if table_KD is None:
            centroid_KD, nearest_N = kmeans(r_ND, codes.num_concepts, seed=seed + g)
        else:
            centroid_KD, nearest_N = table_KD, assign(r_ND, table_KD)[0]
        codes.weight[g] = centroid_KD
        r_ND = r_ND - centroid_KD[nearest_N]
        left = r_ND.square().sum(1).mean()
        head.start(g, centroid_KD, SHARPNESS / left.clamp(min=1e-6))
        shares.append(float(left / spread))
    return {
        "states": float(len(x_ND)),
        "variance_left": shares[-1],
        "variance_left_by_stage": shares,
    }


def vocabulary_blocks(ids_NT: Tensor, vocab: int, seed: int) -> Tensor:
    """(n, T) blocks that open as the (N, T) texts do and go on with every token of the vocabulary
    once, in random order; of a vocabulary that is larger than 1.5 times the text, a part."""
    length = ids_NT.shape[1] - 1
    token_V = torch.randperm(vocab, generator=torch.Generator().manual_seed(seed))
    count = min(max(vocab, length), max(length, ids_NT.numel() * 3 // 2)) // length
    # Repeats what is too short, and cuts what is too long.
    token_nT = np.resize(token_V, (count, length))
    first_n1 = np.resize(ids_NT[:, 0].cpu(), (count, 1))
    return torch.from_numpy(np.concatenate([first_n1, token_nT], 1))
