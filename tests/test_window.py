"""The sliding window baseline: who sees whom, with and without a cache, padded or not."""

import pytest
import torch

from families import text, tiny_base
from sememe.backbone.calling import CACHE
from sememe.errors import RecipeError
from sememe.models import ControlConfig, ControlForCausalLM
from sememe.options import check_recipe
from sememe.systems import SYSTEMS

LAYERS = 4


def windowed(
    window: int | None, attention: str = "sdpa", family: str = "llama"
) -> ControlForCausalLM:
    base = tiny_base(family)
    config = ControlConfig(
        text_config=base.config,
        base="tiny",
        lora_rank=0,
        window=window,
        attn_implementation=attention,
    )
    return ControlForCausalLM(config, base).eval()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("window", [1, 2, 3])
def test_a_token_reaches_as_far_as_the_windows_of_all_layers(attention, window):
    model, ids = windowed(window, attention), text(1, 20)
    with torch.no_grad():
        want = model(ids).logits[0]
        for place in (0, 1, 4):
            other = ids.clone()
            other[0, place] = (ids[0, place] + 1) % 32
            changed = (model(other).logits[0] != want).any(-1).nonzero()[:, 0].tolist()
            last = 19 if place == 0 else min(19, place + LAYERS * (window - 1))
            assert changed == list(range(place, last + 1)), "all of them for the first, the sink"


def test_a_window_as_long_as_the_text_is_the_base():
    model, ids = windowed(12), text(2, 12)
    with torch.no_grad():
        torch.testing.assert_close(
            model(ids).logits, model.backbone(ids).logits, atol=1e-6, rtol=1e-6
        )
        assert (model(text(2, 16)).logits - model.backbone(text(2, 16)).logits).abs().max() > 1e-3


@pytest.mark.parametrize("family", ["llama", "qwen3", "olmo2"])
def test_cached_is_parallel_and_padding_is_not_seen(family):
    model, ids = windowed(3, family=family), text(1, 14)
    with torch.no_grad():
        want = model(ids).logits
        out = model(ids[:, :5], use_cache=True)
        parts = [out.logits]
        for start in (5, 6, 9):
            end = {5: 6, 6: 9, 9: 14}[start]
            mask, cache = torch.ones(1, end, dtype=torch.long), out[CACHE]
            parts.append(
                model(ids[:, start:end], attention_mask=mask, cache=cache, use_cache=True).logits
            )
        torch.testing.assert_close(torch.cat(parts, 1), want, atol=1e-5, rtol=1e-5)
        padded = torch.cat([torch.zeros(1, 4, dtype=torch.long), ids], 1)
        mask = torch.cat([torch.zeros(1, 4, dtype=torch.long), torch.ones_like(ids)], 1)
        position = (mask.cumsum(1) - 1).clamp(min=0)
        got = model(padded, attention_mask=mask, position_ids=position).logits[:, 4:]
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    greedy = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    alone = model.generate(ids, **greedy)[:, 14:]
    assert torch.equal(model.generate(padded, attention_mask=mask, **greedy)[:, 18:], alone)
    assert torch.equal(model.generate(ids, use_cache=False, **greedy)[:, 14:], alone)


@pytest.mark.parametrize("family", ["mistral", "gemma3_text"])
def test_a_base_with_its_own_window_is_refused(family):
    with pytest.raises(RecipeError, match=r"sliding window of its own.*try: system=control"):
        windowed(3, family=family)


@pytest.mark.parametrize(
    "layers, changes, want",
    [
        (30, {"split": [4, 22, 4]}, round(256 * (4 + 26 * 0.25) / 30) - 1),
        (30, {"split": [4, 22, 4], "shallow_window": 7}, 7),
        (64, {"split": [1, 62, 1], "sequence_length": 8, "rate": 0.01}, 1),
    ],
)
def test_the_window_of_a_recipe_is_the_cache_of_its_concepts(recipe_values, layers, changes, want):
    values = {**recipe_values, "system": "window", "rate": 0.25, "sequence_length": 256, **changes}
    recipe = check_recipe(values, "test")
    assert SYSTEMS["window"].config(recipe, layers).window == want
