"""Beam search over many rows at once, all of which are written one token at a time.

B counts rows, n the beams of all rows together, W those of one at most, k the ways that a beam may
go on; V words, S tokens with the first. A row has only as many beams as are worth their time: where
one text is far likelier than the others, they are dropped."""

from collections.abc import Callable

import torch
from torch import Tensor

# Nats below the best beam at which one is dropped: half the time, the same texts (docs/log.md).
MARGIN = 8.0


def beam_search(
    score: Callable[[Tensor, Tensor, Tensor], Tensor],
    total_B: Tensor,
    first: int,
    width: int,
    margin: float = MARGIN,
) -> list[list[int]]:
    """The likeliest texts of `total_B` tokens that a search with so many beams finds. All beams of
    a row are equally long, so that sums of their scores can be compared.

    Args:
        score: (n,) rows, (n, S) texts, and (n,) which of the beams before each extends → (n, V)
            what each word adds.
        first: token that all texts begin with."""
    parent_n = row_n = torch.arange(len(total_B), device=total_B.device)
    rank_n = torch.zeros_like(row_n)  # among the beams of its row, the best first
    sum_n = torch.zeros(len(row_n), device=row_n.device)
    text_nS = torch.full((len(row_n), 1), first, device=row_n.device)
    totals = total_B.tolist()
    for step in range(max(totals, default=0)):
        score_nV = score(row_n, text_nS, parent_n)
        # A row that has ended goes on in one way, with its best beam, at no cost.
        ended_n = total_B[row_n] <= step
        score_nV[ended_n] = -torch.inf
        score_nV[ended_n & (rank_n == 0), 0] = 0.0
        sum_nk, token_nk = (sum_n[:, None] + score_nV).topk(min(width, score_nV.shape[1]))
        ways = sum_nk.shape[1]
        sum_BWk = sum_nk.new_full((len(totals), width, ways), -torch.inf)
        sum_BWk[row_n, rank_n] = sum_nk
        sum_BW, way_BW = sum_BWk.flatten(1).topk(width)
        # Clamped, so that with any margin what is no beam at all is below it.
        keep_BW = sum_BW >= (sum_BW[:, :1] - margin).clamp(min=torch.finfo(sum_BW.dtype).min)
        new_row_n, rank_n = keep_BW.nonzero(as_tuple=True)
        sum_n, way_n = sum_BW[keep_BW], way_BW[keep_BW]
        parent_n = torch.searchsorted(row_n, new_row_n) + way_n // ways
        row_n, token_n = new_row_n, token_nk[parent_n, way_n % ways]
        text_nS = torch.cat([text_nS[parent_n], token_n[:, None]], 1)
    best = zip(text_nS[rank_n == 0, 1:].tolist(), totals, strict=True)
    return [text[:total] for text, total in best]
