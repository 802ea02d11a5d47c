"""Which papers are announced, what each is worth by terms and nearness to `interests`, and why."""

import re
from collections import Counter
from collections.abc import Iterable
from datetime import date, timedelta
from functools import cache
from math import log, sqrt
from statistics import pstdev

from sememe_digest.config import Config
from sememe_digest.feeds import STRENGTH, Feed
from sememe_digest.papers import Entry, Paper

TITLE_BONUS = 0.5  # of a term's weight, on top, where the title has it
# What is cut off words for `interests`, so that compress, compressed and compression are one.
ENDINGS = ("ations", "ation", "ions", "ion", "ings", "ing", "ers", "er", "ed", "es", "s", "e")
SHORTEST_STEM = 4


def normalise(text: str) -> str:
    """Words in lower case between single blanks, so that a whole word is found by `in`."""
    return " ".join(["", *re.findall(r"[^\W_]+", text.lower()), ""])


@cache
def needles(term: str, match: str) -> tuple[str, ...]:
    """The strings of which one must occur in a prepared text."""
    if match == "substring":
        return (term.lower(),)
    words = normalise(term).rstrip()
    if term.rstrip(' "').endswith("*"):
        return (words,)
    plural_of_y = f"{words[:-1]}ies " if words.endswith("y") else f"{words}es "
    return (f"{words} ", f"{words}s ", plural_of_y)


def union(feeds: Iterable[Feed], day: date, config: Config) -> list[Paper]:
    """Each paper once, with the strongest type that any feed gives it.

    A first version of this or the last month from a monitored class is new, whichever feed shows
    it: its own may be stale, missing or capped."""
    papers: dict[str, Paper] = {}
    months = (f"{day:%y%m}.", f"{day.replace(day=1) - timedelta(days=1):%y%m}.")
    for paper in (paper for feed in feeds for paper in feed.papers):
        is_first = paper.version == 1 and paper.id.startswith(months)
        if is_first and paper.type in ("", "cross") and config.home(paper.primary) != "other":
            paper = paper.model_copy(update={"type": "new"})
        known = papers.get(paper.id)
        if known is None or STRENGTH[paper.type] > STRENGTH[known.type]:
            papers[paper.id] = paper
    return [paper for paper in papers.values() if paper.type in config.types]


def rank(papers: list[Paper], config: Config) -> list[Entry]:
    """All papers, best first; papers of equal worth stay in the order of the feeds."""
    prepare = str.lower if config.match == "substring" else normalise

    def occurs(term: str, text: str) -> bool:
        return any(needle in text for needle in needles(term, config.match))

    entries = []
    for paper in papers:
        title = prepare(paper.title)
        text = f"{title} {prepare(paper.abstract)}"
        hits = [
            {"term": term, "weight": weight, "in_title": occurs(term, title)}
            for term, weight in config.terms.items()
            if occurs(term, text)
        ]
        score = round(sum(h["weight"] * (1 + TITLE_BONUS * h["in_title"]) for h in hits), 4)
        where = title if config.exclude_in == "title" else text
        excluded = next((term for term in config.exclude if occurs(term, where)), None)
        entries.append(Entry(**dict(paper), score=score, hits=hits, excluded=excluded))
    worth = [entry.score for entry in entries]
    if entries and config.interests.strip():
        near = similarities(config.interests, [f"{p.title} {p.abstract}" for p in papers])
        for entry, similarity in zip(entries, near, strict=True):
            entry.similarity = round(similarity, 4)
        # Neither score nor similarity has a scale of its own: both count in standard deviations.
        scales = (pstdev(worth) or 1, pstdev(near) or 1)
        worth = [w / scales[0] + n / scales[1] for w, n in zip(worth, near, strict=True)]
    order = sorted(range(len(entries)), key=lambda index: -worth[index])
    return [entries[index] for index in order]


@cache
def stem(word: str) -> str:
    if word.endswith("ss"):
        return word
    fits = (end for end in ENDINGS if word.endswith(end) and len(word) >= len(end) + SHORTEST_STEM)
    return word.removesuffix(next(fits, ""))


def similarities(query: str, texts: list[str]) -> list[float]:
    """Cosines of TF-IDF vectors, with the idf of these texts and 1 + log of counts."""
    asked, *counts = (Counter(map(stem, normalise(text).split())) for text in (query, *texts))
    frequency = Counter(word for count in counts for word in count)
    idf = {word: log(len(texts) / number) for word, number in frequency.items()}

    def vector(count: Counter[str]) -> dict[str, float]:
        weights = {word: (1 + log(n)) * idf.get(word, 0) for word, n in count.items()}
        length = sqrt(sum(weight**2 for weight in weights.values())) or 1
        return {word: weight / length for word, weight in weights.items()}

    wanted = vector(asked)
    return [sum(v * wanted.get(w, 0) for w, v in vector(count).items()) for count in counts]
