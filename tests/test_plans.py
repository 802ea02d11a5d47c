"""What plans are worth, on a planner that has learned a task by them: evaluate, ablate, generate,
and what they refuse."""

import itertools
import json
import math
import re

import pytest
import torch

from conftest import run, sememe, tiny_recipe
from plan_runs import SAID, planner_recipe, write_pairs
from sememe.concepts.plan import NULL, PlanShape
from sememe.errors import DataError, SememeError
from sememe.evaluation.ablation import ablate_files
from sememe.evaluation.answers import Answers, ending
from sememe.evaluation.plan_ablation import dropped, plan_passes
from sememe.evaluation.plan_files import pair_form
from sememe.evaluation.plan_signals import plan_states, signal_figures
from sememe.evaluation.plans import IGNORED, other_plans, plan_figures, planned, target_nll
from sememe.generate import edit_plan
from sememe.models.loading import load_model
from sememe.models.planner.em import best_plans
from sememe.pairs import Pair, PairTensors, pair_tensors

SHAPE = PlanShape((4, 6), (1, 2))


@pytest.fixture(scope="module")
def runs(tmp_path_factory, base_folder):
    """A planner that has learned, and the control on the same pairs."""
    folder = tmp_path_factory.mktemp("plans")
    values = planner_recipe(base_folder, write_pairs(folder)) | {
        "steps": 40,
        "batch_size": 8,
        "learning_rate": 2e-2,
        "concept_learning_rate": 2e-2,
        "lora": {"rank": 8},
        "heldout_every": 40,
        "save_every": 40,
        "heldout_tokens": 160,
    }
    values["em"] |= {"every": 10}
    run(values, folder / "r")
    run(values | {"system": "control", "steps": 12}, folder / "r-control")
    return folder


@pytest.fixture(scope="module")
def loaded(runs):
    model, tokenizer = load_model(runs / "r")
    return model, tokenizer, pair_form(str(runs / "r")).load(str(runs / "heldout.jsonl"), tokenizer)


def test_the_task_is_solved_through_the_plan(runs):
    """Sources in words that were never trained on. 0.3 nats and more were seen at each place; a
    planner that its executor ignores has 0.0."""
    last = {
        key: value
        for line in map(json.loads, (runs / "r" / "metrics.jsonl").read_text().splitlines())
        for key, value in line.items()
    }
    assert last["heldout_nll"] < last["heldout_nll_empty"] - 0.2
    assert last["delta_nll_shuffle"] > 0.2 and last["delta_nll_random"] > 0.2
    assert last["heldout_plan_ids_used"][0] == 4, "four sentences, four ids"
    assert last["target_nll"] < 2.0 and last["plan_nll"] < 0.5
    for key in (
        "em_margin",
        "em_flips",
        "em_staleness",
        "em_score",
        "plan_entropy",
        "plan_max_prob",
        "soft_hard_cosine",
    ):
        assert math.isfinite(last[key]), key


def test_the_executor_sees_the_plan_and_not_the_source(loaded):
    model, _, pairs = loaded
    plan_NP = planned(model, pairs)
    other = type(pairs)(
        pairs.source_NU.roll(1, 0), pairs.source_mask_NU.roll(1, 0), pairs.target_NY
    )
    assert not torch.equal(plan_NP, planned(model, other))
    assert torch.equal(target_nll(model, pairs, plan_NP), target_nll(model, other, plan_NP)), (
        "u changed, z held"
    )
    assert not torch.equal(
        target_nll(model, pairs, plan_NP), target_nll(model, pairs, plan_NP.roll(1, 0))
    )
    with torch.no_grad():
        for batch in (1, 3):
            nll_NY = target_nll(model, pairs, plan_NP, batch)
            assert nll_NY.sum(1).tolist() == pytest.approx(
                (-model.target_log_prob(plan_NP, pairs.target_NY)).tolist(), rel=1e-4
            )


