"""ConceptEmbedding: K concept ids ⇄ (…, D) states, discrete forward and soft backward.

Codes live in normalised coordinates, `state = mean + scale · code`, so that one learning rate fits every base.
"""

import torch
from torch import Tensor, nn


class ConceptEmbedding(nn.Module):
    """The table of K codes, with the frame (mean, scale) of the states that it stands for."""

    def __init__(self, num_concepts: int, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(num_concepts, width))
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("scale", torch.ones(()))

    @torch.no_grad()
    def start_frame(self, h_ND: Tensor) -> None:
        """Sets mean and scale to those of (N, D) states."""
        self.mean.copy_(h_ND.float().mean(0))
        self.scale.copy_((h_ND.float() - self.mean).square().mean().sqrt())

    def normalise(self, h: Tensor) -> Tensor:
        """(…, D) hidden states → (…, D) fp32 coordinates in which codes and heads work."""
        return (h.float() - self.mean.float()) / self.scale.float()

    def forward(self, ids: Tensor) -> Tensor:
        """(…,) ids → (…, D) fp32 states."""
        return self.mean.float() + self.scale.float() * self.weight[ids].float()

    def straight_through(self, logits_nK: Tensor, ids_n: Tensor, temperature: float, noise_nK: Tensor | None) -> Tensor:
        """Forward the chosen codes exactly, backward the soft mixture (straight-through Gumbel-softmax).

        `hard + (soft - soft.detach())`: written the other way round the forward value is not exact in fp32.
        Source: Jang et al., arXiv 1611.01144.
        """
        hard = self(ids_n).detach()
        noisy = logits_nK if noise_nK is None else logits_nK + noise_nK
        soft = self.mean.float() + self.scale.float() * (torch.softmax(noisy / temperature, -1) @ self.weight.float())
        return hard + (soft - soft.detach())


def gumbel_like(logits: Tensor) -> Tensor:
    """Standard Gumbel noise of the same shape: argmax(logits + noise) is a sample of softmax(logits)."""
    return -torch.empty_like(logits).exponential_().log()


@torch.no_grad()
def kmeans(x_ND: Tensor, k: int, iterations: int = 10, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Lloyd's k-means: (N, D) points → (k, D) centroids and (N,) assignments. Empty clusters restart at far points.

    With fewer points than k the remaining centroids repeat points with a little noise.
    """
    generator = torch.Generator(device="cpu").manual_seed(seed)
    count = x_ND.shape[0]
    pick = torch.randperm(count, generator=generator)
    pick = pick.repeat((k + count - 1) // count)[:k].to(x_ND.device)
    centroid_KD = x_ND[pick].clone()
    if k > count:
        jitter = torch.randn(k - count, x_ND.shape[1], generator=generator).to(x_ND)
        centroid_KD[count:] += 0.01 * x_ND.std() * jitter
    for _ in range(iterations):
        nearest_N, distance_N = assign(x_ND, centroid_KD)
        sums = torch.zeros_like(centroid_KD).index_add_(0, nearest_N, x_ND)
        counts = torch.bincount(nearest_N, minlength=k).to(x_ND)
        centroid_KD = torch.where(counts[:, None] > 0, sums / counts.clamp(min=1)[:, None], centroid_KD)
        empty = (counts == 0).nonzero().flatten()[:count]
        far = distance_N.argsort(descending=True)[: len(empty)]
        centroid_KD[empty] = x_ND[far]
    return centroid_KD, assign(x_ND, centroid_KD)[0]


@torch.no_grad()
def assign(x_ND: Tensor, centroid_KD: Tensor, chunk: int = 4096) -> tuple[Tensor, Tensor]:
    """Nearest centroid of each point and its squared distance, in chunks that bound the memory."""
    square_K = centroid_KD.square().sum(1)
    nearest, distance = [], []
    for part in x_ND.split(chunk):
        score = square_K - 2 * part @ centroid_KD.T
        best = score.min(1)
        nearest.append(best.indices)
        distance.append((best.values + part.square().sum(1)).clamp(min=0))
    return torch.cat(nearest), torch.cat(distance)


@torch.no_grad()
def start_from_states(codes: ConceptEmbedding, head: nn.Module, h_ND: Tensor, seed: int = 0) -> dict[str, float]:
    """Codebook and head from the model's own shallow states: k-means, and its nearest-centroid classifier.

    Returns the share of the states' variance that the codes leave, and the number of states used.
    """
    x_ND = codes.normalise(h_ND)
    centroid_KD, nearest_N = kmeans(x_ND, codes.weight.shape[0], seed=seed)
    codes.weight.copy_(centroid_KD)
    left = (x_ND - centroid_KD[nearest_N]).square().sum(1).mean()
    # Log-likelihood of equal Gaussians: logits differ by half the difference of squared distances, in units of what
    # a state keeps to itself. At this sharpness neighbouring codes still get gradient.
    sharpness = 1.0 / left.clamp(min=1e-6) * SHARPNESS
    head.start(sharpness * centroid_KD, -0.5 * sharpness * centroid_KD.square().sum(1))
    return {"states": float(len(x_ND)), "variance_left": float(left / x_ND.square().sum(1).mean())}


SHARPNESS = 20.0
