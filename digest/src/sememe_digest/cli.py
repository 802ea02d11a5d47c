"""The command line. A command imports what it needs when it runs, so that `--help` is instant."""

import json
import sys
from datetime import UTC, datetime
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any

import typer

from sememe_digest import __version__
from sememe_digest.errors import DigestError

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)
ConfigFile = Annotated[Path, typer.Option("--config", "-c", help="The configuration.")]
Out = Annotated[Path | None, typer.Option("--out", help="The site, in place of the file's `out`.")]


def main() -> None:
    """Entry point: a fault of the input or the network is one sentence and an exit code."""
    code, line = 2, ""
    try:
        app()
    except DigestError as error:
        code, line = error.exit_code, f"error: {error}"
    except KeyboardInterrupt:
        code, line = 130, "stopped: what is finished is kept, the same command goes on"
    except OSError as error:
        if error.errno is None:  # not of the operating system: a fault of the program
            raise
        need = "need a path that can be read or written. try: another path, or other permissions"
        line = f"error: {error.filename} cannot be used ({error.strerror}): {need}"
    print(line, file=sys.stderr)
    sys.exit(code)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"sememe-digest {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """A daily digest of arXiv: what matches your words, ranked, with checked summaries.

    Start with `sememe-digest init`, edit digest.yaml, then `sememe-digest run`."""


@app.command()
def init(
    folder: Annotated[Path, typer.Argument(help="Where to write digest.yaml.")] = Path(),
) -> None:
    """Write a commented digest.yaml."""
    path = folder / "digest.yaml"
    if path.exists():
        raise DigestError(f"{path} is there already: need a new file. try: edit it, or move it")
    folder.mkdir(parents=True, exist_ok=True)
    path.write_bytes((files("sememe_digest") / "templates" / "digest.yaml").read_bytes())
    print(f"written: {path}\nnow: edit its terms, then sememe-digest run")


@app.command()
def run(
    config_file: ConfigFile = Path("digest.yaml"),
    feeds: Annotated[
        Path | None, typer.Option(help="A folder of CLASS.xml or .xml.gz, read in place of arXiv.")
    ] = None,
    out: Out = None,
    summaries: Annotated[
        bool, typer.Option(help="Ask the language model; without a key there are none anyway.")
    ] = True,
    now: Annotated[
        datetime | None, typer.Option(help="The time of the run in UTC, as 2026-02-17T06:40:00.")
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write counts and states there; `-` is stdout.")
    ] = None,
) -> None:
    """Read today's feeds, rank, summarise and write the site.

    The same command goes on after a stop, completes a day that lacked something, and changes
    nothing on a complete one. Exit codes: 0 written, or complete already; 2 usage or
    configuration; 3 nothing announced, nothing touched; 4 incomplete, run again; 5 nothing could
    be read, nothing written."""
    from sememe_digest import daily, terminal

    archive, config = _open(config_file, out)
    moment = (now or datetime.now(UTC)).replace(tzinfo=UTC)
    task = daily.Run(config, archive, moment, feeds, summaries, terminal.progress)
    code, day = daily.run(task)
    if day and day.date in archive.days:
        _render(archive, config, {day.date})
    if str(json_file) != "-":
        terminal.show(day, code, archive.site)
    if json_file:
        shown = day.model_dump(include={"date", "feeds", "counts", "notes"}) if day else {}
        text = json.dumps({"exit_code": code} | shown, indent=1)
        print(text) if str(json_file) == "-" else json_file.write_text(text, encoding="utf-8")
    raise typer.Exit(code)


def _open(config_file: Path, out: Path | None) -> tuple[Any, Any]:
    from sememe_digest.archive import Archive
    from sememe_digest.config import read_config

    config = read_config(config_file)
    return Archive(out or config.out), config


def _render(archive: Any, config: Any, dates: set[str]) -> None:
    """Writes what is new of the site: these dates, their neighbours, and pages that are missing."""
    from sememe_digest.archive import write
    from sememe_digest.render import render

    order = sorted(archive.days)
    near = {order[i + step] for i in range(len(order)) for step in (-1, 1) if order[i] in dates
            and 0 <= i + step < len(order)}
    absent = {d for d in order if not (archive.site / "archive" / f"{d}.html").exists()}
    for name, text in render(archive.days, config, dates | near | absent).items():
        write(archive.site / name, text)


@app.command()
def why(
    identifier: Annotated[str, typer.Argument(metavar="ID", help="An arXiv id.")],
    config_file: ConfigFile = Path("digest.yaml"),
    out: Out = None,
) -> None:
    """Say why a paper is in the digest, or why it is not."""
    from sememe_digest import terminal

    archive, _ = _open(config_file, out)
    terminal.why(archive, identifier)


@app.command()
def render(config_file: ConfigFile = Path("digest.yaml"), out: Out = None) -> None:
    """Write all pages and feeds anew from the archive."""
    archive, config = _open(config_file, out)
    if not archive.days:
        need = "need a day. try: sememe-digest run"
        raise DigestError(f"{archive.site} has no archive: {need}")
    _render(archive, config, set(archive.days))
    print(f"page: {archive.site / 'index.html'}")


@app.command()
def serve(
    config_file: ConfigFile = Path("digest.yaml"),
    out: Out = None,
    port: Annotated[int, typer.Option(help="The port on this machine.")] = 8000,
) -> None:
    """Show the site in a browser of this machine; any web server does the same."""
    from functools import partial
    from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

    archive, _ = _open(config_file, out)
    handler = partial(SimpleHTTPRequestHandler, directory=archive.site)
    with ThreadingHTTPServer(("127.0.0.1", port), handler) as server:
        print(f"http://127.0.0.1:{port}/ (Ctrl-C stops it)", flush=True)
        server.serve_forever()
