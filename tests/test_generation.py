"""transformers' `generate` over the concept cache: greedy, sampling, beams, batches, streamers,
continuing."""

import pytest
import torch
from transformers.generation.streamers import BaseStreamer

from families import left_padded, text, tiny_online, uncached_greedy
from sememe.backbone.cache import GROWTH
from sememe.backbone.calling import CACHE

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
    concepts, tail = int(cache.concepts[0]), int(cache.memory.gate.tail[0])
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
def test_chunks_of_a_prompt_find_their_room_made(window):
    """A prompt in chunks does not copy its cache with each of them."""
    model = tiny_online(prefill_chunk=16, shallow_window=window)
    cache = model.new_cache(1)
    model(text(1, 100), cache=cache)
    shallow, middle, deep = (part.capacity for part in cache.slices)
    assert (shallow, middle, deep) == (window + 1 if window else 100, 40 + GROWTH, 40 + GROWTH)
    model(text(1, 100), cache=cache)
    assert cache.concepts[0] > 60 and cache.get_seq_length() == 200
