"""Linear fits that start new modules from a base's own states: (N, F) features, (N, M) targets →
weights."""

import torch
from torch import Tensor


def linear_fit(x_NF: Tensor, y_NM: Tensor, penalty: float = 0.01) -> tuple[Tensor, Tensor, Tensor]:
    """Ridge regression `y ≈ x W + b`. Returns W (F, M), b (M,) and what is left (N, M), all fp64.

    `penalty`: in units of the features' mean variance, so that N may be below F.
    """
    x_NF, y_NM = x_NF.double(), y_NM.double()
    x_mean, y_mean = x_NF.mean(0), y_NM.mean(0)
    x_NF, y_NM = x_NF - x_mean, y_NM - y_mean
    gram_FF = x_NF.T @ x_NF
    gram_FF += (
        penalty
        * gram_FF.diagonal().mean()
        * torch.eye(len(gram_FF), dtype=gram_FF.dtype, device=gram_FF.device)
    )
    weight_FM = torch.linalg.solve(gram_FF, x_NF.T @ y_NM)
    return weight_FM, y_mean - x_mean @ weight_FM, y_NM - x_NF @ weight_FM


def explained(left_NM: Tensor, y_NM: Tensor) -> float:
    """Share of the variance of `y` that is not left."""
    spread_NM = y_NM.double() - y_NM.double().mean(0)
    return float(1 - left_NM.square().sum() / spread_NM.square().sum().clamp(min=1e-12))
