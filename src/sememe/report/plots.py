"""The plots of the report, as matplotlib's savefig draws them; None where there are no points."""

import base64
import io
import math
from collections.abc import Callable
from dataclasses import dataclass

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, PercentFormatter

from sememe.figures import figure, number, objects, show
from sememe.report.files import Metrics, Point, Run, plain

MAX_POINTS = 400
"""Of a curve: a plot of 374 units width shows no more."""
INK, MUTED, GRID = "#1c1f24", "#5c6370", "#dfe2e7"
BLUE, ORANGE, GREEN, PURPLE = "#2563c9", "#d07a12", "#14866d", "#8a4fc7"
KINDS = {
    "concepts": (BLUE, "o"),
    "fixed stride": (GREEN, "s"),
    "skip": (ORANGE, "D"),
    "window": (MUTED, "v"),
    "control": (INK, "*"),
}
"""What a point of a sweep is → its look. All but the first need no learned boundary: they are there
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
        (f"{one.name}, held out", one.metrics, "heldout_nll", dict(color=colour, marker="."))
        for one, colour in zip(beside, (GREEN, PURPLE, INK, MUTED), strict=False)
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
    caption += "A steep opening may lie above the frame."
    return _over_training("Loss", caption, "nats per token", curves, hide_opening=True)


def curve_plots(run: Run) -> list[Plot | None]:
    """Those of CURVES that are the system's and measured."""
    return [
        _over_training(title, caption, y, [_curve(run, key) for key in keys])
        for system, title, caption, y, keys in CURVES
        if (run.system == "planner") == (system == "planner")
    ]


def _curve(run: Run, key: str) -> Curve:
    return figure(key).title, run.metrics, key, dict(marker="o" if "heldout" in key else "")


def _over_training(
    title: str, caption: str, y: str, curves: list[Curve], hide_opening: bool = False
) -> Plot | None:
    """Curves over the tokens trained on, which a control shares; over steps where a log counts
    none. `hide_opening`: the first 5 % do not set the height of the frame."""
    x = "tokens" if any(log.points("tokens", key) for _, log, key, _ in curves) else "step"
    drawn = [(label, thinned(log.points(x, key)), look) for label, log, key, look in curves]
    drawn = [one for one in drawn if one[1]]
    if not drawn:
        return None

    def draw(axes: Axes) -> None:
        for label, points, look in drawn:
            # a line through one point cannot be seen
            lone = dict(marker="o") if len(points) == 1 else {}
            axes.plot(*zip(*points, strict=True), label=label, **look | lone)
        axes.set(xlabel=x, ylabel=y)
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        end = max(points[-1][0] for _, points, _ in drawn)
        late = [b for _, points, _ in drawn for a, b in points if a >= 0.05 * end]
        if hide_opening and max(late) > min(late):
            margin = 0.05 * (max(late) - min(late))
            axes.set_ylim(top=min(axes.get_ylim()[1], max(late) + margin))

    return plot(title, caption, draw)


def thinned(points: Points) -> Points:
    """At most MAX_POINTS means of neighbouring points."""
    width = math.ceil(len(points) / MAX_POINTS) or 1
    groups = [points[i : i + width] for i in range(0, len(points), width)]
    return [(sum(x for x, _ in g) / len(g), sum(y for _, y in g) / len(g)) for g in groups]


# ---- of a finished model ----


def code_plot(run: Run) -> Plot | None:
    """Rank and frequency of the codes."""
    evaluate = run.json["evaluate"]
    listed = evaluate.get("code_counts")
    counts = [number(x) or 0 for x in listed] if isinstance(listed, list) else []
    counts = sorted((x for x in counts if x > 0), reverse=True)
    if not counts:
        return None
    codes = number(evaluate.get("num_concepts")) or len(counts)
    # evenly on a logarithmic axis; every rank kept is a true point
    ranks = sorted({round(len(counts) ** (i / MAX_POINTS)) for i in range(MAX_POINTS + 1)})

    def draw(axes: Axes) -> None:
        axes.plot(ranks, [counts[rank - 1] for rank in ranks], marker=".", label="codes")
        axes.plot([1, codes], [sum(counts) / codes] * 2, color=MUTED, ls=":", label="uniform use")
        axes.set(xscale="log", yscale="log", xlabel="rank of the code", ylabel="times written")

    caption = (
        f"{len(counts):,} of {show(codes)} codes occur among {show(sum(counts))} concepts; "
        f"perplexity {show(number(evaluate.get('code_perplexity')))}. A curve that drops early "
        "means that few codes do all the work."
    )
    return plot("Code use", caption, draw)


