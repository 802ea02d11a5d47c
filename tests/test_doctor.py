"""The doctor: healthy runs of every kind are called healthy, and each rule finds what it is for.

Three runs are really made sick. The other signs are written into the log of a healthy run. The text
is a chain, each character mostly followed by its successor, so that a code that tells the character
is worth about a nat; pairs ask for one of four sentences by name (plan_runs.py)."""

import json
import math
import random
import shutil
from pathlib import Path

import pytest

from conftest import metrics, run, sememe, tiny_recipe
from plan_runs import planner_recipe, write_pairs
from sememe import figures
from sememe.errors import TrainingError
from sememe.models import OnlineForCausalLM
from sememe.options import load_recipe
from sememe.report import doctor, write_report
from sememe.report.doctor import examine
from sememe.report.files import read_run
from sememe.report.rules import RULES

SHORT = {"steps": 20, "heldout_every": 5}  # enough for faults that are there from the start
ALPHABET = "abcdefghijklmnopqrstuvwxyz0123456789.,:;"
LONG = {"steps": 36, "sequence_length": 128, "batch_size": 4, "heldout_every": 9}
LONG |= {"num_concepts": 64, "heldout_tokens": 512, "save_every": 1000, "lora": {"rank": 8}}
LONG |= {"calibration_tokens": 2048, "learning_rate": 1e-2, "quantise": [0.1, 0.3]}
PLANNER = {"steps": 30, "heldout_every": 15, "batch_size": 8, "heldout_tokens": 160}
PLANNER |= {"learning_rate": 2e-2, "concept_learning_rate": 2e-2, "save_every": 1000}
PLANNER |= {"lora": {"rank": 8}, "plan": {"sizes": [4, 6], "lengths": [1, 2]}}
EM = {"every": 4, "stages": [0.1, 0.2], "batch": 16}


def chain(length: int, seed: int) -> str:
    """Text in which most characters are followed by their one successor."""
    draw, places = random.Random(seed), [0]
    successor = random.Random(0).sample(range(len(ALPHABET)), len(ALPHABET))
    for _ in range(length - 1):
        is_chained = draw.random() < 0.85
        places.append(successor[places[-1]] if is_chained else draw.randrange(len(ALPHABET)))
    return "".join(ALPHABET[place] for place in places)


@pytest.fixture(scope="module")
def clinic(tmp_path_factory, base_folder):
    """A function: name, changes of the recipe of its system → the run folder, trained."""
    folder = tmp_path_factory.mktemp("clinic")
    train, heldout = texts = folder / "train.txt", folder / "heldout.txt"
    train.write_text(chain(24000, seed=1))
    heldout.write_text(chain(2000, seed=2))
    recipes = {"planner": planner_recipe(base_folder, write_pairs(folder)) | PLANNER}

    def trained(name: str, system: str = "online", **changes) -> Path:
        values = recipes.get(system, tiny_recipe(base_folder, texts) | LONG)
        run(values | {"system": system} | changes, folder / name)
        return folder / name

    trained.folder = folder
    return trained


@pytest.fixture(scope="module")
def online(clinic):
    return clinic("healthy")


@pytest.fixture(scope="module")
def planner(clinic):
    proposers = {"beam": 4, "sample": 2, "edit": 4}
    return clinic("planner", "planner", em=EM | {"proposers": proposers})


def findings(folder: Path) -> dict[str, dict]:
    """Rule → what it found. What is to be tried must be a recipe that could be trained, and not the
    one that was."""
    diagnosis, recipe = examine(read_run(folder)), load_recipe(folder / "recipe.yaml")
    for override in (x for finding in diagnosis["findings"] for x in finding["try"]):
        assert load_recipe(folder / "recipe.yaml", [override]) != recipe, override
    judged = diagnosis["findings"] + diagnosis["unchecked"]
    rules = {rule.name for rule in RULES if diagnosis["system"] in rule.systems}
    assert {*diagnosis["passed"], *(rule["rule"] for rule in judged)} == rules, "all are heard"
    return {finding["rule"]: finding for finding in diagnosis["findings"]}


