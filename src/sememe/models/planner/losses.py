"""Cross entropies of planner and executor, with as little kept in memory as they need."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from sememe.concepts.plan import IGNORED
from sememe.models.losses import cross_entropy


def mean_nll(logits_BTV: Tensor, target_BT: Tensor) -> Tensor:
    """Nats for each target that counts."""
    return cross_entropy(logits_BTV, target_BT).sum() / (target_BT != IGNORED).sum().clamp(min=1)


def in_chunks(function: Callable[..., Tensor], rows: int, *tensors: Tensor) -> Tensor:
    """`function` of a few rows of all tensors at a time, put together."""
    chunks = zip(*(x.split(max(1, rows)) for x in tensors), strict=True)
    return torch.cat([function(*chunk) for chunk in chunks])


def differentiated(loss: Tensor, parameters: Iterable[nn.Parameter]) -> Tensor:
    """The scalar `loss` with the same gradients, by `parameters` alone: they are taken now, and its
    activations need not wait for the other losses of a step. Nothing else may go back through its
    graph."""
    trained = [p for p in parameters if p.requires_grad]
    with torch.autocast(loss.device.type, enabled=False):
        gradients = torch.autograd.grad(loss, trained, allow_unused=True)
    used = zip(trained, gradients, strict=True)
    linear = sum((p * g).sum() for p, g in used if g is not None)
    return loss.detach() + (linear - linear.detach())
