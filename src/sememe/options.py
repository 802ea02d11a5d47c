"""Recipes: read from files and overrides, checked, brought up to date, and printed as
docs/options.md (python -m sememe.options > docs/options.md). The keys themselves: keys.py."""

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ValidationError

from sememe.errors import RecipeError
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
    if not path.is_file():
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.yaml")], 1)
        hint = str(path.parent / near[0]) if near else "recipes/tiny-cpu.yaml"
        raise RecipeError(f"no recipe at {path}: need a YAML file. try: {hint}")
    if bad := [word for word in overrides if "=" not in word or word.startswith("=")]:
        raise RecipeError(f"override {bad[0]!r}: need key=value. try: rate=0.5")
    try:
        merged = OmegaConf.merge(OmegaConf.load(path), OmegaConf.from_dotlist(list(overrides)))
        values = OmegaConf.to_container(merged, resolve=True)
    except (yaml.YAMLError, OmegaConfBaseException, OSError, ValueError, TypeError) as error:
        first = str(error).splitlines()[0]
        raise RecipeError(
            f"{path} cannot be read as a recipe ({first}): need YAML key: value pairs. try: "
            "recipes/"
        ) from error
    return check_recipe(values, str(path))


def read_recipe(path: Path) -> Recipe:
    """The recipe that a run was begun with. Raises RecipeError where it cannot be read."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise RecipeError(
            f"{path} cannot be read ({str(error).splitlines()[0]}): need the recipe of a run. "
            "try: another --out"
        ) from error
    return check_recipe(values, str(path))


def check_recipe(values: Any, where: str) -> Recipe:
    """A Recipe from plain values; every fault becomes one sentence."""
    if not isinstance(values, dict):
        raise RecipeError(
            f"{where} holds no key: value pairs: need a recipe. try: recipes/tiny-cpu.yaml"
        )
    return checked(Recipe, upgraded(values, where), f"{where}: ")


def checked(group: type[Options], values: dict[str, Any], where: str = "") -> Any:
    """A group of options from plain values; every fault becomes one sentence."""
    try:
        return group.model_validate(values)
    except ValidationError as error:
        raise RecipeError(where + _sentence(error)) from error


def _sentence(error: ValidationError) -> str:
    fault = error.errors()[0]
    key = ".".join(str(part) for part in fault["loc"])
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    if fault["type"] == "extra_forbidden":
        near = difflib.get_close_matches(key, known_keys(), 1, 0.4)
        hint = near[0] if near else "docs/options.md"
        return f"unknown key {key!r}: need one of a recipe's keys. try: {hint}{more}"
    if fault["type"] == "missing":
        return f"key {key!r} is missing: need a value. try: {key}=…{more}"
    message = fault["msg"].removeprefix("Value error, ")
    if key:
        value = "" if isinstance(fault["input"], dict) else f" = {fault['input']!r}"
        return f"{key}{value}: {message}. try: another value for {key}{more}"
    return f"{message}. try: another value{more}"


def known_keys() -> list[str]:
    """All dotted keys of a recipe."""
    return [prefix + name for prefix, group in GROUPS for name in _own(group)]


def _own(group: type[Options]) -> list[str]:
    """The keys that are defined in this group, and that are no group themselves."""
    nested = {prefix.removesuffix(".") for prefix, _ in GROUPS}
    return [name for name in group.model_fields if name in group.__annotations__.keys() - nested]


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts → dotted keys."""
    dotted: dict[str, Any] = {}
    for key, value in values.items():
        inner = isinstance(value, dict) and value
        dotted |= flat(value, f"{prefix}{key}.") if inner else {prefix + str(key): value}
    return dotted


def nested(dotted: dict[str, Any]) -> dict[str, Any]:
    """Dotted keys → nested dicts."""
    values: dict[str, Any] = {}
    for key, value in dotted.items():
        *outer, last = key.split(".")
        inner = values
        for name in outer:
            inner = inner.setdefault(name, {})
        inner[last] = value
    return values


ANY = object()
REMOVED = {
    "estimator": "soft",
    "commitment_weight": 0,
    "usage_weight": 0,
    "shared_map": False,
    "revive_every": 0,
    "overlap": False,
    "gate_noise": 0,
    "schedule.rate": [0, 0],
    "schedule.lora": [0, 0],
    "em.adaptive": False,
    "log_every": ANY,
}
"""Keys of earlier releases → the value at which they did nothing."""
RENAMED = {
    "data.opening": "data.source_share",
    "em.price": "em.planner_weight",
    "schedule.quantise": "quantise",
}
JOINED = {
    "data.fields": {"data.source": None, "data.target": None},
    "split": {"split.shallow": None, "split.middle": None, "split.deep": None},
    "em.stages": {"em.warmup": 0.1, "em.distil": 0.1},
    "curriculum": {"curriculum.start": 0, "curriculum.until": 0.5},
}
"""Key → the keys of earlier releases that it takes the place of, with their defaults."""


def upgraded(values: dict[str, Any], where: str) -> dict[str, Any]:
    """Values of a recipe of an earlier release as this one writes them. Raises RecipeError where a
    key is no more, and did something."""
    dotted = flat(values)
    for key, neutral in REMOVED.items():
        value = dotted.pop(key, ANY)
        if value not in (ANY, neutral) and neutral is not ANY:
            raise RecipeError(
                f"{where}: {key} = {value!r}, and the option is no more: need {neutral!r}, or the "
                "key left out. try: an earlier release of sememe"
            )
    for old, new in RENAMED.items():
        if old in dotted:
            dotted[new] = dotted.pop(old)
    for new, old in JOINED.items():
        if any(key in dotted for key in old):
            dotted[new] = [dotted.pop(key, default) for key, default in old.items()]
            if new == "em.stages":
                dotted[new][1] += dotted[new][0]
            elif not any(dotted[new]) or (new == "curriculum" and not dotted[new][0]):
                dotted[new] = None
    for key in ("schedule", "split", "curriculum"):  # as an empty group
        if dotted.get(key) == {}:
            del dotted[key]
    return nested(dotted)


def page() -> str:
    """docs/options.md."""
    lines = [
        "# Options",
        "",
        "Every key of a recipe. Printed by `python -m sememe.options > docs/options.md`.",
        "A run keeps all of them in RUN/recipe.yaml; `key=value` on the command line overrides one.",
    ]
    for prefix, group in GROUPS:
        lines += ["", f"## {group.__doc__}", "", "| key | default | meaning |", "|---|---|---|"]
        for name in _own(group):
            field = group.model_fields[name]
            default = "" if field.is_required() else f"`{_yaml(field.default)}`"
            meaning = " ".join((field.description or "").split()).replace("|", "\\|")
            lines.append(f"| `{prefix}{name}` | {default} | {meaning} |")
    return "\n".join(lines)


def _yaml(value: Any) -> str:
    plain = list(value) if isinstance(value, tuple) else value
    return yaml.safe_dump(plain, default_flow_style=True).split("\n")[0]


if __name__ == "__main__":
    print(page())
