"""Recipes for a Qwen, and `make gpu` and the SLURM script on a tiny one."""

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import metrics
from sememe.keys import split_layers
from sememe.options import load_recipe
from sememe.report.files import read_json
from sememe.texts import read_texts

ROOT = Path(__file__).parents[1]
LAYERS = {"qwen3-0.6b": 28, "qwen2.5-0.5b": 24}
RECIPES = [path for name in LAYERS for path in sorted((ROOT / "recipes").glob(f"{name}-*.yaml"))]
NO_GPU = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")}
STAGES = ["train", "train", "evaluate", "train", "evaluate", "ablate", *["benchmark"] * 2, "report"]


def test_recipes_fit_their_base_and_both_cards():
    """Also with what their heads say of another rate and of 80 GB."""
    assert len(RECIPES) == 6
    for path in RECIPES:
        recipe, (head, _) = load_recipe(path), path.read_text().split("system:")
        name, _, system = path.stem.rpartition("-")
        assert (recipe.system, recipe.base.lower()) == (system, f"qwen/{name}")
        other = [json.loads(split) for split in re.findall(r" split=(\[[\d,]+\])", head)]
        assert len(other) == (system == "online")
        for split in (recipe.split, *other):
            split_layers(split, LAYERS[name])
        parts = int(re.search(r"gradient_accumulation=(\d+)", head)[1])
        assert recipe.gradient_accumulation == 4 * parts and recipe.batch_size % (4 * parts) == 0


