"""Sweeps: the grid, shared baselines, what is not done twice, and what goes on after a fault or
Ctrl-C."""

import json
from operator import attrgetter
from pathlib import Path

import pytest
import yaml

from conftest import ctrl_c, metrics, sememe, tiny_recipe
from sememe import sweep as sweeps
from sememe import terminal
from sememe.errors import Interrupted, RecipeError, TrainingError
from sememe.keys import known_keys
from sememe.options import check_recipe
from sememe.sweep import baseline, parse_grid, plan, summarise, sweep
from sememe.systems import SYSTEMS

SHORT = {"steps": 4, "save_every": 2, "quantise": [0.3, 0.6]}


@pytest.fixture
def recipe(recipe_values, tmp_path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(recipe_values | SHORT))
    return path


@pytest.fixture(scope="module")
def done(tmp_path_factory, base_folder, texts):
    """A finished sweep over two rates with its baselines: (recipe, folder, what was returned)."""
    folder = tmp_path_factory.mktemp("sweep")
    (folder / "tiny.yaml").write_text(yaml.safe_dump(tiny_recipe(base_folder, texts) | SHORT))
    return (
        folder / "tiny.yaml",
        folder / "runs",
        go(folder / "tiny.yaml", ["rate=0.5,0.25"], folder / "runs", control=True),
    )


def go(recipe, words, out, **more):
    return sweep(recipe, words, out, say=lambda line: None, show=False, **{"tokens": 256} | more)


def read(path: Path) -> dict:
    return json.loads(path.read_text())


def stamps(out: Path, name: str) -> dict[str, int]:
    return {path.parent.name: path.stat().st_mtime_ns for path in out.glob(f"*/{name}")}


@pytest.mark.parametrize("words", [["rate"], ["rate=0.5,"], ["=1"], ["rate=0.5", "rate=0.25"]])
def test_a_grid_that_cannot_be_read(words):
    with pytest.raises(RecipeError, match=r"need key=value .* each key once.*try: rate=0.5,0.25"):
        parse_grid(words)


def names(recipe, words, control=False):
    grid = parse_grid(words)
    varied = [key for key in grid if len(grid[key]) > 1]
    return [entry["name"] for entry, _ in plan(recipe, grid, varied, control)]


WINDOWS = "window_rate-0.5 window_rate-0.25"


@pytest.mark.parametrize(
    "words, control, want",
    [
        ("steps=4", False, "online"),
        ("rate=0.5,0.25 steps=4", False, "rate-0.5 rate-0.25"),
        ("quantise=[0.1,0.2],[0.3,0.6]", False, "quantise-0.1-0.2 quantise-0.3-0.6"),
        ("rate=0.5 seed=0,1", False, "online_seed-0 online_seed-1"),
        ("rate=0.5,0.25 boundary=null,fixed", True, f"control skip {WINDOWS}"),
        ("shallow_window=4,8", True, "control skip window_shallow_window-4"),
        ("split=[1,2,1],[1,1,2]", True, "control skip_split-1-2-1 skip_split-1-1-2"),
        ("lora.rank=4,8 rate=0.5,0.25", True, "control_lora.rank-4 control_lora.rank-8 skip_lora"),
        ("seed=0,1", True, "control_seed-0 control_seed-1 skip_seed-0 skip_seed-1 window_seed-0"),
        ("system=online,control rate=0.5,0.25", True, f"control skip {WINDOWS} rate-0.5"),
    ],
)
def test_names_are_readable_and_a_baseline_is_trained_once_for_what_it_reads(
    recipe, words, control, want
):
    runs = names(recipe, words.split(), control)
    assert " ".join(runs).startswith(want) and len(runs) == len(set(runs))
    assert control or " ".join(runs) == want


SHARED = """system base data.train data.heldout steps sequence_length batch_size lora.alpha
lora.rank lora.dropout gradient_accumulation learning_rate precision gradient_checkpointing seed"""


