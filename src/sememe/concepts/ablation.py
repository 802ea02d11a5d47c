"""Ablations: the codes of written concepts replaced by others, or by nothing, to see what they are
worth.

What is written where never changes: the gate has decided before, and the sink, which has no code,
stays."""

import torch
from torch import Tensor

ABLATIONS = ("zero", "shuffle", "random")  # those of every evaluation
KINDS = (*ABLATIONS, "swap", "drop")


def parse(spec: str) -> tuple[str, float, int]:
    """`KIND[:SHARE][@SEED]` → (kind, share, seed): `zero`, `shuffle@1`, `drop:0.5@2`. Raises
    ValueError.

    The share, of concepts to drop, is for `drop` alone; the seed is 0 where none is named."""
    words, _, seed = spec.partition("@")
    kind, _, share = words.partition(":")
    try:
        parsed = kind, float(share or 1), int(seed or 0)
    except ValueError:
        parsed = "", 0.0, 0
    if parsed[0] not in KINDS or bool(share) != (kind == "drop") or not 0 <= parsed[1] <= 1:
        raise ValueError(
            f"ablation = {spec!r}: need one of {', '.join(KINDS)}; drop as drop:SHARE, a share "
            "from 0 to 1"
        )
    return parsed


def ablate(ids_BC: Tensor, coded_BC: Tensor, spec: str, num_ids: int) -> tuple[Tensor, Tensor]:
    """(B, C) ids with the coded ones replaced, and (B, C) bool: which concepts get a zero state
    instead of a code's.

    `shuffle`: permuted over the whole batch. `random`: drawn evenly from `num_ids`. `swap`: those
    of the next row. `zero`: all dropped. `drop:SHARE`: that share dropped; of one seed, a larger
    share drops the same ones and more."""
    kind, share, seed = parse(spec)
    generator = torch.Generator(device="cpu").manual_seed(seed)
    out, dropped_BC, count = ids_BC.clone(), torch.zeros_like(coded_BC), int(coded_BC.sum())
    if kind == "shuffle":
        out[coded_BC] = ids_BC[coded_BC][
            torch.randperm(count, generator=generator).to(ids_BC.device)
        ]
    elif kind == "random":
        out[coded_BC] = torch.randint(num_ids, (count,), generator=generator).to(ids_BC.device)
    elif kind == "swap":
        out = next_row(ids_BC, coded_BC)
    else:
        order = torch.randperm(count, generator=generator).to(ids_BC.device)
        dropped_BC[coded_BC] = order < round(share * count)
    return out, dropped_BC


def next_row(ids_BC: Tensor, coded_BC: Tensor) -> Tensor:
    """(B, C) ids: a row's k-th coded concept gets the k-th of the next row, from its start again
    where that one is shorter. The last row takes from the first; a row stays as it is beside one
    without coded concepts, or alone."""
    packed_BC = ids_BC.gather(1, torch.argsort(coded_BC.int(), dim=1, descending=True, stable=True))
    count_B1 = coded_BC.sum(1, keepdim=True).roll(-1, 0)
    rank_BC = (coded_BC.cumsum(1) - 1) % count_B1.clamp(min=1)
    return torch.where(coded_BC & (count_B1 > 0), packed_BC.roll(-1, 0).gather(1, rank_BC), ids_BC)
