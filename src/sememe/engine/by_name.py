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
    """What the engine's model is: its system, the tokens that it has positions for, whether it has
    a chat template, and what of its own it has: rates, codes and split; types of concepts; layers
    that are left out, a window."""
    config = engine.model.config
    facts: dict[str, Any] = {"system": getattr(config, "system", None) or "base"}
    facts["context"] = engine.longest
    facts["chat"] = bool(getattr(engine.tokenizer, "chat_template", None))
    if getattr(config, "writes_concepts", False):
        facts |= {"rate": config.rate, "rates": [1 / (config.max_tail + 1), 1.0]}
        facts |= {"num_concepts": config.num_concepts}
        facts["codes_per_concept"] = getattr(config, "codes_per_concept", 1)
    own: dict[str, dict[str, Any]] = {
        "online": {"split": "split"},
        "planner": {"sizes": "plan_sizes", "budget": "plan_lengths", "source": "plan_max_source"},
        "compressor": {"beams": "beams"},
        "prune": {"left_out": "missing_layers"},
        "skip": {"left_out": "missing_layers"},
        "window": {"window": "window"},
    }
    facts |= {key: getattr(config, name) for key, name in own.get(facts["system"], {}).items()}
    if isinstance(engine.scheduler, CompressorWorks):
        facts["window"] = engine.scheduler.window
    return facts
