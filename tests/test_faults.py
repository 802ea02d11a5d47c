"""Training that meets what goes wrong while it runs: steps that are not finite or spikes, half a
line of the log, changed files, a second trainer, signals, a process that is killed."""

import contextlib
import hashlib
import json
import math
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from conftest import ctrl_c, launch, metrics, run, sememe
from sememe import locks
from sememe.errors import CheckpointError, Diverged, Interrupted, RecipeError, SememeError
from sememe.keys import Recipe
from sememe.options import check_recipe
from sememe.training import callbacks
from sememe.training.checkpoints import last_checkpoint
from sememe.training.guard import Guard
from sememe.training.run import train
from sememe.training.trainer import ConceptTrainer, cosine

LONG = {"steps": 399, "save_every": 200, "heldout_every": 400}  # and each step is logged


# ---- steps that are not taken ----


def state_of(model) -> str:
    """What a step may change: weights, and what a forward pass tracks."""
    digest = hashlib.sha256()
    for _, value in [*model.named_parameters(), *model.named_buffers()]:
        digest.update(value.detach().numpy().tobytes())
    return digest.hexdigest()


def poisoned(patch, steps: set[int], what: str) -> dict[int, list[str]]:
    """Makes the loss, the model's scores or a gradient of these steps `what`; returns what the
    model is before each step and after the last."""
    real, clip, states = ConceptTrainer.compute_loss, ConceptTrainer._clip_grad_norm, {}

    def compute_loss(self, model, inputs, *args, **kwargs):
        step = self.state.global_step + 1
        states[step] = state_of(self.model)
        loss = real(self, model, inputs, *args, **kwargs)
        if step in steps and what != "gradient":
            self.model.writer.gate.quantiles.fill_(math.nan)  # as scores that are not finite would
            loss = loss * float(what) if what == "1e9" else loss * 0 + float(what)
        return loss

    def _clip_grad_norm(self, model):
        if self.state.global_step + 1 in steps and what == "gradient":
            self.model.writer.codes.weight.grad[0, 0] = math.nan
        return clip(self, model)

    patch.setattr(ConceptTrainer, "compute_loss", compute_loss)
    patch.setattr(ConceptTrainer, "_clip_grad_norm", _clip_grad_norm)
    return states


@pytest.mark.parametrize("what", ["nan", "inf", "-inf", "gradient", "1e9"])
def test_a_step_that_is_not_finite_or_a_spike_changes_nothing(
    recipe_values, tmp_path, monkeypatch, what
):
    """It is said, logged and counted, and all later steps are taken."""
    values = recipe_values | {"steps": 12, "quantise": [0.0, 0.0]}
    states, said = poisoned(monkeypatch, {9}, what), []
    lines = run(values, tmp_path / "r", said.append)
    changes = [step for step in range(1, 12) if states[step] != states[step + 1]]
    assert changes == [1, 2, 3, 4, 5, 6, 7, 8, 10, 11]
    assert [line["step"] for line in lines if "loss" not in line] == [9]
    assert "the" in lines[8]["skipped"] and lines[8]["grad_norm"] == 0
    assert [line["skipped_steps"] for line in lines] == [0] * 8 + [1] * 4
    assert sum("step 9 is left out: the " in line for line in said) == 1
    assert all(math.isfinite(line["loss"]) for line in lines if line["step"] != 9)


def test_ten_in_a_row_end_the_run_before_the_first(recipe_values, tmp_path, monkeypatch):
    """Also across a stop: what was counted and seen is part of the checkpoint."""
    values = recipe_values | {"steps": 40, "quantise": [0.0, 0.0]}
    poisoned(monkeypatch, set(range(9, 40)), "1e9")
    with pytest.raises(Diverged, match=r"no step from 9 to 18 could.*try: ") as ended:
        run(values, tmp_path / "r")
    assert ended.value.exit_code == 3
    lines = metrics(tmp_path / "r")
    assert lines[-1]["step"] == 18 and "no step from 9" in lines[-1]["stopped"]
    assert last_checkpoint(tmp_path / "r" / "checkpoints").name == "checkpoint-8"
    with ctrl_c(12), pytest.raises(Interrupted):
        run(values, tmp_path / "parts")
    assert last_checkpoint(tmp_path / "parts" / "checkpoints").name == "checkpoint-12"
    with pytest.raises(Diverged, match="no step from 9 to 18"):
        run(values, tmp_path / "parts")


