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
Option = typer.Option
ConfigFile = Annotated[Path, Option("--config", "-c", help="The configuration.")]
Out = Annotated[Path | None, Option(help="The site, in place of `out` in the configuration.")]
Feeds = Annotated[Path | None, Option(help="A folder of CLASS.xml(.gz), read in place of arXiv.")]
WithSummaries = Annotated[bool, Option(help="Ask the language model, if its key is set.")]
Now = Annotated[datetime | None, Option(help="The time of the run in UTC: 2026-02-17T06:40:00.")]
Json = Annotated[Path | None, Option("--json", help="Counts and faults; `-` is stdout.")]
Port = Annotated[int, Option(help="The port on this machine.")]


def main() -> None:
    """Entry point: a fault of the input or the network is one sentence and an exit code."""
    try:
        app()
    except DigestError as error:
        code, line = error.code, f"error: {error}"
    except KeyboardInterrupt:
        code, line = 130, "stopped: what is finished is kept, the same command goes on"
    except OSError as error:
        if error.errno is None:  # not of the operating system: a fault of the program
            raise
        need = "need a path that can be read or written. try: another path, or other permissions"
        code, line = 2, f"error: {error.filename} got {error.strerror}: {need}"
    print(line, file=sys.stderr)
    sys.exit(code)


@app.callback(invoke_without_command=True)
def options(version: Annotated[bool, Option("--version", help="Print the version.")] = False):
    """A daily digest of arXiv: what matches your words, ranked, with checked summaries.

    Start with `sememe-digest init`, edit digest.yaml, then `sememe-digest run`."""
    if version:
        print(f"sememe-digest {__version__}")


@app.command()
def init(folder: Annotated[Path, typer.Argument(help="Where to write it.")] = Path()) -> None:
    """Write a commented digest.yaml."""
    path = folder / "digest.yaml"
    if path.exists():
        raise DigestError(f"{path} is there already: need a new file. try: edit it, or move it")
    folder.mkdir(parents=True, exist_ok=True)
    path.write_bytes((files("sememe_digest") / "templates" / "digest.yaml").read_bytes())
    print(f"written: {path}\nnow: edit its terms, then sememe-digest run")


@app.command()
def run(
    config: ConfigFile = Path("digest.yaml"),
    feeds: Feeds = None,
    out: Out = None,
    summaries: WithSummaries = True,
    now: Now = None,
    json_file: Json = None,
) -> None:
    """Read today's feeds, rank, summarise and write the site.

    The same command goes on after a stop, completes a day that lacked something, and changes
    nothing on a complete one. Exit codes: 0 written, or complete already; 2 usage or
    configuration; 3 nothing announced, nothing touched; 4 incomplete, run again; 5 nothing could
    be read, nothing written."""
    from sememe_digest.daily import Run
    from sememe_digest.render import template

    settings, archive = _open(config, out)
    task = Run(settings, archive, feeds, lambda line: print(line, file=sys.stderr, flush=True))
    code, day = task.run((now or datetime.now(UTC)).replace(tzinfo=UTC), summaries)
    if day:
        _render(archive, settings, {day.date})
    facts = {"day": day, "exit_code": code, "faults": day.faults if day else task.faults}
    if json_file:
        shown = day.model_dump(include={"date", "feeds", "counts"}) if day else {}
        text = json.dumps(facts | {"day": shown}, indent=1)
        print(text) if str(json_file) == "-" else json_file.write_text(text, encoding="utf-8")
    if str(json_file) != "-":
        print(template("report.txt.j2").render(site=archive.site, **facts))
    raise typer.Exit(code)


def _open(config: Path, out: Path | None) -> tuple[Any, Any]:
    from sememe_digest.archive import Archive
    from sememe_digest.config import read_config

    settings = read_config(config)
    return settings, Archive(out or settings.out)


def _render(archive: Any, settings: Any, dates: set[str]) -> None:
    """Writes the pages of these dates, of their neighbours, and those that are missing."""
    from sememe_digest.archive import write
    from sememe_digest.render import render

    order, folder = sorted(archive.days), archive.site / "archive"
    near = {day for i, day in enumerate(order) if dates & {*order[max(0, i - 1) : i + 2]}}
    missing = {day for day in order if not (folder / f"{day}.html").exists()}
    for name, text in render(archive.days, settings, near | missing).items():
        write(archive.site / name, text)


@app.command()
def why(
    paper: Annotated[str, typer.Argument(metavar="ID", help="An arXiv id or address.")],
    config: ConfigFile = Path("digest.yaml"),
    out: Out = None,
) -> None:
    """Say why a paper is in the digest, or why it is not."""
    from sememe_digest.feeds import IDENTIFIER
    from sememe_digest.render import template

    _, archive = _open(config, out)
    match = IDENTIFIER.search(f"/abs/{paper.rpartition('abs/')[2].removeprefix('arXiv:')}")
    days = [day for day in archive.days.values() if match and match[1] in day.announced]
    if not days:
        need = "need one that a monitored class announced. try: an id, as 2602.05191"
        raise DigestError(f"{paper} is in no day of {archive.site}: {need}")
    print(template("why.txt.j2").render(day=days[0], id=match[1]))


@app.command()
def render(config: ConfigFile = Path("digest.yaml"), out: Out = None) -> None:
    """Write all pages and feeds anew from the archive."""
    settings, archive = _open(config, out)
    if not archive.days:
        raise DigestError(f"{archive.site} has no day: need one. try: sememe-digest run")
    _render(archive, settings, set(archive.days))
    print(f"page: {archive.site / 'index.html'}")


@app.command()
def serve(config: ConfigFile = Path("digest.yaml"), out: Out = None, port: Port = 8000) -> None:
    """Show the site in a browser of this machine; any web server does the same."""
    from functools import partial
    from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

    _, archive = _open(config, out)
    handler = partial(SimpleHTTPRequestHandler, directory=archive.site)
    with ThreadingHTTPServer(("127.0.0.1", port), handler) as server:
        print(f"http://127.0.0.1:{port}/ until Ctrl-C", flush=True)
        server.serve_forever()
