"""A grid over recipe keys → one run folder a point, each measured against its own control, and one
sweep.json."""

import itertools
import json
import os
import re
import statistics
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml
from tqdm.auto import tqdm

from sememe import storage
from sememe.data import read_texts
from sememe.errors import Interrupted, RecipeError, SememeError
from sememe.evaluation.figures import CONTRACT, kept, put
from sememe.evaluation.files import evaluate_files
from sememe.paths import usable
from sememe.training.recipe import BASELINES, Recipe, check_recipe, load_recipe
from sememe.training.run import train

_CONCEPTS = dict.fromkeys(
    (
        "rate",
        "max_tail",
        "head",
        "boundary",
        "num_concepts",
        "codes_per_concept",
        "concept_dropout",
        "code_temperature",
        "gumbel",
        "distil",
        "anchor",
        "pool",
        "content",
        "depth",
        "continuation_share",
        "shallow_window",
    ),
    True,
) | {"schedule": {"quantise"}, "lora": {"shallow"}}
_MIDDLE = dict.fromkeys(("split", "bridge", "concept_learning_rate", "calibration_tokens"), True)
_CACHE = ("rate", "split", "shallow_window")
NOT_READ: dict[str, dict[str, Any]] = {
    "skip": _CONCEPTS,
    "control": _CONCEPTS | _MIDDLE,
    "window": {key: held for key, held in (_CONCEPTS | _MIDDLE).items() if key not in _CACHE},
}
"""Recipe keys that a baseline does not read. They go back to their defaults, so that points of a
grid share it. A key that is missing here costs a baseline for each of its values; one too many
would make the comparison unequal."""

SHOWN = (
    ("nll", "NLL", ".3f"),
    ("delta_nll_control", "Δ control", "+.3f"),
    ("layer_share", "layers", ".1%"),
    ("compression_ratio", "R", ".2f"),
    ("delta_nll_zero", "Δ zero", "+.2f"),
    ("delta_nll_shuffle", "Δ shuffle", "+.2f"),
    ("code_perplexity", "codes", ".0f"),
)
"""Figure, column and format of the table."""


@dataclass(frozen=True)
class Job:
    """One run of the sweep. `changes`: the varied keys that it reads, as they were written, `seed`
    apart."""

    name: str
    recipe: Recipe
    changes: dict[str, str]
    seed: int | None = None

    @property
    def folder_name(self) -> str:
        return self.name if self.seed is None else f"{self.name}_seed-{self.seed}"


def sweep(
    recipe: Path,
    words: list[str],
    out: Path,
    control: bool = False,
    tokens: int = 8192,
    data: str | None = None,
    seeds: tuple[int, ...] = (),
    say: Callable[[str], None] = print,
    show: bool = True,
) -> dict[str, Any]:
    """Trains and measures every point of a grid in folders under `out`; returns what OUT/sweep.json
    then holds.

    Finished runs and figures of the same text and tokens are read, not made again. A point that
    fails is reported, in its `fault`, and the rest goes on.

    Args:
        words: `key=a,b,c`; a value with commas in brackets stays whole.
        control: also trains `control`, `skip` and `window`, once for each setting of what they
            read.
        data, tokens: text to measure on (default: the recipe's held-out text), and how much of it.
        seeds: every point once for each seed; figures are then means with their spread.

    Raises:
        RecipeError: no point of the grid is a valid recipe, or `out` is no place for a sweep.
        DataError: `data` cannot be read.
        Interrupted: Ctrl-C; the same call goes on."""
    out = usable(out)
    _check_place(out)
    grid = parse_grid(words)
    if seeds:
        if "seed" in grid:
            raise RecipeError(
                f"seed={','.join(grid['seed'])} beside --seeds: need one of the two. try: --seeds "
                "alone"
            )
        grid["seed"] = [str(seed) for seed in dict.fromkeys(seeds)]
    if data is not None:
        read_texts(data)  # a wrong name must not show after hours of training
    jobs, refused = plan(recipe, grid, control)
    _make(out)
    runs, varied = [], {key: values for key, values in grid.items() if len(values) > 1}

    def tell(line: str) -> None:
        with tqdm.external_write_mode():  # bars give way and come back
            say(line)

    shape = "{desc} |{bar}| [{elapsed}, about {remaining} left]"
    with tqdm(
        total=len(jobs), desc=f"{len(jobs)} points", disable=not show, bar_format=shape
    ) as bar:
        for place, job in enumerate(jobs, 1):
            bar.set_description_str(f"point {place} of {len(jobs)}: {job.folder_name}")
            try:
                runs.append(_run(job, out, data or job.recipe.data.heldout, tokens, tell, show))
            except (Interrupted, KeyboardInterrupt) as stop:
                said = f"stopped at point {place} of {len(jobs)} ({job.folder_name}); the same command goes on from there"
                raise Interrupted(said) from stop
            bar.update()
            if fault := runs[-1]["fault"]:
                tell(f"failed: {job.folder_name}: {fault}")
            found = {
                "recipe": str(recipe),
                "grid": grid,
                "varied": list(varied),
                "tokens": tokens,
                "runs": runs + refused,
                "points": summarise(runs),
            }
            put(out / "sweep.json", found)
    return found


