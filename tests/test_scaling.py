"""`sememe plan`: what is recorded on fake tensors against what real models do and hold."""

import json

import pytest
import torch
import yaml
from torch.utils.flop_counter import FlopCounterMode

from conftest import sememe, tiny_recipe
from families import tiny_online
from sememe.backbone.bases import read_config
from sememe.backbone.calling import CACHE
from sememe.models.control import ControlForCausalLM
from sememe.options import check_recipe
from sememe.scaling import estimate as scaling
from sememe.scaling.estimate import parameters
from sememe.scaling.hardware import Hardware
from sememe.scaling.recording import record
from sememe.scaling.steps import online_loss, plain_loss
from sememe.systems import SYSTEMS

HARDWARE = Hardware.of("h100")


def real_flops(model, ids_BT) -> int:
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids_BT, labels=ids_BT, use_cache=False).loss.backward()
    return counter.get_total_flops()


def rebuilt(model):
    """The same on the meta device."""
    return lambda: type(model)(model.config)


@pytest.mark.parametrize("segment", ["none", "deep", "both"])
def test_a_recorded_step_is_the_step_that_an_online_model_takes(segment):
    model = tiny_online(boundary="fixed", rate=0.25, segment=segment).train()
    ids_BT = torch.randint(3, 90, (2, 64))
    recorder = record(rebuilt(model), online_loss, ids_BT.shape, bf16=False)
    recorded = sum(x.flops for x in recorder.operations)
    # The sink is one concept of 16 that has no code.
    assert recorded == pytest.approx(real_flops(model, ids_BT), rel=0.03)


def test_a_recorded_step_of_the_control_is_its_step(base_folder):
    model = tiny_online()
    config = ControlForCausalLM.config_class(base="tiny", text_config=model.config.text_config)
    control, ids_BT = ControlForCausalLM(config).train(), torch.randint(3, 90, (2, 32))
    recorder = record(rebuilt(control), plain_loss, ids_BT.shape, bf16=False)
    assert sum(x.flops for x in recorder.operations) == real_flops(control, ids_BT)
    half = record(rebuilt(control), plain_loss, ids_BT.shape, bf16=True)
    assert HARDWARE.seconds(half.operations) < HARDWARE.seconds(recorder.operations)


class Head(torch.nn.Linear):
    """(B, T) → the loss of logits of random states, which want no gradient."""

    def __init__(self):
        super().__init__(64, 5000, bias=False)

    def loss(self, ids_BT):
        x_BTD = torch.zeros(*ids_BT.shape, 64, requires_grad=True)
        logits_nV = self(x_BTD).flatten(0, 1)
        return torch.nn.functional.cross_entropy(logits_nV, ids_BT.flatten())


def test_the_peak_is_what_lives_at_the_worst_moment():
    """The log-softmax, and two gradients of it, beside the weights: the first logits are gone."""
    logits, weights, states = 4 * 128 * 5000, 4 * 64 * 5000, 4 * 128 * 64
    peak = record(Head, Head.loss, (2, 64), bf16=False).peak
    assert peak == pytest.approx(weights + 3 * logits + states, rel=0.01)


@pytest.mark.parametrize("changes", [{}, {"segment": "deep"}, {"shallow_window": 8}])
def test_slices_have_the_keys_of_the_cache(changes):
    model = tiny_online(boundary="fixed", rate=0.25, **changes)
    ids_BT = torch.randint(3, 90, (1, 64))
    with torch.no_grad():
        cache = model(input_ids=ids_BT, use_cache=True)[CACHE]
    layers, expected, _ = zip(*model.config.slices(64), strict=True)
    assert [part.used() for part in cache.slices] == [*expected]
    base = model.config.text_config
    key = 2 * base.num_key_value_heads * base.hidden_size // base.num_attention_heads
    # The last slot takes what is not kept.
    held = sum(n * (part.capacity + 1) for n, part in zip(layers, cache.slices, strict=True))
    assert cache.bytes() == 4 * key * held


@pytest.fixture
def recipe(base_folder, texts, tmp_path):
    path = tmp_path / "recipe.yaml"
    values = tiny_recipe(base_folder, texts)
    path.write_text(yaml.safe_dump(values))
    return path


def test_the_command_writes_what_a_run_takes(recipe, tmp_path):
    figures = []
    for gpus, batch in ((1, 8), (8, 8), (8, 64)):
        words = (
            f"batch_size={batch}",
            "--gpus",
            gpus,
            "--hourly",
            2,
            "--json",
            tmp_path / "p.json",
        )
        assert "gpu_hours" in sememe("plan", recipe, *words)
        figures.append(json.loads((tmp_path / "p.json").read_text()))
    one, eight, large = figures
    assert one["parameters"] == eight["parameters"] and one["parameters"]["new"] > 0
    assert one["step"]["flops"] == pytest.approx(8 * eight["step"]["flops"], rel=0.02)
    assert one["memory"]["peak"] > eight["memory"]["peak"] > eight["memory"]["peak_sharded"]
    assert one["step"]["seconds_reducing"] == 0 < eight["step"]["seconds_reducing"]
    assert one["step"]["seconds_at_best"] <= one["step"]["seconds"]
    assert large["training"]["tokens_per_s"] > one["training"]["tokens_per_s"]
    assert large["training"]["cost"] == pytest.approx(2 * large["training"]["gpu_hours"])
    assert one["serving"]["own_rows"] > one["serving"]["base_rows"] > 0


def test_parameters_are_those_of_the_real_model(base_folder, texts):
    loaded = check_recipe(tiny_recipe(base_folder, texts), "test")
    real = SYSTEMS["online"].build(loaded, base_folder)
    with torch.device("meta"):
        planned = scaling.build(loaded, read_config(base_folder).get_text_config())
    assert parameters(planned) == parameters(real)
    assert sum(parameters(real).values()) == sum(p.numel() for p in real.parameters())


def test_what_cannot_be_planned_is_one_sentence(recipe, tmp_path):
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "config.json").write_text('{"model_type": "nothing"}')
    (tmp_path / "empty").mkdir()
    for words, said in (
        (("--gpu", "h900"), "need one of h100"),
        (("system=prune", "leave_out=1"), "need one of online"),
        (("batch_size=4", "--gpus", 3), "does not divide"),
        ((f"base={tmp_path / 'odd'}",), "need intact files of a decoder"),
        ((f"base={tmp_path / 'empty'}",), "has no config.json"),
    ):
        assert said in sememe("plan", recipe, *words, code=1)


def test_of_a_base_its_configuration_is_enough(recipe, base_folder, tmp_path):
    folder = tmp_path / "bare"
    folder.mkdir()
    (folder / "config.json").write_bytes((base_folder / "config.json").read_bytes())
    figures = []
    for base in (base_folder, folder):
        sememe("plan", recipe, f"base={base}", "--json", tmp_path / "p.json")
        figures.append(json.loads((tmp_path / "p.json").read_text()))
    assert figures[0]["parameters"] == figures[1]["parameters"]
    assert "no *.safetensors" in sememe("train", recipe, f"base={folder}", code=1)


def test_a_window_serves_from_its_own_cache(recipe, tmp_path):
    """Of all layers, for as many tokens as it sees and the first one."""
    words = ("system=window", "shallow_window=20", "--context", 64)
    sememe("plan", recipe, *words, "--json", tmp_path / "p.json")
    serving = json.loads((tmp_path / "p.json").read_text())["serving"]
    assert serving["own_cache_per_row"] / serving["base_cache_per_row"] == 21 / 64
