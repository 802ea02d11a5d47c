"""What a run was trained on, by content: its base and its texts may be elsewhere by now (RUN/inputs.json)."""

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

INPUTS = "inputs.json"
TEXTS = ("train", "heldout")


def record(run: Path, base_sha256: str, texts: dict[str, str]) -> dict[str, Any]:
    """What inputs.json holds of `texts`, named as in a recipe's `data`."""
    return {"run": os.path.abspath(run), "folder": os.getcwd(), "base_sha256": base_sha256,
            **{name: content(texts[name]) for name in TEXTS}}


def recorded(run: Path) -> dict[str, Any]:
    """RUN/inputs.json; empty where there is none, as in runs of earlier versions."""
    try:
        found = json.loads((run / INPUTS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def content(source: str) -> dict[str, Any] | None:
    """Size and sha256 of the file of a text, and the field of it that is read; None for what is no file here."""
    found = _file(source)
    if found is None:
        return None
    path, field = found
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest, "field": field}


def located(run: Path, data: dict[str, Any]) -> dict[str, Any]:
    """A recipe's `data`, each text as it was typed where that leads to it from the current folder. Otherwise it is looked for
    where it was when the run was trained, and where it would be had it moved together with the run; as typed where it is nowhere.
    """
    found = recorded(run)
    if not found:
        return data
    moved = {}
    for name in TEXTS:
        there = os.path.join(found["folder"], os.path.expanduser(data[name]))
        together = os.path.normpath(os.path.join(os.path.abspath(run), os.path.relpath(there, found["run"])))
        moved[name] = _first([data[name], there, together], found.get(name)) or data[name]
    return data | moved


def _first(sources: Iterable[str], wanted: dict[str, Any] | None) -> str | None:
    """The first that is a file, of the recorded size: another project may have a text of the same name."""
    for source in sources:
        found = _file(source)
        if found is not None and (wanted is None or found[0].stat().st_size == wanted["bytes"]):
            return source
    return None


def _file(source: str) -> tuple[Path, str] | None:
    """The file of `FILE` or `FILE#field`, and the field; None where there is none, as of a datasets id."""
    name, _, field = source.rpartition("#")
    for path, read in ((source, "text"), (name, field)):
        if path and os.path.isfile(os.path.expanduser(path)):
            return Path(os.path.expanduser(path)), read
    return None
