"""What a compressor's texts lose: RUN/reconstruct.json → its plot and tables; tolerant of what is
absent."""

from dataclasses import dataclass

from sememe.report.curves import Plot, curve, line
from sememe.report.svg import CONTROL, INK, MUTED, RUN, THIRD, Drawing, log_ticks
from sememe.report.values import number, show

CURVE = {
    "target_rate": ("share", "rate"),
    "concept_rate": ("share", "realised"),
    "compression_ratio": ("ratio", "R, every id"),
    "bits_per_token": ("", "bits per token"),
    "bits_per_token_used": ("", "of these used"),
    "token_accuracy": ("share", "tokens back"),
    "exact_match": ("share", "windows back"),
    "bleu": ("", "BLEU-4"),
    "chrf": ("", "chrF"),
    "rouge_l": ("share", "ROUGE-L"),
    "nll": ("nats", "NLL"),
    "bits_per_token_lossless": ("", "bits to lose nothing"),
}
GIVEN = {
    "reader": ("", "reader"),
    "given": ("", "is given"),
    "length": ("", "tokens or ids"),
    "nll": ("nats", "NLL"),
    "perplexity": ("", "perplexity"),
    "percent_over_whole": ("", "% over the whole context"),
}
ANSWERS = {
    "reader": ("", "reader"),
    "given": ("", "is given"),
    "length": ("", "tokens or ids"),
    "exact_match": ("share", "exact match"),
    "f1": ("share", "F1"),
    "answer_nll": ("nats", "NLL of the answer"),
}
CAPTION = (
    "Share of tokens that come back (up) for the bits that the ids take (right), at each setting "
    "of the dial; hollow: the bits "
    "by the entropy of the codes in use. The dashed line and the diamonds bring everything back: "
    "the base with an arithmetic "
    "coder, zstd and xz. Left of the cheapest of them nothing can be expected to, and right of it "
    "a code should."
)


@dataclass(frozen=True)
class Reconstruction:
    """The section of the page."""

    plots: list[Plot]
    columns: list[str]
    rows: list[list[str]]
    lossless: list[list[str]]
    given: list[list[str]]
    note: str
    online: list[list[str]]
    online_note: str
    answers: list[list[str]]
    samples: list[tuple[str, str]]


def read_reconstruction(figures: dict) -> Reconstruction | None:
    """None where there is nothing to show."""
    if number(figures.get("token_accuracy")) is None:
        return None
    points = _dicts(figures.get("curve")) or [figures]
    mixed = figures.get("shuffled")
    rows = [[*_cells(one, CURVE)] for one in points]
    if isinstance(mixed, dict):
        rows.append(["ids shuffled", *_cells(mixed | {"target_rate": None}, CURVE)[1:]])
    found = figures.get("continuation")
    found = found if isinstance(found, dict) else {}
    beside = figures.get("online")
    beside = beside if isinstance(beside, dict) else {}
    asked = figures.get("questions")
    asked = asked if isinstance(asked, dict) else {}
    return Reconstruction(
        plots=[plot for plot in (_plot(figures, points),) if plot is not None],
        columns=[title for _, title in CURVE.values()],
        rows=rows,
        lossless=[
            _cells(one, {"name": ("", ""), "of": ("", ""), "bits_per_token": ("", "")})
            for one in _dicts(figures.get("lossless"))
        ],
        given=[_cells(one, GIVEN) for one in _dicts(found.get("given"))],
        note=_note(found),
        online=[_cells(one, GIVEN) for one in _dicts(beside.get("given"))],
        online_note=_online_note(beside),
        answers=[_cells(one, ANSWERS) for one in _dicts(asked.get("given"))],
        samples=[
            (show(one.get("text")), show(one.get("rebuilt")))
            for one in _dicts(figures.get("samples"))
        ],
    )


def _dicts(listed: object) -> list[dict]:
    return [one for one in listed if isinstance(one, dict)] if isinstance(listed, list) else []


def _cells(one: dict, kinds: dict[str, tuple[str, str]]) -> list[str]:
    return [show(one.get(key), kind) for key, (kind, _) in kinds.items()]


