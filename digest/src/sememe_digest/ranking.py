"""What each paper is worth by terms and by nearness to `interests`, and why."""

import re
from collections import Counter
from functools import cache
from math import log, sqrt
from statistics import pstdev

from sememe_digest.config import Config
from sememe_digest.papers import Entry, Paper

TITLE_BONUS = 0.5  # of a term's weight, on top, where the title has it
# What is cut off words for `interests`, so that compress, compressed and compression are one.
ENDING = re.compile(r"(?<=\w{4})((at)?ions?|ings?|ers?|ed|es|(?<!s)s|e)\b")


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
        found = {term: weight for term, weight in config.terms.items() if occurs(term, text)}
        hits = [{"term": t, "weight": w, "in_title": occurs(t, title)} for t, w in found.items()]
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


def similarities(query: str, texts: list[str]) -> list[float]:
    """Cosines of TF-IDF vectors, with the idf of these texts and 1 + log of counts."""
    asked, *counts = (Counter(ENDING.sub("", normalise(text)).split()) for text in (query, *texts))
    frequency = Counter(word for count in counts for word in count)
    idf = {word: log(len(texts) / number) for word, number in frequency.items()}

    def vector(count: Counter[str]) -> dict[str, float]:
        weights = {word: (1 + log(n)) * idf.get(word, 0) for word, n in count.items()}
        length = sqrt(sum(weight**2 for weight in weights.values())) or 1
        return {word: weight / length for word, weight in weights.items()}

    wanted = vector(asked)
    return [sum(v * wanted.get(w, 0) for w, v in vector(count).items()) for count in counts]
