"""ConceptHead: (…, D) hidden states → whether to write a concept, and which of K ids.

Both heads give K + 1 log-probabilities, the last one NULL (`log_probs`). They differ in how these come about:
`joint` is one softmax over K + 1; `factored` puts *whether* (a boundary score) apart from *which* (K logits), so that
the ids are needed at the written positions only. Inputs are the codebook's normalised states; all math is fp32.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class JointHead(nn.Module):
    """One linear map to K + 1 logits, NULL last. Its score is the log-odds of not writing NULL."""

    def __init__(self, width: int, num_concepts: int):
        super().__init__()
        self.logits = nn.Linear(width, num_concepts + 1)

    def score(self, x: Tensor, previous: Tensor) -> Tensor:
        """(…,) log-odds of writing a concept. `previous` is the state one position earlier (unused here)."""
        logits = F.linear(x, self.logits.weight.float(), self.logits.bias.float())
        return logits[..., :-1].logsumexp(-1) - logits[..., -1]

    def code_logits(self, x: Tensor) -> Tensor:
        """(…, K) logits of the ids, given that a concept is written."""
        return F.linear(x, self.logits.weight[:-1].float(), self.logits.bias[:-1].float())

    @torch.no_grad()
    def start(self, weight_KD: Tensor, bias_K: Tensor) -> None:
        """Begins as a nearest-centroid classifier; NULL's logit is flat and the rate gate shifts it to any rate."""
        self.logits.weight[:-1], self.logits.bias[:-1] = weight_KD, bias_K
        self.logits.weight[-1], self.logits.bias[-1] = 0.0, 0.0


class FactoredHead(nn.Module):
    """A boundary score and K code logits.

    The score is the dissimilarity of neighbouring states (H-Net, arXiv 2507.07955 §2.2, with per-channel weights
    where they have matrices), plus a linear term that starts at zero.
    """

    def __init__(self, width: int, num_concepts: int):
        super().__init__()
        self.codes = nn.Linear(width, num_concepts)
        self.channel = nn.Parameter(torch.ones(width))
        self.linear = nn.Parameter(torch.zeros(width))
        self.sharpness = nn.Parameter(torch.tensor(5.0))

    def score(self, x: Tensor, previous: Tensor) -> Tensor:
        """(…,) log-odds of writing a concept, up to the rate gate's threshold."""
        channel = self.channel.float()
        cosine = F.cosine_similarity(x * channel, previous * channel, dim=-1)
        return self.sharpness.float() * (1 - cosine) + x @ self.linear.float() / x.shape[-1] ** 0.5

    def code_logits(self, x: Tensor) -> Tensor:
        """(…, K) logits of the ids, given that a concept is written."""
        return F.linear(x, self.codes.weight.float(), self.codes.bias.float())

    @torch.no_grad()
    def start(self, weight_KD: Tensor, bias_K: Tensor) -> None:
        """Begins as a nearest-centroid classifier."""
        self.codes.weight.copy_(weight_KD)
        self.codes.bias.copy_(bias_K)


HEADS = {"factored": FactoredHead, "joint": JointHead}


def log_probs(head: nn.Module, x: Tensor, previous: Tensor, threshold: float = 0.0) -> Tensor:
    """(…, K + 1) log-probabilities, NULL last, with the rate gate's threshold as a shift of the NULL logit."""
    score = head.score(x, previous) - threshold
    which = head.code_logits(x).log_softmax(-1)
    return torch.cat([which + F.logsigmoid(score).unsqueeze(-1), F.logsigmoid(-score).unsqueeze(-1)], -1)
