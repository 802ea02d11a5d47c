"""Runs: resume = uninterrupted, the control's batches, and what must stop a run."""

import random
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from conftest import ctrl_c, run, sememe
from sememe.errors import DataError, Interrupted, RecipeError
from sememe.training import run as runs
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


def weights(folder) -> dict[str, list]:
    state = load_file(folder / "model" / "model.safetensors")
    return {key: value.tolist() for key, value in state.items()}


@pytest.mark.parametrize("system", ["online", "control"])
def test_resume_is_uninterrupted(recipe_values, tmp_path, monkeypatch, system):
    """Equal batches, random states, losses and weights, with dropout and Gumbel noise on. Another
    run of the same seed is equal too, and one of another seed is not."""
    values, seen = {**recipe_values, "system": system, "gumbel": 0.5}, {}
    real = ConceptTrainer.compute_loss

    def spy(self, model, inputs, *args, **kwargs):
        states = (
            random.getstate(),
            np.random.get_state()[1].tolist(),
            torch.get_rng_state().tolist(),
        )
        seen[self.run.folder.name, self.state.global_step] = inputs["input_ids"].tolist(), *states
        return real(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(ConceptTrainer, "compute_loss", spy)
    whole = run(values, tmp_path / "whole")
    with ctrl_c(5), pytest.raises(Interrupted, match="stopped at step 5 of 8"):
        run(values, tmp_path / "parts")
    assert not (tmp_path / "parts" / "model").exists()
    resumed = run(values, tmp_path / "parts")
    assert losses(resumed) == losses(whole)
    assert all(seen["parts", step] == seen["whole", step] for step in range(8))
    assert weights(tmp_path / "parts") == weights(tmp_path / "whole")
    if system == "control":
        for seed in (0, 1):
            lines = run(values | {"seed": seed}, tmp_path / f"seed-{seed}")
            assert (losses(lines) == losses(whole)) is (seed == 0)
            assert (weights(tmp_path / f"seed-{seed}") == weights(tmp_path / "whole")) is (
                seed == 0
            )


def test_training_leaves_the_weights_of_the_base_as_they_are(
    recipe_values, tmp_path, base_folder, monkeypatch
):
    models, real = [], runs._finish

    def finish(run, first):
        models.append(run.model)
        real(run, first)

    monkeypatch.setattr(runs, "_finish", finish)
    before = {path.name: path.read_bytes() for path in base_folder.iterdir()}
    run(recipe_values, tmp_path / "r")
    assert {path.name: path.read_bytes() for path in base_folder.iterdir()} == before
    base = AutoModelForCausalLM.from_pretrained(base_folder).state_dict()
    own = models[0].backbone.state_dict()
    frozen = {k.replace(".base_layer", ""): x for k, x in own.items() if "lora_" not in k}
    assert frozen.keys() == base.keys() and all(torch.equal(frozen[key], base[key]) for key in base)


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


def test_gradient_accumulation_is_one_batch(recipe_values, tmp_path):
    """The gate's quantiles too are of all parts (1e-6 seen; 2e-2 where each part moves them)."""
    values = recipe_values | {"lora": {"rank": 4}, "batch_size": 4}
    whole, parts = (
        losses(run(values | {"gradient_accumulation": n}, tmp_path / str(n))) for n in (1, 2)
    )
    assert parts == pytest.approx(whole, abs=1e-5)


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
