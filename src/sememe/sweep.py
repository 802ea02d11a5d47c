"""A grid over recipe keys → one run folder a point, each measured against its own control, and one
sweep.json."""

import itertools
import re
import statistics
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from types import MappingProxyType
from typing import Any

from sememe.errors import Interrupted, RecipeError, SememeError, reason
from sememe.evaluation.results import CONTRACT, put, reusable
from sememe.figures import figure
from sememe.measure import Options, evaluate
from sememe.options import Recipe, check_recipe, load_recipe
from sememe.paths import names_of, usable
from sememe.report.files import last_values, read_metrics
from sememe.systems import SYSTEMS
from sememe.training.resume import is_finished
from sememe.training.run import train

SHOWN = (
    "nll",
    "delta_nll_control",
    "layer_share",
    "cache_share",
    "compression_ratio",
    "delta_nll_zero",
    "delta_nll_shuffle",
    "code_perplexity",
)
"""Figures of the table."""
COMMA = re.compile(r",(?![^\[{(]*[\]})])")
"""One that stands in no brackets."""

Entry = dict[str, Any]
"""What sweep.json holds, of a run or of all."""
Grid = dict[str, list[str]]
"""Values of each key, as written."""


def sweep(
    recipe: Path,
    words: list[str],
    out: Path,
    control: bool = False,
    tokens: int = 8192,
    say: Callable[[str], None] = print,
    show: bool = True,
) -> Entry:
    """Trains and measures every point of a grid in folders under `out`; returns what OUT/sweep.json
    then holds. Finished runs and figures of the same text and tokens are read, not made again. A
    point that fails is reported, in its `fault`, and the rest goes on.

    Args:
        words: `key=a,b,c`; a value with commas in brackets stays whole. Points that differ in
            `seed` alone become one: mean and spread.
        control: also trains the baselines, once for each setting of what they read.
        tokens: held-out tokens to measure on.

    Raises:
        RecipeError: no point of the grid is a valid recipe, or `out` is no place for a sweep.
        Interrupted: Ctrl-C; the same call goes on."""
    out = usable(out)
    if (out / "recipe.yaml").is_file():
        raise RecipeError(f"{out} is a run: need a folder for several. try: --out {out}-sweep")
    grid = parse_grid(words)
    varied = [key for key, values in grid.items() if len(values) > 1]
    points = plan(recipe, grid, varied, control)
    out.mkdir(parents=True, exist_ok=True)
    result = {"recipe": str(recipe), "grid": grid, "varied": varied, "tokens": tokens, "runs": []}
    for number, (entry, point) in enumerate(points, 1):
        say(f"point {number} of {len(points)} ({entry['name']})")
        try:
            if point is not None:
                _place(entry, point, out)
                train(point, out / entry["name"], say, show)
                _measure(entry, point, out, tokens)
        except Interrupted:
            raise
        # A fault of the program or the machine is seen whole, and the other points still count.
        except Exception as error:
            entry["fault"] = str(error)
            if not isinstance(error, SememeError):
                traceback.print_exc()
                entry["fault"] = f"{type(error).__name__}: {reason(error)}"
        if entry["fault"]:
            say(f"failed: {entry['name']}: {entry['fault']}")
        result["runs"].append(entry)
        result["points"] = summarise(result["runs"])
        put(out / "sweep.json", result)
    return result


def parse_grid(words: list[str]) -> Grid:
    """`["rate=0.5,0.25", "quantise=[0,0.1],[0,0.3]"]` → the values of each key, as written."""
    pairs = [word.partition("=") for word in words]
    grid = {key: list(map(str.strip, COMMA.split(text))) for key, _, text in pairs}
    if len(grid) < len(words) or "" in itertools.chain(grid, *grid.values()):
        raise RecipeError(
            f"{' '.join(words)}: need key=value or key=a,b,c, and each key once. try: rate=0.5,0.25"
        )
    return {key: list(dict.fromkeys(values)) for key, values in grid.items()}


def plan(path: Path, grid: Grid, varied: list[str], control: bool) -> list[tuple]:
    """(entry, recipe) of the runs of a grid, baselines first, no recipe twice; None for the recipe
    of a point that has no valid one. Raises RecipeError where all are such."""
    runs = {}
    for values in itertools.product(*grid.values()):
        words = dict(zip(grid, values, strict=True))
        try:
            recipe = load_recipe(path, [f"{key}={value}" for key, value in words.items()])
            SYSTEMS[recipe.system].check(recipe, processes=1)
            beside = _baselines(recipe) if control else []
        except SememeError as error:
            entry = _entry("online", words, varied) | {"fault": str(error)}
            runs.setdefault(entry["name"], (entry, None))
            continue
        for name, changes in [*beside, (recipe.system, {})]:
            run = baseline(recipe, name, changes)
            changed = words | {key: str(value) for key, value in changes.items()}
            entry = _entry(name, changed, [*varied, *changes])
            entry |= {"seed": run.seed, "data": names_of(run.data.heldout)[0]}
            if "seed" in varied:
                entry["name"] += f"_seed-{run.seed}"
            if "boundary" not in SYSTEMS[name].unread:
                entry["boundary"] = run.boundary
            runs.setdefault(run.yaml(), (entry, run))
    points = sorted(runs.values(), key=lambda run: list(SYSTEMS).index(run[0]["system"]))
    if not any(run for _, run in points):
        raise RecipeError(points[0][0]["fault"])
    return points


