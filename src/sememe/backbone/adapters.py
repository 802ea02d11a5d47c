"""LoRA on the attention and MLP linears of the decoder layers, through peft."""

import contextlib
import warnings
from collections.abc import Iterable

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from sememe.backbone.bits import unpack


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
def active(adapters: dict[BaseTunerLayer, list[str]]):
    """Each of these layers with those adapters alone. peft's own switch would also turn the others'
    gradients off, which a graph that went through them still needs."""
    before = active_adapters(adapters)
    try:
        for layer, names in adapters.items():
            layer._active_adapter = names
        yield
    finally:
        for layer, names in before.items():
            layer._active_adapter = names


def active_adapters(modules: Iterable[nn.Module]) -> dict[BaseTunerLayer, list[str]]:
    """Of those modules that have adapters, which are on."""
    return {x: x._active_adapter for x in modules if isinstance(x, BaseTunerLayer)}


def adapter(base: nn.Module, name: str):
    """`base` with the adapter of that name alone, inside a `with`; layers that have none of it run
    as they were."""
    return active({layer: [name] for layer in active_adapters(base.modules())})


def without_lora(base: nn.Module):
    """`base` as it was before LoRA, inside a `with`."""
    return adapter(base, "")  # no layer has that one


@torch.no_grad()
def merge_lora(base: nn.Module) -> None:
    """Folds LoRA into the base's weights in place and takes the adapters out. Weights of 8 or 4
    bits are unpacked before: LoRA was trained on what they stand for."""
    unpack(base)
    for name, module in list(base.named_modules()):
        if isinstance(module, BaseTunerLayer):
            module.merge()
            parent, _, leaf = name.rpartition(".")
            setattr(base.get_submodule(parent), leaf, module.get_base_layer())
