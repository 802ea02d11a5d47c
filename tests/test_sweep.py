"""Sweeps: the grid, shared baselines, what is not done twice, and what goes on after a fault or
Ctrl-C."""

import json
import os
from pathlib import Path

import pytest
import yaml

from conftest import ctrl_c, metrics, sememe, tiny_recipe
from sememe import sweep as sweeps
from sememe import terminal
from sememe.errors import Interrupted, RecipeError, TrainingError
from sememe.keys import known_keys
from sememe.sweep import parse_grid, plan, summarise, sweep
from sememe.systems import SYSTEMS

SHORT = {"steps": 4, "save_every": 2, "quantise": [0.3, 0.6]}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, base_folder, texts) -> Path:
    path = tmp_path_factory.mktemp("sweep") / "tiny.yaml"
    path.write_text(yaml.safe_dump(tiny_recipe(base_folder, texts) | SHORT))
    return path


@pytest.fixture(scope="module")
def done(recipe):
    """A finished sweep over two rates with its baselines: (folder, what was returned)."""
    out = recipe.with_name("runs")
    return out, go(recipe, ["rate=0.5,0.25"], out, control=True)


def go(recipe, words, out, **more):
    return sweep(recipe, words, out, say=lambda line: None, show=False, **{"tokens": 256} | more)


def read(path: Path) -> dict:
    return json.loads(path.read_text())


def stamps(out: Path, name: str) -> dict[str, int]:
    return {path.parent.name: path.stat().st_mtime_ns for path in out.glob(f"*/{name}")}


def names(entries: list[dict]) -> list[str]:
    return [entry["name"] for entry in entries]


UNREADABLE = ("rate", "rate=0.5,", "=1", "rate=0.5 rate=0.25")
REFUSED = dict.fromkeys(UNREADABLE, r"need key=value .* each key once.*try: rate=0.5,0.25")
REFUSED["rat=0.5,0.25"] = "unknown key 'rat'"


@pytest.mark.parametrize("words", REFUSED)
def test_a_grid_that_cannot_be_read_stops_before_anything_is_written(recipe, tmp_path, words):
    with pytest.raises(RecipeError, match=REFUSED[words]):
        go(recipe, words.split(), tmp_path / "runs")
    assert not (tmp_path / "runs").exists()
    (tmp_path / "recipe.yaml").touch()
    with pytest.raises(RecipeError, match="is a run: need a folder for several"):
        go(recipe, ["rate=0.5"], tmp_path)


WINDOWS = "window_rate-0.5 window_rate-0.25"
PRUNED = "prune_leave_out-1 prune_leave_out-2"
"""At rate 0.5 one of the four layers is saved; at 0.25 1.5 layers, so 1 and 2 stand beside."""


PLANS = (
    ("steps=4", False, "online"),
    ("rate=0.5,0.25 steps=4", False, "rate-0.5 rate-0.25"),
    ("quantise=[0.1,0.2],[0.3,0.6]", False, "quantise-0.1-0.2 quantise-0.3-0.6"),
    ("rate=0.5 seed=0,1", False, "online_seed-0 online_seed-1"),
    ("rate=0.5,0.25 boundary=null,fixed", True, f"control {PRUNED} {WINDOWS}"),
    ("shallow_window=4,8", True, "control prune_leave_out-1 window_shallow_window-4"),
    ("split=[1,2,1],[1,1,2] rate=0.5", True, "control prune_leave_out-1 window_split-1-2-1"),
    ("lora.rank=4,8 rate=0.5", True, "control_lora.rank-4 control_lora.rank-8 prune_lora.rank-4"),
    ("seed=0,1", True, "control_seed-0 control_seed-1 prune_leave_out-1_seed-0"),
    ("system=online,prune leave_out=1,[1,2]", False, f"{PRUNED[:-1]}1-2 online"),
    ("system=online,control rate=0.5,0.25", True, f"control {PRUNED} {WINDOWS} rate-0.5"),
)


