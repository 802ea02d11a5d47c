"""How segments close: (…, D) states → scores, and scores → the threshold that realises a rate.

A strategy is a module with `score` and `threshold`, and its line in BOUNDARIES. It says of itself:
`learned`: the written concepts teach the score, through a straight-through confidence.
`accumulates`: scores are summed since the last concept, and the concept is read from the states so
weighted. `fitted`: what of the base's next-token distributions `start` needs, if anything: their
`entropy`, or the `surprise` at the token. `scored`: its scores differ, and their distribution is
tracked. `offline`: the model itself says where segments end, from all of the text; the gate's
decisions are not asked for."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sememe.concepts.fit import explained, linear_fit


class Boundary(nn.Module):
    """A strategy over states of `width` coordinates; the base of all."""

    learned = accumulates = offline = False
    scored = True
    fitted: str | None = None

    def __init__(self, width: int):
        super().__init__()

    def score(self, head: nn.Module, x: Tensor, previous: Tensor) -> Tensor:
        """(…,) fp32: the higher, the sooner a concept is written. `previous` is the state one
        position earlier."""
        return head.score(x, previous)

    def threshold(self, quantiles: np.ndarray, rate: float, feedback: float) -> tuple[float, float]:
        """(threshold, its shift per concept owed), from equally spaced quantiles of the scores."""
        threshold, low, high = np.quantile(quantiles, [1.0 - rate, 0.16, 0.84])
        return float(threshold), feedback * max(float(high - low) / 2, 1e-6)


class Null(Boundary):
    """The head's own decision for or against NULL: log-odds of writing."""

    learned = True


class Threshold(Boundary):
    """Integrate and fire (CIF, arXiv 1905.11235): non-negative scores are summed, and when the sum
    passes the threshold a concept is written from the states weighted by them; what is over is
    carried on. The weights get the gradient."""

    accumulates = True

    def score(self, head: nn.Module, x: Tensor, previous: Tensor) -> Tensor:
        return F.softplus(super().score(head, x, previous))

    def threshold(self, quantiles: np.ndarray, rate: float, feedback: float) -> tuple[float, float]:
        """The mean score of 1 / rate tokens; half a concept's worth of it per concept owed."""
        threshold = float((quantiles[1:] + quantiles[:-1]).mean()) / 2 / rate
        return threshold, feedback * threshold


class Fixed(Boundary):
    """Every 1 / rate tokens (M of N where the rate is M / N): without a score the gate writes when
    a concept is owed."""

    scored = False

    def score(self, head: nn.Module, x: Tensor, previous: Tensor) -> Tensor:
        return torch.zeros_like(x[..., 0])

    def threshold(self, quantiles: np.ndarray, rate: float, feedback: float) -> tuple[float, float]:
        """Just below 0, to absorb the rounding of rate · tokens; one concept owed outweighs it by
        far."""
        return -1e-6, 1.0


class Entropy(Boundary):
    """Where the next token is hard: a linear estimate of the base's next-token entropy, fitted once
    and never trained.

    The estimate reads the shallow states at t and t-1, so it is causal and costs 2 D
    multiplications; a shallow exit through the base's own lm_head would cost a fifth of all of
    SmolLM2's multiplications."""

    fitted = "entropy"

    @staticmethod
    def target(log_p_BTV: Tensor, ids_BT: Tensor) -> Tensor:
        """(B, T - 1) what is estimated at all tokens but the first, of the base's own
        distributions of the next token."""
        return -(log_p_BTV.exp() * log_p_BTV).sum(-1)[:, 1:]

    def __init__(self, width: int):
        super().__init__(width)
        self.register_buffer("weight", torch.zeros(2 * width))

    def score(self, head: nn.Module, x: Tensor, previous: Tensor) -> Tensor:
        return torch.cat([x, previous], -1) @ self.weight.float()

    @torch.no_grad()
    def start(self, x_ND: Tensor, previous_ND: Tensor, target_N: Tensor) -> dict[str, float]:
        """Fits (N,) values in nats. Returns the share of their variance explained."""
        target_N1 = target_N.unsqueeze(1)
        weight_F1, _, left_N1 = linear_fit(torch.cat([x_ND, previous_ND], -1), target_N1, 0.03)
        self.weight.copy_(weight_F1.squeeze(1))
        return {f"{self.fitted}_explains": explained(left_N1, target_N1)}


class Surprise(Entropy):
    """Where a token was hard to foresee: the same estimate of minus the log-probability that the
    base gave it. A concept is then written by the very token that it is needed for."""

    fitted = "surprise"

    @staticmethod
    def target(log_p_BTV: Tensor, ids_BT: Tensor) -> Tensor:
        return -log_p_BTV[:, :-1].gather(-1, ids_BT[:, 1:, None]).squeeze(-1)


class Autoregressive(Fixed):
    """Concepts are written one after another behind the text, each as long as the model says
    (`lengths.py`), until all of it is covered."""

    offline = True


BOUNDARIES = {
    "null": Null,
    "threshold": Threshold,
    "fixed": Fixed,
    "entropy": Entropy,
    "surprise": Surprise,
    "autoregressive": Autoregressive,
}
