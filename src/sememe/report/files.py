"""Run and sweep folders → plain values. What a run has not measured yet is empty."""

import contextlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

from sememe.errors import CheckpointError, RecipeError, reason
from sememe.options import read_recipe
from sememe.paths import usable
from sememe.reading import FAULTS, read_object
from sememe.storage import check_manifest

BASELINES = ("control", "prune", "skip", "window")
COMMANDS = ("evaluate", "ablate", "reconstruct", "benchmark")
"""Their figures lie beside a run, as COMMAND.json."""


@dataclass(frozen=True)
class Run:
    path: Path
    recipe: dict[str, Any]
    lines: list[dict[str, Any]]
    """metrics.jsonl."""
    json: dict[str, dict[str, Any]]
    """The command that wrote it → its figures."""

    @property
    def name(self) -> str:
        return self.path.resolve().name  # that of "." too

    @property
    def system(self) -> str:
        return self.recipe["system"]


def read_run(run: Path) -> Run:
    """Raises CheckpointError or RecipeError where `run` is none, or has logged nothing yet."""
    lines = read_metrics(run)
    check_manifest(run, required=False)
    try:
        recipe = read_recipe(run / "recipe.yaml")
        recipe["system"]
    except (RecipeError, KeyError) as error:
        raise RecipeError(
            f"{run / 'recipe.yaml'} holds no readable recipe: need the file that `sememe train` "
            "wrote. try: copy it again"
        ) from error
    return Run(run, recipe, lines, {name: read_json(run / f"{name}.json") for name in COMMANDS})


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The training log of `run`. A resumed run repeats steps: the last line of a step counts.
    Raises CheckpointError where nothing was logged."""
    lines: dict[int, dict[str, Any]] = {}
    for text in read_text(usable(run) / "metrics.jsonl").splitlines():
        # A run that was killed leaves half a line, which may be JSON of another kind.
        with contextlib.suppress(*FAULTS, TypeError, LookupError):
            line = json.loads(text)
            if isinstance(line["step"], int):
                lines[line["step"]] = line
    if not lines:
        raise CheckpointError(
            f"got {run}, which has no metrics.jsonl with a logged step; need the folder of a run "
            "that has trained. try: the folder that `sememe train` printed"
        )
    return list(lines.values())


def last_values(lines: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """The last value of every key: held-out figures are not in every line."""
    return {key: x for line in lines for key, x in line.items() if x is not None}


def is_sweep(folder: Path) -> bool:
    return (folder / "sweep.json").is_file()


def read_points(folder: Path) -> list[dict[str, Any]]:
    """The trained models of a run or sweep folder: figures of evaluate.json, the mean over its
    seeds where there are several, with `point`, `kind` and the `spread` of Δ to the control."""
    if is_sweep(folder):
        return list(map(_point, read_json(folder / "sweep.json")["points"]))
    figures = read_json(folder / "evaluate.json")
    return [_point(figures | {"name": folder.resolve().name, "mean": figures, "spread": {}})]


def _point(entry: dict[str, Any]) -> dict[str, Any]:
    system = entry.get("system")
    kind = "fixed stride" if entry.get("boundary") == "fixed" else "concepts"
    point = entry["mean"] | {
        "point": entry["name"],
        "kind": system if system in BASELINES else kind,
        "spread": entry["spread"].get("delta_nll_control"),
        "trained_tokens": entry.get("trained_tokens"),
    }
    if system == "control":  # which the others are measured against
        point |= {"layer_share": 1.0, "cache_share": 1.0, "delta_nll_control": 0.0}
    return point


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file; empty where there is none."""
    try:
        return read_object(path) if path.is_file() and path.stat().st_size else {}
    except FAULTS as error:
        raise CheckpointError(
            f"{path} is no JSON ({reason(error)}): need the file as sememe wrote it. try: the "
            "command that wrote it again"
        ) from error


def read_text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


@contextlib.contextmanager
def of_run(folder: Path) -> Iterator[None]:
    """What goes wrong with values that sememe did not write, in one sentence."""
    try:
        yield
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
        raise CheckpointError(
            f"the files of {folder} hold other values than a run has ({reason(error)}): need "
            "recipe.yaml, metrics.jsonl and the .json as sememe wrote them. try: to measure it "
            "again, or another copy"
        ) from error


def dig(value: Any, path: str) -> Any:
    """What stands at a dotted path; None where there is nothing."""
    return reduce(
        lambda inner, key: inner.get(key) if isinstance(inner, dict) else None,
        path.split("."),
        value,
    )
