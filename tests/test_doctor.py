"""The doctor: healthy runs of every kind are called healthy, and each rule finds what it is for.

Three runs are really made sick. The other signs are written into the log of a healthy run. The text
is a chain, each character mostly followed by its successor, so that a code that tells the character
is worth about a nat; pairs ask for one of four sentences by name (plan_runs.py)."""

import json
import random
from pathlib import Path

import pytest
import torch
import yaml

from conftest import metrics, run, sememe
from plan_runs import planner_recipe, write_pairs
from sememe import figures
from sememe.errors import TrainingError
from sememe.models import OnlineForCausalLM
from sememe.options import load_recipe
from sememe.report import doctor, write_report
from sememe.report.doctor import examine
from sememe.report.rules import RULES

SHORT = {"steps": 20, "heldout_every": 5}  # enough for faults that are there from the start
ALPHABET = "abcdefghijklmnopqrstuvwxyz0123456789.,:;"
PLANNER = {
    "batch_size": 8,
    "learning_rate": 2e-2,
    "concept_learning_rate": 2e-2,
    "lora": {"rank": 8},
    "save_every": 1000,
    "heldout_tokens": 160,
}


def chain(length: int, seed: int) -> str:
    """Text in which most characters are followed by their one successor."""
    draw, successor = random.Random(seed), list(range(len(ALPHABET)))
    random.Random(0).shuffle(successor)
    one, out = 0, []
    for _ in range(length):
        out.append(ALPHABET[one])
        one = successor[one] if draw.random() < 0.85 else draw.randrange(len(ALPHABET))
    return "".join(out)


@pytest.fixture(scope="module")
def clinic(tmp_path_factory, base_folder):
    """A function: name, changes of the recipe → the run folder, trained."""
    folder = tmp_path_factory.mktemp("clinic")
    for name, length, seed in (("train", 24000, 1), ("heldout", 2000, 2)):
        (folder / f"{name}.txt").write_text(chain(length, seed))

    def trained(name: str, **changes) -> Path:
        values = {
            "system": "online",
            "base": str(base_folder),
            "split": [1, 2, 1],
            "precision": "fp32",
            "data": {"train": str(folder / "train.txt"), "heldout": str(folder / "heldout.txt")},
            "rate": 0.5,
            "max_tail": 6,
            "num_concepts": 64,
            "steps": 36,
            "sequence_length": 128,
            "batch_size": 4,
            "heldout_every": 9,
            "heldout_tokens": 512,
            "save_every": 1000,
            "calibration_tokens": 2048,
            "learning_rate": 1e-2,
            "quantise": [0.1, 0.3],
        }
        run(values | changes, folder / name)
        return folder / name

    trained.folder = folder
    return trained


@pytest.fixture(scope="module")
def online(clinic):
    """With the recipe's own defaults."""
    return clinic("healthy")


@pytest.fixture(scope="module")
def planners(clinic, base_folder):
    """A function: name, changes of em, of plan → the run folder of a planner, trained."""
    files = write_pairs(clinic.folder)

    def trained(name: str, em: dict, plan: dict, steps: int = 30) -> Path:
        values = planner_recipe(base_folder, files) | PLANNER | {"steps": steps}
        values["heldout_every"] = steps // 2
        values["em"] |= {"every": 4, "stages": [0.1, 0.2]} | em
        values["plan"] |= plan
        run(values, clinic.folder / name)
        return clinic.folder / name

    return trained


@pytest.fixture(scope="module")
def planner(planners):
    return planners("planner", {"proposers": {"beam": 4, "sample": 2, "edit": 4}}, {})


def findings(folder: Path) -> dict[str, dict]:
    """Rule → what it found. What is to be tried must be a recipe that could be trained, and not the
    one that was."""
    found = examine(folder)
    recipe = load_recipe(folder / "recipe.yaml")
    for one in found["findings"]:
        for override in one["try"]:
            assert load_recipe(folder / "recipe.yaml", [override]) != recipe, override
    named = [one["rule"] for one in found["findings"] + found["unchecked"]] + found["passed"]
    rules = sorted(rule.name for rule in RULES if found["system"] in rule.systems)
    assert sorted(named) == rules, "every rule says something"
    return {one["rule"]: one for one in found["findings"]}


