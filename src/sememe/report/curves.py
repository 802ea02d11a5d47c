"""What the plots share: a curve, its looks, and how it is thinned."""

import math
from dataclasses import dataclass

from sememe.report.files import Metrics
from sememe.report.values import number

MOST_POINTS = 400  # a curve 374 units wide shows no more
Points = list[tuple[float, float]]


@dataclass(frozen=True)
class Plot:
    title: str
    svg: str
    caption: str


def curve(axes, points: Points, label: str, look: dict) -> None:
    single = {"marker": "."} if len(points) == 1 else {}  # a line through one point cannot be seen
    axes.plot(*zip(*points, strict=True), label=label, **(single | look))


def line(colour: str, style: str = "-") -> dict:
    return dict(color=colour, linewidth=1.2, linestyle=style)


def dots(colour: str, marker: str) -> dict:
    return dict(color=colour, linestyle="", marker=marker, markersize=4.5)


def x_axis(run: Metrics) -> str:
    """Tokens, which a control shares; steps for a log that counts no tokens."""
    return (
        "tokens"
        if any(number(logged.get("tokens")) is not None for logged in run.lines)
        else "step"
    )


def thinned(points: Points, most: int = MOST_POINTS) -> tuple[Points, int]:
    """At most `most` means of neighbouring points, and how many points the largest mean holds."""
    width = math.ceil(len(points) / most) or 1
    groups = [points[i : i + width] for i in range(0, len(points), width)]
    return [(sum(x for x, _ in g) / len(g), sum(y for _, y in g) / len(g)) for g in groups], width
