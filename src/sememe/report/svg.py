"""A matplotlib figure → an SVG element that lives inside the page and follows its light or dark
colours."""

import io
import re

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, NullFormatter

# matplotlib knows no CSS variables, so it draws with these stand-ins and they are exchanged in the
# text.
INK, MUTED, GRID, RUN, CONTROL, THIRD = (f"#0{i}0{i}0{i}" for i in range(1, 7))
_VARIABLES = {
    INK: "--ink",
    MUTED: "--muted",
    GRID: "--line",
    RUN: "--run",
    CONTROL: "--control",
    THIRD: "--third",
}

_STYLE = {
    "svg.fonttype": "none",  # text stays text: small, selectable, in the page's own font
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": GRID,
    "axes.labelcolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.color": GRID,
    "ytick.color": GRID,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "legend.frameon": False,
    "legend.fontsize": 9,
}


class Drawing:
    """`with Drawing("loss") as d:` draw on `d.figure`, then `d.svg(alt)`. No pyplot: no global
    figures."""

    def __init__(self, name: str, height: float = 3.1) -> None:
        self.name = name
        # 5.2 in = 374 units wide with 10-unit text: still legible when a phone shows it 340 px
        # wide.
        self._context = matplotlib.rc_context(_STYLE | {"svg.hashsalt": name})
        self._size = (5.2, height)

    def __enter__(self) -> "Drawing":
        self._context.__enter__()
        self.figure = Figure(figsize=self._size, layout="constrained")
        return self

    def __exit__(self, *error: object) -> None:
        self._context.__exit__(*error)

    def svg(self, alt: str) -> str:
        out = io.StringIO()
        nothing = dict.fromkeys(
            ("Creator", "Date", "Format", "Type")
        )  # no time stamp: same files, same page
        self.figure.savefig(out, format="svg", transparent=True, metadata=nothing)
        return _inline(out.getvalue(), self.name, alt)


def _inline(text: str, name: str, alt: str) -> str:
    body = text[text.index("<svg") :]
    body = re.sub(
        r"<style.*?</style>", "", body, flags=re.S
    )  # its '*' rule would reach the whole page
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.S)
    view = re.search(r'viewBox="([^"]+)"', body).group(1)
    label = alt.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")
    # Inside HTML an <svg> needs no namespaces, and without them the page names no address at all.
    body = re.sub(
        r"<svg[^>]*>", f'<svg viewBox="{view}" role="img" aria-label="{label}">', body, count=1
    )
    body = body.replace("xlink:href=", "href=")
    # Several figures share one document: ids get the figure's name.
    body = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", body)
    body = re.sub(r"; font-family: [^;\"]*|font-family: [^;\"]*; ?", "", body)
    body = re.sub(r" ?transform=\"rotate\(-0 [^\"]*\"", "", body)
    for colour, variable in _VARIABLES.items():
        body = body.replace(colour, f"var({variable})")
    return re.sub(r"\n\s*", "\n", body)


def large_numbers(axis: matplotlib.axis.Axis) -> None:
    """1.5M instead of 1.5e6."""
    axis.set_major_formatter(EngFormatter(sep=""))


def log_ticks(axis: matplotlib.axis.Axis, low: float, high: float) -> None:
    """Ticks that carry numbers on a logarithmic axis from `low` to `high`, a narrow one too: 0.02,
    50, 2k."""
    span = high / low
    subs = (1, 1.5, 2, 3, 4, 5, 7) if span < 5 else (1, 2, 5) if span < 100 else (1,)
    large = EngFormatter(sep="")
    axis.set_major_locator(LogLocator(subs=subs))
    axis.set_major_formatter(FuncFormatter(lambda x, _: large(x) if x >= 1000 else f"{x:g}"))
    axis.set_minor_formatter(NullFormatter())
