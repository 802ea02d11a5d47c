"""Between the slices of an online model: shallow states → what is written where, concept states,
tail states.

Suffixes as in `concepts`; n counts the coded concepts of a batch."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sememe.backbone.cache import ConceptCache
from sememe.backbone.split import Rope, Spine
from sememe.concepts.ablation import ablate
from sememe.concepts.gate import GateState
from sememe.concepts.masks import FLEX, Lane, allow, check_device, segment_blocks, segment_mask
from sememe.concepts.quantise import quantise
from sememe.concepts.segments import Packing, packing

NULL, UNQUANTISED = -1, -2  # in `concept_ids`, beside the ids 0 … K^G - 1


@dataclass
class Step:
    """What the slices of one forward share."""

    embed_BTD: Tensor
    position_BT: Tensor
    rope: Rope
    valid_BT: Tensor
    # no padding, nothing cached and a concept everywhere: ordinary causal attention throughout
    plain: bool
    padded: bool
    cache: ConceptCache | None
    written_before: np.ndarray  # (B,) concepts already in the cache
    ids_BT: Tensor | None = None  # where a text is read again by a compressor


@dataclass
class Reading:
    """What is written where, and what the codes are to be read from."""

    written_BT: Tensor
    margin_BT: Tensor  # score above the gate's threshold
    pack: Packing
    coded_BC: Tensor  # all concepts but the sink, which stays a state
    h_BCD: Tensor
    # embeddings of the tokens that an anchor reads: the writing one, with a pool the tail's mean
    # behind it
    word_BCF: Tensor
    state: GateState
    open_segment: tuple[Tensor, Tensor] | None


class Writing:
    """Mixin of the models that write concepts."""

    def _step(self, spine: Spine, h_BTD: Tensor, attention_mask, position_ids, cache) -> Step:
        batch, length = h_BTD.shape[:2]
        before = 0 if cache is None else cache.get_seq_length()
        if attention_mask is None or bool(attention_mask[:, -length:].all()):
            valid_BT = torch.ones(batch, length, dtype=torch.bool, device=h_BTD.device)
            padded = cache is not None and cache.padded
        else:
            valid_BT = attention_mask[:, -length:].bool().to(h_BTD.device)
            padded = True
        if cache is not None:
            cache.padded = padded
        if position_ids is None:
            position_BT = (valid_BT.cumsum(1) - 1).clamp(min=0)
            if cache is not None:
                position_BT = (
                    position_BT + torch.from_numpy(cache.gate_state.tokens).to(position_BT)[:, None]
                )
        else:
            position_BT = position_ids.to(h_BTD.device).expand(batch, length)
        plain = self.dial.rate >= 1 and not padded and before == 0
        written_before = np.zeros(batch, np.int64) if cache is None else cache.concepts
        return Step(
            h_BTD,
            position_BT,
            spine.rope(h_BTD, position_BT),
            valid_BT,
            plain,
            padded,
            cache,
            written_before,
        )

    def _mask(self, query: Lane, key: Lane, free: bool, recent: int | None = None):
        """Mask of one slice for each sliding window. `free`: plain causal, or a single query that
        may see all. `recent`: keys but the first of the text are seen for that many places only."""
        attention = self.backbone.config._attn_implementation
        check_device(attention, query.position.device)

        def make(window: int | None) -> Tensor | None:
            narrowest = min((w for w in (window, recent) if w is not None), default=None)
            if (
                free
                and attention == "sdpa"
                and (narrowest is None or int(key.position.max()) < narrowest)
            ):
                return None
            if attention == FLEX and query.position.shape[1] > 1:
                return segment_blocks(query, key, window, recent)
            return allow(segment_mask(query, key, window, recent), self.dtype, attention)

        return make

    def _previous(
        self, x_BTD: Tensor, cache: ConceptCache | None, valid_BT: Tensor | None = None
    ) -> Tensor:
        """(B, T, D) each position's neighbour to the left: with `valid_BT` the last one that is no
        padding."""
        first = (
            x_BTD[:, :1]
            if cache is None
            else self.codes.normalise(cache.last_hidden_BD).unsqueeze(1)
        )
        if valid_BT is None:
            return torch.cat([first, x_BTD[:, :-1]], 1)
        return past_padding(torch.cat([first, x_BTD], 1), valid_BT)[:, :-1]

    closes_last = False  # a text's last token always writes: nothing of it is left in an open tail

    def _read(self, h_BTD: Tensor, step: Step) -> Reading:
        """Which positions write, and (B, C, D) states for the codes: that of the writing position,
        with what its tail adds to it if there is a pool, or where scores accumulate the segment's
        states weighted by them.

        Training folds the scores into the gate's distribution."""
        dial, cache, gate = self.dial, step.cache, self.gate
        x_BTD = self.codes.normalise(h_BTD)
        with torch.autocast(x_BTD.device.type, enabled=False):
            before_BTD = self._previous(x_BTD, cache, step.valid_BT if step.padded else None)
            score_BT = gate.boundary.score(self.head, x_BTD, before_BTD)
        state = GateState.start(len(x_BTD)) if cache is None else cache.gate_state
        threshold = gate.threshold(dial.rate)[0]
        first_BT = step.valid_BT & (step.valid_BT.cumsum(1) == 1)
        if cache is not None:
            first_BT &= torch.from_numpy(state.tokens == 0).to(first_BT.device)[:, None]
        written_BT, state = gate(
            score_BT,
            step.valid_BT,
            rate=dial.rate,
            max_tail=self.config.max_tail,
            state=state,
        )
        if self.closes_last:
            written_BT |= step.valid_BT & (step.valid_BT.flip(1).cumsum(1).flip(1) == 1)
        if self.training and torch.is_grad_enabled():
            gate.track(score_BT[step.valid_BT & (step.position_BT > 0)])
        pack = packing(written_BT)
        coded_BC = pack.valid_BC & ~first_BT.gather(1, pack.index_BC)
        open_segment = None if cache is None else cache.open_segment
        h_BCD, word_BCF, open_segment = self._segments(
            x_BTD, h_BTD, score_BT, written_BT, pack, step, open_segment
        )
        return Reading(
            written_BT,
            score_BT - threshold,
            pack,
            coded_BC,
            h_BCD.to(h_BTD.dtype),
            word_BCF,
            state,
            open_segment,
        )

    def _segments(
        self,
        x_BTD: Tensor,
        h_BTD: Tensor,
        score_BT: Tensor,
        written_BT: Tensor,
        pack: Packing,
        step: Step,
        open_segment,
    ):
        """(B, C, D) states for the codes, (B, C, F) embeddings for an anchor, and what is left open
        for the next chunk."""
        if self.gate.boundary.accumulates:
            h_BCD, open_segment = pack.pool(
                h_BTD, score_BT * step.valid_BT, written_BT, open_segment
            )
        else:
            h_BCD = pack.pack(h_BTD)
        word_BCF = pack.pack(step.embed_BTD)
        if self.pool is not None:
            both_BT2 = torch.cat([x_BTD, step.embed_BTD.float()], -1)
            tail_BC2, open_segment = pack.pool(
                both_BT2, step.valid_BT & ~written_BT, written_BT, open_segment
            )
            tail_BCD, words_BCD = tail_BC2.chunk(2, -1)
            h_BCD = h_BCD + self.codes.scale.float() * self.pool(tail_BCD)
            word_BCF = torch.cat([word_BCF, words_BCD.to(word_BCF.dtype)], -1)
        return h_BCD, word_BCF, open_segment

    def unsaid(self, h_nD: Tensor, embed_nD: Tensor) -> tuple[Tensor, Tensor | float]:
        """(n, D) normalised states without what their tokens' embeddings tell, for the codes to
        say; and that, 0 without an anchor."""
        told_nD = 0.0 if self.anchor is None else self.anchor(embed_nD)
        return self.codes.normalise(h_nD) - told_nD, told_nD

    def _known(self, c_BCD: Tensor, read: Reading) -> Tensor:
        """(B, C, D) what a bridge may read of the concepts: all but the sink, which says nothing
        about the text."""
        if self.bridge is None:
            return c_BCD
        sink_BC1 = (read.pack.valid_BC & ~read.coded_BC).unsqueeze(-1)
        return torch.where(sink_BC1, self.bridge.concept_mean.to(c_BCD.dtype), c_BCD)

    def _tail(self, h_BTD: Tensor, known_BCD: Tensor, read: Reading, cache: ConceptCache | None):
        """(B, T, D) states of tail positions, and (B, D) the last concept's for the next chunk."""
        if self.bridge is None:
            return h_BTD, None if cache is None else cache.last_concept_BD
        before_BD = (
            self.bridge.concept_mean.expand(len(h_BTD), -1)
            if cache is None
            else cache.last_concept_BD
        )
        last_BTD = read.pack.last(known_BCD, read.written_BT, before_BD)
        return self.bridge(h_BTD, last_BTD), last_BTD[:, -1].detach()

    def _write(self, read: Reading, step: Step, ablation: str | None):
        """(B, C, D) concept states and (B, C) ids. The sink, and everything while `quantise` is 0,
        stays a state."""
        config, h_BCD, coded_BC = self.config, read.h_BCD, read.coded_BC
        quantised = self.dial.quantise
        ids_BC = torch.full_like(read.pack.index_BC, UNQUANTISED)
        if quantised == 0:
            return h_BCD, ids_BC
        with torch.autocast(h_BCD.device.type, enabled=False):
            h_nD = h_BCD[coded_BC]
            x_nD, told_nD = self.unsaid(h_nD, read.word_BCF[coded_BC])
            found = quantise(
                self.codes,
                self.head,
                x_nD,
                temperature=config.code_temperature,
                gumbel=config.gumbel if self.training else 0.0,
                soft=self.training,
            )
            ids_BC[coded_BC] = found.ids_n
            e_nD = self.codes.to_states(found.state_nD + told_nD)
            if ablation is not None:
                ids_BC, dropped_BC = ablate(
                    ids_BC, coded_BC, ablation, config.num_concepts**config.codes_per_concept
                )
                e_nD = self.codes(ids_BC[coded_BC]) + self.codes.scale.float() * told_nD
                e_nD = e_nD.masked_fill(dropped_BC[coded_BC].unsqueeze(-1), 0.0)
        e_nD = e_nD.to(h_BCD.dtype)
        if quantised < 1:
            e_nD = h_nD + quantised * (e_nD - h_nD)
        if self.training and config.concept_dropout > 0:
            lost_n1 = torch.rand(len(e_nD), 1, device=e_nD.device) < config.concept_dropout
            e_nD = torch.where(lost_n1, self.codes.mean.to(e_nD.dtype), e_nD)
        return h_BCD.masked_scatter(coded_BC.unsqueeze(-1), e_nD), ids_BC

    def _confidence(self, c_BCD: Tensor, known_BCD: Tensor, h_BTD: Tensor, read: Reading) -> Tensor:
        """Gradient for the gate: forward c; backward, p gets that of `p · c + (1 - p) · tail`, with
        p the probability of writing and `tail` the state that the position would have had as a
        normal token.

        Interpolated after the middle layers so that what they read stays discrete (ConceptMoE,
        arXiv 2601.21420). The new modules' zero term keeps every rank's gradients in step when its
        batch used no code."""
        new = [p for name, p in self.named_parameters() if p.requires_grad and "lora_" not in name]
        c_BCD = c_BCD + (sum(p.float().sum() for p in new) * 0.0).to(c_BCD.dtype)
        if self.dial.rate >= 1 or not self.gate.boundary.learned:
            return c_BCD
        with torch.no_grad():
            tail_BCD = read.pack.pack(h_BTD)
            if self.bridge is not None:  # past the concept before its own
                before_BCD = torch.cat(
                    [self.bridge.concept_mean.expand_as(c_BCD[:, :1]).to(c_BCD), known_BCD[:, :-1]],
                    1,
                )
                tail_BCD = self.bridge(tail_BCD, before_BCD)
        p_BC1 = torch.sigmoid(read.pack.pack(read.margin_BT) * read.coded_BC).unsqueeze(-1)
        return c_BCD + (p_BC1 - p_BC1.detach()) * (c_BCD - tail_BCD).detach()


def past_padding(x_BSD: Tensor, valid_BT: Tensor) -> Tensor:
    """(B, 1 + T, D) states, one of them ahead of the text → the same with each place of padding
    taken by the last that is none. Text goes on behind padding where rows that ended at different
    places are continued as a batch."""
    place_BT = (
        torch.arange(1, x_BSD.shape[1], device=x_BSD.device).where(valid_BT, 0).cummax(1).values
    )
    place_BS = torch.nn.functional.pad(place_BT, (1, 0))
    return x_BSD.gather(1, place_BS.unsqueeze(-1).expand(-1, -1, x_BSD.shape[2]))


def all_concepts(position: Tensor, valid: Tensor) -> Lane:
    """A lane on which the segment rule is plain causal attention."""
    return Lane(position, torch.zeros_like(position), torch.ones_like(valid), valid)
