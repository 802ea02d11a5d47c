"""Runs: resume = uninterrupted, the control's batches, two processes, and what must
stop a run."""

import math
import shutil
import signal
import time

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from conftest import ctrl_c, launch, metrics, run, sememe
from sememe.errors import DataError, Interrupted, RecipeError, TrainingError
from sememe.training.checkpoints import last_checkpoint
from sememe.training.trainer import ConceptTrainer


def test_finished_run_holds_what_is_promised(recipe_values, tmp_path):
    folder = tmp_path / "r"
    lines = run(recipe_values, folder)
    assert [line["step"] for line in lines] == list(range(1, 9))
    assert (lines[0]["quantise"], lines[-1]["quantise"]) == (0.0, 1.0)
    files = {"recipe.yaml", "env.json", "inputs.json", "metrics.jsonl", "checkpoints", "model"}
    assert {path.name for path in folder.iterdir()} >= files
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    assert (model.dial.rate, model.dial.quantise) == (0.5, 1.0)
    assert AutoTokenizer.from_pretrained(folder / "model")("cat").input_ids
    with pytest.raises(RecipeError, match=r"with rate = 0.5, not 0.25"):
        run({**recipe_values, "rate": 0.25}, folder)
    checkpoints = folder / "checkpoints"
    assert last_checkpoint(checkpoints).name == "checkpoint-8"
    (checkpoints / "checkpoint-8" / "seal.json").unlink()
    assert last_checkpoint(checkpoints).name == "checkpoint-4", "one that was cut off"
    (checkpoints / "checkpoint-4" / "optimizer.safetensors").write_bytes(b"xx")
    assert last_checkpoint(checkpoints) is None


def losses(lines: list[dict]) -> list[float]:
    return [line["loss"] for line in lines]


@pytest.mark.parametrize("system", ["online", "control"])
def test_resume_is_uninterrupted(recipe_values, tmp_path, system):
    """Equal losses and weights, with dropout and Gumbel noise on."""
    values = {**recipe_values, "system": system, "gumbel": 0.5}
    whole = run(values, tmp_path / "whole")
    with ctrl_c(5), pytest.raises(Interrupted, match="stopped at step 5 of 8"):
        run(values, tmp_path / "parts")
    assert not (tmp_path / "parts" / "model").exists()
    resumed = run(values, tmp_path / "parts")
    assert losses(resumed) == losses(whole)
    models = (tmp_path / name / "model" / "model.safetensors" for name in ("whole", "parts"))
    a, b = map(load_file, models)
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_a_run_that_has_logged_nothing_yet_resumes(recipe_values, tmp_path):
    """It logs every second step of 400."""
    values = recipe_values | {"steps": 400, "heldout_every": 400}
    for step in (1, 2):
        with ctrl_c(1), pytest.raises(Interrupted, match=f"stopped at step {step} of 400"):
            run(values, tmp_path / "r")


