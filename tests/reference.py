"""The specification of the online model: for every t, build Z_t and run the deep layers over [Z_t ;
tail(t)].

O(T²) layer applications, one text at a time, no packing, no segment mask. The fast forward is held
to this."""

from functools import partial

import numpy as np
import torch
from torch import Tensor

from sememe.concepts.gate import GateState


def naive_rule(written_T: list[bool], max_tail: int | None = None) -> list[list[bool]]:
    """The specification: the rule as a double loop over one text without padding. A key is a
    concept, or one of the last `max_tail` normal tokens; None, the strict rule: no concept stands
    behind it up to the query."""

    def seen(i: int, j: int) -> bool:
        behind = written_T[j + 1 : i + 1]
        return written_T[j] or (
            not any(behind) if max_tail is None else sum(not w for w in behind) < max_tail
        )

    length = range(len(written_T))
    return [[j <= i and seen(i, j) for j in length] for i in length]


def causal_mask(position_ids: Tensor, window: int | None, recent: int | None, kernel: str):
    """Plain causal attention for a text without padding: in a layer's own window, and to the first
    token and the last `recent` ones."""
    i, j = position_ids[:, None, :, None], position_ids[:, None, None, :]
    allowed = j <= i
    if window is not None:
        allowed = allowed & (i - j < window)
    if recent is not None:
        allowed = allowed & ((i - j < recent) | (j == 0))
    if kernel == "sdpa":
        return allowed
    return torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)


def naive_decisions(scores, rate, max_tail, threshold, gain, accumulates=False) -> list[bool]:
    """The rate gate as one would say it."""
    written: list[bool] = []
    total, tail = 0.0, 0
    for t, score in enumerate(scores):
        if accumulates:
            total += score if t > 0 else 0.0
            score = total
        owed = rate * t - sum(written)
        written.append(t == 0 or rate >= 1 or tail >= max_tail or score > threshold - gain * owed)
        tail = 0 if written[-1] else tail + 1
        if accumulates and written[-1]:
            total = max(total - threshold, 0.0)
    return written


def loop_decisions(
    score_BT, real_BT, rate, max_tail, state, threshold, gain, accumulates=False
) -> tuple[np.ndarray, GateState]:
    """The same of a batch with padding, from a state to a state: token by token over all rows."""
    scores, written_BT = score_BT.numpy(), np.zeros(real_BT.shape, bool)
    tokens, concepts, tail, total = state
    for t, real in enumerate(real_BT.T):
        score = scores[:, t]
        if accumulates:
            score = total = total + np.where(real & (tokens > 0), score, 0.0)
        owed = rate * tokens - concepts
        write = (score > threshold - gain * owed) | (tokens == 0) | (tail >= max_tail)
        write = real & (write | (rate >= 1))
        if accumulates:
            total = np.where(write, np.maximum(total - threshold, 0.0), total)
        written_BT[:, t] = write
        tokens = tokens + real
        concepts = concepts + write
        tail = np.where(write, 0, tail + real)
    return written_BT, GateState(tokens, concepts, tail, total)


def per_step_logits(model, ids_T: Tensor) -> tuple[Tensor, list[int]]:
    """(T, V) logits by the per-step reading, and the id written at each position (-1 NULL, -2
    unquantised)."""
    config, dial, spine, writer = model.config, model.dial, model.spine, model.writer
    shallow, middle, deep = config.split
    threshold, gain = writer.gate.threshold(dial.rate)
    accumulates = config.boundary == "threshold"

    def run(first: int, last: int, states: list[Tensor], places: list[int], recent=None):
        h, position_ids = torch.stack(states)[None], torch.tensor(places)[None]
        kernel = model.backbone.config._attn_implementation
        rope = spine.rope(h, position_ids)
        mask = partial(causal_mask, position_ids, recent=recent, kernel=kernel)
        return list(spine.run(first, last, h, position_ids, rope, mask)[0])

    everything = list(range(len(ids_T)))
    h = run(0, shallow, list(spine.embed(ids_T[None])[0]), everything, config.shallow_window)
    x = [writer.codes.normalise(state) for state in h]
    boundary = writer.gate.boundary
    scores = [boundary.score(writer.head, x[t], x[max(t - 1, 0)]) for t in everything]
    written = naive_decisions(
        [float(s) for s in scores], dial.rate, config.max_tail, threshold, gain, accumulates
    )
    states = list(h)  # what codes stand for
    words = list(spine.embed(ids_T))  # what an anchor reads
    if config.pool:
        words = [torch.cat([word, 0 * word]) for word in words]
    for t in everything:
        begin = next((j + 1 for j in range(t - 1, -1, -1) if written[j]), 0)
        if accumulates:
            weights = torch.stack(scores[begin : t + 1])
            total = (weights[:, None] * torch.stack(h[begin : t + 1])).sum(0)
            states[t] = total / weights.sum()
        if config.pool and written[t] and begin < t:
            pooled = torch.stack(x[begin:t]).mean(0) @ writer.readout.pool
            states[t] = h[t] + writer.codes.scale * pooled
            words[t] = torch.cat([spine.embed(ids_T[t]), spine.embed(ids_T[begin:t]).mean(0)])
    ids = [-2 if wrote else -1 for wrote in written]
    concepts = list(states)
    for t in everything[1:]:
        if written[t] and dial.quantise > 0:
            ids[t], code = quantised(model, states[t], words[t])
            coded = writer.codes.mean + writer.codes.scale * code
            concepts[t] = states[t] + dial.quantise * (coded - states[t])

    out = []
    for t in everything:
        z = [j for j in range(t + 1) if written[j]]
        if config.segment == "both":
            c = segment_middle(model, h[: t + 1], concepts, written[: t + 1])
        else:
            c = run(shallow, shallow + middle, [concepts[j] for j in z], z)
        # The sink says nothing.
        last = {j: None if j == 0 else state for j, state in zip(z, c, strict=True)}
        if model.training and dial.rate < 1 and config.boundary == "null":
            for k, j in enumerate(z[1:], 1):
                p = torch.sigmoid(scores[j] - threshold)
                without = tail_state(model, h[j], last[z[k - 1]])
                c[k] = c[k] + (p - p.detach()) * (c[k] - without).detach()
        if config.segment == "none":
            tail = list(range(z[-1] + 1, t + 1))
            tails = [tail_state(model, h[j], last[z[-1]]) for j in tail]
            d = run(shallow + middle, shallow + middle + deep, c + tails, z + tail)
        else:  # what earlier tokens saw is in their states
            x, latest = [], None
            for j in range(t + 1):
                if written[j]:
                    x.append(c[z.index(j)])
                    latest = last[j]
                else:
                    x.append(tail_state(model, h[j], latest))
            rule = naive_rule(written[: t + 1], config.max_tail)
            d = ruled(model, shallow + middle, shallow + middle + deep, x, rule)
        out.append(spine.logits(d[-1][None, None])[0, 0])
    return torch.stack(out), ids


