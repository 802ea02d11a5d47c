"""The doctor on planners: every rule on a real tiny run that was made sick on purpose, and healthy
runs that are called healthy.

Four sentences are asked for by name, so that a plan that tells the name is worth about a nat
(plan_runs.py). Findings beside the one looked for are allowed: a sick run is seldom sick in one
way. Runs are as short as their fault allows."""

import json
import math
import random

import pytest
import torch

from conftest import metrics, run, sememe
from plan_runs import SAID, planner_recipe, write_pairs
from sememe.concepts.plan import PlanShape
from sememe.models.planner import PlannerOutput
from sememe.report.doctor import RULES, examine
from sememe.training import plans
from sememe.training.recipe import load_recipe
from test_doctor import ALPHABET, chain, findings

SETTINGS = {
    "batch_size": 8,
    "learning_rate": 2e-2,
    "concept_learning_rate": 2e-2,
    "lora": {"rank": 8},
    "log_every": 2,
    "save_every": 1000,
    "heldout_tokens": 160,
}


@pytest.fixture(scope="module")
def clinic(tmp_path_factory, base_folder):
    """A function: name, changes of the recipe → the run folder, trained."""
    folder = tmp_path_factory.mktemp("clinic")
    said = write_pairs(folder)

    def trained(
        name: str,
        rows: dict | None = None,
        steps: int = 16,
        em: dict | None = None,
        plan: dict | None = None,
        **changes,
    ):
        files = said
        if rows is not None:
            files = tuple(folder / f"{name}-{part}.jsonl" for part in rows)
            for file, pairs in zip(files, rows.values(), strict=True):
                file.write_text(
                    "".join(json.dumps({"instruction": u, "response": y}) + "\n" for u, y in pairs)
                )
        values = (
            planner_recipe(base_folder, files)
            | SETTINGS
            | {"steps": steps, "heldout_every": steps}
            | changes
        )
        values["em"] |= {"every": 4, "warmup": 0.1, "distil": 0.1, **(em or {})}
        values["plan"] = values["plan"] | (plan or {})
        run(values, folder / name)
        return folder / name

    return trained


@pytest.fixture(scope="module")
def healthy(clinic):
    return clinic(
        "healthy", steps=30, heldout_every=15, em={"proposers": {"beam": 4, "sample": 2, "edit": 4}}
    )


def test_a_healthy_planner_is_called_healthy(healthy, tmp_path):
    """Flips fall, the margin settles, and the planner's plans do what z* does."""
    assert findings(healthy) == {}
    printed = sememe("doctor", healthy, "--json", tmp_path / "d.json")
    assert "is healthy at step 30" in printed
    unchecked = {one["rule"] for one in json.loads((tmp_path / "d.json").read_text())["unchecked"]}
    assert unchecked == {"only the opening improves", "soft and hard concepts apart"}, (
        "targets are short; no straight-through"
    )
    searches = [line for line in metrics(healthy) if "em_flips" in line]
    assert searches[0]["em_flips"] > 0.2 > searches[-1]["em_flips"]
    assert searches[-1]["em_margin"] > 2 * searches[0]["em_margin"]
    # What stands in a line fits together: of the few pairs that the planner plans, and of the plans
    # trained on.
    last, sizes, lengths = searches[-1], (4, 6), (1, 2)
    assert (
        last["em_nll"] <= last["em_nll_planner"] + 1e-6
        and last["em_nll"] < last["em_nll_shuffle"] - 0.1
    )
    for i, (size, most) in enumerate(zip(sizes, lengths, strict=True)):
        assert (
            last["plan_perplexity"][i] <= last["plan_ids_used"][i] + 1e-6 <= size + 1e-6
            and last["plan_lengths"][i] <= most
        )
        assert 1 / size <= last["plan_largest_share"][i] < 0.8
    assert len(last["plan_entropy_by_slot"]) == len(last["plan_max_prob_by_slot"]) == 3
    assert (
        all(0 <= x <= math.log(7) for x in last["plan_entropy_by_slot"])
        and 0.8 < last["plan_match"] <= 1
    )
    assert math.hypot(
        *(last[f"grad_norm_{part}"] for part in ("planner", "executor", "plans"))
    ) == pytest.approx(last["grad_norm"], rel=1e-3)


def test_what_the_finished_model_does_goes_before_what_it_did_in_training(healthy, tmp_path):
    """evaluate.json of held-out pairs, where z* is found with the targets in view."""
    for name in ("recipe.yaml", "metrics.jsonl"):
        (tmp_path / name).write_text((healthy / name).read_text())
    good = {"nll": 2.0, "nll_posterior": 1.5, "delta_nll_empty": 0.5, "delta_nll_shuffle": 0.4}
    for figures, rule in (
        (good, None),
        (good | {"delta_nll_empty": 0.05}, "planner far from z*"),
        (good | {"nll_posterior": 1.99, "delta_nll_shuffle": 0.001}, "plans ignored"),
    ):
        (tmp_path / "evaluate.json").write_text(json.dumps(figures))
        assert set(findings(tmp_path)) == {"unfinished", *([rule] if rule else [])}


