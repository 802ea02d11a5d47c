"""Questions on a graph for a planner, as in ProsQA (Hao et al. 2024): of two concepts, which one
does the person's chain of "is a" reach? Made up here, or taken from a ProsQA file. From the
repository's root:

python examples/make_prosqa.py prosqa --count 20000 --thought steps → prosqa/train.jsonl,
heldout.jsonl
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
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sememe.errors import DataError, SememeError

CONCEPTS, NAMES = (
    40,
    16,
)  # words in all, the same for every seed, so that held-out questions are of known words
PARENTS = (
    1.45  # mean of the Poisson law that a concept's number of parents follows, given at least one
)
DEPTH_WEIGHT = 1.5  # how much a deep node is preferred as a parent; more of it gives longer chains
PERSON_SHARE = 0.045  # of the nodes beyond the two people that the question is about
ROOT_ONLY, OTHER_ONLY = (
    0.5,
    0.35,
)  # share of concepts that may not have the other's, or the root's, among their ancestors
FREE_TRIES, TRIES = 20, 2000  # graphs drawn without a chain laid out, and in all
Range = int | tuple[int, int]
Thought = Literal["none", "steps", "reached"]


@dataclass(frozen=True)
class Question:
    """One question; the fields are those of a ProsQA file. Nodes are numbered so that every edge
    (a, b) has a < b."""

    question: str
    answer: str
    steps: list[str]
    idx_to_symbol: list[str]
    edges: list[tuple[int, int]]
    root: int
    target: int
    neg_target: int

    def response(self, thought: Thought = "none") -> str:
        """The answer's sentence, behind a thought: the `steps` that lead to it, or what was
        `reached` on the way."""
        said = self.steps if thought == "steps" else []
        if thought == "reached":
            said = [f"{self.idx_to_symbol[self.root]}: {', '.join(self.reached())}."]
        return " ".join([*said, self.answer])

    def reached(self) -> list[str]:
        """What a search from the root finds, breadth first and in the order of the text, up to the
        target."""
        root, target = self.idx_to_symbol[self.root], self.idx_to_symbol[self.target]
        facts, found = re.findall(r"(\w+) is a (\w+)\.", self.question), [root]
        for subject in found:
            found += dict.fromkeys(b for a, b in facts if a == subject and b not in found)
        return found[1 : found.index(target) + 1]


def generate(
    count: int, seed: int = 0, hops: Range = (3, 6), nodes: Range = (17, 28), even: bool = False
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
            f"nodes, {room}. "
            f"try: nodes={least}"
        )
    rng = random.Random(seed)
    concepts, names = concept_words(max(CONCEPTS, nodes[1])), person_names(max(NAMES, nodes[1]))
    questions: dict[
        frozenset[str], Question
    ] = {}  # the same graph in another order is no other question
    spare = TRIES
    while len(questions) < count:
        made = _question(rng, hops, nodes, concepts, names, even)
        before = len(questions)
        questions.setdefault(frozenset(re.split(r"(?<=[.?]) ", made.question)), made)
        spare -= len(questions) == before
        if not spare:
            raise DataError(
                f"{count} questions of {nodes} nodes and {hops} hops: there are hardly more than "
                f"{len(questions)} "
                "different ones. try: more nodes, or a smaller count"
            )
    return list(questions.values())


def _range(name: str, given: Range, least: int) -> tuple[int, int]:
    low, high = (given, given) if isinstance(given, int) else given
    if not least <= low <= high:
        raise DataError(
            f"{name} = {given}: need a number, or two in their order, of at least {least}. "
            f"try: {name}={max(least, high)}"
        )
    return low, high


def _question(
    rng: random.Random,
    hops: tuple[int, int],
    nodes: tuple[int, int],
    concepts: list[str],
    names: list[str],
    even: bool,
) -> Question:
    """Graphs are drawn until one has an answer at the asked distance; where that is rare, with such
    a chain laid out first."""
    for tried in range(TRIES):
        count = min(
            max(round(rng.gauss(sum(nodes) / 2, (nodes[1] - nodes[0]) / 5)), nodes[0]), nodes[1]
        )
        chain: list[int] = []
        if tried >= FREE_TRIES:
            chain = sorted(
                rng.sample(range(2, count), rng.randint(hops[0], min(hops[1], count - 3)))
            )
        edges, people = _graph(rng, count, chain)
        found = _ends(rng, edges, hops, people if even else None)
        if found and people <= {parent for parent, _ in edges}:
            return _worded(rng, edges, people, count, found, concepts, names)
    raise DataError(
        f"no graph of {nodes} nodes with a chain of {hops} hops in {TRIES} tries: need more room. "
        "try: more nodes, or fewer hops"
    )


def _graph(
    rng: random.Random, count: int, chain: list[int]
) -> tuple[list[tuple[int, int]], set[int]]:
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
            pool = [
                earlier
                for earlier in range(node)
                if sides[earlier] == 1 and depths[earlier] >= j and earlier != parents[0]
            ]
            more = _at_least_one(rng) - 1
        elif rng.random() < PERSON_SHARE:
            people.add(node)
        else:
            draw = rng.random()
            barred = 2 if draw < ROOT_ONLY else 1 if draw < ROOT_ONLY + OTHER_ONLY else 0
            pool, more = (
                [earlier for earlier in range(node) if not sides[earlier] & barred],
                _at_least_one(rng),
            )
        for _ in range(min(more, len(pool))):
            weights = [1 + DEPTH_WEIGHT * depths[earlier] for earlier in pool]
            parents.append(pool.pop(rng.choices(range(len(pool)), weights)[0]))
        edges += [(parent, node) for parent in parents]
        side = 0
        for parent in parents:
            side |= sides[parent]
        sides.append(side)
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
    rng: random.Random, edges: list[tuple[int, int]], hops: tuple[int, int], people: set[int] | None
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
        right = {
            length: nodes
            for length, nodes in right.items()
            if length in {len(near[node]) for node in wrong}
        }
    if not right or not wrong:
        return None
    length = max(right)
    return below[rng.choice(right[length])], rng.choice(
        [node for node in wrong if not people or len(near[node]) == length]
    )


def _reached(edges: Iterable[tuple[int, int]], *roots: int) -> dict[int, list[int]]:
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
    rng: random.Random,
    edges: list[tuple[int, int]],
    people: set[int],
    count: int,
    ends: tuple[list[int], int],
    concepts: list[str],
    names: list[str],
) -> Question:
    path, wrong = ends
    if rng.random() < 0.5:  # so that the number 0 does not tell the root
        swap = {0: 1, 1: 0}
        edges = [(swap.get(a, a), b) for a, b in edges]
        path = [swap.get(node, node) for node in path]
    called, known = (
        iter(rng.sample(names, len(people))),
        iter(rng.sample(concepts, count - len(people))),
    )
    words = [next(called if node in people else known) for node in range(count)]

    def said(edge: tuple[int, int]) -> str:
        child, parent = edge
        subject = words[child] if child in people else f"Every {words[child]}"
        return f"{subject} is a {words[parent]}."

    facts = [said(edge) for edge in edges]
    rng.shuffle(facts)
    either = [words[path[-1]], words[wrong]]
    rng.shuffle(either)
    root = words[path[0]]
    return Question(
        f"{' '.join(facts)} Is {root} a {either[0]} or {either[1]}?",
        f"{root} is a {words[path[-1]]}.",
        [said(edge) for edge in itertools.pairwise(path)],
        words,
        edges,
        path[0],
        path[-1],
        wrong,
    )


def check(question: Question) -> None:
    """Whether the question has one answer, its own, that follows from its text.

    Raises:
        DataError: both candidates or none can be reached, or the text, the graph, the steps and the
            answer disagree."""
    words, ends = question.idx_to_symbol, (question.root, question.target, question.neg_target)
    if not all(0 <= node < len(words) for node in itertools.chain(ends, *question.edges)):
        raise DataError(
            f'the question "…{question.question[-60:]}" has an edge or an end outside its '
            f"{len(words)} nodes: need numbers of nodes. try: leave that question out"
        )
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
    fault = next((said for said, wrong in faults.items() if wrong), None)
    if fault:
        raise DataError(
            f'the question "…{question.question[-60:]}": {fault}; need one candidate that follows. '
            "try: leave that question out"
        )


def read_prosqa(path: Path | str) -> list[Question]:
    """The questions of a ProsQA JSON file.

    Raises:
        DataError: a file that is missing, is not JSON, or lacks a field.
    """
    try:
        rows = json.loads(Path(path).read_text(encoding="utf-8"))
        return [
            Question(**{name: row[name] for name in Question.__dataclass_fields__}) for row in rows
        ]
    except OSError as fault:
        raise DataError(
            f"{path} cannot be read ({fault}): need a ProsQA file. try: check the path"
        ) from fault
    except (ValueError, TypeError, KeyError) as fault:
        raise DataError(
            f"{path} is no ProsQA file ({type(fault).__name__}: {fault}): need a JSON list of "
            "objects with "
            f"{', '.join(Question.__dataclass_fields__)}. try: one that ends in _valid.json"
        ) from fault


def write_jsonl(questions: Iterable[Question], path: Path | str, thought: Thought = "none") -> None:
    """One JSON object per line: `instruction` the question, `response` its answer's sentence,
    behind a thought if asked.

    Raises:
        DataError: a question that `check` refuses; then nothing is written."""
    questions = list(questions)
    for question in questions:
        check(question)
    with Path(path).open("w", encoding="utf-8") as file:
        for question in questions:
            file.write(
                json.dumps(
                    {"instruction": question.question, "response": question.response(thought)}
                )
                + "\n"
            )


# Invented words: syllables put together by a seeded generator. No list of words is kept anywhere.
ONSETS = (*"bdfgklmnprstvz", "br", "dr", "gl", "kr", "pl", "sk", "tr")
VOWELS = ("a", "e", "i", "o", "u")
CODAS = ("l", "m", "n", "r", "s", "x", "nk", "rb", "lt", "mp")


def concept_words(count: int, seed: int = 0) -> list[str]:
    """`count` different words of two closed syllables, as in "drolvim"; a longer list begins as a
    shorter one does."""
    return _words(
        count,
        lambda rng: rng.choice(ONSETS) + _rime(rng) + rng.choice(ONSETS[:14]) + _rime(rng),
        f"concepts {seed}",
    )


def person_names(count: int, seed: int = 0) -> list[str]:
    """`count` different names that begin with a capital and end open, as in "Velko": no name is a
    concept's word."""

    def name(rng: random.Random) -> str:
        return (
            rng.choice(ONSETS) + rng.choice(VOWELS) + rng.choice(ONSETS[:14]) + rng.choice("aeio")
        ).capitalize()

    return _words(count, name, f"names {seed}")


