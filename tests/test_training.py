"""Runs: resume = uninterrupted, golden losses, the control's batches, two processes, and what must
stop a run."""

import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from conftest import ctrl_c, launch, metrics, run
from sememe.errors import DataError, Interrupted, RecipeError, TrainingError
from sememe.training import callbacks
from sememe.training.checkpoints import last_checkpoint
from sememe.training.trainer import ConceptTrainer

GOLDEN = Path(__file__).parent / "golden" / "tiny.json"


def test_finished_run_holds_what_is_promised(recipe_values, tmp_path):
    lines = run(recipe_values, tmp_path / "r")
    assert [line["step"] for line in lines] == list(range(1, 9))
    assert lines[0]["quantise"] == 0.0 and lines[0]["target_rate"] == 0.5
    assert lines[-1]["target_rate"] == 0.5 and lines[-1]["quantise"] == 1.0, (
        "ends as the recipe says"
    )
    assert "heldout_nll" in lines[3] and "code_perplexity" in lines[-1]
    assert {p.name for p in (tmp_path / "r").iterdir()} >= {
        "recipe.yaml",
        "env.json",
        "metrics.jsonl",
        "checkpoints",
        "model",
    }
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "r" / "model")
    assert (model.dial.rate, model.dial.quantise) == (0.5, 1.0)
    assert AutoTokenizer.from_pretrained(tmp_path / "r" / "model")("cat").input_ids
    before = (tmp_path / "r" / "metrics.jsonl").read_text()
    run(recipe_values, tmp_path / "r")
    assert (tmp_path / "r" / "metrics.jsonl").read_text() == before, (
        "a finished run is left as it is"
    )


@pytest.mark.parametrize("system", ["online", "control"])
def test_resume_is_uninterrupted(recipe_values, tmp_path, system):
    """Equal losses and weights, with dropout and Gumbel noise on."""
    values = {**recipe_values, "system": system, "gumbel": 0.5}
    whole = run(values, tmp_path / "whole")
    with ctrl_c(5), pytest.raises(Interrupted, match="stopped at step 5 of 8"):
        run(values, tmp_path / "parts")
    assert not (tmp_path / "parts" / "model").exists()
    resumed = run(values, tmp_path / "parts")
    assert [line["loss"] for line in resumed] == [line["loss"] for line in whole]
    a, b = (
        load_file(tmp_path / name / "model" / "model.safetensors") for name in ("whole", "parts")
    )
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_a_cut_off_checkpoint_is_not_resumed_from(recipe_values, tmp_path):
    run(recipe_values, tmp_path / "r")
    folder = tmp_path / "r" / "checkpoints"
    assert last_checkpoint(folder).name == "checkpoint-8"
    (folder / "checkpoint-8" / "seal.json").unlink()
    assert last_checkpoint(folder).name == "checkpoint-4"
    with (folder / "checkpoint-4" / "optimizer.pt").open("r+b") as file:
        file.write(b"xx")
    assert last_checkpoint(folder) is None


