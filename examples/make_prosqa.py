"""Questions on a graph for a planner, as in ProsQA (Hao et al. 2024): of two concepts, which one
does the person's chain of "is a" reach? Made up here, or taken from a ProsQA file. From the
repository's root:

python examples/make_prosqa.py prosqa --count 20000 --thought steps → prosqa/{train,heldout}.jsonl
python examples/make_prosqa.py easy --hops 2 2 --nodes 6 8 --even   small graphs, for a small model
python examples/make_prosqa.py real --convert prosqa_valid.json     → real/prosqa_valid.jsonl
"""

import argparse
import itertools
import json
import math
import random
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import or_
from pathlib import Path
from typing import Literal, NoReturn, get_args

from sememe.errors import DataError, SememeError

# Words in all, the same for every seed, so that held-out questions are of known words.
CONCEPTS, NAMES = 40, 16
PARENTS = 1.45  # mean of the Poisson law of a concept's number of parents, given at least one
DEPTH_WEIGHT = 1.5  # how much a deep node is preferred as a parent; more of it gives longer chains
PERSON_SHARE = 0.045  # of the nodes beyond the two people that the question is about
# Share of concepts that may not have the other's, or the root's, among their ancestors.
ROOT_ONLY, OTHER_ONLY = 0.5, 0.35
FREE_TRIES, TRIES = 20, 2000  # graphs drawn without a chain laid out, and in all
Pair = tuple[int, int]
Size = int | Pair
Edges = list[Pair]
Thought = Literal["none", "steps", "reached"]


@dataclass(frozen=True)
class Question:
    """One question; the fields are those of a ProsQA file. Nodes are numbered so that every edge
    (a, b) has a < b."""

    question: str
    answer: str
    steps: list[str]
    idx_to_symbol: list[str]
    edges: Edges
    root: int
    target: int
    neg_target: int

    def response(self, thought: Thought = "none") -> str:
        """The answer's sentence, behind a thought: the `steps` that lead to it, or what was
        `reached` on the way."""
        sentences = self.steps if thought == "steps" else []
        if thought == "reached":
            sentences = [f"{self.idx_to_symbol[self.root]}: {', '.join(self.reached())}."]
        return " ".join([*sentences, self.answer])

    def reached(self) -> list[str]:
        """What a search from the root finds, breadth first and in the order of the text, up to the
        target."""
        root, target = self.idx_to_symbol[self.root], self.idx_to_symbol[self.target]
        facts, names = re.findall(r"(\w+) is a (\w+)\.", self.question), [root]
        for subject in names:
            names += dict.fromkeys(b for a, b in facts if a == subject and b not in names)
        return names[1 : names.index(target) + 1]


FIELDS = tuple(Question.__dataclass_fields__)


def generate(
    count: int, seed: int = 0, hops: Size = (3, 6), nodes: Size = (17, 28), even: bool = False
) -> list[Question]:
    """`count` different questions whose answer is `hops` edges from the root in a graph of `nodes`;
    a number or (least, most).

    even: the wrong answer is as far from the nearest other person as the right one is from the
    root. Where it may be nearer, a look at what is said of that person often does: at 3 hops it
    answers 90 % of the questions on 7 to 9 nodes, 60 % of ProsQA's.

    Equal seeds give equal questions, and a longer list begins as a shorter one does: cut one list
    for held-out questions.

    Raises:
        DataError: a range that no graph fits, or so few possible questions that they run out."""
    hops, nodes = _range("hops", hops, 1), _range("nodes", nodes, 4)
    least, room = hops[0] + 3, "the chain, another person and a wrong answer"
    if even:
        least, room = 2 * hops[0] + 2, "two chains that share none"
    if nodes[0] < least:
        raise DataError(
            f"graphs of {nodes[0]} nodes with a chain of {hops[0]} hops: need at least {least} "
            f"nodes, {room}. try: nodes={least}"
        )
    rng = random.Random(seed)
    vocabulary = concept_words(max(CONCEPTS, nodes[1])), person_names(max(NAMES, nodes[1]))
    questions: dict[frozenset[str], Question] = {}  # in another order a graph is no other question
    spare = TRIES
    while len(questions) < count:
        question = _question(rng, hops, nodes, even, vocabulary)
        before = len(questions)
        questions.setdefault(frozenset(re.split(r"(?<=[.?]) ", question.question)), question)
        spare -= len(questions) == before
        if not spare:
            raise DataError(
                f"{count} questions of {nodes} nodes and {hops} hops: there are hardly more than "
                f"{len(questions)} different ones. try: more nodes, or a smaller count"
            )
    return list(questions.values())


