"""ConceptHead: (…, D) hidden states → whether to write a concept, and which of K ids, or of K
digits a stage.

All heads give K + 1 log-probabilities in the first stage, the last one NULL (`log_probs`). They
differ in how these come about: `joint` is one softmax over K + 1; `factored` and `nearest` put
*whether* (a boundary score) apart from *which* (K logits), so that the ids are needed at the
written positions only. `nearest` has no weights for *which*: a code's logit is its distance. Inputs
are normalised states, and from the second stage on what the stages before left; all math is fp32.
"""

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
        logits = F.linear(x, self.logits[0].weight.float(), self.logits[0].bias.float())
        return logits[..., :-1].logsumexp(-1) - logits[..., -1]

    def code_logits(self, r: Tensor, table_KD: Tensor, g: int = 0) -> Tensor:
        """(…, K) logits of the digits of stage g, given that a concept is written."""
        linear, count = self.logits[g], len(table_KD)
        return F.linear(r, linear.weight[:count].float(), linear.bias[:count].float())

    @torch.no_grad()
    def start(
        self,
        g: int,
        code_nD: Tensor,
        sharpness: Tensor,
        rows: Tensor | None = None,
        own_n: Tensor | None = None,
    ) -> None:
        """The rows (None: all) of stage g begin as a nearest-centroid classifier, raised or lowered
        so that each gives its own code the logit `own_n`. NULL's logit is flat at the start, and
        the rate gate shifts it to any rate."""
        if g == 0 and rows is None:
            self.logits[0].weight[-1], self.logits[0].bias[-1] = 0.0, 0.0
        _nearest_rows(self.logits[g], code_nD, sharpness, rows, own_n)

    def rows(self, g: int) -> list[nn.Parameter]:
        """The parameters that have a row for each code of stage g."""
        return list(self.logits[g].parameters())


class Dissimilarity(nn.Module):
    """The score of the heads that decide on NULL apart: the dissimilarity of neighbouring states
    (H-Net, arXiv 2507.07955 §2.2, with per-channel weights where they have matrices), plus a linear
    term that starts at zero."""

    def __init__(self, width: int):
        super().__init__()
        self.channel = nn.Parameter(torch.ones(width))
        self.linear = nn.Parameter(torch.zeros(width))
        self.sharpness = nn.Parameter(torch.tensor(5.0))

    def score(self, x: Tensor, previous: Tensor) -> Tensor:
        """(…,) log-odds of writing a concept, up to the rate gate's threshold."""
        channel = self.channel.float()
        cosine = F.cosine_similarity(x * channel, previous * channel, dim=-1)
        return self.sharpness.float() * (1 - cosine) + x @ self.linear.float() / x.shape[-1] ** 0.5


class FactoredHead(Dissimilarity):
    """A boundary score, and a linear map to K code logits in each stage."""

    def __init__(self, width: int, num_concepts: int, codes_per_concept: int = 1):
        super().__init__(width)
        self.codes = nn.ModuleList(nn.Linear(width, num_concepts) for _ in range(codes_per_concept))

    def code_logits(self, r: Tensor, table_KD: Tensor, g: int = 0) -> Tensor:
        """(…, K) logits of the digits of stage g, given that a concept is written."""
        return F.linear(r, self.codes[g].weight.float(), self.codes[g].bias.float())

    @torch.no_grad()
    def start(
        self,
        g: int,
        code_nD: Tensor,
        sharpness: Tensor,
        rows: Tensor | None = None,
        own_n: Tensor | None = None,
    ) -> None:
        """The rows (None: all) of stage g begin as a nearest-centroid classifier, raised or lowered
        so that each gives its own code the logit `own_n`."""
        _nearest_rows(self.codes[g], code_nD, sharpness, rows, own_n)

    def rows(self, g: int) -> list[nn.Parameter]:
        """The parameters that have a row for each code of stage g."""
        return list(self.codes[g].parameters())


class NearestHead(Dissimilarity):
    """A boundary score; a code's logit is minus half its squared distance, times a learned
    sharpness of the stage."""

    def __init__(self, width: int, num_concepts: int, codes_per_concept: int = 1):
        super().__init__(width)
        self.log_sharpness = nn.Parameter(torch.zeros(codes_per_concept))

    def code_logits(self, r: Tensor, table_KD: Tensor, g: int = 0) -> Tensor:
        """(…, K) logits of the digits of stage g, given that a concept is written; up to what all
        codes share."""
        sharpness = self.log_sharpness[g].float().exp()
        return F.linear(
            sharpness * r,
            table_KD,
            -0.5 * sharpness * torch.linalg.vector_norm(table_KD, dim=-1).square(),
        )

    @torch.no_grad()
    def start(
        self,
        g: int,
        code_nD: Tensor,
        sharpness: Tensor,
        rows: Tensor | None = None,
        own_n: Tensor | None = None,
    ) -> None:
        """Sets the sharpness of stage g; single codes (`rows`) have nothing of their own to begin
        with."""
        if rows is None:
            self.log_sharpness[g] = sharpness.log()

    def rows(self, g: int) -> list[nn.Parameter]:
        """The parameters that have a row for each code of stage g: none."""
        return []


HEADS = {"factored": FactoredHead, "joint": JointHead, "nearest": NearestHead}


def _nearest_rows(
    linear: nn.Linear, code_nD: Tensor, sharpness: Tensor, rows: Tensor | None, own_n: Tensor | None
) -> None:
    rows, square_n = (
        slice(len(code_nD)) if rows is None else rows,
        sharpness * code_nD.square().sum(1),
    )
    linear.weight[rows] = sharpness * code_nD
    linear.bias[rows] = -0.5 * square_n if own_n is None else own_n - square_n


def log_probs(
    head: nn.Module, x: Tensor, previous: Tensor, table_KD: Tensor, threshold: float = 0.0
) -> Tensor:
    """(…, K + 1) log-probabilities of the first stage, NULL last, with the rate gate's threshold as
    a shift of the NULL logit."""
    score = head.score(x, previous) - threshold
    which = head.code_logits(x, table_KD).log_softmax(-1)
    return torch.cat(
        [which + F.logsigmoid(score).unsqueeze(-1), F.logsigmoid(-score).unsqueeze(-1)], -1
    )
