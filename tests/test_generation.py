"""transformers' `generate` over the concept cache: greedy, sampling, beams, batches, streamers,
caches of any name, going on."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from transformers import DynamicCache, pipeline

from conftest import byte_tokenizer
from families import left_padded, refused, stepwise, text, tiny_base, tiny_online, uncached_greedy
from sememe.backbone.calling import CACHE, CACHE_NAMES
from test_conformance import CLOSE, GREEDY, SETTINGS, SOME, batch, each_family, made

LONG = {"do_sample": False, "pad_token_id": 0, "max_new_tokens": 12, "min_new_tokens": 12}


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "mistral"])
@pytest.mark.parametrize("length", [1, 7, 20])
def test_greedy_is_the_uncached_greedy(family, length):
    model, ids = tiny_online(family), text(3, length)
    assert torch.equal(model.generate(ids, **LONG), uncached_greedy(model, ids))


def test_streamer_and_concept_ids():
    class Collect(list):
        def put(self, value):
            self.extend(value.flatten().tolist())

        def end(self):
            self.append("end")

    model, ids, streamer = made(), text(1, 9), Collect()
    cache = model.new_cache(1)
    new = model.generate(ids, cache=cache, streamer=streamer, **LONG)
    assert streamer == [*new[0].tolist(), "end"]
    assert torch.equal(cache.concept_ids, model(new[:, :-1]).concept_ids), "written while decoding"


@pytest.mark.parametrize("segment", ["none", "deep", "both"])
def test_cache_holds_what_the_formula_says(segment):
    """Rows of keys and values: S·T in the shallow slice, M·concepts and D·concepts, and in each
    layer a slot that takes what is not kept. Beside them `max_tail` slots for normal tokens where
    they are seen, however long the text."""
    model = tiny_online(segment=segment)
    cache, tails = model.new_cache(1), model.config.max_tail
    model(text(1, 100), cache=cache)
    concepts, ring = int(cache.concepts[0]), tails * (segment == "both")
    assert concepts < 60
    assert [one.used() for one in cache.slices] == [100, ring + concepts, tails + concepts]
    rows = 101 + 2 * (ring + concepts + 1) + tails + concepts + 1
    assert cache.bytes() == rows * 2 * 1 * 32 * 4
    for token in text(1, 40)[0]:
        model(token[None, None], cache=cache)
    concepts = int(cache.concepts[0])
    assert [one.used() for one in cache.slices] == [140, ring + concepts, tails + concepts]


@pytest.mark.parametrize(
    "settings",
    [
        *SETTINGS,
        *({"family": family} for family in SOME),
        {"boundary": "fixed"},
        {"head": "joint"},
        {"split": (2, 0, 2)},
        {"rate": 1.0},
        {"attention": "eager"},
        {"prefill_chunk": 5},  # most chunks are padding in some rows
        {"prefill_chunk": 5, "shallow_window": 4},
    ],
    ids=str,
)
def test_a_row_does_not_depend_on_its_neighbours(settings):
    """Ragged rows alone and in batches, and in another order: the same tokens and the same
    concepts, exactly."""
    model = made(**settings)
    rows = [text(1, n, seed=n) for n in (9, 3, 14, 1, 7)]
    long = GREEDY | {"max_new_tokens": 36, "min_new_tokens": 36}  # the cache grows twice

    def continued(*which):
        ids, mask = left_padded([rows[i] for i in which])
        cache = model.new_cache(len(which))
        new = model.generate(ids, attention_mask=mask, cache=cache, **long)[:, ids.shape[1] :]
        concepts = zip(cache.concept_ids, mask, strict=True)
        concepts = [ids_T[mask_T.argmax() :].tolist() for ids_T, mask_T in concepts]
        return list(zip(new.tolist(), concepts, strict=True))

    alone = [continued(i)[0] for i in range(5)]
    for which in ((3, 2), range(5), range(4, -1, -1)):
        assert continued(*which) == [alone[i] for i in which]


def generated(model, ids, **named):
    """`generate`, or None where transformers refuses a name. Its own warning of an old name is the
    caller's, not ours."""
    torch.manual_seed(3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        try:
            return model.generate(ids, **named)
        except ValueError as error:
            assert "not used by the model" in str(error), error
            return None


@each_family
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"num_beams": 3, "num_return_sequences": 2},
        {"num_beams": 3, "do_sample": True, "min_new_tokens": None},
        {"do_sample": True, "top_p": 0.9, "num_return_sequences": 3, "min_new_tokens": None},
        {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "bad_words_ids": [[5]]},
        {"num_beams": 2, "length_penalty": 0.5, "early_stopping": True, "min_new_tokens": None},
    ],
    ids=str,
)
def test_left_padded_decoding_is_the_same_with_a_cache_of_any_name_and_without(family, settings):
    model, (ids, mask), used = made(family), batch(), []
    named = {**GREEDY, **settings, "attention_mask": mask}
    want = generated(model, ids, use_cache=False, **named)
    assert len(want) == 3 * settings.get("num_return_sequences", 1)
    assert torch.equal(generated(model, ids, **named), want)
    rows = 3 * max(settings.get(name, 1) for name in ("num_beams", "num_return_sequences"))
    for name in CACHE_NAMES:
        cache = model.new_cache(rows)
        got = generated(model, ids, **{name: cache}, **named)
        if got is not None:
            assert torch.equal(got, want) and cache.get_seq_length() >= want.shape[1] - 1, name
            used.append(name)
    assert {"cache", CACHE} <= set(used)


