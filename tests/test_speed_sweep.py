"""`sememe benchmark --sweep`: the grid, what is not timed twice, what cannot be timed, and what
else runs the base."""

import json
import re
import sys
from dataclasses import replace

import pytest
import torch
import yaml

from conftest import sememe, tiny_recipe
from families import tiny_base
from sememe.errors import CheckpointError, DataError, RecipeError, SememeError
from sememe.evaluation import alternatives, memory, speed_models, speed_sweep
from sememe.evaluation.speed import unclear
from sememe.evaluation.speed_models import untrained
from sememe.evaluation.speed_sweep import Grid, decode_range, parse_grid
from sememe.models.configuration import default_split
from sememe.training.recipe import Split

SMALL = ("--prompt-lengths", "16,32", "--rates", "0.5,0.25", "--new-tokens", 6, "--repeats", 1)
GRID = Grid(prompt_lengths=(16, 32), rates=(0.5, 0.25))
INSTALL = "not installed (pip install llama-cpp-python)"


@pytest.fixture(autouse=True, scope="module")
def quiet_machine():
    """Tiny models on a busy machine may write faster than they read: figures of no use, and no
    fault of what is tested."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (speed_sweep, alternatives):
            patch.setattr(module, "unclear", lambda *sides: None)
        patch.setitem(sys.modules, "llama_cpp", None)  # not installed, wherever the tests run
        yield


@pytest.fixture(scope="module")
def swept(tmp_path_factory, base_folder):
    """A sweep over a plain base with a prompt that is too long for it: (folder, what was
    printed)."""
    out = tmp_path_factory.mktemp("speed") / "o"
    words = (
        "--batches",
        "1,2",
        "--splits",
        "1/2/1,2/1/1",
        "--out",
        out,
        "--json",
        out.with_suffix(".json"),
    )
    return out, sememe(
        "benchmark", base_folder, "--sweep", *SMALL, "--prompt-lengths", "16,32,300", *words
    )


@pytest.fixture(scope="module")
def runs(tmp_path_factory, base_folder, texts):
    """A finished run and its control."""
    folder = tmp_path_factory.mktemp("runs")
    recipe = folder / "tiny.yaml"
    recipe.write_text(
        yaml.safe_dump(tiny_recipe(base_folder, texts) | {"steps": 2, "schedule": {}})
    )
    sememe("train", recipe, "--out", folder / "r")
    sememe("train", recipe, "system=control", "--out", folder / "c")
    return folder


def go(model, out, grid=GRID, **more) -> dict:
    settings = {"new_tokens": 6, "repeats": 1, "say": lambda line: None, "show": False} | more
    return speed_sweep.sweep_speed(str(model), out, grid, **settings)


def measured(found: dict) -> list[dict]:
    return [one for one in found["points"] if one["fault"] is None]


@pytest.mark.parametrize(
    "words, said",
    [
        (
            {"prompt_lengths": "128,x"},
            "--prompt-lengths '128,x': need whole numbers from 2 on.*try: --prompt-lengths 128,512",
        ),
        ({"prompt_lengths": "1"}, "from 2 on"),
        ({"batches": "0"}, "--batches '0': need whole numbers from 1"),
        ({"rates": "0.5,2"}, r"--rates '0.5,2': need concepts per token in \(0, 1\]"),
        ({"rates": "nan"}, "--rates"),
        ({"splits": "4-22-4"}, "--splits '4-22-4': need shallow/middle/deep"),
        ({"splits": "4/22"}, "try: --splits 4/22/4"),
        ({"splits": "4/22/4,"}, "--splits"),
    ],
)
def test_bad_lists_are_refused(words, said):
    with pytest.raises(RecipeError, match=said):
        parse_grid(**words)


def test_lists_are_read():
    assert parse_grid() == Grid() and parse_grid(rates=" ") == Grid()
    found = parse_grid("128, 512,128", "1,4", "0.5,.25", "4/22/4,8/14/8")
    assert found == Grid((128, 512), (1, 4), (0.5, 0.25), ((4, 22, 4), (8, 14, 8)))


@pytest.mark.parametrize("layers", [2, 4, 15, 24, 30, 36])
def test_the_default_split_is_that_of_a_recipe(layers):
    assert default_split(layers) == Split().resolve(layers)


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_an_untrained_model_leaves_the_base_as_it_is(family):
    base = tiny_base(family)
    before = {name: value.clone() for name, value in base.state_dict().items()}
    ids = torch.randint(3, 97, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        want = base(ids).logits
        model = untrained(base, (1, 2, 1), [0.25, 0.05])
        cache = model.new_cache(2)
        model(ids, cache=cache, use_cache=True)
        assert torch.equal(base(ids).logits, want)
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())
    assert (
        model.backbone is base and model.config.codes_per_concept == 2 and model.bridge is not None
    )
    assert list(cache.concepts) == [10, 10], "one concept in four tokens"


def test_bfloat16_for_both(base_folder, runs, tmp_path):
    for model, out in ((base_folder, "base"), (runs / "r", "run")):
        found = go(model, tmp_path / out, Grid((16,), rates=(0.5,)), dtype="bfloat16")
        assert (
            found["points"][0]["fault"] is None
            and found["alternatives"][0]["precision"] == "bfloat16"
        )
    wide = go(base_folder, tmp_path / "wide", Grid((16,), rates=(0.5,)))["points"][0]
    assert wide["base"]["cache_bytes"] == 2 * found["points"][0]["base"]["cache_bytes"]


def test_grid_of_a_plain_base(swept):
    out, printed = swept
    found = json.loads((out / "sweep.json").read_text())
    assert json.loads(out.with_suffix(".json").read_text()) == found
    assert found["kind"] == "speed" and found["settings"]["concepts"] == speed_sweep.UNTRAINED
    assert len(found["points"]) == 2 * 2 * 3 * 2 and len(measured(found)) == 16
    for one in measured(found):
        assert one["realised_rate"] == pytest.approx(one["rate"], abs=1 / one["prompt_tokens"])
        for side in ("concept", "base"):
            assert one[side]["cache_bytes"] > 0 and set(one[side]["generate_seconds"]) == {
                "median",
                "min",
                "max",
            }
        assert one["share_of_ceiling"] == pytest.approx(
            one["decode_speedup"] / one["ceiling_decode_speedup"]
        )
        assert one["cache_reduction"] == pytest.approx(
            one["base"]["cache_bytes"] / one["concept"]["cache_bytes"]
        )
        assert one["peak_bytes"] is None or one["peak_bytes"] > 1e6
    by_shape = {
        (p["split"], p["rate"], p["prompt_tokens"], p["batch"]): p["base"]["cache_bytes"]
        for p in measured(found)
    }
    assert (
        by_shape["1/2/1", 0.5, 32, 2]
        == by_shape["2/1/1", 0.25, 32, 2]
        == 2 * by_shape["1/2/1", 0.5, 32, 1]
    )
    assert "1/2/1" in printed and "0.25" in printed and "speed.html" in printed


def test_a_point_beyond_the_base_is_a_row_that_says_so(swept):
    out, printed = swept
    skipped = [
        one for one in json.loads((out / "sweep.json").read_text())["points"] if one["fault"]
    ]
    assert {one["prompt_tokens"] for one in skipped} == {300} and "decode_speedup" not in skipped[0]
    assert skipped[0]["fault"].startswith(
        "got 300 tokens of text and 6 behind them, and this base has places for 256"
    )
    assert "and 7 more: got 300 tokens" in printed and "try: --prompt-lengths 250" in printed


def test_alternatives_without_llama(swept):
    out, printed = swept
    rows = json.loads((out / "sweep.json").read_text())["alternatives"]
    plain = [one for one in rows if one["name"] == "transformers"]
    assert [(one["prompt_tokens"], one["batch"]) for one in plain] == [
        (16, 1),
        (16, 2),
        (32, 1),
        (32, 2),
    ]
    assert all(one["precision"] == "float32" and one["decode_tokens_per_s"] > 0 for one in plain)
    points = measured(json.loads((out / "sweep.json").read_text()))
    assert plain[0]["concept_decode_speedup"] == max(
        one["decode_speedup"] for one in points if (one["prompt_tokens"], one["batch"]) == (16, 1)
    )
    assert [one["fault"] for one in rows if one["name"] == "llama.cpp"] == [INSTALL]
    assert f"llama.cpp: {INSTALL}" in printed


def test_the_page_is_drawn_and_drawn_again(swept):
    page = swept[0] / "speed.html"
    text = page.read_text()
    assert (
        text.count("<svg") == 2
        and "Decode speed against its ceiling" in text
        and "Cache against length of text" in text
    )
    assert INSTALL in text and "http" not in text.replace("http-equiv", "")
    page.unlink()
    assert "speed.html" in sememe("report", swept[0]).replace("\n", "")
    assert page.read_text() == text
    assert "a sweep of speed" in sememe("report", swept[0].parent / "none", swept[0], code=1)


def test_what_is_finished_is_not_timed_again(swept, base_folder, tmp_path, monkeypatch):
    before = go(base_folder, tmp_path)
    monkeypatch.setattr(speed_sweep, "Bench", lambda *args: pytest.fail("nothing is left to time"))
    assert go(base_folder, tmp_path) == before
    assert go(base_folder, tmp_path, replace(GRID, rates=(0.5,))) == before


def test_a_larger_grid_times_what_is_new_and_ctrl_c_loses_nothing(
    base_folder, tmp_path, monkeypatch
):
    real, timed = speed_sweep.benchmark_use, []

    def stops(model, base, ids_BT, *rest):
        if len(timed) == 3:
            timed.append(None)
            raise KeyboardInterrupt
        timed.append((model.config.rate, ids_BT.shape[1]))
        return real(model, base, ids_BT, *rest)

    monkeypatch.setattr(speed_sweep, "benchmark_use", stops)
    with pytest.raises(KeyboardInterrupt):
        go(base_folder, tmp_path)
    kept = json.loads((tmp_path / "sweep.json").read_text())["points"]
    assert len(kept) == 3
    found = go(base_folder, tmp_path, replace(GRID, rates=(0.5, 0.25, 0.2)))
    assert [one for one in timed if one] == [
        (0.5, 16),
        (0.5, 32),
        (0.25, 16),
        (0.25, 32),
        (0.2, 16),
        (0.2, 32),
    ]
    assert found["points"][:3] == kept and len(found["points"]) == 6


def test_other_settings_and_other_sweeps_are_not_mixed_in(swept, base_folder, tmp_path):
    with pytest.raises(
        SememeError, match=r"measured with new_tokens = 6, not 7: need the same.*try: --out .*-2"
    ):
        go(base_folder, swept[0], new_tokens=7)
    (tmp_path / "sweep.json").write_text('{"points": []}')
    with pytest.raises(SememeError, match="is not of `sememe benchmark --sweep`"):
        go(base_folder, tmp_path)
    with pytest.raises(SememeError, match="cannot be used"):
        go(base_folder, tmp_path / "sweep.json" / "below")
    assert (tmp_path / "sweep.json").read_text() == '{"points": []}'


def test_a_run_is_timed_as_trained_into_its_folder(runs):
    sememe("benchmark", runs / "r", "--sweep", *SMALL)
    found = json.loads((runs / "r" / "sweep.json").read_text())
    assert {one["split"] for one in found["points"]} == {"1/2/1"} and len(measured(found)) == 4
    assert found["settings"]["concepts"] == "as trained" and len(found["settings"]["weights"]) == 64
    assert found["settings"]["prompts"].endswith("heldout.txt")
    assert (runs / "r" / "speed.html").is_file()
    assert "report.html" in sememe("report", runs / "r").replace("\n", ""), "a run stays a run"


def test_splits_of_a_run_are_untrained_with_its_sizes(runs, tmp_path):
    found = go(runs / "r", tmp_path, Grid((16,), rates=(0.1,), splits=((2, 1, 1),)))
    assert (
        found["settings"]["concepts"] == speed_sweep.UNTRAINED
        and found["settings"]["weights"] is None
    )
    assert found["points"][0]["realised_rate"] == pytest.approx(0.1, abs=0.05), (
        "below what the run's max_tail of 6 allows"
    )
    bench = speed_models.Bench(
        speed_models.find_subject(str(runs / "r")), False, (0.5,), torch.float32
    )
    assert bench.at((2, 1, 1), 0.5).config.num_concepts == 32
    assert go(runs / "r", tmp_path / "own", Grid((16,)))["points"][0]["rate"] == 0.5
    assert [one["rate"] for one in go(runs / "r", tmp_path / "own", Grid((16,)))["points"]] == [
        0.5,
        0.25,
    ]


@pytest.mark.parametrize(
    "words, said",
    [
        (("RUNS/r", "--rates", "0.1"), "rate = 0.1: need from 0.143 to 1.*try: --rates"),
        (
            ("BASE", "--splits", "1/1/1"),
            r"--splits 1/1/1: shallow \+ middle \+ deep = 3, but this base has 4.*try: --splits "
            r"1/2/1",
        ),
        (("BASE", "--splits", "0/3/1"), "need at least 1 shallow and 1 deep layer"),
        (("BASE", "--splits", "a/b/c"), "need shallow/middle/deep layers"),
        (("BASE", "--dtype", "float8"), "need one of float32"),
        (("BASE", "--data", "missing.txt"), "missing.txt does not exist"),
        (("BASE", "--prompt-lengths", "400"), "none of 3 points could be timed.*places for 256"),
        (("RUNS/c",), "has no concepts"),
        (("no-such-base",), "neither a known base"),
        (("BASE", "--batch", "4"), "got --batch, which is not for a grid.*try: --batches"),
        (("BASE", "--no-training"), "got --training"),
    ],
)
def test_bad_input_is_one_sentence(runs, base_folder, tmp_path, words, said):
    words = [
        str(base_folder) if word == "BASE" else str(word).replace("RUNS", str(runs))
        for word in words
    ]
    message = sememe("benchmark", words[0], "--sweep", "--out", tmp_path, *words[1:], code=1)
    assert re.search(said, message), message
    assert "try: " in message and "\n" not in message


def test_options_of_a_grid_need_sweep(base_folder):
    assert "got --rates, which is not for one measurement" in sememe(
        "benchmark", base_folder, "--rates", "0.5", code=1
    )


def test_a_merged_model_needs_its_base_named(runs, base_folder, tmp_path):
    sememe("export", runs / "r", "--to", tmp_path / "merged")
    with pytest.raises(CheckpointError, match="does not name its base any more"):
        go(tmp_path / "merged", tmp_path / "o")
    found = go(
        tmp_path / "merged", tmp_path / "o", Grid((16,), rates=(0.5,)), base=str(base_folder)
    )
    assert len(measured(found)) == 1 and found["base_name"] == str(base_folder)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB"),
        MemoryError(),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you "
            "tried …"
        ),
        DataError("the text has 4 tokens: need at least 32, one block. try: more text"),
    ],
)
def test_a_point_that_does_not_fit_leaves_the_others(base_folder, tmp_path, monkeypatch, error):
    real = speed_sweep.benchmark_use

    def fails(model, base, ids_BT, *rest):
        if ids_BT.shape[1] == 32:
            raise error
        return real(model, base, ids_BT, *rest)

    monkeypatch.setattr(speed_sweep, "benchmark_use", fails)
    found = go(base_folder, tmp_path)
    said = {one["prompt_tokens"]: one["fault"] for one in found["points"]}
    assert said[16] is None and ("out of memory on cpu" in said[32] or "the text has 4" in said[32])
    assert "try: " in said[32]
    monkeypatch.setattr(speed_sweep, "benchmark_use", real)
    assert len(measured(go(base_folder, tmp_path))) == 4, (
        "tried again, and in the place of the fault"
    )


def test_a_fault_of_the_program_is_not_hidden(base_folder, tmp_path, monkeypatch):
    def fails(*args):
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(speed_sweep, "benchmark_use", fails)
    with pytest.raises(RuntimeError, match="shapes"):
        go(base_folder, tmp_path)


def test_a_point_larger_than_memory_is_not_tried(base_folder, tmp_path, monkeypatch):
    need = memory.needed_bytes(tiny_base().config, 1, 22, torch.float32)
    assert need > 2 * 4 * 2 * 32 * 22 * 4, "both caches at least"
    monkeypatch.setattr(speed_sweep, "free_bytes", lambda device: need)
    found = go(base_folder, tmp_path, replace(GRID, batches=(1, 2)))
    assert {(one["prompt_tokens"], one["batch"]) for one in measured(found)} == {(16, 1)}
    said = {(one["prompt_tokens"], one["batch"]): one["fault"] for one in found["points"]}
    assert (
        "GB are free" in said[16, 2]
        and "try: --batches 1" in said[16, 2]
        and "try: --prompt-lengths 16" in said[32, 1]
    )


def test_figures_that_drown_in_noise_are_told():
    def side(fill, whole):
        return {
            "prefill_seconds": {"median": fill},
            "generate_seconds": dict(zip(("min", "median", "max"), whole, strict=True)),
        }

    assert unclear(side(1.0, (2, 3, 4))) is None and "try: --new-tokens" in unclear(
        side(1.0, (2, 3, 4)), side(3.0, (2, 3, 4))
    )
    assert decode_range(side(1.0, (2, 3, 4)), side(2.0, (4, 6, 8))) == [2 / 3, 6]
    assert decode_range(side(1.0, (2, 3, 4)), side(2.0, (1, 6, 8))) is None