def _range(name: str, size: Size, least: int) -> Pair:
    low, high = (size, size) if isinstance(size, int) else size
    if not least <= low <= high:
        raise DataError(
            f"{name} = {size}: need a number, or two in their order, of at least {least}. "
            f"try: {name}={max(least, high)}"
        )
    return low, high


def _question(
    rng: random.Random, hops: Pair, nodes: Pair, even: bool, vocabulary: tuple
) -> Question:
    """Graphs are drawn until one has an answer at the asked distance; where that is rare, with such
    a chain laid out first."""
    for tried in range(TRIES):
        drawn = round(rng.gauss(sum(nodes) / 2, (nodes[1] - nodes[0]) / 5))
        count = min(max(drawn, nodes[0]), nodes[1])
        chain: list[int] = []
        if tried >= FREE_TRIES:
            length = rng.randint(hops[0], min(hops[1], count - 3))
            chain = sorted(rng.sample(range(2, count), length))
        edges, people = _graph(rng, count, chain)
        ends = _ends(rng, edges, hops, people if even else None)
        if ends and people <= {parent for parent, _ in edges}:
            return _worded(rng, edges, people, count, ends, vocabulary)
    raise DataError(
        f"no graph of {nodes} nodes with a chain of {hops} hops in {TRIES} tries: need more room. "
        "try: more nodes, or fewer hops"
    )


def _graph(rng: random.Random, count: int, chain: list[int]) -> tuple[Edges, set[int]]:
    """(edges, people): 0 is the root, 1 the other person; each further node is a concept below
    earlier nodes, or a person.

    The j-th node of `chain` is below the root alone, at the distance j."""
    edges, people = [], {0, 1}
    sides, depths = [1, 2], [0, 0]  # bit 1: below the root, bit 2: below the other person
    for node in range(2, count):
        parents, pool, more = [], [], 0
        if node in chain:
            j = chain.index(node)
            parents = [chain[j - 1] if j else 0]
            pool = [n for n in range(node) if sides[n] == 1 and depths[n] >= j and n != parents[0]]
            more = _at_least_one(rng) - 1
        elif rng.random() < PERSON_SHARE:
            people.add(node)
        else:
            draw = rng.random()
            barred = 2 if draw < ROOT_ONLY else 1 if draw < ROOT_ONLY + OTHER_ONLY else 0
            pool = [n for n in range(node) if not sides[n] & barred]
            more = _at_least_one(rng)
        for _ in range(min(more, len(pool))):
            weights = [1 + DEPTH_WEIGHT * depths[n] for n in pool]
            parents.append(pool.pop(rng.choices(range(len(pool)), weights)[0]))
        edges += [(parent, node) for parent in parents]
        sides.append(reduce(or_, (sides[parent] for parent in parents), 0))
        depths.append(1 + min((depths[parent] for parent in parents), default=-1))
    return edges, people


def _at_least_one(rng: random.Random) -> int:
    """Poisson(PARENTS) given that it is not 0, by inversion."""
    p = PARENTS * math.exp(-PARENTS) / (1 - math.exp(-PARENTS))
    number, left = 1, rng.random() - p
    while left > 0 and number < 12:
        number += 1
        p *= PARENTS / number
        left -= p
    return number


def _ends(
    rng: random.Random, edges: Edges, hops: Pair, people: set[int] | None
) -> tuple[list[int], int] | None:
    """(path root … target, neg_target), both ends without children and each reached by one of the
    two people alone.

    The target is one of the farthest that `hops` allows; with `people`, of those with a wrong
    answer as far from any of them."""
    inner = {parent for parent, _ in edges}
    below, other = _reached(edges, 0), _reached(edges, 1)
    wrong = [node for node in other if node not in inner | below.keys() and node > 1]
    right: dict[int, list[int]] = {}
    for node, path in below.items():
        if node not in inner | other.keys() and hops[0] <= len(path) - 1 <= hops[1]:
            right.setdefault(len(path), []).append(node)
    if people:
        near = _reached(edges, *sorted(people - {0}))
        lengths = {len(near[node]) for node in wrong}
        right = {length: right[length] for length in right if length in lengths}
    if not right or not wrong:
        return None
    length = max(right)
    target = rng.choice(right[length])
    others = [node for node in wrong if not people or len(near[node]) == length]
    return below[target], rng.choice(others)


