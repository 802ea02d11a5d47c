"""A run folder as the doctor's rules look at it: its recipe, its lines, and what it ended as."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from sememe.errors import RecipeError
from sememe.report.files import read_json, read_metrics
from sememe.report.values import number


class Unknown(Exception):
    """A rule has nothing to look at; the message says what is missing."""


@dataclass(frozen=True)
class Finding:
    """What a rule found."""

    evidence: dict[str, float]
    advice: str
    tries: tuple[str, ...] = ()
    """Overrides of the run's recipe, each to be tried on its own."""
    step: int | None = None
    """Where the evidence was logged; None where it is of the finished model (evaluate.json)."""


@dataclass(frozen=True)
class Case:
    """`stage` are the lines logged at the rate and quantise that the run ends with; of a planner
    those behind its warm-up, or all while it lasts; of other systems all lines."""

    path: Path
    recipe: dict[str, Any]
    lines: list[dict]
    stage: list[dict]
    evaluate: dict[str, Any]
    finished: bool
    damaged: dict[str, int] = field(default_factory=dict)
    """Key → lines where it is no finite number."""

    def points(self, key: str) -> list[tuple[int, float]]:
        """(step, value) of the lines of the stage that measured `key`, at least one."""
        found = logged(self.stage, key)
        if not found:
            where = " at the final rate and quantise" if self.recipe["system"] == "online" else ""
            raise Unknown(f"no {key}{where} in metrics.jsonl")
        return found

    def late(self, key: str) -> list[float]:
        """The last third of their values."""
        points = self.points(key)
        return [value for _, value in points[-max(1, len(points) // 3) :]]

    def final(self, *keys: str) -> tuple[dict[str, float], int | None]:
        """The figures of the finished model, where evaluate.json has all of them at the recipe's
        rate; else the last ones in metrics.jsonl, and their step."""
        found = {key: number(self.evaluate.get(key)) for key in keys}
        if None not in found.values() and self.evaluate.get("target_rate") in (
            None,
            self.recipe["rate"],
        ):
            return found, None
        last = {key: self.points(key)[-1] for key in keys}
        return {key: value for key, (_, value) in last.items()}, min(
            step for step, _ in last.values()
        )

    @property
    def warming(self) -> bool:
        """Whether a planner is still in its warm-up, in which it does not learn."""
        return self.lines[-1]["step"] <= _warm(self.recipe)

    def value(self, key: str) -> Any:
        """Of a dotted key; None where this run's recipe has none."""
        found: Any = self.recipe
        for part in key.split("."):
            found = found.get(part) if isinstance(found, dict) else None
        return found

    def scaled(self, key: str, factor: float, least: int = 1) -> str:
        """An override of `key` by a multiple of what it is; whole numbers stay whole and at
        `least`."""
        value = self.value(key)
        whole = isinstance(value, int)
        return (
            f"{key}={max(least, round(value * factor))}" if whole else f"{key}={value * factor:.2g}"
        )

    def changes(self, override: str) -> bool:
        """Whether `key=value` is anything else than what the run had."""
        key, _, value = override.partition("=")
        return self.value(key) != yaml.safe_load(value)

    def denser(self) -> str:
        """An override that raises the rate by half."""
        return f"rate={min(1.0, 1.5 * self.recipe['rate']):g}"


@dataclass(frozen=True)
class Rule:
    """`sign` says what is looked at; its limits stand in braces. `look` returns None where all is
    well."""

    name: str
    sign: str
    limit: dict[str, float]
    look: Callable[[Case, dict[str, float]], Finding | None]
    systems: tuple[str, ...] = ("online",)


def logged(lines: list[dict], key: str) -> list[tuple[int, float]]:
    """(step, value) of the lines that measured `key`."""
    return [(line["step"], value) for line in lines if (value := number(line.get(key))) is not None]


def gradient_parts(lines: list[dict], of_whole: bool = False) -> dict[str, list[float]]:
    """Gradient norms by module, or their shares in the whole."""
    found: dict[str, list[float]] = {}
    for line in lines:
        whole = max(number(line.get("grad_norm")) or 0.0, 1e-30) if of_whole else 1.0
        for key in line:
            if key.startswith("grad_norm_") and (norm := number(line[key])) is not None:
                found.setdefault(key.removeprefix("grad_norm_"), []).append(norm / whole)
    return found


def thirds(values: list[float], what: str, fewest: int = 6) -> tuple[list[float], list[float]]:
    """The first and the last third; Unknown where there are too few for that."""
    if len(values) < fewest:
        raise Unknown(f"{len(values)} values of {what}, need {fewest}")
    return values[: len(values) // 3], values[-(len(values) // 3) :]


def read_case(run: Path) -> Case:
    """Raises CheckpointError or RecipeError where `run` is not the folder of a run that has logged
    something."""
    metrics, recipe = read_metrics(run), _read_recipe(run / "recipe.yaml")

    def at_the_end(line: dict) -> bool:
        return line.get("quantise") == 1 and math.isclose(
            number(line.get("target_rate")) or 0, recipe["rate"], rel_tol=1e-6
        )

    stage = [line for line in metrics.lines if recipe["system"] != "online" or at_the_end(line)]
    if recipe["system"] == "planner":
        stage = [line for line in stage if line["step"] > _warm(recipe)] or stage
    damaged = {
        key: count
        for key in ("loss", "grad_norm", "heldout_nll")
        if (count := metrics.not_finite(key))
    }
    return Case(
        path=run,
        recipe=recipe,
        lines=metrics.lines,
        evaluate=read_json(run / "evaluate.json").figures,
        damaged=damaged,
        stage=stage,
        finished=(run / "model" / "manifest.json").is_file(),
    )


def _warm(recipe: dict[str, Any]) -> int:
    """Steps in which a planner stands still."""
    return round(recipe["em"]["warmup"] * recipe["steps"]) if recipe["system"] == "planner" else 0


NUMBERS = (
    "steps",
    "sequence_length",
    "rate",
    "max_tail",
    "num_concepts",
    "code_temperature",
    "learning_rate",
    "concept_learning_rate",
    "calibration_tokens",
)


def _read_recipe(file: Path) -> dict[str, Any]:
    """What rules take for granted is there; keys that older runs lack they ask for."""
    try:
        recipe = yaml.safe_load(file.read_text(encoding="utf-8"))
        wrong = [key for key in NUMBERS if number(recipe.get(key)) is None]
        parts = (
            ("plan", "em", "curriculum", "target_length")
            if recipe.get("system") == "planner"
            else ()
        )
        wrong += [key for key in ("system", "precision", "lora", *parts) if key not in recipe]
    except (OSError, ValueError, yaml.YAMLError, AttributeError):
        wrong = ["recipe"]
    if wrong:
        raise RecipeError(
            f"{file} holds no readable {wrong[0]}: need the file that `sememe train` wrote. try: "
            "copy it again"
        )
    return recipe