def test_plans_that_lie():
    plan = SHAPE.pack([[[0], [1, 2]], [[3], []], [[1], [5]], [[], [4, 4]]])
    shuffled, random, empty = (
        other_plans(plan, SHAPE, kind) for kind in ("shuffle", "random", "empty")
    )
    for other in (shuffled, random):
        assert torch.equal(other == NULL, plan == NULL), "lengths stay"
        SHAPE.check(other)
    for i in range(2):
        assert torch.equal(
            *(SHAPE.of_type(x, i).flatten().sort().values for x in (shuffled, plan))
        ), "within a type"
    assert bool((empty == NULL).all()) and torch.equal(
        other_plans(plan, SHAPE, "swap"), plan[[1, 2, 3, 0]]
    )
    assert not torch.equal(other_plans(plan, SHAPE, "random", 1), random) and plan[0].tolist() == [
        0,
        1,
        2,
    ]
    shares = [dropped(plan, share, 3) for share in (0, 0.25, 0.5, 1.0)]
    assert [int(x.sum()) for x in shares] == [0, 2, 4, 8]
    assert not any((a & ~b).any() for a, b in itertools.pairwise(shares)), "the same ones and more"
    assert torch.equal(shares[-1], plan != NULL)


def test_evaluate_gives_all_figures_together_over_equal_tokens(runs, loaded):
    printed = sememe(
        "evaluate",
        runs / "r",
        "--tokens",
        160,
        "--control",
        runs / "r-control",
        "--json",
        runs / "e.json",
    )
    result = json.loads((runs / "e.json").read_text())
    assert json.loads((runs / "r" / "evaluate.json").read_text()) == result
    names = ["planner", "posterior", "shuffle", "random", "empty", "source (control)"]
    assert [line["given"] for line in result["given"]] == names
    at = {line["given"]: line for line in result["given"]}
    assert (
        at["planner"]["nll"] == result["nll"] < at["empty"]["nll"] - 0.2
        and at["shuffle"]["delta_nll"] > 0.2
    )
    assert (
        result["nll_posterior"] == at["posterior"]["nll"]
        and at["posterior"]["plan_nats_per_token"] > 0
    )
    pairs = loaded[2]
    assert result["tokens"] == int((pairs.target_NY != IGNORED).sum()) and result["pairs"] == 8
    assert result["delta_nll_control"] == pytest.approx(result["nll"] - result["control_nll"])
    assert result["data"] == str(runs / "heldout.jsonl") and result["system"] == "planner"
    assert result["bits_per_byte"] == pytest.approx(
        result["nll"] * result["tokens"] / math.log(2) / (2 * sum(map(len, SAID.values()))),
        rel=1e-6,
    )
    assert len(result["samples"]) == 3 and result["samples"][0]["target"] == SAID["aa"]
    for word in ("planner", "posterior", "empty", "plan_ids_used"):
        assert word in printed
    alone = sememe("evaluate", runs / "r-control", "--tokens", 160, "--json", runs / "c.json")
    assert json.loads((runs / "c.json").read_text())["nll"] == pytest.approx(result["control_nll"])
    assert "source" in alone


def test_the_posterior_is_at_least_as_good_by_its_own_measure(loaded):
    model, _, pairs = loaded
    ticks: list[int] = []
    own, best = (
        planned(model, pairs),
        best_plans(model, pairs, {"proposers": {"edit": 8}}, ticks.append),
    )
    assert sum(ticks) == len(pairs)

    def score(plan):
        with torch.no_grad():
            return model.target_log_prob(plan, pairs.target_NY) + model.plan_log_prob(
                pairs.source_NU, pairs.source_mask_NU, plan
            )

    assert bool((score(best) >= score(own) - 1e-3).all())
    assert torch.equal(best, best_plans(model, pairs, {"proposers": {"edit": 8}}))
    assert "posterior" not in {line["given"] for line in plan_figures(model, pairs)["given"]}, (
        "only where it was searched for"
    )


@pytest.mark.parametrize(
    "text, words",
    [
        ("Every bim is a dol. Velko is a dol.", ["velko", "is", "dol"]),
        ("So it is 3 + 4.\n#### 7\n", ["7"]),
        ("no end", ["no", "end"]),
        ("Yes! No", ["no"]),
        ("", []),
        ("It cost 3.50. He paid 3.50", ["he", "paid", "350"]),
    ],
)
def test_an_answer_is_the_last_sentence(text, words):
    assert ending(text) == words


