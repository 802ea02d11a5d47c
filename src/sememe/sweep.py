"""A grid over recipe keys → one run folder a point, each measured against its own control, and one
sweep.json."""

import itertools
import re
import statistics
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sememe.errors import Interrupted, RecipeError, SememeError, reason
from sememe.evaluation.results import CONTRACT, put, reusable
from sememe.figures import figure
from sememe.measure import Options, evaluate
from sememe.options import Recipe, check_recipe, load_recipe
from sememe.paths import usable
from sememe.systems import SYSTEMS
from sememe.training.resume import is_finished
from sememe.training.run import train

SHOWN = (
    "nll",
    "delta_nll_control",
    "layer_share",
    "compression_ratio",
    "delta_nll_zero",
    "delta_nll_shuffle",
    "code_perplexity",
)
"""Figures of the table."""
COMMA = re.compile(r",(?![^\[{(]*[\]})])")
"""One that stands in no brackets."""

Entry = dict[str, Any]
"""What sweep.json holds of a run."""


def sweep(
    recipe: Path,
    words: list[str],
    out: Path,
    control: bool = False,
    tokens: int = 8192,
    say: Callable[[str], None] = print,
    show: bool = True,
) -> dict[str, Any]:
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
    points = plan(recipe, grid, control)
    out.mkdir(parents=True, exist_ok=True)
    varied = [key for key, values in grid.items() if len(values) > 1]
    result = {"recipe": str(recipe), "grid": grid, "varied": varied, "tokens": tokens, "runs": []}
    for number, (entry, point) in enumerate(points, 1):
        say(f"point {number} of {len(points)} ({entry['name']})")
        if point is not None:
            _run(entry, point, out, tokens, say, show)
        if entry["fault"]:
            say(f"failed: {entry['name']}: {entry['fault']}")
        result["runs"].append(entry)
        result["points"] = summarise(result["runs"])
        put(out / "sweep.json", result)
    return result


def parse_grid(words: list[str]) -> dict[str, list[str]]:
    """`["rate=0.5,0.25", "quantise=[0,0.1],[0,0.3]"]` → the values of each key, as written."""
    grid: dict[str, list[str]] = {}
    for word in words:
        key, _, text = word.partition("=")
        values = [value.strip() for value in COMMA.split(text)]
        if not key or not all(values) or key in grid:
            raise RecipeError(
                f"{word!r}: need key=value or key=a,b,c, and each key once. try: rate=0.5,0.25"
            )
        grid[key] = list(dict.fromkeys(values))
    return grid


def plan(
    path: Path, grid: dict[str, list[str]], control: bool
) -> list[tuple[Entry, Recipe | None]]:
    """The runs of a grid, baselines first, no recipe twice; without a recipe, last, those that have
    no valid one.

    Raises RecipeError where none is valid."""
    varied = {key for key, values in grid.items() if len(values) > 1}
    points: dict[str, tuple[Entry, Recipe | None]] = {}
    for values in itertools.product(*grid.values()):
        words = dict(zip(grid, values, strict=True))
        changes = {key: words[key] for key in words if key in varied - {"seed", "system"}}
        try:
            recipe = load_recipe(path, [f"{key}={value}" for key, value in words.items()])
            system = SYSTEMS[recipe.system]
            system.check(recipe, processes=1)
            if recipe.on_pairs:
                raise RecipeError(
                    f"{path} trains on pairs of a source and a target, and a sweep measures "
                    "running text: need system = online. try: sememe train and sememe evaluate, "
                    "point by point"
                )
        except SememeError as error:
            entry = _entry("online", changes) | {"fault": str(error)}
            points.setdefault(entry["name"], (entry, None))
            continue
        for name in (*(system.baselines if control else ()), recipe.system):
            run = baseline(recipe, name)
            own = {key: x for key, x in changes.items() if key not in SYSTEMS[name].unread}
            entry = _entry(name, own, run, "seed" in varied)
            points.setdefault(run.model_dump_json(), (entry, run))
    runs = sorted(points.values(), key=lambda run: [*SYSTEMS, None].index(run[0]["system"]))
    if runs[0][1] is None:
        raise RecipeError(runs[0][0]["fault"])
    return runs


def baseline(recipe: Recipe, system: str) -> Recipe:
    """The run of another system beside `recipe`: the same base, batches and LoRA. Keys that it does
    not read go back to their defaults, so that points of a grid share it."""
    values = recipe.model_dump() | {"system": system}
    for key in SYSTEMS[system].unread:
        group, _, name = key.rpartition(".")
        del (values[group] if group else values)[name]
    return check_recipe(values, f"the {system} of this point")


