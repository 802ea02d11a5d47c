"""Who sees whom among the inputs of planner and executor, and what they keep in a KV cache.
Suffixes: B rows · n queries · m keys."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache

from sememe.concepts.plan import NULL, PlanShape

EVERYONE = -1
NEVER = 2**31 - 1  # order of padding and of what is after the end of a type: after all others


class Slots(NamedTuple):
    """(B, n) inputs of a pass, or keys in a cache."""

    position: Tensor  # in RoPE; starts again with each type
    order: Tensor  # in the sequence: nobody sees what comes later
    kind: Tensor  # the type that alone may see it, or EVERYONE
    query: Tensor  # bool: asks for a later concept; seen by queries alone

    @classmethod
    def of(cls, position_Bn: Tensor, order, kind=EVERYONE, query: bool = False) -> Slots:
        """From fields that `position` is as large as, or larger."""
        fields = (torch.as_tensor(x, device=position_Bn.device) for x in (order, kind, query))
        return cls(position_Bn, *(x.expand_as(position_Bn) for x in fields))

    @property
    def length(self) -> int:
        """n."""
        return self.position.shape[1]

    def then(self, *others: Slots) -> Slots:
        """These and the others after them."""
        return Slots(*(torch.cat(fields, 1) for fields in zip(self, *others, strict=True)))

    def then_text(self, count: int) -> Slots:
        """Slots of `count` tokens of a text after these, at the positions after the last one."""
        further_n = torch.arange(count, device=self.position.device)
        return Slots.of(self.position[:, -1:] + 1 + further_n, self.length + further_n)

    def pick(self, index) -> Slots:
        return Slots(*(x[index] for x in self))

    def sees(self, key: Slots, window: int | None) -> Tensor:
        """(B, 1, n, m) bool. `window`: of a sliding-window layer, in positions. What is NEVER seen
        sees itself at least: its output is never used, and a row without any key would give NaN."""
        i = Slots(*(x.unsqueeze(2) for x in self))
        j = Slots(*(x.unsqueeze(1) for x in key))
        seen = (j.order <= i.order) & ((j.kind == EVERYONE) | (j.kind == i.kind))
        seen = seen & (~j.query | (i.query & (j.position <= i.position)))
        if window is not None:
            seen = seen & (i.position - j.position < window)
        return seen.unsqueeze(1)


def plan_slots(
    shape: PlanShape, plan_BP: Tensor, start_B1: Tensor, first: int, parallel: bool = False
) -> Slots:
    """The C slots of plans whose separators are at position `start` in RoPE, and the first of them
    number `first` in the sequence. Types in `parallel` are seen by themselves alone."""
    order_C, position_C, kind_C = (
        x.to(plan_BP.device) for x in (shape.order_C, shape.position_C, shape.kind_C)
    )
    present_BC = F.pad(plan_BP != NULL, (shape.types, 0), value=True)
    order_BC = torch.where(present_BC, first + order_C, NEVER)
    return Slots.of(start_B1 + position_C, order_BC, kind_C if parallel else EVERYONE)


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
