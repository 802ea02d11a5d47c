"""ConceptWriter: (B, T, D) states of tokens → which of them write a concept, and which concepts.

    h ─ gate ─ where ─ readout ─ a segment's state ─ head ─ digits ─ codes ─ e, ids
                          └──────── anchor: what its token tells ──────────┘

A model that makes the states of segments in a way of its own hands its own `readout` to the writer:
a module with `Readout`'s `forward`, `anchor` and `summed`. One that also decides by itself where
segments end (`boundary: autoregressive`) makes the `WriteDecision` itself and calls `write` alone.

Suffixes as in `concepts`; n counts the coded concepts of a batch."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from sememe.concepts.ablation import ablate
from sememe.concepts.boundary import BOUNDARIES
from sememe.concepts.codebook import ConceptEmbedding, start_from_states
from sememe.concepts.dial import Dial
from sememe.concepts.gate import GateState, RateGate
from sememe.concepts.head import HEADS
from sememe.concepts.quantise import Quantised, quantise
from sememe.concepts.readout import Readout, TailPool, WeightedSegment
from sememe.concepts.segments import Chunk, Packing, packing

NULL, UNQUANTISED = -1, -2  # in `concept_ids`, beside the ids 0 … K^G - 1
PADDED = -3  # where figures are counted: no token


class Memory(NamedTuple):
    """What rows remember between chunks: the gate's counters, the last state, and what their open
    segments have summed up."""

    gate: GateState
    last_BD: Tensor
    open_segment: Tensor

    def select(self, rows: Tensor) -> "Memory":
        gate = GateState(*(x[rows.cpu().numpy()] for x in self.gate))
        return Memory(gate, self.last_BD[rows], self.open_segment[rows])

    def join(self, other: "Memory") -> "Memory":
        """The other's rows behind these."""
        pairs = zip(self.gate, other.gate, strict=True)
        return Memory(
            GateState(*(np.concatenate(pair) for pair in pairs)),
            torch.cat([self.last_BD, other.last_BD]),
            torch.cat([self.open_segment, other.open_segment]),
        )


@dataclass
class WriteDecision:
    """Which tokens write a concept, and what the codes are to be read from."""

    written: np.ndarray  # (B, T) bool, on the host
    written_BT: Tensor
    pack: Packing
    coded_BC: Tensor  # all concepts but the sink, which stays a state
    h_BCD: Tensor
    token_BCF: Tensor  # what an anchor reads
    score_BT: Tensor | None = None
    threshold: float = 0.0
    memory: Memory | None = None


