"""Beams: the likeliest texts so far of each row, while all rows are written one token at a time.

B counts rows, w beams of a row, n = B · w beams in all, V words.
"""

import torch
from torch import Tensor

NOTHING = -1  # behind a row's end


class Beams:
    """Beam search without lengths: what is written is as long for all beams of a row, so that sums of scores can be compared."""

    def __init__(self, rows: int, first: int, device):
        self.token_Bw = torch.full((rows, 1), first, device=device)
        self.score_Bw = torch.zeros(rows, 1, device=device)
        self.text_BwS = torch.zeros(rows, 1, 0, dtype=torch.long, device=device)

    @property
    def width(self) -> int:
        return self.token_Bw.shape[1]

    def go_on(self, score_nV: Tensor, open_B: Tensor, most: int) -> Tensor | None:
        """Writes one more token to each row that is `open_B` and keeps its `most` best beams by the sums of their (n, V) scores.
        Returns (n,) which beam each went on from, None where all went on as they were."""
        rows, width = self.token_Bw.shape
        score_BwV = score_nV.view(rows, width, -1)
        each = min(most, score_BwV.shape[-1])
        top_Bwk, token_Bwk = score_BwV.topk(each, -1)
        shut_B11 = ~open_B[:, None, None]
        top_Bwk = top_Bwk.masked_fill(shut_B11, -torch.inf)
        top_Bwk[..., 0].masked_fill_(shut_B11[..., 0], 0.0)  # a row that has ended keeps its beams
        score_BK, pick_BK = (self.score_Bw.unsqueeze(-1) + top_Bwk).flatten(1).topk(min(most, width * each), -1)
        came_BK = pick_BK // each
        self.score_Bw = score_BK
        token_BK = token_Bwk.flatten(1).gather(1, pick_BK)
        self.token_Bw = torch.where(open_B[:, None], token_BK, token_BK.new_zeros(()))
        before_BKS = self.text_BwS.gather(1, came_BK.unsqueeze(-1).expand(-1, -1, self.text_BwS.shape[-1]))
        written_BK = torch.where(open_B[:, None], token_BK, NOTHING)
        self.text_BwS = torch.cat([before_BKS, written_BK.unsqueeze(-1)], -1)
        if most == 1:
            return None
        return (came_BK + torch.arange(rows, device=came_BK.device)[:, None] * width).flatten()

    def best(self) -> list[list[int]]:
        """Each row's likeliest text."""
        return [row[row != NOTHING].tolist() for row in self.text_BwS[:, 0]]
