"""One file a system. Importing this package registers them with transformers' Auto classes."""

from transformers import AutoConfig, AutoModelForCausalLM

from sememe.models.configuration import ControlConfig, OnlineConfig
from sememe.models.control import ControlForCausalLM
from sememe.models.online import OnlineForCausalLM

MODELS = {"online": OnlineForCausalLM, "control": ControlForCausalLM, "skip": ControlForCausalLM}

for _model in (OnlineForCausalLM, ControlForCausalLM):
    AutoConfig.register(_model.config_class.model_type, _model.config_class, exist_ok=True)
    AutoModelForCausalLM.register(_model.config_class, _model, exist_ok=True)

__all__ = ["MODELS", "ControlConfig", "ControlForCausalLM", "OnlineConfig", "OnlineForCausalLM"]
