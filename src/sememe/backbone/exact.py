"""What stays exact where a model is cast to 16 bits, or its frozen weights are held in them."""

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
        if name.startswith(("backbone.", "bridge.")) and p.is_floating_point():
            p.data = p.data.to(wide(dtype) if id(p) in stays else dtype)


class NarrowLinear(nn.Linear):
    """A frozen linear held in 16 bits. It computes in the dtype of its input, or of autocast, which
    would round its weight to the same bits anew in each step."""

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_autocast_enabled(x.device.type):
            return super().forward(x)
        return F.linear(x, self.weight.to(x.dtype), self.bias)


class NarrowEmbedding(nn.Embedding):
    """A frozen table held in 16 bits. The residual stream that begins with it stays in fp32."""

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids).float()


NARROW = {nn.Linear: NarrowLinear, nn.Embedding: NarrowEmbedding}


def narrow(base: nn.Module) -> None:
    """Holds the frozen matrices of `base` in bf16, in place, for training under autocast. LoRA and
    vectors stay as they are, and so does a table that a family multiplies with in its own way."""
    modules = [module for module in base.modules() if type(module) in NARROW]
    others = {
        id(p)
        for module in base.modules()
        for p in module.parameters(recurse=False)
        if type(module) not in NARROW or p.requires_grad
    }
    for module in modules:
        if id(module.weight) not in others:
            module.weight.data = module.weight.data.bfloat16()
            module.__class__ = NARROW[type(module)]  # in place: LoRA and a tied head refer to it


def computed_in(module: nn.Module) -> torch.dtype:
    """That of its vectors: matrices may be held in fewer bits."""
    return next(p.dtype for p in module.parameters() if p.dim() == 1 and p.is_floating_point())


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