def test_healthy_runs_are_called_healthy(clinic, online, planner, tmp_path):
    for folder in (online, planner, clinic("control", "control", **SHORT)):
        assert findings(folder) == {}
        # and figures.toml knows every key that they log
        assert figures.figure("new").meaning not in write_report(folder).read_text()
    printed = sememe("doctor", online, "--json", tmp_path / "d.json")
    assert "healthy at step 36" in printed and "not checked" not in printed
    diagnosis = json.loads((tmp_path / "d.json").read_text())
    assert diagnosis["healthy"] and diagnosis["unchecked"] == []


def test_a_collapsed_codebook_is_found(clinic, monkeypatch, tmp_path):
    """One code whose bias outweighs all: shuffling codes costs exactly nothing. The command line
    shows it and ends with 1."""
    real = OnlineForCausalLM.start_codes

    def collapse(self, *rest, **named):
        found = real(self, *rest, **named)
        self.writer.head.logits[0].bias.data[3] += 1e4
        return found

    monkeypatch.setattr(OnlineForCausalLM, "start_codes", collapse)
    folder = clinic("collapsed", head="joint", codes_per_concept=1, **SHORT)
    sick = findings(folder)
    assert sick["codes collapsed"]["evidence"]["largest_code_share.late"] == 1.0
    assert sick["codes ignored"]["evidence"]["delta_nll_shuffle.final"] == 0.0
    printed = sememe("doctor", folder, "--json", tmp_path / "d.json", code=1)
    assert "CODES COLLAPSED" in printed and "gumbel=1" in printed
    assert json.loads((tmp_path / "d.json").read_text())["findings"] == list(sick.values())
    assert "few codes do all the work" in write_report(folder).read_text()


def test_a_planner_that_does_not_learn_is_found(clinic):
    """The executor lives on z*, and the planner has no gradient: plans are not ignored, though
    shuffling the planner's own costs nothing."""
    em = EM | {"stages": [0.25, 0.5], "proposers": {"beam": 2, "sample": 1, "edit": 2}}
    plan = PLANNER["plan"] | {"weight": 0.0}
    changes = {"steps": 16, "heldout_every": 8, "em": em, "plan": plan}
    sick = findings(clinic("unlearned", "planner", **changes))
    assert sick["no gradient"]["evidence"] == {"grad_norm_planner.late": 0.0}
    assert sick["planner far from z*"]["try"] and "plans ignored" not in sick


def test_a_loss_that_is_no_number_stops_the_run_and_says_why(clinic):
    with pytest.raises(TrainingError):
        clinic("mad", learning_rate=1e20)
    sick = findings(clinic.folder / "mad")
    assert sick["not finite"]["try"] == ["learning_rate=1e+19"] and "unfinished" in sick
    assert "not checked: codes ignored" in sememe("doctor", clinic.folder / "mad", code=1)


def log(folder: Path, lines: list[dict]) -> None:
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))


def copy(folder: Path, to: Path, change: dict) -> Path:
    """The log and recipe of a healthy run with `change` in every line: values, or functions of how
    far the line stands (0 to 1)."""
    lines = metrics(folder)
    for i, line in enumerate(lines):
        at = i / (len(lines) - 1)
        line |= {key: x(at) if callable(x) else x for key, x in change.items()}
    log(to, lines)
    shutil.copy(folder / "recipe.yaml", to)
    return to


