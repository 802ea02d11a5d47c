"""A speed sweep's file → its plots, tables and page: speed-up against what the arithmetic allows,
cache against text length."""

import math
from dataclasses import dataclass
from pathlib import Path

from sememe.errors import CheckpointError
from sememe.report.curves import Plot, Points, curve, line
from sememe.report.files import read_json
from sememe.report.meanings import SPEED, SPEED_CACHE, SPEED_CEILING
from sememe.report.svg import CONTROL, GRID, INK, MUTED, RUN, THIRD, Drawing, log_ticks
from sememe.report.values import number, show

FILE, KIND = "sweep.json", "speed"
LOOKS = ((RUN, "o"), (THIRD, "s"), (CONTROL, "D"), (INK, "^"), (MUTED, "v"))
STYLES = ("-", "--", ":")
MARKED = {"marker": "o", "markersize": 3.5}
MOST_CURVES = 9


@dataclass(frozen=True)
class SpeedSweep:
    """`points`, `alternatives`: as the file has them, those that were measured; `faults`: what
    could not be, and why."""

    path: Path
    model: str
    base_name: str
    settings: dict
    points: list[dict]
    alternatives: list[dict]
    faults: list[tuple[str, str]]


def is_speed(folder: Path) -> bool:
    """Whether the folder's sweep.json is one of `sememe benchmark --sweep`."""
    return read_json(folder / FILE).figures.get("kind") == KIND


def read_speed(folder: Path) -> SpeedSweep:
    """Raises CheckpointError where the folder holds no speed sweep."""
    found = read_json(folder / FILE).figures
    if found.get("kind") != KIND or not isinstance(found.get("points"), list):
        raise CheckpointError(
            f"got {folder / FILE}, which is no speed sweep; need what `sememe benchmark MODEL "
            "--sweep` wrote. "
            "try: the same command again"
        )
    others, settings = found.get("alternatives"), found.get("settings")
    points, faults = _measured(found["points"])
    rows, more = _measured(others if isinstance(others, list) else [])
    settings = settings if isinstance(settings, dict) else {}
    return SpeedSweep(
        folder,
        str(found.get("model")),
        str(found.get("base_name")),
        settings,
        points,
        rows,
        faults + more,
    )


def _measured(listed: list) -> tuple[list[dict], list[tuple[str, str]]]:
    found = [one for one in listed if isinstance(one, dict)]
    faults = [(_name(one), str(one["fault"])) for one in found if one.get("fault")]
    return [one for one in found if not one.get("fault")], faults


def _name(one: dict) -> str:
    if "name" in one:
        return str(one["name"])
    split, rate, length, batch = (
        show(one.get(key)) for key in ("split", "rate", "prompt_tokens", "batch")
    )
    return f"{split} at {rate}, prompt {length}, batch {batch}"


def speed_plots(sweep: SpeedSweep) -> list[Plot]:
    return [plot for plot in (ceiling_plot(sweep.points), cache_plot(sweep)) if plot is not None]


def ceiling_plot(points: list[dict]) -> Plot | None:
    """None where no point has a decode speed-up and a ceiling. One mark a point, one look for each
    prompt length and batch."""
    drawn = [
        one
        for one in points
        if None
        not in (number(one.get("decode_speedup")), number(one.get("ceiling_decode_speedup")))
    ]
    if not drawn:
        return None
    series: dict[tuple, list[dict]] = {}
    for one in drawn:
        series.setdefault(
            (number(one.get("prompt_tokens")) or 0, number(one.get("batch")) or 0), []
        ).append(one)
    several = len({batch for _, batch in series}) > 1
    ceilings = [number(one["ceiling_decode_speedup"]) for one in drawn]
    ends = [min(1.0, *ceilings), 1.04 * max(ceilings)]
    columns = 2 if several else 3
    with Drawing(
        "speed-ceiling", height=3.6 + 0.17 * math.ceil((len(series) + 2) / columns)
    ) as drawing:
        axes = drawing.figure.subplots()
        for place, ((length, batch), members) in enumerate(sorted(series.items())):
            label = f"prompt {show(length)}" + (f", batch {show(batch)}" if several else "")
            _marks(axes, members, label, *LOOKS[place % len(LOOKS)], hollow=place >= len(LOOKS))
        axes.plot(
            ends, ends, color=MUTED, linestyle="--", linewidth=1, label="the ceiling", zorder=1
        )
        axes.axhline(1.0, color=GRID, linewidth=1.6, label="the base", zorder=0)
        axes.set(
            xlabel="ceiling, times the base's speed",
            ylabel="measured decode speed, times the base's",
        )
        _named_columns(axes, drawn)
        drawing.figure.legend(loc="outside upper center", ncols=columns)
        svg = drawing.svg("decode speed-up against its ceiling")
    return Plot("Decode speed against its ceiling", svg, SPEED_CEILING)