def test_right_answers_are_counted(runs, loaded):
    model, tokenizer, pairs = loaded
    texts = [SAID[key] for key in ("aa", "bb", "cc", "dd")] * 2
    asked = Answers(tokenizer, pairs, batch=3)

    class Writes:
        def __init__(self, words: list[str]):
            self.words, self.sources, self.config = iter(words), [], model.config

        def write(self, plan_BP, longest):
            return [
                tokenizer(next(self.words), add_special_tokens=False).input_ids[:longest]
                for _ in plan_BP
            ]

        def generate(self, ids_BU, attention_mask, **asked):
            self.sources += [
                row[kept.bool()].tolist() for row, kept in zip(ids_BU, attention_mask, strict=True)
            ]
            assert bool((attention_mask[:, -1] == 1).all())
            return torch.cat(
                [
                    ids_BU,
                    torch.tensor(
                        tokenizer([next(self.words) for _ in ids_BU], padding=True).input_ids
                    ),
                ],
                1,
            )

        device = model.device

    none = torch.full((8, 3), NULL)
    assert (
        asked.of_plans(Writes(texts), none) == 1.0
        and asked.of_plans(Writes(texts[1:] + texts[:1]), none) == 0.0
    )
    assert asked.of_plans(Writes([*texts[:6], "the cat", "The fish in this lake!"]), none) == 6 / 8
    reader = Writes(texts)
    sources = [
        row[kept.bool()].tolist()
        for row, kept in zip(pairs.source_NU, pairs.source_mask_NU, strict=True)
    ]
    assert asked.of_sources(reader) == 1.0 and reader.sources == [
        [model.bos, *row] for row in sources
    ]
    cut = PairTensors(
        pairs.source_NU,
        pairs.source_mask_NU,
        pairs.target_NY[:, : int((pairs.target_NY != IGNORED).sum(1).min())],
    )
    assert 0 < len(Answers(tokenizer, cut).right) < 8, "what was cut has lost its answer"
    with pytest.raises(DataError, match="longer target_length"):
        Answers(
            tokenizer, PairTensors(pairs.source_NU, pairs.source_mask_NU, pairs.target_NY[:, :3])
        )


def test_evaluate_counts_right_answers_beside_the_nll(runs):
    words = ("--tokens", 160, "--answers", "--search", 0, "--json", runs / "n.json")
    printed = sememe("evaluate", runs / "r", *words, "--control", runs / "r-control")
    result = json.loads((runs / "n.json").read_text())
    right = {line["given"]: line["right"] for line in result["given"]}
    assert [*right] == ["planner", "shuffle", "random", "empty", "source (control)"] and result[
        "answers"
    ] == 8
    assert (
        right["planner"] >= 0.75 and max(right["shuffle"], right["random"], right["empty"]) <= 0.5
    ), right
    assert "answers right" in printed
    sememe("evaluate", runs / "r-control", *words)
    assert (
        json.loads((runs / "n.json").read_text())["given"][0]["right"] == right["source (control)"]
    )


def asked_in(path) -> list[str]:
    return [json.loads(line)["instruction"] for line in path.read_text().splitlines()]


def test_probes_read_signals_off_the_plan_alone(runs, loaded):
    model, tokenizer, _ = loaded
    plan = SHAPE.pack([[[0], [1, 2]], [[3], []], [[], [5]]])
    x, table = plan_states(model, plan), [one.weight.detach() for one in model.plans.types]
    wanted = [
        torch.cat([table[0][0], table[1][[1, 2]].mean(0)]),
        torch.cat([table[0][3], torch.zeros_like(table[1][0])]),
        torch.cat([torch.zeros_like(table[0][0]), table[1][5]]),
    ]
    torch.testing.assert_close(x, torch.stack(wanted), atol=1e-5, rtol=1e-5)
    # The plan says which sentence is asked for; here other texts, which have signals, stand for the
    # four.
    of = {
        "aa": "It was 1969.",
        "bb": "We met Anna there.",
        "cc": "Why is it so?",
        "dd": "so it goes",
    }
    train, heldout = (
        pair_tensors(
            [Pair(asked, of[re.search("aa|bb|cc|dd", asked)[0]]) for asked in rows],
            tokenizer,
            12,
            24,
        )
        for rows in (asked_in(runs / "train.jsonl"), asked_in(runs / "heldout.jsonl"))
    )
    found = signal_figures(model, tokenizer, train, heldout)
    for name, base in (("number", 0.75), ("entity", 0.75), ("kind", 0.75)):
        assert found[name]["accuracy"] >= 0.875 and found[name]["base_accuracy"] == base, name
        assert (
            found[name]["loss"] < 0.7 * found[name]["base_loss"] and found[name]["auroc"] > 0.8
        ), name
    assert found["length"]["auroc"] is None and found["length"]["accuracy"] == 1.0, "all are short"
    moved = PairTensors(
        heldout.source_NU.roll(1, 0), heldout.source_mask_NU.roll(1, 0), heldout.target_NY
    )
    assert signal_figures(model, tokenizer, train, moved)["number"]["auroc"] < 0.6, (
        "the plan of another text"
    )
    with pytest.raises(DataError, match="at least 20"):
        signal_figures(model, tokenizer, heldout, heldout)
    sememe(
        "evaluate",
        runs / "r",
        "--tokens",
        160,
        "--search",
        0,
        "--signals",
        20,
        "--json",
        runs / "s.json",
    )
    assert [*json.loads((runs / "s.json").read_text())["signals"]] == [
        "length",
        "kind",
        "entity",
        "number",
        "terms",
    ]


