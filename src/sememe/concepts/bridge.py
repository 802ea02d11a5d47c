"""Bridge: (B, T, D) shallow states and last concepts → the states that tail positions enter the
deep slice with.

A tail position skips the middle slice, so the deep slice meets a state that it has never seen. The
bridge adds what a linear map can say about the missing part, from the position's own shallow state
and from the last concept's middle state (H-Net's up-sampling, arXiv 2507.07955 §2.2, with weights).
It starts at zero, and `start` fits it to the base's own states: a
local distillation from the base, which costs one pass over the calibration text. Where every
position writes a concept it is not used, so the identity at birth stands."""

import numpy as np
import torch
from torch import Tensor, nn

from sememe.concepts.fit import fit_residual, hidden_units, set_frame
from sememe.concepts.writer import WriteDecision


class NoBridge(nn.Module):
    """Tail positions enter the deep slice as they left the shallow one."""

    fitted = False

    def first(self, like_BD: Tensor) -> Tensor:
        """(B, D) what stands for the last concept ahead of a text."""
        return torch.zeros_like(like_BD)

    def alone(self, h_BnD: Tensor) -> Tensor:
        """What tails become by their own states alone."""
        return h_BnD

    def tails(
        self,
        h_BTD: Tensor,
        c_BCD: Tensor,
        decision: WriteDecision,
        last_BD: Tensor,
        everywhere: bool = True,
    ) -> tuple[Tensor, Tensor]:
        """(B, T, D) states that each position has as one of a tail, and (B, D) the last concept's
        for the next chunk. `last_BD`: that of the chunk before. Unless `everywhere`, positions that
        write a concept may keep what they have."""
        return h_BTD, last_BD


class TailBridge(NoBridge):
    """`h + scale · (x W + y V + b + gelu([x ; y] U + a) Z)` with x, y the normalised shallow state
    and last concept's middle state, and `hidden` units for each of their coordinates."""

    fitted = True

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.shallow = nn.Linear(width, width)
        self.concept = nn.Linear(width, width, bias=False)
        for p in self.parameters():
            nn.init.zeros_(p)
        self.hidden = hidden_units(2 * width, width, hidden)
        for name in ("shallow_mean", "concept_mean"):
            self.register_buffer(name, torch.zeros(width))
        for name in ("shallow_scale", "concept_scale", "scale"):
            self.register_buffer(name, torch.ones(()))

    def forward(self, h_BTD: Tensor, last_BTD: Tensor) -> Tensor:
        """(B, T, D). `last_BTD` is the middle state of the last concept; `concept_mean` stands for
        "none but the sink", whose state is an attention sink's and says nothing about the text."""
        x, y = (part.to(h_BTD.dtype) for part in self._normalised(h_BTD, last_BTD))
        missing = self.shallow(x) + self.concept(y) + self.hidden(x, y)
        return h_BTD + missing * self.scale.to(h_BTD.dtype)

    def _normalised(self, h: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
        return (
            (h.float() - self.shallow_mean) / self.shallow_scale,
            (last.float() - self.concept_mean) / self.concept_scale,
        )

    def first(self, like_BD: Tensor) -> Tensor:
        return self.concept_mean.expand_as(like_BD)

    def alone(self, h_BnD: Tensor) -> Tensor:
        """By the linear map of their own state: two hidden units a coordinate made it five times
        the price, for 0.015 nats (docs/log.md)."""
        x, _ = self._normalised(h_BnD, self.concept_mean)
        return h_BnD + self.shallow(x.to(h_BnD.dtype)) * self.scale.to(h_BnD.dtype)

    def tails(self, h_BTD, c_BCD, decision, last_BD, everywhere=True):
        sink_BC1 = (decision.pack.valid_BC & ~decision.coded_BC).unsqueeze(-1)
        c_BCD = torch.where(sink_BC1, self.concept_mean.to(c_BCD.dtype), c_BCD)
        before_BTD, last_BD = decision.pack.before(c_BCD, last_BD)
        if everywhere:
            return self(h_BTD, before_BTD), last_BD.detach()
        # Which ones is known on the host already: nothing waits for a GPU.
        tail_n = torch.from_numpy(np.flatnonzero(~decision.written)).to(h_BTD.device)
        h_nD, before_nD = (x_BTD.flatten(0, 1)[tail_n] for x_BTD in (h_BTD, before_BTD))
        flat_nD = h_BTD.flatten(0, 1).index_copy(0, tail_n, self(h_nD, before_nD))
        return flat_nD.view_as(h_BTD), last_BD.detach()

    @torch.no_grad()
    def start(
        self, h_ND: Tensor, last_ND: Tensor, target_ND: Tensor, penalty: float = 0.01
    ) -> float:
        """By `fit_residual`, from (N, D) states. Returns the share explained of the variance of
        `target`. `penalty`: of the mean variance of a normalised coordinate; N may be below 2 D."""
        set_frame(self.shallow_mean, self.shallow_scale, h_ND)
        set_frame(self.concept_mean, self.concept_scale, last_ND)
        x_N2 = torch.cat(self._normalised(h_ND, last_ND), 1)
        linears = self.shallow, self.concept
        return fit_residual(linears, self.hidden, x_N2, h_ND, target_ND, self.scale, penalty)
