"""What a machine can do: GPUs by their data sheets (hardware.toml), this CPU by a measurement."""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F

from sememe.errors import SememeError
from sememe.figures import read_toml
from sememe.scaling.recording import Operation
from sememe.training.throughput import peak_flops

GPUS = read_toml(Path(__file__).with_suffix(".toml"))
MACHINE = 8  # GPUs that share one machine's links


@dataclass(frozen=True)
class Hardware:
    """See hardware.toml. `dispatch`: seconds that an operation takes however small it is."""

    memory: float
    bandwidth: float
    bf16: float
    fp32: float
    link: float = 1e9
    network: float = 1e9
    reached: float = 1.0
    dispatch: float = 0.0

    @classmethod
    def of(cls, name: str) -> "Hardware":
        """By its name. Raises SememeError where there is none."""
        if name == "cpu":
            return calibrated()
        if name not in GPUS:
            raise SememeError(
                f"--gpu {name!r:.40}: need one of {', '.join(GPUS)} or cpu. try: --gpu h100"
            )
        figures = {**GPUS[name]}
        return cls(bf16=peak_flops(figures.pop("torch")), **figures)

    def seconds(self, operations: list[Operation]) -> float:
        """Each takes as long as its products or its memory traffic, whichever is longer."""
        peak = {2: self.bf16, 4: self.fp32}
        return sum(
            max(x.flops / peak.get(x.width, self.fp32), x.bytes / self.bandwidth) + self.dispatch
            for x in operations
        )

    def exchange(self, gpus: int) -> float:
        """Bytes/s of one GPU to the others, by the slowest way among so many."""
        return self.link if gpus <= MACHINE else self.network


def calibrated() -> Hardware:
    """This machine's CPU, by a second of matrix products, copies and small operations."""
    x, w = torch.randn(512, 1024), torch.randn(1024, 1024)
    flops = 2 * 512 * 1024 * 1024
    fp32 = flops / _seconds(lambda: x @ w)
    y, v = x.bfloat16(), w.bfloat16()
    bf16 = flops / _seconds(lambda: y @ v)
    large = torch.zeros(1 << 22)
    bandwidth = 2 * large.nbytes / _seconds(lambda: large * 2)
    small = torch.zeros(8, 8, requires_grad=True)
    operations = 5 * 64  # a product and a scaling each way, and the sum of gradients

    def chain() -> None:
        z = small
        for _ in range(64):
            z = F.linear(z, small) * 0.5
        z.sum().backward()

    dispatch = _seconds(chain) / operations
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Hardware(memory, bandwidth, bf16, fp32, dispatch=dispatch)


def _seconds(job: Callable[[], object], rounds: int = 15) -> float:
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        job()
        times.append(time.perf_counter() - start)
    return median(times[rounds // 3 :])