def test_the_budget_is_a_dial_of_plans(runs):
    words = ("--tokens", 160, "--search", 0, "--json", runs / "b.json")
    lengths = {}
    for budget in (None, "1,1", "0"):
        sememe("evaluate", runs / "r", *words, *(() if budget is None else ("--rate", budget)))
        result = json.loads((runs / "b.json").read_text())
        lengths[budget] = result["plan_lengths"]
        assert result.get("budget") == {None: None, "1,1": [1, 1], "0": [0, 0]}[budget]
    assert lengths[None][1] > 1 >= max(lengths["1,1"]) and lengths["0"] == [0, 0]
    assert result["nll"] == pytest.approx(
        next(x["nll"] for x in result["given"] if x["given"] == "empty")
    )
    sememe("generate", runs / "r", "--prompt", "say aa", "--rate", "0,2", "--json", runs / "b.json")
    plan = json.loads((runs / "b.json").read_text())["plan"]
    assert plan[0] == [] and len(plan[1]) <= 2


def test_ablate_drops_and_swaps(runs):
    data = str(runs / "heldout.jsonl")
    result = ablate_files(str(runs / "r"), data, 160, shares=(0, 0.5, 1), seeds=2)
    assert json.loads((runs / "r" / "ablate.json").read_text()) == result
    drop = {one["share"]: one["delta_nll"] for one in result["drop"]}
    assert drop[0.0] == 0.0 < drop[0.5] < drop[1.0] == result["zero"]["delta_nll"]
    for kind in ("empty", "shuffle", "random", "swap"):
        assert result[kind]["delta_nll"] > 0.2
    assert result["swap"]["delta_nll_min"] == result["swap"]["delta_nll_max"]
    assert result["content"]["plans_words"] > result["content"]["own_words"]
    assert result["samples"][0]["plan_of"] != result["samples"][0]["source"]
    assert plan_passes((0, 0.5, 1), 2) == 2 + 3 + 2 * 2 + 2


def test_generate_shows_the_plan_and_edits_it(runs):
    words = (
        "generate",
        runs / "r",
        "--prompt",
        "say aa",
        "--max-new-tokens",
        24,
        "--json",
        runs / "g.json",
    )
    printed = sememe(*words, "--show-concepts")
    made = json.loads((runs / "g.json").read_text())
    assert (
        made["text"] in printed
        and len(made["plan"]) == 2
        and set(made) == {"prompt", "plan", "text", "new_tokens"}
    )
    assert re.search(rf"type 0 ⟨{made['plan'][0][0]}⟩", printed)
    plain = sememe(*words)
    assert "type 0" not in plain and made["text"] in plain
    sememe(*words[:3], "say bb", *words[4:])
    other = json.loads((runs / "g.json").read_text())
    edits = [f"{i}:{j}={x}" for i, ids in enumerate(other["plan"]) for j, x in enumerate(ids)]
    printed = sememe(*words, *(word for edit in edits for word in ("--edit", edit)))
    changed = json.loads((runs / "g.json").read_text())
    assert (
        changed["plan"] == made["plan"]
        and changed["text"] == made["text"]
        and changed["edits"] == edits
    )
    assert (
        changed["edited"]["plan"] == other["plan"]
        and changed["edited"]["text"] == other["text"] != made["text"]
    )
    assert made["text"] in printed and changed["edited"]["text"] in printed
    a, b = (sememe(*words, "--temperature", 1, "--seed", 3) for _ in range(2))
    assert a == b


