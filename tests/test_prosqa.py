"""Questions on a graph: one answer each, equal for equal seeds, of the asked size, and graded by
one sentence."""

import json
import re
import runpy
import sys
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from sememe.errors import DataError
from sememe.evaluation.answers import ending
from sememe.pairs import read_pairs
from sememe.tasks.prosqa import Question, check, generate, read_prosqa, write_jsonl
from sememe.tasks.words import concept_words, person_names

SCRIPT = Path(__file__).parents[1] / "examples" / "prosqa.py"


@pytest.fixture(scope="module")
def questions() -> list[Question]:
    return generate(200, seed=3)


def distance(question: Question, start: int, end: int) -> int | None:
    level, steps, seen = {start}, 0, set()
    while level:
        if end in level:
            return steps
        seen |= level
        level, steps = {b for a, b in question.edges if a in level} - seen, steps + 1
    return None


def test_what_is_reached_is_a_search_up_to_the_target(questions):
    for question in questions:
        words, found = question.idx_to_symbol, question.reached()
        near = {word: distance(question, question.root, words.index(word)) for word in found}
        assert found[-1] == words[question.target] and len(set(found)) == len(found)
        assert list(near.values()) == sorted(near.values()), "breadth first"
        level = [
            word
            for n, word in enumerate(words)
            if n != question.root and (distance(question, question.root, n) or 99) < near[found[-1]]
        ]
        assert set(level) == {word for word in found if near[word] < near[found[-1]]}, (
            "each nearer one"
        )
        assert (
            question.response("reached")
            == f"{words[question.root]}: {', '.join(found)}. {question.answer}"
        )
    chain = Question(
        "Every b is a d. A is a c. A is a b. E is a f. Every c is a g. Every b is a g. Is A a f or "
        "d?",
        "A is a d.",
        ["A is a b.", "Every b is a d."],
        ["A", "E", "c", "b", "f", "g", "d"],
        [(0, 2), (0, 3), (1, 4), (2, 5), (3, 5), (3, 6)],
        0,
        6,
        4,
    )
    check(chain)
    assert chain.reached() == ["c", "b", "g", "d"]


def test_each_question_has_one_answer_and_steps_of_the_shortest_length(questions):
    for question in questions:
        check(question)
        assert distance(question, question.root, question.target) == len(question.steps)
        assert distance(question, question.root, question.neg_target) is None
        assert question.idx_to_symbol[question.root].istitle() and question.root in (0, 1)
        assert any(
            distance(question, person, question.neg_target) for person in (0, 1)
        )  # the wrong answer is another's
        assert all(a < b for a, b in question.edges) and len(set(question.edges)) == len(
            question.edges
        )
        assert {node for edge in question.edges for node in edge} == set(
            range(len(question.idx_to_symbol))
        )
        assert not {question.target, question.neg_target} & {a for a, _ in question.edges}
        assert len(set(question.idx_to_symbol)) == len(question.idx_to_symbol)


def test_sizes_are_those_of_prosqa(questions):
    """Its validation part: 22.8 nodes, 36.3 edges, 2.5 people, 3.8 hops; either candidate first,
    either number for the root."""

    def mean(numbers):
        return sum(numbers) / len(questions)

    assert 22 < mean(len(q.idx_to_symbol) for q in questions) < 23.5
    assert 34 < mean(len(q.edges) for q in questions) < 38
    assert 2.3 < mean(sum(word.istitle() for word in q.idx_to_symbol) for q in questions) < 2.8
    hops = Counter(len(q.steps) for q in questions)
    assert (
        set(hops) <= {3, 4, 5, 6}
        and hops[3] > 60
        and hops[4] > 45
        and 3.5 < mean(len(q.steps) for q in questions) < 4
    )
    assert 0.35 < mean(q.root for q in questions) < 0.65
    assert 0.35 < mean(f"{q.idx_to_symbol[q.target]} or" in q.question for q in questions) < 0.65


def test_equal_seeds_give_equal_questions_and_a_longer_list_begins_alike(questions):
    assert generate(20, seed=3) == questions[:20]
    assert generate(20, seed=4) != questions[:20]
    assert len({frozenset(q.question.split(". ")) for q in questions}) == len(questions)


def test_seeds_share_their_words():
    one, other = ({word for q in generate(60, seed) for word in q.idx_to_symbol} for seed in (0, 1))
    assert one == other


@pytest.mark.parametrize(
    ("hops", "nodes"), [(1, 4), (2, (5, 8)), ((2, 4), (8, 12)), (7, 10), (12, 28), ((1, 3), 60)]
)
def test_knobs(hops, nodes):
    made = generate(10, 0, hops, nodes)
    for question in made:
        check(question)
        least, most = (hops, hops) if isinstance(hops, int) else hops
        assert least <= len(question.steps) <= most
        least, most = (nodes, nodes) if isinstance(nodes, int) else nodes
        assert least <= len(question.idx_to_symbol) <= most


