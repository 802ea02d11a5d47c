"""Questions on a graph: one answer each, equal for equal seeds, of the requested size, graded by
one sentence."""

import importlib
import json
import re
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from sememe.errors import DataError
from sememe.evaluation.answers import final_sentence
from sememe.pairs import read_pairs

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
prosqa = importlib.import_module("make_prosqa")


@pytest.fixture(scope="module")
def questions() -> list:
    return prosqa.generate(200, seed=3)


def distance(question, start: int, end: int) -> int | None:
    level, steps, seen = {start}, 0, set()
    while level and end not in level:
        seen |= level
        level, steps = {b for a, b in question.edges if a in level} - seen, steps + 1
    return steps if level else None


SIZES = ((3, 6), (17, 28), False), ((3, 6), (17, 28), True), (1, 4, False), (2, (6, 8), True)


@pytest.mark.parametrize(("hops", "nodes", "even"), SIZES)
def test_each_question_has_one_answer_and_steps_of_the_shortest_length(hops, nodes, even):
    low, high = (hops, hops) if isinstance(hops, int) else hops
    for question in prosqa.generate(10, 1, hops, nodes, even):
        prosqa.check(question)
        names, root, reached = question.idx_to_symbol, question.root, question.reached()
        assert distance(question, root, question.target) == len(question.steps)
        assert low <= len(question.steps) <= high
        assert distance(question, root, question.neg_target) is None
        assert not {question.target, question.neg_target} & {a for a, _ in question.edges}
        near = [distance(question, root, names.index(name)) for name in reached]
        assert near == sorted(near), "breadth first"
        assert reached[-1] == names[question.target]
        people = [n for n, word in enumerate(names) if word.istitle()]
        away = [distance(question, n, question.neg_target) for n in people]
        assert not even or min(filter(None, away)) == len(question.steps), "distance tells nothing"


def test_sizes_are_those_of_prosqa_and_words_are_known(questions):
    """Its validation part: 22.8 nodes, 36.3 edges, 2.5 people, 3.8 hops; either candidate first."""

    def mean(numbers):
        return sum(numbers) / len(questions)

    assert 22 < mean(len(q.idx_to_symbol) for q in questions) < 23.5
    assert 34 < mean(len(q.edges) for q in questions) < 38
    assert 2.3 < mean(sum(word.istitle() for word in q.idx_to_symbol) for q in questions) < 2.8
    assert 3.5 < mean(len(q.steps) for q in questions) < 4
    assert 0.35 < mean(f"{q.idx_to_symbol[q.target]} or" in q.question for q in questions) < 0.65
    assert prosqa.generate(20, seed=3) == questions[:20], "a longer list begins alike"
    other = prosqa.generate(60, seed=4)
    words = [{word for q in part for word in q.idx_to_symbol} for part in (other, questions)]
    assert other[:20] != questions[:20] and words[0] == words[1]


def test_what_no_graph_fits_is_refused():
    for said, *asked in (("hops = 0", 0, 20), ("nodes = 3", 3, 3), ("10 nodes", 4, (9, 20), True)):
        with pytest.raises(DataError, match=said):
            prosqa.generate(1, 0, *asked)


def test_check_finds_each_fault(questions):
    it = questions[0]
    root, words = it.idx_to_symbol[it.root], it.idx_to_symbol
    for said, change in (
        ("right answer cannot", {"edges": [x for x in it.edges if x[1] != it.target]}),
        ("wrong answer can", {"edges": [*it.edges, (it.root, it.neg_target)]}),
        ("a person is called", {"question": it.question.replace("Every ", "", 1)}),
        ("answer is not its target", {"answer": f"{root} is a {words[0]}."}),
        ("steps are no chain", {"steps": it.steps[1:]}),
        ("outside its", {"target": len(words)}),
    ):
        with pytest.raises(DataError, match=said):
            prosqa.check(replace(it, **change))


def test_the_script_writes_pairs_and_converts(tmp_path, questions):
    def script(*words) -> None:
        prosqa.main(prosqa.parser.parse_args(list(map(str, words))))

    def pairs(name: str) -> list:
        return read_pairs(str(out / f"{name}.jsonl"), ("instruction", "response"))

    out, real = tmp_path / "out", tmp_path / "real.json"
    script(out, "--count", 30, "--heldout", 10, "--hops", 1, 2, "--nodes", 5, 6, "--even")
    train, heldout = pairs("train"), pairs("heldout")
    assert (len(train), len(heldout)) == (30, 10) and not set(train) & set(heldout)
    assert all(re.fullmatch(r"[A-Z]\w+ is a \w+\.", pair.target) for pair in train)
    real.write_text(json.dumps([asdict(q) for q in questions[:3]]))
    script(out, "--convert", real, "--thought", "steps")
    for pair, question in zip(pairs("real"), questions[:3], strict=True):
        assert pair.target == question.response("steps")
        assert final_sentence(pair.target) == final_sentence(question.answer)
    for content in (None, "{", "[{}]"):
        real.write_text(content) if content else real.unlink()
        with pytest.raises(DataError, match="no ProsQA file"):
            script(out, "--convert", real)
