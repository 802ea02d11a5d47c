"""How many rows that write a concept are to wait for each other, and how long.

Middle layers read their weights once for all rows that write at a step. On a processor whose time
goes by the weights that it reads, few rows cost as much as many; where it goes by the rows there is
nothing to win. Which of the two it is, is measured when the engine starts; what waiting would win
is then worked out by playing it through."""

import itertools
import time
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn

from sememe.models.online import OnlineForCausalLM

ROWS = (1, 2, 4, 8, 16, 32)  # that are timed; between them costs are straight lines
LAYERS = 8  # so many are timed in turn, or the weights of one would stay in the processor's cache
REPEATS = 2
STEPS = 200  # that are played through
PATIENCE = (2, 4, 8)  # steps that the row that waits longest may wait
NEARLY = 0.98  # of the best speed
GAIN = 1.03  # below this the played steps are no reason to let a row wait


Hold = tuple[int, int]
"""Rows that write wait until so many do, or the first has waited for so many steps."""
NONE = (1, 0)


@dataclass
class Policy:
    """The best `Hold` for rows of an online model.

    Args:
        split: layers of the three slices.
        layer: seconds that a layer takes for 1, 2, 4 … 32 rows.
        head: the same of the vocabulary's projection."""

    split: tuple[int, int, int]
    layer: list[float]
    head: list[float]
    known: dict[tuple[int, int], Hold] = field(default_factory=dict)

    def __call__(self, rows: int, rate: float) -> Hold:
        """For so many rows that write a concept at a share `rate` of their tokens."""
        key = rows, round(20 * rate)
        if key not in self.known:
            self.known[key] = self._best(rows, key[1] / 20)
        return self.known[key]

    def _best(self, rows: int, rate: float) -> Hold:
        counts = sorted({rows // 4, rows // 2, 3 * rows // 4, rows} - {0, 1})
        holds = [NONE, *itertools.product(counts, PATIENCE)]
        speeds = {hold: self.speed(rows, rate, hold) for hold in holds}
        best = max(speeds.values())
        if best <= GAIN * speeds[NONE]:
            return NONE
        # Of those that are about as good, the one by which a client waits least for a token.
        good = [hold for hold in holds if speeds[hold] >= NEARLY * best]
        return min(good, key=lambda hold: (hold[1], hold[0]))

    def speed(self, rows: int, rate: float, hold: Hold) -> float:
        """Tokens per second of all rows, if each writes at random."""
        rng, waiting, waited = np.random.default_rng(0), 0, 0
        seconds, tokens = 0.0, 0
        shallow, middle, deep = self.split
        for _ in range(STEPS):
            ready = rows - waiting
            writing = int(rng.binomial(ready, rate))
            released = 0
            if waiting + writing >= hold[0] or waited >= hold[1] or writing == ready:
                released, waiting, waited = waiting + writing, 0, 0
            elif waiting + writing:
                waiting, waited = waiting + writing, waited + 1
            ended = ready - writing + released
            seconds += shallow * self._cost(self.layer, ready)
            seconds += middle * self._cost(self.layer, released)
            seconds += deep * self._cost(self.layer, ended) + self._cost(self.head, ended)
            tokens += ended
        return tokens / seconds

    @staticmethod
    def _cost(times: list[float], rows: int) -> float:
        """Of more rows than were timed: as the last two go on."""
        if rows == 0:
            return 0.0
        if rows > ROWS[-1]:
            slope = (times[-1] - times[-2]) / (ROWS[-1] - ROWS[-2])
            return times[-1] + slope * (rows - ROWS[-1])
        return float(np.interp(rows, ROWS, times))


@torch.inference_mode()
def measured_policy(model: OnlineForCausalLM) -> Policy:
    """Times the projections of layers and of the vocabulary for rows of one token."""
    layers = model.spine.decoder.layers[:LAYERS]
    linears = [part for part in layers.modules() if isinstance(part, nn.Linear)]
    head = model.spine.base.get_output_embeddings()
    layer = [seconds / len(layers) for seconds in _times(linears, model.dtype)]
    return Policy(tuple(model.config.split), layer, _times([head], model.dtype))


def _times(linears: list[nn.Linear], dtype: torch.dtype) -> list[float]:
    """The least of several times each, in seconds: others only add to it. `dtype`: what the
    model computes in, and linears of 8 or 4 bits with it."""
    best = dict.fromkeys(ROWS, float("inf"))
    for _ in range(REPEATS):
        for rows in ROWS:
            inputs = [
                part.weight.new_ones(
                    rows, part.in_features, dtype=torch.promote_types(part.weight.dtype, dtype)
                )
                for part in linears
            ]
            _wait(linears[0].weight.device)
            start = time.perf_counter()
            for part, x in zip(linears, inputs, strict=True):
                part(x)
            _wait(linears[0].weight.device)
            best[rows] = min(best[rows], time.perf_counter() - start)
    return [best[rows] for rows in ROWS]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
