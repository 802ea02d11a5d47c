"""LoRA on the attention and MLP linears of the decoder layers, through peft."""

import contextlib

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from sememe.errors import RecipeError


def linear_names(decoder: nn.Module) -> list[str]:
    """Leaf names of the linears inside the decoder's layers (q_proj, …, down_proj; fused ones where a family has
    them). `all-linear` of peft would take the concept head as well."""
    names = {name.rsplit(".", 1)[-1] for name, module in decoder.layers.named_modules() if isinstance(module, nn.Linear)}
    return sorted(names)


def add_lora(base: nn.Module, rank: int, alpha: float, dropout: float, first: int = 0) -> None:
    """Puts LoRA into the layers of `base` from `first` on, in place. Its weights are trainable, everything else is frozen."""
    base.requires_grad_(False)
    if rank == 0:
        return
    names = linear_names(base.get_decoder())
    if not names:
        raise RecipeError("found no nn.Linear in the layers of this base: need one for LoRA. try: lora.rank=0")
    layers = "|".join(str(i) for i in range(first, len(base.get_decoder().layers)))
    config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout,
                        target_modules=rf".*\.layers\.({layers})\..*\.({'|'.join(names)})")
    inject_adapter_in_model(config, base)


@contextlib.contextmanager
def without_lora(base: nn.Module):
    """`base` as it was before LoRA. peft's own switch would also turn the adapters' gradients off."""
    layers = [module for module in base.modules() if isinstance(module, BaseTunerLayer)]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield base
    finally:
        for layer in layers:
            layer._disable_adapters = False


@torch.no_grad()
def merge_lora(base: nn.Module) -> None:
    """Folds LoRA into the base's weights in place and takes the adapters out."""
    for name, module in list(base.named_modules()):
        if isinstance(module, BaseTunerLayer):
            module.merge()
            parent, _, leaf = name.rpartition(".")
            setattr(base.get_submodule(parent), leaf, module.get_base_layer())