@pytest.mark.parametrize(
    ("hops", "nodes"), [(1, 4), (2, (6, 8)), ((2, 3), (9, 14)), ((3, 6), (17, 28))]
)
def test_even_questions_tell_nothing_by_distance(hops, nodes):
    """From the nearest person who is not asked about, the wrong answer is as far as the right one
    is from the root."""
    for question in generate(20, 1, hops, nodes, even=True):
        check(question)
        people = [
            n
            for n, word in enumerate(question.idx_to_symbol)
            if word.istitle() and n != question.root
        ]
        found = [distance(question, person, question.neg_target) for person in people]
        assert min(steps for steps in found if steps) == len(question.steps)
    nearer = [
        min(distance(q, n, q.neg_target) or 99 for n in (0, 1)) < len(q.steps)
        for q in generate(40, 1, 3, (9, 11))
    ]
    assert sum(nearer) > 20, (
        "as they come, most wrong answers are nearer: the option does something"
    )


@pytest.mark.parametrize(
    ("hops", "nodes", "even", "said"),
    [
        (0, 20, False, "hops = 0"),
        ((4, 2), 20, False, r"hops = \(4, 2\)"),
        (3, 3, False, "nodes = 3"),
        (4, (6, 20), False, "at least 7 nodes"),
        (4, (9, 20), True, "at least 10 nodes"),
    ],
)
def test_what_no_graph_fits_is_refused(hops, nodes, even, said):
    with pytest.raises(DataError, match=said):
        generate(1, 0, hops, nodes, even)


def test_check_finds_each_fault(questions):
    question = questions[0]
    symbols, root = question.idx_to_symbol, question.root
    faults = {
        "right answer cannot": {
            "edges": [edge for edge in question.edges if edge[1] != question.target]
        },
        "wrong answer can": {"edges": [*question.edges, (root, question.neg_target)]},
        "sentences are not its edges": {
            "question": question.question[question.question.index(".") + 2 :]
        },
        "a person is called": {"question": question.question.replace("Every ", "", 1)},
        "two candidates": {"question": question.question.replace(" or ", " or not ")},
        "answer is not its target": {
            "answer": f"{symbols[root]} is a {symbols[question.neg_target]}."
        },
        "steps are no chain": {"steps": question.steps[1:]},
        "outside its": {"target": len(symbols)},
    }
    for said, change in faults.items():
        with pytest.raises(DataError, match=said):
            check(replace(question, **change))


def test_every_response_ends_with_the_answer(questions):
    for question in questions:
        assert all(
            ending(question.response(thought)) == ending(question.answer)
            for thought in ("none", "steps", "reached")
        )


def test_words_are_different_and_a_longer_list_begins_alike():
    words, names = concept_words(300), person_names(100)
    assert len({word.lower() for word in (*words, *names)}) == 400
    assert all(word.islower() for word in words) and all(name.istitle() for name in names)
    assert concept_words(10) == words[:10] and person_names(10) == names[:10]
    assert concept_words(10, seed=1) != words[:10]


def test_files_are_read_again_as_pairs_and_as_questions(tmp_path, questions):
    write_jsonl(questions[:5], tmp_path / "a.jsonl", "steps")
    pairs = read_pairs(str(tmp_path / "a.jsonl"), ("instruction", "response"))
    assert [tuple(pair) for pair in pairs] == [
        (q.question, " ".join([*q.steps, q.answer])) for q in questions[:5]
    ]
    (tmp_path / "a.json").write_text(json.dumps([asdict(q) for q in questions[:5]]))
    for question in read_prosqa(tmp_path / "a.json"):
        check(question)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "cannot be read"),
        ("{", "no ProsQA file"),
        ("[{}]", "KeyError: 'question'"),
        ("[7]", "no ProsQA file"),
    ],
)
def test_other_files_are_refused(tmp_path, content, said):
    if content is not None:
        (tmp_path / "a.json").write_text(content)
    with pytest.raises(DataError, match=said):
        read_prosqa(tmp_path / "a.json")


def script(monkeypatch, *words) -> str | int | None:
    """Runs the example in this process; returns what it exits with."""
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, words)])
    try:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    except SystemExit as end:
        return end.code


def test_the_example_writes_train_and_heldout_and_converts(
    tmp_path, questions, monkeypatch, capsys
):
    out = tmp_path / "out"
    assert (
        script(
            monkeypatch,
            out,
            "--count",
            30,
            "--heldout",
            10,
            "--hops",
            1,
            2,
            "--nodes",
            5,
            6,
            "--even",
        )
        is None
    )
    train, heldout = (
        read_pairs(str(out / name), ("instruction", "response"))
        for name in ("train.jsonl", "heldout.jsonl")
    )
    assert (len(train), len(heldout)) == (30, 10) and not set(train) & set(heldout)
    assert all(re.fullmatch(r"[A-Z]\w+ is a \w+\.", pair.target) for pair in train)
    (tmp_path / "real.json").write_text(json.dumps([asdict(q) for q in questions[:3]]))
    assert (
        script(monkeypatch, out, "--convert", tmp_path / "real.json", "--thought", "steps") is None
    )
    pairs = read_pairs(str(out / "real.jsonl"), ("instruction", "response"))
    assert [pair.target for pair in pairs] == [
        question.response("steps") for question in questions[:3]
    ]
    assert "30 questions" in capsys.readouterr().out
    assert script(monkeypatch, out, "--convert", tmp_path / "none.json").startswith("error: ")
    assert script(monkeypatch, "--help") == 0 and "easy" in capsys.readouterr().out