def guard(**changes) -> Guard:
    recipe = {"system": "online", "base": "b", "data": {"train": "a", "heldout": "b"}, "steps": 9}
    return Guard(Recipe.model_validate(recipe | changes), print)


def test_the_spike_rule():
    """Six deviations of those that were taken, none after one that was left out, and none where the
    loss becomes another one or the rule is off."""
    steps = [2.0 + 0.1 * (n % 7) for n in range(200)]
    rule, off = guard(), guard(spike=None)
    assert all(rule.allows(n, loss, {}) for n, loss in enumerate(steps))
    for loss in (1e9, math.nan, 3.7, math.inf):
        assert not rule.allows(201, loss, {})
        assert rule.allows(202, 2.2, {}) and rule.allows(203, 3.0, {})
    assert rule.skipped == 4 and rule.in_a_row == 0
    assert not rule.allows(204, 2.0, {"lora": math.nan})
    assert not rule.allows(205, 5.0, {})
    rule.forget()
    assert rule.allows(206, 5.0, {})
    assert all(off.allows(n, 10.0**n, {}) for n in range(99))
    assert not off.allows(100, math.inf, {})


def test_what_changes_the_loss_is_no_spike(recipe_values, tmp_path, monkeypatch):
    """Codes that come all at once: the loss may be any other from there on."""
    values = recipe_values | {"steps": 24, "quantise": [0.5, 0.5]}
    real = ConceptTrainer.compute_loss

    def compute_loss(self, *args, **kwargs):
        loss = real(self, *args, **kwargs)
        return loss * (1 + 9 * (self.model.dial.quantise > 0))

    monkeypatch.setattr(ConceptTrainer, "compute_loss", compute_loss)
    assert run(values, tmp_path / "r")[-1]["skipped_steps"] == 0


# ---- what a resumed run finds ----


def test_half_a_line_of_the_log_is_mended_and_steps_have_one_line(recipe_values, tmp_path):
    folder = tmp_path / "r"
    with ctrl_c(5), pytest.raises(Interrupted):
        run(recipe_values, folder)
    log = folder / "metrics.jsonl"
    log.write_text(log.read_text() + '{"step": 6, "loss": 1.0}\n{"step": 7, "lo')
    lines = run(recipe_values, folder)
    assert [line["step"] for line in lines] == list(range(1, 9)) and lines[5]["loss"] != 1.0
    # The log of a run that was killed before its first checkpoint and its first whole line.
    (tmp_path / "early").mkdir()
    for name in ("recipe.yaml", "inputs.json"):
        shutil.copy(folder / name, tmp_path / "early")
    (tmp_path / "early" / "metrics.jsonl").write_text('{"st')
    assert len(run(recipe_values, tmp_path / "early")) == 8


@pytest.fixture
def project(recipe_values, tmp_path, base_folder) -> tuple[dict, Path]:
    """(recipe, run stopped at step 5) over a base and a text of its own."""
    base = shutil.copytree(base_folder, tmp_path / "base")
    train = shutil.copy(recipe_values["data"]["train"], tmp_path / "train.txt")
    data = recipe_values["data"] | {"train": str(train)}
    values = recipe_values | {"base": str(base), "data": data}
    with ctrl_c(5), pytest.raises(Interrupted):
        run(values, tmp_path / "r")
    return values, tmp_path / "r"


def change_text(folder: Path) -> None:
    text = (folder / "train.txt").read_text()
    (folder / "train.txt").write_text(text[2000:] + text[:2000])


def change_tokenizer(folder: Path) -> None:
    path = folder / "base" / "tokenizer.json"
    content = json.loads(path.read_text())
    vocab = content["model"]["vocab"]
    vocab["a"], vocab["e"] = vocab["e"], vocab["a"]
    path.write_text(json.dumps(content))


