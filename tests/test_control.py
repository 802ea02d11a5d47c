"""The baselines without concepts: who sees whom in a window, skipped layers, and their bridge."""

import pytest
import torch

from families import text, tiny_base
from sememe.backbone.calling import CACHE
from sememe.errors import RecipeError
from sememe.models import ControlConfig, ControlForCausalLM
from sememe.options import check_recipe
from sememe.systems import SYSTEMS

GREEDY = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}


def control(attention="sdpa", family="llama", **settings):
    base = tiny_base(family)
    config = ControlConfig(text_config=base.config, base="tiny", lora_rank=0, **settings)
    config._attn_implementation = attention
    return ControlForCausalLM(config, base).eval()


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("window", [1, 2, 3, 20])
def test_a_token_reaches_as_far_as_the_windows_of_all_layers(attention, window):
    model, ids = control(attention, window=window), text(1, 20)
    want = model(ids).logits[0]
    if window == 20:  # as long as the text: the base
        torch.testing.assert_close(want, model.backbone(ids).logits[0], atol=1e-6, rtol=1e-6)
    for position in (0, 1, 4):
        other = ids.clone()
        other[0, position] = (ids[0, position] + 1) % 32
        changed = (model(other).logits[0] != want).any(-1).nonzero()[:, 0].tolist()
        last = 19 if position == 0 else min(19, position + 4 * (window - 1))
        assert changed == list(range(position, last + 1)), "all of them for the first, the sink"


@torch.no_grad()
@pytest.mark.parametrize(
    "settings", [{"window": 3}, {"skipped": (1, 3)}, {"skipped": (1, 3), "bridge": True}], ids=str
)
@pytest.mark.parametrize("family", ["llama", "qwen3", "olmo2"])
def test_cached_is_parallel_and_padding_is_not_seen(family, settings):
    model, ids = control(family=family, **settings), text(1, 14)
    if model.bridge is not None:
        model.bridge.shallow.weight.normal_(std=0.1)
    want = model(ids).logits
    cache, parts = None, []
    for start, end in ((0, 5), (5, 6), (6, 9), (9, 14)):
        mask = torch.ones(1, end, dtype=torch.long)
        out = model(ids[:, start:end], attention_mask=mask, cache=cache, use_cache=True)
        cache = out[CACHE]
        parts.append(out.logits)
    torch.testing.assert_close(torch.cat(parts, 1), want, atol=1e-5, rtol=1e-5)
    padded, mask = (torch.nn.functional.pad(x, (4, 0)) for x in (ids, torch.ones_like(ids)))
    position = (mask.cumsum(1) - 1).clamp(min=0)
    logits = model(padded, attention_mask=mask, position_ids=position).logits[:, 4:]
    torch.testing.assert_close(logits, want, atol=1e-5, rtol=1e-5)
    alone = model.generate(ids, **GREEDY)[:, 14:]
    assert torch.equal(model.generate(padded, attention_mask=mask, **GREEDY)[:, 18:], alone)
    assert torch.equal(model.generate(ids, use_cache=False, **GREEDY)[:, 14:], alone)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_skipping_is_the_base_without_those_layers_and_a_bridge_stands_for_them(attention):
    ids, base = text(2, 12), tiny_base(attention=attention)
    layers = base.model.layers
    base.model.layers = torch.nn.ModuleList([layers[0], layers[3]])
    base.config.num_hidden_layers = 2
    model = control(attention, skipped=(1, 3), bridge=True)
    with torch.no_grad():
        skipped = model(ids).logits
        torch.testing.assert_close(skipped, base(ids, use_cache=False).logits, atol=1e-6, rtol=1e-6)
        assert model.start_bridge(text(64, 24, seed=3))["bridge_explains"] > 0.05
        logits = model(ids).logits
    assert not torch.allclose(logits, skipped, atol=1e-2)
    torch.testing.assert_close(logits[:, 0], skipped[:, 0])  # the first token keeps its state
    model(ids, labels=ids).loss.backward()
    assert model.bridge.shallow.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("family", ["mistral", "gemma3_text"])
def test_a_base_with_its_own_window_is_refused(family):
    with pytest.raises(RecipeError, match=r"sliding window of its own.*try: system=control"):
        control(family=family, window=3)


def test_the_window_of_a_recipe_is_the_cache_of_its_concepts(recipe_values):
    recipe = recipe_values | {"system": "window", "rate": 0.25, "sequence_length": 256}
    for layers, window, changes in (
        (30, round(256 * (4 + 26 * 0.25) / 30) - 1, {"split": [4, 22, 4]}),
        (30, 7, {"split": [4, 22, 4], "shallow_window": 7}),
        (64, 1, {"split": [1, 62, 1], "sequence_length": 8, "rate": 0.01}),
    ):
        config = SYSTEMS["window"].config(check_recipe(recipe | changes, "test"), layers)
        assert config.window == window
