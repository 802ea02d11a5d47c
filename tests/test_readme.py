"""The README and the scripts of runs/: every command runs, on a tiny base."""

import json
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from conftest import sememe

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
SCRIPTS = {path.stem: path.read_text() for path in sorted((ROOT / "runs").glob("*.sh"))}
PULL = "sememe pull smollm2-135m"


def commands(script: str) -> list[str]:
    """The `sememe` commands of a shell script, whatever condition they stand behind."""
    lines = script.replace("\\\n", " ").replace("||\n", "|| ").splitlines()
    found = (re.match(r"(?:fresh .*)?(sememe [^#]*)", line) for line in lines)
    return [match.group(1).strip() for match in found if match]


SHELL = commands("".join(re.findall(r"```sh\n(.*?)```", README, re.S)))


def test_readme_is_short_and_its_first_command_comes_early():
    lines = README.splitlines()
    assert len(lines) <= 150 and lines.index("make demo") < 30
    assert max(map(len, lines)) < 330  # a row of a table with its links
    for target, does in (("demo", "sh runs/demo.sh"), ("test", "-m pytest")):
        planned = subprocess.check_output(["make", "-n", target], cwd=ROOT, text=True)
        assert f"make {target}" in lines and does in planned
    assert "make test" in (ROOT / ".ci" / "run").read_text()
    for name in re.findall(r"\]\(([^)]+)\)", README):
        assert (ROOT / name).exists(), name


def test_commands_of_the_scripts_are_as_the_program_takes_them():
    for line in (line for script in SCRIPTS.values() for line in commands(script)):
        words = shlex.split(line)
        shown = re.sub(r"\s+", " ", sememe(words[1], "--help"))
        for word in words[2:]:
            assert not word.startswith("--") or word in shown, f"{word} is no option of {words[1]}"
            assert not word.startswith(("recipes/", "data/")) or (ROOT / word).is_file(), word


@pytest.fixture
def workplace(base_folder, texts, tmp_path, monkeypatch):
    """A folder with the recipes and texts of the repository, made tiny."""
    monkeypatch.chdir(tmp_path)
    config = shutil.copytree(base_folder, Path("long")) / "config.json"
    long = {"max_position_embeddings": 512}  # for the prompt of the demo's benchmark
    config.write_text(json.dumps(json.loads(config.read_text()) | long))
    tiny = {"base": "long", "sequence_length": 32, "num_concepts": 32, "calibration_tokens": 256}
    Path("data").mkdir()
    for text in texts:
        shutil.copy(text, "data")
    for path in shutil.copytree(ROOT / "recipes", Path("recipes")).glob("*.yaml"):
        values = yaml.safe_load(path.read_text()) | tiny | {"steps": 4}
        split = {"split": [1, 2, 1]} if values["system"] == "online" else {}
        path.write_text(yaml.safe_dump(values | split))


FEW = {word: "--tokens 128" for word in ("sweep", "ablate", "reconstruct")}
FEW |= {"evaluate": "--tokens 512", "benchmark": "--new-tokens 4 --repeats 1"}


def play(line: str) -> str:
    """Runs a command with few steps, tokens, rounds and points; what was printed."""
    line = re.sub(r"--(tokens|new-tokens|repeats) \d+|(?<=0.5),0.25 |--control (?=--o)", " ", line)
    words = shlex.split(re.sub(r"steps=\d+", "steps=4", line))[1:]
    return sememe(*words, *FEW.get(words[0], "").split())


def test_demo_and_the_python_example(workplace, capsys):
    pull, *rest = commands(SCRIPTS["demo"])
    assert pull == PULL and len(rest) == 6
    printed = [play(line) for line in rest]
    assert printed[-1].strip().splitlines()[-1] == "report: runs/demo/report.html"
    exec(re.search(r"```python\n(.*?)```", README, re.S).group(1), {})
    assert "The old detective" in capsys.readouterr().out


def test_every_command_of_the_readme(workplace):
    Path("short.txt").write_text(Path("data/heldout.txt").read_text()[:400])
    assert PULL in SHELL and len(SHELL) > 12
    for line in SHELL:
        if line != PULL and not line.startswith("sememe doctor"):
            play(line)
    assert Path("back.txt").read_text()
    # Exit code 1: four steps are no healthy run.
    assert "findings at step 4" in sememe("doctor", "runs/r2", code=1)


def test_demo_repeats_nothing_that_is_finished(tmp_path):
    """The script itself, with a program in place of sememe that only tells how it was called."""
    program = tmp_path / "sememe"
    program.write_text('#!/bin/sh\necho "called $1"\n')
    program.chmod(0o755)
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}

    def called() -> list[str]:
        script = ["sh", ROOT / "runs" / "demo.sh"]
        printed = subprocess.check_output(script, cwd=tmp_path, env=env, text=True)
        return re.findall("^called (.*)", printed, re.M)

    stages = ["pull", "train", "train", "evaluate", "benchmark", "generate", "report"]
    assert called() == stages
    run = tmp_path / "runs" / "demo"
    (run / "model").mkdir(parents=True)
    for age, name in enumerate(("benchmark.json", "evaluate.json", "model/model.safetensors")):
        (run / name).touch()
        os.utime(run / name, (1000 - age, 1000 - age))
    assert called() == [stage for stage in stages if stage not in ("evaluate", "benchmark")]
