"""Sample texts as coloured stretches: a concept has one colour and one name wherever it stands."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from sememe.figures import concept_name

MAX_CODES = 4
"""Of a concept, as `keys.py` has it."""
MAX_PIECES = 1000
"""Of a text: the page has a size to keep."""
GOLDEN_ANGLE = 137.508
"""Degrees; spreads neighbouring ids over the colour circle."""


class Span(NamedTuple):
    """A stretch of text, and the name of the concept that closes it."""

    text: str
    hue: float | None = None
    name: str = ""


def samples(result: dict[str, Any]) -> list[dict[str, list[Span]]]:
    """Caption → text of each sample in a JSON file: running text cut into segments; a source, its
    plan and what is written from it; or a window, its concepts and what came back."""
    name = str
    if "num_concepts" in result:
        codes = {key: result[key] for key in ("num_concepts", "codes_per_concept")}
        if not 1 <= codes["codes_per_concept"] <= MAX_CODES:
            raise ValueError(f"codes_per_concept = {codes['codes_per_concept']}")
        name = partial(concept_name, **codes)
    return [
        {key: spans(key, value, name) for key, value in sample.items()}
        for sample in result.get("samples", ())
    ]


def spans(key: str, value: Any, name: Callable[[int], str]) -> list[Span]:
    if key == "pieces":
        return segments(value, name)
    if key == "concept_ids":
        return [Span(name(concept), _hue(concept)) for concept in value]
    if key == "plan":  # the same id of two types is two concepts
        return [
            Span(f"{kind}:{concept}", _hue(concept + 1009 * kind))
            for kind, concepts in enumerate(value)
            for concept in concepts
        ]
    return [Span(value)]


def segments(pieces: list[dict[str, Any]], name: Callable[[int], str]) -> list[Span]:
    """A piece with a concept, or the sink, closes a segment; what is left at the end is an open
    tail."""
    closed: list[Span] = []
    text = ""
    for piece in pieces[:MAX_PIECES]:
        text += piece["text"]
        concept = piece["concept"]
        if concept is not None:
            closed.append(Span(text, _hue(concept), name(concept)))
        elif piece["sink"]:
            closed.append(Span(text, name="sink"))
        else:
            continue
        text = ""
    return [*closed, Span(text)]


def _hue(concept: int) -> float:
    return round(concept * GOLDEN_ANGLE % 360, 1)