def change_weights(folder: Path) -> None:
    path = folder / "base" / "model.safetensors"
    weights = load_file(path)
    weights["model.layers.1.mlp.down_proj.weight"] *= 1.5
    save_file(weights, path, metadata={"format": "pt"})


def change_configuration(folder: Path) -> None:
    path = folder / "base" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rms_norm_eps": 1e-2}))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (change_text, "data.train = "),
        (change_tokenizer, "tokenizer = "),
        (change_weights, "base = "),
        (change_configuration, "base_config = "),
        (None, "num_concepts = 32, not 64"),
    ],
)
def test_what_has_changed_is_not_resumed_from(project, change, named):
    values, folder = project
    if change is None:
        values = values | {"num_concepts": 64}
    else:
        change(folder.parent)
    with pytest.raises(RecipeError, match=rf"with {named}.*try: another --out, or --force"):
        run(values, folder)
    assert len(metrics(folder)) == 5 and not (folder / "model").exists()


def test_force_resumes_all_the_same_with_the_recipe_as_it_is_now(project):
    values, folder = project
    change_text(folder.parent)
    recipe = folder.with_suffix(".yaml")
    recipe.write_text(check_recipe(values, "test").yaml())
    words = ("train", recipe, "learning_rate=0.002", "--out", folder)
    assert "--force" in sememe(*words, code=1)
    printed = sememe(*words, "--force")
    assert "forced: " in printed and "learning_rate = 0.001, not 0.002" in printed
    assert "resuming from step 5 of 8" in printed
    rates = [line["learning_rate"] for line in metrics(folder)]
    wanted = [(0.001 if step < 5 else 0.002) * cosine(step, 8) for step in range(8)]
    assert rates == pytest.approx(wanted)
    shutil.rmtree(folder / "model")
    with pytest.raises(CheckpointError, match="does not fit its configuration"):
        changed = check_recipe(values | {"num_concepts": 64}, "test")
        train(changed, folder, lambda line: None, show=False, force=True)
    assert "num_concepts: 32" in (folder / "recipe.yaml").read_text()


def test_base_and_texts_that_were_moved_are_the_same(project):
    values, folder = project
    moved = folder.parent / "elsewhere"
    moved.mkdir()
    shutil.move(folder.parent / "base", moved / "b")
    shutil.move(folder.parent / "train.txt", moved / "t.txt")
    data = values["data"] | {"train": str(moved / "t.txt")}
    assert len(run(values | {"base": str(moved / "b"), "data": data}, folder)) == 8


# ---- two at once ----

HOLD = """import sys, time
from pathlib import Path
from sememe.locks import LOCK, only_user
path = Path(sys.argv[1])
with only_user(path, path.parent / (sys.argv[2] + LOCK) if sys.argv[2:] else None):
    print(flush=True)
    time.sleep(600)"""


@pytest.fixture
def holding():
    """Starts a process that holds what it is told, as a command does."""
    processes = []

    def hold(*words) -> subprocess.Popen:
        command = [sys.executable, "-c", HOLD, *map(str, words)]
        processes.append(subprocess.Popen(command, stdout=subprocess.PIPE))
        processes[-1].stdout.readline()
        return processes[-1]

    yield hold
    for process in processes:
        process.kill()
        process.wait()


def test_a_second_trainer_is_told_who_trains_and_a_dead_one_is_none(recipe_values, tmp_path):
    folder = tmp_path / "r"
    first = launch(recipe_values | LONG | {"save_every": 4}, folder)
    try:
        while first.poll() is None and last_checkpoint(folder / "checkpoints") is None:
            time.sleep(0.05)
        before = first.pid
        with pytest.raises(SememeError, match=f"in use by process {before} on .* since 20"):
            run(recipe_values | LONG | {"save_every": 4}, folder)
        assert first.poll() is None
    finally:
        first.kill()
        first.communicate()
    assert (folder / ".lock").is_file(), "it was killed"
    step = int(last_checkpoint(folder / "checkpoints").name.removeprefix("checkpoint-"))
    with ctrl_c(3), pytest.raises(Interrupted, match=f"stopped at step {step + 3} of"):
        run(recipe_values | LONG | {"save_every": 4}, folder)
    steps = [line["step"] for line in metrics(folder)]
    assert steps == sorted(set(steps)) and not (folder / ".lock").exists()