@pytest.mark.parametrize(
    "system, own",
    [
        ("control", ""),
        ("skip", "split bridge concept_learning_rate calibration_tokens"),
        ("window", "split rate shallow_window"),
    ],
)
def test_no_key_that_a_baseline_reads_is_taken_from_it(recipe_values, system, own):
    """That would make the comparison unequal without a word."""
    read = {*SHARED.split(), *own.split()}
    assert set(known_keys()) >= SYSTEMS[system].unread, "no key that recipes lack"
    assert not read & SYSTEMS[system].unread
    values = recipe_values | {"seed": 3, "rate": 0.5, "split": [1, 1, 2]}
    point = check_recipe(values | {"max_tail": 5}, "test")
    base = baseline(point, system)
    assert [key for key in read if attrgetter(key)(point) != attrgetter(key)(base)] == ["system"]
    assert base.max_tail == 16


def test_sweep_trains_measures_and_compares(done):
    _, out, found = done
    assert read(out / "sweep.json") == found
    runs = {run["name"]: run for run in found["runs"]}
    assert list(runs) == ["control", "skip", *WINDOWS.split(), "rate-0.5", "rate-0.25"]
    assert [run["control"] for run in runs.values()] == [None, *["control"] * 5]
    assert all(run["fault"] is None for run in runs.values())
    figures = {name: run["figures"] for name, run in runs.items()}
    for name in figures:
        kept = read(out / name / "evaluate.json")
        assert all(kept[key] == value for key, value in figures[name].items() if value is not None)
        if name != "control":
            difference = kept["nll"] - figures["control"]["nll"]
            assert kept["delta_nll_control"] == pytest.approx(difference, abs=1e-5)
    share = {name: each["layer_share"] for name, each in figures.items()}
    assert (share["control"], share["skip"], share["window_rate-0.5"]) == (1.0, 0.5, 1.0)
    assert len({figures[name]["nll"] for name in ("control", *WINDOWS.split())}) == 3
    for name in ("rate-0.5", "rate-0.25"):
        assert share[name] == pytest.approx((2 + 2 * figures[name]["concept_rate"]) / 4)
    assert figures["rate-0.25"]["concept_rate"] != 0.25, "the share follows the realised rate"


def test_what_is_finished_is_read_under_any_name(done):
    recipe, out, found = done
    models, measured = stamps(out, "model/model.safetensors"), stamps(out, "evaluate.json")
    assert go(recipe, ["rate=0.5,0.25"], out, control=True) == found
    assert stamps(out, "evaluate.json") == measured
    again = go(recipe, ["rate=0.25,0.5", "head=nearest"], out, tokens=128)
    assert [run["name"] for run in again["runs"]] == ["rate-0.25", "rate-0.5"]
    assert [run["control"] for run in again["runs"]] == ["control", "control"], (
        "a control of an earlier sweep counts"
    )
    assert stamps(out, "evaluate.json")["rate-0.5"] > measured["rate-0.5"]
    again = go(recipe, ["max_tail=6", "rate=0.5", "boundary=null"], out)
    assert [run["name"] for run in again["runs"]] == ["rate-0.5"]
    assert stamps(out, "model/model.safetensors") == models, "nothing is trained again"
    go(recipe, ["rate=0.5,0.25"], out, control=True)


def test_a_failing_point_is_reported_and_the_rest_goes_on(recipe, tmp_path, monkeypatch):
    real = sweeps.train

    def train(asked, run, *args):
        if asked.rate == 0.4:
            raise TrainingError("the loss is nan at step 1: need a finite one. try: rate=0.5")
        if asked.rate == 0.3:
            raise RuntimeError("out of memory\nand more")
        return real(asked, run, *args)

    monkeypatch.setattr(sweeps, "train", train)
    words = ["--tokens", 256, "--json", tmp_path / "s.json"]
    grid = "rate=0.4,0.5,0.01,0.3"
    message = sememe("sweep", recipe, grid, "--out", tmp_path / "runs", *words, code=1)
    assert message.startswith("3 of 4 runs failed, the first is rate-0.4: the loss is nan")
    assert "\n" not in message
    found = read(tmp_path / "s.json")
    assert found == read(tmp_path / "runs" / "sweep.json")
    faults = {run["name"]: run["fault"] for run in found["runs"]}
    assert faults["rate-0.5"] is None and faults["rate-0.3"] == "RuntimeError: out of memory"
    assert "max_tail = 6 forces a concept more often" in faults["rate-0.01"]
    assert [point["name"] for point in found["points"]] == ["rate-0.5"]


