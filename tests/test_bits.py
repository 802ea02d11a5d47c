"""A frozen base in 8 or 4 bits: what it computes, how it is trained, saved, loaded and merged."""

import copy
import importlib.util
import json
import sys

import pytest
import torch
import yaml
from torch import nn
from transformers import AutoModelForCausalLM

from conftest import ctrl_c, launch, metrics, run, sememe, tiny_recipe
from families import text
from sememe.backbone.bits import BLOCK, PackedLinear, pack, unpack
from sememe.backbone.exact import narrow
from sememe.errors import Interrupted, RecipeError
from sememe.models.loading import load_model
from test_memory import CLOSE, SYSTEMS, step

HAS_EXTRA = importlib.util.find_spec("bitsandbytes") is not None
needs_extra = pytest.mark.skipif(not HAS_EXTRA, reason="needs the extra bitsandbytes")
both = pytest.mark.parametrize("bits", [8, pytest.param(4, marks=needs_extra)])


@pytest.fixture
def values(recipe_values):
    return recipe_values | {"base_bits": 8, "lora": {"rank": 4}}


def recipe_file(values, folder):
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


# ---- refused, with the extra or without ----


def test_without_the_extra_it_is_one_sentence(values, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    words = ("train", recipe_file(values, tmp_path), "base_bits=4", "--out", tmp_path / "r")
    said = sememe(*words, code=1)
    assert "need the extra bitsandbytes" in said and "pip install 'sememe[bitsandbytes]'" in said
    assert not (tmp_path / "r" / "checkpoints").exists()


def test_other_bits_and_shards_are_refused(values, tmp_path):
    path = recipe_file(values, tmp_path)
    words = ("train", path, "--out", tmp_path / "r")
    for options, said in (
        (("base_bits=16",), "base_bits = 16: "),
        (("--sharded",), "base_bits = 8 with --sharded"),
    ):
        assert said in sememe(*words, *options, code=1)


# ---- what it computes ----


def linear(inside: int, outside: int, bits: int) -> tuple[PackedLinear, torch.Tensor]:
    torch.manual_seed(0)
    packed = nn.Linear(inside, outside)
    weight = packed.weight.detach().clone()
    packed.__class__ = PackedLinear
    packed.pack(bits)
    return packed, weight


@both
@pytest.mark.parametrize("inside, outside", [(256, 128), (96, 24), (37, 64), (4, 16)])
def test_weights_are_near_what_they_were(bits, inside, outside):
    """Half the widest step of a scale's levels at most: those of 8 bits are 1 / 127 apart, the
    outermost ones of NF4 0.304."""
    packed, weight_OI = linear(inside, outside, bits)
    n, size = weight_OI.numel(), {8: inside, 4: BLOCK}[bits]
    numbers_BS = weight_OI.view(-1, size)
    limit_n = numbers_BS.abs().amax(1).repeat_interleave(size) * {8: 1 / 127, 4: 0.304}[bits] / 2
    error_n = (packed.unpacked(torch.float32) - weight_OI).abs().flatten()
    assert (error_n <= 1.001 * limit_n).all() and error_n.max() > 0.1 * limit_n.max()
    assert packed.weight.nbytes == n * bits // 8
    assert packed.scales.nbytes == 4 * len(numbers_BS)


def test_a_row_of_zeros_stays_one():
    packed = nn.Linear(8, 2)
    packed.weight.data[0] = 0
    packed.__class__ = PackedLinear
    packed.pack(8)
    assert torch.equal(packed.unpacked(torch.float32)[0], torch.zeros(8))


@both
@pytest.mark.parametrize("autocast", [False, True])
def test_it_is_the_linear_of_the_weights_it_stands_for(bits, autocast):
    packed, _ = linear(64, 48, bits)
    plain = nn.Linear(64, 48)
    plain.weight = nn.Parameter(packed.unpacked(torch.float32), requires_grad=False)
    plain.bias = packed.bias
    x = torch.randn(3, 5, 64, requires_grad=True)
    outputs, gradients = [], []
    for side in (plain, packed):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            outputs.append(side(x))
        gradients.append(torch.autograd.grad(outputs[-1].float().square().sum(), x)[0])
    assert outputs[0].dtype == outputs[1].dtype
    assert torch.equal(*outputs) and torch.equal(*gradients)


@pytest.mark.parametrize("system", ["control", "online", "slots", "planner", "straight_through"])
@pytest.mark.parametrize("bf16", [False, True])
@both
def test_a_packed_base_trains_as_what_it_stands_for(system, bf16, bits):
    """Also after it was evaluated. Tables, LoRA and vectors stay as they are."""
    packed = SYSTEMS[system]().train()
    pack(packed.backbone, bits)
    plain = copy.deepcopy(packed)
    unpack(plain.backbone)
    kinds = {type(m) for n, m in packed.named_modules() if n.endswith(".base_layer")}
    assert kinds == {PackedLinear}
    if bf16:  # frozen weights of the one are rounded to it, those of the other unpacked into it
        narrow(packed.backbone)
        narrow(plain.backbone)
    step(packed.eval())
    packed.train().zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        (want, _, gradients), (loss, _, found) = map(step, (plain, packed))
    torch.testing.assert_close(loss, want, **CLOSE)
    torch.testing.assert_close(found, gradients, **CLOSE)


# ---- runs ----


@both
@pytest.mark.parametrize("system", ["online", "control", "prune", "compressor"])
def test_a_run_is_saved_and_loaded_in_its_bits(values, tmp_path, bits, system):
    own = {"leave_out": 2} if system == "prune" else {}
    lines = run(values | own | {"base_bits": bits, "system": system}, tmp_path / "r")
    assert lines[-1]["loss"] < lines[0]["loss"]
    packed, _ = load_model(tmp_path / "r")
    layers = packed.backbone.get_decoder().layers
    frozen = [m for n, m in layers.named_modules() if isinstance(m, nn.Linear) and "lora_" not in n]
    assert frozen and all(isinstance(m, PackedLinear) for m in frozen)
    assert {m.weight.dtype for m in frozen} == {{8: torch.int8, 4: torch.uint8}[bits]}
    assert packed.get_input_embeddings().weight.dtype == torch.float32
    assert json.loads((tmp_path / "r/model/config.json").read_text())["base_bits"] == bits
    if system == "compressor":
        return
    # Merged and exported: the same function, of plain weights.
    ids = text(2, 24)
    want = packed(input_ids=ids).logits
    sememe("export", tmp_path / "r", "--out", tmp_path / "whole")
    whole, _ = load_model(tmp_path / "whole")
    assert whole.config.base_bits is None
    assert not any(isinstance(m, PackedLinear) for m in whole.modules())
    torch.testing.assert_close(whole(input_ids=ids).logits, want, atol=1e-3, rtol=1e-3)
    # Over the base as it was published it is another function.
    full = AutoModelForCausalLM.from_pretrained(tmp_path / "r" / "model", base_bits=None)
    assert (full(input_ids=ids).logits - want).abs().max() > 1e-3


def test_resume_is_uninterrupted(values, tmp_path):
    whole = run(values, tmp_path / "whole")
    with ctrl_c(5), pytest.raises(Interrupted, match="stopped at step 5 of 8"):
        run(values, tmp_path / "parts")
    assert [x["loss"] for x in run(values, tmp_path / "parts")] == [x["loss"] for x in whole]
    with pytest.raises(RecipeError, match="with base_bits = 8, not None"):
        run(values | {"base_bits": None}, tmp_path / "parts")


def test_two_processes_train_as_one(values, tmp_path):
    values |= {"batch_size": 4}
    one = run(values, tmp_path / "one")
    process = launch(values, tmp_path / "two", 2)
    said = process.communicate(timeout=240)[0]
    assert process.returncode == 0, said[-3000:]
    two = metrics(tmp_path / "two")
    # As tests/test_processes.py has it: 1e-6 seen there.
    assert [x["loss"] for x in two] == pytest.approx([x["loss"] for x in one], abs=1e-5)


def test_what_uses_a_model_uses_a_packed_one(values, tmp_path):
    run(values, tmp_path / "r")
    folder = tmp_path / "r"
    sememe("evaluate", folder, "--tokens", 512)
    assert json.loads((folder / "evaluate.json").read_text())["tokens"] > 0
    sememe("generate", folder, "--prompt", "the cat", "--max-new-tokens", 4)
    sememe("benchmark", folder, "--prompt-tokens", 32, "--new-tokens", 4, "--repeats", 1)
    model, _ = load_model(folder, dtype=torch.bfloat16)
    assert model(input_ids=text(1, 12)).logits.isfinite().all()


@both
def test_a_plan_counts_fewer_bytes_and_no_fewer_numbers(base_folder, texts, tmp_path, bits):
    path = recipe_file(tiny_recipe(base_folder, texts), tmp_path)
    figures = []
    for options in ((), (f"base_bits={bits}",)):
        sememe("plan", path, *options, "--json", tmp_path / "plan.json")
        figures.append(json.loads((tmp_path / "plan.json").read_text()))
    whole, packed = figures
    assert packed["parameters"] == whole["parameters"]
    assert packed["serving"] == whole["serving"]
    assert packed["memory"]["weights"] < whole["memory"]["weights"]
