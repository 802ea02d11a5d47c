"""Rows that join and leave in mid-flight say what each says alone."""

import numpy as np
import pytest
import torch

from families import text, tiny_base, tiny_online
from sememe.models.stepping import OnlineRows, rows_of, slot_bytes

VARIANTS = {
    "plain": {"bridge": False},
    "strict": {"segment": "none", "bridge": True},
    "both": {"segment": "both", "bridge": True, "pool": True, "anchor": True},
    "deep": {"segment": "deep", "bridge": True},
    "window": {"segment": "both", "bridge": True, "shallow_window": 6},
    "threshold": {"boundary": "threshold", "bridge": True},
}


def alone(model, prompt, rate, steps):
    """Greedy tokens and the concept ids of every token that was read, by `forward`."""
    with model.dial.at(rate=rate), torch.inference_mode():
        cache, ids, new = model.new_cache(1), torch.tensor([prompt]), []
        for _ in range(steps):
            out = model(ids, cache=cache)
            ids = out.logits[:, -1].argmax(-1, keepdim=True)
            new.append(int(ids))
        return new, cache.concept_ids[0].tolist()


def together(model, requests, hold, generator):
    """The same of all of them; each joins and leaves when it does."""
    rows, waiting = OnlineRows(model), list(range(len(requests)))
    running, result = [], [([], []) for _ in requests]
    while waiting or running:
        while waiting and (not running or generator.random() < 0.4):
            number = waiting.pop(0)
            prompt, rate, _ = requests[number]
            cut = int(generator.integers(1, len(prompt)))
            cache = rows.start([rate])
            for part in (prompt[:cut], prompt[cut:]):
                d_1TD, written = rows.read(cache, [part])
                result[number][1].extend(written[0])
            rows.join(cache, [1])
            running.append(number)
            result[number][0].append(int(rows.logits(d_1TD[:, -1]).argmax()))
        gone = [row for row, n in enumerate(running) if len(result[n][0]) == requests[n][2]]
        for row in reversed(gone):
            rows.leave(row)
            running[row] = running[-1]
            running.pop()
        if running:
            out = rows.step([result[running[row]][0][-1] for row in rows.ready], hold)
            for row, logits_V, concept in zip(out.rows, out.logits_nV, out.concept_n, strict=True):
                result[running[row]][0].append(int(logits_V.argmax()))
                result[running[row]][1].append(concept)
    return result


@pytest.mark.parametrize("hold", [1, 3])
@pytest.mark.parametrize("variant", VARIANTS)
def test_rows_in_company_say_what_they_say_alone(variant, hold):
    model = tiny_online(**VARIANTS[variant])
    generator = np.random.default_rng(0)
    requests = [
        (text(1, int(generator.integers(2, 30)), seed)[0].tolist(), rate, int(length))
        for seed, (rate, length) in enumerate(
            zip([0.2, 0.4, 0.6, 1.0] * 3, generator.integers(1, 25, 12), strict=True)
        )
    ]
    for got, (prompt, rate, steps) in zip(
        together(model, requests, hold, generator), requests, strict=True
    ):
        assert got == alone(model, prompt, rate, steps)


def test_rows_of_a_base_say_what_generate_says():
    base = tiny_base()
    rows, prompts = rows_of(base), [text(1, n, n)[0].tolist() for n in (3, 9, 5)]
    said = []
    for prompt in prompts:
        cache = rows.start([1.0])
        d_1TD, _ = rows.read(cache, [prompt])
        rows.join(cache, [1])
        said.append([int(rows.logits(d_1TD[:, -1]).argmax())])
    for _ in range(10):
        out = rows.step([row[-1] for row in said])
        for row, logits_V in zip(out.rows, out.logits_nV, strict=True):
            said[row].append(int(logits_V.argmax()))
    for prompt, new in zip(prompts, said, strict=True):
        ids = base.generate(
            torch.tensor([prompt]), max_new_tokens=11, do_sample=False, eos_token_id=None
        )
        assert ids[0, len(prompt) :].tolist() == new


@pytest.mark.parametrize("segment", ["none", "deep", "both"])
def test_bytes_of_a_row_are_those_that_it_uses(segment):
    model = tiny_online(segment=segment)
    rows = OnlineRows(model)
    cache = rows.start([0.4])
    rows.read(cache, [text(1, 60)[0].tolist()])
    slots = [
        one.used() * layers for one, layers in zip(cache.slices, model.config.split, strict=True)
    ]
    assert rows.bytes_at(60, int(cache.concepts[0])) == sum(slots) * slot_bytes(model)
