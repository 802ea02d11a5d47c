"""Every figure that a run writes: its column title, unit, meaning, and what is healthy.

The table itself is figures.toml. Tables on the terminal, the report, the doctor's page and
docs/figures.md (`python -m sememe.figures > docs/figures.md`) all come from it. Torch-free.
"""

import math
import re
import tomllib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from rich.filesize import decimal

MAX_ENTRIES = 12
"""Of a list that is shown."""

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
        return show(value, self.unit)

    def is_healthy(self, value: Any) -> bool | None:
        """Whether `value` is in the range at the head of `healthy`; None where none is given."""
        limit = re.match(r"([≥≤]) ([\d.]+)", self.healthy)
        if limit is None or number(value) is None:
            return None
        bound = float(limit[2])
        return value >= bound if limit[1] == "≥" else value <= bound


def read_toml(path: Path) -> dict[str, Any]:
    return tomllib.loads(path.read_text(encoding="utf-8"))


SECTIONS = {
    heading: [Figure(key, *row) for key, row in section.items()]
    for heading, section in read_toml(Path(__file__).with_suffix(".toml")).items()
}
FIGURES = {figure.key: figure for section in SECTIONS.values() for figure in section}


def figure(key: str) -> Figure:
    """That of `key`; one without a description where this version does not know it."""
    return FIGURES.get(key) or Figure(key, key)


def rows(result: dict) -> Iterator[tuple[str, str, str]]:
    """(key, formatted value, meaning) of what a JSON object has beside tables."""
    for key, value in result.items():
        if is_plain(value):
            yield key, figure(key).show(value), figure(key).meaning


def table(
    records: list[dict], keys: Iterable[str] | None = None
) -> tuple[list[str], list[list[str]]]:
    """Column titles and formatted cells of JSON objects. `keys`: the columns; by default every key
    with a plain value, in the order of the first object that has it."""
    if keys is None:
        keys = dict.fromkeys(
            key for record in records for key, value in record.items() if is_plain(value)
        )
    shown = [figure(key) for key in keys]
    cells = [[each.show(record.get(each.key)) for each in shown] for record in records]
    return [each.title for each in shown], cells


def is_plain(value: Any) -> bool:
    """Whether a value goes into one cell: it holds no JSON objects, or is that of timed rounds."""
    if isinstance(value, dict):
        return "median" in value
    return not is_records(value)


def is_records(value: Any) -> bool:
    """Whether a value is a list of JSON objects."""
    return isinstance(value, list) and any(isinstance(x, dict) for x in value)


def number(value: Any) -> float | None:
    """The finite number in `value`, or None."""
    return value if isinstance(value, int | float) and math.isfinite(value) else None


def show(value: Any, unit: str = "") -> str:
    """`value` as its unit reads best; what is not a finite number is "–", never a guess."""
    if isinstance(value, list):
        more = " …" if len(value) > MAX_ENTRIES else ""
        return " · ".join(show(x, unit) for x in value[:MAX_ENTRIES]) + more
    if isinstance(value, dict):  # of timed rounds
        median, low, high = (show(value[key], unit) for key in ("median", "min", "max"))
        return f"{median} ({low}–{high})"
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "yes" if value else "no"
    if number(value) is None:
        return "–"
    # a true minus sign in front; the one in an exponent stays
    return re.sub("^-", "−", FORMATS.get(unit, _general)(value))


def _general(amount: float) -> str:
    return f"{amount:,.0f}" if amount % 1 == 0 or abs(amount) >= 1000 else f"{amount:.4g}"


def _time(amount: float) -> str:
    return f"{amount:.1f} s" if amount < 60 else str(timedelta(seconds=round(amount)))


FORMATS = {
    "nats": lambda x: f"{x:.4f}",
    "delta": lambda x: f"{x:+.4f}",
    "ratio": lambda x: f"{x:.2f}×",
    "share": lambda x: f"{100 * x:.3g} %",
    "speed": lambda x: f"{x:,.0f} tokens/s" if x >= 100 else f"{x:.3g} tokens/s",
    "bytes": lambda x: decimal(int(x), precision=2),
    "time": _time,
    "delay": lambda x: f"{1000 * x:,.0f} ms" if x < 10 else _time(x),
}


def concept_name(concept: int, num_concepts: int, codes_per_concept: int) -> str:
    """A concept's id as its codes: 5270661 of two codes out of 4,096 is `1286·3205`.

    An id is a number of base `num_concepts` with a digit for each code, the first code's last."""
    digits = [str(concept // num_concepts**g % num_concepts) for g in range(codes_per_concept)]
    return "·".join(reversed(digits))


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
