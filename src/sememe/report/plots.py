"""The plots of the report, as matplotlib's savefig draws them; None where there are no points."""

import base64
import io
from collections.abc import Callable
from dataclasses import dataclass

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, PercentFormatter

from sememe.figures import figure, number, objects, show
from sememe.report.files import Metrics, Run

MAX_POINTS = 400
"""Of a curve: a plot of 374 units width shows no more."""
INK, MUTED, GRID = "#1c1f24", "#5c6370", "#dfe2e7"
BLUE, ORANGE, GREEN, PURPLE = "#2563c9", "#d07a12", "#14866d", "#8a4fc7"
PARETO = ("layer_share", "delta_nll_control")
KINDS = {"concepts": "o", "fixed stride": "s", "skip": "D", "window": "v", "control": "*"}
"""What a point of a sweep is → its mark. All but the first need no learned boundary: they are there
to be beaten."""
CURVES = (
    (
        "",
        "Concept rate",
        "The realised rates lie on the one asked for. Training and held-out apart: the gate "
        "behaves differently once it decides alone. Quantised: how much of a concept is its code.",
        "concepts per token",
        ("target_rate", "rate", "heldout_rate", "quantise"),
    ),
    (
        "",
        "Ablation",
        "What held-out NLL rises by without the true codes. Near 0 when zeroed: they are not read; "
        "near 0 when shuffled: any code would do.",
        "NLL rises by (nats)",
        ("delta_nll_zero", "delta_nll_shuffle", "delta_nll_random"),
    ),
    (
        "",
        "Code use",
        "Perplexity is how many codes would be as varied, used equally often. Far below the codes "
        "that occur, few do all the work. Both are counted between two lines of the log.",
        "codes",
        ("code_perplexity", "codes_used"),
    ),
    (
        "planner",
        "Ablation",
        "What held-out NLL rises by without the true plans. Near 0 when shuffled: the text is "
        "written past its plan.",
        "NLL rises by (nats)",
        ("delta_nll_shuffle", "delta_nll_random", "delta_nll_empty"),
    ),
    (
        "planner",
        "Planner against z*",
        "NLL of the same training targets, read from z*, from the planner's own plan, and from "
        "another pair's z*. The planner should stay near z* and far below the last.",
        "nats per target token",
        ("em_nll", "em_nll_planner", "em_nll_shuffle"),
    ),
    (
        "planner",
        "Search",
        "Flips fall as the search settles, and the planner's first choice comes to be that of z*. "
        "No flips from the first search on: it may be stuck.",
        "share",
        ("em_flips", "plan_match"),
    ),
)
"""System, title, caption, y axis, figures over training. A new plot is one entry here."""
STYLE = {
    "svg.fonttype": "none",  # text stays text: small, and sharp at every size
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": GRID,
    "axes.labelcolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.prop_cycle": matplotlib.cycler(color=(BLUE, ORANGE, GREEN, PURPLE, INK, MUTED)),
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.color": GRID,
    "ytick.color": GRID,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 1.2,
    "lines.markersize": 4.5,
}
Points = list[tuple[float, float]]
Curve = tuple[str, Metrics, str, dict]
"""Legend, log, key, look."""


@dataclass(frozen=True)
class Plot:
    title: str
    caption: str
    image: str
    """A data URI of the SVG."""


def plot(title: str, caption: str, draw: Callable[[Axes], None], height: float = 3.2) -> Plot:
    """What `draw` puts on a pair of axes. The same files give the same bytes."""
    out = io.BytesIO()
    with matplotlib.rc_context(STYLE | {"svg.hashsalt": title}):
        canvas = Figure(figsize=(5.2, height), layout="constrained")
        axes = canvas.subplots()
        draw(axes)
        if axes.get_legend_handles_labels()[1]:
            canvas.legend(loc="outside upper left", ncols=3)
        canvas.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    image = base64.b64encode(out.getvalue()).decode()
    return Plot(title, caption, f"data:image/svg+xml;base64,{image}")


# ---- over training ----


def loss_plot(run: Run, beside: list[Run]) -> Plot | None:
    """Training loss as lines, held-out NLL as marks; the control dashed, other runs by their
    held-out NLL alone."""
    planner = run.system == "planner"
    marks = dict(linestyle="", marker="o")
    curves = [
        ("training", run.metrics, "target_nll" if planner else "loss", dict(color=BLUE)),
        ("held out", run.metrics, "heldout_nll", dict(color=BLUE) | marks),
        ("control", run.control, "loss", dict(color=ORANGE, linestyle="--")),
        ("control, held out", run.control, "heldout_nll", dict(color=ORANGE) | marks),
    ]
    curves += [
        (
            f"{other.path.name}, held out",
            other.metrics,
            "heldout_nll",
            dict(color=colour, marker="."),
        )
        for other, colour in zip(beside, (GREEN, PURPLE, INK, MUTED), strict=False)
    ]
    caption = (
        "Lower is better. The gap to the control is what the concepts cost, and held-out text is "
        "what counts. "
    )
    if planner:
        caption = (
            "NLL of the target alone. Training targets are read from z*, held-out ones from the "
            "planner's own plan, and the control sees the source: a line far below the marks means "
            "that the planner does not come near z*, or that targets were memorised. "
        )
    caption += "The first 5 % of the run are left out."
    return _over_training("Loss", caption, "nats per token", curves)


