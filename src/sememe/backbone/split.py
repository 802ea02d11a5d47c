"""Slices of any decoder: ids → embeddings → layers first…last → logits, on the base's own modules.

Layers are called, never copied, so one path serves every family whose layers sit in one list. What
a family does differently (embedding scale, logit caps, hybrid layers, …) is caught by `self_check`:
the base against this loop."""

import contextlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.cache_utils import DynamicCache

from sememe.backbone.adapters import active, active_adapters
from sememe.backbone.calling import cache_argument, parameters
from sememe.concepts.masks import Lane, Lanes
from sememe.concepts.segments import Rope
from sememe.errors import BaseError

OTHERS = "try: a Llama, Qwen2/3, Mistral, OLMo2, Gemma3 or SmolLM base"
FULL, SLIDING = "full_attention", "sliding_attention"


def split_rope(rope: Rope, length: int) -> tuple[Rope, Rope]:
    """Of the first positions, and of those behind them."""
    return (
        {kind: tuple(x[..., :length, :] for x in pair) for kind, pair in rope.items()},
        {kind: tuple(x[..., length:, :] for x in pair) for kind, pair in rope.items()},
    )


class Spine:
    """A view on a causal LM as embed / rope / run / logits. Holds no parameters of its own."""

    def __init__(self, base: nn.Module):
        self.base = base
        self.decoder = base.get_decoder()
        self.kinds = self._layer_kinds(self.decoder.config)
        self.window = self.decoder.config.sliding_window if SLIDING in self.kinds else None

    @staticmethod
    def _layer_kinds(config) -> list[str]:
        """One of full / sliding for each layer; Mistral says it by `sliding_window` alone."""
        window = getattr(config, "sliding_window", None)
        plain = SLIDING if window and config.model_type == "mistral" else FULL
        kinds = list(getattr(config, "layer_types", None) or [plain] * config.num_hidden_layers)
        if unknown := set(kinds) - {FULL, SLIDING}:
            raise BaseError(
                f"this base ({config.model_type}) has layers of kind {', '.join(unknown)}: need "
                f"full or sliding attention in every layer. {OTHERS}"
            )
        return kinds

    def __len__(self) -> int:
        return len(self.decoder.layers)

    def embed(self, ids: Tensor) -> Tensor:
        """(B, T) ids → (B, T, D)."""
        return self.decoder.embed_tokens(ids)

    def rope(self, h: Tensor, position_ids: Tensor) -> Rope:
        """cos and sin for every position of a chunk. Gather them for a subset: longrope and dynamic
        rope choose their base by the largest position that they see."""
        rotary = self.decoder.rotary_emb
        if "layer_type" in parameters(type(rotary)):
            return {kind: rotary(h, position_ids, kind) for kind in sorted(set(self.kinds))}
        return dict.fromkeys(self.kinds, rotary(h, position_ids))

    def run(
        self,
        first: int,
        last: int,
        h: Tensor,
        position_ids: Tensor,
        rope: Rope,
        mask: Callable[[int | None], Tensor | None],
        cache=None,
    ) -> Tensor:
        """Layers first … last-1 over (B, n, D). `mask(window)` gives each kind of layer its
        mask."""
        masks: dict[str, Tensor | None] = {}
        again = cache is None or getattr(cache, "again", False)
        layers = zip(self.kinds[first:last], self.decoder.layers[first:last], strict=True)
        for kind, layer in layers:
            if kind not in masks:
                masks[kind] = mask(self.window if kind == SLIDING else None)
            out = (partial(_checkpointed, layer) if again else layer)(
                h,
                attention_mask=masks[kind],
                position_ids=position_ids,
                position_embeddings=rope[kind],
                use_cache=cache is not None,
                **cache_argument(layer, cache),
            )
            h = out[0] if isinstance(out, tuple) else out
        return h

    def logits(self, h: Tensor) -> Tensor:
        """(B, n, D) → (B, n, V)."""
        return self.base.lm_head(self.decoder.norm(h))


def _checkpointed(layer: nn.Module, h: Tensor, **named: Any) -> Any:
    """A layer that may be computed again in the backward pass, with the adapters that are on now.
    Under its own checkpointing it would meet whichever are on by then, and be handed no cache,
    since a cache must not be written twice."""
    if not (layer.training and getattr(layer, "gradient_checkpointing", False)):
        return layer(h, **named)

    def once(h: Tensor) -> Any:
        layer.gradient_checkpointing = False
        try:
            return layer(h, **named)
        finally:
            layer.gradient_checkpointing = True

    adapters = active_adapters(layer.modules())

    def contexts():
        """Of the first computation, and of the second."""
        return contextlib.nullcontext(), active(adapters)

    return checkpoint(once, h, use_reentrant=False, context_fn=contexts)


@torch.no_grad()
def self_check(base: nn.Module) -> float:
    """Base against the loop over its layers, on a few tokens, the last of them read from a cache.
    Returns the largest logit difference.

    Raises BaseError where they differ: the family does something between its layers that the loop
    does not, or the layers did not look into the cache that they were handed. The tolerance is
    relative: exact for every supported family in fp32 (0.0 seen); a wrong scale or cap gives >
    1e-2."""
    config, cache, logits = base.config.get_text_config(), DynamicCache(), []
    ids = torch.arange(1, 13, device=base.device)[None] % config.vocab_size
    try:
        spine = Spine(base)
        expected = base(input_ids=ids, use_cache=False).logits
        for start, end in ((0, 11), (11, 12)):
            h = spine.embed(ids[:, start:end])
            position = torch.arange(end, device=ids.device)[None]
            key = Lane.causal(position, position >= 0)
            query = key[:, start:]
            masks = Lanes(query, key, plain=True).masks(config._attn_implementation, h.dtype)
            rope = spine.rope(h, query.position)
            h = spine.run(0, len(spine), h, query.position, rope, masks, cache)
            logits.append(spine.logits(h))
    except (TypeError, ValueError, AttributeError, KeyError, RuntimeError) as error:
        raise BaseError(
            f"the layers of this base ({config.model_type}) cannot be called one by one ({error}): "
            f"need a plain decoder. {OTHERS}"
        ) from error
    difference = (expected - torch.cat(logits, 1)).abs().max()
    difference = float(difference / expected.abs().max().clamp(min=1e-6))
    if not difference < 1e-3:
        raise BaseError(
            f"this base ({config.model_type}) differs from the loop over its own "
            f"layers by {difference:.1e} of its logits: need 0. {OTHERS}"
        )
    return difference
