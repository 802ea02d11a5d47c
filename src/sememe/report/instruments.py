"""The instruments of a run over its steps: what meanings.INSTRUMENTS lists, NLL by position, and
the tails."""

from matplotlib.ticker import MaxNLocator

from sememe.report.curves import Plot, Points, curve, line, thinned
from sememe.report.files import Metrics
from sememe.report.meanings import INSTRUMENTS, POSITION_OVER_STEPS, TAILS, Instrument, Panel
from sememe.report.svg import CONTROL, INK, MUTED, RUN, THIRD, Drawing, large_numbers, log_ticks
from sememe.report.values import number

MOST_POINTS = 150  # of a curve here: there are many, and the page has a size to keep
FEW_POINTS = 30  # then each is marked
MOST_BUCKETS = 4
MOST_BARS = 33
LOOKS = (line(RUN), line(CONTROL), line(THIRD), line(INK, "--"), line(MUTED, ":"))


def instrument_plots(run: Metrics, instruments: tuple[Instrument, ...] = INSTRUMENTS) -> list[Plot]:
    """Those whose keys are in the log; nothing is drawn for the others."""
    found = [_instrument(run, one) for one in instruments]
    return [plot for plot in (*found, _by_position(run), _tails(run)) if plot is not None]


def _instrument(run: Metrics, instrument: Instrument) -> Plot | None:
    panels = [(panel, _curves(run, panel)) for panel in instrument.panels]
    panels = [(panel, drawn) for panel, drawn in panels if drawn]
    if not panels:
        return None
    name = "instrument-" + instrument.title.lower().replace(" ", "-")
    with Drawing(name, height=3.1 if len(panels) == 1 else 3.8) as drawing:
        stacked = drawing.figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
        for axes, (panel, drawn) in zip(stacked, panels, strict=True):
            _draw(axes, drawn)
            axes.set_ylabel(panel.y)
            if panel.log:
                axes.set_yscale("log")
                values = [y for points in drawn.values() for _, y in points]
                log_ticks(axes.yaxis, min(values), max(values))
            if len(drawn) > 1:
                _legend(axes)
        _steps(stacked[-1])
        svg = drawing.svg(f"{instrument.title} against step")
    return Plot(instrument.title, svg, instrument.meaning)


def _curves(run: Metrics, panel: Panel) -> dict[str, Points]:
    """Legend → points. A logarithmic axis has no place for 0: a norm or a count of 0 leaves a
    gap."""
    found = {label: run.points("step", key) for key, label in panel.curves.items()}
    if panel.log:
        found = {label: [(x, y) for x, y in points if y > 0] for label, points in found.items()}
    return {label: thinned(points, MOST_POINTS)[0] for label, points in found.items() if points}


def _draw(axes, drawn: dict[str, Points]) -> None:
    for (label, points), look in zip(drawn.items(), LOOKS, strict=False):
        marked = {"marker": ".", "markersize": 5} if len(points) <= FEW_POINTS else {}
        curve(axes, points, label, look | marked)


def _legend(axes) -> None:
    """Above the frame, where no curve runs."""
    axes.legend(
        loc="lower left",
        bbox_to_anchor=(0, 1),
        ncols=len(axes.lines),
        borderaxespad=0,
        columnspacing=1,
    )


def _steps(axes) -> None:
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    large_numbers(axes.xaxis)


def _by_position(run: Metrics) -> Plot | None:
    """One curve a bucket; of many buckets some, evenly."""
    listed = [(number(x.get("step")), x.get("heldout_nll_by_position")) for x in run.lines]
    listed = [(step, values) for step, values in listed if isinstance(values, list) and values]
    most = max((len(values) for _, values in listed), default=0)
    if most < 2:
        return None
    places = sorted({round(i * (most - 1) / (MOST_BUCKETS - 1)) for i in range(MOST_BUCKETS)})
    drawn = {}
    for place in places:
        points = [(step, number(values[place])) for step, values in listed if place < len(values)]
        drawn[f"{64 * place}–{64 * place + 64}"] = [(x, y) for x, y in points if y is not None]
    drawn = {label: thinned(points, MOST_POINTS)[0] for label, points in drawn.items() if points}
    if not drawn:
        return None
    with Drawing("instrument-position") as drawing:
        axes = drawing.figure.subplots()
        _draw(axes, drawn)
        axes.set_ylabel("NLL (nats)")
        _steps(axes)
        _legend(axes)
        svg = drawing.svg("held-out NLL by position against step")
    return Plot("Held-out NLL by position", svg, POSITION_OVER_STEPS)


def _tails(run: Metrics) -> Plot | None:
    counted = [
        x["heldout_tail_histogram"]
        for x in run.lines
        if isinstance(x.get("heldout_tail_histogram"), list)
    ]
    counts = [number(c) or 0 for c in counted[-1]] if counted else []
    if not any(count > 0 for count in counts):
        return None
    last = max(place for place, count in enumerate(counts) if count > 0)
    shown = counts[: min(last + 1, MOST_BARS)]
    total = sum(counts)
    with Drawing("instrument-tails") as drawing:
        axes = drawing.figure.subplots()
        axes.bar(range(len(shown)), [100 * count / total for count in shown], color=RUN, width=0.8)
        axes.set(xlabel="tokens in the tail", ylabel="% of segments")
        axes.set_xticks(range(0, len(shown), max(1, len(shown) // 8)))
        axes.grid(axis="x", visible=False)
        svg = drawing.svg("how many segments have how long a tail")
    beyond = sum(counts[MOST_BARS:]) / total
    more = f" Not shown: {100 * beyond:.2g} % of the segments, with longer tails." if beyond else ""
    return Plot("Tail lengths", svg, TAILS + more)
