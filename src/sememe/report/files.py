"""Run and sweep folders → plain values: tolerant of what is absent, strict about there being a run
at all. Reads files only."""

import json
from dataclasses import dataclass, field
from functools import reduce
from pathlib import Path
from typing import Any

import yaml

from sememe.errors import CheckpointError
from sememe.figures import number, objects
from sememe.paths import usable

BASELINES = ("control", "skip", "window")
MEASURED = ("evaluate", "ablate", "reconstruct", "benchmark")
"""The commands whose figures lie beside a run, as COMMAND.json."""


@dataclass(frozen=True)
class Metrics:
    """metrics.jsonl: one line a logged step, in order of steps."""

    lines: list[dict] = field(default_factory=list)
    unreadable: int = 0
    """Lines that are no JSON object with a step: a run that was killed leaves half a line."""

    def points(self, x: str, y: str) -> list[tuple[float, float]]:
        pairs = ((number(line.get(x)), number(line.get(y))) for line in self.lines)
        return [(a, b) for a, b in pairs if a is not None and b is not None]

    def last(self) -> dict:
        """The last value of every key: held-out figures are not in every line."""
        return {key: x for line in self.lines for key, x in line.items() if x is not None}


@dataclass(frozen=True)
class Run:
    path: Path
    metrics: Metrics
    recipe: dict[str, Any]
    """Empty where recipe.yaml is missing or unreadable."""
    json: dict[str, dict]
    """The command that wrote it → its figures; empty where there are none."""
    control_path: Path | None = None
    control: Metrics = Metrics()

    @property
    def system(self) -> str:
        """By the recipe, which a run has from its first step on."""
        system = self.recipe.get("system") or self.json["evaluate"].get("system")
        return system if isinstance(system, str) else "online"


def is_sweep(folder: Path) -> bool:
    return (folder / "sweep.json").is_file() and not (folder / "metrics.jsonl").is_file()


def read_sweep(folder: Path) -> dict:
    """The sweep.json of `sememe sweep`."""
    content = read_json(folder / "sweep.json")
    if not isinstance(content.get("points"), list):
        raise CheckpointError(
            f"got {folder / 'sweep.json'}, which is no sweep; need what `sememe sweep` wrote. try: "
            "the same `sememe sweep` again"
        )
    return content


def read_points(folder: Path, prefix: str = "") -> list[dict]:
    """The trained models of a run or sweep folder: figures of evaluate.json, the mean over its
    seeds where there are several, with `point`, `kind` and the `spread` of Δ to the control."""
    if is_sweep(folder):
        entries = objects(read_sweep(folder)["points"])
    else:
        figures = read_json(folder / "evaluate.json")
        entries = [figures | {"name": folder.resolve().name, "mean": figures}]
    points = []
    for entry in entries:
        system, trained = entry.get("system"), {"trained_tokens": entry.get("trained_tokens")}
        kind = "fixed stride" if entry.get("boundary") == "fixed" else "concepts"
        point = plain(entry.get("mean")) | trained
        point["point"] = prefix + str(entry.get("name"))
        point["kind"] = system if system in BASELINES else kind
        point["spread"] = plain(entry.get("spread")).get("delta_nll_control")
        if system == "control":  # which the others are measured against
            point |= {"layer_share": 1.0, "delta_nll_control": 0.0}
        points.append(point)
    return points


def read_run(run: Path, control: Path | None = None) -> Run:
    """Everything that a run folder holds. `control` None: the sibling `<run>-control`, where it has
    metrics. Raises CheckpointError where `run` has logged nothing."""
    metrics = read_metrics(run)
    if control is None:
        whole = run.resolve()  # so that "." has a name
        sibling = whole.with_name(f"{whole.name}-control")
        control = sibling if (sibling / "metrics.jsonl").is_file() else None
    return Run(
        path=run,
        metrics=metrics,
        recipe=read_recipe(run),
        json={command: read_json(run / f"{command}.json") for command in MEASURED},
        control_path=control,
        control=Metrics() if control is None else read_metrics(control),
    )


def read_metrics(run: Path) -> Metrics:
    """The training log of `run`. A resumed run repeats steps: the last line of a step counts."""
    if not usable(run).is_dir():
        raise CheckpointError(
            f"got {run}, which is not a folder; need a run folder with a metrics.jsonl. "
            "try: the folder that `sememe train` printed"
        )
    file = run / "metrics.jsonl"
    if not file.is_file():
        raise CheckpointError(
            f"got {run}, which has no metrics.jsonl; need the folder of a run that has trained. "
            "try: `sememe train RECIPE` first, then the folder it prints"
        )
    by_step: dict[float, dict] = {}
    unreadable = 0
    for text in read_text(file).splitlines():
        line = plain(_parsed(text))
        step = number(line.get("step"))
        if step is not None:
            by_step[step] = line
        elif text.strip():
            unreadable += 1
    if not by_step:
        raise CheckpointError(
            f"got {file} without one readable line; need at least one logged step. "
            "try: let the run reach its first logged step"
        )
    return Metrics([by_step[step] for step in sorted(by_step)], unreadable)


def read_recipe(run: Path) -> dict[str, Any]:
    try:
        return plain(yaml.safe_load(read_text(run / "recipe.yaml")))
    except yaml.YAMLError:
        return {}


def read_json(file: Path) -> dict:
    """The object in a file; empty where there is none."""
    return plain(_parsed(read_text(file)))


def read_text(file: Path) -> str:
    return file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""


def plain(value: Any) -> dict:
    """A JSON object as it is; anything else as an empty one."""
    return value if isinstance(value, dict) else {}


def dig(value: Any, path: str) -> Any:
    """What stands at a dotted path; None where there is nothing."""
    return reduce(lambda inner, key: plain(inner).get(key), path.split("."), value)


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
