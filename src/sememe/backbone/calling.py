"""What transformers calls things, in one place: its releases differ in the name of the cache and of
checkpointing.

From 5.24 on the cache is `cache`; before it was `past_key_values` (`cache_params` in state-space
models). Layers take the old name until 5.40 and `generate` until 6.0, and what a `**kwargs`
swallows is lost without an error: a model then decodes every token without what stands before it.
So each call goes by the name in the signature, and what a model does not know is refused."""

import difflib
import inspect
from collections.abc import Iterable
from dataclasses import fields
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutputWithPast

from sememe.errors import BaseError

CACHE_NAMES = ("cache", "past_key_values", "cache_params")
# That of this release: of the outputs, and of what `generate` hands from step to step.
CACHE = next(
    name for name in CACHE_NAMES if name in {field.name for field in fields(CausalLMOutputWithPast)}
)
# What generate, the Trainer, pipelines and tokenizers pass to `forward`, and what is used if it is
# there.
FORWARD = (
    "return_dict",
    "token_type_ids",
    "num_items_in_batch",
    "output_attentions",
    "output_hidden_states",
    "use_cache",
)


@lru_cache
def parameters(kind: type[nn.Module]) -> frozenset[str]:
    """Names of what `kind.forward` takes."""
    return frozenset(inspect.signature(kind.forward).parameters) - {"self", "kwargs"}


def cache_argument(module: nn.Module, cache: Any) -> dict[str, Any]:
    """The keyword argument that hands `cache` to a layer or a model; none for None.

    Raises:
        BaseError: `module.forward` names no cache, and would run without it.
    """
    if cache is None:
        return {}
    name = next((name for name in CACHE_NAMES if name in parameters(type(module))), None)
    if name is None:
        raise BaseError(
            f"{type(module).__name__}.forward names no cache: need one of "
            f"{', '.join(CACHE_NAMES)}. try: a Llama, "
            "Qwen2/3, Mistral, OLMo2, Gemma3 or SmolLM base, or another release of transformers"
        )
    return {name: cache}


def take_cache(cache: Any, named: dict[str, Any]) -> Any:
    """The one cache among `cache` and the other names in `named`, which are taken out of it.

    Raises:
        ValueError: two different caches.
    """
    caches = [cache, *(named.pop(name, None) for name in CACHE_NAMES)]
    different = {id(cache): cache for cache in caches if cache is not None}
    if len(different) > 1:
        raise ValueError(
            f"got two caches under the names {', '.join(CACHE_NAMES)}: need one. try: {CACHE}=… "
            "alone"
        )
    return next(iter(different.values()), None)


def name_cache(named: dict[str, Any]) -> Any:
    """Puts the cache in `named`, if there is one, under this release's name; returns it."""
    cache = take_cache(None, named)
    if cache is not None:
        named[CACHE] = cache
    return cache


def refuse_unknown(named: dict[str, Any], known: Iterable[str], what: str) -> None:
    """Raises ValueError for arguments of `what` that it would not use, with the nearest name that
    it knows. None asks for nothing."""
    known = set(known)
    for name in (name for name, value in named.items() if value is not None and name not in known):
        near = [f"{other}=…" for other in difflib.get_close_matches(name, known, 1)]
        raise ValueError(
            f"{what} got {name}, which it does not know and would ignore: need an argument of its "
            f"own. try: {' '.join(near) or 'leave it out'}"
        )


def check_forward(
    shape: tuple[int, ...],
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    seen: int,
    output_attentions: bool | None = None,
) -> None:
    """Raises ValueError where new tokens of `shape` (B, T, …) do not go on from the `seen` ones in
    the cache: a step of a longer text whose cache was lost, or several texts in one row.

    Args:
        attention_mask: (B, seen + T), 0 on padding.
        position_ids: (B, T); beside a cache they are taken as they are."""
    batch, length = shape[:2]
    if output_attentions:
        raise ValueError(
            "output_attentions, output_hidden_states: the slices work on different lists of "
            "positions, and there is no (T, T) table of weights to return. try: concept_ids"
        )
    if length == 0:
        raise ValueError(
            f"got no new token ({seen} are in the cache): need at least one. try: a prompt that "
            "goes on from what the cache has read, or a new cache"
        )
    if attention_mask is not None and attention_mask.shape[1:] != (seen + length,):
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}: need ({batch}, past + "
            f"{length}) with {seen} in the cache, 0 on padding. try: the mask that the tokenizer "
            "returns, and the cache that the beginning of the text was read into"
        )
    if position_ids is None or seen:
        return
    real_BT = torch.ones_like(position_ids) if attention_mask is None else attention_mask != 0
    if ((position_ids != real_BT.cumsum(1) - 1) & (real_BT != 0)).any():
        raise ValueError(
            "position_ids start again within a row, as in packed texts, or begin at more than 0 "
            "and there is no cache of what is before: need one text a row, from its first token or "
            "after a cache, since concepts of one text would be read by the next. try: a row for "
            f"each, padded, with its attention_mask; or {CACHE}=…"
        )


def set_checkpointing(model: nn.Module, enable: bool = True, *settings: Any) -> None:
    """Whether activations of the layers are computed again in the backward pass. Renamed in 5.24;
    the old name goes in 6.0."""
    name = (
        "activation_checkpointing"
        if hasattr(model, "activation_checkpointing_enable")
        else "gradient_checkpointing"
    )
    getattr(model, f"{name}_{'enable' if enable else 'disable'}")(*settings)
