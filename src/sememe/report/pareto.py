"""Quality against compute: ΔNLL to the control over the share of layers run, and the front of
it."""

import itertools

from sememe.report.curves import Plot
from sememe.report.meanings import PARETO
from sememe.report.svg import CONTROL, INK, MUTED, RUN, THIRD, Drawing
from sememe.report.sweeps import KINDS, Point, front
from sememe.report.values import number

LOOKS = {
    "concepts": (RUN, "o"),
    "fixed": (THIRD, "s"),
    "skip": (CONTROL, "D"),
    "window": (MUTED, "v"),
    "control": (INK, "*"),
}
PLACES = (
    (10, 7),
    (-10, -7),
    (10, -7),
    (-10, 7),
    (0, 11),
    (0, -11),
    (13, 0),
    (-13, 0),
    (18, 12),
    (-18, -12),
)
"""Where a number may stand beside its mark, in points; the first that is free."""


def pareto_plot(points: list[Point]) -> Plot | None:
    """None where fewer than two models besides the control are measured against it. Labels number
    `points` from 1."""
    drawn = [
        (place, p)
        for place, p in enumerate(points, 1)
        if p.share is not None and p.delta is not None
    ]
    if sum(p.kind != "control" for _, p in drawn) < 2:
        return None
    if not any(p.kind == "control" for _, p in drawn):
        drawn.append((0, Point("control", "control", {})))  # what each delta is to
    with Drawing("pareto", height=3.9) as drawing:
        axes = drawing.figure.subplots()
        best = front([p for _, p in drawn])
        axes.step(
            [p.share for p in best],
            [p.delta for p in best],
            where="post",
            color=MUTED,
            linestyle="--",
            linewidth=1,
            label="front",
            zorder=1,
        )
        for kind, label in KINDS.items():
            members = [p for _, p in drawn if p.kind == kind]
            if members:
                _marks(axes, members, label, *LOOKS[kind])
        axes.set(
            xlabel="layers run per token, share of the base", ylabel="NLL minus control (nats)"
        )
        axes.xaxis.set_major_formatter(lambda x, _: f"{100 * x:.4g} %")
        axes.margins(0.09)
        drawing.figure.legend(loc="outside upper center", ncols=3)
        _labels(
            drawing,
            axes,
            [(str(place) if place else "", p) for place, p in drawn if p.kind != "control"],
            best,
        )
        svg = drawing.svg("NLL minus control against the share of layers run")
    caption = PARETO + " Numbers are those of the table."
    if any(any(_bars(p)) for _, p in drawn):
        caption += " Bars: one standard deviation over seeds to each side."
    left = len(points) - sum(1 for place, _ in drawn if place)
    if left:
        caption += f" Not drawn: {left} without a figure against a control."
    return Plot("Quality against compute", svg, caption)


def _bars(point: Point) -> tuple[float, float]:
    """Its spread in share and delta; one seed has none."""
    return number(point.spread.get("layer_share")) or 0.0, number(
        point.spread.get("delta_nll_control")
    ) or 0.0


def _marks(axes, members: list[Point], label: str, colour: str, marker: str) -> None:
    x, y = [p.share for p in members], [p.delta for p in members]
    bars = [_bars(p) for p in members]
    if any(map(any, bars)):
        wide, high = zip(*bars, strict=True)
        axes.errorbar(
            x, y, xerr=wide, yerr=high, fmt="none", ecolor=MUTED, elinewidth=0.8, zorder=2
        )
    axes.plot(
        x,
        y,
        linestyle="",
        marker=marker,
        color=colour,
        markersize=9 if marker == "*" else 5.5,
        label=label,
        zorder=3,
    )


def _labels(drawing: Drawing, axes, named: list[tuple[str, Point]], best: list[Point]) -> None:
    """A number beside each mark, where it covers least: marks, other numbers, the front's line."""
    # places the axes, so that data have a place on the paper
    drawing.figure.draw_without_rendering()
    points = 72 / drawing.figure.dpi

    def place(share: float, delta: float) -> tuple[float, float]:
        x, y = axes.transData.transform((share, delta))
        return x * points, y * points

    marks = [place(p.share, p.delta) for _, p in named]
    taken = [(x, y, 4.0, 4.0) for x, y in marks]  # centre, half width and half height, in points
    for a, b in itertools.pairwise(best):
        (x, y), (far, low) = place(a.share, a.delta), place(b.share, b.delta)
        taken += [((x + far) / 2, y, (far - x) / 2, 1.0), (far, (y + low) / 2, 1.0, (y - low) / 2)]
    for (text, point), (x, y) in zip(named, marks, strict=True):
        half = 2.7 * len(text) + 1.5

        def covered(at: tuple[int, int], x=x, y=y, half=half) -> int:
            return sum(
                abs(x + at[0] - a) < half + w and abs(y + at[1] - b) < 4.5 + h
                for a, b, w, h in taken
            )

        dx, dy = min(PLACES, key=covered)
        taken.append((x + dx, y + dy, half, 4.5))
        axes.annotate(
            text,
            (point.share, point.delta),
            xytext=(dx, dy),
            textcoords="offset points",
            ha="center",
            va="center",
            fontsize=8,
            color=MUTED,
        )
