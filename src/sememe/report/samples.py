"""Sample texts cut into segments: the tail, the token that wrote the concept, its id and its
colour."""

from collections import Counter, defaultdict
from dataclasses import dataclass

from markupsafe import escape

MOST_BYTES = 500_000  # of sample text as written into the page, marks included
MARK_BYTES = 160  # what the marks of one segment take
GOLDEN_ANGLE = 137.508  # degrees; spreads neighbouring ids over the colour circle


@dataclass(frozen=True)
class Segment:
    tail: str
    writer: str
    """The token whose position wrote the concept; '' in an open tail."""
    label: str
    """The concept id, 'sink', or '' for a tail that no concept has closed."""
    title: str
    concept: int | None = None

    @property
    def hue(self) -> float | None:
        return None if self.concept is None else hue(self.concept)

    @property
    def size(self) -> int:
        # 'replace': half of a surrogate pair is legal in JSON and not in UTF-8.
        return len(escape(self.tail + self.writer).encode("utf-8", "replace")) + MARK_BYTES


@dataclass(frozen=True)
class Frequent:
    concept: int
    hue: float
    count: int
    writers: list[str]


@dataclass(frozen=True)
class Samples:
    texts: list[list[Segment]]
    frequent: list[Frequent]
    left_out: int
    """Samples shortened or left out because the page would have become too large."""


def read_samples(evaluate: dict) -> Samples:
    listed = evaluate.get("samples")
    whole = [segments(_pieces(sample)) for sample in listed] if isinstance(listed, list) else []
    whole = [text for text in whole if text]
    texts, room, complete = [], MOST_BYTES, 0
    for text in whole:
        kept = []
        for segment in text:
            room -= segment.size
            if room < 0:
                break
            kept.append(segment)
        complete += len(kept) == len(text)
        if kept:
            texts.append(kept)
    return Samples(texts, _frequent(texts), len(whole) - complete)


def segments(pieces: list[dict]) -> list[Segment]:
    """A piece with a concept, or the sink, closes a segment; what is left at the end is an open
    tail."""
    done: list[Segment] = []
    tail: list[str] = []
    for piece in pieces:
        text, concept = str(piece.get("text") or ""), _concept(piece)
        sink = piece.get("sink") is True
        if concept is None and not sink:
            tail.append(text)
            continue
        length = _tokens(len(tail) + 1)
        if sink:
            title = f"sink, carried unquantised · {length}"
            done.append(Segment(*_split(tail, text), "sink", title))
        else:
            title = f"concept {concept} · segment of {length}"
            done.append(Segment(*_split(tail, text), str(concept), title, concept))
        tail = []
    if tail:
        title = f"open tail of {_tokens(len(tail))}, no concept yet"
        done.append(Segment("".join(tail), "", "", title))
    return done


def hue(concept: int) -> float:
    return round(concept * GOLDEN_ANGLE % 360, 1)


def visible(text: str) -> str:
    """A token of nothing but white space cannot be underlined; show what it is and keep its line
    breaks."""
    if text.strip():
        return text
    return text.replace("\n", "⏎\n").replace("\t", "⇥").replace(" ", "␣")


def _split(tail: list[str], writer: str) -> tuple[str, str]:
    """Tail and writer as shown: the space that most tokens begin with is left out of the
    underlining."""
    space = writer[: len(writer) - len(writer.lstrip())] if writer.strip() else ""
    return "".join(tail) + space, visible(writer[len(space) :])


def _tokens(count: int) -> str:
    return f"{count} token" if count == 1 else f"{count} tokens"


def _pieces(sample: object) -> list[dict]:
    listed = sample.get("pieces") if isinstance(sample, dict) else None
    return (
        [piece for piece in listed if isinstance(piece, dict)] if isinstance(listed, list) else []
    )


def _concept(piece: dict) -> int | None:
    concept = piece.get("concept")
    return concept if isinstance(concept, int) and not isinstance(concept, bool) else None


def _frequent(texts: list[list[Segment]], most: int = 12, most_writers: int = 8) -> list[Frequent]:
    """The concepts written most often in the texts shown, and the tokens that wrote them."""
    counts: Counter[int] = Counter()
    writers: dict[int, Counter[str]] = defaultdict(Counter)
    for segment in (segment for text in texts for segment in text):
        if segment.concept is not None:
            counts[segment.concept] += 1
            if segment.writer:  # '' is a token that ends inside a character
                writers[segment.concept][segment.writer.strip()[:40]] += 1
    often = [(concept, count) for concept, count in counts.most_common(most) if count > 1]
    return [
        Frequent(
            concept, hue(concept), count, [w for w, _ in writers[concept].most_common(most_writers)]
        )
        for concept, count in often
    ]