@each_family
def test_going_on_from_a_cache_of_any_name(family):
    model, ids = tiny_online(family), text(1, 9)
    want = uncached_greedy(model, ids)
    for name in CACHE_NAMES:
        cache = model.new_cache(1)
        first = model.generate(ids, cache=cache, **GREEDY)
        # A random model writes the pad token too, and `generate` would take it for padding.
        named = {"attention_mask": torch.ones_like(first), name: cache}
        got = generated(model, first, **named, **GREEDY)
        assert got is None or torch.equal(got, want), name


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_a_second_turn_after_rows_that_ended_at_different_places(settings):
    """What is masked in the middle of a row is not there: neither for the gate, which compares
    neighbours, nor for what the cache remembers of the last token."""
    model = made(**settings)
    parts = [(text(1, n, seed=n), text(1, 7, seed=30 + n)) for n in (9, 4, 6)]
    ids = torch.cat([torch.cat([F.pad(a, (0, 9 - a.shape[1])), b], 1) for a, b in parts])
    mask = (ids > 0).long()
    whole, steps = model(ids, attention_mask=mask), stepwise(model, ids, [9, 10, 16], mask)
    new = model.generate(ids, attention_mask=mask, **GREEDY)[:, 16:]
    for row, part in enumerate(parts):
        real, alone = mask[row].bool(), torch.cat(part, 1)
        want = model(alone)
        for logits, written in ((whole.logits, whole.concept_ids), steps[:2]):
            torch.testing.assert_close(logits[row, real], want.logits[0], **CLOSE)
            assert torch.equal(written[row, real], want.concept_ids[0])
            assert (written[row, ~real] == -1).all()
        assert torch.equal(new[row], model.generate(alone, **GREEDY)[0, alone.shape[1] :])


@torch.no_grad()
def test_going_on_from_embeddings():
    model, ids = made(), text(2)
    embed = model.get_input_embeddings()
    first = model.generate(inputs_embeds=embed(ids), return_dict_in_generate=True, **GREEDY)
    whole = embed(torch.cat([ids, first.sequences, text(2, 5, seed=8)], 1))
    again = model.generate(inputs_embeds=whole, cache=first[CACHE], **GREEDY)
    assert torch.equal(again, model.generate(inputs_embeds=whole, **GREEDY))


def test_generating_from_nothing_and_in_pipelines():
    assert made().generate(max_new_tokens=4, do_sample=False).shape[1] <= 5  # from the start token
    tokenizer, model = byte_tokenizer(), copy.deepcopy(made(base=None, lora_rank=0))
    model.resize_token_embeddings(len(tokenizer))
    settings = {"max_new_tokens": 5, "do_sample": False, "return_full_text": False}
    pipe = pipeline("text-generation", model=model, tokenizer=tokenizer)
    texts = ["the cat", "a", "the dog saw"]
    assert pipe(texts, batch_size=3, **settings) == [pipe(one, **settings) for one in texts]


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"cache": DynamicCache()}, "is a DynamicCache .*need this model's own"),
        ({"cache": made().new_cache(2), "num_beams": 3}, r"with 2 rows, .*new_cache\(3\)"),
        ({"output_attentions": True, "return_dict_in_generate": True}, "no .* table of weights"),
        ({"assistant_early_exit": 2}, "takes tokens back.*try: "),
        ({"prompt_lookup_num_tokens": 3}, "takes tokens back"),
        ({"assistant_model": tiny_base()}, "takes tokens back"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_decoding_that_cannot_work_is_refused(settings, said):
    refused(lambda: made().generate(text(1), **{**GREEDY, **settings}), said)
