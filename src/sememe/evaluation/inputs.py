"""What a run was trained on, by content: its base and its texts may be elsewhere by now
(RUN/inputs.json). No text that it was trained on is measured on."""

import hashlib
import os
from pathlib import Path

from sememe.errors import DataError, SememeError, reason
from sememe.keys import Recipe
from sememe.options import read_recipe
from sememe.paths import content_file, existing, locate, source_sha256, usable
from sememe.report.files import read_json
from sememe.storage import MANIFEST, check_manifest

INPUTS = "inputs.json"
TEXTS = ("train", "heldout")
BASE_FILES = {
    "base_config": ("config.json",),
    "tokenizer": ("tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "*.model"),
}
"""Of a base, beside its weights: what a model is made of, and what texts become."""


def record(run: Path, base: Path, base_sha256: str, recipe: Recipe) -> dict:
    """What inputs.json holds of a recipe's base, a folder with weights of that hash, and texts."""
    return {
        "run": os.path.abspath(run),
        "folder": os.getcwd(),
        "base_sha256": base_sha256,
        **{name: _files_sha256(base, patterns) for name, patterns in BASE_FILES.items()},
        **{name: content(getattr(recipe.data, name)) for name in TEXTS},
    }


def _files_sha256(folder: Path, patterns: tuple[str, ...]) -> str:
    """Of the names and bytes of all files of these patterns."""
    digest = hashlib.sha256()
    for path in sorted({path for pattern in patterns for path in folder.glob(pattern)}):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def recorded(run: Path) -> dict:
    """RUN/inputs.json; empty where there is none, as in runs of earlier versions."""
    return read_json(run / INPUTS)


def content(source: str | list[str] | dict[str, float]) -> dict:
    """What tells a text, or several with their weights, from others; `sources`: the hashes of all
    that it is made of."""
    if isinstance(source, list):
        source = dict.fromkeys(source, 1.0)
    if not isinstance(source, str):
        parts = {name: content(name) for name in source}
        weights = [(part["sha256"], source[name]) for name, part in parts.items()]
        return {
            "bytes": {name: part["bytes"] for name, part in parts.items()},
            "sha256": hashlib.sha256(repr(weights).encode()).hexdigest(),
            "sources": [sha256 for part in parts.values() for sha256 in hashes(part)],
        }
    about = {"bytes": _size(source), "sha256": source_sha256(source)}
    path = locate(source)[0]
    if path is None or not path.is_dir() or not content_file(path):
        return about
    return about | {"sources": [*read_json(path / MANIFEST).get("sources", {}).values()]}


def hashes(text: dict) -> list[str]:
    """Of a text's `content`: its own, and those of what it is made of."""
    return [text["sha256"], *text.get("sources", ())]


def _size(source: str) -> int | None:
    """Bytes of a text's file; None for a datasets id."""
    file = content_file(locate(source)[0])
    return file and file.stat().st_size


def run_recipe(model: str | Path) -> dict:
    """The recipe of a run folder as plain values, its texts where they are now; empty for anything
    else. Raises SememeError where it cannot be read."""
    folder = existing(model)
    if folder is None or not (folder / "recipe.yaml").is_file():
        return {}
    check_manifest(folder, required=False)
    try:
        recipe = read_recipe(folder / "recipe.yaml")
        return recipe | {"data": located(folder, recipe["data"])}
    except (ValueError, TypeError, LookupError) as error:
        raise SememeError(
            f"{folder}/recipe.yaml cannot be read ({reason(error)}): need the recipe of a run. "
            "try: another run"
        ) from error


def located(run: Path, data: dict) -> dict:
    """A recipe's `data` with each text where it is now: as it was typed, else where it was when the
    run was trained, else where it would be had it moved together with the run. A file of another
    size is another project's text of the same name. As typed where it is nowhere."""
    inputs = recorded(run)

    def moved(source: str, size: int | None) -> str:
        before = os.path.join(inputs["folder"], os.path.expanduser(source))
        beside = os.path.join(os.path.abspath(run), os.path.relpath(before, inputs["run"]))
        there = (x for x in (source, before, os.path.normpath(beside)) if _size(x) == size)
        return next(there, source)

    new = {}
    for name in TEXTS if inputs else ():
        source, sizes = data[name], inputs[name]["bytes"]
        if isinstance(source, str):
            new[name] = moved(source, sizes)
        elif isinstance(sizes, dict):
            now = [moved(text, sizes.get(text)) for text in source]
            weighted = isinstance(source, dict)
            new[name] = dict(zip(now, source.values(), strict=True)) if weighted else now
    return data | new


def refuse_trained(model: str | Path, data: str) -> None:
    """Raises DataError where a text is the one that the run was trained on, whatever its name. The
    run keeps what its text was; one of an earlier version is compared with what is at its path
    now."""
    recipe = run_recipe(model)
    if not recipe:
        return
    trained = recorded(usable(model)).get("train") or content(recipe["data"]["train"])
    if {*hashes(content(data))}.intersection(hashes(trained)):
        raise DataError(
            f"{data} is what {model} was trained on: need held-out text. try: "
            f"{recipe['data']['heldout']}"
        )
