"""What the page of a planner shows in the place of online concepts: tiles, what plans are worth,
ids per type, example plans."""

import re
from dataclasses import dataclass

from sememe.report.curves import Plot
from sememe.report.files import Metrics, Run
from sememe.report.meanings_plans import GIVEN
from sememe.report.samples import hue
from sememe.report.svg import CONTROL, MUTED, RUN, THIRD, Drawing
from sememe.report.tiles import FAIR, GOOD, POOR, UNKNOWN, Tile
from sememe.report.values import number, shorten, show

FLOOR = 0.1
"""Nats per token that other plans, and no plan, must cost at least: the project's floor."""
HARDLY = 0.02
"""Below this, they cost nothing that could be told from chance."""
KEPT = 0.5
"""Share of what z* is worth that a planner's own plan should keep."""
SETTLED, MOVING = 0.1, 0.4
"""Flips of the last search up to which it has settled, and from which it is far from that."""
COLOURS = {"planner": RUN, "posterior": THIRD, "source (control)": CONTROL}
MOST_SLOTS = 48


@dataclass(frozen=True)
class Written:
    """A source, its plan as (hue, id) of each type, what was written from it, and what should have
    been."""

    source: str
    plan: list[list[tuple[float, int]]]
    written: str
    target: str


def is_planner(run: Run) -> bool:
    """By the recipe, which a run has from its first step on."""
    return (
        run.evaluate.figures.get("system") == "planner"
        or re.search(r"^system: *planner *$", run.recipe, re.M) is not None
    )


def plan_tiles(evaluate: dict, latest: dict) -> list[Tile]:
    nll, best, control = (
        number(evaluate.get(key)) for key in ("nll", "nll_posterior", "delta_nll_control")
    )
    empty = number(evaluate.get("delta_nll_empty"))
    return [
        _own(nll, control),
        _worth(
            "shuffling cost",
            number(evaluate.get("delta_nll_shuffle")),
            "it matters which plan",
            "any plan would do",
        ),
        _worth("cost of no plan", empty, "plans pay", "plans hardly pay"),
        _gap(nll, best, empty),
        _flips(number(latest.get("em_flips")), number(latest.get("em_margin"))),
        _use(evaluate, latest),
    ]


def plan_verdict(evaluate: dict) -> tuple[str, str]:
    """Are the plans used? Shuffling shows whether they are read, no plan whether the planner's are
    worth it."""
    shuffle, empty = (
        number(evaluate.get("delta_nll_shuffle")),
        number(evaluate.get("delta_nll_empty")),
    )
    if shuffle is None or empty is None:
        return (
            UNKNOWN,
            "Shuffled plans and no plan are not both measured: whether the plans are used is "
            "unknown.",
        )
    rule = f"the rule: shuffling and leaving out cost ≥ {FLOOR} nats each"
    if min(shuffle, empty) >= FLOOR:
        return GOOD, f"The plans are used ({rule})."
    if min(shuffle, empty) >= HARDLY:
        return FAIR, f"The plans are used a little ({rule})."
    if shuffle >= HARDLY:
        return (
            FAIR,
            "The text follows its plan, but the planner's plans are worth hardly more than none "
            f"({rule}).",
        )
    return POOR, f"The plans are not used ({rule})."


def given_plot(evaluate: dict) -> Plot | None:
    """A bar for each thing that the same texts were written from."""
    bars = [
        (name, nll)
        for name, nll in (
            (str(one.get("given")), number(one.get("nll"))) for one in _given(evaluate)
        )
        if nll is not None
    ]
    if len(bars) < 2:
        return None
    with Drawing("plans-given", height=1.2 + 0.36 * len(bars)) as drawing:
        axes = drawing.figure.subplots()
        axes.barh(
            range(len(bars)),
            [nll for _, nll in bars],
            height=0.65,
            color=[COLOURS.get(name, MUTED) for name, _ in bars],
        )
        for place, (_, nll) in enumerate(bars):
            axes.text(nll, place, f" {nll:.3f}", va="center", fontsize=8)
        axes.set_yticks(
            range(len(bars)), [GIVEN.get(name, shorten(name)) for name, _ in bars], fontsize=9
        )
        axes.invert_yaxis()
        axes.set(xlabel="NLL (nats per target token)")
        axes.margins(x=0.18)
        axes.grid(axis="y", visible=False)
        svg = drawing.svg("NLL by what the text is written from")
    return Plot(
        "What the text is written from",
        svg,
        "Surprise of the same held-out texts; shorter is better. z* was found with the text in "
        "view, which no planner "
        "can do: between it and no plan lies all that planning can bring. Shuffled and random "
        "plans show whether the "
        "text follows its plan at all. The control sees the source itself.",
    )


