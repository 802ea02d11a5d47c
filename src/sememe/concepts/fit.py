"""Linear fits that start new modules from a base's own states: (N, F) features, (N, M) targets →
weights."""

import torch
from torch import Tensor, nn


def linear_fit(x_NF: Tensor, y_NM: Tensor, penalty: float = 0.01) -> tuple[Tensor, Tensor, Tensor]:
    """Ridge regression `y ≈ x W + b`. Returns W (F, M), b (M,) and what is left (N, M), all fp64.

    `penalty`: in units of the features' mean variance, so that N may be below F.
    """
    x_NF, y_NM = x_NF.double(), y_NM.double()
    x_F, y_M = x_NF.mean(0), y_NM.mean(0)
    x_NF, y_NM = x_NF - x_F, y_NM - y_M
    gram_FF = x_NF.T @ x_NF
    gram_FF.diagonal().add_(penalty * gram_FF.diagonal().mean())
    weight_FM = torch.linalg.solve(gram_FF, x_NF.T @ y_NM)
    return weight_FM, y_M - x_F @ weight_FM, y_NM - x_NF @ weight_FM


def explained(left_NM: Tensor, y_NM: Tensor) -> float:
    """Share of the variance of `y` that is not left."""
    spread_NM = y_NM.double() - y_NM.double().mean(0)
    return float(1 - left_NM.square().sum() / spread_NM.square().sum().clamp(min=1e-12))


@torch.no_grad()
def fit(linear: nn.Linear, x_NF: Tensor, y_NM: Tensor) -> float:
    """Sets a linear map by `linear_fit`. Returns the share of the variance explained."""
    weight_FM, bias_M, left_NM = linear_fit(x_NF, y_NM)
    linear.weight.copy_(weight_FM.T)
    linear.bias.copy_(bias_M)
    return explained(left_NM, y_NM)


@torch.no_grad()
def set_frame(mean_D: Tensor, scale: Tensor, x_ND: Tensor) -> None:
    """Sets them to the mean of states and to their deviation from it, of all coordinates."""
    mean_D.copy_(x_ND.float().mean(0))
    scale.copy_((x_ND.float() - mean_D).square().mean().sqrt().clamp(min=1e-6))