@pytest.fixture
def script(tmp_path):
    """Runs a script of runs/ in the repository with programs of ours in its PATH; returns what
    ended it and what was printed."""

    def call(name: str, programs: dict[str, str], *words, **env) -> tuple[int, str]:
        for program, content in programs.items():
            path = tmp_path / "bin" / program
            path.parent.mkdir(exist_ok=True)
            path.write_text(f"#!/bin/sh\n{content}\n")
            path.chmod(0o755)
        shell = "bash" if name.endswith("sbatch") else "sh"
        path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
        done = subprocess.run(
            [shell, f"runs/{name}", *map(str, words)],
            cwd=ROOT,
            env=os.environ | {"PATH": path} | NO_GPU | {key: str(x) for key, x in env.items()},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        return done.returncode, done.stdout

    return call


MODEL = "model/model.safetensors"


def machine(gpus: int, gib: int) -> dict[str, str]:
    """A Python that says so, and programs that only tell how they were called."""
    python = f'case "$*" in *device_count*) echo {gpus};; *memory*) echo {gib};; *) echo 3;; esac'
    return {"python": python} | {
        name: f'echo "called {name} $*"' for name in ("sememe", "torchrun")
    }


@pytest.mark.parametrize(
    ("gpus", "gib", "parts"), [(1, 23, 16), (1, 79, 4), (4, 23, 4), (4, 79, 1), (8, 79, 1)]
)
def test_a_gpu_is_given_what_fits_and_several_share_the_batch(script, tmp_path, gpus, gib, parts):
    words = {"DATA": ROOT / "data", "OUT": tmp_path / "r", "TOKENS": 50_000_000}
    code, said = script("gpu.sh", machine(gpus, gib), **words)
    calls = re.findall("^called (.*)", said, re.M)
    assert code == 0 and [re.search(r"(?:sememe) (\w+)", line)[1] for line in calls] == STAGES
    for line in calls:
        if " train " in line:
            assert line.startswith("sememe" if gpus == 1 else f"torchrun --nproc-per-node {gpus} ")
            assert (
                f"steps=1525 sequence_length=1024 batch_size=32 gradient_accumulation={parts}"
                in line
            )
            assert "recipes/qwen3-0.6b-online.yaml base=Qwen/Qwen3-0.6B" in line
            assert "split=" not in line
    assert "system=prune leave_out=3" in said and "without the 3 layers" in said


def test_a_base_of_another_depth_is_split_by_its_own_and_figures_are_not_made_twice(
    script, tmp_path
):
    """Those that are newer than their model: of three stages, and not of the pruned model's."""
    for age, name in enumerate(("benchmark.json", "ablate.json", "evaluate.json", MODEL)):
        path = tmp_path / "r" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        os.utime(path, (1000 - age, 1000 - age))
    words = {"DATA": ROOT / "data", "OUT": tmp_path / "r", "TOKENS": 4096, "BASE": "other/Base"}
    code, said = script("gpu.sh", machine(0, 0), **words)
    left = ["train", "train", "train", "evaluate", "benchmark", "report"]
    assert code == 0 and re.findall("^called sememe (\\w+)", said, re.M) == left
    assert said.count("split=null") == 4  # said once, and of each training


def test_without_a_gpu_it_says_so_before_anything_is_fetched(script):
    code, said = script("gpu.sh", machine(0, 0))
    assert code == 1 and re.fullmatch(
        r"error: .* finds no GPU .* need .* try: make gpu TINY=1\n", said
    )


def test_a_corpus_is_cut_into_held_out_and_training_text(tmp_path, monkeypatch):
    """As much as the tokens need; what is there stays."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    corpus = importlib.import_module("corpus")
    monkeypatch.setattr(corpus, "HELDOUT_BYTES", 25)
    rows = [{"body": f"text number {n:03}"} for n in range(100)]  # of 15 bytes
    source = tmp_path / "source.jsonl"
    source.write_text("\n".join(map(json.dumps, rows)))

    def make(tokens: int, name: str) -> list[list[str]]:
        words = ["corpus", f"{source}#body", str(tmp_path / name), "--tokens", str(tokens)]
        monkeypatch.setattr(sys, "argv", words)
        corpus.main()
        return [read_texts(str(tmp_path / name / f"{x}.jsonl")) for x in ("heldout", "train")]

    heldout, train = make(15, "few")
    assert heldout + train == [row["body"] for row in rows[:7]] and len(heldout) == 2
    assert make(30, "few") == [heldout, train]
    assert len(make(10_000, "all")[1]) == 98
    monkeypatch.setattr(corpus, "HELDOUT_BYTES", 10_000)
    with pytest.raises(SystemExit, match=r"no more than the 10,000 bytes .* try: DATA=folder"):
        make(15, "none")
    assert not (tmp_path / "none" / "train.jsonl").exists()


REAL = {"python": f'exec {sys.executable} "$@"'}
REAL |= {"sememe": f'exec {sys.executable} -m sememe "$@"'}
REAL |= {"torchrun": f'exec {sys.executable} -m torch.distributed.run "$@"'}


@pytest.mark.gpu
def test_all_of_it_on_a_tiny_qwen(script, tmp_path):
    """And on the first steps of the one in QWEN_DIR, where that is named."""
    bases = {"tiny": 3000} | ({os.environ["QWEN_DIR"]: 2048} if "QWEN_DIR" in os.environ else {})
    for number, (base, tokens) in enumerate(bases.items()):
        run = tmp_path / f"r{number}"
        words = {"BASE": base, "TOKENS": tokens, "DATA": ROOT / "data", "OUT": run}
        code, said = script("gpu.sh", REAL, **words)
        assert code == 0 and said.splitlines()[-1] == f"report: {run}/report.html", said[-3000:]
        share = read_json(run / "evaluate.json")["layer_share"]
        pruned = read_json(tmp_path / f"r{number}-prune" / "evaluate.json")["layer_share"]
        assert abs(share - pruned) < 0.2 and (run / "ablate.json").is_file()
        again = script("gpu.sh", REAL, **words)[1]
        assert again.count("nothing to train") == 3


@pytest.mark.gpu
def test_the_slurm_script_trains_in_two_processes(script, tmp_path, recipe_values):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps(recipe_values))
    job = {"SLURM_NNODES": 1, "SLURM_GPUS_ON_NODE": 2}
    words = recipe, "--out", tmp_path / "r"
    code, said = script("slurm.sbatch", REAL | {"srun": 'exec "$@"'}, *words, **job)
    assert code == 0 and len(metrics(tmp_path / "r")) == 8, said[-3000:]
