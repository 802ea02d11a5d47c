"""Sample texts as coloured stretches: a concept has one colour and one name wherever it stands."""

from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import Any

from sememe.figures import concept_name, number, objects, show
from sememe.report.files import Run

MAX_SPANS = 1000
"""Of a text: the page has a size to keep."""
GOLDEN_ANGLE = 137.508
"""Degrees; spreads neighbouring ids over the colour circle."""


@dataclass(frozen=True)
class Span:
    """A stretch of text. `writer` is its last token where that wrote the concept `name`."""

    text: str
    hue: float | None = None
    title: str = ""
    writer: str = ""
    name: str = ""


Sample = dict[str, list[Span]]
"""Caption → text."""


def samples(run: Run) -> list[Sample]:
    """Of evaluate.json: texts cut into segments, or sources, plans and what is written from them.
    Of reconstruct.json: windows, their concepts, and what came back."""
    found: list[Sample] = []
    for one in objects(run.json["evaluate"].get("samples")):
        if "pieces" in one:
            found.append({"": segments(objects(one["pieces"]), run.json["evaluate"])})
        elif "plan" in one:
            source, written, target = (
                [Span(show(one.get(key)))] for key in ("source", "written", "target")
            )
            plan = {"source": source, "plan": _plan(one["plan"]), "written from it": written}
            found.append(plan | {"target": target})
    for one in objects(run.json["reconstruct"].get("samples")):
        text, rebuilt = ([Span(show(one.get(key)))] for key in ("text", "rebuilt"))
        chips = [Span(_name(x, run.json["reconstruct"]), _hue(x)) for x in _ids(one, "concept_ids")]
        found.append({"text": text, "its concepts": chips, "written again from them": rebuilt})
    return found


def segments(pieces: list[dict], vocabulary: dict) -> list[Span]:
    """A piece with a concept, or the sink, closes a segment; what is left at the end is an open
    tail. `vocabulary` has num_concepts and codes_per_concept."""
    spans: list[Span] = []
    before: list[str] = []
    for piece in pieces[:MAX_SPANS]:
        text, concept = str(piece.get("text") or ""), number(piece.get("concept"))
        word = text.lstrip()
        if concept is None and piece.get("sink") is not True:
            before.append(text)
            continue
        # the space that most tokens begin with is not underlined; a token of spaces is made visible
        before.append(text[: len(text) - len(word)] if word else "")
        word = word or text.replace("\n", "⏎\n").replace("\t", "⇥").replace(" ", "␣")
        name = "sink" if concept is None else _name(int(concept), vocabulary)
        hue = None if concept is None else _hue(int(concept))
        spans.append(Span("".join(before), hue, f"segment of {len(before)} tokens", word, name))
        before = []
    return [*spans, Span("".join(before), title="no concept yet")] if before else spans


def frequent(texts: list[Sample]) -> list[tuple[Span, int, list[str]]]:
    """The concepts written most often in segmented texts: how often, and by which tokens."""
    writers: dict[Span, Counter[str]] = defaultdict(Counter)
    for span in (span for text in texts for span in text.get("", ()) if span.hue is not None):
        writers[Span(span.name, span.hue)][span.writer.strip()] += 1
    ranked = sorted(writers.items(), key=lambda item: -item[1].total())
    return [
        (concept, words.total(), [word for word, _ in words.most_common(8)])
        for concept, words in ranked[:12]
        if words.total() > 1
    ]


def _hue(concept: int) -> float:
    return round(concept * GOLDEN_ANGLE % 360, 1)


def _name(concept: int, vocabulary: dict) -> str:
    codes, count = (number(vocabulary.get(x)) for x in ("num_concepts", "codes_per_concept"))
    return concept_name(concept, int(codes), int(count or 1)) if codes else str(concept)


def _ids(holder: Any, key: Any) -> list[int]:
    try:
        return [x for x in holder[key] if isinstance(x, int)][:MAX_SPANS]
    except (KeyError, TypeError):
        return []


def _plan(plan: Any) -> list[Span]:
    """The ids of each type; the same id of two types is two concepts."""
    return [
        Span(str(x), _hue(x + 1009 * kind), f"type {kind}")
        for kind in range(len(plan) if isinstance(plan, list) else 0)
        for x in _ids(plan, kind)
    ]
