"""The per-token cross entropy that all systems train on and are measured by."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

LOGITS_AT_ONCE = 2**25  # 128 MB in fp32


def cross_entropy(logits_BTV: Tensor, labels_BT: Tensor) -> Tensor:
    """(B, T) nats of each token, in fp32; 0 where its label is -100."""
    logits_nV = logits_BTV.flatten(0, -2).float()
    nll_n = F.cross_entropy(logits_nV, labels_BT.flatten(), reduction="none")
    return nll_n.view(labels_BT.shape)


def too_many_logits(head: nn.Module, labels_BT: Tensor) -> bool:
    """Whether the logits of all tokens are better never held at once: `token_losses`."""
    return labels_BT.numel() * len(head.weight) > LOGITS_AT_ONCE and not head.weight.requires_grad


def token_losses(
    head: nn.Module,
    labels_BT: Tensor,
    *states_BTn: Tensor,
    score: Callable[..., Tensor] | None = None,
) -> Tensor:
    """(B, T) nats of each token, 0 where its label is -100, from the logits that `score`, by
    default the `head` itself, makes of states. All states but integers get a gradient.

    Where there are `too_many_logits`, there are never those of more than a few tokens, and their
    gradients are taken in the forward pass, which costs no further multiplication (as in Liger
    kernels, arXiv 2410.10989); `score` may then have no trained weights."""
    score = score or head
    if not too_many_logits(head, labels_BT):
        return cross_entropy(score(*states_BTn), labels_BT)
    tokens = max(1, LOGITS_AT_ONCE // len(head.weight))
    states_nn = (x.flatten(0, labels_BT.dim() - 1) for x in states_BTn)
    return _InChunks.apply(score, tokens, labels_BT.flatten(), *states_nn).view(labels_BT.shape)


def loss_and_logits(
    model: PreTrainedModel, h_BTD: Tensor, labels_BT: Tensor | None, **named: Any
) -> tuple[Tensor | None, Tensor | None]:
    """Of the next token, from normed last states: the loss, None without labels; and (B, T, V)
    logits, None in training where there are `too_many_logits`. `named`: of `loss_function`."""
    head = model.get_output_embeddings()
    if labels_BT is not None and model.training and too_many_logits(head, labels_BT):
        labels_BT = F.pad(labels_BT, (0, 1), value=-100)[:, 1:]
        count = named.get("num_items_in_batch")
        count = (labels_BT != -100).sum() if count is None else count
        return token_losses(head, labels_BT, h_BTD).sum() / count, None
    loss, logits = None, head(h_BTD)
    if labels_BT is not None:
        loss = model.loss_function(logits, labels_BT, vocab_size=logits.shape[-1], **named)
    return loss, logits


class _InChunks(torch.autograd.Function):
    """A token's loss depends on its own states alone. So their gradients for a loss of 1 are kept,
    and multiplied in the backward pass by what each token's loss counts for."""

    @staticmethod
    def forward(ctx, score, tokens, labels_n, *states):
        learns = ctx.needs_input_grad[3:]
        losses, gradients = [], []
        for labels_m, *parts in zip(*(x.split(tokens) for x in (labels_n, *states)), strict=True):
            parts = [x.detach().requires_grad_(y) for x, y in zip(parts, learns, strict=True)]
            with torch.set_grad_enabled(any(learns)):
                losses.append(cross_entropy(score(*parts), labels_m))
                total = losses[-1].sum()
            if any(learns):
                wanted = [x for x in parts if x.requires_grad]
                gradients.append(torch.autograd.grad(total, wanted))
            losses[-1] = losses[-1].detach()
        ctx.save_for_backward(*map(torch.cat, zip(*gradients, strict=True)))
        return torch.cat(losses)

    @staticmethod
    @once_differentiable
    def backward(ctx, weight_n):
        weighted = ((x * weight_n.unsqueeze(-1)).to(x.dtype) for x in ctx.saved_tensors)
        learns = ctx.needs_input_grad[3:]
        return None, None, None, *(next(weighted) if needed else None for needed in learns)