def curve_plots(run: Run) -> list[Plot | None]:
    """Those of CURVES that are the system's and measured."""
    return [
        _over_training(title, caption, y, [_curve(run, key) for key in keys])
        for system, title, caption, y, keys in CURVES
        if (run.system == "planner") == (system == "planner")
    ]


def _curve(run: Run, key: str) -> Curve:
    return figure(key).title, run.metrics, key, dict(marker="o" if "heldout" in key else "")


def _over_training(title: str, caption: str, y: str, curves: list[Curve]) -> Plot | None:
    """Curves over the tokens trained on, which a control shares; over steps where a log counts
    none."""
    x = "tokens" if any(log.points("tokens", key) for _, log, key, _ in curves) else "step"
    drawn = [(label, _thinned(log.points(x, key)), look) for label, log, key, look in curves]
    drawn = [curve for curve in drawn if curve[1]]
    if not drawn:
        return None

    def draw(axes: Axes) -> None:
        for label, points, look in drawn:
            # a line through one point cannot be seen
            lone = dict(marker="o") if len(points) == 1 else {}
            axes.plot(*zip(*points, strict=True), label=label, **look | lone)
        axes.set(xlabel=x, ylabel=y)
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))

    return plot(title, caption, draw)


def _thinned(points: Points) -> Points:
    """At most MAX_POINTS of a curve, without its steep opening: the first 5 %."""
    return points[len(points) // 20 :: len(points) // MAX_POINTS + 1]


def distortion_plot(run: Run) -> Plot | None:
    """Tokens that come back over the bits of the ids, beside what lossless coders take."""
    result = run.json["reconstruct"]
    rates = [
        [number(record.get(key)) for key in ("bits_per_token", "token_accuracy")]
        for record in objects(result.get("curve")) or [result]
    ]
    rates = sorted(pair for pair in rates if None not in pair)
    coders = [
        (f"{show(record.get('name'))}, {show(record.get('of'))}", bits)
        for record in objects(result.get("lossless"))
        if (bits := number(record.get("bits_per_token"))) is not None
    ]
    if not rates:
        return None

    def draw(axes: Axes) -> None:
        axes.plot(*zip(*rates, strict=True), marker="o", label="concept ids")
        for name, bits in coders:
            axes.plot([bits], [1], marker="D", ls="", label=name)
        axes.set(xlabel="bits per token", ylabel="tokens back", xlim=(0, None), ylim=(-0.04, 1.08))
        axes.yaxis.set_major_formatter(PercentFormatter(1))

    caption = (
        "Tokens that come back against the bits that the ids take, at each rate. The diamonds lose "
        "nothing: the base with an arithmetic coder, zstd, xz. Left of the cheapest of them "
        "something must be lost."
    )
    return plot("Rate and distortion", caption, draw, 3.9)


# ---- of several models ----


def pareto_front(points: list[dict]) -> list[dict]:
    """Those that no other beats in both layers and ΔNLL, by rising layers; what is not measured is
    left out."""
    best: list[dict] = []
    for point in sorted(
        filter(_is_measured, points), key=lambda point: [point[key] for key in PARETO]
    ):
        if not best or point["delta_nll_control"] < best[-1]["delta_nll_control"]:
            best.append(point)
    return best


def _is_measured(point: dict) -> bool:
    return all(number(point.get(key)) is not None for key in PARETO)


def pareto_plot(points: list[dict]) -> Plot | None:
    """Quality against compute; numbers are the rows of the table beside it, from 1. None where
    fewer than two models besides the control are measured against it."""
    measured = [point for point in points if _is_measured(point)]
    if sum(point["kind"] != "control" for point in measured) < 2:
        return None

    def draw(axes: Axes) -> None:
        best = [[point[key] for key in PARETO] for point in pareto_front(measured)]
        axes.step(*zip(*best, strict=True), where="post", color=MUTED, ls="--", label="front")
        for kind, marker in KINDS.items():
            marks = [
                (*(point[key] for key in PARETO), number(point.get("spread")) or 0.0)
                for point in measured
                if point["kind"] == kind
            ]
            if marks:
                axes.errorbar(*zip(*marks, strict=True), fmt=marker, label=kind)
        for row, point in enumerate(points, 1):
            if _is_measured(point):
                at = [point[key] for key in PARETO]
                axes.annotate(str(row), at, (5, 5), textcoords="offset points", color=MUTED)
        axes.set(xlabel="layers run per token", ylabel="NLL minus control (nats)")
        axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes.margins(0.1)

    caption = (
        "Each mark is a trained model: NLL above its control (up) against the share of the base's "
        "layers it runs per token (right). Down and left is better; nothing beats the dashed line "
        "in both. Numbers are rows of the table; bars, one standard deviation over seeds."
    )
    return plot("Quality against compute", caption, draw, 3.9)