def given_plot(run: Run) -> Plot | None:
    """NLL of the same targets by what they are read from."""
    bars = [
        (figure("given").show(one.get("given")), nll)
        for one in objects(run.json["evaluate"].get("given"))
        if (nll := number(one.get("nll"))) is not None
    ]
    if len(bars) < 2:
        return None

    def draw(axes: Axes) -> None:
        names, values = zip(*bars, strict=True)
        shown = axes.barh(range(len(bars)), values, height=0.65, color=BLUE)
        axes.bar_label(shown, fmt=" %.3f", fontsize=8)
        axes.set_yticks(range(len(bars)), names)
        axes.invert_yaxis()
        axes.margins(x=0.15)
        axes.grid(axis="y", visible=False)
        axes.set_xlabel("nats per target token")

    caption = (
        "NLL of the same held-out targets. z* was found with the target in view: between it and no "
        "plan lies all that planning can bring. Shuffled and random plans tell whether the text "
        "follows its plan."
    )
    return plot("What the target is read from", caption, draw, 1.4 + 0.3 * len(bars))


def distortion_plot(run: Run) -> Plot | None:
    """Tokens that come back over the bits of the ids, beside what lossless coders take."""
    result = run.json["reconstruct"]
    curve = sorted(
        pair
        for one in objects(result.get("curve")) or [result]
        if None
        not in (pair := (number(one.get("bits_per_token")), number(one.get("token_accuracy"))))
    )
    coders = [
        (f"{show(one.get('name'))}, {show(one.get('of'))}", bits)
        for one in objects(result.get("lossless"))
        if (bits := number(one.get("bits_per_token"))) is not None
    ]
    shuffled = number(plain(result.get("shuffled")).get("token_accuracy"))
    if not curve:
        return None

    def draw(axes: Axes) -> None:
        axes.plot(*zip(*curve, strict=True), marker="o", label="concept ids")
        if shuffled is not None:
            axes.axhline(shuffled, color=MUTED, ls=":", label="ids shuffled")
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


def pareto_front(points: list[Point]) -> list[Point]:
    """Those that no other beats in both layers and ΔNLL, by rising layers; what is not measured is
    left out."""
    best: list[Point] = []
    measured = [one for one in points if one.layers is not None and one.delta is not None]
    for point in sorted(measured, key=lambda one: (one.layers, one.delta)):
        if not best or point.delta < best[-1].delta:
            best.append(point)
    return best


def pareto_plot(points: list[Point]) -> Plot | None:
    """Quality against compute; numbers are the rows of the table beside it, from 1. None where
    fewer than two models besides the control are measured against it."""
    numbered = [
        (str(row), one)
        for row, one in enumerate(points, 1)
        if one.layers is not None and one.delta is not None
    ]
    if sum(one.kind != "control" for _, one in numbered) < 2:
        return None
    if not any(one.kind == "control" for _, one in numbered):
        numbered.append(("", Point("control", "control", {})))  # what each ΔNLL is to

    def draw(axes: Axes) -> None:
        best = [(one.layers, one.delta) for one in pareto_front([one for _, one in numbered])]
        axes.step(*zip(*best, strict=True), where="post", color=MUTED, ls="--", label="front")
        for kind, (colour, marker) in KINDS.items():
            marks = [
                (one.layers, one.delta, number(one.spread.get("delta_nll_control")) or 0.0)
                for _, one in numbered
                if one.kind == kind
            ]
            if marks:
                axes.errorbar(*zip(*marks, strict=True), fmt=marker, color=colour, label=kind)
        for row, one in numbered:
            axes.annotate(
                row,
                (one.layers, one.delta),
                xytext=(5, 5),
                textcoords="offset points",
                fontsize=8,
                color=MUTED,
            )
        axes.set(xlabel="layers run per token", ylabel="NLL minus control (nats)")
        axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes.margins(0.1)

    caption = (
        "Each mark is a trained model: NLL above its control (up) against the share of the base's "
        "layers it runs per token (right). Down and left is better; nothing beats the dashed line "
        "in both. Numbers are rows of the table; bars, one standard deviation over seeds."
    )
    return plot("Quality against compute", caption, draw, 3.9)
