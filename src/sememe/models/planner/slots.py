"""Who sees whom among the inputs of planner and executor, and what they keep in a KV cache.
Suffixes: B rows · n queries · m keys."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache

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


@dataclass
class Context:
    """A pass's KV cache and what stands in it."""

    cache: DynamicCache
    slots: Slots

    def pick(self, rows: Tensor) -> Context:
        """These rows, in a cache of their own."""
        cache = DynamicCache()
        for i, layer in enumerate(self.cache.layers):
            cache.update(layer.keys[rows], layer.values[rows], i)
        return Context(cache, self.slots.pick(rows))

    def bytes(self) -> int:
        """Of the cache."""
        tensors = [x for layer in self.cache.layers for x in (layer.keys, layer.values)]
        return sum(x.element_size() * x.numel() for x in tensors)
