"""An engine of a model by name, and what can be said of it."""

from typing import Any

from sememe.engine.coding import CompressorWorks
from sememe.engine.loop import Engine
from sememe.models.loading import load_model


def open_engine(name: str, **options: Any) -> Engine:
    """An engine of that model. `options`: those of `Engine`.

    Raises:
        CheckpointError: not a model.
        BaseError: neither a folder nor a base that can be had."""
    return Engine(*load_model(name), **options)


def describe(engine: Engine) -> dict[str, Any]:
    """What the engine's model is: its system, the tokens that it has positions for, and what of its
    own it has: rates, codes and split; types of concepts; layers that are left out, a window."""
    config, scheduler = engine.model.config, engine.scheduler
    facts: dict[str, Any] = {"system": getattr(config, "system", None) or "base"}
    facts["context"] = engine.longest
    if getattr(config, "writes_concepts", False):
        facts |= {"rate": config.rate, "rates": [1 / (config.max_tail + 1), 1.0]}
        facts |= {"num_concepts": config.num_concepts}
        facts["codes_per_concept"] = getattr(config, "codes_per_concept", 1)
    if facts["system"] == "online":
        facts["split"] = list(config.split)
    elif isinstance(scheduler, CompressorWorks):
        facts |= {"window": scheduler.window, "beams": config.beams}
    elif facts["system"] == "planner":
        facts |= {"sizes": list(config.plan_sizes), "lengths": list(config.plan_lengths)}
        facts |= {"budget": list(engine.model.dial.budget), "source": config.plan_max_source}
    elif facts["system"] in ("prune", "skip"):
        facts["left_out"] = sorted(config.missing_layers)
    elif facts["system"] == "window":
        facts["window"] = config.window
    return facts
