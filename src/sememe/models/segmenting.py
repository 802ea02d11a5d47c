"""Segmenting: a compressor that writes concepts one after another, each as long as it likes
(boundary: autoregressive).

    BOS x ─ adapter "compressor" ─┬─ news of each token ─────────(+)─ code ─ e
                                  └─ [slot 1, slot 2, …] ─ state ─┴─ log p(n): how many tokens the concept covers

A slot stands behind the text, at the place of the first token that no concept covers yet, and is
told that token and the code before. It sees all of the text and all slots before. In training a
first pass without gradient draws lengths and codes step by step, and a second one gives all slots
their states at once, with gradient. Suffixes as in `concepts`; S = 1 + T counts the BOS; here C
counts slots, N lengths, and K = S + C keys."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache

from sememe.backbone.split import Rope, Spine
from sememe.concepts.gate import GateState
from sememe.concepts.lengths import REMEMBERED, Lengths
from sememe.concepts.masks import allow
from sememe.concepts.quantise import quantise
from sememe.concepts.segments import packing
from sememe.models.writing import Reading, Step


class Segmenter(nn.Module):
    """What slots read and say beside the base: the code before, lengths, and what is added to a
    segment's news.

    States come in with norm 1, so that a step of the optimizer moves all of it by a share that does
    not grow with the width."""

    def __init__(self, width: int, longest: int, rate: float):
        super().__init__()
        self.before = nn.Parameter(torch.zeros(width, width))
        self.more = nn.Parameter(torch.zeros(width, width))
        self.lengths = Lengths(width, longest, rate)
        self.generator: torch.Generator | None = (
            None  # where there is one, lengths are drawn with it
        )

    def told(self, x: Tensor) -> Tensor:
        """(…, D) normalised codes → (…, D), to be added to embeddings."""
        return F.linear(x.float() / x.shape[-1] ** 0.5, self.before.float())

    def adds(self, state: Tensor) -> Tensor:
        """(…, D) slots' states → (…, D) normalised, to be added to their segments' news."""
        return F.linear(state, self.more.float())


@dataclass
class Segmented(Reading):
    """And how each slot came to its segment."""

    log_p_BCN: Tensor
    rest_BC: Tensor  # tokens that were left
    length_BC: Tensor


@dataclass
class Slots:
    """What the pass step by step wrote."""

    seen_BSD: Tensor  # states of the text
    cursor_BC: Tensor  # first token not covered; behind the text where the row had ended
    length_BC: Tensor
    code_BCD: Tensor  # the code before each slot, normalised; 0 ahead of the first
    state_BCD: Tensor


class Segmenting:
    """Mixin of the compressor, ahead of `Writing`. Without a `segmenter` nothing changes."""

    def _read(self, h_BSD: Tensor | None, step: Step) -> Reading:
        """Which tokens end a segment and what the codes are read from. A segmenter reads the text
        anew, and not `h_BSD`."""
        if self.segmenter is None:
            return super()._read(h_BSD, step)
        spine, learns = Spine(self.backbone), torch.is_grad_enabled()
        with self.compressing():
            slots = self._step_by_step(
                spine, step, (self.training and learns) or self.segmenter.generator is not None
            )
            rest_BC = step.valid_BT.sum(1, keepdim=True) - slots.cursor_BC
            seen_BSD, state_BCD = (
                self._at_once(spine, step, slots, rest_BC > 0)
                if learns
                else (slots.seen_BSD, slots.state_BCD)
            )
        last_BC = torch.where(rest_BC > 0, slots.cursor_BC + slots.length_BC - 1, 0)
        written_BS = torch.zeros_like(step.valid_BT).scatter(
            1, F.pad(last_BC, (1, 0)), True
        )  # the BOS writes, as everywhere
        pack = packing(written_BS)
        with torch.autocast(step.embed_BTD.device.type, enabled=False):
            h_BCD, word_BCF, _ = self._segments(
                None, self._news(step.embed_BTD, seen_BSD), None, written_BS, pack, step, None
            )
            more_BCD = self.codes.scale.float() * F.pad(
                self.segmenter.adds(state_BCD), (0, 0, 1, 0)
            )
            h_BCD = self.marked(h_BCD + more_BCD, F.pad(slots.length_BC, (1, 0), value=1))
            log_p_BCN = self.segmenter.lengths(state_BCD)
        return Segmented(
            written_BT=written_BS,
            margin_BT=torch.zeros_like(written_BS, dtype=h_BCD.dtype),
            pack=pack,
            coded_BC=pack.valid_BC & (pack.index_BC > 0),
            h_BCD=h_BCD,
            word_BCF=word_BCF,
            state=GateState.start(len(written_BS)),
            open_segment=None,
            log_p_BCN=log_p_BCN,
            rest_BC=rest_BC,
            length_BC=slots.length_BC,
        )

    @torch.no_grad()
    def _step_by_step(self, spine: Spine, step: Step, draw: bool) -> Slots:
        """The text, and then slot after slot until every row's text is covered; cached, without
        dropout."""
        was_training = self.training
        self.eval()
        cache, codes, segmenter = DynamicCache(), self.codes, self.segmenter
        seen_BSD = self._contextual(spine, step.embed_BTD, step, cache)
        with torch.autocast(seen_BSD.device.type, enabled=False):
            news_BSD = self._news(step.embed_BTD, seen_BSD)
        total_B = step.valid_BT.sum(1) - 1
        cursor_B, code_BD, kept = torch.ones_like(total_B), torch.zeros_like(seen_BSD[:, 0]), []
        place_BK, valid_BK = step.position_BT, step.valid_BT
        place_N, row_B = (
            torch.arange(n, device=total_B.device) for n in (self.config.max_tail + 1, len(total_B))
        )
        tilt = 0.0 if draw else segmenter.lengths.tilt(self.dial.rate)
        while bool((cursor_B <= total_B).any()):
            at_B1 = _inside(cursor_B, step).unsqueeze(1)
            place_BK, valid_BK = (
                torch.cat([place_BK, at_B1], 1),
                F.pad(valid_BK, (0, 1), value=True),
            )
            x_B1D = self._slots(step.embed_BTD, at_B1, code_BD.unsqueeze(1))
            h_B1D = self._normed(
                spine,
                x_B1D,
                at_B1,
                _rope_at(step.rope, at_B1),
                self._sees(place_BK, valid_BK, 1),
                cache,
            )
            state_BD = F.normalize(h_B1D[:, 0], dim=-1)
            with torch.autocast(state_BD.device.type, enabled=False):
                n_B = self._length(
                    segmenter.lengths(state_BD), cursor_B, total_B, len(kept), tilt, draw
                )
                kept.append((cursor_B, n_B, code_BD, state_BD))
                row_B1, at_BN = row_B.unsqueeze(1), _inside(at_B1 + place_N, step)
                said_BND = self.said(
                    news_BSD[row_B1, at_BN], step.ids_BT[row_B1, at_BN], place_N, n_B.unsqueeze(1)
                )
                h_BD = (said_BND * (place_N < n_B.unsqueeze(1)).unsqueeze(-1)).sum(1)
                code_BD = self._code(
                    self.marked(h_BD + codes.scale.float() * segmenter.adds(state_BD), n_B)
                )
            cursor_B = torch.where(cursor_B <= total_B, cursor_B + n_B, cursor_B)
        self.train(was_training)
        # or weights cast here, without gradient, would be taken for the next pass (pytorch 112583)
        torch.clear_autocast_cache()
        none = (cursor_B, cursor_B, code_BD, code_BD)
        return Slots(
            seen_BSD,
            *(torch.stack(x, 1)[:, : len(kept)] for x in zip(*(kept or [none]), strict=True)),
        )

    def _length(
        self,
        log_p_BN: Tensor,
        cursor_B: Tensor,
        total_B: Tensor,
        written: int,
        tilt: float,
        draw: bool,
    ) -> Tensor:
        """(B,) tokens that the next concept covers. Rows that have ended cover another one, which
        nobody reads."""
        lengths, rest_B = self.segmenter.lengths, (total_B + 1 - cursor_B).clamp(min=1)
        if self.dial.rate >= 1:
            return torch.ones_like(cursor_B)
        if draw:
            return lengths.draw(log_p_BN, rest_B, self.segmenter.generator)
        return lengths.choose(log_p_BN, rest_B, total_B, written, self.dial.rate, tilt)

    def _at_once(
        self, spine: Spine, step: Step, slots: Slots, real_BC: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(B, S, D) states of the text and (B, C, D) of its slots, given their codes: one forward,
        with gradient."""
        at_BC = _inside(slots.cursor_BC, step)
        x_BKD = torch.cat([step.embed_BTD, self._slots(step.embed_BTD, at_BC, slots.code_BCD)], 1)
        place_BK, valid_BK = (
            torch.cat([step.position_BT, at_BC], 1),
            torch.cat([step.valid_BT, real_BC], 1),
        )
        mask = self._sees(place_BK, valid_BK, place_BK.shape[1])
        h_BKD = self._normed(spine, x_BKD, place_BK, _rope_at(step.rope, place_BK), mask)
        seen_BSD, slot_BCD = h_BKD.split([step.embed_BTD.shape[1], at_BC.shape[1]], 1)
        return seen_BSD, F.normalize(slot_BCD, dim=-1)

    def _slots(self, embed_BSD: Tensor, at_BC: Tensor, code_BCD: Tensor) -> Tensor:
        """(B, C, D) inputs: the first token that is not covered, and the code before."""
        token_BCD = embed_BSD.gather(1, at_BC.unsqueeze(-1).expand(-1, -1, embed_BSD.shape[-1]))
        return token_BCD + self.segmenter.told(code_BCD).to(token_BCD.dtype)

    def _code(self, h_BD: Tensor) -> Tensor:
        """(B, D) states for the codes → what the decompressor would read of them, normalised."""
        x_BD, share = self.codes.normalise(h_BD), self.dial.quantise
        if share == 0:
            return x_BD
        return x_BD + share * (quantise(self.codes, self.head, x_BD, soft=False).hard_nD - x_BD)

    def _sees(
        self, place_BK: Tensor, valid_BK: Tensor, queries: int
    ) -> Callable[[int | None], Tensor | None]:
        """The last `queries` of K entries see those before them that are real. A sliding window
        goes by places in the text, to both sides: in the order of entries a slot would see the
        text's end, wherever it stands."""
        attention, keys = self.backbone.config._attn_implementation, place_BK.shape[1]
        whole, furthest = bool(valid_BK.all()), int(place_BK.max())

        def make(window: int | None) -> Tensor | None:
            if whole and attention == "sdpa" and (window is None or furthest < window):
                return None
            at_K = torch.arange(keys, device=place_BK.device)
            allowed = (at_K <= at_K[keys - queries :, None]) & valid_BK[:, None, :]
            if window is not None:
                allowed = allowed & (
                    (place_BK[:, keys - queries :, None] - place_BK[:, None, :]).abs() < window
                )
            return allow(
                (allowed | ~valid_BK[:, keys - queries :, None]).unsqueeze(1), self.dtype, attention
            )

        return make

    def _length_term(self, read: Segmented, rank_BT: Tensor, nll_BT: Tensor) -> Tensor | float:
        """What the lengths learn from what their segments cost, nats; moves the price."""
        rate, real_BC = self.dial.rate, read.rest_BC > 0
        if rate >= 1 or not bool(real_BC.any()):
            return 0.0
        nats_BC = torch.zeros_like(read.rest_BC[:, :1], dtype=nll_BT.dtype).repeat(
            1, real_BC.shape[1] + 1
        )
        nats_BC = nats_BC.scatter_add(1, rank_BT, nll_BT.detach())[:, 1:]
        lengths = self.segmenter.lengths
        term = lengths.learn(
            *(x[real_BC] for x in (read.log_p_BCN, read.rest_BC, read.length_BC, nats_BC)), rate
        )
        lengths.hold(rate)
        return term

    @contextlib.contextmanager
    def drawing(self, seed: int) -> Iterator[None]:
        """Lengths inside are drawn, as in training. What is started there is for segments that
        differ, and at first the likeliest lengths are all the same."""
        if self.segmenter is not None:
            self.segmenter.generator = torch.Generator(self.device).manual_seed(seed)
        yield
        if self.segmenter is not None:
            self.segmenter.generator = None

    @torch.no_grad()
    def start_codes(self, ids_NT: Tensor, seed: int = 0) -> dict[str, float]:
        """As every model that writes concepts."""
        with self.drawing(seed):
            return super().start_codes(ids_NT, seed)

    @torch.no_grad()
    def calibrate_gate(self, ids_NT: Tensor) -> None:
        """As every model that writes concepts; lengths are remembered as they are in use."""
        super().calibrate_gate(ids_NT)
        if self.segmenter is not None:
            blocks = 1 + int(REMEMBERED / self.dial.rate) // ids_NT.shape[1]
            reads = [self._read(None, step) for step, _ in self._shallow_batches(ids_NT[:blocks])]
            self.segmenter.lengths.remember(
                torch.cat([read.log_p_BCN[read.rest_BC > 0] for read in reads])
            )


def _inside(at: Tensor, step: Step) -> Tensor:
    """Places in the text, for slots that stand behind it."""
    return at.clamp(max=step.embed_BTD.shape[1] - 1)


def _rope_at(rope: Rope, at_BC: Tensor) -> Rope:
    """That of the text at these places: some kinds of rope choose their base by the largest place
    that they see."""

    def pick(x: Tensor) -> Tensor:
        return x.expand(len(at_BC), -1, -1).gather(
            1, at_BC.unsqueeze(-1).expand(-1, -1, x.shape[-1])
        )

    return {kind: tuple(pick(x) for x in pair) for kind, pair in rope.items()}
