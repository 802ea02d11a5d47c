"""The baselines without concepts: who sees whom in a window, layers that are left out, the maps in
their gaps, and the scan that chooses them."""

import pytest
import torch

from conftest import ctrl_c, run
from families import text, tiny_base
from sememe.backbone.calling import CACHE
from sememe.backbone.split import Spine
from sememe.errors import Interrupted, RecipeError
from sememe.evaluation.speed import cache_bytes
from sememe.measure import Options, benchmark
from sememe.models import ControlConfig, ControlForCausalLM, OnlineConfig
from sememe.models.loading import load_model
from sememe.models.pruning import Scan, removable, runs
from sememe.options import check_recipe
from sememe.systems import SYSTEMS
from sememe.training.run import train

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


SETTINGS = {"window": 3}, {"skipped": (1, 3)}, {"left_out": [1, 3], "bridge": True}
CACHED = [(family, each) for family in ("llama", "qwen3", "olmo2") for each in SETTINGS]


@torch.no_grad()
@pytest.mark.parametrize(
    "family, settings", [*CACHED, ("gemma3_text", {"left_out": [2, 3], "bridge": True})], ids=str
)
def test_cached_is_parallel_and_padding_is_not_seen(family, settings):
    model, ids = control(family=family, **settings), text(1, 14)
    for bridge in model.bridge:
        for p in bridge.parameters():
            p.normal_(std=0.1)
    want = model(ids).logits
    cache, parts = None, []
    for start, end in ((0, 5), (5, 6), (6, 9), (9, 14)):
        mask = torch.ones(1, end, dtype=torch.long)
        out = model(ids[:, start:end], attention_mask=mask, cache=cache, use_cache=True)
        cache = out[CACHE]
        parts.append(out.logits)
    torch.testing.assert_close(torch.cat(parts, 1), want, atol=1e-5, rtol=1e-5)
    if family == "llama" and "window" not in settings:  # all of its layers keep as much
        whole = cache_bytes(tiny_base()(ids, use_cache=True)[CACHE])
        assert cache_bytes(cache) == whole * model.config.cache_share(14) == whole / 2
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
        (share,) = model.start_bridge(text(64, 24, seed=3)).values()
        logits = model(ids).logits
    assert share > 0.05 and not torch.allclose(logits, skipped, atol=1e-2)
    torch.testing.assert_close(logits[:, 0], skipped[:, 0])  # the first token keeps its state
    model(ids, labels=ids).loss.backward()
    assert model.bridge[0].shallow.weight.grad.abs().sum() > 0


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral"])
def test_pruned_is_the_loop_without_those_layers_and_with_maps_instead(family):
    """The last layer too, whose states are those before the final norm."""
    base, ids = tiny_base(family, num_hidden_layers=5), text(2, 12)
    model = pruned(tiny_base(family, num_hidden_layers=5), [4, 1])
    shares = model.start_bridge(text(64, 24, seed=3))
    weights = [p.numel() for p in base.model.layers[0].parameters() if p.dim() == 2]
    of_map = sum(p.numel() for p in model.bridge[0].parameters() if p.dim() == 2) / sum(weights)
    assert model.config.left_out == [1, 4]
    assert model.config.layer_share() == pytest.approx((3 + 2 * of_map) / 5)
    assert list(shares) == ["map over layers 1 explains", "map over layers 4 explains"]
    assert all(0.05 < share < 1 for share in shares.values())
    position = torch.arange(12).expand(2, 12)
    seen = position[:1, None, :, None] >= position[:1, None, None, :]
    if family == "mistral":
        seen &= position[:1, None, :, None] < position[:1, None, None, :] + 6
    h = base.model.embed_tokens(ids)
    rope = base.model.rotary_emb(h, position)
    maps = dict(zip((1, 4), model.bridge, strict=True))
    for number, layer in enumerate(base.model.layers):
        if number in maps:
            gap_map = maps[number]
            x = (h - gap_map.shallow_mean) / gap_map.shallow_scale
            units = torch.nn.functional.gelu(x @ gap_map.hidden.up.T + gap_map.hidden.bias)
            mapped = h + gap_map.scale * (gap_map.shallow(x) + units @ gap_map.hidden.down.T)
            h = torch.cat([h[:, :1], mapped[:, 1:]], 1)
        else:
            h = layer(h, attention_mask=seen, position_ids=position, position_embeddings=rope)
    want = base.lm_head(base.model.norm(h))
    torch.testing.assert_close(model(ids).logits, want, atol=1e-5, rtol=1e-5)


def pruned(base, layers):
    model = ControlForCausalLM(ControlConfig(text_config=base.config, lora_rank=0), base).eval()
    model.leave_out(layers)
    return model