@pytest.mark.parametrize("words, control, want", PLANS)
def test_names_are_readable_and_a_baseline_is_trained_once_for_what_it_reads(
    recipe, words, control, want
):
    grid = parse_grid(words.split())
    varied = [key for key in grid if len(grid[key]) > 1]
    runs = names(entry for entry, _ in plan(recipe, grid, varied, control))
    assert " ".join(runs).startswith(want) and len(runs) == len(set(runs))
    assert control or " ".join(runs) == want


READ = """system base data.train data.heldout steps sequence_length batch_size lora.alpha lora.rank
lora.dropout gradient_accumulation learning_rate precision gradient_checkpointing seed"""
ALSO = {"control": "", "prune": "leave_out concept_learning_rate calibration_tokens"}
ALSO |= {"skip": "split bridge concept_learning_rate calibration_tokens"}
ALSO |= {"window": "split rate max_tail segment shallow_window"}


@pytest.mark.parametrize("system", ALSO)
def test_no_key_that_a_baseline_reads_is_taken_from_it(system):
    """That would make the comparison unequal without a word."""
    read, unread = {*READ.split(), *ALSO[system].split()}, SYSTEMS[system].unread
    assert read | unread <= set(known_keys()) and not read & unread


def test_sweep_trains_measures_and_compares(done):
    out, found = done
    assert read(out / "sweep.json") == found
    runs = {run["name"]: run for run in found["runs"]}
    models = "rate-0.5 rate-0.25"
    assert list(runs) == f"control {PRUNED} {WINDOWS} {models}".split()
    assert [run["control"] for run in runs.values()] == [None, *["control"] * 6]
    assert all(run["fault"] is None for run in runs.values())
    figures = {name: run["figures"] for name, run in runs.items()}
    for name, each in figures.items():
        kept = read(out / name / "evaluate.json")
        assert all(kept[key] == value for key, value in each.items() if value is not None)
        if name != "control":
            difference = kept["nll"] - figures["control"]["nll"]
            assert kept["delta_nll_control"] == pytest.approx(difference, abs=1e-5)
    # Of four layers a token takes part in so many, and concepts in the others; keys and values,
    # 2 / 15 of a layer, are made of tails in two, and the bridge is 6 matrices of that size, the
    # map of a gap 3. Of a block of 32, 6 normal tokens are cached.
    tails = {
        "layer_share": lambda rate: (4 + 6 * 2) / 15 * (1 - rate),
        "cache_share": lambda rate: 3 * 6 / 32,
    }
    for key, window, layers in (("layer_share", 1, 2), ("cache_share", 0.75, 1)):
        share = {name: each[key] for name, each in figures.items()}
        baselines = [share[name] for name in ("control", *PRUNED.split(), "window_rate-0.5")]
        maps = 3 * 2 / 15 / 4 * (key == "layer_share")  # of two layers apart two are left out
        assert baselines == pytest.approx([1.0, 0.75 + maps, 0.5 + 2 * maps, window])
        for name in models.split():
            rate = figures[name]["concept_rate"]
            want = layers + (4 - layers) * rate + tails[key](rate)
            assert share[name] == pytest.approx(want / 4)
    assert len({figures[name]["nll"] for name in ("control", *WINDOWS.split())}) == 3
    assert figures["rate-0.5"]["concept_rate"] != 0.5, "the share follows the realised rate"


def test_what_is_finished_is_read_under_any_name(recipe, done):
    out, found = done
    models, measured = stamps(out, "model/model.safetensors"), stamps(out, "evaluate.json")
    assert go(recipe, ["rate=0.5,0.25"], out, control=True) == found
    assert stamps(out, "evaluate.json") == measured
    again = go(recipe, ["rate=0.25,0.5", "head=nearest"], out, tokens=128)
    assert names(again["runs"]) == ["rate-0.25", "rate-0.5"]
    assert {run["control"] for run in again["runs"]} == {"control"}, "that of an earlier sweep"
    assert stamps(out, "evaluate.json")["rate-0.5"] > measured["rate-0.5"]
    assert names(go(recipe, ["max_tail=6", "rate=0.5"], out)["runs"]) == ["rate-0.5"]
    assert stamps(out, "model/model.safetensors") == models, "nothing is trained again"
    late = stamps(out, "evaluate.json")["rate-0.5"]
    os.utime(out / "rate-0.5" / "model" / "model.safetensors", ns=(late + 1000, late + 1000))
    go(recipe, ["rate=0.5"], out)
    assert stamps(out, "evaluate.json")["rate-0.5"] > late, "figures of older weights"


