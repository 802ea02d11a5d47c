"""The base over rows of entries: tokens, concepts and slots, each at a position of the text.

An entry sees those before it, in the order of entries, that are valid. B rows, K entries, n of them
new (the others are in a cache)."""

import torch
from torch import Tensor
from transformers import DynamicCache

from sememe.backbone.split import Spine
from sememe.concepts.masks import mask_of


def run_entries(
    spine: Spine,
    last: int,
    x_BnD: Tensor,
    position_BK: Tensor,
    valid_BK: Tensor | None = None,
    cache: DynamicCache | None = None,
) -> Tensor:
    """(B, n, D) states after the first `last` layers, of the last n entries.

    Args:
        valid_BK: None where all of them are.
        cache: where the entries before are."""
    count = x_BnD.shape[1]
    position_Bn = position_BK[:, -count:]
    attention = spine.base.config._attn_implementation
    if valid_BK is None:
        valid_BK = torch.ones_like(position_BK, dtype=torch.bool)
    plain = attention == "sdpa" and bool(valid_BK.all())

    def mask(window: int | None) -> Tensor | None:
        farthest = int(position_BK.max()) + 1
        window = window or farthest
        if plain and farthest <= window:
            return None  # the kernel's own causal path: nothing else is hidden
        order_K = torch.arange(position_BK.shape[1], device=x_BnD.device)

        # A window is one of positions, to both sides: by the order of entries alone a slot, which
        # comes after the text, would see the text's end wherever it stands.
        def seen(rows: slice) -> Tensor:
            distance_BnK = (position_Bn[:, rows, None] - position_BK[:, None, :]).abs()
            seen_BnK = (order_K <= order_K[-count:][rows, None]) & (distance_BnK < window)
            # One that is not valid sees everything: a row without any key would give NaN.
            seen_BnK = (seen_BnK & valid_BK[:, None, :]) | ~valid_BK[:, -count:][:, rows, None]
            return seen_BnK.unsqueeze(1)

        return mask_of(seen, (*position_Bn.shape, len(order_K)), x_BnD.dtype, attention)

    return spine.run(0, last, x_BnD, position_Bn, spine.rope(x_BnD, position_Bn), mask, cache)
