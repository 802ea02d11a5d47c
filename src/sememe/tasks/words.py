"""Invented words: syllables put together by a seeded generator. No list of words is kept
anywhere."""

import random

ONSETS = (
    "b",
    "d",
    "f",
    "g",
    "k",
    "l",
    "m",
    "n",
    "p",
    "r",
    "s",
    "t",
    "v",
    "z",
    "br",
    "dr",
    "gl",
    "kr",
    "pl",
    "sk",
    "tr",
)
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