def test_edits_of_a_plan():
    assert edit_plan([[1], [2]], ["0:0=3", "1:1=5"], SHAPE) == [[3], [2, 5]]
    assert edit_plan([[], []], ["1:0=5"], SHAPE) == [[], [5]]
    for word, said in (
        ("0=1", "need TYPE:SLOT=ID"),
        ("0:0=-1", "need TYPE:SLOT=ID"),
        ("2:0=1", "types 0 to 1"),
        ("0:0=4", "ids 0 to 3"),
        ("1:2=0", "slots 0 to 1"),
    ):
        with pytest.raises(SememeError, match=said) as caught:
            edit_plan([[1], [2]], [word], SHAPE)
        assert "try: " in str(caught.value) and "\n" not in str(caught.value)


def test_what_cannot_be_asked_of_a_planner_is_one_sentence(runs, base_folder, texts, tmp_path):
    planner, control, data = runs / "r", runs / "r-control", runs / "heldout.jsonl"
    (tmp_path / "one.jsonl").write_text(data.read_text().splitlines()[0])
    run(tiny_recipe(base_folder, texts) | {"system": "control", "steps": 1}, tmp_path / "plain")
    for words, said in (
        (("evaluate", planner, "--rate", 0.5), "whole numbers"),
        (("evaluate", tmp_path / "plain", "--answers"), "got --answers"),
        (("evaluate", control, "--signals", 40), "got --signals"),
        (("evaluate", control, "--rate", "1"), "got --rate"),
        (("evaluate", tmp_path / "plain", "--rate", "1"), "no concepts to set a rate for"),
        (("evaluate", planner, "--rate", "1,2,3"), "one for each of 2 types.*try: --rate 1,2"),
        (("generate", planner, "--prompt", "say aa", "--rate", "-1"), "of at least 0"),
        (("generate", planner, "--prompt", "say aa", "--rate", "a"), "need numbers"),
        (
            ("generate", control, "--prompt", "say aa", "--rate", "1"),
            "no concepts to set a rate for",
        ),
        (("evaluate", planner, "--data", runs / "train.jsonl"), "is what .* was trained on"),
        (("evaluate", planner, "--data", texts[1]), "is plain text, it has no fields"),
        (("evaluate", planner, "--control", planner), "is a planner: need a control"),
        (
            ("evaluate", planner, "--control", tmp_path / "plain"),
            "was not trained on pairs as these are",
        ),
        (("evaluate", base_folder), "got no --data"),
        (("ablate", base_folder), "got no --data"),
        (("ablate", control), "writes no plans to ablate"),
        (("ablate", planner, "--rate", 0.5), "got --rate"),
        (("ablate", planner, "--data", tmp_path / "one.jsonl"), "make one pair"),
        (("generate", planner, "--prompt", "say aa", "--edit", "5:0=1"), "types 0 to 1"),
        (
            ("generate", planner, "--prompt", "say aa", "--max-new-tokens", 400),
            "need at most 256 together",
        ),
        (("generate", planner, "--prompt", " "), "the prompt is empty"),
        (("generate", planner, "--prompt", "a", "--rate", 0.5), "whole numbers"),
        (("generate", control, "--prompt", "say aa", "--edit", "0:0=1"), "makes no plans"),
        (("export", planner, "--out", tmp_path / "x"), "cannot be folded"),
        (("benchmark", planner), "has no concepts to decode with"),
        (("reconstruct", planner, "--data", texts[1]), "cannot write a text again from codes"),
        (("compress", planner, texts[1], "--out", tmp_path / "c"), "is no compressor"),
    ):
        found = sememe(*words, code=1)
        assert re.search(said, found) and "try: " in found and "\n" not in found, (words, found)


def test_a_planner_by_its_model_folder_and_its_page(runs):
    sememe("evaluate", runs / "r" / "model", "--data", runs / "heldout.jsonl", "--tokens", 40)
    assert (
        "report:" in sememe("report", runs / "r")
        and (runs / "r" / "report.html").stat().st_size > 10_000
    )
