"""The specification of the online model: for every t, build Z_t and run the deep layers over [Z_t ;
tail(t)].

O(T²) layer applications, one text at a time, no packing, no segment mask. The fast forward is held
to this."""

import torch
from torch import Tensor


def naive_segment_rule(written_T: list[bool]) -> list[list[bool]]:
    """The specification: the rule as a double loop over one text without padding."""
    allowed = []
    for i in range(len(written_T)):
        row = []
        for j in range(len(written_T)):
            no_concept_between = not any(written_T[j + 1 : i + 1])
            row.append(j <= i and (written_T[j] or no_concept_between))
        allowed.append(row)
    return allowed


def causal_mask(
    position_ids: Tensor, window: int | None, attn_implementation: str
) -> Tensor | None:
    """Plain causal attention for texts without padding: None where the kernel's own causal path
    does it."""
    if attn_implementation == "sdpa" and (window is None or int(position_ids.max()) < window):
        return None
    i, j = position_ids[:, :, None], position_ids[:, None, :]
    allowed = j <= i if window is None else (j <= i) & (i - j < window)
    if attn_implementation == "sdpa":
        return allowed.unsqueeze(1)
    floor = torch.finfo(torch.float32).min
    return (
        torch.zeros(allowed.shape, device=allowed.device).masked_fill(~allowed, floor).unsqueeze(1)
    )


def naive_decisions(
    scores: list[float],
    rate: float,
    max_tail: int,
    threshold: float,
    gain: float,
    accumulates: bool = False,
) -> list[bool]:
    """The rate gate as one would say it."""
    written: list[bool] = []
    total = 0.0
    for t, score in enumerate(scores):
        if accumulates:
            total += score if t > 0 else 0.0
            score = total
        tail = 0
        for wrote in reversed(written):
            if wrote:
                break
            tail += 1
        owed = rate * t - sum(written)
        written.append(t == 0 or rate >= 1 or tail >= max_tail or score > threshold - gain * owed)
        if accumulates and written[-1]:
            total = max(total - threshold, 0.0)
    return written


def per_step_logits(model, ids_T: Tensor) -> tuple[Tensor, list[int]]:
    """(T, V) logits by the per-step reading, and the id written at each position (-1 NULL, -2
    unquantised)."""
    config, spine = model.config, model.spine
    shallow, middle, _ = config.split
    threshold, gain = model.writer.gate.threshold(model.dial.rate)

    def run(first: int, last: int, states: list[Tensor], positions: list[int]) -> list[Tensor]:
        h, position_ids = torch.stack(states)[None], torch.tensor(positions)[None]
        kernel = model.backbone.config._attn_implementation
        out = spine.run(
            first,
            last,
            h,
            position_ids,
            spine.rope(h, position_ids),
            lambda window: causal_mask(position_ids, window, kernel),
        )
        return list(out[0])

    everything = list(range(len(ids_T)))
    h = (
        shallow_states(model, ids_T)
        if config.shallow_window
        else run(0, shallow, list(spine.embed(ids_T[None])[0]), everything)
    )
    x = [model.writer.codes.normalise(state) for state in h]
    scores = [
        model.writer.gate.boundary.score(model.writer.head, x[t], x[max(t - 1, 0)])
        for t in everything
    ]
    written = naive_decisions(
        [float(s) for s in scores],
        model.dial.rate,
        config.max_tail,
        threshold,
        gain,
        config.boundary == "threshold",
    )
    read = list(h)
    if config.boundary == "threshold":
        for t in everything:
            begin = next((j + 1 for j in range(t - 1, -1, -1) if written[j]), 0)
            weights = torch.stack(scores[begin : t + 1])
            read[t] = (weights[:, None] * torch.stack(h[begin : t + 1])).sum(0) / weights.sum()
    words = list(spine.embed(ids_T))  # what an anchor reads
    if config.pool:
        words = [torch.cat([word, 0 * word]) for word in words]
        for t in everything:
            begin = next((j + 1 for j in range(t - 1, -1, -1) if written[j]), 0)
            if written[t] and begin < t:
                pooled = torch.stack(x[begin:t]).mean(0) @ model.writer.readout.pool
                read[t] = h[t] + model.writer.codes.scale * pooled
                words[t] = torch.cat([spine.embed(ids_T[t]), spine.embed(ids_T[begin:t]).mean(0)])
    ids, concepts = [], []
    for t in everything:
        if not written[t] or t == 0 or model.dial.quantise == 0:
            ids.append(-2 if written[t] else -1)
            concepts.append(read[t])
            continue
        # what the token itself tells
        code = model.writer.readout.anchor(words[t]) if config.anchor else 0.0
        left, written_id = model.writer.codes.normalise(read[t]) - code, 0
        for g in range(config.codes_per_concept):
            table = model.writer.codes.weight[g]
            logits = model.writer.head.code_logits(left, table, g)
            digit = int(logits.argmax())
            soft = (logits / config.code_temperature).softmax(-1) @ table
            code = code + (
                table[digit].detach() + (soft - soft.detach()) if model.training else table[digit]
            )
            left = left - table[digit].detach()
            written_id += digit * config.num_concepts**g
        ids.append(written_id)
        concepts.append(
            read[t]
            + model.dial.quantise
            * (model.writer.codes.mean + model.writer.codes.scale * code - read[t])
        )

    out = []
    for t in everything:
        z = [j for j in range(t + 1) if written[j]]
        c = run(shallow, shallow + middle, [concepts[j] for j in z], z)
        known = {
            j: None if j == 0 else state for j, state in zip(z, c, strict=True)
        }  # the sink says nothing
        if model.training and model.dial.rate < 1 and config.boundary == "null":
            for k, j in enumerate(z[1:], 1):
                p = torch.sigmoid(scores[j] - threshold)
                c[k] = (
                    c[k]
                    + (p - p.detach()) * (c[k] - tail_state(model, h[j], known[z[k - 1]])).detach()
                )
        tail = list(range(z[-1] + 1, t + 1))
        d = run(
            shallow + middle,
            sum(config.split),
            c + [tail_state(model, h[j], known[z[-1]]) for j in tail],
            z + tail,
        )
        out.append(spine.logits(d[-1][None, None])[0, 0])
    return torch.stack(out), ids


def shallow_states(model, ids_T: Tensor) -> list[Tensor]:
    """Each sees the last `shallow_window` tokens and the first one."""
    spine, window, everything = model.spine, model.config.shallow_window, range(len(ids_T))
    sees = torch.tensor(
        [[j <= i and (j == 0 or j > i - window) for j in everything] for i in everything]
    )
    h, position_ids = spine.embed(ids_T[None]), torch.tensor([list(everything)])
    return list(
        spine.run(
            0,
            model.config.split[0],
            h,
            position_ids,
            spine.rope(h, position_ids),
            lambda _: sees[None, None],
        )[0]
    )


def tail_state(model, h_D: Tensor, last_D: Tensor | None) -> Tensor:
    """What a normal token brings to the deep slice: its shallow state, bridged if the model has a
    bridge."""
    if not model.config.bridge:
        return h_D
    return model.bridge(h_D, model.bridge.concept_mean if last_D is None else last_D)
