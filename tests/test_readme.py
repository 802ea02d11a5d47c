"""The README runs: its commands exist as written, and a short variant of `make demo` goes the whole
way."""

import io
import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from conftest import sememe

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
LINES = [
    line.split("#")[0].strip()
    for block in re.findall(r"```sh\n(.*?)```", README, re.S)
    for line in block.splitlines()
]
COMMANDS = [line for line in LINES if line.startswith("sememe ")]


def test_the_two_commands_are_in_the_readme_and_in_the_makefile():
    assert "make demo" in LINES and "make test" in LINES
    for target, does in (("demo", "sememe demo"), ("test", "-m pytest")):
        planned = subprocess.run(
            ["make", "-n", target], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout
        assert does in planned
    assert "make test" in (ROOT / ".ci" / "run").read_text()


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_are_as_the_program_takes_them(line):
    words = shlex.split(line.replace(".venv/bin/", ""))
    shown = re.sub(r"\s+", " ", sememe(words[1], "--help"))
    for word in words[2:]:
        if word.startswith("--"):
            assert word.split("=")[0] in shown, f"{word} is not an option of sememe {words[1]}"
        if word.startswith(("recipes/", "data/")) and "#" not in word:
            assert (ROOT / word).is_file(), f"{word} is not in the tree"


def test_every_recipe_is_valid():
    from sememe.training.recipe import load_recipe

    for path in (ROOT / "recipes").glob("*.yaml"):
        load_recipe(path)


def test_short_demo(long_base_folder, texts, tmp_path):
    """The demo on a tiny base: pull is a local folder here, everything else is the real thing,
    twice."""
    from sememe.demo import run_demo

    recipe = yaml.safe_load((ROOT / "recipes" / "demo.yaml").read_text())
    recipe |= {
        "base": str(long_base_folder),
        "data": {"train": str(texts[0]), "heldout": str(texts[1])},
        "num_concepts": 32,
        "sequence_length": 32,
        "split": {"shallow": 1, "middle": 2, "deep": 1},
        "calibration_tokens": 256,
    }
    (tmp_path / "demo.yaml").write_text(yaml.safe_dump(recipe))
    said = io.StringIO()
    done = run_demo(tmp_path / "demo.yaml", tmp_path / "runs", Console(file=said, width=120))
    assert Path(done["report"]) == tmp_path / "runs" / "demo" / "report.html"
    assert said.getvalue().strip().splitlines()[-1] == f"report: {done['report']}"
    assert (
        done["evaluate"]["delta_nll_control"] is not None
        and done["benchmark"]["decode_speedup"] > 0
    )
    assert (tmp_path / "runs" / "demo-control" / "model").is_dir()
    weights = tmp_path / "runs" / "demo" / "model" / "model.safetensors"
    before = weights.stat().st_mtime_ns
    again = io.StringIO()
    at_another = done["benchmark"] | {
        "settings": done["benchmark"]["settings"] | {"target_rate": 1.0}
    }
    (weights.parents[1] / "benchmark.json").write_text(
        json.dumps(at_another)
    )  # as `sememe benchmark --rate 1` leaves it
    (weights.parents[1] / "evaluate.json").write_text(json.dumps(done["evaluate"] | {"kept": True}))
    later = run_demo(tmp_path / "demo.yaml", tmp_path / "runs", Console(file=again, width=120))
    assert (
        later["benchmark"]["settings"]["target_rate"] == recipe["rate"]
        and later["evaluate"]["kept"]
    )
    assert (
        weights.stat().st_mtime_ns == before
        and again.getvalue().count("is finished: nothing to train") == 2
    )
