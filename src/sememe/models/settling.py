"""A loss that is differentiated at once, so that what it was made of need not wait for the other
losses of a step."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn


class _Settled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value: Tensor, gradients: list[Tensor], *_: Tensor) -> Tensor:
        ctx.gradients = gradients
        return value.clone()

    @staticmethod
    def backward(ctx, slope: Tensor):
        return None, None, *(g * slope.to(g.dtype) for g in ctx.gradients)


def settled(loss: Tensor, parameters: Iterable[nn.Parameter]) -> Tensor:
    """The scalar `loss` with the same gradients, by `parameters` alone: they are taken now and its
    activations are let go.

    Its graph is used up; nothing else may go back through it."""
    used = [p for p in parameters if p.requires_grad]
    with torch.autocast(loss.device.type, enabled=False):
        gradients = torch.autograd.grad(loss, used, allow_unused=True)
    known = [(p, g) for p, g in zip(used, gradients, strict=True) if g is not None]
    return _Settled.apply(loss.detach(), [g for _, g in known], *(p for p, _ in known))