def test_text_that_needs_no_plan_leaves_it_ignored_and_the_search_undecided(clinic, monkeypatch):
    """Sources that say nothing, targets that go on from their own last character, and plans that
    start at random."""
    monkeypatch.setattr(
        plans,
        "piece_plans",
        lambda model, pairs, seed: torch.cat(
            [
                torch.randint(size, (len(pairs), most))
                for size, most in zip(
                    model.plans.shape.sizes, model.plans.shape.lengths, strict=True
                )
            ],
            1,
        ),
    )
    draw = random.Random(5)
    rows = {
        part: [
            ("".join(draw.choices(ALPHABET, k=4)), chain(24, seed + i, 0.95)) for i in range(count)
        ]
        for part, count, seed in (("train", 64, 100), ("heldout", 8, 900))
    }
    found = findings(
        clinic(
            "ignored",
            rows,
            steps=24,
            em={
                "warmup": 0.25,
                "distil": 0.25,
                "every": 3,
                "planner_weight": 0.0,
                "proposers": {"sample": 8},
            },
        )
    )
    assert found["plans ignored"]["evidence"]["delta_nll_shuffle"] < 0.02, (
        "shuffling costs nothing; it may even help"
    )
    assert "plan.lengths=[2, 4]" in found["plans ignored"]["try"]
    undecided = found["search cannot decide"]
    assert undecided["evidence"]["em_margin"] < 0.5 and undecided["evidence"]["em_flips"] > 0.4
    assert undecided["try"][:3] == ["em.proposers.edit=4", "em.proposers.diverse=4", "em.every=2"]


def test_a_planner_that_is_sure_of_one_plan_from_the_start(clinic, monkeypatch):
    """All pairs start from the same plan; candidates come from the planner alone."""
    real = plans.piece_plans
    monkeypatch.setattr(
        plans, "piece_plans", lambda *rest: (x := real(*rest))[:1].expand_as(x).clone()
    )
    found = findings(
        clinic(
            "stuck",
            em={"warmup": 0.25, "distil": 0.5, "every": 2, "proposers": {"beam": 2, "sample": 4}},
        )
    )
    stuck = found["search is stuck early"]
    assert stuck["evidence"]["em_flips"] == 0 and stuck["evidence"]["candidates that differ"] < 0.5
    assert "em.proposers.diverse=4" in stuck["try"] and "plan.weight=0.3" in stuck["try"]
    collapsed = found["concepts collapsed"]["evidence"]
    assert (
        collapsed["plan_perplexity of type 0"] == 1
        and collapsed["plan_largest_share of type 0"] == 1
    )
    assert collapsed["plan_perplexity of type 1"] <= 2, (
        "two ids that always stand together are one plan"
    )


def test_steps_too_large_between_searches_leave_plans_stale(clinic):
    """Sources that say nothing: the planner swings between the plans it met last."""
    draw = random.Random(5)
    rows = {
        part: [
            ("".join(draw.choices(ALPHABET, k=8)), text)
            for _ in range(count)
            for text in SAID.values()
        ]
        for part, count in (("train", 16), ("heldout", 1))
    }
    found = findings(
        clinic(
            "stale", rows, steps=20, learning_rate=4e-2, concept_learning_rate=4e-2, em={"every": 8}
        )
    )
    gap = found["plans are stale"]
    assert gap["evidence"]["em_staleness"] > gap["evidence"]["em_margin"]
    assert gap["try"] == ["em.every=4", "learning_rate=0.012"]


def test_plans_that_serve_the_opening_alone(clinic):
    """Behind the first 64 characters stands what nobody can predict, and in held-out texts by other
    characters."""
    draw = random.Random(5)

    def rows(forms, noise):
        return [
            (form.format(key), (4 * text)[:64] + "".join(draw.choices(noise, k=32)))
            for form in forms
            for key, text in SAID.items()
        ]

    pairs = {
        "train": rows(("say {}", "{}!", "now {}", "{} please"), ALPHABET),
        "heldout": rows(("I want {}", "{} now"), ALPHABET.upper()),
    }
    found = findings(
        clinic(
            "opening", pairs, target_length=96, heldout_tokens=700, heldout_every=8, em={"every": 0}
        )
    )
    falls = found["only the opening improves"]
    assert (
        falls["evidence"]["fall of the first bucket"] > 10 * falls["evidence"]["fall of the others"]
    )
    assert falls["try"] == ["curriculum={start: 24, until: 0.8}", "plan.lengths=[2, 4]"]


