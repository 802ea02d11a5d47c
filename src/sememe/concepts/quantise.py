"""Quantisation: (n, D) normalised states → the codes that stand for them, discrete forward and soft
backward.

Stage g reads what the stages before it left, `r = x − Σ_{j<g} hard_j` (residual quantisation, arXiv
2107.03312)."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from sememe.concepts.codebook import SHARPNESS, ConceptEmbedding

ESTIMATORS = ("soft", "identity")


class Quantised(NamedTuple):
    """What `quantise` found. States are normalised; the last four are None where nobody asked for
    them."""

    state_nD: Tensor  # its value is hard_nD, its gradient that of the estimator
    hard_nD: Tensor
    ids_n: Tensor
    soft_nD: Tensor | None = None  # sum of the stages' mixtures, no gradient
    entropy: Tensor | None = (
        None  # of the softmax, nats per concept: mean over the states, sum over the stages
    )
    max_prob: Tensor | None = None  # largest probability: mean over the states and stages
    term: Tensor | None = None  # to be added to the loss


def quantise(
    codes: ConceptEmbedding,
    head: nn.Module,
    x_nD: Tensor,
    *,
    temperature: float = 1.0,
    noise: float = 0.0,
    soft: bool = True,
    estimator: str = "soft",
    usage: float = 0.0,
    commitment: float = 0.0,
) -> Quantised:
    """The codes of (n, D) states, the likeliest of each stage. Memory: one (n, K) of probabilities
    a stage.

    Args:
        temperature: of the softmax that the gradient goes through.
        noise: scale of Gumbel noise on the logits; 0 for none.
        soft: False computes no softmax at all (evaluation): no gradient, entropy or usage term.
        estimator: `soft`: the gradient of the softmax's mixture (straight-through Gumbel-softmax,
            arXiv 1611.01144); `identity`: the state's own, with the codes drawn to the states by a
            term (VQ-VAE, arXiv 1711.00937).
        usage: weight of "each state sure of its code, all codes used evenly": mean entropy minus
            entropy of the mean. Keeps the logits beside the probabilities.
        commitment: weight of the squared distance, per coordinate, that draws states to their
            codes."""
    count, width = max(len(x_nD), 1), x_nD.shape[-1]
    state_nD = hard_nD = soft_nD = torch.zeros_like(x_nD)
    entropy = even = max_prob = x_nD.new_zeros(())
    digits = []
    for g in range(codes.codes_per_concept):
        table_KD = codes.table(g)
        logits_nK = head.code_logits(x_nD - hard_nD.detach(), table_KD, g)
        if noise > 0:
            logits_nK = logits_nK + noise * gumbel_like(logits_nK)
        digit_n = logits_nK.argmax(-1)
        digits.append(digit_n)
        code_nD = table_KD[digit_n]
        hard_nD = hard_nD + code_nD
        if soft:
            logits_nK = logits_nK if temperature == 1 else logits_nK / temperature
            p_nK = torch.softmax(logits_nK, -1)
            mixture_nD = p_nK @ table_KD
            # Written the other way round the forward value would not be exact in fp32.
            state_nD = state_nD + code_nD.detach() + (mixture_nD - mixture_nD.detach())
            soft_nD = soft_nD + mixture_nD.detach()
            with torch.set_grad_enabled(usage > 0 and torch.is_grad_enabled()):
                entropy_n, surest_n = _entropy(p_nK, logits_nK, digit_n)
                mean_K = (p_nK.sum(0) / count).clamp(min=1e-12)
                even = even - (mean_K * mean_K.log()).sum()
            entropy = entropy + entropy_n.sum() / count
            max_prob = max_prob + surest_n.detach().sum() / count / codes.codes_per_concept
            del (
                logits_nK,
                p_nK,
            )  # two stages of them are never alive at once, but for what the backward keeps
    terms = []
    if soft and usage > 0:
        terms.append(usage * (entropy - even))
    if estimator == "identity":
        state_nD = hard_nD.detach() + (
            x_nD - x_nD.detach()
        )  # x + (hard - x).detach(), with the exact value
        terms.append((hard_nD - x_nD.detach()).square().sum() / count / width)
    elif not soft:
        state_nD = hard_nD
    if commitment > 0:
        terms.append(commitment * (x_nD - hard_nD.detach()).square().sum() / count / width)
    found = Quantised(
        state_nD,
        hard_nD.detach(),
        codes.combine(torch.stack(digits, -1)),
        term=sum(terms) if terms else None,
    )
    return (
        found
        if not soft
        else found._replace(soft_nD=soft_nD, entropy=entropy.detach(), max_prob=max_prob)
    )


def _entropy(p_nK: Tensor, logits_nK: Tensor, digit_n: Tensor) -> tuple[Tensor, Tensor]:
    """(n,) entropies in nats of the softmax of `logits_nK`, which is `p_nK`, and (n,) probabilities
    of the digits.

    -Σ p log p with log p = logit - (logit - log p of the digit): it needs no log of every probability, among them zeros,
    and the dot product makes no further (n, K)."""
    surest_n, top_n = (x.gather(-1, digit_n.unsqueeze(-1)).squeeze(-1) for x in (p_nK, logits_nK))
    dot_n = torch.bmm(p_nK.unsqueeze(1), logits_nK.unsqueeze(2)).flatten()
    return top_n - surest_n.log() - dot_n, surest_n


def gumbel_like(logits: Tensor) -> Tensor:
    """Standard Gumbel noise of the same shape: argmax(logits + noise) is a sample of
    softmax(logits)."""
    return -torch.empty_like(logits).exponential_().log()


@torch.no_grad()
def revive(
    codes: ConceptEmbedding, head: nn.Module, x_ND: Tensor, floor: float, generator: torch.Generator
) -> Tensor:
    """Moves codes whose `use` is below `floor` to randomly chosen states of (N, D), in each stage
    to what the stages before left of them; the head's rows follow. Returns (G, K) bool: which codes
    moved.

    Deterministic for equal generators (on the CPU). With fewer states than such codes some of them
    stay."""
    revived_GK = torch.zeros_like(codes.use, dtype=torch.bool)
    r_ND = x_ND
    for g in range(codes.codes_per_concept):
        dead_n = (codes.use[g] < floor).nonzero().flatten()
        pick_n = torch.randperm(len(r_ND), generator=generator)[: len(dead_n)].to(r_ND.device)
        dead_n, code_nD = dead_n[: len(pick_n)], r_ND[pick_n]
        chosen_ND, top_N = _choose(codes, head, r_ND, g)
        if len(dead_n):
            away_N = (r_ND - chosen_ND).square().sum(1)
            sharpness = SHARPNESS / away_N.mean().clamp(min=1e-6)
            codes.set_rows(g, dead_n, code_nD)
            # At its own state a new code beats the one chosen so far by what a nearest-centroid
            # classifier would give it, wherever training has moved the other rows.
            head.start(
                g, code_nD, sharpness, dead_n, top_N[pick_n] + 0.5 * sharpness * away_N[pick_n]
            )
            codes.use[g, dead_n] = 1.0
            revived_GK[g, dead_n] = True
            chosen_ND, _ = _choose(codes, head, r_ND, g)
        r_ND = r_ND - chosen_ND
    return revived_GK


def _choose(
    codes: ConceptEmbedding, head: nn.Module, r_ND: Tensor, g: int, chunk: int = 4096
) -> tuple[Tensor, Tensor]:
    """(N, D) likeliest codes of stage g and (N,) their logits, in chunks that bound the memory."""
    table_KD = codes.table(g)
    top = [head.code_logits(part, table_KD, g).max(-1) for part in r_ND.split(chunk)]
    return table_KD[torch.cat([t.indices for t in top])], torch.cat([t.values for t in top])
