"""Recipes: read from files and overrides, checked, and printed as
docs/options.md (python -m sememe.options > docs/options.md). The keys themselves: keys.py."""

import difflib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ValidationError

from sememe.errors import RecipeError, reason
from sememe.figures import markdown
from sememe.keys import GROUPS, Options, Recipe, known_keys, own_keys
from sememe.paths import shown, usable
from sememe.reading import FAULTS, read_yaml

INTRODUCTION = """# Options

Every key of a recipe. Printed by `python -m sememe.options > docs/options.md`.
A run keeps all of them in RUN/recipe.yaml; `key=value` on the command line overrides one.
"""


def load_recipe(path: Path | str, overrides: Sequence[str] = ()) -> Recipe:
    """Reads a recipe and applies dotted `key=value` overrides.

    `${…}` is no reference to anything, least of all to the environment of whoever runs it.

    Raises:
        RecipeError: file missing or not YAML, a reference, an unknown key, a value out of range.
    """
    path = usable(path)
    if not path.is_file():
        raise RecipeError(f"no recipe at {path}: need a YAML file. try: recipes/tiny-cpu.yaml")
    values = read_recipe(path)
    try:
        # Before OmegaConf sees it: a merge may resolve what it replaces.
        if "${" in f"{values} {overrides}":
            raise ValueError("it refers to something with ${…}")
        merged = OmegaConf.merge(values, OmegaConf.from_dotlist(list(overrides)))
        values = OmegaConf.to_container(merged, resolve=False)
    except (*FAULTS, OmegaConfBaseException, TypeError) as error:
        raise _unreadable(path, error) from error
    return check_recipe(values, str(path))


def read_recipe(path: Path) -> dict[str, Any]:
    """The plain values in the file of a recipe, of any release. Raises RecipeError."""
    try:
        return read_yaml(path)
    except FAULTS as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> RecipeError:
    return RecipeError(
        f"{path} cannot be read as a recipe ({reason(error)}): need a file of YAML key: value "
        "pairs. try: recipes/tiny-cpu.yaml"
    )


def check_recipe(values: Any, where: str) -> Recipe:
    """A Recipe from plain values; every fault becomes one sentence."""
    return checked(Recipe, values, f"{where}: ")


def checked(group: type[Options], values: Any, where: str = "") -> Any:
    """A group of options from plain values; every fault becomes one sentence."""
    try:
        return group.model_validate(values)
    except ValidationError as error:
        raise RecipeError(where + _sentence(**error.errors()[0])) from error


def _sentence(type: str, loc: tuple, msg: str, input: Any, **others: Any) -> str:
    """A fault that pydantic found: what was got, what is needed, what to try."""
    key = ".".join(map(str, loc))
    if type == "extra_forbidden":
        near = difflib.get_close_matches(key, known_keys(), 1, 0.4) or ["docs/options.md"]
        return f"unknown key {key!r}: need one of a recipe's keys. try: {near[0]}"
    if type == "missing":
        return f"key {key!r} is missing: need a value. try: {key}=…"
    value = f"{key} = {shown(repr(input))}: " if key else ""
    return value + msg.removeprefix("Value error, ") + ". try: another value, see docs/options.md"


def page() -> str:
    """docs/options.md."""
    text = INTRODUCTION
    for group, prefix in GROUPS.items():
        cells = []
        for name in own_keys(group):
            field = group.model_fields[name]
            default = "" if field.is_required() else f"`{json.dumps(field.default)}`"
            meaning = " ".join((field.description or "").split()).replace("|", "\\|")
            cells.append((f"`{prefix}{name}`", default, meaning))
        text += f"\n## {group.__doc__}\n\n" + markdown(["key", "default", "meaning"], cells)
    return text


if __name__ == "__main__":
    print(page(), end="")
