"""Rows of a model that are at different texts and come and go: what each of them costs is one step
after another, whoever else is there (continuous batching).

A row's step has two halves: `begin` reads a token in the shallow slice and decides whether it
writes a concept, `end` is the rest, up to the logits of the next token. Between them a row that
writes may wait for others that write, so that the middle layers' weights are read once for all of
them (as DREX does for early exits, arXiv 2512.15705). What a row says does not change by it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from sememe.backbone.slices import SliceCache
from sememe.backbone.split import Spine
from sememe.concepts.masks import Lane, Lanes
from sememe.concepts.segments import Chunk, packing
from sememe.concepts.writer import NULL, WriteDecision
from sememe.models.online import Begun, OnlineForCausalLM


@dataclass
class Stepped:
    """What a step gives: logits (n, V) of the next token of n rows, and the concept id that each
    has written at the one just read; NULL where none."""

    rows: np.ndarray
    logits_nV: Tensor
    concept_n: list[int]


def padded(texts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids of several texts → (B, T) ids and mask, padded on the left."""
    ids = [torch.tensor(text, dtype=torch.long) for text in texts]
    masks = [torch.ones_like(row) for row in ids]
    return tuple(pad_sequence(x, True, padding_side="left").to(device) for x in (ids, masks))


def slot_bytes(model: PreTrainedModel) -> int:
    """Bytes of the key and the value of one entry in one layer."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * heads * width * model.dtype.itemsize


class TokenCache(Cache):
    """Keys and values of every token in every layer, of rows that come and go."""

    def __init__(self, layers: int, rates: Sequence[float], device: torch.device):
        self.slice = SliceCache(len(rates), device)
        self.tokens = np.zeros(len(rates), np.int64)
        super().__init__(layers=[self.slice] * layers)

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        """What a layer's attention calls."""
        new = torch.stack([key_states, value_states])
        return self.slice.update(layer_idx, new).unbind(0)

    def bytes(self) -> int:
        return self.slice.bytes()

    def batch_select_indices(self, indices: Tensor) -> None:
        self.slice.take_rows(indices)
        self.tokens = self.tokens[indices.numpy()]


class TokenRows:
    """Those of a base, or of a model over one that writes no concepts. Rates say nothing here."""

    def __init__(self, model: PreTrainedModel):
        self.model = model
        self.spine = Spine(getattr(model, "backbone", model))
        self.window = getattr(model.config, "window", None)
        self.cache = self.start([])

    def __len__(self) -> int:
        return len(self.cache.tokens)

    def bytes_of(self, tokens: int, rate: float | None) -> int:
        """Of a row's keys and values, when it has come to so many tokens."""
        return self.bytes_at(tokens, 0)

    def bytes_at(self, tokens: int, concepts: int) -> int:
        """The same at so many concepts, of which there are none."""
        slots = tokens if self.window is None else min(tokens, self.window + 1)
        missing = getattr(self.model.config, "missing_layers", ())
        return slots * (len(self.spine) - len(missing)) * slot_bytes(self.model)

    def slice_bytes(self) -> dict[str, int]:
        """Bytes of all rows, by slice."""
        return {"all": self.cache.bytes()}

    def start(self, rates: Sequence[float | None]) -> TokenCache:
        """A cache for texts that are read before their rows join; `read` fills it."""
        return TokenCache(len(self.spine), rates, self.model.device)

    @torch.inference_mode()
    def read(
        self, cache: TokenCache, texts: Sequence[Sequence[int]]
    ) -> tuple[Tensor, list[list[int]]]:
        """As `OnlineRows.read`, of tokens that write nothing."""
        ids_BT, mask_BT = padded(texts, self.model.device)
        chunk = Chunk.of(self.spine.embed(ids_BT), mask_BT, tokens=cache.tokens)
        lane = Lane.causal(chunk.position_BT, chunk.valid_BT)
        lanes = Lanes(lane, lane, not chunk.padded, self.window)
        lanes = cache.slice.plan_tokens(lanes, cache.tokens, chunk.real, self.window)
        cache.tokens = cache.tokens + chunk.real.sum(1)
        rope = self.spine.rope(chunk.embed_BTD, chunk.position_BT)
        masks = lanes.masks(self.model.config._attn_implementation, self.model.dtype)
        states = chunk.embed_BTD, chunk.position_BT, rope, masks, cache
        d_BTD = self.spine.run(0, len(self.spine), *states)
        return d_BTD, [[NULL] * len(text) for text in texts]

    def logits(self, d: Tensor) -> Tensor:
        """(…, D) last states → (…, V)."""
        return self.spine.logits(d)

    @torch.inference_mode()
    def join(self, cache: TokenCache, counts: Sequence[int]) -> None:
        """The rows of a cache behind these, each so many times."""
        repeat(cache, counts)
        self.cache.slice.join(cache.slice)
        self.cache.tokens = np.concatenate([self.cache.tokens, cache.tokens])

    @torch.inference_mode()
    def leave(self, row: int) -> None:
        """Drops that row; the last one takes its place."""
        self.cache.slice.leave(row)
        self.cache.tokens[row] = self.cache.tokens[-1]
        self.cache.tokens = self.cache.tokens[:-1].copy()

    @property
    def ready(self) -> np.ndarray:
        """Rows that can take a token: all."""
        return np.arange(len(self))

    @torch.inference_mode()
    def step(self, tokens: Sequence[int]) -> Stepped:
        """Each row reads a token."""
        d_b1D, written = self.read(self.cache, [[token] for token in tokens])
        return Stepped(self.ready, self.logits(d_b1D[:, 0]), [NULL for _ in written])