def parse_grid(words: list[str]) -> dict[str, list[str]]:
    """`["rate=0.5,0.25", "schedule.quantise=[0,0.1],[0,0.3]"]` → the values of each key, as written."""
    grid: dict[str, list[str]] = {}
    for word in words:
        key, given, text = word.partition("=")
        values = [value.strip() for value in split_values(text)]
        if not key or not given or not all(values):
            raise RecipeError(f"{word!r}: need key=value or key=a,b,c. try: rate=0.5,0.25")
        if key in grid:
            both = ",".join([*grid[key], text])
            raise RecipeError(
                f"{key!r} is given twice: need all its values in one place. try: {key}={both}"
            )
        grid[key] = list(dict.fromkeys(values))
    return grid


def parse_seeds(text: str) -> tuple[int, ...]:
    """`0,1,2`; empty for the recipe's own seed."""
    if not all(part.strip().isdigit() for part in text.split(",") if text):
        raise RecipeError(
            f"--seeds {text}: need whole numbers with commas between. try: --seeds 0,1,2"
        )
    return tuple(int(part) for part in text.split(",") if text)


def split_values(text: str) -> list[str]:
    """Splits at commas that stand in no brackets and no quotes."""
    parts, depth, quote = [""], 0, ""
    for letter in text:
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "\"'":
            quote = letter
        else:
            depth += (letter in "[{(") - (letter in ")}]")
            if letter == "," and depth == 0:
                parts.append("")
                continue
        parts[-1] += letter
    return parts


def plan(
    path: Path, grid: dict[str, list[str]], control: bool
) -> tuple[list[Job], list[dict[str, Any]]]:
    """The runs of a grid, baselines first, no recipe twice; and an entry for each point that is no
    valid recipe.

    Raises RecipeError where none is valid."""
    points: list[Job] = []
    refused: list[dict[str, Any]] = []
    first: SememeError | None = None
    for values in itertools.product(*grid.values()):
        words = dict(zip(grid, values, strict=True))
        try:
            recipe = load_recipe(path, [f"{key}={value}" for key, value in words.items()])
        except SememeError as error:
            changes = {
                key: value for key, value in words.items() if len(grid[key]) > 1 and key != "seed"
            }
            entry = _entry(_name("online", changes), changes) | {"fault": str(error)}
            refused += [entry] if entry not in refused else []
            first = first or error
            continue
        if recipe.pairs is not None:
            raise RecipeError(
                f"{path} trains on pairs of a source and a target, and a sweep measures running "
                "text: need "
                "system = online. try: sememe train and sememe evaluate, point by point"
            )
        points.append(_job(recipe, recipe.system, words, grid))
        if control and recipe.system == "online":
            points += [_job(recipe, system, words, grid) for system in BASELINES]
    if not points and first is not None:
        raise first
    unique: dict[str, Job] = {}
    for job in sorted(points, key=lambda job: [*BASELINES, "online"].index(job.recipe.system)):
        unique.setdefault(job.recipe.model_dump_json(), job)
    return list(unique.values()), refused


def _job(recipe: Recipe, system: str, words: dict[str, str], grid: dict[str, list[str]]) -> Job:
    """The point itself, or the baseline that belongs to it."""
    ignored: dict[str, Any] = {}
    if system != "online":
        recipe, ignored = baseline(recipe, system), NOT_READ[system]
    changes = {
        key: value
        for key, value in words.items()
        if len(grid[key]) > 1 and key not in ("seed", "system")
    }
    changes = {key: value for key, value in changes.items() if not _ignored(key, ignored)}
    return Job(
        _name(system, changes),
        recipe,
        changes,
        recipe.seed if len(grid.get("seed", ())) > 1 else None,
    )


def _ignored(key: str, ignored: dict[str, Any]) -> bool:
    top, _, sub = key.partition(".")
    held = ignored.get(top, ())
    return held is True or sub in held


def _name(system: str, changes: dict[str, str]) -> str:
    """A readable folder name: `rate-0.5_boundary-fixed`; a path is named by its last part."""
    plain = {
        key: re.sub(r"[^A-Za-z0-9.+-]+", "-", value.rsplit("/", 1)[-1]).strip("-")
        for key, value in changes.items()
    }
    parts = [f"{key}-{value[:40]}" for key, value in plain.items()]
    return "_".join([system, *parts] if system != "online" or not parts else parts)[:200]


def baseline(recipe: Recipe, system: str) -> Recipe:
    """The run without concepts beside `recipe`: the same base, batches and LoRA."""
    return check_recipe(
        recipe.model_dump(exclude=NOT_READ[system]) | {"system": system},
        f"the {system} of this point",
    )


