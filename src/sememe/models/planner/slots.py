"""Who sees whom among the inputs of planner and executor, and what they keep in a KV cache.
Suffixes: B rows · n queries · m keys."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache

from sememe.concepts.plan import PlanShape

EVERYONE = -1


class Slots(NamedTuple):
    """(B, n) inputs of a pass, or keys in a cache."""

    position: Tensor  # in RoPE; starts again with each type
    order: Tensor  # in the sequence: nobody sees what comes later
    kind: Tensor  # the type that alone may see it, or EVERYONE
    valid: Tensor  # bool: False on padding and after the end of a type; seen by nobody
    query: Tensor  # bool: asks for a later concept; seen by queries alone

    @classmethod
    def text(cls, position: Tensor, valid: Tensor | None = None, first: int = 0) -> Slots:
        """Slots that everyone after them may see. `first`: how many others stand before them."""
        order = torch.arange(first, first + position.shape[1], device=position.device)
        everyone = torch.full_like(position, EVERYONE)
        valid = torch.ones_like(position, dtype=torch.bool) if valid is None else valid
        return cls(position, order.expand_as(position), everyone, valid, torch.zeros_like(valid))

    @property
    def length(self) -> int:
        """n."""
        return self.position.shape[1]

    def then(self, *others: Slots) -> Slots:
        """These and the others after them."""
        return Slots(*(torch.cat(fields, 1) for fields in zip(self, *others, strict=True)))

    def pick(self, index) -> Slots:
        return Slots(*(x[index] for x in self))

    def sees(self, key: Slots, window: int | None) -> Tensor:
        """(B, 1, n, m) bool. `window`: of a sliding-window layer, in positions. What is not valid
        sees itself at least: its output is never used, and a row without any key would give NaN."""
        i = Slots(*(x.unsqueeze(2) for x in self))
        j = Slots(*(x.unsqueeze(1) for x in key))
        seen = (j.order <= i.order) & j.valid & ((j.kind == EVERYONE) | (j.kind == i.kind))
        seen = (seen | ~i.valid) & (~j.query | (i.query & (j.position <= i.position)))
        if window is not None:
            seen = seen & (i.position - j.position < window)
        return seen.unsqueeze(1)


def plan_slots(
    shape: PlanShape, plan_BP: Tensor, start_B1: Tensor, first: int, parallel: bool = False
) -> Slots:
    """The C slots of plans whose first separator is at position `start` in RoPE, and number `first`
    in the sequence. Types in `parallel` are seen by themselves alone."""
    kind_C, position_C, _ = shape.layout(plan_BP.device)
    slots = Slots.text(start_B1 + position_C, shape.valid(plan_BP), first)
    return slots._replace(kind=kind_C.expand_as(slots.order)) if parallel else slots


def query_slots(
    shape: PlanShape, anchor_BI: Tensor, start_B1: Tensor, first: int, count: int
) -> Slots:
    """Slots of `count` queries of each type, which see what precedes its concept number `anchor`,
    and ask for those after it. The plan's slots are as in `plan_slots`."""
    kind_n = torch.arange(shape.types, device=anchor_BI.device).repeat_interleave(count)
    further_n = torch.arange(1, count + 1, device=anchor_BI.device).repeat(shape.types)
    anchor_Bn = anchor_BI[:, kind_n]
    slots = Slots.text(start_B1 + anchor_Bn + further_n)
    return slots._replace(
        order=first + shape.separators(anchor_BI.device)[kind_n] + anchor_Bn,
        kind=kind_n.expand_as(anchor_Bn),
        query=slots.valid,
    )


@dataclass
class Context:
    """Sources as plans see them: as inputs, or in the planner's KV cache, and then without."""

    slots: Slots
    inputs_BnD: Tensor
    cache: DynamicCache | None = None

    def pick(self, rows: Tensor) -> Context:
        """These rows, in a cache of their own."""
        cache = None if self.cache is None else DynamicCache()
        for i, layer in enumerate(self.cache.layers if self.cache else ()):
            cache.update(layer.keys[rows], layer.values[rows], i)
        return Context(self.slots.pick(rows), self.inputs_BnD[rows], cache)

    def repeated(self, count: int) -> Context:
        """Each row `count` times."""
        rows = torch.arange(len(self.inputs_BnD), device=self.inputs_BnD.device)
        return self.pick(rows.repeat_interleave(count))