class OnlineRows:
    """Those of an online model. `waiting`: rows that wait between the halves of their step, the
    oldest first."""

    def __init__(self, model: OnlineForCausalLM):
        self.model = model
        self.cache = model.new_cache(0)
        self.rate_B = np.zeros(0)
        self.begun: Begun | None = None
        self.waiting = np.zeros(0, np.int64)
        self.waited = 0  # steps, of the row that waits longest

    def __len__(self) -> int:
        return len(self.rate_B)

    # ---- rows that come and go ----

    def bytes_of(self, tokens: int, rate: float | None) -> int:
        """Of a row's keys and values, when it has come to so many tokens; one concept more than
        the rate says, since the gate may be early."""
        return self.bytes_at(tokens, 1 + math.ceil(tokens * (rate or self.model.dial.rate)))

    def bytes_at(self, tokens: int, concepts: int) -> int:
        """The same at so many concepts."""
        config = self.model.config
        shallow, middle, deep = config.split
        # Normal tokens that are still seen have a ring of slots.
        ring = config.max_tail * (config.segment == "both")
        slots = middle * (ring + concepts) + deep * (config.max_tail + concepts)
        exact = self.model.exact.itemsize // self.model.dtype.itemsize  # the shallow slice's
        return (exact * shallow * tokens + slots) * slot_bytes(self.model)

    def slice_bytes(self) -> dict[str, int]:
        """Bytes of all rows, by slice."""
        parts = zip(("shallow", "middle", "deep"), self.cache.slices, strict=True)
        return {name: part.bytes() for name, part in parts}

    def start(self, rates: Sequence[float | None]) -> Any:
        """A cache for texts that are read before their rows join; `read` fills it. Rates: None for
        the model's own."""
        cache = self.model.new_cache(len(rates))
        cache.rate_B = np.array([rate or self.model.dial.rate for rate in rates], float)
        return cache

    @torch.inference_mode()
    def read(self, cache: Any, texts: Sequence[Sequence[int]]) -> tuple[Tensor, list[list[int]]]:
        """Reads the next part of each text: (B, T, D) last states, padded on the left, and the
        concept ids of each token."""
        model = self.model
        ids_BT, mask_BT = padded(texts, model.device)
        chunk = Chunk.of(model.embed(ids_BT), mask_BT, tokens=cache.tokens)
        with model.dial.at(rate=cache.rate_B):
            begun = model.begin(chunk, cache)
        d_BTD, written_BT = model.end(begun, cache)
        return d_BTD, [
            row[len(row) - len(text) :]
            for row, text in zip(written_BT.tolist(), texts, strict=True)
        ]

    def logits(self, d: Tensor) -> Tensor:
        """(…, D) last states → (…, V)."""
        return self.model.spine.logits(d)

    @torch.inference_mode()
    def join(self, cache: Any, counts: Sequence[int]) -> None:
        """The rows of a cache behind these, each so many times."""
        repeat(cache, counts)
        self.cache.join(cache)
        self.rate_B = np.concatenate([self.rate_B, np.repeat(cache.rate_B, counts)])

    @torch.inference_mode()
    def leave(self, row: int) -> None:
        """Drops that row; the last one takes its place."""
        last = len(self) - 1
        self.cache.leave(row)
        self.rate_B[row] = self.rate_B[last]
        self.rate_B = self.rate_B[:last].copy()
        if row in self.waiting:
            self._keep(self.waiting != row)
        self.waiting[self.waiting == last] = row

    # ---- a step ----

    @property
    def ready(self) -> np.ndarray:
        """Rows that can take a token."""
        return np.setdiff1d(np.arange(len(self)), self.waiting)

    @torch.inference_mode()
    def step(self, tokens: Sequence[int], hold: int = 1, patience: int = 4) -> Stepped:
        """The `ready` rows read a token each. Rows that write wait until `hold` of them do, one has
        waited for `patience` steps, or no other is left."""
        rows, model = self.ready, self.model
        if len(rows) == 0:
            return self._end(*self._release())
        ids_b1 = torch.tensor(tokens, dtype=torch.long, device=model.device)[:, None]
        part = self.cache.at(rows)
        chunk = Chunk.of(model.embed(ids_b1), tokens=part.tokens)
        with model.dial.at(rate=self.rate_B[rows]):
            begun = model.begin(chunk, part)
        writes = begun.decision.written[:, 0]
        enough = len(self.waiting) + writes.sum() >= hold or self.waited >= patience
        if enough or writes.all():
            begun, rows = self._release(begun, rows)
        elif len(self.waiting) or writes.any():
            self.waited += 1
            if writes.any():
                self._hold(self._select(begun, writes), rows[writes])
                begun, rows = self._select(begun, ~writes), rows[~writes]
        return self._end(begun, rows)

    def _end(self, begun: Begun, rows: np.ndarray) -> Stepped:
        part = self.cache.at(rows)
        d_b1D, ids_b1 = self.model.end(begun, part)
        self.cache.put(part)
        return Stepped(rows, self.logits(d_b1D[:, 0]), ids_b1[:, 0].tolist())

    def _keep(self, selected: np.ndarray) -> None:
        """Of the rows that wait."""
        self.begun = self._select(self.begun, selected) if selected.any() else None
        self.waiting = self.waiting[selected]

    def _hold(self, begun: Begun, rows: np.ndarray) -> None:
        self.begun = begun if self.begun is None else self._cat(self.begun, begun)
        self.waiting = np.concatenate([self.waiting, rows])

    def _release(
        self, begun: Begun | None = None, rows: np.ndarray | None = None
    ) -> tuple[Begun, np.ndarray]:
        """Those that wait, and these behind them."""
        if begun is not None and len(self.waiting):
            self._hold(begun, rows)
        if len(self.waiting):
            begun, rows = self.begun, self.waiting
        self.begun, self.waiting, self.waited = None, self.waiting[:0], 0
        return begun, rows

    def _select(self, begun: Begun, selected: np.ndarray) -> Begun:
        rows = torch.from_numpy(selected.nonzero()[0]).to(begun.h_BTD.device)
        chunk, decision = begun.chunk, begun.decision
        return self._begun(
            [x[rows] for x in (chunk.embed_BTD, chunk.position_BT, chunk.valid_BT)],
            chunk.real[selected],
            [x[rows] for x in (begun.h_BTD, begun.e_BCD, begun.ids_BC)],
            decision.written[selected],
            [x[rows] for x in (decision.coded_BC, decision.h_BCD, decision.token_BCF)],
            decision.memory.select(rows),
        )

    def _cat(self, first: Begun, second: Begun) -> Begun:
        def cat(of: Any, *names: str) -> list[Tensor]:
            return [torch.cat([getattr(of(x), n) for x in (first, second)]) for n in names]

        decisions = first.decision, second.decision
        return self._begun(
            cat(lambda x: x.chunk, "embed_BTD", "position_BT", "valid_BT"),
            np.concatenate([x.chunk.real for x in (first, second)]),
            cat(lambda x: x, "h_BTD", "e_BCD", "ids_BC"),
            np.concatenate([x.written for x in decisions]),
            cat(lambda x: x.decision, "coded_BC", "h_BCD", "token_BCF"),
            decisions[0].memory.join(decisions[1].memory),
        )

    def _begun(self, chunk, real, states, written, coded, memory) -> Begun:
        """Of single tokens."""
        chunk = Chunk(*chunk, real)
        chunk.rope = self.model.spine.rope(chunk.embed_BTD, chunk.position_BT)
        written_BT = torch.from_numpy(written).to(chunk.valid_BT.device)
        decision = WriteDecision(written, written_BT, packing(written_BT), *coded, memory=memory)
        h_BTD, e_BCD, ids_BC = states
        return Begun(chunk, h_BTD, decision, e_BCD, ids_BC)


def repeat(cache: TokenCache | Any, counts: Sequence[int]) -> None:
    """Each row so many times."""
    if max(counts) > 1:
        rows = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
        cache.batch_select_indices(rows)


def rows_of(model: PreTrainedModel) -> OnlineRows | TokenRows:
    """An empty batch of rows of that model."""
    return OnlineRows(model) if isinstance(model, OnlineForCausalLM) else TokenRows(model)
