"""The headline tiles: one figure, one short reading, from thresholds that are written down here."""

from dataclasses import dataclass

from sememe.report.values import number, show

USED_ZERO = 0.05
"""Nats that zeroing the concepts must cost before we say that they are read at all."""
USED_SHUFFLE = 0.02
"""Nats that other texts' concepts must cost before we say that it matters *which* concept is
written."""
ALLOWED = ((1.5, 0.02), (2.0, 0.05), (4.0, 0.15))
"""(R up to, ΔNLL allowed): the project's targets for quality against the control."""
RATE_SLACK = 0.05
"""Realised rates within 5 % of the one asked for count as that rate."""
NEAR_CEILING = 0.9
"""Share of the possible decode speed-up that counts as having reached it."""
ABOVE_CEILING = 1.05
"""Beyond the ceiling by more than timing noise: the measurement, or the arithmetic, is wrong."""

GOOD, FAIR, POOR, UNKNOWN = "good", "fair", "poor", "unknown"


@dataclass(frozen=True)
class Tile:
    title: str
    value: str
    reading: str
    tone: str


def tiles(evaluate: dict, benchmark: dict, target_rate: object = None) -> list[Tile]:
    return [
        _quality(
            number(evaluate.get("delta_nll_control")), number(evaluate.get("compression_ratio"))
        ),
        _compression(evaluate, number(target_rate)),
        _cost(
            "zeroing cost",
            number(evaluate.get("delta_nll_zero")),
            USED_ZERO,
            "concepts are read",
            "concepts are hardly read",
        ),
        _cost(
            "shuffling cost",
            number(evaluate.get("delta_nll_shuffle")),
            USED_SHUFFLE,
            "it matters which concept",
            "any concept would do",
        ),
        _speed(
            number(benchmark.get("decode_speedup")), number(benchmark.get("ceiling_decode_speedup"))
        ),
        _cache(number(benchmark.get("cache_reduction"))),
    ]


def verdict(evaluate: dict) -> tuple[str, str]:
    """Are the concepts used? Both ablations must say so: a constant note passes zeroing alone."""
    zero, shuffle = (
        number(evaluate.get("delta_nll_zero")),
        number(evaluate.get("delta_nll_shuffle")),
    )
    if zero is None or shuffle is None:
        return (
            UNKNOWN,
            "Zeroing and shuffling are not both measured: whether concepts are used is unknown.",
        )
    rule = f"the rule: zeroing costs ≥ {USED_ZERO} and shuffling ≥ {USED_SHUFFLE} nats"
    if zero >= USED_ZERO and shuffle >= USED_SHUFFLE:
        return GOOD, f"The concepts are used ({rule})."
    if zero >= USED_ZERO:
        return FAIR, f"The model leans on its concepts, but hardly on which ones they are ({rule})."
    return POOR, f"The concepts are not used ({rule})."


def _unmeasured(title: str) -> Tile:
    return Tile(title, show(None), "not measured", UNKNOWN)


def _quality(delta: float | None, ratio: float | None) -> Tile:
    title = "ΔNLL to control"
    if delta is None:
        return _unmeasured(title)
    value = show(delta, "delta")
    if delta <= 0:
        return Tile(title, value, "no worse than without concepts", GOOD)
    if ratio is None:
        return Tile(title, value, "worse than without concepts", FAIR)
    for most, allowed in ALLOWED:
        if ratio <= most * (1 + RATE_SLACK):
            within = delta <= allowed
            reading = f"{'within' if within else 'over'} the {allowed} aimed at for R ≤ {most:g}"
            return Tile(title, value, reading, GOOD if within else POOR)
    return Tile(title, value, "worse than without concepts (no aim set for this R)", FAIR)


def _compression(evaluate: dict, target: float | None) -> Tile:
    title = "compression R"
    ratio, rate = number(evaluate.get("compression_ratio")), number(evaluate.get("concept_rate"))
    if ratio is None:
        return _unmeasured(title)
    value = show(ratio, "ratio")
    if rate is None or not target or target < 0:
        return Tile(title, value, "tokens per concept", FAIR if ratio <= 1 else GOOD)
    off = rate / target - 1
    if abs(off) <= RATE_SLACK:
        return Tile(title, value, f"{show(rate, 'share')} concepts, as asked", GOOD)
    side = "more" if off > 0 else "fewer"
    reading = f"{show(rate, 'share')} concepts, {side} than the {show(target, 'share')} asked"
    return Tile(title, value, reading, POOR)


def _cost(title: str, delta: float | None, least: float, used: str, unused: str) -> Tile:
    if delta is None:
        return _unmeasured(title)
    good = delta >= least
    reading = f"{used} (≥ {least} nats)" if good else f"{unused} (< {least} nats)"
    return Tile(title, show(delta, "delta"), reading, GOOD if good else POOR)


def _speed(speedup: float | None, ceiling: float | None) -> Tile:
    title = "decode speed-up"
    if speedup is None:
        return _unmeasured(title)
    value = show(speedup, "ratio")
    if ceiling is None:
        faster = speedup > 1
        reading = "faster than the base" if faster else "no faster than the base"
        return Tile(title, value, reading, GOOD if faster else POOR)
    limit = show(ceiling, "ratio")
    if speedup > ceiling * ABOVE_CEILING:
        return Tile(title, value, f"above its ceiling of {limit}: check the measurement", FAIR)
    if speedup <= 1:
        return Tile(title, value, f"no faster than the base; ceiling {limit}", POOR)
    if speedup >= ceiling * NEAR_CEILING:
        return Tile(title, value, f"at its ceiling of {limit}", GOOD)
    return Tile(title, value, f"below its ceiling of {limit}", FAIR)


def _cache(reduction: float | None) -> Tile:
    title = "cache reduction"
    if reduction is None:
        return _unmeasured(title)
    smaller = reduction > 1
    reading = "smaller than the base's" if smaller else "no smaller than the base's"
    return Tile(title, show(reduction, "ratio"), reading, GOOD if smaller else POOR)
