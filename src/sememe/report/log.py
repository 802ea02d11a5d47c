"""A run folder as the doctor's rules read it: its recipe, its log, and figures by name."""

import math
import re
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

import yaml

from sememe.errors import RecipeError
from sememe.figures import number
from sememe.report.files import BASELINES, dig, read_json, read_metrics, read_recipe

PICKS = {
    "early": lambda values: median(values[: max(1, len(values) // 3)]),
    "late": lambda values: median(values[-max(1, len(values) // 3) :]),
    "first": lambda values: values[0],
    "last": lambda values: values[-1],
    "min": min,
}
"""What a figure's name ends with → which of its values is meant; thirds by their medians."""


class Unmeasured(Exception):
    """A rule has nothing to look at; the message says what is missing."""


@dataclass(frozen=True)
class Log:
    """What a run has left. `stage`: the lines logged once quantisation and rate are at their end;
    of a planner those after its warm-up, or all while that lasts; of a baseline all lines.
    `final`: figures of evaluate.json, where they were measured at the recipe's rate."""

    path: Path
    recipe: dict[str, Any]
    lines: list[dict]
    stage: list[dict]
    final: dict[str, Any]

    def setting(self, key: str) -> Any:
        """Of a dotted recipe key."""
        if (value := dig(self.recipe, key)) is None:
            raise Unmeasured(f"no {key} in recipe.yaml")
        return value

    def figure(self, name: str) -> float:
        """`KEY.late` is that of the stage's values of KEY (PICKS), `run.KEY.late` that of all
        lines; `KEY.final` that of the finished model, or the last one logged; `recipe.KEY` a
        setting."""
        scope, _, rest = name.partition(".")
        if scope == "recipe":
            return float(self.setting(rest))
        key, _, pick = name.removeprefix("run.").rpartition(".")
        if pick == "final":
            final = number(self.final.get(key))
            return self.figure(f"{key}.last") if final is None else final
        values = logged(self.lines if scope == "run" else self.stage, key)
        # one value is no trend
        if len(values) < (2 if pick in ("early", "late") else 1):
            raise Unmeasured(f"{len(values)} values of {key} in the lines that count")
        return PICKS[pick](values)

    def override(self, text: str) -> str | None:
        """`KEY=VALUE` as it stands, `KEY*FACTOR` by what the run had; None where that changes
        nothing. Whole numbers stay whole and at least 2, and the rate at most 1."""
        key, operator, amount = re.match(r"([\w.]+)(.)(.*)", text).groups()
        old, new = dig(self.recipe, key), yaml.safe_load(amount)
        if operator == "=":
            return None if new == old else text
        if isinstance(old, list):
            return f"{key}={[_scaled(x, new) for x in old]}"
        if not number(old):
            return None
        new = min(_scaled(old, new), 1.0 if key == "rate" else math.inf)
        text = str(new) if isinstance(new, int) else f"{new:g}"
        return None if new == old else f"{key}={text}"


def _scaled(value: float, factor: float) -> float:
    whole = isinstance(value, int)
    return max(2, round(value * factor)) if whole else float(f"{value * factor:.2g}")


def read_log(run: Path) -> Log:
    """Raises CheckpointError or RecipeError where `run` is none, or has logged nothing yet."""
    recipe, lines = read_recipe(run), read_metrics(run).lines
    if not isinstance(recipe.get("system"), str):
        raise RecipeError(
            f"{run / 'recipe.yaml'} holds no readable recipe: need the file that `sememe train` "
            "wrote. try: copy it again"
        )
    lines = [line | _by_entry(line) for line in lines]
    stage = lines
    if recipe["system"] == "planner":
        stage = [line for line in lines if line["step"] > warmup(recipe)] or lines
    elif recipe["system"] not in BASELINES:
        end = (1, lines[-1].get("target_rate"))
        stage = [x for x in lines if (x.get("quantise"), x.get("target_rate")) == end] or lines
    evaluate = read_json(run / "evaluate.json")
    same_rate = evaluate.get("target_rate") in (None, recipe.get("rate"))
    return Log(run, recipe, lines, stage, evaluate if same_rate else {})


def logged(lines: list[dict], key: str) -> list[float]:
    return [value for line in lines if (value := number(line.get(key))) is not None]


def warmup(recipe: dict[str, Any]) -> float:
    """Steps in which a planner does not learn."""
    stages = dig(recipe, "em.stages") or [0]
    return (number(stages[0]) or 0) * (number(recipe.get("steps")) or 0)


def _by_entry(line: dict) -> dict:
    """Of the lists in a line `KEY.0`, `KEY.1`, …, `KEY.end` where there are several entries, and
    `KEY.mean`."""
    entries: dict[str, Any] = {}
    for key, listed in line.items():
        if isinstance(listed, list) and listed:
            entries |= {f"{key}.{i}": x for i, x in enumerate(listed)}
            entries[f"{key}.end"] = listed[-1] if len(listed) > 1 else None
            values = [x for x in listed if number(x) is not None]
            entries[f"{key}.mean"] = fmean(values) if values else None
    return entries