def _rime(rng: random.Random) -> str:
    return rng.choice(VOWELS) + rng.choice(CODAS[:5])


def _words(count: int, draw, seed: str) -> list[str]:
    rng, words = random.Random(seed), {}  # a dict keeps the order
    while len(words) < count:
        words.setdefault(draw(rng))
    return list(words)


def main(asked: argparse.Namespace) -> None:
    if asked.convert:
        files = {asked.convert.stem: read_prosqa(asked.convert)}
    else:
        hops, nodes = tuple(asked.hops), tuple(asked.nodes)
        made = generate(
            asked.count + asked.heldout, asked.seed, hops, nodes, asked.even
        )  # all different
        files = {"train": made[: asked.count], "heldout": made[asked.count :]}
    asked.out.mkdir(parents=True, exist_ok=True)
    for name, questions in files.items():
        write_jsonl(questions, asked.out / f"{name}.jsonl", asked.thought)
        print(
            f"{asked.out / name}.jsonl: {len(questions)} questions of fields instruction and "
            "response"
        )


parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
)
parser.add_argument("out", type=Path, help="folder for the files; it is made")
for option, value, said in (
    ("count", 2000, "questions to train on"),
    ("heldout", 300, "other questions"),
    ("seed", 0, "of all"),
):
    parser.add_argument(f"--{option}", type=int, default=value, help=f"{said} (default {value})")
parser.add_argument(
    "--hops",
    type=int,
    nargs=2,
    default=(3, 6),
    help="least and most steps from person to answer (default 3 6)",
)
parser.add_argument(
    "--nodes",
    type=int,
    nargs=2,
    default=(17, 28),
    help="least and most nodes of a graph (default 17 28)",
)
parser.add_argument(
    "--even",
    action="store_true",
    help="the wrong answer is as many steps from the nearest other "
    "person: no shorter look tells, as it often does in small graphs",
)
parser.add_argument(
    "--thought",
    choices=("none", "steps", "reached"),
    default="none",
    help="what the response begins with: the "
    "steps to the answer, or all that a search reaches before it (default none)",
)
parser.add_argument(
    "--convert", type=Path, help="a ProsQA JSON file, instead of making questions up"
)
if __name__ == "__main__":
    try:
        main(parser.parse_args())
    except SememeError as error:
        sys.exit(f"error: {error}")
