"""What a paper is worth to its reader: terms, exclusions, nearness to `interests`, and why."""

import re
from collections import Counter
from dataclasses import dataclass
from functools import cache
from math import log, sqrt
from statistics import fmean, pstdev

from sememe_digest.config import Config, Term
from sememe_digest.papers import Hit, Paper

TITLE_BONUS = 0.5  # of a term's weight, on top, where the title has it
# What endings of words are cut off, so that compress, compressed and compression are one.
ENDINGS = ("ations", "ation", "ions", "ion", "ings", "ing", "ers", "er", "ed", "es", "s", "e")
SHORTEST_STEM = 4


@dataclass
class Ranked:
    """A paper with its score, the terms that gave it, and what orders it."""

    paper: Paper
    score: float
    hits: list[Hit]
    excluded: str | None = None
    similarity: float | None = None
    order: float = 0.0


@dataclass
class Cut:
    """The papers to show, those that match at all, and how many lost to a tie at the limit."""

    shown: list[Ranked]
    matching: list[Ranked]
    score: float | None
    tied_out: int


def normalise(text: str) -> str:
    """Words in lower case between single blanks, so that a whole word is found by `in`."""
    words = " ".join(re.findall(r"[^\W_]+", text.lower()))
    return f" {words} "


@cache
def needles(term: str, match: str) -> tuple[str, ...]:
    """The strings of which one must occur in a text."""
    if match == "substring":
        return (term.lower(),)
    words = normalise(term).rstrip()
    if term.rstrip('" ').endswith("*"):
        return (words,)
    plurals = (f"{words}s ", f"{words}es ")
    return (f"{words} ", *plurals, *((f"{words[:-1]}ies ",) if words.endswith("y") else ()))


def first_hit(terms: list[Term], text: str, match: str) -> str | None:
    """The first of some terms that occurs in a prepared text."""
    return next((t.text for t in terms if any(n in text for n in needles(t.text, match))), None)


def rank(papers: list[Paper], config: Config) -> list[Ranked]:
    """All papers, best first; papers of equal worth stay in the order of the feeds."""
    prepare = str.lower if config.match == "substring" else normalise
    ranked = []
    for paper in papers:
        title = prepare(paper.title)
        text = f"{title} {prepare(paper.abstract)}"
        hits = []
        for term in config.terms:
            strings = needles(term.text, config.match)
            if any(string in text for string in strings):
                in_title = any(string in title for string in strings)
                hits.append(Hit(term=term.text, weight=term.weight, in_title=in_title))
        score = sum(hit.weight * (1 + TITLE_BONUS * hit.in_title) for hit in hits)
        excluded = first_hit(
            config.exclude, title if config.exclude_in == "title" else text, config.match
        )
        ranked.append(Ranked(paper, round(score, 4), hits, excluded, order=score))
    if config.interests.strip():
        _order_by_interests(ranked, config.interests)
    return sorted(ranked, key=lambda item: -item.order)


def _order_by_interests(ranked: list[Ranked], interests: str) -> None:
    """Order by z(score) + z(similarity): neither has a scale of its own that means anything."""
    texts = [f"{item.paper.title} {item.paper.abstract}" for item in ranked]
    near = similarities(interests, texts)
    scores = z_scores([item.score for item in ranked])
    for item, similarity, score, nearness in zip(ranked, near, scores, z_scores(near), strict=True):
        item.similarity = round(similarity, 4)
        item.order = score + nearness


def z_scores(values: list[float]) -> list[float]:
    """Values in standard deviations from their mean; zeros where all are equal."""
    spread = pstdev(values) if len(values) > 1 else 0
    mean = fmean(values) if values else 0
    return [(value - mean) / spread if spread else 0.0 for value in values]


@cache
def stem(word: str) -> str:
    for ending in ENDINGS:
        if word.endswith(ending) and len(word) - len(ending) >= SHORTEST_STEM:
            return word.removesuffix(ending)
    return word


def similarities(query: str, texts: list[str]) -> list[float]:
    """Cosines of TF-IDF vectors, with the idf of these texts and 1 + log of counts."""
    counts = [Counter(map(stem, normalise(text).split())) for text in texts]
    frequency = Counter(word for count in counts for word in count)
    idf = {word: log(len(texts) / number) for word, number in frequency.items()}

    def vector(count: Counter[str]) -> dict[str, float]:
        weights = {w: (1 + log(n)) * idf[w] for w, n in count.items() if idf.get(w)}
        length = sqrt(sum(weight**2 for weight in weights.values()))
        return {word: weight / length for word, weight in weights.items()}

    wanted = vector(Counter(map(stem, normalise(query).split())))
    return [sum(v * wanted.get(w, 0) for w, v in vector(count).items()) for count in counts]


def cut(ranked: list[Ranked], config: Config) -> Cut:
    """What is shown: not excluded, of at least `min_score`, and no more than `limit`."""
    assert config.min_score is not None
    matching = [r for r in ranked if r.excluded is None and r.score >= config.min_score]
    shown = matching[: config.limit]
    last = shown[-1] if shown else None
    tied_out = sum(item.order == last.order for item in matching[config.limit :]) if last else 0
    return Cut(shown, matching, last.score if last else None, tied_out)