def test_sweep_compress_and_benchmark_are_alone_too(recipe_values, tmp_path, texts, holding):
    folder = tmp_path / "r"
    run(recipe_values, folder)
    recipe = tmp_path / "r.yaml"
    recipe.write_text(check_recipe(recipe_values, "test").yaml())
    first = holding(folder)
    holding(tmp_path / "sweep")
    holding(tmp_path / "codes.json", ".codes.json")
    for words in (
        ("train", recipe, "--out", folder),
        ("sweep", recipe, "rate=0.5", "--out", tmp_path / "sweep"),
        ("compress", folder, texts[1], "--out", tmp_path / "codes.json"),
        ("benchmark", folder),
    ):
        assert re.search(r" is in use by process \d+ on .*try: wait", sememe(*words, code=1))
    first.kill()
    first.wait()
    assert "nothing to train" in sememe("train", recipe, "--out", folder)
    assert not (folder / ".lock").exists()


def test_a_folder_that_nobody_may_write_to_is_not_locked(recipe_values, tmp_path, monkeypatch):
    def refuse(self):
        raise PermissionError(13, "Permission denied")

    run(recipe_values, tmp_path / "r")
    monkeypatch.setattr(locks.FileLock, "acquire", refuse)
    assert len(run(recipe_values, tmp_path / "r")) == 8  # finished: nothing to train


# ---- signals, and a process that is gone ----


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 0)])
def test_a_signal_leaves_a_run_that_resumes(recipe_values, tmp_path, number, code):
    process = launch(recipe_values | LONG, tmp_path / "r")
    while process.poll() is None and not (tmp_path / "r" / "metrics.jsonl").exists():
        time.sleep(0.05)
    process.send_signal(number)
    said = process.communicate(timeout=120)[0]
    assert process.returncode == code, said[-2000:]
    assert "the same command goes on from there" in said and "Traceback" not in said
    assert last_checkpoint(tmp_path / "r" / "checkpoints") is not None


def test_a_signal_while_the_processes_ask_each_other_is_not_lost(
    recipe_values, tmp_path, monkeypatch
):
    real, seen = callbacks.gathered, []

    def gathered(parts):
        seen.append(parts)
        if len(seen) == 2:
            signal.raise_signal(signal.SIGINT)
        return real(parts)

    monkeypatch.setattr(callbacks, "gathered", gathered)
    with pytest.raises(Interrupted, match="stopped at step 3 of 8"):
        run(recipe_values, tmp_path / "r")


@pytest.mark.parametrize(
    ("processes", "options"),
    [(2, []), pytest.param(4, ["--sharded"], marks=pytest.mark.reliability)],
)
def test_where_one_of_several_processes_is_killed_the_others_end(
    recipe_values, tmp_path, processes, options
):
    """And while they train, nobody listens for other machines."""
    psutil = pytest.importorskip("psutil")
    values = recipe_values | LONG | {"lora": {"rank": 4}, "save_every": 4, "batch_size": 4}
    process = launch(values, tmp_path / "r", processes, *options)
    tree = []
    try:
        while process.poll() is None and last_checkpoint(tmp_path / "r" / "checkpoints") is None:
            time.sleep(0.05)
        tree = [parent := psutil.Process(process.pid), *parent.children(recursive=True)]
        sockets = [socket for child in tree for socket in child.net_connections()]
        local = ("127.0.0.1", "::1", "::ffff:127.0.0.1")
        assert not [x for x in sockets if x.status == "LISTEN" and x.laddr.ip not in local]
        ranks = [child for child in tree[1:] if child.environ().get("RANK")]
        ranks[1].kill()
        said = process.communicate(timeout=60)[0]
        assert len(ranks) == processes and process.returncode not in (0, None), said[-2000:]
        assert not any(rank.is_running() for rank in ranks)
    finally:
        for child in tree:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
    with ctrl_c(1), pytest.raises(Interrupted):
        run(values, tmp_path / "r")
