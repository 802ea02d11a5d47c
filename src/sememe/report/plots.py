"""The first four plots of the page: loss, rate, NLL by position, code usage; None where there are
no points."""

import math

from sememe.report.curves import Plot, Points, curve, dots, line, thinned, x_axis
from sememe.report.files import Metrics
from sememe.report.svg import CONTROL, INK, MUTED, RUN, THIRD, Drawing, large_numbers
from sememe.report.values import minus, number, show

MOST_RANKS = 300
MOST_LABELLED_BARS = 10


def loss_plot(run: Metrics, control: Metrics, planner: bool = False) -> Plot | None:
    """`planner`: its loss counts the plan too, so that the NLL of its targets stands in its
    place."""
    x = x_axis(run)
    curves = [
        (run, "target_nll" if planner else "loss", "training", line(RUN)),
        (control, "loss", "control, training", line(CONTROL, "--")),
        (run, "heldout_nll", "held out", dots(RUN, "o")),
        (control, "heldout_nll", "control, held out", dots(CONTROL, "D")),
    ]
    drawn = [(*thinned(log.points(x, key)), label, look) for log, key, label, look in curves]
    drawn = [found for found in drawn if found[0]]
    if not drawn:
        return None
    with Drawing("loss") as drawing:
        axes = drawing.figure.subplots()
        for points, _, label, look in drawn:
            curve(axes, points, label, look)
        above = _cut_opening(axes, [points for points, *_ in drawn])
        axes.set(xlabel=x, ylabel="nats per token")
        large_numbers(axes.xaxis)
        axes.legend()
        svg = drawing.svg("loss against " + x)
    caption = (
        "Lower is better. The gap to the control is what the concepts cost; "
        "held-out text is the one that counts."
    )
    if planner:
        caption = (
            "Of the target alone; lower is better. Training texts are written from z*, held-out "
            "ones from the planner's "
            "own plan, and the control sees the source: a training line far below the marks means "
            "that the planner "
            "does not come near z*, or that texts were learnt by heart."
        )
    merged = max(width for _, width, *_ in drawn)
    if merged > 1:
        caption += f" A point of a curve is the mean of up to {merged} logged lines."
    if above is not None:
        caption += f" The opening, up to {show(above, 'nats')}, lies above the frame."
    if bad := run.not_finite("loss"):
        caption += f" Not drawn: {bad} logged losses that are no finite number."
    if not control.lines:
        caption += " No control run was found to draw beside."
    return Plot("Loss", svg, caption)


def rate_plot(run: Metrics) -> Plot | None:
    x = x_axis(run)
    rates = [
        ("rate", "realised in training", line(RUN)),
        ("target_rate", "asked for", line(INK, "--")),
        ("heldout_rate", "realised on held-out text", dots(THIRD, "o")),
    ]
    drawn = [(thinned(run.points(x, key))[0], label, look) for key, label, look in rates]
    drawn = [found for found in drawn if found[0]]
    quantise, _ = thinned(run.points(x, "quantise"))
    if not drawn and not quantise:
        return None
    with Drawing("rate", height=3.6) as drawing:
        upper, lower = drawing.figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
        for points, label, look in drawn:
            curve(upper, points, label, look)
        upper.set(ylabel="concepts per token")
        if drawn:
            upper.set_ylim(0, 1.1 * max(y for points, *_ in drawn for _, y in points) or 1)
            upper.legend()
        if quantise:
            curve(lower, quantise, "quantised", line(CONTROL))
        lower.set(xlabel=x, ylabel="quantised", ylim=(-0.05, 1.05), yticks=[0, 0.5, 1])
        lower.set_yticklabels(["0 %", "50 %", "100 %"])
        large_numbers(lower.xaxis)
        svg = drawing.svg("concept rate and quantisation share against " + x)
    caption = (
        "Above: how many concepts the model writes per token. The three must lie on each other; "
        "training and held-out apart means that the gate behaves differently once it decides "
        "alone. "
        "Below: the share of each concept that is the discrete code rather than the continuous "
        "state "
        "it came from."
    )
    return Plot("Concept rate", svg, caption)


