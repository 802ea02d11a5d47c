"""TailBridge: (B, T, D) shallow states and last concepts → the states that tail positions enter the deep slice with.

A tail position skips the middle slice, so the deep slice meets a state that it has never seen. The bridge adds what a
linear map can say about the missing part, from the position's own shallow state and from the last concept's middle
state (H-Net's up-sampling, arXiv 2507.07955 §2.2, with weights). It starts at zero, and `start` puts it at the least
squares fit to the base's own states: a closed-form local distillation that costs one pass over a few thousand tokens.
Where every position writes a concept it is not used, so the identity at birth stands.
"""

import torch
from torch import Tensor, nn


class TailBridge(nn.Module):
    """`h + scale · (x W + y V + b)` with x, y the normalised shallow state and last concept's middle state."""

    def __init__(self, width: int):
        super().__init__()
        self.shallow = nn.Linear(width, width)
        self.concept = nn.Linear(width, width, bias=False)
        for p in self.parameters():
            nn.init.zeros_(p)
        for name in ("shallow_mean", "concept_mean"):
            self.register_buffer(name, torch.zeros(width))
        for name in ("shallow_scale", "concept_scale", "scale"):
            self.register_buffer(name, torch.ones(()))

    def forward(self, h_BTD: Tensor, last_BTD: Tensor) -> Tensor:
        """(B, T, D). `last_BTD` is the middle state of the last concept; `concept_mean` stands for "none but the sink",
        whose state is an attention sink's and says nothing about the text."""
        x = ((h_BTD.float() - self.shallow_mean) / self.shallow_scale).to(h_BTD.dtype)
        y = ((last_BTD.float() - self.concept_mean) / self.concept_scale).to(h_BTD.dtype)
        return h_BTD + (self.shallow(x) + self.concept(y)) * self.scale.to(h_BTD.dtype)

    @torch.no_grad()
    def start(self, h_ND: Tensor, last_ND: Tensor, target_ND: Tensor, penalty: float = 0.01) -> float:
        """Least squares with a ridge: what is missing, `target - h`, from (N, D) states. Returns the share explained
        of the variance of `target`. `penalty`: of the mean variance of a normalised coordinate; N may be below 2 D."""
        h_ND, last_ND, target_ND = h_ND.double(), last_ND.double(), target_ND.double()
        missing_ND = target_ND - h_ND
        self.scale.copy_((missing_ND - missing_ND.mean(0)).square().mean().sqrt())
        for mean, scale, states in ((self.shallow_mean, self.shallow_scale, h_ND),
                                    (self.concept_mean, self.concept_scale, last_ND)):
            mean.copy_(states.mean(0))
            scale.copy_((states - mean.double()).square().mean().sqrt().clamp(min=1e-6))
        x_N2 = torch.cat([(h_ND - self.shallow_mean.double()) / self.shallow_scale.double(),
                          (last_ND - self.concept_mean.double()) / self.concept_scale.double()], 1)
        y_ND = missing_ND / self.scale.double()
        weight_2D = ridge(x_N2, y_ND - y_ND.mean(0), penalty)
        self.shallow.weight.copy_(weight_2D[: h_ND.shape[1]].T)
        self.concept.weight.copy_(weight_2D[h_ND.shape[1] :].T)
        self.shallow.bias.copy_(y_ND.mean(0))
        left = (y_ND - y_ND.mean(0) - x_N2 @ weight_2D) * self.scale.double()
        return float(1 - left.square().sum() / (target_ND - target_ND.mean(0)).square().sum().clamp(min=1e-12))


def ridge(x_NF: Tensor, y_NM: Tensor, penalty: float = 0.01) -> Tensor:
    """(F, M) least-squares weights of centred fp64 states, with a penalty in units of the features' mean variance."""
    gram_FF = x_NF.T @ x_NF
    gram_FF += penalty * gram_FF.diagonal().mean() * torch.eye(len(gram_FF), dtype=gram_FF.dtype, device=gram_FF.device)
    return torch.linalg.solve(gram_FF, x_NF.T @ y_NM)