def _reached(edges: Iterable[Pair], *roots: int) -> dict[int, list[int]]:
    """Each node that can be reached, with a shortest path to it."""
    children: dict[int, list[int]] = {}
    for parent, child in edges:
        children.setdefault(parent, []).append(child)
    paths, queue = {root: [root] for root in roots}, list(roots)
    for node in queue:
        for child in children.get(node, []):
            if child not in paths:
                paths[child] = [*paths[node], child]
                queue.append(child)
    return paths


def _worded(
    rng: random.Random, edges: Edges, people: set, count: int, ends: tuple, vocabulary: tuple
) -> Question:
    """The question whose answer is at the end of `ends`, a path from root to target and the wrong
    answer."""
    (concepts, names), (path, wrong) = vocabulary, ends
    if rng.random() < 0.5:  # so that the number 0 does not tell the root
        swap = {0: 1, 1: 0}
        edges = [(swap.get(a, a), b) for a, b in edges]
        path = [swap.get(node, node) for node in path]
    called = iter(rng.sample(names, len(people)))
    known = iter(rng.sample(concepts, count - len(people)))
    words = [next(called if node in people else known) for node in range(count)]

    def sentence(edge: Pair) -> str:
        child, parent = edge
        subject = words[child] if child in people else f"Every {words[child]}"
        return f"{subject} is a {words[parent]}."

    facts = [sentence(edge) for edge in edges]
    rng.shuffle(facts)
    either = [words[path[-1]], words[wrong]]
    rng.shuffle(either)
    root = words[path[0]]
    return Question(
        question=f"{' '.join(facts)} Is {root} a {either[0]} or {either[1]}?",
        answer=f"{root} is a {words[path[-1]]}.",
        steps=[sentence(edge) for edge in itertools.pairwise(path)],
        idx_to_symbol=words,
        edges=edges,
        root=path[0],
        target=path[-1],
        neg_target=wrong,
    )


def check(question: Question) -> None:
    """Whether the question has one answer, its own, that follows from its text.

    Raises:
        DataError: both candidates or none can be reached, or the text, the graph, the steps and the
            answer disagree."""
    words, ends = question.idx_to_symbol, (question.root, question.target, question.neg_target)
    if not all(0 <= node < len(words) for node in itertools.chain(ends, *question.edges)):
        _refuse(question, f"an edge or an end is outside its {len(words)} nodes")
    reached = _reached(question.edges, question.root)
    facts = re.findall(r"(Every )?(\w+) is a (\w+)\.", question.question)
    asked = re.search(r"Is (\w+) a (\w+) or (\w+)\?$", question.question)
    chain = re.findall(r"(?:Every )?(\w+) is a (\w+)\.", " ".join(question.steps))
    stated = {(subject, concept) for _, subject, concept in facts}
    edges = sorted((words[a], words[b]) for a, b in question.edges)
    root, target, other = (words[node] for node in ends)
    faults = {
        "its right answer cannot be reached": question.target not in reached,
        "its wrong answer can be reached too": question.neg_target in reached,
        "its sentences are not its edges": sorted((s, c) for _, s, c in facts) != edges,
        'a person is called "every", or a concept is not': any(
            bool(every) == s[:1].isupper() for every, s, _ in facts
        ),
        "it does not ask for its two candidates": not asked
        or asked[1] != root
        or {asked[2], asked[3]} != {target, other},
        "its answer is not its target": question.answer != f"{root} is a {target}.",
        "its steps are no chain from root to target": not set(chain) <= stated
        or [root, *(c for _, c in chain)] != [*(s for s, _ in chain), target],
    }
    for fault in (name for name, is_wrong in faults.items() if is_wrong):
        _refuse(question, fault)


def _refuse(question: Question, fault: str) -> NoReturn:
    raise DataError(
        f'the question "…{question.question[-60:]}": {fault}; need one candidate that follows. '
        "try: leave that question out"
    )


