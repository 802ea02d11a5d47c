"""The terminal. All that commands print goes through here, so that text and paths come out as they
are."""

import sys

from rich.console import Console
from rich.segment import Segment, Segments
from rich.style import Style


def new_console(**options) -> Console:
    """A rich console to which `[b]` is no markup, `:key:` no emoji, and a number nothing to
    colour."""
    return Console(markup=False, emoji=False, highlight=False, **options)


out = new_console()


def write(text: str, style: str = "", console: Console = out) -> None:
    """Text to the stream of `console` at once, every character as it is: no wrapping, tabs and
    control characters kept.

    `print` of a console does not do: it expands tabs and drops control characters, whatever its
    settings."""
    console.print(
        Segments([Segment(text, Style.parse(style) if style else None)]), end="", soft_wrap=True
    )


def say(line: str, style: str = "", console: Console = out) -> None:
    """One line; a long path in it is not broken."""
    write(f"{line}\n", style, console)


def replace_unknown() -> None:
    """What the terminal's encoding has no character for is written as `?`, rather than ending the
    command."""
    for stream in (sys.stdout, sys.stderr):
        # Others are somebody's choice, like the backslashes of stderr, or cannot be set, as of a
        # stream put in by a program.
        if getattr(stream, "errors", None) in ("strict", "surrogateescape") and hasattr(
            stream, "reconfigure"
        ):
            stream.reconfigure(errors="replace")
