"""Ablations: the written ids replaced by others, to see what they are worth."""

import torch
from torch import Tensor

ABLATIONS = ("zero", "shuffle", "random")


def ablate(ids_BC: Tensor, coded_BC: Tensor, kind: str, num_concepts: int) -> Tensor:
    """Ids with the coded ones shuffled over the whole batch, or drawn at random. `zero` is applied to the states."""
    if kind not in ABLATIONS:
        raise ValueError(f"ablation = {kind!r}: need one of {', '.join(ABLATIONS)}")
    generator = torch.Generator(device="cpu").manual_seed(0)
    out, count = ids_BC.clone(), int(coded_BC.sum())
    if kind == "shuffle":
        out[coded_BC] = ids_BC[coded_BC][torch.randperm(count, generator=generator).to(ids_BC.device)]
    elif kind == "random":
        out[coded_BC] = torch.randint(num_concepts, (count,), generator=generator).to(ids_BC.device)
    return out
