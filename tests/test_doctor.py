"""The doctor: every rule on a real tiny run that was made sick on purpose, and healthy runs that
are called healthy.

The text is a chain, each character mostly followed by its successor, so that a code that tells the
character is worth about a nat. Findings beside the one looked for are allowed: a sick run is seldom
sick in one way."""

import json
import random

import pytest
import torch
import yaml

from conftest import ctrl_c, metrics, run, sememe
from sememe.concepts.gate import RateGate
from sememe.errors import Interrupted, TrainingError
from sememe.models import OnlineForCausalLM
from sememe.report.doctor import RULES, examine
from sememe.training.recipe import load_recipe

PLAIN = {
    "boundary": "null",
    "codes_per_concept": 1,
    "bridge": False,
    "concept_dropout": 0.0,
}  # whatever a recipe's defaults may be
SHORT = {"steps": 20, "heldout_every": 5}  # enough for faults that are there from the start
ALPHABET = "abcdefghijklmnopqrstuvwxyz0123456789.,:;"


def chain(length: int, seed: int, share: float = 0.85) -> str:
    """Text in which that share of the characters is followed by its one successor."""
    draw, successor = random.Random(seed), list(range(len(ALPHABET)))
    random.Random(0).shuffle(successor)
    one, out = 0, []
    for _ in range(length):
        out.append(ALPHABET[one])
        one = successor[one] if draw.random() < share else draw.randrange(len(ALPHABET))
    return "".join(out)


def openings(blocks: int, seed: int) -> str:
    """Blocks of 128 characters: half a chain, and half that nobody can predict."""
    draw, text = random.Random(seed), chain(64 * blocks, seed, 0.98)
    return "".join(
        text[64 * i : 64 * i + 64] + "".join(draw.choices(ALPHABET, k=64)) for i in range(blocks)
    )


@pytest.fixture(scope="module")
def clinic(tmp_path_factory, base_folder):
    """A function: name, changes of the recipe → the run folder, trained."""
    folder = tmp_path_factory.mktemp("clinic")
    texts = {
        "train": chain(24000, 1),
        "heldout": chain(2000, 2),
        "stutter": "".join(6 * one for one in chain(400, 3)),
        "openings": openings(200, 1),
        "openings-heldout": openings(8, 2),
    }
    for name, text in texts.items():
        (folder / f"{name}.txt").write_text(text)

    def trained(
        name: str, heldout: str = "heldout", text: str = "train", settings: dict = PLAIN, **changes
    ):
        values = {
            "system": "online",
            "base": str(base_folder),
            "split": {"shallow": 1, "middle": 2, "deep": 1},
            "precision": "fp32",
            "data": {
                "train": str(folder / f"{text}.txt"),
                "heldout": str(folder / f"{heldout}.txt"),
            },
            "rate": 0.5,
            "max_tail": 6,
            "num_concepts": 64,
            "steps": 36,
            "sequence_length": 128,
            "batch_size": 4,
            "log_every": 2,
            "heldout_every": 9,
            "heldout_tokens": 512,
            "save_every": 1000,
            "calibration_tokens": 2048,
            "learning_rate": 1e-2,
            "schedule": {"quantise": [0.1, 0.3]},
            **settings,
            **changes,
        }
        run(values, folder / name)
        return folder / name

    trained.folder = folder
    return trained


@pytest.fixture(scope="module")
def healthy(clinic):
    """With the recipe's own defaults."""
    return clinic("healthy", settings={})


def findings(run) -> dict[str, dict]:
    """Rule → what it found. What is to be tried must be a recipe that could be trained, and not the
    one that was."""
    found = examine(run)
    recipe = load_recipe(run / "recipe.yaml")
    for one in found["findings"]:
        assert "{" not in one["sign"] and one["advice"]
        for override in one["try"]:
            assert load_recipe(run / "recipe.yaml", [override]) != recipe, override
    named = (
        [one["rule"] for one in found["findings"]]
        + found["passed"]
        + [one["rule"] for one in found["unchecked"]]
    )
    assert sorted(named) == sorted(
        rule.name for rule in RULES if found["system"] in rule.systems
    ), "every rule says something"
    return {one["rule"]: one for one in found["findings"]}


def test_a_healthy_run_is_called_healthy(healthy, tmp_path):
    assert findings(healthy) == {}
    printed = sememe("doctor", healthy, "--json", tmp_path / "d.json")
    assert "is healthy at step 36" in printed and "not checked" not in printed
    found = json.loads((tmp_path / "d.json").read_text())
    assert found["healthy"] and found["unchecked"] == []
    assert found["passed"] == [rule.name for rule in RULES if "online" in rule.systems]


def test_systems_without_concepts_are_asked_what_concerns_them(clinic):
    assert findings(clinic("control", system="control", **SHORT)) == {}


