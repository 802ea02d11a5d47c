"""A run as the doctor's rules read it: figures by name."""

import math
import re
from collections.abc import Iterable
from statistics import fmean, median
from typing import Any

import yaml

from sememe.figures import number
from sememe.report.files import Run, dig

PICKS = {
    "early": lambda values: median(values[: len(values) // 3 or 1]),
    "late": lambda values: median(values[-(len(values) // 3 or 1) :]),
    "first": lambda values: values[0],
    "last": lambda values: values[-1],
    "final": lambda values: values[-1],
    "min": min,
}
"""What a figure's name ends with → which of its values is meant; thirds by their medians."""


class Unmeasured(Exception):
    """A rule has nothing to look at; the message says what is missing."""


class Log:
    """Figures of a run, `log("loss.late")`, and what a rule has looked up of them.

    The stage that counts is every line once codes are fully quantised; of a planner, every line
    after its warm-up."""

    def __init__(self, run: Run):
        self.run = run
        self.evidence: dict[str, float] = {}
        stages = dig(run.recipe, "em.stages") if run.system == "planner" else None
        first = stages[0] * run.recipe["steps"] if stages else 0
        self.stage = [
            line for line in run.lines if line["step"] > first and line.get("quantise", 1) == 1
        ]
        evaluate = run.json["evaluate"]
        is_trained_rate = evaluate.get("target_rate") in (None, run.recipe.get("rate"))
        self.final = evaluate if is_trained_rate else {}
        """Figures of the finished model, where they were measured at the recipe's rate."""

    def __call__(self, name: str) -> Any:
        """`recipe.KEY` is a setting. `KEY.late` is one of the values that KEY has in the stage
        (PICKS), `run.KEY.late` of those in all lines, `KEY.final` that of the finished model, or
        the last one logged. Of a list `KEY.0.late` is of its first entry, `KEY.mean.late` of its
        mean."""
        scope, _, setting = name.partition(".")
        if scope == "recipe":
            if (value := dig(self.run.recipe, setting)) is None:
                raise Unmeasured(f"no {setting} in recipe.yaml")
            return value
        key, _, pick = name.removeprefix("run.").rpartition(".")
        lines = self.run.lines if scope == "run" else self.stage
        values = _column([*lines, self.final] if pick == "final" else lines, key)
        # one value is no trend
        if len(values) < (2 if pick in ("early", "late") else 1):
            raise Unmeasured(f"{len(values)} values of {key} in the lines that count")
        self.evidence[name] = PICKS[pick](values)
        return self.evidence[name]

    def override(self, text: str) -> str | None:
        """`KEY=VALUE` as it stands, `KEY*FACTOR` by what the run had; None where that changes
        nothing."""
        key, operator, word = re.match(r"([\w.]+)(.)(.*)", text).groups()
        old = dig(self.run.recipe, key)
        new = yaml.safe_load(word)
        if operator == "*":
            new = old and _scaled(old, new)
            if key == "rate" and number(new):
                new = min(new, 1.0)
            text = f"{key}={new}"
        return None if new == old else text


def _scaled(value: Any, factor: float) -> Any:
    """Whole numbers stay whole and at least 2; what is no number stays as it is."""
    if isinstance(value, list):
        return [_scaled(x, factor) for x in value]
    if isinstance(value, int):
        return max(2, round(value * factor))
    return float(f"{value * factor:.2g}") if number(value) else value


def _column(lines: Iterable[dict[str, Any]], key: str) -> list[float]:
    """The finite values of KEY, or of KEY.ENTRY, an entry of a list or its mean."""
    name, _, entry = key.partition(".")
    values = [line[name] for line in lines if line.get(name) not in (None, [])]
    if entry == "mean":
        values = [fmean([x for x in value if x is not None] or [math.nan]) for value in values]
    elif entry:
        values = [value[int(entry)] for value in values]
    return [x for x in values if x is not None and math.isfinite(x)]
