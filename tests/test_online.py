"""The online model: identity at birth, fast = specification, cached = parallel, causality."""

import copy
import json

import pytest
import torch

from families import FAMILIES, left_padded, positions, stepwise, text, tiny_base, tiny_online
from reference import per_step_logits
from sememe.backbone.calling import CACHE_NAMES
from sememe.backbone.split import self_check
from sememe.backbone.tails import check_keys
from sememe.errors import BaseError, CheckpointError, RecipeError
from sememe.models import OnlineConfig, OnlineForCausalLM

# Logits here are of order 10. fp32 rounding through 4 layers was 1e-5 at worst (ragged shapes
# change the order of sums); a wrong mask, position or slot changed logits by 0.1 and more.
CLOSE = {"atol": 2e-4, "rtol": 0}
LEFT_PAD = torch.tensor([[0] * 4 + [1] * 16, [1] * 20])
SETTINGS = [
    *({"family": family} for family in FAMILIES),
    {"segment": "none"},
    {"segment": "none", "pool": True, "anchor": True, "family": "gemma3_text"},
    {"segment": "deep", "family": "mistral"},
    {"bridge": False},
    {"attention": "eager"},
    {"rate": 1.0},
    {"quantise": 0.0},
    {"split": (1, 0, 3)},
    {"bridge": True, "codes_per_concept": 3},
    {"anchor": True, "codes_per_concept": 2, "head": "nearest", "bridge": True, "quantise": 0.5},
    {"head": "joint"},
    {"head": "joint", "codes_per_concept": 3, "code_temperature": 0.5},
    {"head": "nearest", "codes_per_concept": 2},
    {"boundary": "fixed", "rate": 0.25},
    {"boundary": "fixed", "bridge": True, "anchor": True, "family": "gemma3_text"},
    {"boundary": "threshold"},
    {"boundary": "threshold", "bridge": True, "quantise": 0.0},
    {"boundary": "threshold", "bridge": True, "codes_per_concept": 2},
    {"boundary": "entropy", "bridge": True, "anchor": True},
    {"boundary": "surprise", "bridge": True},
    {"shallow_window": 4, "split": (2, 1, 1), "family": "mistral"},
    {"shallow_window": 1},
    {"shallow_window": 3, "family": "gemma3_text", "bridge": True},
    {"pool": True, "bridge": True, "quantise": 0.0},
    {"pool": True, "anchor": True, "head": "nearest", "boundary": "fixed"},
]
each_setting = pytest.mark.parametrize("settings", SETTINGS, ids=str)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_identity_at_birth(family, attention):
    """Rate 1, codes bypassed, fresh LoRA: the base's logits, with and without left padding."""
    base, ids = tiny_base(family, attention=attention), text()
    whole, real = base(ids).logits, LEFT_PAD.bool()
    padded = base(ids, attention_mask=LEFT_PAD, position_ids=positions(LEFT_PAD)).logits
    options = {"split": (1, 2, 1), "rate": 1.0, "quantise": 0.0, "num_concepts": 8, "base": "tiny"}
    config = OnlineConfig(text_config=base.config, **options)
    config._attn_implementation = attention
    model = OnlineForCausalLM(config, base).eval()
    torch.testing.assert_close(model(ids).logits, whole, **CLOSE)
    logits = model(ids, attention_mask=LEFT_PAD).logits
    torch.testing.assert_close(logits[real], padded[real], **CLOSE)


