"""Bridge: (B, T, D) shallow states and last concepts → the states that tail positions enter the
deep slice with.

A tail position skips the middle slice, so the deep slice meets a state that it has never seen. The
bridge adds what a linear map can say about the missing part, from the position's own shallow state
and from the last concept's middle state (H-Net's up-sampling, arXiv 2507.07955 §2.2, with weights).
It starts at zero, and `start` puts it at the least squares fit to the base's own states: a
closed-form local distillation that costs one pass over a few thousand tokens. Where every position
writes a concept it is not used, so the identity at birth stands."""

import torch
from torch import Tensor, nn

from sememe.concepts.fit import explained, linear_fit, set_frame
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
        self, h_BTD: Tensor, c_BCD: Tensor, decision: WriteDecision, last_BD: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(B, T, D) states that each position has as one of a tail, and (B, D) the last concept's
        for the next chunk. `last_BD`: that of the chunk before."""
        return h_BTD, last_BD


class TailBridge(NoBridge):
    """`h + scale · (x W + y V + b)` with x, y the normalised shallow state and last concept's
    middle state."""

    fitted = True

    def __init__(self, width: int):
        super().__init__()
        self.shallow = nn.Linear(width, width)
        self.concept = nn.Linear(width, width, bias=False)
        for p in self.parameters():
            nn.init.zeros_(p)
        for name in ("shallow_mean", "concept_mean"):
            self.register_buffer(name, torch.zeros(width))
        for name in ("shallow_scale", "concept_scale", "scale"):
            self.register_buffer(name, torch.ones(()))

    def forward(self, h_BTD: Tensor, last_BTD: Tensor) -> Tensor:
        """(B, T, D). `last_BTD` is the middle state of the last concept; `concept_mean` stands for
        "none but the sink", whose state is an attention sink's and says nothing about the text."""
        x, y = (part.to(h_BTD.dtype) for part in self._normalised(h_BTD, last_BTD))
        return h_BTD + (self.shallow(x) + self.concept(y)) * self.scale.to(h_BTD.dtype)

    def _normalised(self, h: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
        return (
            (h.float() - self.shallow_mean) / self.shallow_scale,
            (last.float() - self.concept_mean) / self.concept_scale,
        )

    def first(self, like_BD: Tensor) -> Tensor:
        return self.concept_mean.expand_as(like_BD)

    def alone(self, h_BnD: Tensor) -> Tensor:
        return self(h_BnD, self.concept_mean.to(h_BnD.dtype))

    def tails(self, h_BTD, c_BCD, decision, last_BD):
        sink_BC1 = (decision.pack.valid_BC & ~decision.coded_BC).unsqueeze(-1)
        c_BCD = torch.where(sink_BC1, self.concept_mean.to(c_BCD.dtype), c_BCD)
        before_BTD, last_BD = decision.pack.before(c_BCD, last_BD)
        return self(h_BTD, before_BTD), last_BD.detach()

    @torch.no_grad()
    def start(
        self, h_ND: Tensor, last_ND: Tensor, target_ND: Tensor, penalty: float = 0.01
    ) -> float:
        """Least squares with a ridge: what is missing, `target - h`, from (N, D) states. Returns
        the share explained of the variance of `target`. `penalty`: of the mean variance of a
        normalised coordinate; N may be below 2 D."""
        missing_ND = target_ND - h_ND
        set_frame(torch.zeros_like(h_ND[0]), self.scale, missing_ND)
        set_frame(self.shallow_mean, self.shallow_scale, h_ND)
        set_frame(self.concept_mean, self.concept_scale, last_ND)
        x_N2 = torch.cat(self._normalised(h_ND, last_ND), 1)
        weight_2D, bias_D, left_ND = linear_fit(x_N2, missing_ND / self.scale, penalty)
        shallow_DD, concept_DD = weight_2D.chunk(2)
        self.shallow.weight.copy_(shallow_DD.T)
        self.concept.weight.copy_(concept_DD.T)
        self.shallow.bias.copy_(bias_D)
        return explained(left_ND * self.scale, target_ND)
