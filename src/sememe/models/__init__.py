"""One file a system. Importing this package registers them with transformers' Auto classes."""

from transformers import AutoConfig, AutoModelForCausalLM

from sememe.models.compressor import CompressorForCausalLM
from sememe.models.configuration import CompressorConfig, ControlConfig, OnlineConfig, PlannerConfig
from sememe.models.control import ControlForCausalLM
from sememe.models.online import OnlineForCausalLM
from sememe.models.planner import PlannerForCausalLM

MODELS = {
    "online": OnlineForCausalLM,
    "compressor": CompressorForCausalLM,
    "planner": PlannerForCausalLM,
    "control": ControlForCausalLM,
    "skip": ControlForCausalLM,
    "window": ControlForCausalLM,
    "prune": ControlForCausalLM,
}

for _model in (OnlineForCausalLM, CompressorForCausalLM, PlannerForCausalLM, ControlForCausalLM):
    AutoConfig.register(_model.config_class.model_type, _model.config_class, exist_ok=True)
    AutoModelForCausalLM.register(_model.config_class, _model, exist_ok=True)

__all__ = [
    "MODELS",
    "CompressorConfig",
    "CompressorForCausalLM",
    "ControlConfig",
    "ControlForCausalLM",
    "OnlineConfig",
    "OnlineForCausalLM",
    "PlannerConfig",
    "PlannerForCausalLM",
]