class Forgetful(torch.nn.Module):
    """A layer as those of 5.40: what is not called by its name is swallowed."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x, past_key_values=None, **named):
        return self.layer(x, **{key: named[key] for key in named if key not in CACHE_NAMES})


class Nameless(Forgetful):
    def forward(self, x, **named):
        return super().forward(x, **named)


def test_self_check_accepts_the_families_and_refuses_what_it_cannot_split():
    assert max(self_check(tiny_base(family)) for family in FAMILIES) < 1e-5
    unlike, nameless = "differs from the loop", "names no cache"
    for kind, said in ((Forgetful, unlike), (Nameless, nameless)):
        base = tiny_base()
        base.model.layers[2] = kind(base.model.layers[2])
        with pytest.raises(BaseError, match=said):
            self_check(base)
    base = tiny_base()
    base.model.register_forward_hook(lambda m, a, out: type(out)(out[0] * 1.5))
    with pytest.raises(BaseError, match=unlike):
        self_check(base)


@each_setting
def test_fast_forward_is_the_specification(settings):
    """Logits, ids and gradients against the per-step reading, on ragged rows."""
    model, ids = tiny_online(**settings), text(3, seed=1)
    out = model(ids)
    for row in range(3):
        want, want_ids = per_step_logits(model, ids[row])
        torch.testing.assert_close(out.logits[row], want, **CLOSE)
        assert out.concept_ids[row].tolist() == want_ids
    if model.dial.rate < 1 and model.config.boundary != "fixed":
        assert len(set((out.concept_ids != -1).sum(1).tolist())) > 1, "rows must be ragged"

    slow = copy.deepcopy(model).train()
    logits = torch.stack([per_step_logits(slow, row)[0] for row in ids])
    torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    model.train()
    model(ids, labels=ids).loss.backward()
    want_grads = {n: p.grad for n, p in slow.named_parameters() if p.grad is not None}
    grads = {n: p.grad for n, p in model.named_parameters() if n in want_grads}
    assert want_grads
    torch.testing.assert_close(grads, want_grads, atol=2e-5, rtol=1e-3)


@pytest.mark.parametrize(
    "settings", [*SETTINGS, {"codes_per_concept": 3, "num_concepts": 4096}], ids=str
)
def test_cached_is_parallel(settings):
    model = tiny_online(**settings)
    ids, mask = left_padded([text(1, 20), text(1, 14, seed=1)])
    whole, real = model(ids, attention_mask=mask), mask.bool()
    for ends in (range(1, 21), [7, 8, 9, 14, 20]):
        logits, written, _ = stepwise(model, ids, ends, mask)
        torch.testing.assert_close(logits[real], whole.logits[real], **CLOSE)
        assert torch.equal(written, whole.concept_ids)


@each_setting
def test_causality_by_perturbation(settings):
    """Change any token: the ids before it are the same, and so are the logits but for the last bit
    (a changed number of concepts changes the shape of the packed matmuls: 4e-6 seen; a leak of one
    future token gives > 0.1)."""
    model, ids = tiny_online(**settings), text(1, 18)
    model.train()  # the gate's threshold must be causal in training too; no dropout here
    frozen = copy.deepcopy(model.state_dict())
    before = model(ids)
    for t in range(1, 18):
        changed = ids.clone()
        changed[0, t] = (changed[0, t] + 17) % 90 + 3
        model.load_state_dict(frozen)
        after = model(changed)
        assert torch.equal(after.concept_ids[:, :t], before.concept_ids[:, :t])
        torch.testing.assert_close(after.logits[:, :t], before.logits[:, :t], atol=2e-5, rtol=0)
        felt = (after.logits[:, t:] - before.logits[:, t:]).abs().max()
        assert felt > 1e-3, "a change must be felt from t on"


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"split": (1, 1, 1)}, "and 4 in all, as this base has"),
        ({"rate": 0.0}, "rate = 0"),
        ({"rate": 0.1, "max_tail": 3}, "need max_tail ≥ 9"),
        ({"head": "x"}, "head = 'x'"),
        ({"boundary": "x"}, "boundary = 'x'"),
        ({"num_concepts": 1}, "num_concepts = 1"),
        ({"num_concepts": 65536, "codes_per_concept": 4}, "at most 48 bits"),
        ({"codes_per_concept": 0}, "codes_per_concept = 0"),
    ],
)
def test_configurations_that_cannot_run_are_refused(changes, said):
    with pytest.raises(RecipeError, match=said):
        tiny_online(**changes)


def test_a_model_that_was_saved_before_an_option_came_has_it_as_it_was(tmp_path):
    config, saved = tiny_online().config, tmp_path / "config.json"
    config.architectures = ["OnlineForCausalLM"]
    config.save_pretrained(tmp_path)
    assert OnlineConfig.from_pretrained(tmp_path).segment == "both"
    values = json.loads(saved.read_text())
    del values["segment"]
    saved.write_text(json.dumps(values))
    assert OnlineConfig.from_pretrained(tmp_path).segment == "none"


def test_keys_that_cannot_be_made_apart_from_the_layer_are_refused():
    base = tiny_base("qwen3")
    check_keys(base)
    base.model.layers[2].self_attn.v_proj.register_forward_hook(counted := Counted())
    with pytest.raises(BaseError, match=r"type qwen3, whose keys .*try: segment=deep"):
        check_keys(base)
    assert counted.calls == 2


class Counted:
    """Another result at each call."""

    calls = 0

    def __call__(self, module, arguments, out):
        self.calls += 1
        return out * self.calls


def test_options_that_are_no_more_load_where_they_did_nothing():
    assert not hasattr(OnlineConfig(overlap=False, estimator="soft"), "overlap")
    with pytest.raises(CheckpointError, match=r"overlap = True .* need False, .*try: "):
        OnlineConfig(overlap=True)