def test_control_sees_the_same_batches_in_the_same_order(recipe_values, tmp_path, monkeypatch):
    seen: dict[str, list] = {}
    real = ConceptTrainer.compute_loss

    def spy(self, model, inputs, *args, **kwargs):
        seen.setdefault(self.recipe.system, []).append(inputs["input_ids"].tolist())
        return real(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(ConceptTrainer, "compute_loss", spy)
    for system in ("online", "control", "skip"):
        run({**recipe_values, "system": system}, tmp_path / system)
    assert seen["online"] == seen["control"] == seen["skip"]
    assert len(seen["online"]) == 8


def test_gradient_accumulation_is_one_batch(recipe_values, tmp_path):
    """Equal up to the order of sums (5e-7 seen). The control: the gate tracks its scores batch by
    batch."""
    values = {**recipe_values, "system": "control", "lora": {"rank": 4}, "batch_size": 4}
    whole = run(values, tmp_path / "whole")
    parts = run({**values, "gradient_accumulation": 2}, tmp_path / "parts")
    assert [x["loss"] for x in parts] == pytest.approx([x["loss"] for x in whole], abs=1e-5)


def test_rate_is_realised_in_training_and_on_heldout_text(recipe_values, tmp_path):
    """Within 5 % relative, counted over the last steps and over held-out text with the gate running
    free."""
    values = {
        **recipe_values,
        "steps": 24,
        "batch_size": 8,
        "sequence_length": 64,
        "rate": 0.25,
        "max_tail": 16,
        "heldout_tokens": 2048,
        "quantise": [0.3, 0.6],
    }
    lines = run(values, tmp_path / "r")
    trained = sum(line["rate"] for line in lines[-8:]) / 8
    assert trained == pytest.approx(0.25, rel=0.05)
    assert lines[-1]["heldout_rate"] == pytest.approx(0.25, rel=0.05)


def test_another_recipe_in_the_same_folder_is_refused(recipe_values, tmp_path):
    run(recipe_values, tmp_path / "r")
    with pytest.raises(RecipeError, match=r"with rate = 0.5, not 0.25"):
        run({**recipe_values, "rate": 0.25}, tmp_path / "r")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("mine")
    with pytest.raises(RecipeError, match="no run folder"):
        run(recipe_values, tmp_path / "other")


def test_non_finite_loss_never_reaches_the_optimizer(recipe_values, tmp_path, monkeypatch):
    real = ConceptTrainer._prepare_inputs
    calls = []

    def poison(self, inputs):
        calls.append(1)
        if len(calls) == 6:
            with torch.no_grad():
                self.model.writer.codes.weight.fill_(float("nan"))
                self.model.dial.quantise = 1.0
        return real(self, inputs)

    monkeypatch.setattr(ConceptTrainer, "_prepare_inputs", poison)
    with pytest.raises(TrainingError, match=r"the loss is nan at step 6.*try: "):
        run(recipe_values, tmp_path / "r")
    assert last_checkpoint(tmp_path / "r" / "checkpoints").name == "checkpoint-4"
    assert not (tmp_path / "r" / "model").exists()


def test_non_finite_gradient_never_reaches_the_optimizer(recipe_values, tmp_path, monkeypatch):
    real = callbacks.Finite.on_pre_optimizer_step

    def poison(self, args, state, control, model=None, **kwargs):
        if state.global_step == 2:
            next(p for p in model.parameters() if p.grad is not None).grad.fill_(float("inf"))
        real(self, args, state, control, model=model, **kwargs)

    monkeypatch.setattr(callbacks.Finite, "on_pre_optimizer_step", poison)
    with pytest.raises(TrainingError, match="is not finite at step 3"):
        run(recipe_values, tmp_path / "r")


def test_texts_that_cannot_be_trained_on(recipe_values, tmp_path):
    same = tmp_path / "copy.txt"
    same.write_text(Path(recipe_values["data"]["train"]).read_text())
    with pytest.raises(DataError, match="holds the same bytes"):
        run(
            {**recipe_values, "data": {**recipe_values["data"], "heldout": str(same)}},
            tmp_path / "r",
        )
    with pytest.raises(RecipeError, match="does not divide"):
        run({**recipe_values, "gradient_accumulation": 3}, tmp_path / "r")
    assert not (tmp_path / "r").exists(), "nothing is written for a run that cannot start"


def test_two_processes_train_as_one(recipe_values, tmp_path):
    """torchrun with 2 ranks: the same losses as one process (1e-6 seen), although one rank's text
    writes no coded concept (max_tail and a rate so low that a row of 32 tokens holds the sink
    alone)."""
    values = {
        **recipe_values,
        "lora": {"rank": 4},
        "rate": 0.03,
        "max_tail": 40,
        "boundary": "fixed",
        "batch_size": 4,
        "quantise": [0, 0],
    }
    one = run(values, tmp_path / "one")
    process = launch(values, tmp_path / "two", processes=2)
    said = process.communicate(timeout=240)[0]
    assert process.returncode == 0, said[-3000:]
    two = metrics(tmp_path / "two")
    assert [line["step"] for line in two] == [line["step"] for line in one]
    assert [line["loss"] for line in two] == pytest.approx([line["loss"] for line in one], abs=1e-4)
    assert [line["rate"] for line in two] == [line["rate"] for line in one]


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
