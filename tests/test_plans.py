"""What plans are worth, on a planner that has learned a task by them, with all that is harder than
the default (test_doctor trains that): evaluate, ablate, and what they refuse."""

import json
import math
import re
from dataclasses import replace
from functools import partial

import pytest
import torch

from conftest import run, sememe, tiny_recipe
from plan_runs import SAID, planner_recipe, write_pairs
from sememe.concepts.plan import NULL, PlanShape
from sememe.errors import DataError
from sememe.evaluation import ablation, plans
from sememe.evaluation.answers import Answers, final_sentence
from sememe.evaluation.plans import IGNORED, evaluate_plans, other_plans, signal_figures
from sememe.evaluation.subject import Options, Subject
from sememe.generate import edit_plan
from sememe.measure import ablate
from sememe.models.planner.em import greedy_plans
from sememe.pairs import Pair, PairTensors, pair_tensors

SHAPE = PlanShape((4, 6), (1, 2))


@pytest.fixture(scope="module")
def runs(tmp_path_factory, base_folder, texts):
    """A planner that has learned, the control on the same pairs, and one on plain text."""
    folder = tmp_path_factory.mktemp("plans")
    values = planner_recipe(base_folder, write_pairs(folder)) | {"steps": 40, "batch_size": 8}
    values |= {"heldout_every": 40, "save_every": 40, "heldout_tokens": 160, "lora": {"rank": 8}}
    values |= {"learning_rate": 2e-2, "concept_learning_rate": 2e-2}
    values["plan"] |= {"parallel": True, "multi_token": 2, "straight_through": True}
    values["em"] |= {"every": 10}
    run(values, folder / "r")
    run(values | {"system": "control", "steps": 12}, folder / "r-control")
    run(tiny_recipe(base_folder, texts) | {"system": "control", "steps": 1}, folder / "plain")
    return folder


@pytest.fixture(scope="module")
def loaded(runs):
    subject = Subject.load(str(runs / "r"), Options(tokens=160))
    return subject, subject.heldout(str(runs / "heldout.jsonl"))


def test_the_task_is_solved_through_the_plan(runs):
    """Sources in words that were never trained on. 0.8 nats and more were seen at each place; a
    planner that its executor ignores has 0.0."""
    lines = map(json.loads, (runs / "r" / "metrics.jsonl").read_text().splitlines())
    last = {key: value for line in lines for key, value in line.items()}
    assert last["heldout_nll"] < last["heldout_nll_empty"] - 0.2
    assert last["delta_nll_shuffle"] > 0.2 and last["delta_nll_random"] > 0.2
    assert last["heldout_plan_ids_used"][0] == 4, "four sentences, four ids"
    assert last["target_nll"] < 2.0 and last["plan_nll"] < 0.5


def test_plans_that_lie():
    plan = SHAPE.pack([[[0], [1, 2]], [[3], []], [[1], [5]], [[], [4, 4]]])
    shuffled, random = (other_plans(plan, SHAPE, kind) for kind in ("shuffle", "random"))
    for other in (shuffled, random):
        assert torch.equal(other == NULL, plan == NULL), "lengths stay"
        SHAPE.check(other)
    for i in range(2):
        ids = (x.split(SHAPE.lengths, 1)[i].flatten().sort().values for x in (shuffled, plan))
        assert torch.equal(*ids), "within a type"
    assert bool((other_plans(plan, SHAPE, "empty") == NULL).all())
    assert torch.equal(other_plans(plan, SHAPE, "swap"), plan[[1, 2, 3, 0]])
    assert not torch.equal(other_plans(plan, SHAPE, "random", 1), random)


