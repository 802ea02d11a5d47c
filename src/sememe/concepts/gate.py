"""Rate control: (B, T) scores → (B, T) write decisions at a wanted concept rate, one causal pass.

Three things hold the number of concepts and the run of NULLs: a threshold read off the tracked
distribution of scores, a small correction by what the row owes so far (so that a text unlike the
training text, or one that the model writes itself, still realises the rate), and a forced concept
after `max_tail` NULLs in a row. Decisions at `t` use scores ≤ `t` only."""

from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from sememe.concepts.boundary import BOUNDARIES

GRID = 129  # points of the tracked score distribution: 0.8 % of probability apart
# Share of a training batch in the tracked quantiles. Scores move while the gate learns: at 0.1 the
# lag halved the realised rate of a fast-learning tiny run (docs/log.md).
MOMENTUM = 0.5
# Threshold shift per concept owed, in half-widths of the score distribution: lets a shift of half a
# standard deviation between texts settle at a debt of one concept.
FEEDBACK = 0.5
# Of a batch at most, over all ranks: a million tell quantiles 0.1 % of probability apart.
SCORES = 2**20


Rate = float | np.ndarray
"""Of all rows, or (B,)."""


class GateState(NamedTuple):
    """What a row must remember between chunks; (B,) arrays on the host. `tail`: tokens since the
    last concept, `sum`: of their scores."""

    tokens: np.ndarray
    concepts: np.ndarray
    tail: np.ndarray
    sum: np.ndarray

    @classmethod
    def start(cls, batch: int) -> "GateState":
        return cls(*np.zeros((3, batch), np.int64), np.zeros(batch))

    @property
    def normal(self) -> np.ndarray:
        """(B,) tokens that wrote no concept."""
        return self.tokens - self.concepts

    @property
    def closed(self) -> np.ndarray:
        """(B,) of them those that a concept has closed."""
        return self.normal - self.tail


def of_all_ranks(x_N: Tensor) -> Tensor:
    """The values of all ranks, each of which may have another number of them. Quantiles are of all
    of them together: the mean of each rank's own is something else."""
    ranks = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    x_N = x_N[:: max(1, -(-len(x_N) * ranks // SCORES))]
    if ranks == 1:
        return x_N
    sizes = x_N.new_zeros(ranks, dtype=torch.long)
    sizes[dist.get_rank()] = len(x_N)
    dist.all_reduce(sizes)
    x_n = F.pad(x_N, (0, int(sizes.max()) - len(x_N)))
    parts = [torch.empty_like(x_n) for _ in range(ranks)]
    dist.all_gather(parts, x_n)
    return torch.cat([part_n[:size] for part_n, size in zip(parts, sizes, strict=True)])


class RateGate(nn.Module):
    """Turns scores into decisions and tracks their distribution, so that one dial `rate` serves
    every setting."""

    def __init__(self, boundary: str, width: int, vocabulary: int):
        super().__init__()
        self.boundary = BOUNDARIES[boundary](width, vocabulary)
        self.feedback = FEEDBACK
        self.register_buffer("quantiles", torch.linspace(-1, 1, GRID))
        self.parts = 1
        """Forward passes of a training step, whose scores are tracked together."""
        self.scores: list[Tensor] = []
        """Of those so far."""

    @torch.no_grad()
    def calibrate(self, score_N: Tensor) -> None:
        """Replaces the tracked quantiles by those of `score_N`."""
        grid = torch.linspace(0, 1, GRID, device=score_N.device)
        self.quantiles.copy_(torch.quantile(score_N.float(), grid))

    @torch.no_grad()
    def track(self, score_N: Tensor) -> None:
        """Folds a training batch of scores, over all its parts and ranks, into the tracked
        quantiles."""
        self.scores.append(score_N)
        if len(self.scores) < self.parts:
            return
        before, score_N = self.quantiles.clone(), of_all_ranks(torch.cat(self.scores))
        self.scores.clear()
        if score_N.numel() > 0:
            self.calibrate(score_N)
            self.quantiles.lerp_(before, 1 - MOMENTUM)

    def threshold(self, rate: Rate) -> tuple[Rate, Rate]:
        """(threshold, gain) in units of the score, for a wanted concept rate, or for that of each
        row."""
        quantiles = self.quantiles.float().cpu().numpy()
        if np.ndim(rate) == 0:
            return self.boundary.threshold(quantiles, float(rate), self.feedback)
        rates, row_B = np.unique(rate, return_inverse=True)
        pairs = [self.boundary.threshold(quantiles, x, self.feedback) for x in rates.tolist()]
        threshold_B, gain_B = np.array(pairs)[row_B].T
        return threshold_B, gain_B

    def forward(
        self, score_BT: Tensor, real_BT: np.ndarray, rate: Rate, max_tail: int, state: GateState
    ) -> tuple[np.ndarray, GateState, Rate]:
        """(B, T) bool decisions, on the host; the state to go on from; and the threshold. The loop
        is sequential in T and costs microseconds a token. `real_BT`: False on padding. `rate`: one
        for all rows or (B,).

        A row that owes concepts (`rate · tokens > concepts`) gets a threshold lower by the gain per
        concept owed. Where scores accumulate, those since the last concept are summed, and what is
        over the threshold is carried on."""
        threshold, gain = self.threshold(rate)
        scores = score_BT.detach().float().cpu().numpy()
        accumulates = self.boundary.accumulates
        tokens, concepts, tail, total = state
        written_BT = np.zeros(real_BT.shape, bool)
        for t, real in enumerate(real_BT.T):
            score = scores[:, t]
            if accumulates:
                score = total = total + np.where(real & (tokens > 0), score, 0.0)
            owed = rate * tokens - concepts
            write = (score > threshold - gain * owed) | (tokens == 0) | (tail >= max_tail)
            write = real & (write | (rate >= 1))
            if accumulates:
                total = np.where(write, np.maximum(total - threshold, 0.0), total)
            written_BT[:, t] = write
            tokens = tokens + real
            concepts = concepts + write
            tail = np.where(write, 0, tail + real)
        return written_BT, GateState(tokens, concepts, tail, total), threshold