def slot_plot(run: Metrics) -> Plot | None:
    """How sure the planner is at each place, from the last line that says so."""
    listed = [
        x["plan_entropy_by_slot"]
        for x in run.lines
        if isinstance(x.get("plan_entropy_by_slot"), list)
    ]
    values = [number(x) for x in listed[-1][:MOST_SLOTS]] if listed else []
    bars = [(place, x) for place, x in enumerate(values, start=1) if x is not None]
    if not bars:
        return None
    with Drawing("plans-slots") as drawing:
        axes = drawing.figure.subplots()
        axes.bar(*zip(*bars, strict=True), color=RUN, width=0.7)
        axes.set_xticks(range(1, len(values) + 1, max(1, len(values) // 12)))
        axes.set(xlabel="place in the plan, all types one after another", ylabel="entropy (nats)")
        axes.grid(axis="x", visible=False)
        svg = drawing.svg("entropy of the planner by place in the plan")
    return Plot(
        "Entropy by place",
        svg,
        "How undecided the planner is at each place of z*, at the last line of the log. Places "
        "that are certain from the start carry nothing; places that stay undecided are not told by "
        "the source.",
    )


TYPE_COLUMNS = ["type", "ids", "used", "perplexity", "concepts at most", "on average", "in z*"]


def type_rows(evaluate: dict, latest: dict) -> list[list[str]]:
    """The planner's plans of held-out pairs, type by type: of evaluate.json, else as they were last
    in training."""

    def listed(key: str) -> list:
        found = next(
            (x for x in (evaluate.get(key), latest.get(f"heldout_{key}")) if isinstance(x, list)),
            [],
        )
        return found

    columns = [evaluate.get(key) for key in ("plan_sizes", "plan_most")]
    columns = [x if isinstance(x, list) else [] for x in columns]
    used, perplexity, length = (
        listed(key) for key in ("plan_ids_used", "plan_perplexity", "plan_lengths")
    )
    posterior = next(
        (
            x
            for x in (evaluate.get("posterior_lengths"), latest.get("plan_lengths"))
            if isinstance(x, list)
        ),
        [],
    )
    every = [columns[0], used, perplexity, columns[1], length, posterior]
    return [
        [str(i), *(show(number(x[i]) if i < len(x) else None) for x in every)]
        for i in range(max(map(len, (used, length))))
    ]


SIGNAL_COLUMNS = [
    "what a linear probe reads off the plan",
    "right",
    "the most frequent answer",
    "AUROC",
    "nats a label",
    "by frequency alone",
]


def signal_rows(evaluate: dict) -> list[list[str]]:
    listed = evaluate.get("signals")
    kinds = {
        "accuracy": "share",
        "base_accuracy": "share",
        "auroc": "",
        "loss": "nats",
        "base_loss": "nats",
    }
    return [
        [show(name), *(show(number(one.get(key)), kind) for key, kind in kinds.items())]
        for name, one in (listed.items() if isinstance(listed, dict) else ())
        if isinstance(one, dict)
    ]


def given_columns(evaluate: dict) -> list[str]:
    columns = [
        "written from",
        "NLL",
        "more than from its own plan",
        "telling the plan, nats per target token",
    ]
    return [*columns, "answers right"] if "answers" in evaluate else columns


def given_rows(evaluate: dict) -> list[list[str]]:
    keys = {"nll": "nats", "delta_nll": "delta", "plan_nats_per_token": "nats"} | (
        {"right": "share"} if "answers" in evaluate else {}
    )
    return [
        [
            GIVEN.get(str(one.get("given")), show(one.get("given"))),
            *(show(number(one.get(key)), kind) for key, kind in keys.items()),
        ]
        for one in _given(evaluate)
    ]


def written(evaluate: dict) -> list[Written]:
    """The example plans of evaluate.json, with their texts."""
    listed = evaluate.get("samples")
    found = []
    for one in listed if isinstance(listed, list) else ():
        if isinstance(one, dict) and isinstance(one.get("plan"), list):
            plan = [
                [(hue(_id(i, x)), x) for x in ids if isinstance(x, int)]
                for i, ids in enumerate(one["plan"])
                if isinstance(ids, list)
            ]
            found.append(
                Written(
                    show(one.get("source")), plan, show(one.get("written")), show(one.get("target"))
                )
            )
    return found


def readable(figures: dict) -> dict:
    """A list with an entry for each type as the page shows it, not to sixteen digits."""

    def told(value: object) -> object:
        plain = (
            isinstance(value, list)
            and value
            and all(x is None or number(x) is not None for x in value)
        )
        return " · ".join(show(x) for x in value) if plain else value

    return {key: told(value) for key, value in figures.items()}


def by_type(run: Metrics) -> Metrics:
    """The log with `key.i` for the i-th entry of what it holds as lists."""

    def spread(line: dict) -> dict:
        return {
            f"{key}.{i}": x
            for key, value in line.items()
            if isinstance(value, list)
            for i, x in enumerate(value[:8])
        }

    return Metrics([line | spread(line) for line in run.lines], run.damaged)


def types_of(run: Metrics) -> int:
    return max(
        (len(x) for line in run.lines if isinstance(x := line.get("plan_perplexity"), list)),
        default=0,
    )


def _id(kind: int, concept: int) -> int:
    """Equal ids of two types are two concepts."""
    return concept + 1009 * kind


def _given(evaluate: dict) -> list[dict]:
    listed = evaluate.get("given")
    return [one for one in listed if isinstance(one, dict)] if isinstance(listed, list) else []


def _unmeasured(title: str) -> Tile:
    return Tile(title, show(None), "not measured", UNKNOWN)


def _own(nll: float | None, control: float | None) -> Tile:
    title = "NLL from its own plan"
    if nll is None:
        return _unmeasured(title)
    if control is None:
        return Tile(title, show(nll, "nats"), "no control beside", FAIR)
    return Tile(
        title,
        show(nll, "nats"),
        f"{show(control, 'delta')} to the control, which sees the source",
        GOOD if control <= 0 else FAIR,
    )


def _worth(title: str, delta: float | None, used: str, unused: str) -> Tile:
    if delta is None:
        return _unmeasured(title)
    if delta >= FLOOR:
        return Tile(title, show(delta, "delta"), f"{used} (≥ {FLOOR} nats)", GOOD)
    return Tile(
        title, show(delta, "delta"), f"{unused} (< {FLOOR} nats)", FAIR if delta >= HARDLY else POOR
    )


def _gap(nll: float | None, best: float | None, empty: float | None) -> Tile:
    title = "gap to z*"
    if nll is None or best is None:
        return _unmeasured(title)
    worth = nll - best + (empty or 0.0)
    if empty is None or worth <= HARDLY:
        reading = "to the best plan found" if empty is None else "z* is worth nothing itself"
        return Tile(title, show(nll - best, "delta"), reading, FAIR)
    kept = empty / worth
    return Tile(
        title,
        show(nll - best, "delta"),
        f"keeps {show(max(0.0, kept), 'share')} of what z* is worth",
        GOOD if kept >= KEPT else FAIR if kept > 0 else POOR,
    )


def _flips(flips: float | None, margin: float | None) -> Tile:
    title = "flips at the last search"
    if flips is None:
        return _unmeasured(title)
    reading = "not measured" if margin is None else f"margin {show(margin, 'nats')} nats per pair"
    return Tile(
        title,
        show(flips, "share"),
        reading,
        GOOD if flips <= SETTLED else FAIR if flips <= MOVING else POOR,
    )


def _use(evaluate: dict, latest: dict) -> Tile:
    title = "planner's entropy"
    entropy = next(
        (
            x
            for x in (number(evaluate.get("plan_entropy")), number(latest.get("plan_entropy")))
            if x is not None
        ),
        None,
    )
    if entropy is None:
        return _unmeasured(title)
    used = [
        f"{row[2]} of {row[1]}" if row[1] != show(None) else row[2]
        for row in type_rows(evaluate, latest)
    ]
    return Tile(
        title, show(entropy, "nats"), f"ids used: {' · '.join(used)}" if used else "nats", FAIR
    )
