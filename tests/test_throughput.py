"""FLOPs of a training step against a count of what torch computes, and the figures of the log."""

from functools import partial
from itertools import count
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from conftest import run
from families import started, text, tiny_base
from sememe.models import ControlForCausalLM, OnlineForCausalLM
from sememe.models.online import NULL
from sememe.training import throughput
from sememe.training.throughput import Throughput, peak_flops, training_flops

WIDE = {"hidden_size": 256, "intermediate_size": 512}


def counted(model, ids_BT: torch.Tensor) -> float:
    """FLOPs per token of a step as torch counts its products."""
    model.train()
    for name, p in model.named_parameters():
        p.requires_grad_("lora_" in name or not name.startswith("backbone."))
    with FlopCounterMode(display=False) as counter:
        model(ids_BT, labels=ids_BT).loss.backward()
    return counter.get_total_flops() / ids_BT.numel()


def over_wide_base(kind, **changes):
    base = tiny_base(attention="eager", **WIDE)
    config = kind.config_class(text_config=base.config, base="tiny", lora_rank=4, **changes)
    config._attn_implementation = "eager"
    return kind(config, base)


def test_flops_of_a_baseline_are_those_that_torch_counts():
    """Eager attention computes all keys, twice those that are seen: as on texts twice as long. The
    gradients below the first LoRA are not computed: 1 to 2 % of these few layers, where a layer
    makes 22 %."""
    for changes in ({}, {"left_out": (1, 2)}, {"window": 8}):
        model = over_wide_base(ControlForCausalLM, **changes)
        expected = training_flops(model.config, 2 * 48)
        assert counted(model, text(2, 48)) == pytest.approx(expected, rel=0.025), changes


@pytest.mark.parametrize("lora_first", [0, 1])
def test_flops_of_an_online_model_follow_the_rate_that_it_realises(lora_first):
    """1 % seen, where 0.2 to 1 makes 40 %. Without a bridge, which is large on so narrow a base:
    new modules are left out."""
    for rate, segment in ((0.2, "deep"), (0.5, "both"), (1.0, "both")):
        changes = {"rate": rate, "segment": segment, "lora_first": lora_first}
        few = {"split": (1, 2, 1), "max_tail": 5, "num_concepts": 4, "bridge": False}
        model = over_wide_base(OnlineForCausalLM, boundary="fixed", **few, **changes)
        started(model, text(16, 48, seed=1))
        realised = float((model(text(2, 48)).concept_ids != NULL).float().mean())
        expected = training_flops(model.config, 2 * 48, realised)
        assert counted(model, text(2, 48)) == pytest.approx(expected, rel=0.02), changes


def test_a_gpu_is_known_by_a_part_of_its_name():
    for name, tflops in (
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA A100-SXM4-40GB", 312),
        ("NVIDIA L40S", 362),
        ("NVIDIA A10G", 70),
        ("NVIDIA GeForce RTX 4090", 165),
    ):
        assert peak_flops(name) == tflops * 1e12
    assert peak_flops("NVIDIA GeForce GTX 1060") is None


def test_a_run_logs_its_throughput_and_on_a_gpu_that_is_known_its_share(
    recipe_values, tmp_path, monkeypatch
):
    """By a clock that moves a quarter of a second whenever it is read: a step of 2 rows of 32
    tokens takes one."""
    clock = SimpleNamespace(perf_counter=partial(next, count(0, 0.25)))
    monkeypatch.setattr(throughput, "time", clock)
    lines = run(recipe_values, tmp_path / "cpu")
    assert {line["step_tokens_per_s"] for line in lines} == {256}
    assert not any("mfu" in line for line in lines)

    read, flops = Throughput.read, []

    def on_a_gpu(self, step, rate, is_bf16):
        flops.append(training_flops(self.run.model.config, 32, rate))
        with monkeypatch.context() as patch:
            patch.setattr(throughput.torch.cuda, "is_available", lambda: True)
            patch.setattr(throughput.torch.cuda, "get_device_name", lambda: "NVIDIA H100 PCIe")
            return read(self, step, rate, True)

    monkeypatch.setattr(Throughput, "read", on_a_gpu)
    for line in run(recipe_values, tmp_path / "gpu"):
        assert line["mfu"] == pytest.approx(256 * flops.pop(0) / 756e12)
