"""Segments of any length: a compressor that writes concepts one after another, each as long as it
likes (boundary: autoregressive).

    BOS x ─ adapter "compressor" ─┬─ what each token says ───────(+)─ code ─ e
                                  └─ [slot 1, slot 2, …] ─ state ─┴─ log p(n): tokens it covers

A slot comes after the text, at the position of the first token that no concept covers yet, and is
given that token and the code before. It sees all of the text and all slots before. In training a
first pass without gradient draws lengths and codes step by step, and a second one computes all
slots at once, with gradient (`encode.py`). Suffixes as in `concepts`; S = 1 + T counts the BOS;
here C counts slots, N lengths, and K = S + C entries."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sememe.concepts.lengths import Lengths
from sememe.concepts.segments import Chunk


@dataclass
class Slots:
    """What the pass step by step wrote."""

    cursor_BC: Tensor
    """The first token that was not covered; after the text where the row had ended."""
    rest_BC: Tensor
    """Tokens that were left there; 0 where the row had ended."""
    length_BC: Tensor
    code_BCD: Tensor
    """The code before each slot, normalised; 0 before the first."""
    state_BCD: Tensor


class Segmenter(nn.Module):
    """What slots read and say beside the base: the code before, lengths, and what is added to a
    segment's state.

    States come in with norm 1, so that a step of the optimizer moves all of it by a share that does
    not grow with the width."""

    def __init__(self, width: int, longest: int, rate: float):
        super().__init__()
        self.before = nn.Parameter(torch.zeros(width, width))
        self.more = nn.Parameter(torch.zeros(width, width))
        self.lengths = Lengths(width, longest, rate)

    def inputs(self, text: Chunk, cursor_BC: Tensor, code_BCD: Tensor) -> tuple[Tensor, Tensor]:
        """(B, C, D) of slots: the first token that is not covered, and the code before; and their
        (B, C) positions. After the text both are those of its end."""
        index_BC = cursor_BC.clamp(max=text.ids_BT.shape[1] - 1)
        token_BCD = text.embed_BTD.take_along_dim(index_BC.unsqueeze(-1), 1)
        code_BCD = code_BCD / code_BCD.shape[-1] ** 0.5
        x_BCD = token_BCD + F.linear(code_BCD, self.before.float()).to(token_BCD.dtype)
        return x_BCD, text.position_BT.gather(1, index_BC)

    def length_loss(self, slots: Slots, rank_BT: Tensor, nll_BT: Tensor, rate: float) -> Tensor:
        """What lengths learn from what their segments cost; `rank_BT`: which segment, from 1, each
        token is in."""
        real_BC = slots.rest_BC > 0
        nats_BC = nll_BT.new_zeros(len(nll_BT), 1 + slots.rest_BC.shape[1])
        nats_BC = nats_BC.scatter_add(1, rank_BT, nll_BT.detach())[:, 1:]
        log_p_sN = self.lengths(slots.state_BCD[real_BC])
        parts = (x[real_BC] for x in (slots.rest_BC, slots.length_BC, nats_BC))
        return self.lengths.learn(log_p_sN, *parts, rate)