def read_prosqa(path: Path | str) -> list[Question]:
    """The questions of a ProsQA JSON file. Raises DataError where it is missing, is not JSON, or
    lacks a field."""
    try:
        rows = json.loads(Path(path).read_text(encoding="utf-8"))
        return [Question(**{name: row[name] for name in FIELDS}) for row in rows]
    except (OSError, ValueError, TypeError, KeyError) as fault:
        raise DataError(
            f"{path} is no ProsQA file ({type(fault).__name__}: {fault}): need a JSON list of "
            f"objects with {', '.join(FIELDS)}. try: one that ends in _valid.json"
        ) from fault


def write_jsonl(questions: Iterable[Question], path: Path | str, thought: Thought = "none") -> None:
    """One JSON object per line: `instruction` the question, `response` its answer's sentence,
    behind a thought if asked.

    Raises:
        DataError: a question that `check` refuses; then nothing is written."""
    lines = []
    for question in questions:
        check(question)
        pair = {"instruction": question.question, "response": question.response(thought)}
        lines.append(json.dumps(pair) + "\n")
    Path(path).write_text("".join(lines), encoding="utf-8")


# Invented words: letters put together by a seeded generator. No list of words is kept anywhere.
CONSONANTS = (*"bdfgklmnprstvz",)
ONSETS = (*CONSONANTS, "br", "dr", "gl", "kr", "pl", "sk", "tr")
VOWELS, CODAS = "aeiou", "lmnrs"


def concept_words(count: int) -> list[str]:
    """`count` different words of two closed syllables, as in "drolvim"; a longer list begins as a
    shorter one does."""
    return _words(count, "concepts 0", (ONSETS, VOWELS, CODAS, CONSONANTS, VOWELS, CODAS))


def person_names(count: int) -> list[str]:
    """`count` different names that begin with a capital and end open, as in "Velko": no name is a
    concept's word."""
    words = _words(count, "names 0", (ONSETS, VOWELS, CONSONANTS, "aeio"))
    return [word.capitalize() for word in words]


def _words(count: int, seed: str, parts: tuple[Sequence[str], ...]) -> list[str]:
    rng = random.Random(seed)
    words: dict[str, None] = {}  # a dict keeps the order
    while len(words) < count:
        words.setdefault("".join(rng.choice(part) for part in parts))
    return list(words)


def main(options: argparse.Namespace) -> None:
    if options.convert:
        files = {options.convert.stem: read_prosqa(options.convert)}
    else:
        hops, nodes, count = tuple(options.hops), tuple(options.nodes), options.count
        # All different.
        questions = generate(count + options.heldout, options.seed, hops, nodes, options.even)
        files = {"train": questions[:count], "heldout": questions[count:]}
    options.out.mkdir(parents=True, exist_ok=True)
    for name, questions in files.items():
        path = options.out / f"{name}.jsonl"
        write_jsonl(questions, path, options.thought)
        print(f"{path}: {len(questions)} questions of fields instruction and response")


class Format(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    pass


pair = {"type": int, "nargs": 2}
EVEN = "the wrong answer is as many steps from the nearest other person: no shorter look tells"
THOUGHT = "what the response begins with: steps to the answer, or all that a search reaches before"
parser = argparse.ArgumentParser(description=__doc__, formatter_class=Format)
parser.add_argument("out", type=Path, help="folder for the files; it is made")
parser.add_argument("--count", type=int, default=2000, help="questions to train on")
parser.add_argument("--heldout", type=int, default=300, help="other questions")
parser.add_argument("--seed", type=int, default=0, help="of all")
parser.add_argument("--hops", **pair, default=(3, 6), help="least and most steps to the answer")
parser.add_argument("--nodes", **pair, default=(17, 28), help="least and most nodes of a graph")
parser.add_argument("--even", action="store_true", help=EVEN)
parser.add_argument("--thought", choices=get_args(Thought), default="none", help=THOUGHT)
parser.add_argument("--convert", type=Path, help="a ProsQA JSON file, instead of made-up questions")
if __name__ == "__main__":
    try:
        main(parser.parse_args())
    except SememeError as error:
        sys.exit(f"error: {error}")