def test_a_planner_that_does_not_learn_is_far_from_what_the_search_finds(clinic):
    """The executor lives on z*, and the planner has no gradient: posterior collapse the other way.
    The plans are not ignored, though shuffling the planner's own costs nothing."""
    folder = clinic("unlearnt", plan={"weight": 0.0}, em={"warmup": 0.25, "distil": 0.25})
    found = findings(folder)
    far = found["planner far from z*"]["evidence"]
    assert far["with the planner's plan"] > far["NLL with z*"] + 0.3
    assert "plan.weight=1" in found["planner far from z*"]["try"]
    assert found["no gradient"]["evidence"] == {"grad_norm_planner / grad_norm": 0.0}
    assert metrics(folder)[-1]["delta_nll_shuffle"] < 0.02 and "plans ignored" not in found


def test_a_soft_mixture_far_from_the_concepts_that_are_read(clinic):
    apart = findings(
        clinic(
            "hot", steps=6, code_temperature=100.0, plan={"straight_through": True}, em={"every": 0}
        )
    )["soft and hard concepts apart"]
    assert apart["evidence"]["soft_hard_cosine"] < 0.5 and apart["try"] == ["code_temperature=1"]


def test_what_a_planner_has_not_measured_is_said(healthy, tmp_path):
    """A run without E-steps, of before the newer keys."""
    newer = ("em_", "plan_", "delta_nll", "grad_norm_")
    lines = [
        {key: value for key, value in line.items() if not key.startswith(newer)}
        for line in metrics(healthy)
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "recipe.yaml").write_text((healthy / "recipe.yaml").read_text())
    found = examine(tmp_path)
    assert [one["rule"] for one in found["findings"]] == ["unfinished"]
    assert found["passed"] == [
        "not finite",
        "loss does not fall",
        "held-out text gets worse",
        "gradient explodes",
    ]
    assert any("no E-step has measured it" in one["because"] for one in found["unchecked"])
    assert (
        load_recipe(healthy / "recipe.yaml").system == "planner"
        and sum("planner" in rule.systems for rule in RULES) == 14
    )


def test_the_meter_is_the_naive_count():
    """Two batches in one interval; a type that ends early asks for its `<EOS>`, and nothing behind
    it."""
    shape, generator = PlanShape((3, 5), (1, 2)), torch.Generator().manual_seed(0)
    batches = [shape.pack([[[0], [4]], [[2], [1, 3]]]), shape.pack([[[0], []]])]
    meter, rows, ids = plans.PlanMeter(shape), [], [[], []]
    for plan_BP in batches:
        logits = torch.randn(len(plan_BP), 5, 6, generator=generator)
        logits[:, :2, 3:5] = -torch.inf  # type 0 has three ids
        meter.see(
            PlannerOutput(
                target_nll=torch.tensor(1.0),
                plan_nll=torch.tensor(2.0),
                plan_logits=logits,
                plan_ids=plan_BP,
            ),
            torch.zeros(len(plan_BP), 4, dtype=torch.long),
        )
        for row, told in enumerate(shape.unpack(plan_BP)):
            for i, (concepts, size, most) in enumerate(
                zip(told, shape.sizes, shape.lengths, strict=True)
            ):
                ids[i] += concepts
                for place, want in enumerate([*concepts, 5][:most]):
                    p = logits[row, 2 * i + place, [*range(size), 5]].softmax(-1)
                    rows.append(
                        (
                            shape.offset(i) + place,
                            -float((p * p.log()).sum()),
                            float(p.max()),
                            int(logits[row, 2 * i + place].argmax()) == want,
                        )
                    )
    found = meter.read()
    for slot in range(3):
        mine = [row for row in rows if row[0] == slot]
        assert found["plan_entropy_by_slot"][slot] == pytest.approx(
            sum(x[1] for x in mine) / len(mine), rel=1e-5
        )
        assert found["plan_max_prob_by_slot"][slot] == pytest.approx(
            sum(x[2] for x in mine) / len(mine), rel=1e-5
        )
    assert found["plan_match"] == pytest.approx(sum(x[3] for x in rows) / len(rows))
    assert found["plan_ids_used"] == [2, 3] and found["plan_largest_share"] == pytest.approx(
        [2 / 3, 1 / 3]
    )
    assert found["plan_perplexity"] == pytest.approx(
        [math.exp(math.log(3) - 2 / 3 * math.log(2)), 3.0]
    )
    assert meter.read() == {}, "an interval is read once"
