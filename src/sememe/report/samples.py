"""Sample texts as coloured stretches: a concept has one colour and one name wherever it stands."""

from collections import Counter
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
    evaluate, reconstruct = run.json["evaluate"], run.json["reconstruct"]
    texts: list[Sample] = []
    for sample in objects(evaluate.get("samples")):
        if "pieces" in sample:
            texts.append({"": segments(objects(sample["pieces"]), evaluate)})
        elif isinstance(sample.get("plan"), list):
            plan = {f"plan, type {i}": _chips(ids, {}, i) for i, ids in enumerate(sample["plan"])}
            texts.append(_texts(sample, "source") | plan | _texts(sample, "written", "target"))
    for sample in objects(reconstruct.get("samples")):
        ids = {"its concepts": _chips(sample.get("concept_ids"), reconstruct)}
        texts.append(_texts(sample, "text") | ids | _texts(sample, "rebuilt"))
    return texts


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


def frequent(texts: list[Sample]) -> list[dict]:
    """The concepts written most often in segmented texts, how often, and by which tokens."""
    spans = [span for text in texts for span in text.get("", ()) if span.hue is not None]
    counts = Counter(span.name for span in spans)
    return [
        {"concept": name, "times": times, "by": sorted({x.writer for x in spans if x.name == name})}
        for name, times in counts.most_common(12)
    ]


def _hue(concept: int) -> float:
    return round(concept * GOLDEN_ANGLE % 360, 1)


def _name(concept: int, vocabulary: dict) -> str:
    codes, count = (number(vocabulary.get(x)) for x in ("num_concepts", "codes_per_concept"))
    return concept_name(concept, int(codes), int(count or 1)) if codes else str(concept)


def _texts(sample: dict, *keys: str) -> Sample:
    return {key: [Span(show(sample.get(key)))] for key in keys}


def _chips(ids: Any, vocabulary: dict, kind: int = 0) -> list[Span]:
    """Concept ids as coloured names. The same id of two types of a plan is two concepts."""
    listed = ids[:MAX_SPANS] if isinstance(ids, list) else []
    return [Span(_name(x, vocabulary), _hue(x + 1009 * kind)) for x in listed if isinstance(x, int)]