def test_evaluate_gives_all_figures_together_over_equal_tokens(runs, loaded, monkeypatch):
    words = ("--tokens", 160, "--json", runs / "e.json")
    printed = sememe("evaluate", runs / "r", *words, "--control", runs / "r-control")
    result = json.loads((runs / "e.json").read_text())
    assert json.loads((runs / "r" / "evaluate.json").read_text()) == result
    given = {line["given"]: line for line in result["given"]}
    assert [*given] == ["planner", "posterior", "shuffle", "random", "empty", "source (control)"]
    assert given["planner"]["nll"] == result["nll"] < given["empty"]["nll"] - 0.2
    assert given["shuffle"]["delta_nll"] > 0.2
    assert result["nll_posterior"] == given["posterior"]["nll"]
    assert given["posterior"]["plan_nats_per_token"] > 0
    model, pairs = loaded[0].model, loaded[1]
    assert result["tokens"] == int((pairs.target_NY != IGNORED).sum()) and result["pairs"] == 8
    assert result["delta_nll_control"] == pytest.approx(result["nll"] - result["control_nll"])
    bits = result["nll"] * result["tokens"] / math.log(2)
    num_bytes = 2 * sum(map(len, SAID.values()))
    assert result["bits_per_byte"] == pytest.approx(bits / num_bytes, rel=1e-6)
    assert len(result["samples"]) == 3 and result["samples"][0]["target"] == SAID["aa"]
    want = model.target_nll(greedy_plans(model, pairs), pairs.target_NY).sum() / result["tokens"]
    monkeypatch.setattr(plans, "PAIRS", 3)
    again = evaluate_plans(*loaded, None)
    assert again["nll"] == pytest.approx(float(want), rel=1e-4) == result["nll"], "in any batches"
    assert "posterior" not in {line["given"] for line in again["given"]}
    alone = sememe("evaluate", runs / "r-control", *words)
    control = json.loads((runs / "e.json").read_text())
    assert control["nll"] == pytest.approx(result["control_nll"]) and "source" in alone
    assert "posterior" in printed and "report:" in sememe("report", runs / "r")
    sememe("evaluate", runs / "r" / "model", "--data", runs / "heldout.jsonl", "--tokens", 40)


def test_an_answer_is_the_final_sentence():
    assert final_sentence("Every bim is a dol. Velko is a dol.") == ["velko", "is", "dol"]
    assert final_sentence("It cost 3.50. He paid 3.50") == ["he", "paid", "350"]
    assert final_sentence("So it is 3 + 4.\n#### 7\n") == ["7"]
    assert final_sentence("Yes! No") == ["no"] and final_sentence("") == []


def test_right_answers_are_counted(runs, loaded):
    tokenizer, pairs = loaded[0].tokenizer, loaded[1]
    texts = [SAID[key] for key in ("aa", "bb", "cc", "dd")] * 2
    answers = Answers(tokenizer, pairs)

    def written(texts: list[str], index_B) -> list[list[int]]:
        return [tokenizer(texts[n]).input_ids for n in index_B]

    assert answers.right(partial(written, texts)) == 1.0
    assert answers.right(partial(written, texts[1:] + texts[:1])) == 0.0
    others = [*texts[:6], "the cat", "The fish in this lake!"]
    assert answers.right(partial(written, others)) == 0.75
    width = int((pairs.target_NY != IGNORED).sum(1).min())
    cut, cut_short = (replace(pairs, target_NY=pairs.target_NY[:, :n]) for n in (width, 3))
    assert 0 < len(Answers(tokenizer, cut).answers) < 8, "what was cut has lost its answer"
    with pytest.raises(DataError, match="longer target_length"):
        Answers(tokenizer, cut_short)
    words = ("--tokens", 160, "--answers", "--search", 0, "--json", runs / "n.json")
    sememe("evaluate", runs / "r", *words, "--control", runs / "r-control")
    result = json.loads((runs / "n.json").read_text())
    right = {line["given"]: line["right"] for line in result["given"]}
    assert [*right] == ["planner", "shuffle", "random", "empty", "source (control)"]
    assert result["answers"] == 8 and right["planner"] >= 0.75 and right["empty"] <= 0.5


def test_probes_read_signals_off_the_plan_alone(runs, loaded):
    model, tokenizer = loaded[0].model, loaded[0].tokenizer
    # The plan says which sentence it is; here other texts, which have signals, stand for the four.
    others = ("It was 1969.", "We met Anna there.", "Why is it so?", "so it goes")
    texts = dict(zip(SAID, others, strict=True))

    def pairs(name: str) -> PairTensors:
        lines = (runs / f"{name}.jsonl").read_text().splitlines()
        sources = [json.loads(line)["instruction"] for line in lines]
        rows = [Pair(x, texts[re.search("aa|bb|cc|dd", x)[0]]) for x in sources]
        return pair_tensors(rows, tokenizer, 12, 24)

    train, heldout = pairs("train"), pairs("heldout")
    signals = signal_figures(model, tokenizer, train, heldout)
    for name in ("number", "entity", "kind"):
        signal = signals[name]
        assert signal["accuracy"] >= 0.875 and signal["base_accuracy"] == 0.75, name
        assert signal["loss"] < 0.7 * signal["base_loss"], name
    moved = replace(heldout, target_NY=heldout.target_NY.roll(1, 0))
    assert signal_figures(model, tokenizer, train, moved)["number"]["accuracy"] <= 0.75
    with pytest.raises(DataError, match="at least 20"):
        signal_figures(model, tokenizer, heldout, heldout)
    words = ("--tokens", 160, "--search", 0, "--signals", 20)
    assert "entity" in sememe("evaluate", runs / "r", *words)