def test_healthy_runs_are_called_healthy(clinic, online, planner, tmp_path):
    for folder in (online, planner, clinic("control", system="control", **SHORT)):
        assert findings(folder) == {}
    printed = sememe("doctor", online, "--json", tmp_path / "d.json")
    assert "is healthy at step 36" in printed and "not checked" not in printed
    found = json.loads((tmp_path / "d.json").read_text())
    assert found["healthy"] and found["unchecked"] == []
    unchecked = [one["rule"] for one in examine(planner)["unchecked"]]
    assert unchecked == ["only the opening improves"], "targets are short"


def test_the_table_of_figures_knows_every_key_of_a_real_run(online, planner):
    for folder in (online, planner):
        assert figures.figure("new").meaning not in write_report(folder).read_text()


def test_a_collapsed_codebook_is_found(clinic, monkeypatch, tmp_path):
    """One code whose bias outweighs all: shuffling codes costs exactly nothing. The command line
    shows it and ends with 1."""
    real = OnlineForCausalLM.start_codes

    def collapse(self, *rest, **named):
        found = real(self, *rest, **named)
        with torch.no_grad():
            self.writer.head.logits[0].bias[3] += 1e4
        return found

    monkeypatch.setattr(OnlineForCausalLM, "start_codes", collapse)
    folder = clinic("collapsed", head="joint", codes_per_concept=1, **SHORT)
    found = findings(folder)
    assert found["codes collapsed"]["evidence"]["largest_code_share.late"] == 1.0
    assert found["codes ignored"]["evidence"]["delta_nll_shuffle.final"] == 0.0
    printed = sememe("doctor", folder, "--json", tmp_path / "d.json", code=1)
    assert "CODES COLLAPSED" in printed and "gumbel=1" in printed
    assert json.loads((tmp_path / "d.json").read_text())["findings"] == list(found.values())
    assert "few codes do all the work" in write_report(folder).read_text()

    cured = {"target_rate": 0.5, "delta_nll_shuffle": 1.0, "delta_nll_zero": 1.0}
    for change, step in (({}, None), ({"delta_nll_zero": 0.01}, None), ({"target_rate": 0.25}, 20)):
        (folder / "evaluate.json").write_text(json.dumps(cured | change))
        found = findings(folder).get("codes ignored")
        # figures of the finished model count, unless they are of another rate
        assert found is None if not change else found["step"] == step


def test_a_planner_that_does_not_learn_is_found(planners):
    """The executor lives on z*, and the planner has no gradient: plans are not ignored, though
    shuffling the planner's own costs nothing."""
    em = {"stages": [0.25, 0.5]}
    found = findings(planners("unlearned", em, {"weight": 0.0}, steps=16))
    assert found["no gradient"]["evidence"] == {"grad_norm_planner / grad_norm": 0.0}
    assert found["planner far from z*"]["try"] and "plans ignored" not in found


def test_a_loss_that_is_no_number_stops_the_run_and_says_why(clinic):
    with pytest.raises(TrainingError):
        clinic("mad", learning_rate=1e20)
    found = findings(clinic.folder / "mad")
    assert found["not finite"]["try"] == ["learning_rate=1e+19"] and "unfinished" in found
    assert "not checked: codes ignored" in sememe("doctor", clinic.folder / "mad", code=1)


