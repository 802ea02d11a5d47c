"""Every figure that a run writes: its column title, unit, meaning, and what is healthy.

The table itself is figures.toml. Tables on the terminal, the report, the doctor's page and
docs/figures.md (`python -m sememe.figures > docs/figures.md`) all come from it. Torch-free.
"""

import json
import math
import re
import tomllib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

NOT_MEASURED = "–"
MAX_CHARACTERS = 400
"""Of a text or of an unforeseen nested value: a page has a size to keep."""
MAX_ENTRIES = 12
"""Of a list."""
READ_FROM = {
    "planner": "its own plan",
    "posterior": "z* (target in view)",
    "shuffle": "plans shuffled",
    "random": "random plans",
    "empty": "no plan",
    "source": "the source itself",
    "source (control)": "the source, by the control",
}
"""What a planner's target was read from → how it is shown."""


INTRODUCTION = """# Figures

Every key of a run's files. Generated from `src/sememe/figures.toml` by
`python -m sememe.figures > docs/figures.md`. A key is absent or null where it was not measured or
says nothing about the system. NLL is in nats.
"""


@dataclass(frozen=True)
class Figure:
    """One row of figures.toml."""

    key: str
    title: str
    unit: str = ""
    meaning: str = "(no description in this version)"
    healthy: str = ""

    def show(self, value: Any) -> str:
        if self.key == "given" and isinstance(value, str):
            value = READ_FROM.get(value, value)
        return show(value, self.unit)

    def is_healthy(self, value: Any) -> bool | None:
        """Whether `value` is in the range at the head of `healthy`; None where none is given."""
        limit, measured = re.match(r"([≥≤]) ([\d.]+)", self.healthy), number(value)
        if limit is None or measured is None:
            return None
        sign, bound = limit.groups()
        return measured >= float(bound) if sign == "≥" else measured <= float(bound)


def _read() -> dict[str, list[Figure]]:
    text = Path(__file__).with_name("figures.toml").read_text(encoding="utf-8")
    return {
        heading: [Figure(key, *row) for key, row in section.items()]
        for heading, section in tomllib.loads(text).items()
    }


SECTIONS = _read()
FIGURES = {figure.key: figure for section in SECTIONS.values() for figure in section}


def figure(key: str) -> Figure:
    """That of `key`; one without a description where this version does not know it."""
    return FIGURES.get(key) or Figure(key, key)


def rows(result: dict) -> Iterator[tuple[str, str, str]]:
    """(key, formatted value, meaning) of a JSON object's figures, in the order of the table, then
    those that this version does not know. Objects and lists of them are left out: see `table`."""
    known = [key for key in FIGURES if key in result]
    for key in dict.fromkeys([*known, *result]):
        if not _is_nested(result[key]):
            yield key, figure(key).show(result[key]), figure(key).meaning


def table(
    records: list[dict], keys: Iterable[str] | None = None
) -> tuple[list[str], list[list[str]]]:
    """Column titles and formatted cells of JSON objects. `keys`: the columns; by default every key
    with a plain value, in the order of the first object that has it."""
    if keys is None:
        keys = dict.fromkeys(
            key for record in records for key in record if not _is_nested(record[key])
        )
    shown = [figure(key) for key in keys]
    return [column.title for column in shown], [
        [column.show(record.get(column.key)) for column in shown] for record in records
    ]


def _is_nested(value: Any) -> bool:
    members = value if isinstance(value, list) else [value]
    return any(isinstance(x, dict | list) for x in members)


def objects(value: Any) -> list[dict]:
    """The JSON objects in a list; none where it is no list."""
    return [x for x in value if isinstance(x, dict)] if isinstance(value, list) else []


def number(value: Any) -> float | None:
    """The finite number in `value`, or None. JSON's true is no number, though Python's bool is an
    int."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:  # an integer beyond 1e308
        return None


def show(value: Any, unit: str = "") -> str:
    """`value` as its unit reads best; what is not a finite number is "–", never a guess."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return NOT_MEASURED
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, str):
        return shorten(value)
    if isinstance(value, list) and not _is_nested(value):
        return " · ".join(show(x, unit) for x in value[:MAX_ENTRIES]) + (
            " …" if len(value) > MAX_ENTRIES else ""
        )
    amount = number(value)
    if amount is None:
        return shorten(json.dumps(value, ensure_ascii=False, default=str))
    return minus(_FORMATS.get(unit, _general)(amount))


def shorten(text: str) -> str:
    return text if len(text) <= MAX_CHARACTERS else text[: MAX_CHARACTERS - 1] + "…"


def minus(text: str) -> str:
    """A true minus sign in front; the one in an exponent stays."""
    return "−" + text[1:] if text.startswith("-") else text


def _general(amount: float) -> str:
    whole = amount == round(amount) and abs(amount) < 1e15
    return (
        f"{amount:,.0f}" if whole else f"{amount:,.1f}" if abs(amount) >= 100 else f"{amount:.4g}"
    )


def _bytes(amount: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if abs(amount) < 1000:
            return f"{amount:.4g} {unit}"
        amount /= 1000
    return f"{amount:.4g} TB"


def _time(amount: float) -> str:
    if amount < 60:
        return f"{amount:.1f} s"
    minutes, seconds = divmod(round(amount), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {seconds:02d} s"


_FORMATS = {
    "nats": lambda x: f"{x:.4f}",
    "delta": lambda x: f"{x:+.4f}",
    "ratio": lambda x: f"{x:.2f}×",
    "share": lambda x: f"{100 * x:.3g} %",
    "speed": lambda x: f"{x:,.0f} tokens/s" if abs(x) >= 100 else f"{x:.3g} tokens/s",
    "bytes": _bytes,
    "time": _time,
}


def concept_name(concept: int, num_concepts: int, codes_per_concept: int) -> str:
    """A concept's id as its codes: 5270661 of two codes out of 4,096 is `1286·3205`.

    An id is a number of base `num_concepts` with a digit for each code, the first code's last."""
    digits = [
        concept // num_concepts**stage % num_concepts
        for stage in reversed(range(codes_per_concept))
    ]
    return "·".join(map(str, digits))


def markdown(titles: list[str], cells: Iterable[Iterable[str]]) -> str:
    """A table of texts."""
    lines = [titles, ["---"] * len(titles), *cells]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def document() -> str:
    """docs/figures.md."""
    text = INTRODUCTION
    for heading, section in SECTIONS.items():
        cells = [(f"`{row.key}`", row.unit, row.meaning, row.healthy) for row in section]
        text += f"\n## {heading}\n\n" + markdown(["key", "unit", "meaning", "healthy"], cells)
    return text


if __name__ == "__main__":
    print(document(), end="")
