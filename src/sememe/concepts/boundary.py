"""How segments close: (…, D) states → scores, and scores → the threshold that realises a rate.

A strategy is a module with `score` and `threshold`, and its line in BOUNDARIES. It says of itself:
`learned`: the written concepts teach the score, through a straight-through confidence.
`accumulates`: scores are summed since the last concept, and the concept is read from the states so
weighted. `fitted`: `start` fits it to the base's own next-token distributions, of which `target`
keeps what it needs. `scored`: its scores differ, and their distribution is tracked. `offline`: the
model itself says where segments end, from all of the text; the gate's decisions are not asked
for."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sememe.concepts.fit import explained, linear_fit
from sememe.concepts.proposals import Proposals


class Boundary(nn.Module):
    """A strategy over states of `width` coordinates; the base of all."""

    learned = accumulates = offline = False
    scored = True
    fitted = False

    def __init__(self, width: int, vocabulary: int):
        super().__init__()

    def score(self, head: nn.Module, x: Tensor, previous: Tensor) -> Tensor:
        """(…,) fp32: the higher, the sooner a concept is written. `previous` is the state one
        position earlier."""
        return head.score(x, previous)

    def see(self, ids_NT: Tensor) -> None:
        """The text that it is to be fitted on, ahead of `target`."""

    def target(self, log_p_BTV: Tensor, ids_BT: Tensor) -> Tensor:
        """(B, T - 1, …) what is fitted at all tokens but the first, of the base's distributions of
        the next token."""
        raise NotImplementedError

    def start(self, x_NTf: Tensor, target: Tensor) -> dict[str, float]:
        """Fits the targets, from the states at the same tokens, each beside the one to its left.
        Returns the share of the variance of the boundary's quantity explained."""
        raise NotImplementedError

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


class Surprise(Boundary):
    """Where a token was hard to foresee: a linear estimate of minus the log-probability that the
    base gave it, fitted once and never trained. A concept is then written by the very token that it
    is needed for.

    The estimate reads the shallow states at t and t-1, so it is causal and costs 2 D
    multiplications; a shallow exit through the base's own lm_head would cost a fifth of all of
    SmolLM2's multiplications."""

    fitted = True

    def __init__(self, width: int, vocabulary: int):
        super().__init__(width, vocabulary)
        self.register_buffer("weight", torch.zeros(2 * width))

    def target(self, log_p_BTV: Tensor, ids_BT: Tensor) -> Tensor:
        return -log_p_BTV[:, :-1].gather(-1, ids_BT[:, 1:, None]).squeeze(-1)

    def score(self, head: nn.Module, x: Tensor, previous: Tensor) -> Tensor:
        return torch.cat([x, previous], -1) @ self.weight.float()

    @torch.no_grad()
    def start(self, x_NTf: Tensor, target_NT: Tensor) -> dict[str, float]:
        target_n1 = target_NT.reshape(-1, 1)
        weight_f1, _, left_n1 = linear_fit(x_NTf.flatten(0, 1), target_n1, 0.03)
        self.weight.copy_(weight_f1.squeeze(1))
        return {"surprise_explains": explained(left_n1, target_n1)}


class Entropy(Boundary):
    """Where the next tokens are open: the entropies of what is proposed for them, summed
    (`proposals.py`). Untrained, the sum places concepts better than the first alone or its jump
    against the tokens before (docs/log.md)."""

    fitted = True

    def __init__(self, width: int, vocabulary: int):
        super().__init__(width, vocabulary)
        self.proposals = Proposals(width, vocabulary)

    def see(self, ids_NT: Tensor) -> None:
        self.proposals.set_words(ids_NT)

    def target(self, log_p_BTV: Tensor, ids_BT: Tensor) -> Tensor:
        return self.proposals.classes(log_p_BTV[:, 1:])

    def score(self, head: nn.Module, x: Tensor, previous: Tensor) -> Tensor:
        x_nf = torch.cat([x, previous], -1).reshape(-1, 2 * x.shape[-1])
        return self.proposals.entropy(self.proposals(x_nf)).sum(0).view(x.shape[:-1])

    @torch.no_grad()
    def start(self, x_NTf: Tensor, target_NTW: Tensor) -> dict[str, float]:
        self.proposals.start(x_NTf, target_NTW)
        log_p_nW = self.proposals(x_NTf.flatten(0, 1))[0]
        known_n = self.proposals.entropy(target_NTW.clamp(min=1e-9).log()).flatten()
        both_2n = torch.stack([self.proposals.entropy(log_p_nW), known_n])
        return {"entropy_explains": float(torch.corrcoef(both_2n)[0, 1]) ** 2}


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
