"""transformers' `generate` over the concept cache: greedy, sampling, beams, batches, streamers,
continuing."""

import pytest
import torch
from transformers.generation.streamers import BaseStreamer

import sememe.backbone.cache as cache_module
from families import left_padded, text, tiny_online, uncached_greedy
from sememe.backbone.calling import CACHE, set_checkpointing

GREEDY = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "pad_token_id": 0}


@pytest.fixture(scope="module")
def model():
    return tiny_online()


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "mistral"])
@pytest.mark.parametrize("length", [1, 7, 20])
def test_greedy_is_the_uncached_greedy(family, length):
    model, ids = tiny_online(family), text(3, length)
    assert torch.equal(model.generate(ids, **GREEDY), uncached_greedy(model, ids))
    assert torch.equal(model.generate(ids, **GREEDY, use_cache=False), uncached_greedy(model, ids))


def test_left_padded_batch_is_its_singles(model):
    rows = [text(1, n, seed=n) for n in (5, 9, 14)]
    padded = torch.cat([torch.nn.functional.pad(row, (14 - row.shape[1], 0)) for row in rows])
    mask = torch.cat(
        [torch.nn.functional.pad(torch.ones_like(row), (14 - row.shape[1], 0)) for row in rows]
    )
    together = model.generate(padded, attention_mask=mask, **GREEDY)[:, 14:]
    for row, got in zip(rows, together, strict=True):
        assert torch.equal(model.generate(row, **GREEDY)[0, row.shape[1] :], got)


@pytest.mark.parametrize("window", [None, 24])
def test_long_and_short_prompts_decode_together(window):
    """Prompts of 10 to 200 tokens, read 48 at a time: most chunks are padding in some rows, and
    whole in others."""
    model = tiny_online(prefill_chunk=48, shallow_window=window)
    rows = [text(1, int(n), seed=int(n)) for n in torch.linspace(200, 10, 12)]
    ids, mask = left_padded(rows)
    together = model.generate(ids, attention_mask=mask, **GREEDY)[:, ids.shape[1] :]
    for row, got in zip(rows, together, strict=True):
        assert torch.equal(model.generate(row, **GREEDY)[0, row.shape[1] :], got)


@pytest.mark.parametrize("batch", [1, 3])
def test_beams_are_equal_with_and_without_cache(model, batch):
    settings = {**GREEDY, "num_beams": 3, "num_return_sequences": 2}
    ids = text(batch, 8)
    assert torch.equal(
        model.generate(ids, **settings), model.generate(ids, **settings, use_cache=False)
    )


def test_sampling_is_equal_with_and_without_cache(model):
    ids, drawn = text(2, 8), []
    for use_cache in (True, False):
        torch.manual_seed(3)
        drawn.append(
            model.generate(
                ids,
                max_new_tokens=12,
                do_sample=True,
                top_k=20,
                use_cache=use_cache,
                num_return_sequences=2,
                pad_token_id=0,
            )
        )
    assert torch.equal(*drawn)


def test_going_on_from_a_returned_cache(model):
    ids = text(1, 9)
    whole = model.generate(ids, **{**GREEDY, "max_new_tokens": 12})
    first = model.generate(
        ids, **{**GREEDY, "max_new_tokens": 5, "min_new_tokens": 5}, return_dict_in_generate=True
    )
    # An explicit mask: a random model writes the pad token too, and generate would take it for
    # padding.
    second = model.generate(
        first.sequences,
        cache=first[CACHE],
        attention_mask=torch.ones_like(first.sequences),
        **{**GREEDY, "max_new_tokens": 7, "min_new_tokens": 7},
    )
    assert torch.equal(second, whole)


def test_streamer_and_concept_ids(model):
    class Collect(BaseStreamer):
        def __init__(self):
            self.tokens = []

        def put(self, value):
            self.tokens += value.flatten().tolist()

        def end(self):
            self.tokens.append("end")

    ids, cache, streamer = text(1, 9), model.new_cache(1), Collect()
    made = model.generate(ids, cache=cache, streamer=streamer, **GREEDY)
    assert streamer.tokens == [*made[0].tolist(), "end"]
    assert torch.equal(cache.concept_ids, model(made[:, :-1]).concept_ids), (
        "what was written while decoding"
    )


def test_cache_holds_what_the_formula_says(model):
    """S·T + M·concepts + D·(concepts + tail) rows of keys and values, plus the slots kept in
    reserve."""
    cache = model.new_cache(1)
    model(text(1, 100), cache=cache)
    concepts, tail = int(cache.concepts[0]), int(cache.tail[0])
    assert tuple(one.used for one in cache.slices) == (
        100,
        concepts,
        concepts + tail,
    )
    assert concepts < 60 and tail <= model.config.max_tail
    rows = (
        1 * 101 + 2 * (concepts + 1) + 1 * (concepts + tail + 1)
    )  # one slot a layer takes what is not kept
    assert cache.bytes() == rows * 2 * 1 * 32 * 4


@pytest.mark.parametrize("window", [None, 24])
def test_chunks_of_a_prompt_find_their_room_made(window, monkeypatch):
    """Keys and values are put in place once: a prompt in chunks does not copy its cache with each
    of them."""
    grown, model = [], tiny_online(prefill_chunk=16, shallow_window=window)
    monkeypatch.setattr(
        cache_module,
        "_grow",
        lambda x, size, grow=cache_module._grow: grown.append(x.dim()) or grow(x, size),
    )
    cache = model.new_cache(1)
    model(text(1, 100), cache=cache)
    assert grown and 4 not in grown, "positions grow once for each slice, its layers never"
    assert cache.slices[0].capacity == (window + 1 if window else 100)
    assert cache.slices[1].capacity == cache.slices[2].capacity == 40 + cache_module.GROWTH
    model(text(1, 100), cache=cache)
    assert cache.concepts[0] > 60 and cache.get_seq_length() == 200


@pytest.mark.parametrize(
    "settings", [{"cache_implementation": "static"}, {"prompt_lookup_num_tokens": 3}]
)
def test_what_cannot_work_is_refused(model, settings):
    with pytest.raises(ValueError, match=r"try:|not support"):
        model.generate(text(1, 8), **GREEDY, **settings)


def test_gradient_checkpointing_changes_nothing(model):
    ids = text(2)
    grads = []
    for checkpointing in (False, True):
        one = tiny_online().train()
        if checkpointing:
            set_checkpointing(one)
        one(ids, labels=ids).loss.backward()
        grads.append({n: p.grad for n, p in one.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        torch.testing.assert_close(grad, grads[1][name], atol=1e-6, rtol=1e-4)
