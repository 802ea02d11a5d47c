"""LoRA on the attention and MLP linears of the decoder layers, through peft."""

import contextlib
import warnings

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn


def add_lora(base: nn.Module, config, name: str = "default", last: int | None = None) -> None:
    """Puts an adapter `name` into the layers of `base` before `last`, in place, as the `lora_` keys
    of a configuration say: on all their linears (q_proj, …, down_proj; fused ones where a family
    has them). Adapters are trainable, everything else is frozen."""
    if config.lora_rank:
        layers = base.get_decoder().layers
        linears = {
            path.removesuffix(".base_layer").rsplit(".", 1)[-1]
            for path, module in layers.named_modules()
            if isinstance(module, nn.Linear) and "lora_" not in path
        }
        numbers = "|".join(map(str, range(len(layers))[config.lora_first : last]))
        lora = LoraConfig(
            r=config.lora_rank,
            lora_alpha=config.lora_alpha,
            lora_dropout=config.lora_dropout,
            target_modules=rf".*\.layers\.({numbers})\..*\.({'|'.join(sorted(linears))})",
        )
        with warnings.catch_warnings():  # a second adapter is what is wanted
            warnings.filterwarnings("ignore", "Already found a `peft_config`")
            inject_adapter_in_model(lora, base, adapter_name=name)
    for key, p in base.named_parameters():  # peft leaves gradients to the adapter that came last
        p.requires_grad_("lora_" in key)


@contextlib.contextmanager
def adapter(base: nn.Module, name: str):
    """`base` with the adapter of that name alone; layers that have none of it run as they were.
    peft's own switch would also turn the others' gradients off, which a graph that went through
    them still needs."""
    layers = [module for module in base.modules() if isinstance(module, BaseTunerLayer)]
    before = [layer._active_adapter for layer in layers]
    for layer in layers:
        layer._active_adapter = [name]
    try:
        yield base
    finally:
        for layer, was in zip(layers, before, strict=True):
            layer._active_adapter = was


def without_lora(base: nn.Module):
    """`base` as it was before LoRA, inside a `with`."""
    return adapter(base, "")  # no layer has that one


@torch.no_grad()
def merge_lora(base: nn.Module) -> None:
    """Folds LoRA into the base's weights in place and takes the adapters out."""
    for name, module in list(base.named_modules()):
        if isinstance(module, BaseTunerLayer):
            module.merge()
            parent, _, leaf = name.rpartition(".")
            setattr(base.get_submodule(parent), leaf, module.get_base_layer())
