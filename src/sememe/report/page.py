"""Run or sweep folder → figures → template → one self-contained HTML page, whole or not at all."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jinja2
from matplotlib import style

from sememe.figures import figure, is_records, read_toml, rows, show, table
from sememe.paths import usable
from sememe.report import plots
from sememe.report.doctor import examine
from sememe.report.files import (
    Run,
    dig,
    is_sweep,
    last_values,
    of_run,
    read_json,
    read_points,
    read_run,
    read_text,
)
from sememe.report.samples import samples
from sememe.storage import write

HERE = Path(__file__).parent
WORDS = read_toml(HERE / "page.toml")
TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(HERE), autoescape=True, trim_blocks=True, lstrip_blocks=True
)
TEMPLATES.globals |= {"figure": figure, "rows": rows, "show": show}


def write_report(run: Path, *beside: Path) -> Path:
    """Writes RUN/report.html from the files of `run`, or SWEEP/sweep.html from those of a sweep;
    returns its path. The curves of the sibling folder `RUN-control` are drawn too, where there is
    one. `beside`: further runs and sweeps to compare with."""
    folders = [usable(path) for path in (run, *beside)]
    name, page = ("sweep", sweep_page) if is_sweep(folders[0]) else ("report", run_page)
    with style.context(HERE / "plots.mplstyle"), of_run(folders[0]):
        html = TEMPLATES.get_template("page.html").render(page(folders))
    path = folders[0] / f"{name}.html"
    write(path, html.encode("utf-8", "replace"))
    return path


def run_page(folders: list[Path]) -> dict[str, Any]:
    run, *others = (read_run(folder) for folder in folders if not is_sweep(folder))
    sibling = run.path.resolve().with_name(f"{run.name}-control")
    if (sibling / "metrics.jsonl").is_file():
        others.insert(0, read_run(sibling))
    words = WORDS["online"] | WORDS.get(run.system, WORDS["baseline"])
    last = last_values(run.lines)
    # the finished model's figures go before those of its training
    newest = [run.json[name] for name in ("benchmark", "evaluate", "reconstruct")]
    drawn = [plots.training_plot([run, *others], **curves) for curves in words["curves"]]
    drawn.append(plots.distortion_plot(run.json["reconstruct"]))
    comparison = _comparison(folders) if len(folders) > 1 else {}
    return comparison | {
        "name": run.name,
        "run": run,
        "words": words,
        "facts": [run.system, f"step {last['step']:,}", f"{show(last.get('tokens'))} tokens"],
        "measured": last_values([last, *newest]),
        "plots": list(filter(None, drawn)),
        "doctor": examine(run),
        "texts": samples(run.json["evaluate"]) + samples(run.json["reconstruct"]),
        "tables": list(_tables(run)),
        "files": run.json | {"last values of metrics.jsonl": last},
        "details": {name: read_text(run.path / name) for name in ("recipe.yaml", "env.json")},
    }


def sweep_page(folders: list[Path]) -> dict[str, Any]:
    sweep = read_json(folders[0] / "sweep.json")
    failed = [run for run in sweep["runs"] if run["fault"]]
    return _comparison(folders) | {
        "name": folders[0].resolve().name,
        "words": WORDS["sweep"],
        "facts": [sweep["recipe"], f"{len(sweep['points'])} points"],
        "tables": [("Failed", *table(failed, ["name", "fault"]))] if failed else [],
    }


def _comparison(folders: list[Path]) -> dict[str, Any]:
    """Plots and table of the points of all folders."""
    points = [point for folder in folders for point in read_points(folder)]
    fronts = {x: plots.pareto_front(points, x) for x in plots.PARETO}
    for row, point in enumerate(points, 1):
        on = [
            plots.PARETO[x][0]
            for x, front in fronts.items()
            if {*plots.pairs([point], x, plots.DELTA)} & {*front}
        ]
        point |= {"": row, "front": ", ".join(on)}
    return {
        "pareto": [plot for x in plots.PARETO if (plot := plots.pareto_plot(points, x))],
        "comparison": table(points, WORDS["sweep"]["columns"]),
    }


def _tables(run: Run) -> Iterator[tuple[str, list[str], list[list[str]]]]:
    """(title, headings, rows) of page.toml's tables that were measured."""
    for title, (where, *keys) in WORDS["tables"].items():
        records = dig(run.json, where) or {}
        if not is_records(records):  # an object that names them
            records = [{"": name} | x for name, x in records.items() if isinstance(x, dict)]
        records = [record for record in records if not keys or set(keys) & record.keys()]
        present = [key for key in ("", *keys) if any(key in record for record in records)]
        if records:
            yield title, *table(records, present if keys else None)
