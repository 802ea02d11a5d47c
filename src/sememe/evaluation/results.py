"""Files of figures beside a run: written whole or not at all, and read again where they still hold.

Imports nothing large: tables on the terminal are written with it before torch is there."""

import contextlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from sememe import storage
from sememe.errors import SememeError
from sememe.evaluation.inputs import run_recipe
from sememe.paths import usable
from sememe.reading import FAULTS, read_object

Figures = dict[str, Any]
"""A JSON object of figures."""

CONTRACT = (
    "tokens",
    "nll",
    "bits_per_byte",
    "concept_rate",
    "compression_ratio",
    "layer_share",
    "cache_share",
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


def of_rounds(values: Sequence[float]) -> Figures:
    """A figure of several rounds."""
    low, high = min(values), max(values)
    return {"median": median(values), "min": low, "max": high, "rounds": [*values]}


def put(path: Path, value: Any) -> None:
    """Writes a JSON file. A path that cannot be written is a SememeError."""
    text = json.dumps(value, indent=1, ensure_ascii=False) + "\n"
    try:
        # Half a surrogate pair becomes \udXXX, as JSON has it.
        storage.write(path, text.encode("utf-8", "backslashreplace"))
    except OSError as error:
        raise storage.unwritable(path, error) from error


def keep(model: str | Path, command: str, figures: Figures) -> None:
    """Puts figures beside the run, where `model` is one, as RUN/COMMAND.json. That a run may only
    be read is a remark on stderr: the figures are printed as well."""
    if not run_recipe(model):
        return
    try:
        put(usable(model) / f"{command}.json", figures)
    except SememeError as error:
        print(f"not kept beside the run: {error}", file=sys.stderr)


def reusable(run: str | Path, name: str, **same: Any) -> Figures | None:
    """RUN/`name` where it is of the finished model (not older than its weights) and was measured in
    the same way."""
    path, weights = Path(run, name), Path(run, "model", storage.WEIGHTS)
    with contextlib.suppress(*FAULTS, SememeError):
        figures = read_object(path)
        if path.stat().st_mtime >= weights.stat().st_mtime and same.items() <= figures.items():
            return figures
    return None
