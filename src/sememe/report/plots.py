"""The plots of the report, as matplotlib's savefig draws them; None where there are no points."""

import base64
import io
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from sememe.figures import figure, number
from sememe.report.files import Run, last_values

MAX_POINTS = 400
"""Of a curve: a plot of 374 units width shows no more."""
PARETO = {
    "layer_share": ("compute", "share of the layers run per token"),
    "cache_share": ("cache", "share of the keys and values at the end of a block"),
}
"""What quality is drawn against: a short name, and what its axis says."""
DELTA = "delta_nll_control"
MARKERS = {
    "concepts": "o",
    "fixed stride": "s",
    "prune": "P",
    "skip": "D",
    "window": "v",
    "control": "*",
}
"""What a point of a sweep is → its mark. All but the first need no learned boundary: they are there
to be beaten."""
Points = list[tuple[float, float]]
Curve = tuple[str, Points, dict[str, Any]]
"""Legend, points, look."""
Plot = dict[str, str]
"""Title, caption and image, a data URI of the SVG."""


def pairs(records: Iterable[dict[str, Any]], x: str, y: str) -> Points:
    """Two figures of every record that has both."""
    values = ((record.get(x), record.get(y)) for record in records)
    return [pair for pair in values if None not in map(number, pair)]


def draw(
    curves: Iterable[Curve], x: str, y: str, title: str, caption: str, rows: Iterable[Any] = ()
) -> Plot | None:
    """`rows`: numbers of points, each with its place."""
    axes = Figure().subplots()
    for label, points, look in curves:
        if points:
            dots = {"marker": "o"} if len(points) < 30 else {}
            axes.plot(*zip(*points, strict=True), label=label, **dots | look)
    if not axes.lines:
        return None
    for row, point in rows:
        axes.annotate(row, point, (5, 5), textcoords="offset points")
    axes.set(xlabel=x, ylabel=y)
    axes.figure.legend(loc="outside upper left", ncols=3)
    out = io.BytesIO()
    axes.figure.savefig(out, metadata={"Date": None})
    image = base64.b64encode(out.getvalue()).decode()
    return {"title": title, "caption": caption, "image": f"data:image/svg+xml;base64,{image}"}


def training_plot(
    runs: list[Run], title: str, caption: str, y: str, figures: list[str], beside: str = ""
) -> Plot | None:
    """A plot of page.toml: figures of the first run over its training, and `beside` of the
    others."""
    curves = [(figure(key).title, _over_training(runs[0], key), {}) for key in figures]
    curves += _by_source(runs[0], f"{beside}_by_source")
    curves += [(run.name, _over_training(run, beside), {}) for run in runs[1:]]
    return draw(curves, "tokens", y, title, caption)


def _by_source(run: Run, key: str) -> list[Curve]:
    """A figure of each of several texts, where the run has it."""
    flat = replace(run, lines=[line | line.get(key, {}) for line in run.lines])
    names = last_values(run.lines).get(key, {})
    return [(Path(x).name, _over_training(flat, x), {"linestyle": ":"}) for x in names]


def _over_training(run: Run, key: str) -> Points:
    """Over the tokens trained on, which a control shares; without the steep opening."""
    points = pairs(run.lines, "tokens", key)
    return points[len(points) // 20 :: len(points) // MAX_POINTS + 1]


def distortion_plot(result: dict[str, Any]) -> Plot | None:
    """Of reconstruct.json: tokens that come back over the bits of the ids, beside what other
    coders take."""
    rates = pairs(result.get("curve") or [result], "bits_per_token", "token_accuracy")
    curves = [("concept ids", sorted(rates), {})]
    curves += [
        (
            f"{coder['name']}, {coder['of']}",
            [(coder["bits_per_token"], coder["token_accuracy"])],
            {"marker": "D"},
        )
        for coder in result.get("coders", ())
        if coder["bits_per_token"]
    ]
    caption = (
        "Tokens that come back against the bits that the ids take, at each rate. The diamonds at 1 "
        "lose nothing: the base with an arithmetic coder, zstd, xz. Left of the cheapest of them "
        "something must be lost."
    )
    return draw(curves, "bits per token", "share of the tokens", "Rate and distortion", caption)


def pareto_front(points: Iterable[dict[str, Any]], x: str) -> Points:
    """What nothing beats in both `x`, a key of PARETO, and ΔNLL, by rising `x`."""
    best: Points = []
    for point in sorted(pairs(points, x, DELTA)):
        if not best or point[1] < best[-1][1]:
            best.append(point)
    return best


def pareto_plot(points: list[dict[str, Any]], x: str) -> Plot | None:
    """Quality against a key of PARETO; numbers are the rows of the table beside it, from 1."""
    front = {"color": "0.6", "linestyle": "--", "drawstyle": "steps-post", "marker": ""}
    curves = [("front", pareto_front(points, x), front)]
    for kind, marker in MARKERS.items():
        of_kind = pairs((point for point in points if point["kind"] == kind), x, DELTA)
        curves.append((kind, of_kind, {"marker": marker, "linestyle": ""}))
    rows = [(row, at) for row, point in enumerate(points, 1) for at in pairs([point], x, DELTA)]
    name, axis = PARETO[x]
    caption = (
        f"Each mark is a trained model: NLL above its control (up) against the {axis}, the "
        "base's being 1 (right). Down and left is better; nothing beats the dashed line in both. "
        "Numbers are rows of the table."
    )
    return draw(curves, axis, "NLL minus control (nats)", f"Quality against {name}", caption, rows)
