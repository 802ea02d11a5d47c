"""The page of a planner: its own wording and figures, from files that are whole, missing, or not
what they should be."""

import json
import math
import re

import pytest

from conftest import run as train
from plan_runs import planner_recipe, write_pairs
from sememe.evaluation.plan_files import evaluate_pair_files
from sememe.report import write_report
from sememe.report.files import read_metrics
from sememe.report.meanings import UNDESCRIBED
from sememe.report.plans import by_type, plan_tiles, plan_verdict, type_rows, types_of
from test_report import HOSTILE, Seen, write_metrics

EVALUATE = {
    "system": "planner", "data": "pairs.jsonl", "pairs": 40, "tokens": 2000, "nll": 2.5, "nll_posterior": 2.2, "control_nll": 2.4,
    "delta_nll_control": 0.1, "delta_nll_empty": 0.4, "delta_nll_shuffle": 0.6, "delta_nll_random": 0.9, "concept_rate": None,
    "given": [{"given": "planner", "nll": 2.5, "delta_nll": 0.0, "plan_nats_per_token": 0.2},
              {"given": "posterior", "nll": 2.2, "delta_nll": -0.3, "plan_nats_per_token": 0.5},
              {"given": "shuffle", "nll": 3.1, "delta_nll": 0.6, "plan_nats_per_token": None},
              {"given": "empty", "nll": 2.9, "delta_nll": 0.4, "plan_nats_per_token": None},
              {"given": "source (control)", "nll": 2.4, "delta_nll": -0.1, "plan_nats_per_token": None}],
    "plan_sizes": [64, 512], "plan_most": [2, 8], "plan_lengths": [2.0, 6.25], "posterior_lengths": [2.0, 5.5],
    "plan_ids_used": [33, 180], "plan_perplexity": [21.123456789, 140.0], "plan_entropy": 1.25, "plan_max_prob": 0.6,
    "nll_by_position": [{"from": 64 * i, "to": 64 * i + 64, "nll": 3 - 0.2 * i, "control_nll": 2.9 - 0.2 * i} for i in range(3)],
    "samples": [{"source": f"Write of {HOSTILE}", "plan": [[7, 7], [501]], "written": "A river ran.",
                 "target": "The river runs."},
                {"source": "Say nothing", "plan": [[], [3]], "written": "", "target": "Nothing."}],
}  # fmt: skip


def line(step: int) -> dict:
    """What a planner logs; searches and held-out figures now and then."""
    found = {
        "step": step,
        "tokens": 300 * step,
        "seconds": 2.0 * step,
        "loss": 3 + 4 * math.exp(-step / 20),
        "grad_norm": 1.0,
        "grad_norm_planner": 0.5,
        "grad_norm_executor": 0.8,
        "grad_norm_plans": 0.1,
        "target_nll": 2 + 3 * math.exp(-step / 20),
        "plan_nll": 1 + math.exp(-step / 20),
        "plan_match": 0.7,
        "plan_lengths": [2.0, 5.0],
        "plan_ids_used": [30, 90],
        "plan_perplexity": [20.0, 60.0 + step],
        "plan_largest_share": [0.1, 0.05],
        "plan_entropy_by_slot": [1.5, 1.25, None, 0.5],
        "plan_max_prob_by_slot": [0.5, 0.5, None, 0.8],
    }
    if step % 5 == 0:
        found |= {
            "em_score": -90 + step,
            "em_target": -80 + step,
            "em_plan": -10.0,
            "em_margin": 1 + step / 20,
            "em_flips": 4 / step,
            "em_staleness": 3 / step,
            "em_candidates": 9.0,
            "em_nll": 2.0,
            "em_nll_planner": 2.2,
            "em_nll_shuffle": 2.9,
        }
    if step % 10 == 0:
        found |= {
            "heldout_nll": 2.6,
            "delta_nll_shuffle": 0.5,
            "delta_nll_random": 0.8,
            "delta_nll_empty": 0.3,
            "plan_entropy": 1.3,
            "plan_max_prob": 0.55,
            "heldout_nll_by_position": [2.8, 2.5],
            "heldout_plan_lengths": [2.0, 6.0],
            "heldout_plan_ids_used": [20, 70],
            "heldout_plan_perplexity": [15.0, 50.0],
        }
    return found


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "planner"
    write_metrics(folder, [line(step) for step in range(1, 41)])
    (folder / "recipe.yaml").write_text("system: planner\n")
    (folder / "evaluate.json").write_text(json.dumps(EVALUATE))
    return folder


def page(folder) -> str:
    return write_report(folder).read_text()


