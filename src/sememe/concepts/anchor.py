"""TokenAnchor: the writing token's embedding → the part of a concept's state that the token alone
tells.

A shallow state is mostly word identity. Codes that have to say the word as well have few bits left
for the context, and for words that the codebook has not seen they say the wrong one. So a concept
may be anchored at the token that writes it: its state is a linear map of that token's embedding
plus the codes, which then say what the context adds. Both parts are discrete. The map is started by
least squares, and trained."""

import torch
from torch import Tensor, nn

from sememe.concepts.fit import explained, linear_fit


class TokenAnchor(nn.Module):
    """`W · embedding / scale + b`, in the codebook's normalised coordinates."""

    def __init__(self, width: int, tokens: int = 1):
        super().__init__()
        self.token = nn.Linear(tokens * width, width)
        for p in self.parameters():
            nn.init.zeros_(p)
        self.register_buffer("scale", torch.ones(()))

    def forward(self, embedding: Tensor) -> Tensor:
        """(…, tokens · D) embeddings of the writing tokens, with a pool their tails' means behind →
        (…, D) fp32 normalised states."""
        x = embedding.float() / self.scale.float()
        return nn.functional.linear(x, self.token.weight.float(), self.token.bias.float())

    @torch.no_grad()
    def start(self, embedding_ND: Tensor, x_ND: Tensor) -> float:
        """Least squares to normalised shallow states. Returns the share of their variance
        explained."""
        self.scale.copy_(embedding_ND.float().square().mean().sqrt().clamp(min=1e-6))
        weight_DD, bias_D, left_ND = linear_fit(embedding_ND.double() / self.scale.double(), x_ND)
        self.token.weight.copy_(weight_DD.T)
        self.token.bias.copy_(bias_D)
        return explained(left_ND, x_ND)
