"""A daily digest of arXiv. Start with `init`, edit digest.yaml, then `run`."""

import json
import subprocess
import sys
from datetime import UTC, datetime
from importlib.resources import files
from pathlib import Path
from typing import Annotated

from typer import Argument, Exit, Option, Typer

from sememe_digest import DigestError, kind
from sememe_digest.config import read_config
from sememe_digest.daily import Run
from sememe_digest.papers import Archive, write
from sememe_digest.render import TEMPLATES, publish

app = Typer(help=__doc__, add_completion=False, pretty_exceptions_enable=False)
ConfigFile = Annotated[Path, Option("--config", "-c", help="The configuration.")]
Out = Annotated[Path | None, Option(help="The site, in place of `out` in the configuration.")]
YAML = Path("digest.yaml")


def main() -> None:
    """Entry point: a fault of the input or the network is one sentence and an exit code."""
    try:
        app()
    except DigestError as error:
        fault = error
    except OSError as error:
        got = f"{error.filename} got a fault of the system ({kind(error)})"
        fault = DigestError(got, "a path that can be read and written", "another path")
    print(f"error: {fault}", file=sys.stderr)
    sys.exit(fault.code)


@app.command()
def init(folder: Annotated[Path, Argument(help="Where to write it.")] = Path()) -> None:
    """Write a commented digest.yaml."""
    path = folder / YAML
    if path.exists():
        raise DigestError(f"{path} is there already", "a new file", "to edit it, or to move it")
    write(path, (files("sememe_digest") / "templates" / "digest.yaml").read_bytes())
    print(f"written: {path}\nnow: edit its terms, then sememe-digest run")


@app.command()
def run(
    config: ConfigFile = YAML,
    out: Out = None,
    feeds: Annotated[Path | None, Option(help="A folder of CLASS.xml(.gz), not arXiv.")] = None,
    summaries: Annotated[bool, Option(help="Ask the language model, if its key is set.")] = True,
    now: Annotated[datetime | None, Option(help="The time in UTC: 2026-02-17T06:40:00.")] = None,
    json_file: Annotated[Path | None, Option("--json", help="Counts; `-` is stdout.")] = None,
) -> None:
    """Read today's feeds, rank, summarise and write the site.

    The same command goes on after a stop and completes a day that lacked something. Exit codes:
    0 written, or complete already; 2 usage or configuration; 3 nothing announced; 4 incomplete,
    run again; 5 nothing could be read."""
    settings = read_config(config, out)
    archive = Archive(settings.out)
    now = (now or datetime.now(UTC)).replace(tzinfo=UTC)
    code, day = Run(settings, archive, feeds).run(now, summaries)
    if day.announced:
        publish(archive, settings, {day.date})
    if json_file:
        about = day.model_dump(mode="json", include={"date", "feeds", "counts"})
        facts = {"exit_code": code, "faults": day.faults, "day": about if day.announced else None}
        text = json.dumps(facts, indent=1)
        print(text) if f"{json_file}" == "-" else write(json_file, text.encode())
    if f"{json_file}" != "-":
        report = TEMPLATES.get_template("report.txt.j2")
        print(report.render(day=day, exit_code=code, site=archive.site))
    raise Exit(code)


@app.command()
def why(
    paper: Annotated[str, Argument(metavar="ID", help="An arXiv id or address.")],
    config: ConfigFile = YAML,
    out: Out = None,
) -> None:
    """Say why a paper is in the digest, or why it is not."""
    archive = Archive(read_config(config, out).out)
    # An address has the id in it, too.
    found = [(day, id) for day in archive.days.values() for id in day.announced if id in paper]
    if not found:
        need = "one that a monitored class announced"
        raise DigestError(f"{archive.site} got no paper {paper}", need, "an id, as 2602.05191")
    print(TEMPLATES.get_template("why.txt.j2").render(day=found[0][0], id=found[0][1]))


@app.command()
def render(config: ConfigFile = YAML, out: Out = None) -> None:
    """Write all pages and feeds anew from the archive."""
    settings = read_config(config, out)
    archive = Archive(settings.out)
    publish(archive, settings, set(archive.days))
    print(f"page: {archive.site}/index.html")


@app.command()
def serve(config: ConfigFile = YAML, out: Out = None, port: int = 8000) -> None:
    """Show the site in a browser of this machine; any web server does the same."""
    words = ["http.server", f"{port}", "--bind", "127.0.0.1", "--directory"]
    subprocess.run([sys.executable, "-m", *words, f"{read_config(config, out).out}"], check=False)
