"""Who may see whom: query `i` attends to key `j ≤ i` iff `j` is a concept or a normal token that is
not too long ago: one of the last so many, or, by the strict rule, one of the open tail.

Normal tokens are numbered in each text, and a query names the first of them that it sees. With
every position a concept the rule is plain causal attention."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from torch.utils.checkpoint import checkpoint

from sememe.errors import CheckpointError

FLEX = "flex_attention"
FLEX_DEVICES = ("cuda",)  # on a CPU it has no backward, and compiled it was wrong
# Entries of a mask. The kernel makes a float of each, which would be kept for the backward pass of
# each layer: 64 MB.
MASK_AT_ONCE = 2**24


class Lane(NamedTuple):
    """What the rule needs to know of a row of queries or keys. All fields are (B, n)."""

    position: Tensor  # place in the text, counted from the first real token
    number: Tensor  # of a key that is a normal token: how many of them came before it
    first: Tensor  # of a query: the number of the first one that it sees
    concept: Tensor  # bool: is this entry a concept
    valid: Tensor  # bool: False on padding and on empty cache slots

    @classmethod
    def causal(cls, position: Tensor, valid: Tensor) -> "Lane":
        """One on which the rule is plain causal attention: every entry is a concept. What it says
        of invalid ones nobody asks."""
        return cls(position, position, position, valid, valid)

    @classmethod
    def tail(cls, position: Tensor, number: Tensor, valid: Tensor) -> "Lane":
        """Keys of normal tokens."""
        return cls(position, number, number, torch.zeros_like(valid), valid)

    def __getitem__(self, index) -> "Lane":
        """That part of each field."""
        return Lane(*(x[index] for x in self))

    def then(self, other: "Lane") -> "Lane":
        """These entries and the other's after them."""
        return Lane(*(torch.cat(pair, 1) for pair in zip(self, other, strict=True)))


class Lanes(NamedTuple):
    """Queries and keys of one slice of a forward.

    `plain`: the kernel's own causal attention does it, or one query sees all keys. `recent`: keys
    are seen for that many places only, but for the first of the text. `rows`: those of the batch
    that take part."""

    query: Lane
    key: Lane
    plain: bool
    recent: int | None = None
    rows: slice | Tensor = slice(None)

    def masks(self, attention: str, dtype: torch.dtype) -> Callable[[int | None], Any]:
        """The mask for each sliding window that layers have, in the form of the kernel
        `attention`."""
        check_device(attention, self.query.position.device)

        def mask(window: int | None) -> Tensor | BlockMask | None:
            windows = [w for w in (window, self.recent) if w is not None]
            plain = self.plain and attention == "sdpa"
            if plain and (not windows or int(self.key.position.max()) < min(windows)):
                return None
            if attention == FLEX and self.query.position.shape[1] > 1:
                return segment_blocks(self.query, self.key, window, self.recent)

            def seen(rows: slice) -> Tensor:
                return segment_mask(self.query[:, rows], self.key, window, self.recent)

            shape = *self.query.position.shape, self.key.position.shape[1]
            return mask_of(seen, shape, dtype, attention)

        return mask


def segment_mask(
    query: Lane, key: Lane, window: int | None = None, recent: int | None = None
) -> Tensor:
    """(B, 1, Q, S) bool, True where attention is allowed.

    `window` adds a sliding window of that many places (the key's own place included), as Mistral
    and Gemma have it. `recent` is one that never shuts out the first place of the text, the
    attention sink (StreamingLLM, arXiv 2309.17453). A query on padding sees everything: its output
    is never used, and a row without any key would give NaN."""
    return _seen(query[:, None, :, None], key[:, None, None, :], window, recent)


def segment_blocks(
    query: Lane, key: Lane, window: int | None = None, recent: int | None = None
) -> BlockMask:
    """The same for FlexAttention: which blocks hold anything, and the rule for those that hold
    some."""

    def seen(b, h, i, j):
        return _seen(query[b, i], key[b, j], window, recent)

    batch, queries = query.position.shape
    device = key.position.device
    return create_block_mask(
        seen, batch, None, queries, key.position.shape[1], device, _compile=device.type == "cuda"
    )


def check_device(attn_implementation: str, device: torch.device) -> None:
    """Raises CheckpointError for a kernel that this device has not."""
    if attn_implementation == FLEX and device.type not in FLEX_DEVICES:
        raise CheckpointError(
            f"attn_implementation = {FLEX!r} on {device.type}: need a GPU. try: sdpa, or "
            "model.to('cuda')"
        )


def _seen(query: Lane, key: Lane, window: int | None, recent: int | None) -> Tensor:
    """The rule, for queries and keys of shapes that go together."""
    i, j = query.position, key.position
    allowed = (j <= i) & key.valid & (key.concept | (key.number >= query.first))
    if window is not None:
        allowed = allowed & (i - j < window)
    if recent is not None:
        allowed = allowed & ((i - j < recent) | (j == 0))
    return allowed | ~query.valid


def mask_of(
    seen: Callable[[slice], Tensor],
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    attn_implementation: str,
) -> Tensor:
    """The mask in the form that the attention kernel takes: bool for sdpa, additive for eager.

    Args:
        seen: (B, 1, n, S) bool of n of the queries.
        shape: (B, Q, S); above `MASK_AT_ONCE` sdpa is given a mask that is never whole."""
    if attn_implementation == "sdpa":
        if math.prod(shape) <= MASK_AT_ONCE:
            return seen(slice(None))
        return MaskInParts.of(seen, shape)
    mask = seen(slice(None))
    floor = torch.finfo(dtype).min
    return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, floor)


class MaskInParts(Tensor):
    """A (B, 1, Q, S) mask of bool that is made for some of the queries at a time, by the attention
    that reads it. It is a tensor of that shape without memory of its own, which transformers hands
    through to the kernel; nothing else can be done with it."""

    seen: Callable[[slice], Tensor]

    @classmethod
    def of(cls, seen: Callable[[slice], Tensor], shape: tuple[int, int, int]) -> "MaskInParts":
        batch, queries, keys = shape
        mask = torch.zeros((), dtype=torch.bool).expand(batch, 1, queries, keys).as_subclass(cls)
        mask.seen = seen
        return mask

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is F.scaled_dot_product_attention:
            return attention_in_parts(*args, **(kwargs or {}))
        if getattr(function, "__name__", "") not in ("__get__", "dim", "size", "as_subclass"):
            raise TypeError(f"{function.__name__} of a mask that is never whole")
        return super().__torch_function__(function, types, args, kwargs or {})


def attention_in_parts(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: MaskInParts, **options
) -> Tensor:
    """`scaled_dot_product_attention` of some queries at a time, each time over the keys that one of
    them sees. In the backward pass it is computed again, or the masks of all would be kept."""
    batch, _, queries, keys = attn_mask.shape

    def part(query: Tensor, key: Tensor, value: Tensor, rows: slice) -> Tensor:
        mask = attn_mask.seen(rows)
        index = mask.flatten(0, 2).any(0).nonzero().squeeze(1)
        key, value = key.index_select(2, index), value.index_select(2, index)
        mask = mask.index_select(3, index)
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, **options)

    size = max(1, MASK_AT_ONCE // (batch * keys))
    rows = [slice(start, start + size) for start in range(0, queries, size)]
    parts = [checkpoint(part, query[:, :, r], key, value, r, use_reentrant=False) for r in rows]
    return torch.cat(parts, 2)
