"""Rate control: (B, T) scores → (B, T) write decisions at a wanted concept rate, one causal pass.

Three things hold the number of concepts and the run of NULLs: a threshold read off the tracked
distribution of scores, a small correction by what the row owes so far (so that a text unlike the
training text, or one that the model writes itself, still realises the rate), and a forced concept
after `max_tail` NULLs in a row. Decisions at `t` use scores ≤ `t` only."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from sememe.concepts.boundary import BOUNDARIES

GRID = 129  # points of the tracked score distribution: 0.8 % of probability apart


@dataclass
class GateState:
    """What a row must remember between chunks; (B,) arrays on the host. `sum`: of the scores since
    the last concept."""

    tokens: np.ndarray
    concepts: np.ndarray
    run: np.ndarray
    sum: np.ndarray

    @classmethod
    def start(cls, batch: int) -> "GateState":
        return cls(*(np.zeros(batch, np.int64) for _ in range(3)), np.zeros(batch))

    def select(self, rows: np.ndarray) -> "GateState":
        return GateState(self.tokens[rows], self.concepts[rows], self.run[rows], self.sum[rows])


def decide(
    score_BT: np.ndarray,
    valid_BT: np.ndarray,
    *,
    rate: float,
    max_tail: int,
    threshold: float,
    gain: float,
    state: GateState,
    accumulates: bool = False,
) -> tuple[np.ndarray, GateState]:
    """Which positions write a concept. Host arrays: the loop is sequential in T and costs
    microseconds a token.

    A row that owes concepts (`rate · tokens > concepts`) gets a threshold lower by `gain` per
    concept owed. `accumulates`: the scores since the last concept are summed, and what is over the
    threshold is carried on."""
    tokens, concepts, run, total = (
        state.tokens.copy(),
        state.concepts.copy(),
        state.run.copy(),
        state.sum.copy(),
    )
    written_BT = np.zeros(valid_BT.shape, bool)
    for t in range(valid_BT.shape[1]):
        valid = valid_BT[:, t]
        owed, score = rate * tokens - concepts, score_BT[:, t]
        if accumulates:
            total += np.where(valid & (tokens > 0), score, 0.0)
            score = total
        write = (score > threshold - gain * owed) | (tokens == 0) | (run >= max_tail)
        write = valid & (write | (rate >= 1.0))
        written_BT[:, t] = write
        total = np.where(write, np.maximum(total - threshold, 0.0), total) if accumulates else total
        tokens += valid
        concepts += write
        run = np.where(write, 0, run + valid)
    return written_BT, GateState(tokens, concepts, run, total)


class RateGate(nn.Module):
    """Turns scores into decisions and tracks their distribution, so that one dial `rate` serves
    every setting.

    Args:
        momentum: share of a training batch in the tracked quantiles. Scores move while the gate
            learns: at 0.1 the lag halved the realised rate of a fast-learning tiny run
            (docs/log.md).
        feedback: threshold shift per concept owed, in half-widths of the score distribution. 0.5
            lets a shift of half a standard deviation between texts settle at a debt of one concept.
    """

    def __init__(
        self,
        boundary: str,
        width: int,
        momentum: float = 0.5,
        feedback: float = 0.5,
    ):
        super().__init__()
        self.boundary = BOUNDARIES[boundary](width)
        self.momentum = momentum
        self.feedback = feedback
        self.register_buffer("quantiles", torch.linspace(-1, 1, GRID))

    @torch.no_grad()
    def calibrate(self, score_N: Tensor) -> None:
        """Replaces the tracked quantiles by those of `score_N`."""
        self.quantiles.copy_(
            torch.quantile(
                score_N.detach().float(), torch.linspace(0, 1, GRID, device=score_N.device)
            )
        )

    @torch.no_grad()
    def track(self, score_N: Tensor) -> None:
        """Folds a training batch of scores, over all ranks, into the tracked quantiles."""
        if score_N.numel() == 0:
            score_N = self.quantiles
        grid = torch.linspace(0, 1, GRID, device=score_N.device)
        new = torch.quantile(score_N.detach().float(), grid)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(new)
            new /= torch.distributed.get_world_size()
        self.quantiles.lerp_(new.to(self.quantiles), self.momentum)

    def threshold(self, rate: float) -> tuple[float, float]:
        """(threshold, gain) in units of the score, for a wanted concept rate."""
        quantiles = self.quantiles.float().cpu().numpy()
        return self.boundary.threshold(quantiles, rate, self.feedback)

    def forward(
        self,
        score_BT: Tensor,
        real_BT: np.ndarray,
        *,
        rate: float,
        max_tail: int,
        state: GateState | None = None,
    ) -> tuple[np.ndarray, GateState, float]:
        """(B, T) bool decisions, on the host; the state to go on from; and the threshold.
        `real_BT`: False on padding."""
        threshold, gain = self.threshold(rate)
        written_BT, state = decide(
            score_BT.detach().float().cpu().numpy(),
            real_BT,
            rate=rate,
            max_tail=max_tail,
            threshold=threshold,
            gain=gain,
            state=state or GateState.start(len(score_BT)),
            accumulates=self.boundary.accumulates,
        )
        return written_BT, state, threshold