def _marks(axes, members: list[dict], label: str, colour: str, marker: str, hollow: bool) -> None:
    x, y = (
        [number(one[key]) for one in members]
        for key in ("ceiling_decode_speedup", "decode_speedup")
    )
    ranges = [_range(one, value) for one, value in zip(members, y, strict=True)]
    bars = [
        [max(0.0, value - low), max(0.0, high - value)]
        for (low, high), value in zip(ranges, y, strict=True)
    ]
    axes.errorbar(
        x,
        y,
        yerr=list(zip(*bars, strict=True)),
        linestyle="",
        marker=marker,
        color=colour,
        markersize=5,
        elinewidth=0.8,
        markerfacecolor="none" if hollow else colour,
        label=label,
        zorder=3,
    )


def _range(one: dict, value: float) -> tuple[float, float]:
    found = one.get("decode_speedup_range")
    pair = [number(x) for x in found] if isinstance(found, list) else []
    return (pair[0], pair[1]) if len(pair) == 2 and None not in pair else (value, value)


def _named_columns(axes, points: list[dict]) -> None:
    """Marks of one split and rate stand in a column: its name above them."""
    columns: dict[tuple, list[dict]] = {}
    for one in points:
        columns.setdefault((str(one.get("split")), number(one.get("rate"))), []).append(one)
    several = len({split for split, _ in columns}) > 1
    for (split, rate), members in columns.items():
        x = sum(number(one["ceiling_decode_speedup"]) for one in members) / len(members)
        top = max(_range(one, number(one["decode_speedup"]))[1] for one in members)
        text = f"{split}\n{show(rate)}" if several else f"rate {show(rate)}"
        axes.annotate(
            text,
            (x, top),
            xytext=(0, 7),
            textcoords="offset points",
            ha="center",
            fontsize=8,
            color=MUTED,
        )
    axes.margins(0.09, 0.16)


def cache_plot(sweep: SpeedSweep) -> Plot | None:
    """Bytes for one text, of the smallest batch measured; None where no point has caches."""
    base, concepts = _caches(sweep)
    shown = list(concepts.items())[:MOST_CURVES]
    every = [point for points in (base, *dict(shown).values()) for point in points]
    if not every:
        return None
    with Drawing("speed-cache", height=3.4 + 0.17 * math.ceil((len(shown) + 1) / 3)) as drawing:
        axes = drawing.figure.subplots()
        if base:
            curve(axes, base, "the base", line(CONTROL) | MARKED)
        for place, (label, points) in enumerate(shown):
            curve(
                axes, points, label, line((RUN, THIRD, INK)[place % 3], STYLES[place // 3]) | MARKED
            )
        axes.set(
            xscale="log",
            yscale="log",
            xlabel="tokens, prompt and new",
            ylabel="bytes of keys and values",
        )
        for axis, values in zip((axes.xaxis, axes.yaxis), zip(*every, strict=True), strict=True):
            log_ticks(axis, min(values), max(values))
        drawing.figure.legend(loc="outside upper center", ncols=3)
        svg = drawing.svg("bytes of the cache against tokens")
    left = f" Not drawn: {len(concepts) - len(shown)} more." if len(concepts) > len(shown) else ""
    return Plot("Cache against length of text", svg, SPEED_CACHE + left)


def _caches(sweep: SpeedSweep) -> tuple[Points, dict[str, Points]]:
    """(tokens, bytes) of the base, and of each split and rate; both above 0, for the axes are
    logarithmic."""
    least = min((number(one.get("batch")) or 1 for one in sweep.points), default=1)
    new, base, concepts = number(sweep.settings.get("new_tokens")) or 0, {}, {}
    for one in sweep.points:
        length = number(one.get("prompt_tokens"))
        if length is None or (number(one.get("batch")) or 1) != least:
            continue
        label = f"{show(one.get('split'))} at {show(one.get('rate'))}"
        for side, points in (("base", base), ("concept", concepts.setdefault(label, {}))):
            held = number(one[side].get("cache_bytes")) if isinstance(one.get(side), dict) else None
            if held and length + new > 0 and held > 0:
                points[length + new] = held / least
    return sorted(base.items()), {
        label: sorted(points.items()) for label, points in concepts.items() if points
    }


def point_rows(points: list[dict]) -> list[list[str]]:
    """The cells of SPEED, one row a point; a range stands behind its figure."""
    found = []
    for one in points:
        flat = one | {
            f"{side}.cache_bytes": one[side].get("cache_bytes")
            for side in ("concept", "base")
            if isinstance(one.get(side), dict)
        }
        cells = [show(flat.get(key), kind) for key, (kind, _) in SPEED.items()]
        low, high = _range(one, number(one.get("decode_speedup")) or 0.0)
        cells[[*SPEED].index("decode_speedup")] += (
            f" ({low:.2f} to {high:.2f})" if one.get("decode_speedup_range") else ""
        )
        found.append(cells)
    return found


def alternative_rows(rows: list[dict]) -> list[list[str]]:
    kinds = {
        "name": "",
        "precision": "",
        "prompt_tokens": "count",
        "batch": "count",
        "prefill_tokens_per_s": "speed",
        "decode_tokens_per_s": "speed",
        "concept_decode_speedup": "ratio",
    }
    return [[show(one.get(key), kind) for key, kind in kinds.items()] for one in rows]
