"""A grid over recipe keys → one run folder a point, each measured against its own control, and one
sweep.json."""

import itertools
import json
import re
import statistics
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sememe import storage
from sememe.errors import Interrupted, RecipeError, SememeError
from sememe.evaluation.results import CONTRACT, put, reusable
from sememe.figures import figure
from sememe.measure import Options, evaluate
from sememe.options import Recipe, check_recipe, flat, load_recipe, nested, read_recipe
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


@dataclass(frozen=True)
class Point:
    """One run of a sweep. `changes`: the varied keys that it reads, as they were written, `seed`
    apart."""

    name: str
    recipe: Recipe
    changes: dict[str, str]
    seeded: bool = False
    """Whether the sweep varies the seed."""

    @property
    def folder_name(self) -> str:
        return f"{self.name}_seed-{self.recipe.seed}" if self.seeded else self.name


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
    grid = parse_grid(words)
    points, refused = plan(recipe, grid, control)
    _make(out)
    result = {
        "recipe": str(recipe),
        "grid": grid,
        "varied": [key for key, values in grid.items() if len(values) > 1],
        "tokens": tokens,
    }
    runs: list[dict[str, Any]] = []
    for number, point in enumerate(points, 1):
        place = f"point {number} of {len(points)} ({point.folder_name})"
        say(place)
        try:
            runs.append(_run(point, out, tokens, say, show))
        except (Interrupted, KeyboardInterrupt) as stop:
            raise Interrupted(f"stopped at {place}; the same command goes on from there") from stop
        if runs[-1]["fault"]:
            say(f"failed: {point.folder_name}: {runs[-1]['fault']}")
        result |= {"runs": runs + refused, "points": summarise(runs)}
        put(out / "sweep.json", result)
    return result


def parse_grid(words: list[str]) -> dict[str, list[str]]:
    """`["rate=0.5,0.25", "quantise=[0,0.1],[0,0.3]"]` → the values of each key, as written."""
    grid: dict[str, list[str]] = {}
    for word in words:
        key, _, text = word.partition("=")
        values = [value.strip() for value in COMMA.split(text)]
        if not key or not all(values):
            raise RecipeError(f"{word!r}: need key=value or key=a,b,c. try: rate=0.5,0.25")
        if key in grid:
            both = ",".join([*grid[key], text])
            raise RecipeError(
                f"{key!r} is given twice: need all its values in one place. try: {key}={both}"
            )
        grid[key] = list(dict.fromkeys(values))
    return grid


def plan(
    path: Path, grid: dict[str, list[str]], control: bool
) -> tuple[list[Point], list[dict[str, Any]]]:
    """The runs of a grid, baselines first, no recipe twice; and an entry for each point that is no
    valid recipe.

    Raises RecipeError where none is valid."""
    points: list[Point] = []
    refused: dict[str, dict[str, Any]] = {}
    faults: list[SememeError] = []
    varied = [key for key, values in grid.items() if len(values) > 1]
    for values in itertools.product(*grid.values()):
        words = dict(zip(grid, values, strict=True))
        changes = {key: words[key] for key in varied if key not in ("seed", "system")}
        try:
            recipe = load_recipe(path, [f"{key}={value}" for key, value in words.items()])
            SYSTEMS[recipe.system].check(recipe, processes=1)
        except SememeError as error:
            faults.append(error)
            point = Point(_name("online", changes), None, changes)
            refused[point.name] = _entry(point) | {"fault": str(error)}
            continue
        if SYSTEMS[recipe.system].on_pairs(recipe):
            raise RecipeError(
                f"{path} trains on pairs of a source and a target, and a sweep measures running "
                "text: need system = online. try: sememe train and sememe evaluate, point by point"
            )
        baselines = SYSTEMS[recipe.system].baselines if control else ()
        for system in (*baselines, recipe.system):
            own = {k: v for k, v in changes.items() if k not in SYSTEMS[system].unread}
            of_system = baseline(recipe, system) if SYSTEMS[system].unread else recipe
            points.append(Point(_name(system, own), of_system, own, "seed" in varied))
    if not points:
        raise faults[0]
    points.sort(key=lambda point: list(SYSTEMS).index(point.recipe.system))  # baselines come first
    unique: dict[str, Point] = {}
    for point in points:
        unique.setdefault(point.recipe.model_dump_json(), point)
    return list(unique.values()), list(refused.values())


def baseline(recipe: Recipe, system: str) -> Recipe:
    """The run without concepts beside `recipe`: the same base, batches and LoRA. Keys that it does
    not read go back to their defaults, so that points of a grid share it."""
    unread = SYSTEMS[system].unread
    values = {key: x for key, x in flat(recipe.model_dump()).items() if key not in unread}
    return check_recipe(nested(values | {"system": system}), f"the {system} of this point")


