"""Beam search over many rows at once: the likeliest texts so far of each row, while all rows are
written one token at a time.

B counts rows, n beams of all rows together, k ways that a beam may go on, m = n · k; V words, S
tokens written. A row has only as many beams as are worth their time: where one text is far likelier
than the others, they are dropped."""

import torch
import torch.nn.functional as F
from torch import Tensor

ENDED = -1  # in place of a token, after a row's end
# Nats below the best beam at which one is dropped: half the time, the same texts (docs/log.md).
MARGIN = 8.0


class Beams:
    """Beam search without lengths: all beams of a row are equally long, so that sums of their
    scores can be compared."""

    def __init__(self, rows: int, first_token: int, device: torch.device | str):
        self.row_n = torch.arange(rows, device=device)
        self.token_n = torch.full_like(self.row_n, first_token)
        self.score_n = torch.zeros(rows, device=device)
        self.text_nS = self.row_n.new_zeros(rows, 0)

    def extend(
        self, score_nV: Tensor, open_B: Tensor, width: int, margin: float = MARGIN
    ) -> Tensor:
        """Writes one more token to each row that is `open_B` and keeps its `width` best beams by
        the sums of their (n, V) scores, none more than `margin` below the best; a row that has
        ended keeps its best one. Returns (n,) which beam each extends."""
        top_nk, token_nk = score_nV.topk(min(width, score_nV.shape[-1]), -1)
        # A row that has ended goes on in one way, at no cost.
        ended_n = ~open_B[self.row_n]
        top_nk = top_nk.masked_fill(ended_n[:, None], -torch.inf)
        top_nk[:, 0].masked_fill_(ended_n, 0.0)
        score_m = (self.score_n[:, None] + top_nk).flatten()
        row_m = self.row_n.repeat_interleave(top_nk.shape[1])
        # Row by row, each from its best on.
        order_m = score_m.argsort(descending=True, stable=True)
        order_m = order_m[row_m[order_m].argsort(stable=True)]
        score_m, row_m = score_m[order_m], row_m[order_m]
        first_B = torch.searchsorted(row_m, torch.arange(len(open_B), device=row_m.device))
        rank_m = torch.arange(len(row_m), device=row_m.device) - first_B[row_m]
        keep_m = (rank_m < torch.where(open_B, width, 1)[row_m]) & (
            score_m >= score_m[first_B[row_m]] - margin
        )
        parent_n = order_m[keep_m] // top_nk.shape[1]
        token_n = token_nk.flatten()[order_m[keep_m]]
        self.row_n = row_m[keep_m]
        self.score_n = score_m[keep_m]
        open_n = open_B[self.row_n]
        self.token_n = torch.where(open_n, token_n, 0)
        new_n1 = torch.where(open_n, token_n, ENDED).unsqueeze(-1)
        self.text_nS = torch.cat([self.text_nS[parent_n], new_n1], -1)
        return parent_n

    def best(self) -> list[list[int]]:
        """Each row's likeliest text."""
        first_n = F.pad(self.row_n.diff(), (1, 0), value=1) > 0
        return [text[text != ENDED].tolist() for text in self.text_nS[first_n]]
