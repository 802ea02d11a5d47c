"""A sweep's file, or a measured run → points of quality against compute; tolerant of what is
absent."""

from dataclasses import dataclass, field
from pathlib import Path

from sememe.errors import CheckpointError
from sememe.report.files import read_json
from sememe.report.values import number

SWEEP = "sweep.json"
KINDS = {
    "concepts": "concepts",
    "fixed": "concepts, fixed stride",
    "skip": "skip + LoRA",
    "window": "sliding window + sinks",
    "control": "control",
}
"""What a point is → its legend. All but the first need no learned boundary: they are there to be
beaten."""
BASELINES = ("control", "skip", "window")


@dataclass(frozen=True)
class Point:
    """One trained model, or the mean over its seeds. `mean` and `spread` have the keys of
    evaluate.json."""

    name: str
    kind: str
    mean: dict
    spread: dict = field(default_factory=dict)
    changes: dict = field(default_factory=dict)
    tokens: float | None = None
    """Tokens trained on."""
    run: Path | None = None
    """The run folder (of the first seed) and that of its control."""
    control: Path | None = None

    @property
    def share(self) -> float | None:
        return 1.0 if self.kind == "control" else number(self.mean.get("layer_share"))

    @property
    def delta(self) -> float | None:
        return 0.0 if self.kind == "control" else number(self.mean.get("delta_nll_control"))


@dataclass(frozen=True)
class Sweep:
    path: Path
    recipe: str
    grid: dict
    points: list[Point]
    faults: list[tuple[str, str]]


def is_sweep(folder: Path) -> bool:
    return (folder / SWEEP).is_file() and not (folder / "metrics.jsonl").is_file()


def read_sweep(folder: Path) -> Sweep:
    """Raises CheckpointError where sweep.json is no sweep."""
    found = read_json(folder / SWEEP).figures
    if not isinstance(found.get("points"), list):
        raise CheckpointError(
            f"got {folder / SWEEP}, which is no sweep; need what `sememe sweep` wrote. try: the "
            "same `sememe sweep` again"
        )
    listed = found.get("runs")
    runs = [run for run in listed if isinstance(run, dict)] if isinstance(listed, list) else []
    beside = {str(run.get("name")): run.get("control") for run in runs}
    points = [_point(point, folder, beside) for point in found["points"] if isinstance(point, dict)]
    faults = [(str(run.get("name")), str(run["fault"])) for run in runs if run.get("fault")]
    grid = found.get("grid")
    return Sweep(
        folder, str(found.get("recipe")), grid if isinstance(grid, dict) else {}, points, faults
    )


def _point(found: dict, folder: Path, beside: dict) -> Point:
    runs = found.get("runs")
    first = runs[0] if isinstance(runs, list) and runs and isinstance(runs[0], str) else None
    control = beside.get(first)
    mean, spread, changes = (
        found.get(k) if isinstance(found.get(k), dict) else {}
        for k in ("mean", "spread", "changes")
    )
    return Point(
        str(found.get("name")),
        _kind(found, mean),
        mean,
        spread,
        changes,
        number(found.get("trained_tokens")),
        folder / first if first else None,
        folder / control if isinstance(control, str) else None,
    )


def run_point(folder: Path, evaluate: dict, tokens: float | None) -> Point:
    """A run folder with its evaluate.json (or {})."""
    return Point(
        folder.resolve().name, _kind(evaluate, evaluate), evaluate, tokens=tokens, run=folder
    )


def _kind(found: dict, figures: dict) -> str:
    system, boundary = found.get("system"), found.get("boundary")
    if system in BASELINES:
        return system
    if system is None and number(figures.get("concept_rate")) is None:
        return "control"  # figures of an older version: without concepts
    return "fixed" if boundary == "fixed" else "concepts"


def front(points: list[Point]) -> list[Point]:
    """Those that no other beats in both share and delta, by rising share. Points without both are
    left out."""
    best: list[Point] = []
    measured = [p for p in points if p.share is not None and p.delta is not None]
    for point in sorted(measured, key=lambda p: (p.share, p.delta)):
        if not best or point.delta < best[-1].delta:
            best.append(point)
    return best