def test_what_is_no_sweep_stops_before_anything_is_written(recipe, tmp_path):
    with pytest.raises(RecipeError, match="unknown key 'rat'"):
        go(recipe, ["rat=0.5,0.25"], tmp_path / "runs")
    assert not (tmp_path / "runs").exists()
    (tmp_path / "recipe.yaml").touch()
    with pytest.raises(RecipeError, match="is a run: need a folder for several"):
        go(recipe, ["rate=0.5"], tmp_path)


def test_ctrl_c_and_the_same_command_goes_on(recipe, tmp_path):
    with (
        ctrl_c(4 + 3),
        pytest.raises(Interrupted, match="stopped at step 3 of 4; the same command"),
    ):
        go(recipe, ["rate=0.5,0.25"], tmp_path / "runs")
    assert [run["name"] for run in read(tmp_path / "runs" / "sweep.json")["runs"]] == ["rate-0.5"]
    before = stamps(tmp_path / "runs", "model/model.safetensors")
    assert list(before) == ["model"] and not (tmp_path / "runs" / "rate-0.25" / "model").exists()
    found = go(recipe, ["rate=0.5,0.25"], tmp_path / "runs")
    assert [point["name"] for point in found["points"]] == ["rate-0.5", "rate-0.25"]
    steps = [line["step"] for line in metrics(tmp_path / "runs" / "rate-0.25")]
    assert steps == [1, 2, 3, 4], "the second run went on from its third step"


def test_seeds_become_one_point_with_a_spread(recipe, tmp_path):
    words = ["rate=0.5", "seed=0,1", "--out", tmp_path / "runs", "--tokens", 256]
    printed = sememe("sweep", recipe, *words)
    found = read(tmp_path / "runs" / "sweep.json")
    assert [run["name"] for run in found["runs"]] == ["online_seed-0", "online_seed-1"]
    (point,), values = found["points"], [run["figures"]["nll"] for run in found["runs"]]
    found["runs"][0]["figures"]["delta_nll_zero"] = None
    (mended,) = summarise(found["runs"])
    assert mended["mean"]["delta_nll_zero"] == found["runs"][1]["figures"]["delta_nll_zero"], (
        "over the seeds that have it"
    )
    assert values[0] != values[1]
    assert point["mean"]["nll"] == pytest.approx(sum(values) / 2)
    assert point["spread"]["nll"] == pytest.approx(abs(values[0] - values[1]) / 2**0.5)
    assert point["spread"]["delta_nll_control"] is None
    assert "±" in printed and "sweep.json" in printed and "sweep.html" in printed


def test_the_command_prints_a_table_and_names_its_files(done, monkeypatch):
    recipe, out, _ = done
    monkeypatch.setattr(terminal.out, "width", 160)  # or titles of two words are broken
    printed = sememe("sweep", recipe, "rate=0.5,0.25", "--control", "--out", out, "--tokens", 256)
    for word in ("control", "skip", "rate-0.5", "rate-0.25", "Δ control", "layers", "sweep.json"):
        assert word in printed, word
    page = (out / "sweep.html").read_text()
    assert "Quality against compute" in page and page.count("data:image/svg") == 1, (
        "two points and a control are enough to draw"
    )
    sememe("report", out / "rate-0.5", out, "--json", out.parent / "page.json")
    assert read(out.parent / "page.json") == {"report": str(out / "rate-0.5" / "report.html")}
    assert "Quality against compute" in (out / "rate-0.5" / "report.html").read_text()
