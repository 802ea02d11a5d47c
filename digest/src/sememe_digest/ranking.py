"""What a paper is worth to its reader: terms, exclusions, nearness to `interests`, and why."""

import re
from collections import Counter
from functools import cache
from math import log, sqrt
from statistics import fmean, pstdev

from sememe_digest.config import Config
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
    if config.interests.strip():
        # Neither score nor similarity has a scale of its own: both count in standard deviations.
        near = similarities(config.interests, [f"{p.title} {p.abstract}" for p in papers])
        for entry, similarity in zip(entries, near, strict=True):
            entry.similarity = round(similarity, 4)
        worth = [sum(z) for z in zip(z_scores(worth), z_scores(near), strict=True)]
    order = sorted(range(len(entries)), key=lambda index: -worth[index])
    return [entries[index] for index in order]


def z_scores(values: list[float]) -> list[float]:
    """Values in standard deviations from their mean; zeros where all are equal."""
    mean, spread = fmean(values or [0]), pstdev(values or [0]) or 1
    return [(value - mean) / spread for value in values]


@cache
def stem(word: str) -> str:
    if word.endswith("ss"):
        return word
    fits = (end for end in ENDINGS if word.endswith(end) and len(word) >= len(end) + SHORTEST_STEM)
    return word.removesuffix(next(fits, ""))


def similarities(query: str, texts: list[str]) -> list[float]:
    """Cosines of TF-IDF vectors, with the idf of these texts and 1 + log of counts."""
    counts = [Counter(map(stem, normalise(text).split())) for text in texts]
    frequency = Counter(word for count in counts for word in count)
    idf = {word: log(len(texts) / number) for word, number in frequency.items()}

    def vector(count: Counter[str]) -> dict[str, float]:
        weights = {word: (1 + log(n)) * idf.get(word, 0) for word, n in count.items()}
        length = sqrt(sum(weight**2 for weight in weights.values())) or 1
        return {word: weight / length for word, weight in weights.items()}

    wanted = vector(Counter(map(stem, normalise(query).split())))
    return [sum(v * wanted.get(w, 0) for w, v in vector(count).items()) for count in counts]
