"""What new modules start from before any training: some blocks, and what the base makes of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from sememe.models.adapted import AdaptedModel

FITTED_TOKENS = 16384  # at most, that a boundary or a compressor's map is fitted on
TOKENS_AT_ONCE = 4096  # whose logits are held


def fitted_blocks(ids_NT: Tensor) -> Tensor:
    """The first few blocks, which are enough for these."""
    return ids_NT[: max(1, FITTED_TOKENS // ids_NT.shape[1])]


def boundary_targets(model: AdaptedModel, ids_NT: Tensor) -> Tensor | None:
    """(n, T - 1, …) what a fitted boundary is to estimate: what the base itself makes of the text
    (LoRA is still zero)."""
    boundary = model.writer.gate.boundary
    if not boundary.fitted:
        return None
    ids_nT = fitted_blocks(ids_NT).to(model.device)
    boundary.see(ids_nT)

    def target(ids_BT: Tensor) -> Tensor:
        logits_BTV = model.backbone(input_ids=ids_BT, use_cache=False).logits
        return boundary.target(logits_BTV.float().log_softmax(-1), ids_BT)

    rows = min(4, max(1, TOKENS_AT_ONCE // ids_nT.shape[1]))
    return torch.cat([target(ids_BT) for ids_BT in ids_nT.split(rows)])
