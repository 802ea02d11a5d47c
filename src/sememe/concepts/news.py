"""What a text adds to what its past foretold: (…, D) embeddings and the states before them → (…, D)
news, and their sum over a segment, in which each token can still be told from the others.

A code that stands for states of the text repeats what the decoder can foretell by itself. So the
foretold part, a linear map of the state before, is taken off (differential coding), and what is
left of each token is turned by an angle of its place in the segment, as RoPE turns queries (arXiv
2104.09864), and added up. Turned back by a place, the sum is that token's news and, in other
directions, the rest."""

import torch
from torch import Tensor, nn

from sememe.concepts.fit import explained, linear_fit

GOLDEN = (
    0.6180339887498949  # its multiples fill the circle evenly, so that places have little in common
)


def turn(x: Tensor, place: Tensor) -> Tensor:
    """(…, D) states and (…,) places → the same, turned in D / 2 planes by place times the angle of
    each. By minus the places it is turned back."""
    half = x.shape[-1] // 2
    angle_P = torch.pi * ((torch.arange(half, device=x.device) + 1) * GOLDEN % 1)
    angle = place.unsqueeze(-1).to(x.dtype) * angle_P.to(x.dtype)
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([a * cos - b * sin, a * sin + b * cos, rest], -1)


class Foretold(nn.Module):
    """(…, D) states → (…, D) fp32: what they let expect of the next token's embedding. Starts by
    least squares."""

    def __init__(self, width: int):
        super().__init__()
        self.map = nn.Linear(width, width)
        for p in self.parameters():
            nn.init.zeros_(p)
        self.register_buffer(
            "scale", torch.ones(())
        )  # of the embeddings: one learning rate fits every base

    def forward(self, h: Tensor) -> Tensor:
        return self.scale.float() * nn.functional.linear(
            h.float(), self.map.weight.float(), self.map.bias.float()
        )

    @torch.no_grad()
    def start(self, h_ND: Tensor, embed_ND: Tensor) -> float:
        """Fits (N, D) embeddings to the states ahead of them. Returns the share of their variance
        explained."""
        self.scale.copy_(embed_ND.float().square().mean().sqrt())
        embed_ND = embed_ND / self.scale
        weight_DD, bias_D, left_ND = linear_fit(h_ND, embed_ND)
        self.map.weight.copy_(weight_DD.T)
        self.map.bias.copy_(bias_D)
        return explained(left_ND, embed_ND)
