"""Quantisation: (n, D) normalised states → the codes that stand for them, discrete forward and soft
backward (straight-through Gumbel-softmax, arXiv 1611.01144).

Stage g reads what the stages before it left, `r = x − Σ_{j<g} hard_j` (residual quantisation, arXiv
2107.03312)."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from sememe.concepts.codebook import ConceptEmbedding


class Quantised(NamedTuple):
    """Normalised states and their codes."""

    state_nD: Tensor  # its value is hard_nD, its gradient that of the softmax's mixture
    hard_nD: Tensor
    ids_n: Tensor
    soft_nD: Tensor | None = None  # sum of the stages' mixtures; None without the softmax
    stages: tuple[Tensor, ...] = ()  # (n, K) probabilities of each stage

    @property
    def entropy(self) -> Tensor:
        """Nats per concept: mean over the states, sum over the stages."""
        return sum(torch.special.entr(p_nK).sum(-1).mean() for p_nK in self.stages)

    @property
    def max_prob(self) -> Tensor:
        """Largest probability: mean over the states and stages."""
        return torch.stack([p_nK.amax(-1).mean() for p_nK in self.stages]).mean()


def quantise(
    codes: ConceptEmbedding,
    head: nn.Module,
    x_nD: Tensor,
    *,
    temperature: float = 1.0,
    gumbel: float = 0.0,
    soft: bool = True,
) -> Quantised:
    """The codes of (n, D) states, the likeliest of each stage. Memory: one (n, K) of probabilities
    a stage.

    Args:
        temperature: of the softmax that the gradient goes through.
        gumbel: scale of Gumbel noise on the logits; 0 for none.
        soft: False computes no softmax at all (evaluation): no gradient and no entropy."""
    hard_nD = soft_nD = torch.zeros_like(x_nD)
    digits, stages = [], []
    for g in range(codes.codes_per_concept):
        table_KD = codes.table(g)
        logits_nK = head.code_logits(x_nD - hard_nD, table_KD, g)
        if gumbel > 0:
            logits_nK = logits_nK + gumbel * gumbel_like(logits_nK)
        digits.append(logits_nK.argmax(-1))
        hard_nD = hard_nD + table_KD.detach()[digits[-1]]
        if soft:
            stages.append(torch.softmax(logits_nK / temperature, -1))
            soft_nD = soft_nD + stages[-1] @ table_KD
    ids_n = codes.combine(torch.stack(digits, -1))
    if not soft:
        return Quantised(hard_nD, hard_nD, ids_n)
    # Written the other way round the forward value would not be exact in fp32.
    state_nD = hard_nD + (soft_nD - soft_nD.detach())
    return Quantised(state_nD, hard_nD, ids_n, soft_nD.detach(), tuple(stages))


def gumbel_like(logits: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Standard Gumbel noise of the same shape: argmax(logits + noise) is a sample of
    softmax(logits)."""
    return -torch.empty_like(logits).exponential_(generator=generator).log()
