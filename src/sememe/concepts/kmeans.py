"""k-means: (N, D) points → (K, D) centroids."""

import torch
from torch import Tensor
from tqdm.auto import tqdm

ITERATIONS = 6


@torch.no_grad()
def kmeans(
    x_ND: Tensor, k: int, iterations: int = ITERATIONS, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Lloyd's k-means: (N, D) points → (k, D) centroids and (N,) assignments. Empty clusters
    restart at far points.

    With fewer points than k the remaining centroids repeat points. Six iterations leave 0.5 % more
    variance than fifteen (docs/log.md), in half the time; nearly all of it is `assign`."""
    generator = torch.Generator(device="cpu").manual_seed(seed)
    count = len(x_ND)
    pick = torch.randperm(count, generator=generator).repeat(-(-k // count))[:k]
    centroid_KD = x_ND[pick.to(x_ND.device)]
    # None: no bar where stderr is a pipe.
    for _ in tqdm(range(iterations), "k-means", disable=None, leave=False):
        nearest_N, distance_N = assign(x_ND, centroid_KD)
        count_K1 = torch.bincount(nearest_N, minlength=k).to(x_ND).unsqueeze(1)
        sum_KD = torch.zeros_like(centroid_KD).index_add_(0, nearest_N, x_ND)
        centroid_KD = torch.where(count_K1 > 0, sum_KD / count_K1.clamp(min=1), centroid_KD)
        empty = (count_K1 == 0).nonzero()[:count, 0]
        centroid_KD[empty] = x_ND[distance_N.argsort(descending=True)[: len(empty)]]
    return centroid_KD, assign(x_ND, centroid_KD)[0]


@torch.no_grad()
def assign(x_ND: Tensor, centroid_KD: Tensor, chunk: int = 4096) -> tuple[Tensor, Tensor]:
    """Nearest centroid of each point and its squared distance, in chunks that bound the memory."""
    square_K = centroid_KD.square().sum(1)
    parts = [torch.addmm(square_K, x, centroid_KD.T, alpha=-2).min(1) for x in x_ND.split(chunk)]
    distance_N, nearest_N = (torch.cat(x) for x in zip(*parts, strict=True))
    return nearest_N, (distance_N + x_ND.square().sum(1)).clamp(min=0)
