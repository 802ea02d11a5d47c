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

from sememe.concepts.fit import explained, linear_fit
from sememe.concepts.writer import WriteDecision


class NoBridge(nn.Module):
    """Tail positions enter the deep slice as they left the shallow one."""

    fitted = False

    def first(self, like_BTD: Tensor) -> Tensor:
        """(B, D) what stands for the last concept ahead of a text."""
        return like_BTD.new_zeros(like_BTD.shape[0], like_BTD.shape[-1])

    def tails(
        self, h_BTD: Tensor, c_BCD: Tensor, decision: WriteDecision, last_BD: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(B, T, D) states of tail positions, and (B, D) the last concept's for the next chunk.
        `last_BD`: that of the chunk before."""
        return h_BTD, last_BD

    def at_concepts(self, h_BTD: Tensor, c_BCD: Tensor, decision: WriteDecision) -> Tensor:
        """(B, C, D) states that the writing positions would have had as tail positions."""
        return decision.pack.pack(h_BTD)


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
        x = ((h_BTD.float() - self.shallow_mean) / self.shallow_scale).to(h_BTD.dtype)
        y = ((last_BTD.float() - self.concept_mean) / self.concept_scale).to(h_BTD.dtype)
        return h_BTD + (self.shallow(x) + self.concept(y)) * self.scale.to(h_BTD.dtype)

    def first(self, like_BTD: Tensor) -> Tensor:
        return self.concept_mean.expand(like_BTD.shape[0], -1)

    def _without_sink(self, c_BCD: Tensor, decision: WriteDecision) -> Tensor:
        sink_BC1 = (decision.pack.valid_BC & ~decision.coded_BC).unsqueeze(-1)
        return torch.where(sink_BC1, self.concept_mean.to(c_BCD.dtype), c_BCD)

    def tails(self, h_BTD, c_BCD, decision, last_BD):
        c_BCD = self._without_sink(c_BCD, decision)
        last_BTD = decision.pack.last(c_BCD, decision.written_BT, last_BD)
        return self(h_BTD, last_BTD), last_BTD[:, -1].detach()

    def at_concepts(self, h_BTD, c_BCD, decision):
        c_BCD = self._without_sink(c_BCD, decision)
        first_B1D = self.first(h_BTD).unsqueeze(1).to(c_BCD)
        before_BCD = torch.cat([first_B1D, c_BCD[:, :-1]], 1)  # past the concept before its own
        return self(decision.pack.pack(h_BTD), before_BCD)

    @torch.no_grad()
    def start(
        self, h_ND: Tensor, last_ND: Tensor, target_ND: Tensor, penalty: float = 0.01
    ) -> float:
        """Least squares with a ridge: what is missing, `target - h`, from (N, D) states. Returns
        the share explained of the variance of `target`. `penalty`: of the mean variance of a
        normalised coordinate; N may be below 2 D."""
        missing_ND = target_ND.double() - h_ND.double()
        spread = (missing_ND - missing_ND.mean(0)).square().mean().sqrt()
        self.scale.copy_(spread.clamp(min=1e-6))  # 0: no middle layers
        features = []
        for mean, scale, states in (
            (self.shallow_mean, self.shallow_scale, h_ND.double()),
            (self.concept_mean, self.concept_scale, last_ND.double()),
        ):
            mean.copy_(states.mean(0))
            scale.copy_((states - mean.double()).square().mean().sqrt().clamp(min=1e-6))
            features.append((states - mean.double()) / scale.double())
        weight_2DD, bias_D, left_ND = linear_fit(
            torch.cat(features, 1), missing_ND / self.scale.double(), penalty
        )
        for linear, weight_DD in zip(
            (self.shallow, self.concept), weight_2DD.chunk(2), strict=True
        ):
            linear.weight.copy_(weight_DD.T)
        self.shallow.bias.copy_(bias_D)
        return explained(left_ND * self.scale.double(), target_ND)
