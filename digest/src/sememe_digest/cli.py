"""The command line. A command imports what it needs when it runs, so that `--help` is instant."""

import json
import subprocess
import sys
from datetime import UTC, datetime
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Exit, Option, Typer

from sememe_digest import __version__
from sememe_digest.errors import DigestError

app = Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)
ConfigFile = Annotated[Path, Option("--config", "-c", help="The configuration.")]
Out = Annotated[Path | None, Option(help="The site, in place of `out` in the configuration.")]
Feeds = Annotated[Path | None, Option(help="A folder of CLASS.xml(.gz), read in place of arXiv.")]
WithSummaries = Annotated[bool, Option(help="Ask the language model, if its key is set.")]
Now = Annotated[datetime | None, Option(help="The time of the run in UTC: 2026-02-17T06:40:00.")]
Json = Annotated[Path | None, Option("--json", help="Counts and faults; `-` is stdout.")]
Port = Annotated[int, Option(help="The port on this machine.")]
YAML = Path("digest.yaml")


def main() -> None:
    """Entry point: a fault of the input or the network is one sentence and an exit code."""
    try:
        app()
    except DigestError as error:
        code, line = error.code, f"error: {error}"
    except KeyboardInterrupt:
        code, line = 130, "stopped: what is finished is kept, the same command goes on"
    except OSError as error:
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
def init(folder: Annotated[Path, Argument(help="Where to write it.")] = Path()) -> None:
    """Write a commented digest.yaml."""
    path = folder / YAML
    if path.exists():
        raise DigestError(f"{path} is there already: need a new file. try: edit it, or move it")
    folder.mkdir(parents=True, exist_ok=True)
    path.write_bytes((files("sememe_digest") / "templates" / "digest.yaml").read_bytes())
    print(f"written: {path}\nnow: edit its terms, then sememe-digest run")


@app.command()
def run(
    config: ConfigFile = YAML,
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
    from sememe_digest.render import publish, template

    settings, archive = _open(config, out)
    task = Run(settings, archive, feeds, lambda line: print(line, file=sys.stderr, flush=True))
    code, day = task.run((now or datetime.now(UTC)).replace(tzinfo=UTC), summaries)
    if day:
        publish(archive, settings, {day.date})
    faults = day.faults if day else task.faults
    if json_file:
        facts = day.model_dump(include={"date", "feeds", "counts"}) if day else None
        text = json.dumps({"exit_code": code, "faults": faults, "day": facts}, indent=1)
        print(text) if f"{json_file}" == "-" else json_file.write_text(text, encoding="utf-8")
    if f"{json_file}" != "-":
        facts = {"day": day, "exit_code": code, "faults": faults, "site": archive.site}
        print(template("report.txt.j2").render(facts))
    raise Exit(code)


def _open(config: Path, out: Path | None) -> tuple[Any, Any]:
    from sememe_digest.archive import Archive
    from sememe_digest.config import read_config

    settings = read_config(config)
    return settings, Archive(out or settings.out)


@app.command()
def why(
    paper: Annotated[str, Argument(metavar="ID", help="An arXiv id or address.")],
    config: ConfigFile = YAML,
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
def render(config: ConfigFile = YAML, out: Out = None) -> None:
    """Write all pages and feeds anew from the archive."""
    from sememe_digest.render import publish

    settings, archive = _open(config, out)
    publish(archive, settings, set(archive.days))
    print(f"page: {archive.site}/index.html")


@app.command()
def serve(config: ConfigFile = YAML, out: Out = None, port: Port = 8000) -> None:
    """Show the site in a browser of this machine; any web server does the same."""
    words = ["http.server", f"{port}", "--bind", "127.0.0.1", "--directory"]
    subprocess.run([sys.executable, "-m", *words, f"{_open(config, out)[1].site}"], check=False)
