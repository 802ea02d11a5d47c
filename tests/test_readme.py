"""The README runs: its commands exist as written, and a short variant of `make demo` goes the whole
way."""

import json
import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

from conftest import sememe

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
LINES = [
    line.split("#")[0].strip()
    for block in re.findall(r"```sh\n(.*?)```", README, re.S)
    for line in block.splitlines()
]
SCRIPTS = "".join(path.read_text() for path in sorted((ROOT / "runs").glob("*.sh")))


def commands(script: str) -> list[str]:
    """The `sememe` commands of a shell script, whatever condition they stand behind."""
    lines = script.replace("\\\n", " ").replace("||\n", "|| ").splitlines()
    return [
        line[line.index("sememe ") :] for line in lines if re.match(r"(fresh .*)?sememe ", line)
    ]


def test_the_two_commands_are_in_the_readme_and_in_the_makefile():
    assert "make demo" in LINES and "make test" in LINES
    for target, does in (("demo", "sh runs/demo.sh"), ("test", "-m pytest")):
        planned = subprocess.run(
            ["make", "-n", target], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout
        assert does in planned
    assert "make test" in (ROOT / ".ci" / "run").read_text()


@pytest.mark.parametrize("line", [*commands("\n".join(LINES)), *commands(SCRIPTS)])
def test_commands_are_as_the_program_takes_them(line):
    words = shlex.split(line.replace(".venv/bin/", ""))
    shown = re.sub(r"\s+", " ", sememe(words[1], "--help"))
    for word in words[2:]:
        if word.startswith("--"):
            assert word.split("=")[0] in shown, f"{word} is not an option of sememe {words[1]}"
        if word.startswith(("recipes/", "data/")):
            assert (ROOT / word).is_file(), f"{word} is not in the tree"


@pytest.fixture
def workplace(long_base_folder, texts, tmp_path, monkeypatch):
    """A folder with the recipes and texts of the repository, made tiny."""
    monkeypatch.chdir(tmp_path)
    tiny = {
        "base": str(long_base_folder),
        "steps": 4,
        "num_concepts": 32,
        "calibration_tokens": 256,
    }
    tiny |= {"sequence_length": 32, "split": [1, 2, 1]}
    (tmp_path / "data").mkdir()
    for name, path in zip(("train", "heldout"), texts, strict=True):
        (tmp_path / "data" / f"{name}.txt").write_text(path.read_text())
    (tmp_path / "recipes").mkdir()
    for path in (ROOT / "recipes").glob("*.yaml"):
        values = yaml.safe_load(path.read_text()) | tiny
        (tmp_path / "recipes" / path.name).write_text(yaml.safe_dump(values))
    return tmp_path


def test_demo(workplace):
    """Every command of runs/demo.sh on a tiny base; the base is not pulled."""
    pull, *rest = commands((ROOT / "runs" / "demo.sh").read_text())
    assert pull == "sememe pull smollm2-135m" and len(rest) == 6
    printed = [sememe(*shlex.split(line)[1:]) for line in rest]
    assert printed[-1].strip().splitlines()[-1] == "report: runs/demo/report.html"
    figures = json.loads(Path("runs/demo/evaluate.json").read_text())
    speed = json.loads(Path("runs/demo/benchmark.json").read_text())
    assert figures["delta_nll_control"] is not None and speed["decode_speedup"] > 0


def test_demo_repeats_nothing_that_is_finished(tmp_path):
    """The script itself, with a program in place of sememe that only tells how it was called."""
    program = tmp_path / "bin" / "sememe"
    program.parent.mkdir()
    program.write_text('#!/bin/sh\necho "$1"\n')
    program.chmod(0o755)
    env = {**os.environ, "PATH": f"{program.parent}:{os.environ['PATH']}"}

    def called() -> list[str]:
        done = subprocess.run(
            ["sh", ROOT / "runs" / "demo.sh"], cwd=tmp_path, env=env, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return [line for line in done.stdout.splitlines() if line and not line.startswith("==")]

    stages = ["pull", "train", "train", "evaluate", "benchmark", "generate", "report"]
    assert called() == stages
    weights = tmp_path / "runs" / "demo" / "model" / "model.safetensors"
    weights.parent.mkdir(parents=True)
    for path in (
        weights,
        tmp_path / "runs/demo/evaluate.json",
        tmp_path / "runs/demo/benchmark.json",
    ):
        path.touch()
        os.utime(path, (weights.stat().st_mtime, weights.stat().st_mtime + (path != weights)))
    assert called() == [stage for stage in stages if stage not in ("evaluate", "benchmark")]
