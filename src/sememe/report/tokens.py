"""Quality against training tokens: held-out NLL on a logarithmic token axis, with a fitted
slope."""

import math
from dataclasses import dataclass, field
from statistics import linear_regression

from sememe.report.curves import Plot, Points, thinned
from sememe.report.files import Metrics
from sememe.report.meanings import TOKENS, TOKENS_DELTA, TOKENS_WHOLE, TOKENS_WITHIN
from sememe.report.svg import CONTROL, INK, MUTED, RUN, THIRD, Drawing, log_ticks
from sememe.report.sweeps import BASELINES, Point
from sememe.report.values import minus, number

MOST_SERIES, MOST_BASELINES = 6, 2
MOST_POINTS = 80  # of a curve here
LONG_LABEL, MOST_LABEL = (
    18,
    48,
)  # characters: beyond the first, labels stand in one column; beyond the second they are cut
LEAST_TO_FIT = 3
LOOKS = ((RUN, "-"), (THIRD, "-"), (INK, "-"), (RUN, ":"), (THIRD, ":"), (INK, ":"))
BASELINE_LOOKS = ((CONTROL, "-"), (MUTED, "-"))
LENGTHENS = frozenset(
    {"steps", "batch_size", "sequence_length"}
)  # recipe keys that change the tokens alone


@dataclass(frozen=True)
class Series:
    """(tokens, NLL) and (tokens, NLL minus control). The slope is that of `settled`: the points
    after the schedule."""

    label: str
    nll: Points
    settled: Points
    delta: Points = field(default_factory=list)
    settled_delta: Points = field(default_factory=list)
    baseline: bool = False


def of_log(label: str, run: Metrics, control: Metrics, baseline: bool = False) -> Series:
    """A run's held-out measurements. Before the schedule is through it is another model at each
    point, so those points are drawn and not fitted; nor is the first half of a run without a
    schedule, such as the control."""
    nll = [(x, y) for x, y in run.points("tokens", "heldout_nll") if x > 0]
    beside = dict(control.points("tokens", "heldout_nll"))
    delta = [(x, y - beside[x]) for x, y in nll if x in beside]
    stages = [(number(x.get("target_rate")), number(x.get("quantise"))) for x in run.lines]
    moving = [
        number(x.get("tokens")) or 0
        for x, stage in zip(run.lines, stages, strict=True)
        if stage != stages[-1]
    ]
    after = max(moving, default=max((x for x, _ in nll), default=0) / 2)
    settled, settled_delta = ([(x, y) for x, y in points if x > after] for points in (nll, delta))
    return Series(label, nll, settled, delta, settled_delta, baseline)


def of_sweep(points: list[Point]) -> list[Series]:
    """Whole runs that differ in their length alone, one series each; [] where no such runs are
    among the points."""
    groups: dict[tuple, list[Point]] = {}
    for point in points:
        if point.tokens and number(point.mean.get("nll")) is not None:
            same = tuple(item for item in sorted(point.changes.items()) if item[0] not in LENGTHENS)
            groups.setdefault((point.run and point.run.parent, point.kind, *same), []).append(point)
    series = []
    for (_, kind, *changes), members in groups.items():
        label = " ".join(f"{key}={value}" for key, value in changes)
        label = f"{kind} {label}".strip() if kind in BASELINES or not label else label
        nll = sorted((p.tokens, number(p.mean["nll"])) for p in members)
        delta = sorted(
            (p.tokens, p.delta) for p in members if p.delta is not None and kind != "control"
        )
        series.append(Series(label, nll, nll, delta, delta, kind in BASELINES))
    return series if any(len({x for x, _ in one.nll}) > 1 for one in series) else []


def slope(points: Points) -> tuple[float, float] | None:
    """(nats per doubling of tokens, intercept) of the least-squares line over log2(tokens)."""
    if len({x for x, _ in points}) < LEAST_TO_FIT:
        return None
    fitted = linear_regression([math.log2(x) for x, _ in points], [y for _, y in points])
    return fitted.slope, fitted.intercept


def tokens_plot(series: list[Series], whole_runs: bool = False) -> Plot | None:
    """None where no series has two points. `whole_runs`: each point is a run to its end, not a
    moment of one."""
    series = [one for one in series if one.nll]
    if not any(len(one.nll) > 1 for one in series):
        return None
    baselines = [one for one in series if one.baseline][:MOST_BASELINES]
    shown = [one for one in series if not one.baseline][: MOST_SERIES - len(baselines)]
    looks = [*LOOKS[: len(shown)], *BASELINE_LOOKS[: len(baselines)]]
    shown += baselines
    deltas = any(len(one.delta) > 1 for one in shown)
    columns = 2 if max(len(one.label) for one in shown) <= LONG_LABEL else 1
    with Drawing(
        "tokens", height=(4.1 if deltas else 3.1) + 0.17 * math.ceil(len(shown) / columns)
    ) as drawing:
        stacked = drawing.figure.subplots(
            1 + deltas, 1, sharex=True, squeeze=False, height_ratios=[3, 2][: 1 + deltas]
        )[:, 0]
        for one, (colour, style) in zip(shown, looks, strict=True):
            _one(stacked[0], one.nll, one.settled, one.label, colour, style)
            if deltas and one.delta:
                _one(stacked[1], one.delta, one.settled_delta, None, colour, style)
        stacked[0].set_ylabel("held-out NLL (nats)")
        if deltas:
            stacked[1].set_ylabel("minus control")
        axis = stacked[-1]
        axis.set(xscale="log", xlabel="tokens trained on")
        every = [x for one in shown for x, _ in one.nll]
        log_ticks(axis.xaxis, min(every), max(every))
        drawing.figure.legend(loc="outside upper center", ncols=columns)
        svg = drawing.svg("held-out NLL against tokens trained on")
    caption = (
        TOKENS + (TOKENS_WHOLE if whole_runs else TOKENS_WITHIN) + (TOKENS_DELTA if deltas else "")
    )
    if len(series) > len(shown):
        caption += f" Not drawn: {len(series) - len(shown)} more."
    return Plot("Quality against training tokens", svg, caption)


def _one(axes, points: Points, settled: Points, label: str | None, colour: str, style: str) -> None:
    fitted = slope(settled)
    ends = [settled[0][0], settled[-1][0]] if settled else []
    points, settled = thinned(points, MOST_POINTS)[0], thinned(settled, MOST_POINTS)[0]
    named = (
        None
        if label is None
        else label[:MOST_LABEL] + (f" ({minus(f'{fitted[0]:+.3f}')})" if fitted else "")
    )
    axes.plot(
        *zip(*points, strict=True),
        color=colour,
        linestyle=style,
        linewidth=1,
        marker="o",
        markersize=3.5,
        markerfacecolor="none",
        label=named,
    )
    if settled:
        axes.plot(
            *zip(*settled, strict=True), color=colour, linestyle="", marker="o", markersize=3.5
        )
    if fitted:
        axes.plot(
            ends,
            [fitted[0] * math.log2(x) + fitted[1] for x in ends],
            color=colour,
            linestyle="--",
            linewidth=1.6,
        )
