"""Segments of any length: a compressor that writes concepts one after another, each as long as it
likes (boundary: autoregressive).

    BOS x ─ adapter "compressor" ─┬─ news of each token ─────────(+)─ code ─ e
                                  └─ [slot 1, slot 2, …] ─ state ─┴─ log p(n): tokens it covers

A slot comes after the text, at the position of the first token that no concept covers yet, and is
given that token and the code before. It sees all of the text and all slots before. In training a
first pass without gradient draws lengths and codes step by step, and a second one computes all
slots at once, with gradient. Suffixes as in `concepts`; S = 1 + T counts the BOS; here C counts
slots, N lengths, and K = S + C entries."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache

from sememe.concepts.lengths import Lengths
from sememe.concepts.segments import Chunk, Packing


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
        self.generator: torch.Generator | None = None
        """Where there is one, lengths are drawn with it even when the model is not trained."""

    def inputs(self, text: Chunk, pack: Packing, code_BCD: Tensor) -> Tensor:
        """(B, C, D) of slots: the first token that is not covered, and the code before."""
        token_BCD = pack.pack(text.embed_BTD)
        code_BCD = code_BCD.float() / code_BCD.shape[-1] ** 0.5
        return token_BCD + F.linear(code_BCD, self.before.float()).to(token_BCD.dtype)

    def addition(self, state: Tensor) -> Tensor:
        """(…, D) slots' states → (…, D) normalised, added to the states of their segments."""
        return F.linear(state, self.more.float())

    @torch.no_grad()
    def step_by_step(
        self,
        states_of: Callable[..., Tensor],
        code_of: Callable[[Tensor, Tensor, Tensor], Tensor],
        text: Chunk,
        cache: DynamicCache,
        rate: float,
        draw: bool,
    ) -> Slots:
        """Slot after slot until every row's text is covered.

        Args:
            states_of: new entries with a cache → their states.
            code_of: (B,) first tokens, (B,) lengths and (B, D) states → the code of a segment.
            cache: the text, read already."""
        total_B = text.valid_BT.sum(1) - 1
        cursor_B = torch.ones_like(total_B)
        code_BD = torch.zeros_like(text.embed_BTD[:, 0], dtype=torch.float32)
        position_BK, valid_BK = text.position_BT, text.valid_BT
        tilt = 0.0 if draw else self.lengths.tilt(rate)
        steps: list[tuple[Tensor, ...]] = []
        while bool((cursor_B <= total_B).any()) or not steps:
            pack = at(text, cursor_B.unsqueeze(1))
            position_B1, rope = text.packed(pack)
            position_BK = torch.cat([position_BK, position_B1], 1)
            valid_BK = F.pad(valid_BK, (0, 1), value=True)
            x_B1D = self.inputs(text, pack, code_BD.unsqueeze(1))
            h_B1D = states_of(x_B1D, position_BK, valid_BK, rope, cache)
            state_BD = F.normalize(h_B1D[:, 0], dim=-1)
            with torch.autocast(state_BD.device.type, enabled=False):
                log_p_BN = self.lengths(state_BD)
                # A row that has ended covers one more token, which nobody reads.
                rest_B = (total_B + 1 - cursor_B).clamp(min=1)
                if rate >= 1:
                    length_B = torch.ones_like(cursor_B)
                elif draw:
                    length_B = self.lengths.draw(log_p_BN, rest_B, self.generator)
                else:
                    length_B = self.lengths.choose(
                        log_p_BN, rest_B, total_B, len(steps), rate, tilt
                    )
                left_B = (total_B + 1 - cursor_B).clamp(min=0)
                steps.append((cursor_B, left_B, length_B, code_BD, state_BD))
                code_BD = code_of(cursor_B, length_B, state_BD)
            cursor_B = torch.where(cursor_B <= total_B, cursor_B + length_B, cursor_B)
        return Slots(*(torch.stack(x, 1) for x in zip(*steps, strict=True)))

    def at_once(
        self, states_of: Callable[..., Tensor], text: Chunk, slots: Slots
    ) -> tuple[Tensor, Tensor]:
        """(B, S, D) states of the text and (B, C, D) of its slots, given their codes: one forward,
        with gradient."""
        pack = at(text, slots.cursor_BC)
        order_BS = torch.arange(text.ids_BT.shape[1], device=pack.index_BC.device).expand_as(
            text.ids_BT
        )
        x_BKD = torch.cat([text.embed_BTD, self.inputs(text, pack, slots.code_BCD)], 1)
        position_BK, rope = text.packed(at(text, torch.cat([order_BS, pack.index_BC], 1)))
        valid_BK = torch.cat([text.valid_BT, slots.rest_BC > 0], 1)
        h_BKD = states_of(x_BKD, position_BK, valid_BK, rope)
        h_BSD, slot_BCD = h_BKD.split([order_BS.shape[1], pack.index_BC.shape[1]], 1)
        return h_BSD, F.normalize(slot_BCD, dim=-1)

    def length_loss(self, slots: Slots, rank_BT: Tensor, nll_BT: Tensor, rate: float) -> Tensor:
        """What lengths learn from what their segments cost; `rank_BT`: which segment, from 1, each
        token is in."""
        real_BC = slots.rest_BC > 0
        if rate >= 1 or not bool(real_BC.any()):
            return nll_BT.new_zeros(())
        nats_BC = nll_BT.new_zeros(len(nll_BT), 1 + slots.rest_BC.shape[1])
        nats_BC = nats_BC.scatter_add(1, rank_BT, nll_BT.detach())[:, 1:]
        log_p_sN = self.lengths(slots.state_BCD[real_BC])
        parts = (x[real_BC] for x in (slots.rest_BC, slots.length_BC, nats_BC))
        return self.lengths.learn(log_p_sN, *parts, rate)


def at(text: Chunk, index_BC: Tensor) -> Packing:
    """Tokens of a text by their indices; those after it are taken back to its end."""
    return Packing(index_BC.clamp(max=text.ids_BT.shape[1] - 1), None)