def position_plot(evaluate: dict, carrier: str = "concepts") -> Plot | None:
    """`carrier`: what else than the text so far serves the prediction."""
    listed = evaluate.get("nll_by_position")
    buckets = [b for b in listed if isinstance(b, dict)] if isinstance(listed, list) else []
    own = [number(b.get("nll")) for b in buckets]
    control = [number(b.get("control_nll")) for b in buckets]
    if not any(v is not None for v in own):
        return None
    beside = any(v is not None for v in control)
    width = 0.4 if beside else 0.7
    with Drawing("position") as drawing:
        axes = drawing.figure.subplots()
        _bars(axes, own, -width / 2 if beside else 0, width, "this run", RUN)
        if beside:
            _bars(axes, control, width / 2, width, "control", CONTROL)
        for place, (a, b) in enumerate(zip(own, control, strict=True)):
            if a is not None and b is not None and len(buckets) <= MOST_LABELLED_BARS:
                gap = minus(f"{a - b:+.2f}")
                axes.text(place, max(a, b), gap, ha="center", va="bottom", fontsize=8, color=MUTED)
        every = math.ceil(len(buckets) / 12)
        names = [f"{show(b.get('from'))}–{show(b.get('to'))}" for b in buckets]
        turned = dict(rotation=40, ha="right") if len(names) > 5 else {}
        axes.set_xticks(range(0, len(names), every), names[::every], fontsize=9, **turned)
        axes.set(xlabel="position in the text (tokens)", ylabel="NLL (nats)")
        axes.grid(axis="x", visible=False)
        axes.margins(y=0.12)
        if beside:
            drawing.figure.legend(
                loc="outside upper right", ncols=2
            )  # inside, it would lie on the bars
        svg = drawing.svg("NLL by position")
    caption = (
        "Surprise by how far into the text the token stands; "
        "later tokens have more context and should be easier."
    )
    if beside:
        caption += f" If only the first group kept up, the {carrier} would serve the opening alone."
    if beside and len(buckets) <= MOST_LABELLED_BARS:
        caption += " Above the bars: this run minus control."
    return Plot("NLL by position", svg, caption)


def code_plot(evaluate: dict) -> Plot | None:
    listed = evaluate.get("code_counts")
    found = [number(c) for c in listed] if isinstance(listed, list) else []
    counts = sorted((c for c in found if c is not None and c > 0), reverse=True)
    if not counts:
        return None
    total, codes = sum(counts), number(evaluate.get("num_concepts"))
    shown = [(rank, counts[rank - 1]) for rank in _log_spaced(len(counts))]
    with Drawing("codes") as drawing:
        axes = drawing.figure.subplots()
        axes.plot(*zip(*shown, strict=True), label="codes", marker=".", markersize=4, **line(RUN))
        if codes and codes > 0:
            axes.plot([1, codes], [total / codes] * 2, label="even use of all", **line(MUTED, ":"))
            axes.legend()
        axes.set(xscale="log", yscale="log", xlabel="rank of the code", ylabel="times written")
        large_numbers(axes.xaxis)
        large_numbers(axes.yaxis)
        svg = drawing.svg("rank and frequency of codes")
    of_all = f" of {show(codes, 'count')}" if codes else ""
    written = show(total, "count")
    caption = f"{len(counts):,}{of_all} codes occur among {written} concepts, most frequent first."
    perplexity = number(evaluate.get("code_perplexity"))
    if perplexity is not None:
        caption += (
            f" Perplexity {show(perplexity)}: as varied as that many codes used equally often."
        )
    caption += " A curve that drops early means that few codes do all the work."
    return Plot("Code usage", svg, caption)


def _cut_opening(axes, curves: list[Points]) -> float | None:
    """Leave a steep opening out of the frame, so that the rest is legible; returns the highest
    value."""
    start, end = min(c[0][0] for c in curves), max(c[-1][0] for c in curves)
    values = [y for c in curves for _, y in c]
    later = [y for c in curves for x, y in c if x >= start + 0.05 * (end - start)]
    low, high = min(values), max(later)
    if high <= low or max(values) <= high + 0.6 * (high - low):
        return None
    axes.set_ylim(low - 0.05 * (high - low), high + 0.1 * (high - low))
    return max(values)


def _bars(
    axes, values: list[float | None], shift: float, width: float, label: str, colour: str
) -> None:
    places = [(i + shift, v) for i, v in enumerate(values) if v is not None]
    axes.bar(*zip(*places, strict=True), width=width, label=label, color=colour)


def _log_spaced(count: int) -> list[int]:
    """Ranks 1 … count, thinned evenly on a logarithmic axis; every rank kept is a true point."""
    if count <= MOST_RANKS:
        return list(range(1, count + 1))
    return sorted({round(count ** (i / (MOST_RANKS - 1))) for i in range(MOST_RANKS)})
