"""What a run was trained on, by content: its base and its texts may be elsewhere by now
(RUN/inputs.json)."""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from sememe.paths import locate, source_sha256

INPUTS = "inputs.json"
TEXTS = ("train", "heldout")


def record(run: Path, base_sha256: str, texts: dict[str, str]) -> dict[str, Any]:
    """What inputs.json holds of `texts`, named as in a recipe's `data`."""
    return {
        "run": os.path.abspath(run),
        "folder": os.getcwd(),
        "base_sha256": base_sha256,
        **{name: content(texts[name]) for name in TEXTS},
    }


def recorded(run: Path) -> dict[str, Any]:
    """RUN/inputs.json; empty where there is none, as in runs of earlier versions."""
    try:
        found = json.loads((run / INPUTS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def content(source: str) -> dict[str, Any]:
    """What tells a text from others: its sha256, and the size of its file, None for a datasets
    id."""
    path = locate(source)[0]
    return {"bytes": None if path is None else path.stat().st_size, "sha256": source_sha256(source)}


def located(run: Path, data: dict[str, Any]) -> dict[str, Any]:
    """A recipe's `data`, each text as it was typed where that leads to it from the current folder.
    Otherwise it is looked for where it was when the run was trained, and where it would be had it
    moved together with the run; as typed where it is nowhere."""
    found = recorded(run)
    if not found:
        return data
    moved = {}
    for name in TEXTS:
        there = os.path.join(found["folder"], os.path.expanduser(data[name]))
        together = os.path.normpath(
            os.path.join(os.path.abspath(run), os.path.relpath(there, found["run"]))
        )
        moved[name] = _first([data[name], there, together], found.get(name)) or data[name]
    return data | moved


def _first(sources: Iterable[str], wanted: dict[str, Any] | None) -> str | None:
    """The first that is a file, of the recorded size: another project may have a text of the same
    name."""
    for source in sources:
        path = locate(source)[0]
        if (
            path is not None
            and path.is_file()
            and (wanted is None or path.stat().st_size == wanted["bytes"])
        ):
            return source
    return None
