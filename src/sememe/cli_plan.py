"""The command `sememe plan`."""

from collections.abc import Iterator
from typing import Any

from sememe import arguments
from sememe.terminal import show_figures

OPTIONS = {
    "recipe": (arguments.Recipe, ...),
    "overrides": (arguments.Overrides, None),
    "gpus": (arguments.Gpus, 1),
    "gpu": (arguments.Gpu, "h100"),
    "tokens": (arguments.PlannedTokens, 1e9),
    "hourly": (arguments.Hourly, None),
    "context": (arguments.Context, 4096),
}


def plan(recipe: arguments.Recipe, **options: Any) -> Iterator[dict[str, Any]]:
    """What training a recipe and serving its model would take elsewhere: memory, work, time and
    cost, by the operations of a step that is recorded without being computed. Of the base its
    config.json is enough.

    Example: `sememe plan recipes/qwen3-0.6b-online.yaml --gpu h100 --tokens 1e9`

    On this machine, by a second of measuring it: `sememe plan recipes/demo.yaml --gpu cpu`"""
    from sememe.options import load_recipe
    from sememe.scaling.estimate import estimate

    loaded = load_recipe(recipe, options.pop("overrides") or [])
    result = estimate(loaded, **options)
    yield result
    show_figures(result, str(recipe))


arguments.expand(plan, OPTIONS)
