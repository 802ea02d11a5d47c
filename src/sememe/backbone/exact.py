"""What stays exact where a model is cast to 16 bits."""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def wide(dtype: torch.dtype) -> torch.dtype:
    """The same, or fp32 for one of 16 bits."""
    return torch.float32 if dtype.itemsize < 4 else dtype


def cast(model: nn.Module, dtype: torch.dtype, exact: Iterable[nn.Module]) -> None:
    """The base, LoRA and the bridge in a dtype; the modules in `exact` in fp32 at least."""
    stays = {id(p) for module in exact for p in module.parameters()}
    for name, p in model.named_parameters():
        if name.startswith(("backbone.", "bridge.")):
            p.data = p.data.to(wide(dtype) if id(p) in stays else dtype)


class ExactEmbedding(nn.Module):
    """Embeddings as they were before they were rounded: what is in the base's table, which a tied
    head needs in its own dtype, and the `rest`; None where nothing was lost, as with a base that
    was published in bf16."""

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
