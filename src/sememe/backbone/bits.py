"""Frozen linears of a base's layers in 8 or 4 bits (QLoRA, arXiv 2305.14314): int8 with a scale for
each row, or NF4 by the kernels of bitsandbytes.

Not by its modules: `Linear8bitLt` rounds what goes into it as well, and `Linear4bit` repacks its
weight when it is evaluated on a CPU, after which no gradient goes through it."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sememe.backbone.exact import computed_in
from sememe.errors import needs_extra

BLOCK = 64
"""Weights of 4 bits that share a scale."""


def library():
    """Raises SememeError where bitsandbytes is not installed."""
    with needs_extra("bitsandbytes"):
        from bitsandbytes import functional
    return functional


class _Product(torch.autograd.Function):
    """x Wᵀ + b. W is unpacked again in the backward pass: kept until then, those of all layers
    would take the memory that packing saves."""

    @staticmethod
    def forward(ctx, x, linear):
        ctx.linear = linear
        bias = None if linear.bias is None else linear.bias.to(x.dtype)
        return F.linear(x, linear.unpacked(x.dtype), bias)

    @staticmethod
    def backward(ctx, gradient):
        return gradient @ ctx.linear.unpacked(gradient.dtype), None


class PackedLinear(nn.Linear):
    """A frozen linear of 8 or 4 bits a weight. It computes in the dtype of its input, or of
    autocast."""

    def pack(self, bits: int) -> None:
        """From the weight of a plain linear, in place."""
        weight = self.weight.data.float()
        if bits == 4:
            weight, state = library().quantize_4bit(weight, blocksize=BLOCK, quant_type="nf4")
            scales = state.absmax
        else:
            scales = weight.abs().amax(1, keepdim=True).clamp(min=1e-30) / 127
            weight = (weight / scales).round().to(torch.int8)
        self.weight = _frozen(weight)
        # As integers, which a cast of the model leaves alone; a parameter, which DDP sends once.
        self.scales = _frozen(scales.view(torch.int32))

    def unpacked(self, dtype: torch.dtype) -> Tensor:
        """(out, in) weights."""
        scales = self.scales.view(torch.float32)
        if self.weight.dtype == torch.int8:
            return (self.weight * scales).to(dtype)
        # A block a row: the CPU kernel takes wrong scales where rows are no whole blocks.
        shape = len(scales), BLOCK
        state = library().QuantState(scales, shape, blocksize=BLOCK, quant_type="nf4", dtype=dtype)
        return library().dequantize_4bit(self.weight, state).view(self.out_features, -1)

    def forward(self, x: Tensor) -> Tensor:
        kind = x.device.type
        if torch.is_autocast_enabled(kind):
            x = x.to(torch.get_autocast_dtype(kind))
        return _Product.apply(x, self)


def _frozen(x: Tensor) -> nn.Parameter:
    return nn.Parameter(x, requires_grad=False)


def pack(base: nn.Module, bits: int | None) -> None:
    """Holds the linears of its layers in so many bits, in place; None: as they are. Embeddings and
    lm_head stay whole, and what is no number of whole blocks. Raises SememeError where 4 bits want
    bitsandbytes, and it is not installed."""
    for name, module in base.get_decoder().layers.named_modules() if bits else ():
        is_base = isinstance(module, nn.Linear) and "lora_" not in name
        if is_base and module.weight.numel() % BLOCK == 0:
            module.__class__ = PackedLinear  # in place, as `narrow` does it
            module.pack(bits)


def unpack(base: nn.Module) -> None:
    """Makes packed linears plain ones of the same function."""
    dtype = computed_in(base)
    for module in base.get_decoder().layers.modules():
        if isinstance(module, PackedLinear):
            module.weight = _frozen(module.unpacked(dtype))
            del module.scales
            module.__class__ = nn.Linear
