"""(n, V) logits → the next token of each row, drawn by the row's own settings.

The uniform number of a draw is a hash of the request's seed and the place in the text, so a seeded
request says the same alone, in company and after a restart."""

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from sememe.engine.requests import Request, Sampling, TokenLogprob

NEARBY = (
    1024  # likeliest tokens among which top_p is looked for first: a whole sort costs five times
)


def uniform(seed: int, place: int) -> float:
    """In [0, 1)."""
    return float(np.random.Generator(np.random.Philox(key=seed, counter=place)).random())


def choose(
    logits_nV: Tensor, requests: Sequence[Request], written: Sequence[Sequence[int]]
) -> list[int]:
    """The next token of each row. `written`: the new tokens that each has so far."""
    logits_nV = logits_nV.float()
    pairs = zip(logits_nV, requests, written, strict=True)
    rows = [adjusted(row_V, request.sampling, Counter(new)) for row_V, request, new in pairs]
    # Greedy rows together: one kernel for all of them.
    tokens = torch.stack(rows).argmax(-1).tolist()
    for n, (row_V, request, new) in enumerate(zip(rows, requests, written, strict=True)):
        if request.sampling.temperature > 0:
            place = len(request.prompt) + len(new)
            tokens[n] = draw(row_V, request.sampling, uniform(request.sampling.seed, place))
    return tokens


def adjusted(logits_V: Tensor, sampling: Sampling, counts: Mapping[int, int]) -> Tensor:
    """With bias and penalties."""
    changes = Counter(sampling.logit_bias)
    if sampling.presence_penalty or sampling.frequency_penalty:
        for token, count in counts.items():
            changes[token] -= sampling.presence_penalty + count * sampling.frequency_penalty
    if not changes:
        return logits_V
    index = torch.tensor(list(changes), device=logits_V.device)
    return logits_V.index_add(0, index, logits_V.new_tensor(list(changes.values())))


def draw(logits_V: Tensor, sampling: Sampling, uniform: float) -> int:
    """One token, by the inverse of the cumulated probabilities."""
    # Less than the largest logit, so that a small temperature does not overflow.
    p_V = torch.softmax((logits_V - logits_V.max()) / sampling.temperature, -1)
    token_n = None
    if sampling.top_k or sampling.top_p < 1:
        p_V, token_n = likeliest(p_V, sampling)
    total_V = p_V.cumsum(-1, dtype=torch.float64)
    place = torch.searchsorted(total_V, uniform * total_V[-1], right=True)
    place = int(place.clamp(max=len(total_V) - 1))
    return place if token_n is None else int(token_n[place])


def likeliest(p_V: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Probabilities and ids of the tokens that top_k and top_p leave, the likeliest first."""
    count = min(sampling.top_k or len(p_V), len(p_V))
    p_n, token_n = p_V.topk(min(count, NEARBY))
    if len(p_n) < count and (sampling.top_p == 1 or p_n.sum() < sampling.top_p):
        p_n, token_n = p_V.topk(count)
    # Of the k likeliest; a token stays if those before it do not reach top_p yet.
    whole = p_n.sum() if sampling.top_k else p_n.new_ones(())
    stays = p_n.cumsum(-1) - p_n < sampling.top_p * whole
    stays[0] = True
    return p_n[stays], token_n[stays]


def logprobs(logits_nV: Tensor, tokens: Sequence[int], top: int) -> list[TokenLogprob]:
    """Of these tokens, one a row, and of the `top` likeliest."""
    log_p_nV = logits_nV.float().log_softmax(-1)
    index_n1 = torch.tensor(tokens, device=log_p_nV.device)[:, None]
    own = log_p_nV.gather(-1, index_n1)[:, 0].tolist()
    value_nt, token_nt = (x.tolist() for x in log_p_nV.topk(top))
    beside = [tuple(zip(*pair, strict=True)) for pair in zip(token_nt, value_nt, strict=True)]
    return [TokenLogprob(*of) for of in zip(tokens, own, beside, strict=True)]
