"""Recipes: read from files and overrides, checked, and printed as
docs/options.md (python -m sememe.options > docs/options.md). The keys themselves: keys.py."""

import difflib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ValidationError

from sememe.errors import RecipeError, reason
from sememe.keys import (
    CompressorOptions,
    Concepts,
    Data,
    Em,
    Lora,
    OnlineOptions,
    Options,
    Plan,
    Recipe,
    Task,
)
from sememe.paths import usable

GROUPS: tuple[tuple[str, type[Options]], ...] = (
    ("", Task),
    ("data.", Data),
    ("", Concepts),
    ("", OnlineOptions),
    ("", CompressorOptions),
    ("", Recipe),
    ("lora.", Lora),
    ("plan.", Plan),
    ("em.", Em),
)
"""(Prefix, options) of each section of docs/options.md."""


def load_recipe(path: Path | str, overrides: Sequence[str] = ()) -> Recipe:
    """Reads a recipe and applies dotted `key=value` overrides.

    Raises:
        RecipeError: file missing or not YAML, an unknown key, a value out of range.
    """
    path = usable(path)
    try:
        merged = OmegaConf.merge(OmegaConf.load(path), OmegaConf.from_dotlist(list(overrides)))
        values = OmegaConf.to_container(merged, resolve=True)
    except FileNotFoundError as error:
        raise RecipeError(
            f"no recipe at {path}: need a YAML file. try: recipes/tiny-cpu.yaml"
        ) from error
    except (yaml.YAMLError, OmegaConfBaseException, OSError, ValueError, TypeError) as error:
        raise RecipeError(
            f"{path} cannot be read as a recipe ({reason(error)}): need YAML key: value pairs. "
            "try: recipes/"
        ) from error
    return check_recipe(values, str(path))


def check_recipe(values: Any, where: str) -> Recipe:
    """A Recipe from plain values; every fault becomes one sentence."""
    return checked(Recipe, values, f"{where}: ")


def checked(group: type[Options], values: Any, where: str = "") -> Any:
    """A group of options from plain values; every fault becomes one sentence."""
    try:
        return group.model_validate(values)
    except ValidationError as error:
        raise RecipeError(where + _sentence(error)) from error


def _sentence(error: ValidationError) -> str:
    """The first of the faults: what was got, what is needed, what to try."""
    fault = error.errors()[0]
    key = ".".join(str(part) for part in fault["loc"])
    if fault["type"] == "extra_forbidden":
        near = difflib.get_close_matches(key, known_keys(), 1, 0.4)
        hint = "".join(near) or "docs/options.md"
        return f"unknown key {key!r}: need one of a recipe's keys. try: {hint}"
    if fault["type"] == "missing":
        return f"key {key!r} is missing: need a value. try: {key}=…"
    value = f"{key} = {fault['input']!r}: " if key else ""
    message = fault["msg"].removeprefix("Value error, ")
    return f"{value}{message}. try: another value, see docs/options.md"


def known_keys() -> list[str]:
    """All dotted keys of a recipe."""
    return [prefix + name for prefix, group in GROUPS for name in _own(group)]


def _own(group: type[Options]) -> list[str]:
    """The keys that are defined in this group, and that are no group themselves."""
    return [name for name in group.__annotations__ if f"{name}." not in dict(GROUPS)]


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts → dotted keys."""
    dotted: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            dotted |= flat(value, f"{prefix}{key}.")
        else:
            dotted[prefix + key] = value
    return dotted


def page() -> str:
    """docs/options.md."""
    lines = [
        "# Options",
        "",
        "Every key of a recipe. Printed by `python -m sememe.options > docs/options.md`.",
        "A run keeps all of them in RUN/recipe.yaml; `key=value` on the command line overrides "
        "one.",
    ]
    for prefix, group in GROUPS:
        lines += ["", f"## {group.__doc__}", "", "| key | default | meaning |", "|---|---|---|"]
        for name in _own(group):
            field = group.model_fields[name]
            default = "" if field.is_required() else f"`{json.dumps(field.default)}`"
            meaning = " ".join((field.description or "").split()).replace("|", "\\|")
            lines.append(f"| `{prefix}{name}` | {default} | {meaning} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(page())
