"""Ablations: the codes of written concepts replaced by others, or by nothing, to see what they are
worth.

What is written where never changes: the gate has decided before, and the sink, which has no code,
stays."""

import re

import torch
from torch import Tensor

ABLATIONS = ("zero", "shuffle", "random")  # those of every evaluation
SHARE = r"0|0?\.\d+|1(\.0*)?"
SPEC = re.compile(rf"(zero|shuffle|random|swap|drop:(?P<share>{SHARE}))(@(?P<seed>\d+))?")


def parse(spec: str) -> tuple[str, float, int]:
    """`KIND[:SHARE][@SEED]` → (kind, share, seed): `zero`, `shuffle@1`, `drop:0.5@2`. Raises
    ValueError.

    The share, of concepts to drop, is for `drop` alone; the seed is 0 where none is named."""
    match = SPEC.fullmatch(spec)
    if match is None:
        raise ValueError(
            f"ablation = {spec!r}: need one of zero, shuffle, random, swap, drop; drop as "
            "drop:SHARE, a share from 0 to 1"
        )
    return match[1].partition(":")[0], float(match["share"] or 1), int(match["seed"] or 0)


def ablate(ids_BC: Tensor, coded_BC: Tensor, spec: str, num_ids: int) -> tuple[Tensor, Tensor]:
    """(B, C) ids with the coded ones replaced, and (B, C) bool: which concepts get a zero state
    instead of a code's.

    `shuffle`: permuted over the whole batch. `random`: drawn evenly from `num_ids`. `swap`: those
    of the next row. `zero`: all dropped. `drop:SHARE`: that share dropped; of one seed, a larger
    share drops the same ones and more."""
    kind, share, seed = parse(spec)
    dropped_BC = torch.zeros_like(coded_BC)
    if kind == "swap":
        return next_row(ids_BC, coded_BC), dropped_BC
    generator = torch.Generator(device="cpu").manual_seed(seed)
    out_BC, coded_n = ids_BC.clone(), ids_BC[coded_BC]
    if kind == "random":
        drawn_n = torch.randint(num_ids, coded_n.shape, generator=generator)
        out_BC[coded_BC] = drawn_n.to(ids_BC.device)
        return out_BC, dropped_BC
    order_n = torch.randperm(len(coded_n), generator=generator).to(ids_BC.device)
    if kind == "shuffle":
        out_BC[coded_BC] = coded_n[order_n]
    else:
        dropped_BC[coded_BC] = order_n < round(share * len(coded_n))
    return out_BC, dropped_BC


def next_row(ids_BC: Tensor, coded_BC: Tensor) -> Tensor:
    """(B, C) ids: a row's k-th coded concept gets the k-th of the next row, from its start again
    where that one is shorter. The last row takes from the first; a row stays as it is beside one
    without coded concepts, or alone."""
    out_BC = ids_BC.clone()
    for row, coded_C in enumerate(coded_BC):
        other = (row + 1) % len(ids_BC)
        theirs_n = ids_BC[other, coded_BC[other]]
        if len(theirs_n) > 0:
            rank_n = torch.arange(int(coded_C.sum()), device=ids_BC.device)
            out_BC[row, coded_C] = theirs_n[rank_n % len(theirs_n)]
    return out_BC