def test_learning_rates_of_nothing_are_a_loss_that_does_not_fall(clinic):
    """The stride, since a gate that moves a little moves the held-out NLL of a random base by
    0.03."""
    found = findings(
        clinic("still", learning_rate=1e-7, concept_learning_rate=1e-7, boundary="fixed", **SHORT)
    )
    still = found["loss does not fall"]
    assert still["evidence"]["heldout_nll late"] == pytest.approx(
        still["evidence"]["heldout_nll early"], abs=0.01
    )
    assert "learning_rate=3e-07" in still["try"]


def test_a_collapsed_codebook(clinic, monkeypatch, tmp_path):
    """One code whose bias outweighs all: shuffling codes costs exactly nothing. The command line
    shows it and ends with 1."""
    real = OnlineForCausalLM.start_codes

    def collapse(self, ids, seed=0):
        found = real(self, ids, seed)
        with torch.no_grad():
            self.writer.head.codes[0].bias[3] += 1e4
        return found

    monkeypatch.setattr(OnlineForCausalLM, "start_codes", collapse)
    run = clinic("collapsed", **SHORT)
    found = findings(run)
    assert found["codes collapsed"]["evidence"]["largest_code_share"] == 1.0
    assert found["codes collapsed"]["step"] == 20 and "gumbel=1" in found["codes collapsed"]["try"]
    assert found["codes ignored"]["evidence"]["delta_nll_shuffle"] == 0.0
    assert found["sure too early"]["step"] == 5
    printed = sememe("doctor", run, "--json", tmp_path / "d.json", code=1)
    assert (
        "3 findings at step 20" in printed
        and "CODES COLLAPSED" in printed
        and "gumbel=1" in printed
    )
    assert json.loads((tmp_path / "d.json").read_text())["findings"] == list(found.values())

    cured = {"target_rate": 0.5, "delta_nll_shuffle": 1.0, "delta_nll_zero": 1.0}
    (run / "evaluate.json").write_text(json.dumps(cured))
    assert "codes ignored" not in findings(run), (
        "figures of the finished model go before those of its training"
    )
    (run / "evaluate.json").write_text(json.dumps({**cured, "delta_nll_zero": 0.01}))
    ignored = findings(run)["codes ignored"]
    assert ignored["step"] is None and ignored["evidence"] == {
        "delta_nll_shuffle": 1.0,
        "delta_nll_zero": 0.01,
    }
    (run / "evaluate.json").write_text(json.dumps({**cured, "target_rate": 0.25}))
    assert findings(run)["codes ignored"]["step"] == 20, (
        "those at another setting of the dial do not count"
    )


def test_a_mixture_far_from_its_codes(clinic):
    apart = findings(clinic("hot", code_temperature=100.0, **SHORT))["soft and hard codes apart"]
    assert apart["evidence"]["soft_hard_cosine"] < 0.9 and apart["try"] == ["code_temperature=1"]


def test_a_choice_too_cold_to_learn_is_sure_and_gets_no_gradient(clinic):
    """The stride, so that the head has no gradient from the gate either."""
    found = findings(clinic("cold", code_temperature=1e-3, boundary="fixed", **SHORT))
    assert set(found["no gradient"]["evidence"]) == {"grad_norm_head / grad_norm"}
    assert (
        found["no gradient"]["try"]
        == found["sure too early"]["try"]
        == ["code_temperature=1", "gumbel=1"]
    )


def test_an_exploding_gradient(clinic):
    found = findings(
        clinic("wild", learning_rate=2.5e-2, lora={"rank": 32, "alpha": 64.0}, seed=1)
    )["gradient explodes"]
    assert found["evidence"]["grad_norm late"] > 3 * found["evidence"]["grad_norm early"]
    assert "learning_rate=0.0075" in found["try"]


def test_a_loss_that_is_no_number_stops_the_run_and_says_why(clinic, tmp_path):
    with pytest.raises(TrainingError):
        clinic("mad", learning_rate=1e20)
    found = findings(clinic.folder / "mad")
    assert "the loss is nan" in found["not finite"]["advice"] and found["not finite"]["try"] == [
        "learning_rate=1e+19"
    ]
    assert "unfinished" in found
    printed = sememe("doctor", clinic.folder / "mad", code=1)
    assert (
        "not checked: codes ignored (no delta_nll_shuffle at the final rate and quantise" in printed
    )


def test_a_figure_that_is_no_number_is_found(healthy, tmp_path):
    """A held-out NLL that overflows does not stop a run."""
    lines = (healthy / "metrics.jsonl").read_text().splitlines()
    broken = json.loads(lines[-1]) | {"heldout_nll": float("inf")}
    (tmp_path / "metrics.jsonl").write_text("\n".join([*lines[:-1], json.dumps(broken)]))
    (tmp_path / "recipe.yaml").write_text((healthy / "recipe.yaml").read_text())
    assert findings(tmp_path)["not finite"]["evidence"] == {"heldout_nll": 1}