def test_a_failing_point_is_reported_and_the_rest_goes_on(recipe, tmp_path, monkeypatch):
    real = sweeps.train

    def train(asked, run, *args):
        if asked.rate == 0.4:
            raise TrainingError("the loss is nan at step 1: need a finite one. try: rate=0.5")
        if asked.rate == 0.3:
            raise RuntimeError("out of memory\nand more")
        return real(asked, run, *args)

    monkeypatch.setattr(sweeps, "train", train)
    words = ("--out", tmp_path / "runs", "--tokens", 256, "--json", tmp_path / "s.json")
    message = sememe("sweep", recipe, "rate=0.4,0.5,0.01,0.3", *words, code=1)
    assert message.startswith("3 of 4 runs failed, the first is rate-0.4: the loss is nan")
    assert "\n" not in message
    found = read(tmp_path / "s.json")
    assert found == read(tmp_path / "runs" / "sweep.json")
    faults = {run["name"]: run["fault"] for run in found["runs"]}
    assert faults["rate-0.5"] is None and faults["rate-0.3"] == "RuntimeError: out of memory"
    assert "max_tail = 6 forces a concept more often" in faults["rate-0.01"]
    assert names(found["points"]) == ["rate-0.5"]


def test_ctrl_c_and_the_same_command_goes_on(recipe, tmp_path):
    out, words = tmp_path / "runs", ["rate=0.5,0.25"]
    with ctrl_c(4 + 3), pytest.raises(Interrupted, match="at step 3 of 4; the same command"):
        go(recipe, words, out)
    assert names(read(out / "sweep.json")["runs"]) == ["rate-0.5"]
    assert not (out / "rate-0.25" / "model").exists()
    assert names(go(recipe, words, out)["points"]) == ["rate-0.5", "rate-0.25"]
    steps = [line["step"] for line in metrics(out / "rate-0.25")]
    assert steps == [1, 2, 3, 4], "the second run went on from its third step"


def test_seeds_become_one_point_with_a_spread(recipe, tmp_path):
    words = ("rate=0.5", "seed=0,1", "--out", tmp_path / "runs", "--tokens", 256)
    assert "±" in sememe("sweep", recipe, *words)
    found = read(tmp_path / "runs" / "sweep.json")
    assert names(found["runs"]) == ["online_seed-0", "online_seed-1"]
    (point,), (one, two) = found["points"], [run["figures"] for run in found["runs"]]
    assert one["nll"] != two["nll"]
    assert point["mean"]["nll"] == pytest.approx((one["nll"] + two["nll"]) / 2)
    assert point["spread"]["nll"] == pytest.approx(abs(one["nll"] - two["nll"]) / 2**0.5)
    assert point["spread"]["delta_nll_control"] is None
    one["delta_nll_zero"] = None
    (mended,) = summarise(found["runs"])
    assert mended["mean"]["delta_nll_zero"] == two["delta_nll_zero"], "over the seeds that have it"


def test_the_command_prints_a_table_and_names_its_files(recipe, done, monkeypatch):
    out, _ = done
    monkeypatch.setattr(terminal.out, "width", 160)  # or titles of two words are broken
    printed = sememe("sweep", recipe, "rate=0.5,0.25", "--control", "--out", out, "--tokens", 256)
    for word in (
        "control",
        "prune",
        "rate-0.5",
        "cache",
        "Δ control",
        "layers",
        "sweep.json",
        "sweep.html",
    ):
        assert word in printed, word
    page = (out / "sweep.html").read_text()
    assert page.count("data:image/svg") == 2, "two points and a control are enough to draw"
    sememe("report", out / "rate-0.5", out, "--json", out.parent / "page.json")
    assert read(out.parent / "page.json") == {"report": str(out / "rate-0.5" / "report.html")}
    assert "Quality against compute" in (out / "rate-0.5" / "report.html").read_text()
