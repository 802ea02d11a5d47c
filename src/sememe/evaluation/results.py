"""Files of figures beside a run: written whole or not at all, and read again where they still hold.

Imports nothing large: tables on the terminal are written with it before torch is there."""

import contextlib
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sememe import storage
from sememe.errors import SememeError
from sememe.evaluation.inputs import run_recipe
from sememe.paths import usable
from sememe.progress import bar

Figures = dict[str, Any]
"""A JSON object of figures."""

CONTRACT = (
    "tokens",
    "nll",
    "bits_per_byte",
    "concept_rate",
    "compression_ratio",
    "layer_share",
    "nll_at_concepts",
    "nll_in_tail",
    "longest_tail",
    "delta_nll_control",
    "delta_nll_zero",
    "delta_nll_shuffle",
    "delta_nll_random",
    "code_perplexity",
    "codes_used",
    "largest_code_share",
)
"""Keys that every evaluation has; null where a model has no such figure."""


def put(path: Path, value: Any) -> None:
    """Writes a JSON file. A path that cannot be written is a SememeError."""
    text = json.dumps(value, indent=1, ensure_ascii=False) + "\n"
    try:
        # Half a surrogate pair becomes \udXXX, as JSON has it.
        storage.write(path, text.encode("utf-8", "backslashreplace"))
    except OSError as error:
        raise storage.unwritable(path, error) from error


def keep(model: str | Path, command: str, figures: Figures) -> None:
    """Puts figures beside the run, where `model` is one, as RUN/COMMAND.json; nothing is left of
    the way there. That a run may only be read is a remark on stderr: the figures are printed as
    well."""
    if not run_recipe(model):
        return
    run = usable(model)
    try:
        put(run / f"{command}.json", figures)
        for path in run.glob(f"{command}-*.partial.jsonl"):
            path.unlink()
    except (SememeError, OSError) as error:
        print(f"not kept beside the run: {error}", file=sys.stderr)


def reusable(run: str | Path, name: str, **same: Any) -> Figures | None:
    """RUN/`name` where it is of the finished model (not older than its weights) and was measured in
    the same way."""
    path, weights = Path(run) / name, Path(run) / "model" / "model.safetensors"
    with contextlib.suppress(OSError, ValueError):
        figures = json.loads(path.read_text(encoding="utf-8"))
        if path.stat().st_mtime >= weights.stat().st_mtime and same.items() <= figures.items():
            return figures
    return None


def go_on(path: Path | None, jobs: Sequence[Callable[[], Any]]) -> list[Any]:
    """What each job returns, a JSON value: a line of the file as soon as it is known, so that the
    same jobs go on after a stop. Without a `path`, or where it cannot be written, nothing is
    kept."""
    values: list[Any] = []
    is_there = path is not None and path.is_file()
    for line in path.read_text(encoding="utf-8").splitlines() if is_there else ():
        with contextlib.suppress(ValueError):  # a line that a crash cut off
            values.append(json.loads(line))
    for job in bar(iterable=jobs[len(values) :], desc="evaluate", unit="batch"):
        values.append(job())
        if path is not None:
            with contextlib.suppress(OSError), path.open("a", encoding="utf-8") as file:
                # The line before may have been cut off: the line end comes first.
                file.write("\n" + json.dumps(values[-1]))
    return values