def ruled(model, first: int, last: int, states: list[Tensor], rule) -> list[Tensor]:
    """Layers first … last-1 over states of successive places, each attending by `rule`."""
    h, position_ids = torch.stack(states)[None], torch.arange(len(states))[None]
    kernel = model.backbone.config._attn_implementation

    def mask(window):
        allowed = torch.tensor(rule)[None, None] & causal_mask(position_ids, window, None, "sdpa")
        if kernel == "sdpa":
            return allowed
        floor = torch.finfo(torch.float32).min
        return torch.zeros(allowed.shape).masked_fill(~allowed, floor)

    rope = model.spine.rope(h, position_ids)
    return list(model.spine.run(first, last, h, position_ids, rope, mask)[0])


def segment_middle(model, h, concepts, written) -> list[Tensor]:
    """Middle states of the concepts, each of which also sees the last normal tokens: on entering
    the n-th of M layers such a token has gone n / M of its way to its bridged state. Whole layers
    run over all of it, and what they make of the tails is thrown away."""
    first, middle, _ = model.config.split
    places = range(len(written))
    rule = naive_rule(written, model.config.max_tail)
    bridged = [straight_state(model, state) for state in h]
    c = {j: concepts[j] for j in places if written[j]}
    for n in range(middle):
        x = [c[j] if written[j] else h[j] + n / middle * (bridged[j] - h[j]) for j in places]
        out = ruled(model, first + n, first + n + 1, x, rule)
        c = {j: out[j] for j in c}
    return list(c.values())


def quantised(model, state_D: Tensor, word_F: Tensor) -> tuple[int, Tensor]:
    """The id of a state, and its code in normalised coordinates, with the gradient that training
    has."""
    config, writer = model.config, model.writer
    # What the token itself tells.
    code = writer.readout.anchor(word_F) if config.anchor else 0.0
    left, written_id = writer.codes.normalise(state_D) - code, 0
    for g in range(config.codes_per_concept):
        table = writer.codes.weight[g]
        logits = writer.head.code_logits(left, table, g)
        digit = int(logits.argmax())
        hard, soft = table[digit], (logits / config.code_temperature).softmax(-1) @ table
        code = code + (hard.detach() + (soft - soft.detach()) if model.training else hard)
        left = left - hard.detach()
        written_id += digit * config.num_concepts**g
    return written_id, code


def straight_state(model, h_D: Tensor) -> Tensor:
    """Where a normal token's shallow state is taken to go in the middle slice: what the linear map
    of the bridge makes of it alone."""
    if not model.config.bridge:
        return h_D
    bridge = model.bridge
    x_D = (h_D - bridge.shallow_mean) / bridge.shallow_scale
    return h_D + bridge.scale * bridge.shallow(x_D)


def tail_state(model, h_D: Tensor, last_D: Tensor | None) -> Tensor:
    """What a normal token brings to the deep slice: its shallow state, bridged if the model has a
    bridge."""
    if not model.config.bridge:
        return h_D
    return model.bridge(h_D, model.bridge.concept_mean if last_D is None else last_D)