class ConceptWriter(nn.Module):
    """Gate, readout, head and codes. Starts itself from states of text.

    Args:
        config: `num_concepts`, `codes_per_concept`, `head`, `boundary`, `max_tail`, `anchor`,
            `pool`, `code_temperature`, `gumbel` and `concept_dropout`.
        dial: the model's own, read at each step.
        readout: what makes the states of segments; default: as `config` has it.
        closes_last: a text's last token always writes, so that nothing is left in an open tail.
    """

    def __init__(
        self,
        config,
        width: int,
        dial: Dial,
        readout: nn.Module | None = None,
        closes_last: bool = False,
    ):
        super().__init__()
        self.config = config
        self.dial = dial
        self.closes_last = closes_last
        self.head = HEADS[config.head](width, config.num_concepts, config.codes_per_concept)
        self.codes = ConceptEmbedding(config.num_concepts, width, config.codes_per_concept)
        self.gate = RateGate(config.boundary, width, config.text_config.vocab_size)
        if readout is None:
            accumulates = BOUNDARIES[config.boundary].accumulates
            kind = WeightedSegment if accumulates else TailPool if config.pool else Readout
            readout = kind(width, config.anchor)
        self.readout = readout

    def memory(self, batch: int) -> Memory:
        """That of `batch` rows ahead of their texts."""
        width, device = len(self.codes.mean), self.codes.mean.device
        open_segment = torch.zeros(batch, self.readout.summed * width + 1, device=device)
        last_BD = torch.zeros(batch, width, device=device)
        return Memory(GateState.start(batch), last_BD, open_segment)

    # ---- where ----

    def scores(self, h_BSD: Tensor) -> Tensor:
        """(B, S - 1) fp32 of all states but the first, each beside the one to its left: the higher,
        the sooner a concept is written."""
        with torch.autocast(h_BSD.device.type, enabled=False):
            x_BSD = self.codes.normalise(h_BSD)
            return self.gate.boundary.score(self.head, x_BSD[:, 1:], x_BSD[:, :-1])

    def decide(self, h_BTD: Tensor, chunk: Chunk, memory: Memory | None = None) -> WriteDecision:
        """Which positions write, at the dial's rate, and the states that their codes stand for.
        Training folds the scores into the gate's distribution."""
        memory = memory or self.memory(len(h_BTD))
        h_BSD = chunk.from_left(h_BTD, memory.last_BD)
        score_BT = self.scores(h_BSD)
        written, gate, threshold = self.gate(
            score_BT, chunk.real, self.dial.rate, self.config.max_tail, memory.gate
        )
        if self.closes_last:
            written |= chunk.real & (chunk.real[:, ::-1].cumsum(1)[:, ::-1] == 1)
        if self.training and torch.is_grad_enabled():
            self.gate.track(score_BT[chunk.valid_BT & (chunk.position_BT > 0)])
        written_BT = torch.from_numpy(written).to(h_BTD.device)
        pack = packing(written_BT)
        # A row's first concept is an attention sink.
        number = memory.gate.concepts[:, None] + np.arange(pack.index_BC.shape[1])
        h_BCD, token_BCF, open_segment = self.readout(
            h_BTD, chunk, pack, written_BT, score_BT, memory.open_segment, self.codes
        )
        return WriteDecision(
            written,
            written_BT,
            pack,
            coded_BC=pack.valid_BC & torch.from_numpy(number > 0).to(h_BTD.device),
            h_BCD=h_BCD,
            token_BCF=token_BCF,
            score_BT=score_BT,
            threshold=threshold,
            memory=Memory(gate, h_BSD[:, -1].detach(), open_segment),
        )

    def confidence(self, c_BCD: Tensor, tail_BCD: Tensor, decision: WriteDecision) -> Tensor:
        """Gradient for the gate: forward c; backward, p gets that of `p · c + (1 - p) · tail`, with
        p the probability of writing and `tail` the state where no concept had been written
        (ConceptMoE, arXiv 2601.21420)."""
        margin_BC = decision.pack.pack(decision.score_BT) - decision.threshold
        p_BC1 = torch.sigmoid(margin_BC * decision.coded_BC).unsqueeze(-1)
        return c_BCD + (p_BC1 - p_BC1.detach()) * (c_BCD - tail_BCD).detach()

    # ---- what ----

    def inputs(self, decision: WriteDecision) -> tuple[Tensor, Tensor]:
        """(n, D) normalised states for the codes to stand for, and the anchor's part of them that
        has been taken off."""
        coded_BC = decision.coded_BC
        anchor_nD = self.readout.anchor(decision.token_BCF[coded_BC])
        return self.codes.normalise(decision.h_BCD[coded_BC]) - anchor_nD, anchor_nD

    def quantise(self, x_nD: Tensor, soft: bool, gumbel: float = 0.0) -> Quantised:
        """The codes of normalised states."""
        temperature = self.config.code_temperature
        return quantise(
            self.codes, self.head, x_nD, temperature=temperature, gumbel=gumbel, soft=soft
        )

    def write(self, decision: WriteDecision, ablation: str | None = None) -> tuple[Tensor, Tensor]:
        """(B, C, D) concept states and (B, C) ids. The sink, and everything while the dial's
        `quantise` is 0, stays a state."""
        config, codes, share = self.config, self.codes, self.dial.quantise
        h_BCD, coded_BC = decision.h_BCD, decision.coded_BC
        ids_BC = torch.full_like(decision.pack.index_BC, UNQUANTISED)
        if share == 0:
            return h_BCD, ids_BC
        with torch.autocast(h_BCD.device.type, enabled=False):
            x_nD, anchor_nD = self.inputs(decision)
            gumbel = config.gumbel if self.training else 0.0
            quantised = self.quantise(x_nD, self.training, gumbel)
            ids_BC[coded_BC] = quantised.ids_n
            e_nD = codes.to_states(quantised.state_nD + anchor_nD)
            if ablation is not None:
                num_ids = config.num_concepts**config.codes_per_concept
                ids_BC, dropped_BC = ablate(ids_BC, coded_BC, ablation, num_ids)
                e_nD = codes(ids_BC[coded_BC]) + codes.scale.float() * anchor_nD
                e_nD = e_nD.masked_fill(dropped_BC[coded_BC].unsqueeze(-1), 0.0)
        e_nD = e_nD.to(h_BCD.dtype)
        if share < 1:
            e_nD = h_BCD[coded_BC].lerp(e_nD, share)
        if self.training and config.concept_dropout > 0:
            lost_n1 = torch.rand(len(e_nD), 1, device=e_nD.device) < config.concept_dropout
            e_nD = torch.where(lost_n1, codes.mean.to(e_nD.dtype), e_nD)
        return h_BCD.masked_scatter(coded_BC.unsqueeze(-1), e_nD), ids_BC

    # ---- start, from states of (N, T) blocks of text ----

    @torch.no_grad()
    def start_frame(self, h_NTD: Tensor, target_nT: Tensor | None = None) -> dict[str, float]:
        """Sets the frame of the codes, a boundary that is fitted, and the gate's threshold.
        `target_nT`: what the boundary is to estimate, at all tokens but the first of the first n
        blocks."""
        self.codes.start_frame(inner(h_NTD))
        shares = {}
        if target_nT is not None:
            x_nTD = self.codes.normalise(h_NTD[: len(target_nT)])
            both_nTf = torch.cat([x_nTD[:, 1:], x_nTD[:, :-1]], -1)
            shares = self.gate.boundary.start(both_nTf, target_nT)
        self.start_gate(h_NTD)
        return shares

    @torch.no_grad()
    def start_gate(self, h_NTD: Tensor) -> None:
        """Sets the gate's score distribution to that of these states."""
        if self.gate.boundary.scored:
            scores = [self.scores(h_BTD) for h_BTD in h_NTD.split(64)]
            self.gate.calibrate(torch.cat(scores).flatten())

    @torch.no_grad()
    def start_codes(self, h_ND: Tensor, token_NF: Tensor, seed: int = 0) -> dict[str, float]:
        """Anchor by least squares, codebook and head by k-means of (N, D) states, in the frame as
        it is. To be called when quantisation begins: LoRA moves the states, and a codebook of the
        untouched base would not fit them any more (docs/log.md)."""
        x_ND = self.codes.normalise(h_ND)
        shares = self.readout.anchor.start(token_NF, x_ND)
        x_ND = x_ND - self.readout.anchor(token_NF)
        return shares | start_from_states(self.codes, self.head, x_ND, seed=seed)


def inner(x_NTD: Tensor) -> Tensor:
    """(n, D): all positions but the first of each row, which is a sink and never quantised."""
    return x_NTD[:, 1:].flatten(0, 1)
