"""How fast a run trains, and what share of the hardware's arithmetic that is."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import torch

from sememe.backbone.processes import process_count
from sememe.evaluation.results import Figures
from sememe.models.configuration import AdaptedConfig

if TYPE_CHECKING:
    from sememe.systems import Run

PEAK_TFLOPS = {
    "B200": 2250,
    "GH200": 989,
    "H200": 989,
    "H100 PCIe": 756,
    "H100 NVL": 835,
    "H100": 989,
    "A100": 312,
    "L40S": 362,
    "L4": 121,
    "A10G": 70,
    "A10": 125,
    "RTX 6000 Ada": 364,
    "RTX A6000": 155,
    "RTX 4090": 165,
    "RTX 3090": 71,
}
"""What torch calls a GPU, in part → its peak in bf16 with fp32 sums, dense, by its data sheet. The
first that fits counts."""


def peak_flops(name: str) -> float | None:
    """FLOP/s in bf16 of the GPU that torch calls so; None where we do not know it."""
    return next((1e12 * peak for part, peak in PEAK_TFLOPS.items() if part in name), None)


def training_flops(config: AdaptedConfig, length: float, rate: float | None = None) -> float:
    """FLOPs per token of a training step on texts of `length` tokens, at a realised rate.

    Products with weights, and of attention those with keys that a query may see: of causal
    attention half. A frozen weight counts 2 forward and 2 backward, below the first LoRA 2; LoRA's
    count 6. New modules, a percent or two, and what gradient_checkpointing computes again are left
    out. (Model FLOPs as in PaLM, arXiv 2204.02311, appendix B, where every weight is trained.)"""
    base, (query, keys) = config.text_config, config.attention_widths()
    width, inner = base.hidden_size, base.intermediate_size
    weights = width * (2 * query + 2 * keys + 3 * inner)
    lora = config.lora_rank * (7 * width + 2 * query + 2 * keys + 3 * inner)
    applied, frozen = base.num_hidden_layers * config.layer_share(rate), config.lora_first
    return (
        4 * (applied * weights + width * base.vocab_size)
        - 2 * frozen * weights
        + 6 * (applied - frozen) * lora
        + 12 * query * _keys_seen(config, length, rate)
    )


def _keys_seen(config: AdaptedConfig, length: float, rate: float | None) -> float:
    """Keys that the queries of a token see, on average over a text, as in its middle, summed over
    all layers."""
    if not hasattr(config, "slices"):
        return config.text_config.num_hidden_layers * config.layer_share(rate) * length / 2
    return sum(n * keys * share for n, keys, share in config.slices(length / 2, rate))


class Throughput:
    """Tokens of all processes over the time of the training steps since the last line of the log:
    without what comes between them, as loading data, searching for plans, held-out figures and
    checkpoints."""

    def __init__(self, run: Run, step: int):
        self.run = run
        self.seconds = 0.0
        self.before = step, run.batches.examples.tokens(step)
        """Steps and tokens up to the last line."""

    def begin(self) -> None:
        """A step."""
        self.started = time.perf_counter()

    def end(self) -> None:
        """The guard has read loss and gradients by now: what a GPU may still do is the update."""
        self.seconds += time.perf_counter() - self.started

    def read(self, step: int, rate: float | None, is_bf16: bool) -> Figures:
        """Up to `step`, at its realised rate."""
        first, tokens_before = self.before
        self.before = step, self.run.batches.examples.tokens(step)
        tokens = self.before[1] - tokens_before
        rows = (step - first) * self.run.recipe.batch_size
        seconds, self.seconds = self.seconds, 0.0
        if not (rows and seconds):
            return {}
        speed = tokens / seconds
        figures = {"step_tokens_per_s": round(speed, 1)}
        config = self.run.model.config
        peak = torch.cuda.is_available() and peak_flops(torch.cuda.get_device_name())
        if peak and is_bf16 and hasattr(config, "layer_share"):  # a planner reads plans as well
            flops = speed * training_flops(config, tokens / rows, rate)
            figures["mfu"] = flops / (peak * process_count())
        return figures