def test_the_page_speaks_of_plans(run):
    html = page(run)
    for said in (
        "plans before it writes",
        "What the plans do",
        "What the text is written from",
        "z*, found with the target in view",
        "the source itself (control)",
        "Plans and what is written from them",
        "Planner against z*",
        "Margin and flips",
        "Staleness gap",
        "Ids in use",
        "How sure the planner is",
        "Entropy by place",
        "Held-out NLL by position",
        "keeps 57.1 % of what z* is worth",
        "33 of 64 · 180 of 512",
        "21.12 · 140",
        "type 1",
    ):
        assert said in html, said
    for said in (
        "How texts are cut",
        "word pieces",
        "Tail length",
        "Concept rate",
        "decode speed-up",
        "What the concepts do",
        UNDESCRIBED,
    ):
        assert said not in html, said
    # Example plans, a concept of one colour wherever it stands.
    assert (
        len(re.findall(r'<span class="seg" style="--h:[\d.]+">7</span>', html)) == 2
        and ">501</span>" in html
    )
    assert "A river ran." in html and "The river runs." in html
    assert HOSTILE not in html and "&lt;script&gt;" in html
    ids = re.findall(r'\bid="([^"]+)"', html)
    assert len(ids) == len(set(ids))
    seen = Seen(html)
    assert "script" not in seen.tags and HOSTILE in seen.text and not seen.open, (
        "text is text, and all that is opened is closed"
    )


def test_without_an_evaluation_training_is_shown(run):
    (run / "evaluate.json").unlink()
    html = page(run)
    assert (
        "plans before it writes" in html
        and "Entropy by place" in html
        and "Margin and flips" in html
    )
    assert "sememe evaluate" in html and "not measured" in html and "Ids by type" in html, (
        "those of held-out plans in training"
    )
    assert "What the text is written from" not in html


@pytest.mark.parametrize("junk", [None, 7, "text", [], [None, 3], {"a": 1}, [[]], [{}]])
def test_unexpected_shapes_draw_nothing(run, junk):
    keys = (
        "given",
        "samples",
        "plan_sizes",
        "plan_most",
        "plan_lengths",
        "plan_ids_used",
        "plan_perplexity",
        "posterior_lengths",
        "nll_by_position",
        "nll",
        "plan_entropy",
    )
    (run / "evaluate.json").write_text(json.dumps(EVALUATE | dict.fromkeys(keys, junk)))
    strange = (
        "plan_perplexity",
        "plan_entropy_by_slot",
        "plan_lengths",
        "heldout_plan_ids_used",
        "em_flips",
        "em_margin",
    )
    write_metrics(run, [{"step": 1, "loss": 1.0, **dict.fromkeys(strange, junk)}])
    assert "plans before it writes" in page(run)


@pytest.mark.parametrize(
    "shuffle, empty, tone",
    [
        (0.3, 0.2, "good"),
        (0.3, 0.05, "fair"),
        (0.3, -0.1, "fair"),
        (0.001, 0.4, "poor"),
        (0.0, 0.0, "poor"),
        (None, 0.4, "unknown"),
        (0.4, None, "unknown"),
    ],
)
def test_verdict(shuffle, empty, tone):
    assert plan_verdict({"delta_nll_shuffle": shuffle, "delta_nll_empty": empty})[0] == tone


def test_tiles():
    assert [tile.tone for tile in plan_tiles(EVALUATE, line(40))] == [
        "fair",
        "good",
        "good",
        "good",
        "good",
        "fair",
    ]
    assert {tile.tone for tile in plan_tiles({}, {})} == {"unknown"}
    lost = EVALUATE | {"delta_nll_empty": -0.2, "delta_nll_shuffle": 0.05}
    found = {tile.title: tile for tile in plan_tiles(lost, {"em_flips": 0.9})}
    assert [
        found[title].tone
        for title in ("shuffling cost", "cost of no plan", "gap to z*", "flips at the last search")
    ] == ["fair", "poor", "poor", "poor"]
    assert found["gap to z*"].reading == "keeps 0 % of what z* is worth"


def test_types_are_those_of_the_files(run):
    assert type_rows(EVALUATE, {})[1] == ["1", "512", "180", "140", "8", "6.25", "5.5"]
    assert type_rows({}, line(40))[0] == ["0", "n/a", "20", "15", "n/a", "2", "2"]
    log = read_metrics(run)
    assert types_of(log) == 2 and by_type(log).points("step", "plan_perplexity.1")[-1] == (
        40,
        100.0,
    )


def test_a_real_run_has_no_key_that_the_page_does_not_know(base_folder, tmp_path):
    files = write_pairs(tmp_path)
    em = {"every": 2, "proposers": {"edit": 2, "beam": 2}, "warmup": 0.0, "distil": 0.0}
    train(
        planner_recipe(base_folder, files) | {"steps": 4, "save_every": 1000, "em": em},
        tmp_path / "r",
    )
    assert (
        evaluate_pair_files(str(tmp_path / "r"), [str(files[1])], tokens=40)["system"] == "planner"
    )
    html = page(tmp_path / "r")
    assert UNDESCRIBED not in html and "Planner against z*" in html and "gap to z*" in html