def test_the_budget_bounds_plans(runs):
    words = ("--tokens", 160, "--search", 0, "--json", runs / "b.json")
    for budget, limits in (("1,1", [1, 1]), ("0", [0, 0])):
        sememe("evaluate", runs / "r", *words, "--rate", budget)
        result = json.loads((runs / "b.json").read_text())
        assert max(result["plan_lengths"]) <= max(limits) and result["budget"] == limits
    empty = next(line["nll"] for line in result["given"] if line["given"] == "empty")
    assert result["nll"] == pytest.approx(empty)


def test_ablate_drops_and_swaps(runs, monkeypatch):
    monkeypatch.setattr(ablation, "SHARES", (0.0, 0.5))
    result = ablate(str(runs / "r"), str(runs / "heldout.jsonl"), Options(tokens=160))
    assert json.loads((runs / "r" / "ablate.json").read_text()) == result
    drop = {point["share"]: point["delta_nll"] for point in result["drop"]}
    assert drop[0.0] == 0.0 < drop[0.5] < result["zero"]["delta_nll"]
    for kind in ("empty", "shuffle", "random", "swap"):
        assert result[kind]["delta_nll"] > 0.2
    assert result["swap"]["delta_nll_min"] == result["swap"]["delta_nll_max"]
    assert result["samples"][0]["plan_of"] != result["samples"][0]["source"]


def test_generate_shows_the_plan_and_edits_it(runs):
    words = ("--max-new-tokens", 24, "--json", runs / "g.json")

    def generated(prompt: str, *more) -> tuple[str, dict]:
        printed = sememe("generate", runs / "r", "--prompt", prompt, *words, *more)
        return printed, json.loads((runs / "g.json").read_text())

    printed, first = generated("say aa", "--show-concepts")
    assert first["text"] in printed and f"type 0 ⟨{first['plan'][0][0]}⟩" in printed
    _, other = generated("say bb")
    edits = [f"{i}:{j}={x}" for i, ids in enumerate(other["plan"]) for j, x in enumerate(ids)]
    options = (word for edit in edits for word in ("--edit", edit))
    printed, changed = generated("say aa", *options)
    assert changed["plan"] == first["plan"] and changed["text"] == first["text"]
    assert changed["edited"]["plan"] == other["plan"]
    assert changed["edited"]["text"] == other["text"] != first["text"]
    a, b = (generated("say aa", "--temperature", 1, "--seed", 3) for _ in range(2))
    assert a == b
    assert generated("say aa", "--rate", "0,2")[1]["plan"][0] == []
    assert edit_plan([[], [2]], ["0:0=3", "1:1=5"], SHAPE) == [[3], [2, 5]], "or longer"


@pytest.mark.parametrize(
    "words, message",
    [
        ("evaluate RUN --rate 0.5", "whole numbers"),
        ("evaluate RUN --rate 1,2,3", "one for each of 2 types.*try: --rate 1,2"),
        ("evaluate RUN --data TRAIN", "is what .* was trained on"),
        ("evaluate RUN --data TEXT", "has no field 'instruction'"),
        ("evaluate RUN --control RUN", "is a planner: need a control"),
        ("evaluate RUN --control PLAIN", "was not trained on pairs as these are"),
        ("evaluate CONTROL --signals 40", "got --signals"),
        ("generate RUN --prompt aa --edit 0=1", "need TYPE:SLOT=ID"),
        ("generate RUN --prompt aa --edit 2:0=1", "types 0 to 1"),
        ("generate RUN --prompt aa --edit 0:0=4", "ids 0 to 3"),
        ("generate RUN --prompt aa --edit 0:1=0", "slots 0 to 0"),
        ("generate RUN --prompt aa --max-new-tokens 400", "positions for 256"),
        ("export RUN --out NEW", "cannot be folded"),
        ("benchmark RUN", "cannot be timed"),
        ("reconstruct RUN --data TEXT", "cannot write a text again from codes"),
        ("compress RUN TEXT --out NEW", "is no compressor"),
    ],
)
def test_what_says_nothing_about_a_planner_is_one_sentence(runs, texts, tmp_path, words, message):
    known = {"RUN": runs / "r", "CONTROL": runs / "r-control", "PLAIN": runs / "plain"}
    known |= {"TRAIN": runs / "train.jsonl", "TEXT": texts[1], "NEW": tmp_path / "new"}
    printed = sememe(*(known.get(word, word) for word in words.split()), code=1)
    assert re.search(message, printed) and "try: " in printed and "\n" not in printed, printed
