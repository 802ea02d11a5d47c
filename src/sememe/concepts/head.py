"""ConceptHead: (…, D) hidden states → whether to write a concept, and which of K ids, or of K
digits a stage.

`joint` is one softmax over K + 1, the last one NULL; `nearest` puts *whether* (a boundary score)
apart from *which*, a code's logit being its distance. Inputs are normalised states, and from the
second stage on what the stages before left; all math is fp32."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class JointHead(nn.Module):
    """One linear map to K + 1 logits, NULL last, and one to K in each further stage. Its score is
    the log-odds of not writing NULL."""

    def __init__(self, width: int, num_concepts: int, codes_per_concept: int = 1):
        super().__init__()
        self.logits = nn.ModuleList(
            nn.Linear(width, num_concepts + (g == 0)) for g in range(codes_per_concept)
        )

    def score(self, x: Tensor, previous: Tensor) -> Tensor:
        """(…,) log-odds of writing a concept. `previous` is the state one position earlier (unused
        here)."""
        logits = self._linear(x, 0)
        return logits[..., :-1].logsumexp(-1) - logits[..., -1]

    def code_logits(self, r: Tensor, table_KD: Tensor, g: int = 0) -> Tensor:
        """(…, K) logits of the digits of stage g, given that a concept is written."""
        return self._linear(r, g)[..., : len(table_KD)]

    def _linear(self, x: Tensor, g: int) -> Tensor:
        linear = self.logits[g]
        return F.linear(x, linear.weight.float(), linear.bias.float())

    @torch.no_grad()
    def start(self, g: int, table_KD: Tensor, sharpness: Tensor) -> None:
        """Stage g begins as a nearest-centroid classifier. NULL's logit is flat at the start, and
        the rate gate shifts it to any rate."""
        linear = self.logits[g]
        null = (0, len(linear.bias) - len(table_KD))
        linear.weight.copy_(F.pad(sharpness * table_KD, (0, 0, *null)))
        linear.bias.copy_(F.pad(-0.5 * sharpness * table_KD.square().sum(1), null))


class NearestHead(nn.Module):
    """*Whether*: the dissimilarity of neighbouring states (H-Net, arXiv 2507.07955 §2.2, with
    per-channel weights where they have matrices), plus a linear term that starts at zero. *Which*:
    a code's logit is minus half its squared distance, times a learned sharpness of the stage."""

    def __init__(self, width: int, num_concepts: int, codes_per_concept: int = 1):
        super().__init__()
        self.channel = nn.Parameter(torch.ones(width))
        self.linear = nn.Parameter(torch.zeros(width))
        self.sharpness = nn.Parameter(torch.tensor(5.0))
        self.log_sharpness = nn.Parameter(torch.zeros(codes_per_concept))

    def score(self, x: Tensor, previous: Tensor) -> Tensor:
        """(…,) log-odds of writing a concept, up to the rate gate's threshold."""
        channel = self.channel.float()
        cosine = F.cosine_similarity(x * channel, previous * channel, dim=-1)
        return self.sharpness.float() * (1 - cosine) + x @ self.linear.float() / x.shape[-1] ** 0.5

    def code_logits(self, r: Tensor, table_KD: Tensor, g: int = 0) -> Tensor:
        """(…, K) logits of the digits of stage g, given that a concept is written; up to what all
        codes share."""
        sharpness = self.log_sharpness[g].float().exp()
        square_K = torch.linalg.vector_norm(table_KD, dim=-1).square()
        return F.linear(sharpness * r, table_KD, -0.5 * sharpness * square_K)

    @torch.no_grad()
    def start(self, g: int, table_KD: Tensor, sharpness: Tensor) -> None:
        """Sets the sharpness of stage g; its codes are the table's own."""
        self.log_sharpness[g] = sharpness.log()


HEADS = {"joint": JointHead, "nearest": NearestHead}