def test_a_run_that_was_stopped(clinic):
    with ctrl_c(4), pytest.raises(Interrupted):
        clinic("stopped")
    found = findings(clinic.folder / "stopped")
    assert set(found) == {"unfinished"} and found["unfinished"]["evidence"] == {"steps": 36}
    assert found["unfinished"]["step"] == 4


def test_a_gate_that_is_forced_shut(clinic, monkeypatch):
    """Scores never reach the threshold: what is written are the sinks and the forced concepts, 1 in
    max_tail + 1."""
    monkeypatch.setattr(RateGate, "track", lambda self, score: None)
    monkeypatch.setattr(RateGate, "calibrate", lambda self, score: self.quantiles.fill_(1e6))
    off = findings(clinic("shut", **SHORT))["rate off the dial"]
    assert off["evidence"]["rate"] == pytest.approx(1 / 7, abs=0.01)
    assert off["evidence"]["heldout_rate"] == pytest.approx(1 / 7, abs=0.01)


def test_a_gate_without_feedback_on_other_text(clinic, monkeypatch):
    """Held-out text in which every character comes six times: what was learnt is of no use there,
    and neighbours are too much alike for the threshold."""
    real = RateGate.__init__

    def deaf(self, *args, **kwargs):
        real(self, *args, **kwargs)
        self.feedback = 0.0

    monkeypatch.setattr(RateGate, "__init__", deaf)
    found = findings(clinic("astray", heldout="stutter"))
    rates = found["train rate is not held-out rate"]["evidence"]
    assert abs(rates["rate"] - rates["heldout_rate"]) > 0.05
    gap = found["held-out far above training"]["evidence"]
    assert gap["heldout_nll"] > gap["loss"] + 0.5


def test_held_out_text_that_gets_worse(clinic):
    """Equal characters in another order: what is learnt first helps, and what comes then is wrong
    there."""
    (clinic.folder / "backwards.txt").write_text(chain(2000, 2)[::-1])
    run = clinic("by-heart", heldout="backwards", steps=48, heldout_every=4, system="control")
    rises = findings(run)["held-out text gets worse"]["evidence"]
    measured = {line["step"]: line["heldout_nll"] for line in metrics(run) if "heldout_nll" in line}
    assert rises["heldout_nll at best"] == min(measured.values()) == measured[rises["at step"]]
    assert rises["heldout_nll at last"] == measured[48] > rises["heldout_nll at best"] + 0.1
    assert (
        "steps=48"
        != f"steps={rises['at step']}"
        in {x for one in examine(run)["findings"] for x in one["try"]}
    )


def test_concepts_that_serve_the_opening_alone(clinic):
    falls = findings(clinic("openings", heldout="openings-heldout", text="openings", steps=48))[
        "only the opening improves"
    ]
    assert (
        falls["evidence"]["fall of the first bucket"] > 10 * falls["evidence"]["fall of the others"]
    )


def test_what_an_older_run_did_not_measure_is_said(healthy, tmp_path):
    """Without the newer keys of log and recipe, the rules that need them say so, and the others
    still look."""
    newer = ("delta_nll", "code_entropy", "soft_hard", "largest", "grad_norm_", "heldout_nll_by")
    lines = [
        {key: value for key, value in line.items() if not key.startswith(newer)}
        for line in metrics(healthy)
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    recipe = yaml.safe_load((healthy / "recipe.yaml").read_text())
    for key in (
        "distil",
        "codes_per_concept",
    ):
        recipe.pop(key)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    found = examine(tmp_path)
    assert [one["rule"] for one in found["findings"]] == ["unfinished"]
    assert {one["rule"] for one in found["unchecked"]} == {
        "no gradient",
        "codes ignored",
        "codes collapsed",
        "soft and hard codes apart",
        "sure too early",
        "only the opening improves",
    }


def test_what_is_no_run_is_one_sentence(tmp_path, healthy):
    assert "is not a folder" in sememe("doctor", tmp_path / "nowhere", code=1)
    assert "has no metrics.jsonl" in sememe("doctor", tmp_path, code=1)
    (tmp_path / "metrics.jsonl").write_text((healthy / "metrics.jsonl").read_text())
    for text in (None, "[1, 2]", "rate: [", "system: online\nrate: much\n"):
        if text is not None:
            (tmp_path / "recipe.yaml").write_text(text)
        said = sememe("doctor", tmp_path, code=1)
        assert "recipe.yaml holds no readable" in said and "try: " in said and "\n" not in said
