"""Figures as JSON: which they are, how they are put beside a run, and whether those kept there
still hold.

Imports nothing large: `tables` writes with it before torch is there."""

import json
import sys
from pathlib import Path
from typing import Any

import yaml

from sememe import storage
from sememe.errors import SememeError
from sememe.evaluation.inputs import located
from sememe.paths import existing, usable

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


def put(path: Path, value: Any) -> None:
    """A JSON file, whole or not at all; a path that cannot be written is a user fault."""
    text = json.dumps(value, indent=1, ensure_ascii=False) + "\n"
    try:
        storage.write(
            path, text.encode("utf-8", "backslashreplace")
        )  # half a surrogate pair becomes \udXXX, as JSON has it
    except OSError as error:
        raise storage.unwritable(path, error) from error


def run_recipe(model: str | Path) -> dict[str, Any]:
    """The recipe of a run folder as plain values, its texts where they are now; empty for anything
    else.

    Raises SememeError where it cannot be read."""
    folder = existing(model)
    if folder is None or not (folder / "recipe.yaml").is_file():
        return {}
    path = folder / "recipe.yaml"
    try:
        recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
        return recipe | {"data": located(folder, recipe["data"])}
    except (OSError, ValueError, TypeError, KeyError, yaml.YAMLError) as error:
        said = str(error).splitlines()[0]
        raise SememeError(
            f"{path} cannot be read ({said}): need the recipe of a run. try: another run folder"
        ) from error


def keep(model: str | Path, name: str, value: dict[str, Any]) -> None:
    """Puts the figures beside the run, where `model` is one. That a run may only be read is a
    remark on stderr: they are also printed."""
    if run_recipe(model):
        try:
            put(usable(model) / name, value)
        except SememeError as error:
            print(f"not kept beside the run: {error}", file=sys.stderr)


def kept(run: str | Path, name: str, **same: Any) -> dict[str, Any] | None:
    """RUN/`name` where it is of the finished model (not older than its weights) and was measured in
    the same way."""
    path, weights = Path(run) / name, Path(run) / "model" / "model.safetensors"
    if (
        not path.is_file()
        or not weights.is_file()
        or path.stat().st_mtime < weights.stat().st_mtime
    ):
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return None
    return found if _holds(found, same) else None


def _holds(found: Any, same: Any) -> bool:
    """Whether they are equal; a dict may hold more than is asked for."""
    if isinstance(same, dict):
        return isinstance(found, dict) and all(
            _holds(found.get(key), value) for key, value in same.items()
        )
    return found == same
