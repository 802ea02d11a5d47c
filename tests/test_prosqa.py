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
    while level:
        if end in level:
            return steps
        seen |= level
        level, steps = {b for a, b in question.edges if a in level} - seen, steps + 1
    return None


def test_each_question_has_one_answer_and_steps_of_the_shortest_length(questions):
    for question in questions:
        prosqa.check(question)
        assert distance(question, question.root, question.target) == len(question.steps)
        assert distance(question, question.root, question.neg_target) is None
        assert not {question.target, question.neg_target} & {a for a, _ in question.edges}
        names, nodes = question.idx_to_symbol, question.reached()
        near = [distance(question, question.root, names.index(name)) for name in nodes]
        assert near == sorted(near), "breadth first"
        assert nodes[-1] == names[question.target]


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


@pytest.mark.parametrize(("hops", "nodes"), [(1, 4), (2, (6, 8)), ((3, 6), (17, 28))])
def test_sizes_hold_and_even_questions_tell_nothing_by_distance(hops, nodes):
    for even in (False, True):
        for question in prosqa.generate(10, 1, hops, nodes, even):
            prosqa.check(question)
            low, high = (hops, hops) if isinstance(hops, int) else hops
            assert low <= len(question.steps) <= high
            people = [n for n, word in enumerate(question.idx_to_symbol) if word.istitle()]
            away = [distance(question, n, question.neg_target) for n in people]
            assert not even or min(filter(None, away)) == len(question.steps)


@pytest.mark.parametrize(
    ("hops", "nodes", "even", "words"),
    [(0, 20, False, "hops = 0"), (3, 3, False, "nodes = 3"), (4, (9, 20), True, "at least 10")],
)
def test_what_no_graph_fits_is_refused(hops, nodes, even, words):
    with pytest.raises(DataError, match=words):
        prosqa.generate(1, 0, hops, nodes, even)


def test_check_finds_each_fault(questions):
    question = questions[0]
    symbols, root = question.idx_to_symbol, question.root
    faults = {
        "right answer cannot": {"edges": [x for x in question.edges if x[1] != question.target]},
        "wrong answer can": {"edges": [*question.edges, (root, question.neg_target)]},
        "a person is called": {"question": question.question.replace("Every ", "", 1)},
        "answer is not its target": {"answer": f"{symbols[root]} is a {symbols[0]}."},
        "steps are no chain": {"steps": question.steps[1:]},
        "outside its": {"target": len(symbols)},
    }
    for words, change in faults.items():
        with pytest.raises(DataError, match=words):
            prosqa.check(replace(question, **change))


def test_the_script_writes_pairs_and_converts(tmp_path, questions):
    def script(*words) -> None:
        prosqa.main(prosqa.parser.parse_args([str(word) for word in words]))

    def pairs(name: str) -> list:
        return read_pairs(str(tmp_path / "out" / f"{name}.jsonl"), ("instruction", "response"))

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