def _entry(
    system: str, changes: dict[str, str], recipe: Recipe | None = None, seeded: bool = False
) -> Entry:
    """What sweep.json says of a run before it is trained. `changes`: the varied keys that it reads,
    as they were written, `seed` apart; they name its folder: `rate-0.5_boundary-fixed`."""
    plain = {key: re.sub(r"[^A-Za-z0-9.+-]+", "-", text) for key, text in changes.items()}
    parts = [f"{key}-{text.strip('-')[-40:]}" for key, text in plain.items()]
    point = "_".join(parts if system == "online" and parts else [system, *parts])[:200]
    entry = {"name": point, "point": point, "changes": changes}
    about = ("system", "boundary", "seed", "trained_tokens", "control", "data", "figures", "fault")
    entry |= dict.fromkeys(about)
    if recipe is not None:
        entry |= {
            "name": f"{point}_seed-{recipe.seed}" if seeded else point,
            "system": system,
            "boundary": None if "boundary" in SYSTEMS[system].unread else recipe.boundary,
            "seed": recipe.seed,
            "trained_tokens": recipe.steps * recipe.batch_size * recipe.sequence_length,
            "data": recipe.data.heldout,
        }
    return entry


def _run(
    entry: Entry, recipe: Recipe, out: Path, tokens: int, say: Callable[[str], None], show: bool
) -> None:
    """Trains and measures one point: its figures, or its fault, go into `entry`."""
    # Where that name is another recipe's run: that one is not made longer.
    numbered = (out / f"{entry['name']}-{n}" for n in itertools.count(2))
    names = itertools.chain([out / entry["name"]], numbered)
    folder = _run_of(recipe, out) or next(path for path in names if not path.exists())
    control = _run_of(baseline(recipe, "control"), out)
    if control is not None and (control == folder or not is_finished(control)):
        control = None
    entry |= {"name": folder.name, "control": control and control.name}
    same = {
        "data": recipe.data.heldout,
        "tokens_asked": tokens,
        "sequence_length": recipe.sequence_length,
        "control": control and str(control),
    }
    try:
        train(recipe, folder, say, show)
        figures = reusable(folder, "evaluate.json", **same) or evaluate(
            str(folder), same["data"], same["control"], Options(tokens=tokens)
        )
        entry["figures"] = {key: figures.get(key) for key in (*CONTRACT, "control_nll")}
    except Interrupted:
        raise
    except SememeError as error:
        entry["fault"] = str(error)
    # a fault of the program or the machine: seen whole, and the other points still count
    except Exception as error:
        traceback.print_exc()
        entry["fault"] = f"{type(error).__name__}: {reason(error)}"


def _run_of(recipe: Recipe, out: Path) -> Path | None:
    """The run of exactly this recipe under `out`, finished or not, whatever its name."""
    wanted = recipe.yaml()
    paths = sorted(out.glob("*/recipe.yaml"))
    return next((p.parent for p in paths if p.read_text(encoding="utf-8") == wanted), None)


def summarise(runs: list[Entry]) -> list[dict[str, Any]]:
    """Runs that differ in their seed alone become one point: mean, and spread = sample standard
    deviation."""
    groups: dict[str, list[Entry]] = {}
    for run in runs:
        if run["figures"] is not None:
            groups.setdefault(f"{run['system']} {run['changes']}", []).append(run)
    points = []
    for members in groups.values():
        first = members[0]
        columns = {
            key: [run["figures"][key] for run in members if run["figures"][key] is not None]
            for key in first["figures"]
        }
        shared = ("system", "boundary", "changes", "trained_tokens")
        points.append(
            {key: first[key] for key in shared}
            | {
                "name": first["point"],
                "runs": [run["name"] for run in members],
                "mean": {key: statistics.fmean(x) if x else None for key, x in columns.items()},
                "spread": {
                    key: statistics.stdev(x) if len(x) > 1 else None for key, x in columns.items()
                },
            }
        )
    return points


def as_table(result: dict[str, Any]) -> tuple[list[tuple[str, ...]], str, tuple[str, ...]]:
    """(rows, title, columns): means, with their spread where there are several seeds."""
    rows = []
    for point in result["points"]:
        row = [point["name"]]
        for key in SHOWN:
            spread = point["spread"][key]
            beside = "" if spread is None else f" ± {spread:.3f}"
            row.append(figure(key).show(point["mean"][key]) + beside)
        rows.append(tuple(row))
    title = f"held-out text, {result['tokens']:,} tokens; mean ± standard deviation over seeds"
    return rows, title, ("point", *(figure(key).title for key in SHOWN))


def check_faults(result: dict[str, Any]) -> None:
    """Raises SememeError where a run failed: how many, and what the first said."""
    failed = [run for run in result["runs"] if run["fault"]]
    if failed:
        count = f"{len(failed)} of {len(result['runs'])} runs failed"
        raise SememeError(f"{count}, the first is {failed[0]['name']}: {failed[0]['fault']}")
