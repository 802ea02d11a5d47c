"""Beams: the likeliest texts so far of each row, while all rows are written one token at a time.

B counts rows, n beams of all rows together, k ways that a beam may go on, m = n · k; V words. A row
has as many beams as are worth their time: where one text is far ahead of the others, they are
dropped."""

import torch
from torch import Tensor

NOTHING = -1  # behind a row's end
# nats behind its row's best beam at which one is given up: half the time, the same texts
# (docs/log.md)
MARGIN = 8.0


class Beams:
    """Beam search without lengths: what is written is as long for all beams of a row, so that sums
    of scores can be compared."""

    def __init__(self, rows: int, first: int, device):
        self.row_n = torch.arange(rows, device=device)
        self.token_n = torch.full_like(self.row_n, first)
        self.score_n = torch.zeros(rows, device=device)
        self.text_nS = torch.zeros(rows, 0, dtype=torch.long, device=device)

    def go_on(
        self, score_nV: Tensor, open_B: Tensor, most: int, margin: float = MARGIN
    ) -> Tensor | None:
        """Writes one more token to each row that is `open_B` and keeps of its beams the `most` best
        by the sums of their (n, V) scores, none of them more than `margin` behind the best; a row
        that has ended keeps that one. Returns (n,) which beam each went on from, None where all
        went on as they were."""
        top_nk, token_nk = score_nV.topk(min(most, score_nV.shape[-1]), -1)
        open_n = open_B[self.row_n]
        top_nk = top_nk.masked_fill(~open_n[:, None], -torch.inf)
        top_nk[:, 0].masked_fill_(~open_n, 0.0)
        score_m = (self.score_n[:, None] + top_nk).flatten()
        came_m = torch.arange(len(self.row_n), device=score_m.device).repeat_interleave(
            top_nk.shape[1]
        )
        best_m = score_m.argsort(descending=True, stable=True)
        best_m = best_m[
            self.row_n[came_m[best_m]].argsort(stable=True)
        ]  # row by row, each from its best on
        row_m, score_m = self.row_n[came_m[best_m]], score_m[best_m]
        first_B = torch.searchsorted(row_m, torch.arange(len(open_B), device=row_m.device))
        rank_m = torch.arange(len(row_m), device=row_m.device) - first_B[row_m]
        kept_m = (
            (rank_m < most)
            & (score_m >= score_m[first_B[row_m]] - margin)
            & (open_B[row_m] | (rank_m == 0))
        )
        pick_n, came_n = best_m[kept_m], came_m[best_m[kept_m]]
        self.row_n, self.score_n, open_n = row_m[kept_m], score_m[kept_m], open_B[row_m[kept_m]]
        self.token_n = torch.where(open_n, token_nk.flatten()[pick_n], 0)
        written_n1 = torch.where(open_n, self.token_n, NOTHING).unsqueeze(-1)
        self.text_nS = torch.cat([self.text_nS[came_n], written_n1], -1)
        return None if most == 1 else came_n

    def best(self) -> list[list[int]]:
        """Each row's likeliest text."""
        first_B = torch.searchsorted(
            self.row_n, torch.arange(int(self.row_n[-1]) + 1, device=self.row_n.device)
        )
        return [row[row != NOTHING].tolist() for row in self.text_nS[first_B]]
