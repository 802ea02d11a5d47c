"""The terminal: text and paths as they are, tables, JSON, and text with its concepts in colour.

Imports nothing large, so that `sememe --help` is instant."""

import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.segment import Segment, Segments
from rich.style import Style
from rich.table import Table

from sememe import figures
from sememe.detokenize import Detokenizer
from sememe.evaluation.results import put

COLOURS = ("cyan", "magenta", "green", "yellow", "blue", "red")
MAX_COLUMNS = 8


def new_console(**options) -> Console:
    """A rich console to which `[b]` is no markup, `:key:` no emoji and a number nothing special."""
    return Console(markup=False, emoji=False, highlight=False, **options)


# of several processes that train together the first alone prints
out = new_console(quiet=os.environ.get("RANK", "0") != "0")


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


def table(rows: Iterable, title: str, header: Iterable[str]) -> None:
    """Prints a table of texts."""
    grid = Table(title=title, title_justify="left")
    for index, name in enumerate(header):
        grid.add_column(name, justify="right" if index else "left", overflow="fold")
    for row in rows:
        grid.add_row(*row)
    out.print(grid)


def show_figures(result: dict[str, Any], title: str = "") -> None:
    """Prints a JSON object of figures: its plain values, then objects of the same keys beside each
    other, then every list of objects but `samples`, which the report shows."""
    plain = [(key, value) for key, value, _ in figures.rows(result)]
    if plain:
        table(plain, title, ("measure", "value"))
    beside: dict[tuple, list[dict]] = {}
    for name, value in result.items():
        if figures.is_plain(value) or name == "samples":
            continue
        if isinstance(value, list):
            show_records(value, name)
        elif all(map(figures.is_plain, value.values())):
            beside.setdefault(tuple(value), []).append({"": name} | value)
        else:
            show_figures(value, name)
    for records in beside.values():
        show_records(records)


def show_records(
    records: list[dict[str, Any]], title: str = "", keys: Iterable[str] | None = None
) -> None:
    """Prints objects as the rows of a table, or as its columns where they have many keys."""
    header, rows = figures.table(records, keys)
    if len(header) > MAX_COLUMNS:
        header, *rows = zip(header, *rows, strict=True)
    table(rows, title, header)


def show_diagnosis(diagnosis: dict[str, Any]) -> None:
    """What the doctor found, then which rules found nothing, then which could not look."""
    findings = diagnosis["findings"]
    health = f"{len(findings)} findings" if findings else "healthy"
    say(f"{diagnosis['run']}: {health} at step {diagnosis['step']}")
    for finding in findings:
        seen = [f"{key} {figures.show(value)}" for key, value in finding["evidence"].items()]
        say(f"\n{finding['rule'].upper()}: {finding['advice']}", "bold")
        say(f"  {', '.join([finding['sign'], *seen])}")
        say(f"  try one of: {' '.join(finding['try']) or '–'}")
    say(f"\nnothing found by: {', '.join(diagnosis['passed'])}")
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
        self.segment = ""
        self.known = 0
        """Tokens whose concept is known: one step after they were chosen, when they were read."""

    def put(self, value) -> None:
        """Takes the tokens of the prompt, then one new token at a time."""
        new = [self.text.add(token) for token in value.flatten().tolist()]
        if self.cache is None:
            # The prompt as it was typed: its tokens need not decode to the very same text.
            write(self.prompt or "".join(new))
            self.prompt = ""
            return
        self.pieces += new
        for concept in self.cache.concept_ids[0, self.known :].tolist():
            self.segment += self.pieces[self.known]
            self.known += 1
            if concept != -1:
                is_sink = concept < 0
                write(self.segment, "dim" if is_sink else colour(concept))
                write(f"⟨{'sink' if is_sink else self.name(concept)}⟩", "dim")
                self.segment = ""

    def end(self) -> None:
        """Prints the tail, which no concept has closed, and half characters as they are."""
        tail = [self.segment, *self.pieces[self.known :], self.text.rest()]
        write("".join(tail), "" if self.cache is None else "dim")
        write("\n")


def show_plan(plan: list[list[int]], before: list[list[int]]) -> None:
    """Prints `type 0 ⟨3⟩⟨17⟩  type 1 ⟨5⟩`; what differs from `before` stands out."""
    for kind, concepts in enumerate(plan):
        write(f"{'  ' if kind else ''}type {kind} {'' if concepts else '–'}", "dim")
        for slot, concept in enumerate(concepts):
            changed = before[kind][slot : slot + 1] != [concept]
            write(f"⟨{concept}⟩", f"{'bold reverse ' if changed else ''}{colour(concept)}")
    write("\n")