@torch.no_grad()
def test_a_scan_says_what_pruning_costs_and_leaves_out_what_does_nothing():
    base, ids, lines = tiny_base(num_hidden_layers=5), text(64, 24, seed=3), []
    idle = base.model.layers[3]
    for linear in (idle.self_attn.o_proj, idle.mlp.down_proj):
        linear.weight.zero_()
    scan = Scan(base, ids)
    assert scan.loss([3]) == pytest.approx(scan.loss([]), abs=1e-5)
    assert scan.choose(1, lines.append, progress=False) == [3] and "(+0.000)" in lines[0]
    # As tried one by one; a trial is the forward of the model that it stands for.
    chosen = scan.choose(2, lines.append, progress=False)
    costs = {layer: scan.loss([layer, 3]) for layer in (1, 2, 4)}
    assert chosen == sorted([3, min(costs, key=costs.get)])
    model = pruned(base, chosen)
    for bridge, gap in zip(model.bridge, runs(chosen), strict=True):
        bridge.load_state_dict(scan.map_over(gap).state_dict(), strict=False)  # it has no units
    loss = model(scan.ids_BT, labels=scan.ids_BT).loss
    assert scan.loss(chosen) == pytest.approx(float(loss), abs=1e-4)


@pytest.mark.parametrize("layers", [[0, 2], [4], [], 4, 0])
def test_layers_that_cannot_be_left_out_are_refused(layers):
    with pytest.raises(RecipeError, match=r"leave_out = .*of the layers 1–3, .*of these 3"):
        removable(Spine(tiny_base()), layers)
    with pytest.raises(RecipeError, match=r"of the layers 2–3"):  # one of each kind stays
        removable(Spine(tiny_base("gemma3_text")), [1])


def test_a_run_is_resumed_with_the_layers_of_its_scan(recipe_values, tmp_path, monkeypatch):
    values = recipe_values | {"system": "prune", "leave_out": 2, "save_every": 2}
    run(values, tmp_path / "whole")
    lines = []
    with ctrl_c(3), pytest.raises(Interrupted):
        run(values, tmp_path / "r")
    monkeypatch.setattr(Scan, "choose", None)
    train(check_recipe(values, "test"), tmp_path / "r", say=lines.append, show=False)
    assert "resuming from step 3 of 8" in lines
    models = [load_model(tmp_path / name)[0] for name in ("whole", "r")]
    (one, two), ids = models, text(1, 12)
    assert one.config.left_out == two.config.left_out and len(one.config.left_out) == 2
    assert one.config.system == "prune" and one.config.cache_share(8) == 0.5
    assert torch.equal(one(ids).logits, two(ids).logits)
    figures = benchmark(str(tmp_path / "r"), 32, options=Options(new_tokens=4, repeats=1, batch=2))
    assert figures["cache_reduction"] == 2 and figures["realised_rate"] is None
    layers, head = one.backbone.get_decoder().layers, one.backbone.config.vocab_size * 64
    layer = sum(p.numel() for name, p in layers[0].named_parameters() if "lora" not in name)
    left = 2 * layer + 3 * 64 * 64 * len(runs(one.config.left_out)) + head  # map, up, down
    assert figures["ceiling_decode_speedup"] == pytest.approx((4 * layer + head) / left, rel=0.01)
    with pytest.raises(RecipeError, match="system: prune: need leave_out"):
        run(recipe_values | {"system": "prune"}, tmp_path / "none")


@pytest.mark.parametrize(
    "config, share",
    [
        (ControlConfig(), 1.0),
        (ControlConfig(skipped=(8, 24)), 0.5),
        (ControlConfig(left_out=[3, 5, 6, 9, 20, 30, 31, 12]), 0.75),
        (ControlConfig(window=63), 64 / 256),
        (ControlConfig(window=500), 1.0),
        (OnlineConfig(split=(4, 22, 6), rate=0.5, max_tail=8), (18 + 28 / 32) / 32),
        (OnlineConfig(split=(8, 16, 8), rate=0.25, shallow_window=31), (1 + 6 + 24 / 16) / 32),
    ],
    ids=lambda x: "",
)
def test_cache_share_is_what_the_end_of_a_text_needs(config, share):
    assert config.cache_share(256) == share
    if config.writes_concepts:  # at the realised rate
        assert config.cache_share(256, 1.0) > share


@pytest.mark.parametrize("family", ["mistral", "gemma3_text"])
def test_a_base_with_its_own_window_is_refused(family):
    with pytest.raises(RecipeError, match=r"sliding window of its own.*try: system=control"):
        control(family=family, window=3)


def test_the_window_of_a_recipe_is_the_cache_of_its_concepts(recipe_values):
    recipe = recipe_values | {"system": "window", "rate": 0.25, "max_tail": 8}
    recipe |= {"sequence_length": 256}
    for layers, window, changes in (
        (30, round(256 * (4 + 26 * (0.25 + 1 / 32)) / 30) - 1, {"split": [4, 22, 4]}),
        (30, 7, {"split": [4, 22, 4], "shallow_window": 7}),
        (64, 1, {"split": [1, 62, 1], "sequence_length": 8, "rate": 0.01, "max_tail": 0}),
    ):
        config = SYSTEMS["window"].config(check_recipe(recipe | changes, "test"), layers)
        assert config.window == window