def _run(
    job: Job, out: Path, data: str, tokens: int, say: Callable[[str], None], show: bool
) -> dict[str, Any]:
    """Trains and measures one point. Its entry in sweep.json, with the fault where there is one."""
    recipe = job.recipe
    folder = folder_for(recipe, job.folder_name, out)
    beside = None if recipe.system == "control" else held_run(baseline(recipe, "control"), out)
    if beside is not None and not (beside / "model" / "manifest.json").is_file():
        beside = None  # begun, and not finished
    entry = _entry(job.name, job.changes) | {
        "name": folder.name,
        "system": recipe.system,
        "boundary": recipe.boundary if recipe.system == "online" else None,
        "seed": recipe.seed,
        "trained_tokens": recipe.steps * recipe.batch_size * recipe.sequence_length,
        "control": beside.name if beside else None,
        "data": data,
    }
    try:
        train(recipe, folder, say, show)
        asked = {
            "data": data,
            "tokens_asked": tokens,
            "sequence_length": recipe.sequence_length,
            "target_rate": recipe.rate if recipe.system == "online" else None,
        } | ({"control": str(beside)} if beside else {})
        figures = kept(folder, "evaluate.json", **asked) or evaluate_files(
            str(folder), data, tokens, asked.get("control")
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


def _entry(point: str, changes: dict[str, str]) -> dict[str, Any]:
    empty = ("system", "boundary", "seed", "trained_tokens", "control", "data", "figures", "fault")
    return {"name": point, "point": point, "changes": changes} | dict.fromkeys(empty)


def folder_for(recipe: Recipe, name: str, out: Path) -> Path:
    """Where this very recipe was begun, whatever its name then; else a new folder, named as asked
    where that is free."""
    free = (out / (name if n == 1 else f"{name}-{n}") for n in itertools.count(1))
    return held_run(recipe, out) or next(
        p for p in free if not p.exists() or (p.is_dir() and not any(p.iterdir()))
    )


def held_run(recipe: Recipe, out: Path) -> Path | None:
    """The run of exactly this recipe under `out`, finished or not."""
    return next(
        (
            p.parent
            for p in sorted(out.glob("*/recipe.yaml"))
            if _read(p, p.stat().st_mtime_ns) == recipe
        ),
        None,
    )


@lru_cache(maxsize=1000)
def _read(path: Path, changed: int) -> Recipe | None:
    with suppress(SememeError, OSError, ValueError, yaml.YAMLError):
        return check_recipe(yaml.safe_load(path.read_text(encoding="utf-8")), str(path))
    return None


def summarise(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Runs that differ in their seed alone become one point: mean, and spread = sample standard
    deviation."""
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for run in runs:
        if run["figures"] is not None:
            groups.setdefault((run["system"], run["point"], *run["changes"].items()), []).append(
                run
            )
    points = []
    for members in groups.values():
        shared = {
            key: members[0][key] for key in ("system", "boundary", "changes", "trained_tokens")
        }
        points.append(
            {"name": members[0]["point"]}
            | shared
            | {
                "runs": [run["name"] for run in members],
                "mean": {},
                "spread": {},
            }
        )
        for key in members[0]["figures"]:
            values = [run["figures"][key] for run in members if run["figures"][key] is not None]
            points[-1]["mean"][key] = statistics.fmean(values) if values else None
            points[-1]["spread"][key] = statistics.stdev(values) if len(values) > 1 else None
    return points


def as_table(found: dict[str, Any]) -> tuple[list[tuple[str, ...]], str, tuple[str, ...]]:
    """(rows, title, columns): means, with the spread of what is compared where there are several
    seeds."""

    def cell(point: dict[str, Any], key: str, shape: str) -> str:
        mean, spread = point["mean"][key], point["spread"][key]
        beside = (
            f" ± {spread:.3f}" if spread is not None and key in ("nll", "delta_nll_control") else ""
        )
        return "–" if mean is None else f"{mean:{shape}}{beside}"

    rows = [
        (point["name"], *(cell(point, key, shape) for key, _, shape in SHOWN))
        for point in found["points"]
    ]
    several = any(len(point["runs"]) > 1 for point in found["points"])
    title = f"held-out text, {found['tokens']:,} tokens{'; mean ± standard deviation over seeds' if several else ''}"
    return rows, title, ("point", *(name for _, name, _ in SHOWN))


def check_faults(found: dict[str, Any]) -> None:
    """Raises SememeError where a run failed: how many, and what the first said."""
    failed = [run for run in found["runs"] if run["fault"]]
    if failed:
        count = f"{len(failed)} of {len(found['runs'])} runs failed"
        raise SememeError(f"{count}, the first is {failed[0]['name']}: {failed[0]['fault']}")


def _check_place(out: Path) -> None:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise RecipeError(
            "a sweep in several processes: need one, it trains run after run. try: sememe sweep "
            "without torchrun"
        )
    if (out / "recipe.yaml").is_file():
        raise RecipeError(f"{out} is a run: need a folder for several. try: --out {out}-sweep")
    try:
        found = json.loads((out / "sweep.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):  # not there, or cut off: it is written anew
        return
    if not isinstance(found, dict) or "runs" not in found:
        raise RecipeError(
            f"{out}/sweep.json is not of `sememe sweep`: need a folder without it. try: --out "
            f"{out}-runs"
        )


def _make(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        storage.check(out / "sweep.json")
    except OSError as error:
        raise RecipeError(
            f"{out} cannot be made ({error.strerror}): need a folder that can be written to. try: "
            "another --out"
        ) from error
