"""Several runs and sweeps side by side: their points, the rows of their table, their curves."""

from collections.abc import Iterable
from dataclasses import replace
from functools import cache
from pathlib import Path

from sememe.report.curves import Plot
from sememe.report.files import Metrics, Run, read_metrics
from sememe.report.meanings import SWEEP
from sememe.report.sweeps import BASELINES, KINDS, Point, Sweep, front, run_point
from sememe.report.tokens import Series, of_log, of_sweep, tokens_plot
from sememe.report.values import number, show

COLUMNS = [title for _, title in SWEEP.values()]


def points(sources: Iterable[Run | Sweep]) -> list[Point]:
    """Of all sources, in order. Points of a second sweep carry its name."""
    found: list[Point] = []
    for place, source in enumerate(sources):
        if isinstance(source, Run):
            found.append(
                run_point(
                    source.path,
                    source.evaluate.figures,
                    number(source.metrics.latest().get("tokens")),
                )
            )
        else:
            found += named(source) if place else source.points
    return found


def named(sweep: Sweep) -> list[Point]:
    return [replace(p, name=f"{sweep.path.resolve().name}/{p.name}") for p in sweep.points]


def rows(listed: list[Point]) -> list[dict]:
    """What the table shows of each point; mean ± spread where there are several seeds."""
    best = front(listed)
    return [
        {
            "name": p.name,
            "kind": KINDS[p.kind],
            "cells": [_cell(p, key) for key in SWEEP],
            "front": p in best,
        }
        for p in listed
    ]


def _cell(point: Point, key: str) -> str:
    value = {"layer_share": point.share, "delta_nll_control": point.delta}.get(
        key, point.mean.get(key)
    )
    spread, kind = number(point.spread.get(key)), SWEEP[key][0]
    return show(value, kind) + ("" if spread is None else f" ± {show(spread, kind).lstrip('+')}")


def over_tokens(first: Run | Sweep, beside: Iterable[Run | Sweep] = ()) -> Plot | None:
    """Quality over training tokens: of whole runs where a sweep varies their length, else within
    the runs."""
    sources, log = [first, *beside], cache(_log)  # points of a sweep share their control
    if isinstance(first, Sweep):
        lengths = of_sweep(
            [p for source in sources if isinstance(source, Sweep) for p in source.points]
        )
        if lengths:
            return tokens_plot(lengths, whole_runs=True)
    found: list[Series] = []
    for source in sources:
        if isinstance(source, Run):
            name = "this run" if source is first else source.path.resolve().name
            found += [of_log(name, source.metrics, source.control)]
            found += (
                [of_log("control", source.control, Metrics([]), baseline=True)]
                if source is first
                else []
            )
        else:
            listed = source.points if source is first else named(source)
            found += [
                of_log(p.name, log(p.run), log(p.control), p.kind in BASELINES) for p in listed
            ]
    return tokens_plot(found)


def _log(run: Path | None) -> Metrics:
    return (
        read_metrics(run) if run is not None and (run / "metrics.jsonl").is_file() else Metrics([])
    )
