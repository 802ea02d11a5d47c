"""Run or sweep folder → figures → template → one self-contained HTML page, whole or not at all."""

import shlex
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from sememe.errors import CheckpointError, SememeError
from sememe.figures import figure, objects, rows, show, table
from sememe.paths import usable
from sememe.report import plots
from sememe.report.doctor import examine
from sememe.report.files import (
    Run,
    dig,
    is_sweep,
    plain,
    read_points,
    read_run,
    read_sweep,
    read_text,
)
from sememe.report.samples import frequent, samples
from sememe.storage import unwritable, write

HERE = Path(__file__).parent
HEADLINES = {
    "online": (
        "delta_nll_control compression_ratio delta_nll_zero delta_nll_shuffle decode_speedup "
        "cache_reduction"
    ),
    "compressor": (
        "token_accuracy exact_match bits_per_token bits_per_token_lossless delta_nll_shuffle "
        "compress_base_forwards"
    ),
    "planner": "nll nll_posterior delta_nll_shuffle delta_nll_empty em_flips plan_entropy",
    "control": "nll bits_per_byte delta_nll_control layer_share",
}
"""System → the figures at the head of its page; a baseline has those of the control."""
LEADS = {
    "online": "An online model sums up what it has read or written since its last concept token in "
    "a new one, every few tokens and by its own decision. Its middle layers run on the concept "
    "tokens alone. Is text predicted as well as by the control, the same base trained the same way "
    "without concepts, and does it matter which concepts are written?",
    "compressor": "A compressor reads a window of text and writes its concept ids; the text is "
    "written again from these ids alone. How much of it comes back, for how many bits?",
    "planner": "A planner reads the source and writes a short list of concept tokens of several "
    "types; an executor writes the target from this plan alone. The best plan of each training "
    "pair, z*, is searched for while both learn. Does the text depend on its plan, and does the "
    "planner come near z*?",
    "control": "A baseline: the same base with the same adapters, without concepts.",
    "sweep": "One recipe, trained at every point of a grid. A model with concepts runs its middle "
    "layers on fewer positions than its base; ΔNLL to the control, the same base and adapters on "
    "the same batches without concepts, is what that costs.",
}
WANTED = {
    "online": "evaluate ablate benchmark",
    "compressor": "evaluate ablate reconstruct benchmark",
    "planner": "evaluate ablate",
    "control": "evaluate",
}
"""System → the commands whose figures its page shows."""
TABLES = (
    ("What the target is read from", "evaluate.given", ""),
    ("Signals that a linear probe reads off the plan", "evaluate.signals", ""),
    ("At other rates", "evaluate.dial", ""),
    ("Each text", "evaluate.by_data", "data tokens nll delta_nll_control concept_rate target_rate"),
    ("Ablations", "ablate", "delta_nll delta_nll_min delta_nll_max"),
    ("Dropping concepts", "ablate.drop", "share delta_nll delta_nll_min delta_nll_max"),
    (
        "Rate and distortion",
        "reconstruct.curve",
        "target_rate concept_rate compression_ratio bits_per_token bits_per_token_used "
        "token_accuracy exact_match bleu chrf rouge_l nll bits_per_token_lossless",
    ),
    ("Lossless coders, on the same text", "reconstruct.lossless", ""),
    ("Continuing a context", "reconstruct.continuation.given", ""),
    ("Online against offline, on the same tokens", "reconstruct.online.given", ""),
    (
        "Speed and memory",
        "benchmark",
        "prefill_tokens_per_s decode_tokens_per_s read_tokens_per_s write_tokens_per_s "
        "train_tokens_per_s cache_bytes weight_bytes prefill_peak_bytes train_peak_bytes",
    ),
)
"""Title, where the records are (a list, or an object that names them), its columns ("": all)."""
POINT_COLUMNS = (
    " point kind layer_share compression_ratio nll delta_nll_control spread delta_nll_zero "
    "delta_nll_shuffle code_perplexity trained_tokens front"
)
"""Of the table of models; the first has the number of the row."""
FACTS = {"step": " steps", "tokens": " tokens", "seconds": ""}


@dataclass(frozen=True)
class Table:
    title: str
    headings: list[str]
    rows: list[list[str]]
    words: int = 1
    """How many of the first columns are text; figures stand at the right."""


def write_report(run: Path, control: Path | None = None, beside: Iterable[Path] = ()) -> Path:
    """Write RUN/report.html from the files of `run`, or SWEEP/sweep.html from those of a sweep;
    returns its path.

    `control`: the run whose curves are drawn beside; None takes the sibling folder `<run>-control`
    where there is one. `beside`: further runs and sweeps to compare with."""
    run, others = usable(run), [usable(path) for path in beside]
    if not is_sweep(run):
        return _put(run / "report.html", run_page(read_run(run, control), others))
    if control is not None:
        raise CheckpointError(
            f"got {run}, a sweep, and --control; need a run for that. try: it without --control"
        )
    return _put(run / "sweep.html", sweep_page(run, others))