def copy(folder: Path, to: Path, change: dict) -> Path:
    """The log and recipe of a healthy run with `change` in every line: values, or functions of how
    far the line stands (0 to 1)."""
    lines = metrics(folder)
    for i, line in enumerate(lines):
        at = i / (len(lines) - 1)
        line |= {key: x(at) if callable(x) else x for key, x in change.items()}
    (to / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (to / "recipe.yaml").write_text((folder / "recipe.yaml").read_text())
    return to


@pytest.mark.parametrize(
    ("rule", "change", "override"),
    [
        ("not finite", {"heldout_nll": float("inf")}, "learning_rate=0.001"),
        ("loss does not fall", {"heldout_nll": 3.0, "loss": 3.0}, "learning_rate=0.03"),
        ("held-out far above training", {"heldout_nll": 3.0, "loss": 2.0}, "steps=18"),
        ("held-out text gets worse", {"heldout_nll": lambda at: 3 + at}, "steps=18"),
        ("gradient explodes", {"grad_norm": lambda at: 1 + 9 * at}, "learning_rate=0.003"),
        ("no gradient", {"grad_norm_head": 0.0, "grad_norm": 1.0}, "gumbel=1"),
        ("rate off target", {"rate": 0.14, "heldout_rate": 0.14}, "boundary=fixed"),
        ("codes ignored", {"delta_nll_shuffle": 0.0, "delta_nll_zero": 1.0}, "rate=0.75"),
        ("codes collapsed", {"largest_code_share": 0.9}, "num_concepts=16"),
        ("soft and hard codes apart", {"soft_hard_cosine": 0.5}, "code_temperature=0.5"),
        ("sure too early", {"code_entropy": 0.0}, "code_temperature=2"),
        (
            "only the opening improves",
            {"heldout_nll_by_position": lambda at: [3 - at, 3.0]},
            "sequence_length=64",
        ),
    ],
)
def test_signs_in_the_log_of_an_online_run(online, tmp_path, rule, change, override):
    found = findings(copy(online, tmp_path, change))
    assert override in found[rule]["try"] and found[rule]["step"] == 36
    assert found[rule]["evidence"] and found[rule]["advice"] and "unfinished" in found


@pytest.mark.parametrize(
    ("rule", "change", "override"),
    [
        (
            "plans ignored",
            {"delta_nll_shuffle": 0.0, "em_nll": 2.0, "em_nll_shuffle": 2.05},
            "plan.lengths=[2, 4]",
        ),
        ("search undecided", {"em_margin": 0.1, "em_flips": 0.7}, "em.every=2"),
        (
            "search stuck early",
            {"em_flips": 0.0, "em_candidates": 2.0, "plan_entropy_by_slot": [0.0, 0.0, 0.0]},
            "em.proposers.diverse=4",
        ),
        ("plans stale", {"em_staleness": 3.0, "em_margin": 1.0}, "em.every=2"),
        (
            "planner far from z*",
            {"em_nll": 1.0, "em_nll_planner": 2.0, "em_nll_shuffle": 2.0},
            "em.planner_weight=2",
        ),
        (
            "ids collapsed",
            {"plan_perplexity": [1.0, 5.0], "plan_largest_share": [1.0, 0.2]},
            "em.proposers.sample=4",
        ),
        (
            "only the opening improves",
            {"heldout_nll_by_position": lambda at: [3 - at, 3.0]},
            "plan.lengths=[2, 4]",
        ),
    ],
)
def test_signs_in_the_log_of_a_planner(planner, tmp_path, rule, change, override):
    found = findings(copy(planner, tmp_path, change))
    assert override in found[rule]["try"] and found[rule]["evidence"]


def test_the_finished_model_goes_before_its_training(planner, tmp_path):
    copy(planner, tmp_path, {})
    good = {"nll": 2.0, "nll_posterior": 1.5, "delta_nll_empty": 0.5, "delta_nll_shuffle": 0.4}
    for change, rule in (
        ({}, None),
        ({"delta_nll_empty": 0.05}, "planner far from z*"),
        ({"nll_posterior": 1.99, "delta_nll_shuffle": 0.001}, "plans ignored"),
    ):
        (tmp_path / "evaluate.json").write_text(json.dumps(good | change))
        assert set(findings(tmp_path)) == {"unfinished", *([rule] if rule else [])}


def test_what_was_not_measured_is_said(online, planner, tmp_path):
    """Logs and recipes of before the newer keys."""
    newer = ("delta_nll", "code_", "soft_hard", "grad_norm_", "heldout_nll_by", "em_", "plan_")
    for folder, missing in ((online, "codes collapsed"), (planner, "search undecided")):
        copy(folder, tmp_path, {})
        lines = [
            {key: x for key, x in line.items() if not key.startswith(newer)}
            for line in metrics(folder)
        ]
        (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
        recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
        recipe.pop("codes_per_concept", None)
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        found = examine(tmp_path)
        assert [one["rule"] for one in found["findings"]] == ["unfinished"]
        assert missing in {one["rule"] for one in found["unchecked"]}


def test_what_is_no_run_is_one_sentence(tmp_path, online):
    assert "is not a folder" in sememe("doctor", tmp_path / "nowhere", code=1)
    assert "has no metrics.jsonl" in sememe("doctor", tmp_path, code=1)
    (tmp_path / "metrics.jsonl").write_text((online / "metrics.jsonl").read_text())
    for text in (None, "[1, 2]", "rate: [", "rate: 1\n"):
        if text is not None:
            (tmp_path / "recipe.yaml").write_text(text)
        error = sememe("doctor", tmp_path, code=1)
        assert "holds no readable recipe" in error and "try: " in error and "\n" not in error


def test_the_document_is_made_of_the_rules():
    page = Path(__file__).parents[1] / "docs" / "doctor.md"
    assert page.read_text(encoding="utf-8") == doctor.document(), (
        "run: python -m sememe.report.doctor > docs/doctor.md"
    )
