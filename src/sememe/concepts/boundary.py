"""How segments close: (…, D) states → scores, and scores → the threshold that realises a rate.

A strategy is a class with `learned`, `score` and `threshold`, and its line in BOUNDARIES.
"""

import numpy as np
import torch
from torch import Tensor, nn


class Null:
    """The head's own decision for or against NULL; it gets gradient through the written concepts."""

    learned = True

    def score(self, head: nn.Module, x: Tensor, previous: Tensor) -> Tensor:
        """(…,) log-odds of writing. `previous` is the state one position earlier."""
        return head.score(x, previous)

    def threshold(self, quantiles: np.ndarray, rate: float, feedback: float) -> tuple[float, float]:
        """(threshold, its shift per concept owed), from equally spaced quantiles of the scores."""
        grid = np.linspace(0, 1, len(quantiles))
        threshold, low, high = np.interp([1.0 - rate, 0.16, 0.84], grid, quantiles)
        return float(threshold), feedback * max(float(high - low) / 2, 1e-6)


class Fixed:
    """Every 1 / rate tokens: without a score the gate writes whenever a concept is owed."""

    learned = False

    def score(self, head: nn.Module, x: Tensor, previous: Tensor) -> Tensor:
        """(…,) zeros."""
        return torch.zeros(x.shape[:-1], device=x.device)

    def threshold(self, quantiles: np.ndarray, rate: float, feedback: float) -> tuple[float, float]:
        """Just below 0, to absorb the rounding of rate · tokens; one concept owed outweighs it by far."""
        return -1e-6, 1.0


BOUNDARIES = {"null": Null, "fixed": Fixed}