def _name(system: str, changes: dict[str, str]) -> str:
    """A readable folder name: `rate-0.5_boundary-fixed`; a path is named by its last part."""
    plain = {
        key: re.sub(r"[^A-Za-z0-9.+-]+", "-", value.rsplit("/", 1)[-1]).strip("-")
        for key, value in changes.items()
    }
    parts = [f"{key}-{value[:40]}" for key, value in plain.items()]
    return "_".join([system, *parts] if system != "online" or not parts else parts)[:200]


def _entry(point: Point) -> dict[str, Any]:
    """What sweep.json says of a point before it is trained."""
    recipe = point.recipe
    entry = {
        "name": point.folder_name,
        "point": point.name,
        "changes": point.changes,
        "control": None,
        "figures": None,
        "fault": None,
    }
    if recipe is None:
        return entry | dict.fromkeys(("system", "boundary", "seed", "trained_tokens", "data"))
    return entry | {
        "system": recipe.system,
        "boundary": None if "boundary" in SYSTEMS[recipe.system].unread else recipe.boundary,
        "seed": recipe.seed,
        "trained_tokens": recipe.steps * recipe.batch_size * recipe.sequence_length,
        "data": recipe.data.heldout,
    }


def _run(
    point: Point, out: Path, tokens: int, say: Callable[[str], None], show: bool
) -> dict[str, Any]:
    """Trains and measures one point. Its entry in sweep.json, with the fault where there is one."""
    recipe, data = point.recipe, point.recipe.data.heldout
    folder = _held(recipe, out) or _free(out, point.folder_name)
    control = _held(baseline(recipe, "control"), out)
    if control is not None and (control == folder or not is_finished(control)):
        control = None
    entry = _entry(point) | {"name": folder.name, "control": control and control.name}
    same = {"data": data, "tokens_asked": tokens, "sequence_length": recipe.sequence_length}
    same |= {"control": str(control)} if control else {}
    try:
        train(recipe, folder, say, show)
        figures = reusable(folder, "evaluate.json", **same) or evaluate(
            str(folder), data, same.get("control"), Options(tokens=tokens)
        )
        entry["figures"] = {key: figures.get(key) for key in (*CONTRACT, "control_nll")}
    except Interrupted:
        raise
    except SememeError as error:
        entry["fault"] = str(error)
    # a fault of the program or the machine: seen whole, and the other points still count
    except Exception as error:
        traceback.print_exc()
        entry["fault"] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    return entry


def _held(recipe: Recipe, out: Path) -> Path | None:
    """The run of exactly this recipe under `out`, finished or not, whatever its name."""
    for path in sorted(out.glob("*/recipe.yaml")):
        with suppress(SememeError):
            if read_recipe(path) == recipe:
                return path.parent
    return None


def _free(out: Path, name: str) -> Path:
    """A folder that is new or empty, named so where that is free."""
    folders = (out / (name if n == 1 else f"{name}-{n}") for n in itertools.count(1))
    return next(p for p in folders if not p.exists() or (p.is_dir() and not any(p.iterdir())))


def summarise(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Runs that differ in their seed alone become one point: mean, and spread = sample standard
    deviation."""
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for run in runs:
        if run["figures"] is not None:
            key = (run["system"], run["point"], *run["changes"].items())
            groups.setdefault(key, []).append(run)
    points = []
    for members in groups.values():
        first = members[0]
        columns = {
            key: [run["figures"][key] for run in members if run["figures"][key] is not None]
            for key in first["figures"]
        }
        shared = ("system", "boundary", "changes", "trained_tokens")
        points.append(
            {
                "name": first["point"],
                **{key: first[key] for key in shared},
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

    def cell(point: dict[str, Any], key: str) -> str:
        spread = point["spread"][key]
        beside = "" if spread is None else f" ± {spread:.3f}"
        return figure(key).show(point["mean"][key]) + beside

    rows = [(point["name"], *(cell(point, key) for key in SHOWN)) for point in result["points"]]
    several = any(len(point["runs"]) > 1 for point in result["points"])
    title = f"held-out text, {result['tokens']:,} tokens"
    title += "; mean ± standard deviation over seeds" if several else ""
    return rows, title, ("point", *(figure(key).title for key in SHOWN))


def check_faults(result: dict[str, Any]) -> None:
    """Raises SememeError where a run failed: how many, and what the first said."""
    failed = [run for run in result["runs"] if run["fault"]]
    if failed:
        count = f"{len(failed)} of {len(result['runs'])} runs failed"
        raise SememeError(f"{count}, the first is {failed[0]['name']}: {failed[0]['fault']}")


def _make(out: Path) -> None:
    """Raises RecipeError where `out` holds something else, SememeError where it cannot be made."""
    if (out / "recipe.yaml").is_file():
        raise RecipeError(f"{out} is a run: need a folder for several. try: --out {out}-sweep")
    with suppress(OSError, ValueError):  # not there, or cut off: it is written anew
        if "runs" not in json.loads((out / "sweep.json").read_text(encoding="utf-8")):
            raise RecipeError(
                f"{out}/sweep.json is not of `sememe sweep`: need a folder without it. try: --out "
                f"{out}-runs"
            )
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise storage.unwritable(out, error) from error
    storage.check(out / "sweep.json")
