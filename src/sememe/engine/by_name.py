"""An engine of a model by name, and what can be said of it."""

from typing import Any

from sememe.engine.loop import Engine
from sememe.errors import CheckpointError
from sememe.models.loading import load_model, model_folder, read_config, resolve

SYSTEMS_SERVED = (None, "online", "control")
"""None: a plain base. Layers that are left out, and windows, are not in the engine's rows."""


def open_engine(name: str, **options: Any) -> Engine:
    """An engine of that model. `options`: those of `Engine`.

    Raises:
        CheckpointError: another system than these, or not a model.
        BaseError: neither a folder nor a base that can be had."""
    config = read_config(model_folder(name) or resolve(name))
    system = getattr(config, "system", None)
    if system not in SYSTEMS_SERVED:
        raise CheckpointError(
            f"{name} is a {system}: need a model that goes on from a text, of system online or "
            "control, or a base. try: sememe serve smollm2-135m-online"
        )
    return Engine(*load_model(name), **options)


def describe(engine: Engine) -> dict[str, Any]:
    """What the engine's model is: its system, whether it has a chat template, and of one with
    concepts its rates, its split and its codes."""
    config = engine.model.config
    facts: dict[str, Any] = {"system": getattr(config, "system", None) or "base"}
    facts["context"] = engine.longest
    facts["chat"] = bool(getattr(engine.tokenizer, "chat_template", None))
    if getattr(config, "writes_concepts", False):
        facts |= {"rate": config.rate, "rates": [1 / (config.max_tail + 1), 1.0]}
        facts |= {"split": list(config.split), "num_concepts": config.num_concepts}
        facts["codes_per_concept"] = getattr(config, "codes_per_concept", 1)
    return facts
