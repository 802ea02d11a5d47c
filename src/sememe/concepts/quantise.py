"""Quantisation: (n, D) normalised states → the codes that stand for them, discrete forward and soft
backward (straight-through Gumbel-softmax, arXiv 1611.01144).

Stage g reads what the stages before it left, `r = x − Σ_{j<g} hard_j` (residual quantisation, arXiv
2107.03312)."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from sememe.concepts.codebook import ConceptEmbedding


class Quantised(NamedTuple):
    """Normalised states and their codes; the last three are None without the softmax."""

    state_nD: Tensor  # its value is hard_nD, its gradient that of the softmax's mixture
    hard_nD: Tensor
    ids_n: Tensor
    soft_nD: Tensor | None = None  # sum of the stages' mixtures, no gradient
    entropy: Tensor | None = None  # nats per concept: mean over the states, sum over the stages
    max_prob: Tensor | None = None  # largest probability: mean over the states and stages


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
    state_nD = hard_nD = soft_nD = torch.zeros_like(x_nD)
    entropy = max_prob = x_nD.new_zeros(())
    digits = []
    for g in range(codes.codes_per_concept):
        table_KD = codes.table(g)
        logits_nK = head.code_logits(x_nD - hard_nD.detach(), table_KD, g)
        if gumbel > 0:
            logits_nK = logits_nK + gumbel * gumbel_like(logits_nK)
        digit_n = logits_nK.argmax(-1)
        digits.append(digit_n)
        code_nD = table_KD[digit_n]
        hard_nD = hard_nD + code_nD
        if not soft:
            continue
        logits_nK = logits_nK if temperature == 1 else logits_nK / temperature
        p_nK = torch.softmax(logits_nK, -1)
        mixture_nD = p_nK @ table_KD
        # Written the other way round the forward value would not be exact in fp32.
        state_nD = state_nD + code_nD.detach() + (mixture_nD - mixture_nD.detach())
        soft_nD = soft_nD + mixture_nD.detach()
        entropy_n, surest_n = _entropy(p_nK.detach(), logits_nK.detach(), digit_n)
        entropy = entropy + entropy_n.sum() / max(len(x_nD), 1)
        max_prob = max_prob + surest_n.sum() / max(len(x_nD), 1) / codes.codes_per_concept
        # Two stages of them are never alive at once, but for what the backward keeps.
        del logits_nK, p_nK
    ids_n = codes.combine(torch.stack(digits, -1))
    if not soft:
        return Quantised(hard_nD, hard_nD.detach(), ids_n)
    return Quantised(state_nD, hard_nD.detach(), ids_n, soft_nD, entropy, max_prob)


def _entropy(p_nK: Tensor, logits_nK: Tensor, digit_n: Tensor) -> tuple[Tensor, Tensor]:
    """(n,) entropies in nats of the softmax of `logits_nK`, which is `p_nK`, and (n,) probabilities
    of the digits.

    -Σ p log p with log p = logit - (logit - log p of the digit): it needs no log of every
    probability, among them zeros, and the dot product makes no further (n, K)."""
    surest_n, top_n = (x.gather(-1, digit_n.unsqueeze(-1)).squeeze(-1) for x in (p_nK, logits_nK))
    dot_n = torch.bmm(p_nK.unsqueeze(1), logits_nK.unsqueeze(2)).flatten()
    return top_n - surest_n.log() - dot_n, surest_n


def gumbel_like(logits: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Standard Gumbel noise of the same shape: argmax(logits + noise) is a sample of
    softmax(logits)."""
    return -torch.empty_like(logits).exponential_(generator=generator).log()
