"""The terminal: text and paths as they are, tables, JSON, and text with its concepts in colour.

Imports nothing large, so that `sememe --help` is instant."""

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.segment import Segment, Segments
from rich.style import Style
from rich.table import Table
from rich.text import Text

from sememe import figures
from sememe.detokenize import Detokenizer
from sememe.evaluation.results import put

COLOURS = ("cyan", "magenta", "green", "yellow", "blue", "red")
TEXTS = ("samples", "lossless_samples")
"""Lists of texts in results, which the report shows."""
MAX_COLUMNS = 8


def new_console(**options) -> Console:
    """A rich console to which `[b]` is no markup, `:key:` no emoji and a number nothing special."""
    return Console(markup=False, emoji=False, highlight=False, **options)


out = new_console()


def write(text: str, style: str = "") -> None:
    """Text to stdout at once, every character as it is: no wrapping, tabs and control characters
    kept, which `Console.print` would expand and drop."""
    segment = Segment(text, Style.parse(style) if style else None)
    out.print(Segments([segment]), end="", soft_wrap=True)


def say(line: str, style: str = "") -> None:
    """One line; a long path in it is not broken."""
    write(f"{line}\n", style)


def replace_unencodable() -> None:
    """Makes stdout and stderr write `?` for a character that their encoding lacks."""
    for stream in (sys.stdout, sys.stderr):
        # Another setting is somebody's choice, and a stream put in by a program may have none.
        if getattr(stream, "errors", None) in ("strict", "surrogateescape"):
            stream.reconfigure(errors="replace")


def write_json(to: Path | TextIO, value: Any) -> None:
    """JSON to a file, whole or not at all, or to a stream: in ASCII, whatever its encoding."""
    if isinstance(to, Path):
        put(to, value)
    else:
        to.write(json.dumps(value, indent=1) + "\n")


def table(rows: Iterable, title: str, header: Iterable[str], lines: bool = False) -> None:
    """Prints a table of texts. `lines`: one between rows, whose cells have several themselves."""
    grid = Table(title=title, title_justify="left", show_lines=lines)
    for index, name in enumerate(header):
        right = index > 0 and not lines
        grid.add_column(name, justify="right" if right else "left", overflow="fold")
    for row in rows:
        grid.add_row(*row)
    out.print(grid)


def show_figures(result: dict[str, Any], title: str = "") -> None:
    """Prints a JSON object of figures: its plain values, then objects of the same keys beside each
    other, then every list of objects."""
    plain = [(key, value) for key, value, _ in figures.rows(result)]
    if plain:
        table(plain, title, ("measure", "value"))
    beside: dict[tuple, dict[str, dict]] = {}
    for name, value in result.items():
        if isinstance(value, dict) and any(map(_is_nested, value.values())):
            show_figures(value, name)
        elif isinstance(value, dict):
            beside.setdefault(tuple(value), {})[name] = value
    for keys, objects in beside.items():
        rows = [(key, *(_cell(key, value[key]) for value in objects.values())) for key in keys]
        table(rows, "", ("measure", *objects))
    for name, value in result.items():
        if figures.objects(value) and name not in TEXTS:
            header, rows = figures.table(value)
            if len(header) > MAX_COLUMNS:  # on its side: a column for each object
                header, *rows = zip(header, *rows, strict=True)
            table(rows, name, header)


def _is_nested(value: Any) -> bool:
    return bool(figures.objects(value)) or (isinstance(value, dict) and "median" not in value)


def _cell(key: str, value: Any) -> str:
    """A value as its figure is shown; of several rounds `median (min–max)`."""
    show = figures.figure(key).show
    if isinstance(value, dict):
        return f"{show(value['median'])} ({show(value['min'])}–{show(value['max'])})"
    return show(value)


def show_diagnosis(diagnosis: dict[str, Any]) -> None:
    """What the doctor found, then which rules found nothing, then which could not look."""
    findings, step = diagnosis["findings"], diagnosis["step"]
    rows = []
    for finding in findings:
        where = "evaluate.json" if finding["step"] is None else f"step {finding['step']}"
        seen = [
            f"{key} {figures.figure(key).show(value)}" for key, value in finding["evidence"].items()
        ]
        rows.append(
            (
                f"{finding['rule'].upper()}\n{finding['advice']}",
                "\n".join([f"{finding['sign']}:", *seen, where]),
                "\n".join(finding["try"]),
            )
        )
    if rows:
        title = f"{diagnosis['run']}: {len(findings)} findings at step {step}"
        table(rows, title, ("finding", "seen", "try one of"), lines=True)
    else:
        say(f"{diagnosis['run']} is healthy at step {step}")
    say(f"nothing found by: {', '.join(diagnosis['passed']) or '–'}")
    for rule in diagnosis["unchecked"]:
        say(f"not checked: {rule['rule']} ({rule['because']})")


def colour(concept: int) -> str:
    """The same concept has the same colour in every text."""
    return COLOURS[(concept * 2654435761 >> 8) % len(COLOURS)]


class ConceptStreamer:
    """A streamer for `generate`: prints the prompt, and new tokens as they come.

    With `cache`, of an online model, each segment is coloured and its concept stands behind it.
    `name` turns a concept id into text."""

    def __init__(self, tokenizer, prompt: str, cache=None, name=str):
        self.prompt = prompt
        self.cache = cache
        self.name = name
        self.text = Detokenizer(tokenizer, skip_special_tokens=cache is None)
        self.pieces: list[str] = []
        self.known = 0
        """Tokens whose concept is known: one step after they were chosen, when they were read."""
        self.printed = 0
        """Those of them in segments that are printed."""

    def put(self, value) -> None:
        """Takes the tokens of the prompt, then one new token at a time."""
        new = [self.text.add(token) for token in value.flatten().tolist()]
        if self.cache is None:
            # The prompt as it was typed: its tokens need not decode to the very same text.
            write("".join(new) if self.pieces else self.prompt)
        self.pieces += new
        if self.cache is None:
            return
        concepts = self.cache.concept_ids[0].tolist()
        for concept in concepts[self.known :]:
            self.known += 1
            if concept != -1:
                self._close_segment(concept)

    def _close_segment(self, concept: int) -> None:
        text = "".join(self.pieces[self.printed : self.known])
        write(text, "dim" if concept < 0 else colour(concept))
        write("⟨sink⟩" if concept < 0 else f"⟨{self.name(concept)}⟩", "dim")
        self.printed = self.known

    def end(self) -> None:
        """Prints the tail, which no concept has closed, and half characters as they are."""
        tail = [] if self.cache is None else self.pieces[self.printed :]
        write("".join([*tail, self.text.rest()]), "" if self.cache is None else "dim")
        write("\n")


def show_plan(plan: list[list[int]], before: list[list[int]]) -> None:
    """Prints `type 0 ⟨3⟩⟨17⟩  type 1 ⟨5⟩`; what differs from `before` stands out."""
    line = Text()
    for kind, concepts in enumerate(plan):
        line.append(f"{'  ' if kind else ''}type {kind} ", style="dim")
        for slot, concept in enumerate(concepts):
            changed = before[kind][slot : slot + 1] != [concept]
            style = f"{'bold reverse ' if changed else ''}{colour(concept)}"
            line.append(f"⟨{concept}⟩", style=style)
        if not concepts:
            line.append("–", style="dim")
    out.print(line, soft_wrap=True)
