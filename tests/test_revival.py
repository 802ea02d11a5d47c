"""Codes come back to life during a run: resumed = uninterrupted, moments zeroed, and what
shared_map leaves behind."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from conftest import ctrl_c, launch, metrics, run
from sememe.concepts.codebook import ConceptEmbedding
from sememe.concepts.head import HEADS
from sememe.errors import Interrupted
from sememe.training import codes


@pytest.mark.parametrize("name", HEADS)
def test_moments_of_moved_codes_are_forgotten(name):
    table, head = ConceptEmbedding(4, 3, 2), HEADS[name](3, 4, 2)
    optimizer = torch.optim.AdamW([*table.parameters(), *head.parameters()])
    for p in (*table.parameters(), *head.parameters()):
        p.grad = torch.ones_like(p)
    optimizer.step()
    moved = torch.zeros(2, 4, dtype=torch.bool)
    moved[1, 2] = True
    codes.forget(optimizer, table, head, moved)
    for key in ("exp_avg", "exp_avg_sq"):
        assert ((optimizer.state[table.weight][key] == 0).all(-1) == moved).all()
        for g in range(2):
            for p in head.rows(g):
                zero = optimizer.state[p][key] == 0
                assert (zero.flatten(1).all(1) if zero.dim() > 1 else zero)[:4].tolist() == moved[
                    g
                ].tolist()
        assert optimizer.state[head.rows(1)[0] if head.rows(1) else head.channel][key].any()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {
            "codes_per_concept": 2,
            "head": "nearest",
            "estimator": "identity",
            "commitment_weight": 0.25,
        },
        {"codes_per_concept": 2, "shared_map": True, "usage_weight": 0.1},
    ],
    ids=str,
)
def test_resume_is_uninterrupted_with_revival(recipe_values, tmp_path, monkeypatch, changes):
    """Codes die early here, so that both parts of the run revive some."""
    monkeypatch.setattr(codes, "FLOOR", 1.0)
    values = {
        **recipe_values,
        **changes,
        "steps": 10,
        "revive_every": 2,
        "schedule": {"rate": [0, 0], "quantise": [0, 0.1]},
    }
    said, more = [], []
    whole = run(values, tmp_path / "whole", said.append)
    moved = [line for line in said if "unused codes" in line]
    assert [line.split(":")[0] for line in moved] == ["step 2", "step 4", "step 6"], (
        "not in the last fifth"
    )
    assert all(int(line.split(": ")[1].split()[0]) > 0 for line in moved)
    with ctrl_c(5), pytest.raises(Interrupted):
        run(values, tmp_path / "parts")
    resumed = run(values, tmp_path / "parts", more.append)
    assert [line for line in more if "unused codes" in line] == moved[2:]
    assert [line["loss"] for line in resumed] == [line["loss"] for line in whole]
    a, b = (
        load_file(tmp_path / name / "model" / "model.safetensors") for name in ("whole", "parts")
    )
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_a_map_is_folded_into_the_finished_model(recipe_values, tmp_path):
    values = {**recipe_values, "shared_map": True, "codes_per_concept": 2}
    run(values, tmp_path / "r")
    moved = load_file(tmp_path / "r" / "checkpoints" / "checkpoint-8" / "model.safetensors")[
        "codes.map"
    ]
    assert not torch.equal(moved, torch.eye(len(moved))), "it was learned"
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "r" / "model")
    assert not model.config.shared_map and model.codes.map is None
    ids = model(torch.randint(3, 250, (2, 40))).concept_ids
    assert int(ids.max()) >= 32, "both digits are in use"


def test_terms_of_the_codes_count_once_in_a_step_of_parts(recipe_values, tmp_path):
    values = {
        **recipe_values,
        "lora": {"rank": 4},
        "boundary": "fixed",
        "batch_size": 4,
        "commitment_weight": 5.0,
        "schedule": {"rate": [0, 0], "quantise": [0, 0]},
    }
    whole = run(values, tmp_path / "whole")
    parts = run({**values, "gradient_accumulation": 2}, tmp_path / "parts")
    without = run({**values, "commitment_weight": 0.0}, tmp_path / "without")
    assert whole[0]["loss"] > without[0]["loss"] + 0.1
    assert [x["loss"] for x in parts] == pytest.approx([x["loss"] for x in whole], abs=1e-4)


def test_two_processes_revive_as_one(recipe_values, tmp_path):
    """The same codes move on every rank: equal losses (1e-6 seen) up to the order of sums, and the
    same line said."""
    values = {
        **recipe_values,
        "lora": {"rank": 4},
        "boundary": "fixed",
        "batch_size": 4,
        "revive_every": 4,
        "codes_per_concept": 2,
        "schedule": {"rate": [0, 0], "quantise": [0, 0]},
    }
    said = []
    one = run(values, tmp_path / "one", said.append)
    process = launch(values, tmp_path / "two", processes=2)
    told = process.communicate(timeout=240)[0]
    assert process.returncode == 0, told[-3000:]
    moved = [line for line in said if "unused codes" in line]
    assert moved and all(line in told for line in moved)
    losses = [line["loss"] for line in metrics(tmp_path / "two")]
    assert losses == pytest.approx([line["loss"] for line in one], abs=1e-4)
