"""Figures as JSON: which they are, how they are put beside a run, and whether those kept there still hold.

Imports nothing large: `tables` writes with it before torch is there.
"""

import json
import os
from pathlib import Path
from typing import Any

import yaml

from sememe.errors import SememeError
from sememe.paths import existing, usable

CONTRACT = (
    "tokens", "nll", "bits_per_byte", "concept_rate", "compression_ratio", "layer_share", "nll_at_concepts", "nll_in_tail",
    "longest_tail", "delta_nll_control", "delta_nll_zero", "delta_nll_shuffle", "delta_nll_random", "code_perplexity",
    "codes_used", "largest_code_share",
)


def put(path: Path, value: Any) -> None:
    """A JSON file, whole or not at all; a path that cannot be written is a user fault."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        raise SememeError(
            f"could not write {path} ({error.strerror}): need free space in a folder that can be written to. try: another folder"
        ) from error


def run_recipe(model: str | Path) -> dict[str, Any]:
    """The recipe of a run folder as plain values; empty for anything else."""
    folder = existing(model)
    path = None if folder is None else folder / "recipe.yaml"
    return yaml.safe_load(path.read_text()) if path is not None and path.is_file() else {}


def keep(model: str | Path, name: str, value: dict[str, Any]) -> None:
    """Puts the figures beside the run, where `model` is one."""
    if run_recipe(model):
        put(usable(model) / name, value)


def kept(run: str | Path, name: str, **same: Any) -> dict[str, Any] | None:
    """RUN/`name` where it is of the finished model (not older than its weights) and was measured in the same way."""
    path, weights = Path(run) / name, Path(run) / "model" / "model.safetensors"
    if not path.is_file() or not weights.is_file() or path.stat().st_mtime < weights.stat().st_mtime:
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return None
    return found if _holds(found, same) else None


def _holds(found: Any, same: Any) -> bool:
    """Whether they are equal; a dict may hold more than is asked for."""
    if isinstance(same, dict):
        return isinstance(found, dict) and all(_holds(found.get(key), value) for key, value in same.items())
    return found == same