def _note(found: dict) -> str:
    """How the continuation was measured; it means little for a model that was not trained for
    it."""
    count, context, blocks = (show(found.get(key)) for key in ("next_tokens", "context", "blocks"))
    texts = f"The next {count} tokens behind {context} of {blocks} texts."
    if (number(found.get("continuation_share")) or 0) <= 0:
        return texts + " This model was never trained to go on from codes (continuation_share 0)."
    trained = number(found.get("trained_context"))
    return texts + (f" It was trained with contexts of {show(trained)} tokens." if trained else "")


def _online_note(beside: dict) -> str:
    """At which rate the two stood beside each other, and what the difference is."""
    asked, realised = (
        show(number(beside.get(key)), "share") for key in ("target_rate", "concept_rate")
    )
    cost, ratio = (
        show(number(beside.get("delta_nll")), "delta"),
        show(number(beside.get("compression_ratio"))),
    )
    return (
        f"The same tokens, by {show(beside.get('model'))} as well, which compresses while it "
        "reads, and goes on compressing. "
        f"Its dial is at the rate that the compressor realised ({asked}); it realised {realised}, "
        f"R {ratio} of every id. "
        f"Being online costs {cost} nats."
    )


def _plot(figures: dict, points: list[dict]) -> Plot | None:
    """None without one point of bits and accuracy. Bits are on a logarithmic axis: a window alone
    costs zstd very many."""
    drawn = {
        kind: sorted(
            (bits, 100 * number(one["token_accuracy"]))
            for one in points
            if (bits := number(one.get(f"bits_per_token{kind}")))
            and bits > 0
            and number(one.get("token_accuracy")) is not None
        )
        for kind in ("", "_used")
    }
    if not drawn[""]:
        return None
    mixed = figures["shuffled"] if isinstance(figures.get("shuffled"), dict) else {}
    lost = [(number(figures.get("bits_per_token")), number(mixed.get("token_accuracy")))]
    costs = [
        (show(one.get("name")), show(one.get("of")), bits)
        for one in _dicts(figures.get("lossless"))
        if (bits := number(one.get("bits_per_token"))) and bits > 0
    ]
    with Drawing("reconstruction", height=3.9) as drawing:
        axes = drawing.figure.subplots()
        curve(axes, drawn[""], "concept ids", line(RUN) | {"marker": "o", "markersize": 5})
        if drawn["_used"]:
            curve(
                axes,
                drawn["_used"],
                "of their bits used",
                line(RUN, ":") | {"marker": "o", "markerfacecolor": "none"},
            )
        for bits, share in lost:
            if bits and bits > 0 and share is not None:
                axes.plot(
                    [bits],
                    [100 * share],
                    linestyle="",
                    marker="x",
                    color=THIRD,
                    label="ids shuffled",
                )
        for name, _, bits in costs:
            if name == "base":
                axes.axvline(
                    bits, color=INK, linestyle="--", linewidth=1, label="lossless bound: the base"
                )
        others = [(name, of, bits) for name, of, bits in costs if name != "base"]
        for of, hollow in (("whole text", False), ("each window", True)):
            members = [(name, bits) for name, where, bits in others if where == of]
            if members:
                axes.plot(
                    [bits for _, bits in members],
                    [100.0] * len(members),
                    linestyle="",
                    marker="D",
                    markersize=5,
                    color=CONTROL,
                    markerfacecolor="none" if hollow else CONTROL,
                    label=f"{', '.join(name for name, _ in members)}: {of}",
                )
        if len(points) > 1:
            for one in points:
                bits, share = number(one.get("bits_per_token")), number(one.get("token_accuracy"))
                if bits and bits > 0 and share is not None:
                    axes.annotate(
                        show(one.get("target_rate")),
                        (bits, 100 * share),
                        xytext=(7, -9),
                        textcoords="offset points",
                        fontsize=8,
                        color=MUTED,
                    )
        every = [bits for bits, _ in drawn[""] + drawn["_used"]] + [bits for *_, bits in costs]
        axes.set(xscale="log", xlabel="bits per token", ylabel="tokens back (%)", ylim=(-4, 108))
        log_ticks(axes.xaxis, min(every), max(every))
        drawing.figure.legend(loc="outside upper center", ncols=2)
        svg = drawing.svg("share of tokens that come back against bits per token")
    return Plot("Rate and distortion", svg, CAPTION)
