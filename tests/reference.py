"""The specification of the online model: for every t, build Z_t and run the deep layers over [Z_t ; tail(t)].

O(T²) layer applications, one text at a time, no packing, no segment mask. The fast forward is held to this.
"""

import torch
from torch import Tensor

from sememe.backbone.split import causal_mask


def naive_decisions(scores: list[float], rate: float, max_tail: int, threshold: float, gain: float) -> list[bool]:
    """The rate gate as one would say it."""
    written: list[bool] = []
    for t, score in enumerate(scores):
        tail = 0
        for wrote in reversed(written):
            if wrote:
                break
            tail += 1
        owed = rate * t - sum(written)
        written.append(t == 0 or rate >= 1 or tail >= max_tail or score > threshold - gain * owed)
    return written


def per_step_logits(model, ids_T: Tensor) -> tuple[Tensor, list[int]]:
    """(T, V) logits by the per-step reading, and the id written at each position (-1 NULL, -2 unquantised)."""
    config, spine = model.config, model.spine
    shallow, middle, _ = config.split
    threshold, gain = model.gate.threshold(config.rate)

    def run(first: int, last: int, states: list[Tensor], positions: list[int]) -> list[Tensor]:
        h, position_ids = torch.stack(states)[None], torch.tensor(positions)[None]
        kernel = model.backbone.config._attn_implementation
        out = spine.run(first, last, h, position_ids, spine.rope(h, position_ids),
                        lambda window: causal_mask(position_ids, window, kernel))
        return list(out[0])

    everything = list(range(len(ids_T)))
    h = run(0, shallow, list(spine.embed(ids_T[None])[0]), everything)
    x = [model.codes.normalise(state) for state in h]
    scores = [model.head.score(x[t], x[max(t - 1, 0)]) for t in everything]
    plain = [float(s) if config.boundary == "null" else 0.0 for s in scores]
    written = naive_decisions(plain, config.rate, config.max_tail, threshold, gain)
    ids, concepts = [], []
    for t in everything:
        if not written[t] or t == 0 or config.quantise == 0:
            ids.append(-2 if written[t] else -1)
            concepts.append(h[t])
            continue
        logits = model.head.code_logits(x[t])
        ids.append(int(logits.argmax()))
        code = model.codes(torch.tensor(ids[-1]))
        if model.training:
            soft = model.codes.mean + model.codes.scale * (logits / config.code_temperature).softmax(-1) @ model.codes.weight
            code = code.detach() + (soft - soft.detach())
        concepts.append(h[t] + config.quantise * (code - h[t]))

    out = []
    for t in everything:
        z = [j for j in range(t + 1) if written[j]]
        c = run(shallow, shallow + middle, [concepts[j] for j in z], z)
        if model.training and config.rate < 1 and config.boundary == "null":
            p = [torch.sigmoid(scores[j] - threshold) for j in z]
            c = [s if j == 0 else s + (q - q.detach()) * (s - h[j]).detach() for s, q, j in zip(c, p, z, strict=True)]
        tail = list(range(z[-1] + 1, t + 1))
        d = run(shallow + middle, sum(config.split), c + [h[j] for j in tail], z + tail)
        out.append(spine.logits(d[-1][None, None])[0, 0])
    return torch.stack(out), ids