def baseline(recipe: Recipe, system: str, changes: Entry = MappingProxyType({})) -> Recipe:
    """The run of another system beside `recipe`: the same base, batches and LoRA, and what it
    changes. Keys that it does not read go back to their defaults, so that points of a grid share
    it."""
    values = recipe.model_dump() | {"system": system, **changes}
    for key in SYSTEMS[system].unread:
        group, _, name = key.rpartition(".")
        del (values[group] if group else values)[name]
    return check_recipe(values, f"the {system} of this point")


def _baselines(recipe: Recipe) -> list[tuple[str, Entry]]:
    """Systems to train beside a recipe, and what each run of them changes in it."""
    names = SYSTEMS[recipe.system].baselines
    return [(name, changes) for name in names for changes in SYSTEMS[name].beside(recipe)]


def _entry(system: str, words: dict[str, str], varied: list[str]) -> Entry:
    """What sweep.json says of a run, as far as it is known. Its folder is named by the varied keys
    that it reads, `seed` apart, as they were written: `rate-0.5_boundary-fixed`."""
    unread = {"seed", "system", *SYSTEMS[system].unread}
    changes = {key: words[key] for key in varied if key not in unread}
    parts = [
        f"{key}-{re.sub('[^A-Za-z0-9.+-]+', '-', text).strip('-')[-40:]}"
        for key, text in changes.items()
    ]
    point = "_".join(parts if system == "online" and parts else [system, *parts])
    unknown = ("boundary", "seed", "trained_tokens", "control", "data", "figures", "fault")
    about = {"name": point, "point": point, "system": system, "changes": changes}
    return about | dict.fromkeys(unknown)


def _place(entry: Entry, recipe: Recipe, out: Path) -> None:
    """Where a point is trained, and the control that it is compared with, if there is one."""
    own, control = _run_of(recipe, out), _run_of(baseline(recipe, "control"), out)
    if own is not None:
        entry["name"] = own.name
    if control not in (None, own) and is_finished(control):
        entry["control"] = control.name


def _measure(entry: Entry, recipe: Recipe, out: Path, tokens: int) -> None:
    """The figures of a trained point, which may be there already."""
    folder, data = out / entry["name"], entry["data"]
    control = entry["control"] and str(out / entry["control"])
    same = {"data": data, "control": control, "tokens_asked": tokens}
    figures = reusable(folder, "evaluate.json", **same) or evaluate(
        str(folder), data, control, Options(tokens=tokens)
    )
    entry["trained_tokens"] = last_values(read_metrics(folder))["tokens"]
    entry["figures"] = {key: figures.get(key) for key in (*CONTRACT, "control_nll")}


def _run_of(recipe: Recipe, out: Path) -> Path | None:
    """The run of exactly this recipe under `out`, finished or not, whatever its name."""
    wanted = recipe.yaml().encode()
    paths = sorted(out.glob("*/recipe.yaml"))
    return next((p.parent for p in paths if p.read_bytes() == wanted), None)


def summarise(runs: list[Entry]) -> list[Entry]:
    """Runs that differ in their seed alone become one point: mean, and spread = sample standard
    deviation."""
    groups = defaultdict(list)
    for run in runs:
        if run["figures"]:
            groups[run["point"]].append(run)
    points = []
    for name, members in groups.items():
        figures = [run["figures"] for run in members]
        values = {key: [x[key] for x in figures if x[key] is not None] for key in figures[0]}
        point = {
            key: members[0][key] for key in ("system", "boundary", "changes", "trained_tokens")
        }
        point |= {"name": name, "runs": [run["name"] for run in members]}
        point["mean"] = {key: statistics.fmean(x) if x else None for key, x in values.items()}
        point["spread"] = {key: statistics.stdev(x) if x[1:] else None for key, x in values.items()}
        points.append(point)
    return points


def as_table(result: Entry) -> tuple[list, str, tuple]:
    """(rows, title, columns): means, with their spread where there are several seeds."""

    def cells(point: Entry) -> Iterator[str]:
        for key in SHOWN:
            spread = point["spread"][key]
            beside = "" if spread is None else f" ± {spread:.3f}"
            yield figure(key).show(point["mean"][key]) + beside

    rows = [(point["name"], *cells(point)) for point in result["points"]]
    title = f"held-out text, {result['tokens']:,} tokens; mean ± standard deviation over seeds"
    return rows, title, ("point", *(figure(key).title for key in SHOWN))


def check_faults(result: Entry) -> None:
    """Raises SememeError where a run failed: how many, and what the first said."""
    runs = result["runs"]
    faults = [f"{run['name']}: {run['fault']}" for run in runs if run["fault"]]
    if faults:
        raise SememeError(f"{len(faults)} of {len(runs)} runs failed, the first is {faults[0]}")