FIRST = {"heldout_nll_by_position": lambda at: [3 - at, 3.0]}
IDLE = {"delta_nll_shuffle": 0.0, "delta_nll_zero": 1.0}
STUCK = {"em_flips": 0.0, "em_candidates": 2.0, "plan_entropy_by_slot": [0.0, None]}
FAR = {"em_nll": 1.0, "em_nll_planner": 2.0, "em_nll_shuffle": 2.0}
SIGNS = {
    "online": (
        ("not finite", "learning_rate=0.001", {"heldout_nll": math.inf}),
        ("loss does not fall", "learning_rate=0.03", {"heldout_nll": 3.0, "loss": 3.0}),
        ("held-out far above training", "steps=18", {"heldout_nll": 3.0, "loss": 2.0}),
        ("held-out text gets worse", "steps=18", {"heldout_nll": lambda at: 3 + at}),
        ("gradient explodes", "learning_rate=0.003", {"grad_norm": lambda at: 1 + 9 * at}),
        ("no gradient", "gumbel=1", {"grad_norm_head": 0.0, "grad_norm": 1.0}),
        ("rate off target", "boundary=fixed", {"rate": 0.14, "heldout_rate": 0.14}),
        ("codes ignored", "rate=0.75", IDLE),
        ("codes collapsed", "num_concepts=16", {"largest_code_share": 0.9}),
        ("soft and hard codes apart", "code_temperature=0.5", {"soft_hard_cosine": 0.5}),
        ("sure too early", "code_temperature=2.0", {"code_entropy": 0.0}),
        ("only the opening improves", "sequence_length=64", FIRST),
    ),
    "planner": (
        ("plans ignored", "plan.lengths=[2, 4]", {"delta_nll_shuffle": 0.0, "em_nll": 9.0}),
        ("search undecided", "em.every=2", {"em_margin": 0.1, "em_flips": 0.7}),
        ("search stuck early", "em.proposers.diverse=4", STUCK),
        ("plans stale", "em.every=2", {"em_staleness": 3.0, "em_margin": 1.0}),
        ("planner far from z*", "em.planner_weight=2.0", FAR),
        ("ids collapsed", "em.proposers.sample=4", {"plan_largest_share": [1.0, 0.2]}),
        ("only the opening improves", "plan.lengths=[2, 4]", FIRST),
    ),
}


@pytest.mark.parametrize("run, sign", [(run, sign) for run in SIGNS for sign in SIGNS[run]])
def test_signs_in_the_log(request, tmp_path, run, sign):
    rule, override, change = sign
    sick = findings(copy(request.getfixturevalue(run), tmp_path, change))
    assert override in sick[rule]["try"] and sick[rule]["evidence"] and sick[rule]["advice"]
    assert "unfinished" in sick


TEXT = {"target_rate": 0.5, "delta_nll_shuffle": 1.0, "delta_nll_zero": 1.0}
PLAN = {"nll": 2.0, "nll_posterior": 1.5, "delta_nll_empty": 0.5, "delta_nll_shuffle": 0.4}
FINISHED = (
    ("online", IDLE, TEXT, []),
    ("online", {}, TEXT | {"delta_nll_zero": 0.01}, ["codes ignored"]),
    ("online", IDLE, TEXT | {"target_rate": 0.25}, ["codes ignored"]),  # of another rate
    ("planner", {}, PLAN, []),
    ("planner", {}, PLAN | {"delta_nll_empty": 0.05}, ["planner far from z*"]),
    ("planner", {}, PLAN | {"nll_posterior": 1.99, "delta_nll_shuffle": 0}, ["plans ignored"]),
)


@pytest.mark.parametrize("run, logged, measured, rules", FINISHED)
def test_the_finished_model_goes_before_its_training(
    request, tmp_path, run, logged, measured, rules
):
    copy(request.getfixturevalue(run), tmp_path, logged)
    (tmp_path / "evaluate.json").write_text(json.dumps(measured))
    assert {*findings(tmp_path)} == {*rules, "unfinished"}


def test_the_document_is_made_of_the_rules():
    page = (Path(__file__).parents[1] / "docs" / "doctor.md").read_text(encoding="utf-8")
    assert page == doctor.document(), "run: python -m sememe.report.doctor > docs/doctor.md"
