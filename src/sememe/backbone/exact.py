"""Embeddings of a base in 16 bits as they were before: what the rounding took, in as many bits."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ExactEmbedding(nn.Module):
    """Reads the base's table, which a tied head needs in its own dtype, and adds the `rest`; None
    where nothing was lost, as with a base that was published in bf16."""

    rest: Tensor | None  # (V, D), in the table's dtype

    def __init__(self):
        super().__init__()
        self.register_buffer("rest", None, persistent=False)

    def keep(self, exact_VD: Tensor, table_VD: Tensor) -> None:
        """What the table has lost."""
        if exact_VD.dtype == table_VD.dtype:
            return
        rest_VD = (exact_VD.float() - table_VD.float()).to(table_VD.dtype)
        self.rest = rest_VD if rest_VD.any() else None

    def forward(self, table: nn.Module, ids_BT: Tensor, dtype: torch.dtype) -> Tensor:
        """(B, T) ids → (B, T, D)."""
        if table.weight.dtype == dtype:
            return table(ids_BT)
        x_BTD = F.embedding(ids_BT, table.weight).to(dtype)
        if self.rest is not None and len(self.rest) == len(table.weight):  # not resized
            x_BTD = x_BTD + F.embedding(ids_BT, self.rest)
        return x_BTD * getattr(table, "embed_scale", 1.0)  # Gemma's
