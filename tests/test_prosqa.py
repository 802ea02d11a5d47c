"""Questions on a graph: one answer each, equal for equal seeds, of the requested size, graded by
one sentence."""

import importlib
import json
import re
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from sememe.errors import DataError
from sememe.evaluation.answers import final_sentence
from sememe.pairs import read_pairs

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
prosqa = importlib.import_module("make_prosqa")


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


def test_the_script_writes_pairs_and_converts(tmp_path):
    questions = prosqa.generate(3, seed=3)

    def script(*words) -> None:
        prosqa.main(prosqa.parser.parse_args(list(map(str, words))))

    def pairs(name: str) -> list:
        return read_pairs(str(out / f"{name}.jsonl"), ("instruction", "response"))

    out, real = tmp_path / "out", tmp_path / "real.json"
    script(out, "--count", 30, "--heldout", 10, "--hops", 1, 2, "--nodes", 5, 6, "--even")
    train, heldout = pairs("train"), pairs("heldout")
    assert (len(train), len(heldout)) == (30, 10) and not set(train) & set(heldout)
    assert all(re.fullmatch(r"[A-Z]\w+ is a \w+\.", pair.target) for pair in train)
    real.write_text(json.dumps([asdict(q) for q in questions]))
    script(out, "--convert", real, "--thought", "steps")
    for pair, question in zip(pairs("real"), questions, strict=True):
        assert pair.target == question.response("steps")
        assert final_sentence(pair.target) == final_sentence(question.answer)
    real.write_text("[{}]")
    with pytest.raises(DataError, match="no ProsQA file"):
        script(out, "--convert", real)
