"""Rate control: (B, T) scores → (B, T) write decisions at a wanted concept rate, one causal pass.

Three things hold the number of concepts and the run of NULLs: a threshold read off the tracked
distribution of scores, a small correction by what the row owes so far (so that a text unlike the
training text, or one that the model writes itself, still realises the rate), and a forced concept
after `max_tail` NULLs in a row. Decisions at `t` use scores ≤ `t` only."""

from itertools import repeat
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
# Tokens of a block, and those before it that its guess is made from: fastest of five pairs at 64
# rows of 4,096 (docs/log.md).
BLOCK = 96
WARM = 24

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
        """(B, T) bool decisions, on the host; the state to go on from; and the threshold.
        `real_BT`: False on padding. `rate`: one for all rows or (B,).

        A row that owes concepts (`rate · tokens > concepts`) gets a threshold lower by the gain per
        concept owed. Where scores accumulate, those since the last concept are summed, and what is
        over the threshold is carried on.

        Blocks of a text are decided beside each other, each from a guess of how many concepts came
        before it, and once more where the block before it ended otherwise. From different counts
        the debt pulls decisions onto one path within some tokens, so that two or three rounds do;
        and since the first block that is not right yet becomes so in each round, the decisions are
        those of a loop over all tokens. What is carried on never forgets: there it is that loop."""
        threshold, gain = self.threshold(rate)
        scores = score_BT.detach().float().cpu().numpy()
        # Where every token writes, no tail is short enough; a text's first token comes as if the
        # longest tail were before it.
        rule = rate, threshold, gain, np.where(np.asarray(rate) >= 1, -1, max_tail)
        tail = np.where(state.tokens > 0, state.tail, max_tail)
        begin = np.stack([state.tokens, state.concepts, tail]).astype(float)
        blocks = 1 if self.boundary.accumulates else max(1, real_BT.shape[1] // BLOCK)
        if blocks > 1:
            written_BT, end = self._blocks(scores, real_BT, rule, begin, blocks)
            total = state.sum
        else:
            written_tn, end, total = self._loop(scores.T, real_BT.T, rule, begin, state.sum)
            written_BT = written_tn.T
        tokens, concepts, tail = end.astype(int)
        return written_BT, GateState(tokens, concepts, tail * (tokens > 0), total), threshold

    def _blocks(
        self, scores: np.ndarray, real_BT: np.ndarray, rule: tuple, begin: np.ndarray, blocks: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """`_loop` over the blocks of all texts beside each other."""
        batch, length = real_BT.shape
        size = -(-length // blocks)
        if fill := blocks * size - length:
            scores, real_BT = (np.pad(x, ((0, 0), (0, fill))) for x in (scores, real_BT))
        # Tokens first, so that one of all blocks is one piece; the blocks of a text are in a row.
        score_tn, real_tn = (np.ascontiguousarray(x.reshape(-1, size).T) for x in (scores, real_BT))
        rule = [np.repeat(x, blocks) if np.ndim(x) else x for x in rule]
        # What comes before a block is guessed from its last tokens alone: as if as many concepts as
        # are wanted came before those, the last just there.
        ends_n = begin[0].repeat(blocks) + real_tn.sum(0).reshape(batch, blocks).cumsum(1).ravel()
        last = score_tn[-WARM:], real_tn[-WARM:]
        count_n = ends_n - last[1].sum(0)
        guess = np.stack([count_n, np.ceil(rule[0] * count_n), 0 * count_n])
        first = np.arange(batch * blocks) % blocks == 0
        begin, begin_B = np.roll(self._loop(*last, rule, guess)[1], 1, 1), begin
        begin[:, first] = begin_B
        written_tn, end, _ = self._loop(score_tn, real_tn, rule, begin)
        inner = np.flatnonzero(~first)
        while (n := inner[(begin[:, inner] != end[:, inner - 1]).any(0)]).size:
            begin[:, inner] = end[:, inner - 1]
            of_n = [x[n] if np.ndim(x) else x for x in rule]
            part = score_tn.take(n, 1), real_tn.take(n, 1), of_n, begin[:, n]
            written_tn[:, n], end[:, n], _ = self._loop(*part)
        return written_tn.T.reshape(batch, -1)[:, :length], end[:, blocks - 1 :: blocks]

    def _loop(
        self,
        score_tn: np.ndarray,
        real_tn: np.ndarray,
        rule: tuple,
        begin: np.ndarray,
        total: np.ndarray | None = None,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """Token by token: (t, n) decisions, and (3, n) tokens, concepts and tail at the end, as at
        the beginning; and what was summed of scores."""
        rate, threshold, gain, longest = rule
        tokens, concepts, tail = begin.copy()
        accumulates = self.boundary.accumulates
        written_tn, level = np.empty(real_tn.shape, bool), np.empty(real_tn.shape[1])
        # Without padding no array has to be read to know it.
        real_tn = repeat(True, len(real_tn)) if real_tn.all() else real_tn
        for score, real, write in zip(score_tn, real_tn, written_tn, strict=True):
            if accumulates:  # not that of the sink
                score = total = total + np.where(real & (tokens > 0), score, 0.0)
            level = np.multiply(rate, tokens, out=level)  # in place: three allocations less
            level -= concepts
            level *= gain
            np.greater(score, np.subtract(threshold, level, out=level), out=write)
            tokens += real
            tail += real
            write |= tail > longest
            write &= real
            if accumulates:
                total = np.where(write, np.maximum(total - threshold, 0.0), total)
            one = write.astype(float)  # faster than what a mask selects
            concepts += one
            tail -= tail * one
        return written_tn, np.stack([tokens, concepts, tail]), total
