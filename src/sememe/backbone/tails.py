"""Keys and values that the middle layers make of tails which never run through them, so that a
concept sees the last normal tokens, those of its segment among them (`segment: both`).

A tail token's state on its way through the middle slice is guessed on the line from its shallow
state to the bridged one. Of a layer only the two projections are run: no query, no MLP."""

import sys
from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache

from sememe.backbone.split import Spine
from sememe.concepts.masks import Lane, Lanes
from sememe.errors import BaseError

KeysValues = tuple[Tensor, Tensor]


class TailKeys:
    """Stands in for the cache of the middle layers, or for none: behind the keys and values of
    their own entries it is given those of tails.

    Args:
        keys_values: layer index → (b, heads, n, head_dim) keys and values of the tails."""

    def __init__(self, cache: Cache | None, keys_values: Callable[[int], KeysValues]):
        self.cache = cache
        self.keys_values = keys_values
        self.again = cache is None  # layers may be computed again: nothing is written

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args, **kwargs
    ) -> KeysValues:
        """What a layer's attention calls."""
        keys, values = (
            torch.cat([x, tail.to(x.dtype)], 2)
            for x, tail in zip((key_states, value_states), self.keys_values(layer_idx), strict=True)
        )
        if self.cache is None:
            return keys, values
        return self.cache.update(keys, values, layer_idx, *args, **kwargs)


def keys_values(layer: nn.Module, x_BnD: Tensor, rope: tuple[Tensor, Tensor]) -> KeysValues:
    """(B, heads, n, head_dim) keys and values of a decoder layer for the states that enter it, as
    its own attention makes them; `check_keys` holds it to that."""
    attention = layer.self_attn
    if hasattr(layer, "input_layernorm"):  # OLMo2 has none
        x_BnD = layer.input_layernorm(x_BnD)
    if hasattr(attention, "qkv_proj"):  # Phi3
        width = attention.num_key_value_heads * attention.head_dim
        keys, values = attention.qkv_proj(x_BnD)[..., -2 * width :].chunk(2, -1)
    else:
        keys, values = attention.k_proj(x_BnD), attention.v_proj(x_BnD)
    norm = getattr(attention, "k_norm", None)
    by_head = norm is not None and norm.weight.numel() == attention.head_dim
    if norm is not None and not by_head:  # OLMo2: over all heads
        keys = norm(keys)
    keys, values = (
        x.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2) for x in (keys, values)
    )
    if by_head:
        keys = norm(keys)
    if getattr(attention, "use_rope", True):  # SmolLM3 has layers without
        rotate = sys.modules[type(attention).__module__].apply_rotary_pos_emb
        _, keys = rotate(keys, keys, *rope)
    return keys, values


@torch.no_grad()
def check_keys(base: nn.Module) -> None:
    """Raises BaseError where `keys_values` are not what the base's own layers put into a cache, on
    a few tokens; exact for every supported family in fp32 (0.0 seen)."""
    spine, cache = Spine(base), DynamicCache()
    config = base.config.get_text_config()
    position = torch.arange(8, device=base.device)[None]
    h = spine.embed(1 + position % (config.vocab_size - 1))
    rope, lane = spine.rope(h, position), Lane.causal(position, position >= 0)
    masks = Lanes(lane, lane, plain=True).masks(config._attn_implementation, h.dtype)
    worst = 0.0
    for number, layer in enumerate(spine.decoder.layers):
        try:
            guessed = keys_values(layer, h, rope[spine.kinds[number]])
            h = spine.run(number, number + 1, h, position, rope, masks, cache)
            own = cache.layers[number].keys, cache.layers[number].values
            for x, y in zip(guessed, own, strict=True):
                worst = max(worst, float((x - y).abs().max() / y.abs().max().clamp(min=1e-6)))
        except (AttributeError, TypeError, RuntimeError) as error:
            raise BaseError(_unlike(config, error)) from error
    if not worst < 1e-3:
        raise BaseError(_unlike(config, f"off by {worst:.1e}"))


def _unlike(config, why) -> str:
    return (
        f"segment = both over a base of type {config.model_type}, whose keys and values cannot be "
        f"made apart from its layers ({why}): need another base. try: segment=deep"
    )