def test_control_sees_the_same_batches_in_the_same_order(recipe_values, tmp_path, monkeypatch):
    seen = {system: [] for system in ("online", "control", "skip")}
    real = ConceptTrainer.compute_loss

    def spy(self, model, inputs, *args, **kwargs):
        seen[self.run.recipe.system].append(inputs["input_ids"].tolist())
        return real(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(ConceptTrainer, "compute_loss", spy)
    for system in seen:
        run({**recipe_values, "system": system}, tmp_path / system)
    assert seen["online"] == seen["control"] == seen["skip"] and len(seen["online"]) == 8


def test_rate_is_realised_in_training_and_on_heldout_text(recipe_values, tmp_path):
    """Within 5 % relative, counted over the last steps and over held-out text with the gate running
    free."""
    size = {"steps": 24, "batch_size": 8, "sequence_length": 64, "heldout_tokens": 2048}
    values = recipe_values | size | {"rate": 0.25, "max_tail": 16, "quantise": [0.3, 0.6]}
    lines = run(values, tmp_path / "r")
    for rate in (sum(line["rate"] for line in lines[-8:]) / 8, lines[-1]["heldout_rate"]):
        assert rate == pytest.approx(0.25, rel=0.05)


@pytest.mark.parametrize(
    "what, before", [("loss", "_prepare_inputs"), ("gradient", "_clip_grad_norm")]
)
def test_what_is_not_finite_never_reaches_the_optimizer(
    recipe_values, tmp_path, monkeypatch, what, before
):
    real = getattr(ConceptTrainer, before)

    def poison(self, argument):
        weight = self.model.writer.codes.weight
        if self.state.global_step == 5:
            (weight.data if what == "loss" else weight.grad).fill_(math.nan)
        return real(self, argument)

    monkeypatch.setattr(ConceptTrainer, before, poison)
    with pytest.raises(TrainingError, match=rf"the {what}.* is nan at step 6.*try: "):
        run(recipe_values | {"quantise": [0.1, 0.5]}, tmp_path / "r")
    assert last_checkpoint(tmp_path / "r" / "checkpoints").name == "checkpoint-4"
    assert not (tmp_path / "r" / "model").exists()


def test_a_run_that_cannot_start_writes_nothing(recipe_values, tmp_path):
    thesis = tmp_path / "other" / "thesis.txt"
    thesis.parent.mkdir()
    copy = shutil.copy(recipe_values["data"]["train"], thesis)
    data = recipe_values["data"] | {"heldout": str(copy)}
    for folder, error, said, changes in (
        ("r", DataError, "holds the same bytes", {"data": data}),
        ("r", RecipeError, "does not divide", {"gradient_accumulation": 3}),
        ("other", RecipeError, "no run folder", {}),
    ):
        with pytest.raises(error, match=said):
            run(recipe_values | changes, tmp_path / folder)
    assert not (tmp_path / "r").exists() and [*thesis.parent.iterdir()] == [thesis]


def test_two_processes_train_as_one(recipe_values, tmp_path):
    """torchrun with 2 ranks: the same losses as one process (1e-6 seen), although one rank's text
    writes no coded concept (max_tail and a rate so low that a row of 32 tokens holds the sink
    alone)."""
    few = {"rate": 0.03, "max_tail": 40, "boundary": "fixed", "quantise": [0, 0]}
    values = recipe_values | few | {"lora": {"rank": 4}, "batch_size": 4}
    one = run(values, tmp_path / "one")
    process = launch(values, tmp_path / "two", processes=2)
    said = process.communicate(timeout=240)[0]
    assert process.returncode == 0, said[-3000:]
    two = metrics(tmp_path / "two")
    assert losses(two) == pytest.approx(losses(one), abs=1e-4)
    for key in ("step", "rate"):
        assert [line[key] for line in two] == [line[key] for line in one]


def test_ctrl_c_leaves_a_run_that_resumes(recipe_values, tmp_path):
    values = {**recipe_values, "steps": 4000, "save_every": 1000, "heldout_every": 1000}
    process = launch(values, tmp_path / "r")
    while process.poll() is None and not (tmp_path / "r" / "metrics.jsonl").exists():
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=120)[0]
    assert process.returncode == 130, said[-2000:]
    assert "the same command goes on from there" in said and "Traceback" not in said
    assert last_checkpoint(tmp_path / "r" / "checkpoints") is not None


def test_a_finished_run_is_made_longer(recipe_values, tmp_path):
    folder = tmp_path / "r"
    run(recipe_values, folder)
    sememe("evaluate", folder, "--tokens", 64)
    for steps in (6, 16):  # back, or so far that codes would become states again
        with pytest.raises(RecipeError, match=f"with steps = 8, not {steps}"):
            run(recipe_values | {"steps": steps}, folder)
    lines = run(recipe_values | {"steps": 12}, folder)
    assert [line["step"] for line in lines] == list(range(1, 13))
    assert all(line["quantise"] == 1 for line in lines[8:])
    assert (folder / "model-8" / "evaluate.json").is_file()
    assert not (folder / "evaluate.json").exists()
    assert (folder / "model").is_dir()
