"""The per-token cross entropy that all systems train on and are measured by."""

import torch.nn.functional as F
from torch import Tensor


def cross_entropy(logits_BTV: Tensor, labels_BT: Tensor) -> Tensor:
    """(B, T) nats of each token, in fp32; 0 where its label is -100."""
    logits_nV = logits_BTV.flatten(0, 1).float()
    nll_n = F.cross_entropy(logits_nV, labels_BT.flatten(), reduction="none")
    return nll_n.view(labels_BT.shape)
