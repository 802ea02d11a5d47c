"""A run folder's files → plain values: tolerant of what is absent, strict about there being a run
at all."""

import json
from dataclasses import dataclass, field
from pathlib import Path

from sememe.errors import CheckpointError
from sememe.paths import usable
from sememe.report.values import number

LONGEST_DETAIL = 100_000  # characters of recipe and environment shown; the page has a size to keep


@dataclass(frozen=True)
class Metrics:
    """One line a step, in order of steps."""

    lines: list[dict]
    damaged: int = 0
    """Lines that are not a JSON object with a step: a run that was killed leaves half a line."""

    def points(self, x: str, y: str) -> list[tuple[float, float]]:
        pairs = ((number(line.get(x)), number(line.get(y))) for line in self.lines)
        return sorted((a, b) for a, b in pairs if a is not None and b is not None)

    def not_finite(self, key: str) -> int:
        """Lines where `key` was logged as something that is no finite number."""
        return sum(
            1 for line in self.lines if line.get(key) is not None and number(line[key]) is None
        )

    def latest(self) -> dict:
        """The last value of every key: held-out figures are not in every line."""
        merged: dict = {}
        for line in self.lines:
            merged.update({key: value for key, value in line.items() if value is not None})
        return merged


@dataclass(frozen=True)
class Json:
    """An optional JSON object of the run: its figures, or why there are none."""

    figures: dict = field(default_factory=dict)
    fault: str | None = None


@dataclass(frozen=True)
class Run:
    path: Path
    metrics: Metrics
    control_path: Path | None
    control: Metrics
    evaluate: Json
    benchmark: Json
    reconstruct: Json
    recipe: str
    env: str


def read_run(run: Path, control: Path | None = None) -> Run:
    """Everything the page needs. `control` None: the sibling `<run>-control`, where it has
    metrics."""
    metrics = read_metrics(run)
    if control is None:
        whole = run.resolve()  # so that '.' has a name
        sibling = whole.with_name(whole.name + "-control") if whole.name else whole
        control = sibling if sibling != whole and (sibling / "metrics.jsonl").is_file() else None
    return Run(
        path=run,
        metrics=metrics,
        control_path=control,
        control=read_metrics(control) if control is not None else Metrics([]),
        evaluate=read_json(run / "evaluate.json"),
        benchmark=read_json(run / "benchmark.json"),
        reconstruct=read_json(run / "reconstruct.json"),
        recipe=_read_text(run / "recipe.yaml"),
        env=_env(run / "env.json"),
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
    damaged = 0
    with file.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            if not line.strip():
                continue
            found = _parsed(line)
            step = number(found.get("step")) if isinstance(found, dict) else None
            if step is None:
                damaged += 1
            else:
                by_step[step] = found
    if not by_step:
        raise CheckpointError(
            f"got {file} without one readable line; need at least one logged step. "
            "try: let the run reach its first logged step"
        )
    return Metrics([by_step[step] for step in sorted(by_step)], damaged)


def _parsed(text: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def read_json(file: Path) -> Json:
    if not file.is_file():
        return Json(fault=f"There is no {file.name} in this run folder yet.")
    found = _parsed(file.read_text(encoding="utf-8", errors="replace"))
    if not isinstance(found, dict) or not found:
        return Json(fault=f"{file.name} is there but is not a readable JSON object.")
    return Json(figures=found)


def _read_text(file: Path) -> str:
    if not file.is_file():
        return ""
    text = file.read_text(encoding="utf-8", errors="replace")
    return text if len(text) <= LONGEST_DETAIL else text[:LONGEST_DETAIL] + "\n… (shortened)"


def _env(file: Path) -> str:
    text = _read_text(file)
    found = _parsed(text)
    return json.dumps(found, indent=2, ensure_ascii=False) if isinstance(found, dict) else text
