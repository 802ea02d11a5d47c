"""Any JSON value → the text shown on the page; what is not a finite number is 'n/a', never a
guess."""

import json
import math

NOT_AVAILABLE = "n/a"
LONGEST_TEXT = 400  # characters of an unforeseen nested value; the page has a size to keep


def number(value: object) -> float | None:
    """The finite number in `value`, or None. JSON's true is no number, though Python's bool is an
    int."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        result = float(value)
    except OverflowError:  # an integer beyond 1e308
        return None
    return result if math.isfinite(result) else None


def show(value: object, kind: str = "") -> str:
    """`value` as `kind` reads best: nats, delta, ratio, share, count, bytes, speed, time or ''
    (general)."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return NOT_AVAILABLE
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, str):
        return shorten(value)
    figure = number(value)
    if figure is None:
        return shorten(json.dumps(value, ensure_ascii=False, default=str))
    return minus(_SHOWN.get(kind, _general)(figure))


def shorten(text: str) -> str:
    return text if len(text) <= LONGEST_TEXT else text[: LONGEST_TEXT - 1] + "…"


def minus(text: str) -> str:
    """A true minus sign in front, as the plots have it; the one in an exponent stays."""
    return "−" + text[1:] if text.startswith("-") else text


def _general(figure: float) -> str:
    return f"{figure:,.0f}" if figure == round(figure) and abs(figure) < 1e15 else f"{figure:.4g}"


def _bytes(figure: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if abs(figure) < 1000:
            return f"{figure:.4g} {unit}"
        figure /= 1000
    return f"{figure:.4g} TB"


def _time(figure: float) -> str:
    if figure < 60:
        return f"{figure:.1f} s"
    minutes, seconds = divmod(round(figure), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {seconds:02d} s"


_SHOWN = {
    "nats": lambda x: f"{x:.4f}",
    "delta": lambda x: f"{x:+.4f}",
    "ratio": lambda x: f"{x:.2f}×",
    "share": lambda x: f"{100 * x:.3g} %",
    "count": _general,
    "bytes": _bytes,
    "speed": lambda x: f"{x:,.0f} tokens/s" if abs(x) >= 100 else f"{x:.3g} tokens/s",
    "time": _time,
}