def _put(path: Path, page: dict[str, Any]) -> Path:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    style = Markup(read_text(HERE / "style.css"))  # ours, so not escaped
    html = environment.get_template("page.html").render(page, style=style, show=show)
    try:
        write(path, html.encode("utf-8", "replace"))
    except OSError as error:
        raise unwritable(path, error) from error
    return path


def run_page(run: Run, beside: list[Path]) -> dict[str, Any]:
    last, texts = run.metrics.last(), samples(run)
    system = run.system if run.system in HEADLINES else "control"
    facts = [f"{figure(key).show(last[key])}{unit}" for key, unit in FACTS.items() if key in last]
    facts += [f"control: {run.control_path.resolve().name if run.control_path else 'none beside'}"]
    if run.metrics.unreadable:
        facts.append(f"{run.metrics.unreadable} unreadable lines of metrics.jsonl skipped")
    drawn = [
        plots.loss_plot(run, [read_run(path) for path in beside if not is_sweep(path)]),
        *plots.curve_plots(run),
        plots.distortion_plot(run),
    ]
    files = {f"{command}.json": value for command, value in run.json.items() if value}
    files["metrics.jsonl, last values"] = last
    compared = _comparison([run.path, *beside]) if beside else {}
    return compared | {
        "name": run.path.resolve().name,
        "kind": "run report",
        "facts": [run.system, *facts],
        "lead": LEADS[system],
        "tiles": [_tile(key, run, last) for key in HEADLINES[system].split()],
        "plots": [plot for plot in drawn if plot is not None],
        "missing": list(_missing(run, system)),
        "doctor": _diagnosis(run),
        "texts": texts,
        "frequent": Table("Concepts written most often in these texts", *table(frequent(texts))),
        "tables": list(_tables(run)),
        "figures": {name: list(rows(value)) for name, value in files.items()},
        "details": {name: read_text(run.path / name) for name in ("recipe.yaml", "env.json")},
    }


def sweep_page(folder: Path, beside: list[Path]) -> dict[str, Any]:
    sweep = read_sweep(folder)
    failed = [run for run in objects(sweep.get("runs")) if run.get("fault")]
    grid = [{"key": key, "values": x} for key, x in plain(sweep.get("grid")).items()]
    return _comparison([folder, *beside]) | {
        "name": folder.resolve().name,
        "kind": "sweep",
        "facts": [show(sweep.get("recipe")), f"{len(sweep['points'])} points"],
        "lead": LEADS["sweep"],
        "tables": [
            Table("Failed", *table(failed, ["name", "fault"]), words=2),
            Table("The grid", *table(grid), words=2),
        ],
    }


def _comparison(folders: list[Path]) -> dict[str, Any]:
    """Plot and table of the points of all folders; those of a second sweep carry its name."""
    points: list[dict] = []
    for folder in folders:
        is_other_sweep = is_sweep(folder) and folder != folders[0]
        points += read_points(folder, f"{folder.resolve().name}/" if is_other_sweep else "")
    best = plots.pareto_front(points)
    records = [
        record | {"": row, "front": "front" if record in best else ""}
        for row, record in enumerate(points, 1)
    ]
    comparison = Table("", *table(records, POINT_COLUMNS.split(" ")))
    return {"pareto": plots.pareto_plot(points), "comparison": comparison}


def _tile(key: str, run: Run, last: dict) -> dict[str, str]:
    """A headline figure, from the first file that has it."""
    sources = (run.json["reconstruct"], run.json["evaluate"], run.json["benchmark"], last)
    value = next((x for record in sources if (x := record.get(key)) is not None), None)
    tile = figure(key)
    tone = {True: "good", False: "poor", None: ""}[tile.is_healthy(value)]
    return {
        "title": tile.title,
        "value": tile.show(value),
        "meaning": tile.meaning,
        "tone": tone,
    }


def _missing(run: Run, system: str) -> Iterator[tuple[str, str]]:
    """(file, the command that makes it) of what is not there, or unreadable."""
    for command in WANTED[system].split():
        if not run.json[command]:
            data = "" if command == "benchmark" else " --data heldout.txt"
            yield f"{command}.json", f"sememe {command} {shlex.quote(str(run.path))}{data}"


def _tables(run: Run) -> Iterator[Table]:
    for title, where, key_names in TABLES:
        value = dig(run.json, where)
        named = [
            {"": name} | record for name, record in plain(value).items() if isinstance(record, dict)
        ]
        records, keys = objects(value) or named, key_names.split()
        if keys:
            records = [record for record in records if any(key in record for key in keys)]
            keys = [key for key in keys if any(key in record for record in records)]
            keys = ["", *keys] if named else keys
        if records:
            yield Table(title, *table(records, keys or None))


def _diagnosis(run: Run) -> dict[str, Any]:
    try:
        return examine(run.path)
    except SememeError as error:
        return {"unchecked": [{"rule": "all", "because": str(error)}]}
