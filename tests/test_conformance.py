"""What transformers asks of a model and of `generate`, beyond what the other tests hold already.

| promise | where |
|---|---|
| save and load, merged models, bad folders, `pipeline` | `test_saving` |
| cached = parallel, padding on either side, tails, sinks, configurations that cannot run | `test_online`, `test_properties` |
| greedy, beams and sampling with and without a cache, left padding, streamers, going on with nothing new | `test_generation` |
| gradient checkpointing of one family | `test_generation` |
| attention kernels against the base | `test_online::test_identity_at_birth` |
| Trainer, resuming, accumulation, two processes | `test_training` |
| everything else | here |

Refused on purpose, each in one sentence: attention weights (the slices attend over different lists
of keys), 4D masks, other caches, assisted decoding (closed tails cannot come back), flash
attention, and flex attention on a CPU."""

import copy
import functools
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import flex_attention
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DynamicCache,
)
from transformers.integrations import flex_attention as flex

from conftest import byte_tokenizer
from families import left_padded, online_over, positions, text, tiny_base, tiny_online
from sememe.backbone.calling import CACHE, set_checkpointing
from sememe.concepts import masks
from sememe.errors import CheckpointError
from sememe.models import (
    ControlConfig,
    ControlForCausalLM,
    OnlineConfig,
    OnlineForCausalLM,
)

CLOSE = {
    "atol": 2e-4,
    "rtol": 0,
}  # as in test_online: 2e-5 at worst here, where a wrong mask or slot gives 0.1 and more
GREEDY = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
# One family with plain layers, one with windows and two ropes, one with a window alone, one with
# normed queries.
SOME = ["llama", "gemma3_text", "mistral", "qwen3"]
WHOLE = {
    "bridge": True,
    "anchor": True,
    "head": "nearest",
    "codes_per_concept": 2,
}  # what the recipes train
# Mean, in nats: 1e-4, and 4e-3 where rounding changes one code of 160. Casts that go wrong raise,
# or lose the codes; one wrong slot would pass (7e-3) and is for the fp32 tests to find.
KL_16_BIT = 0.02


@functools.cache
def made(family: str = "llama", **settings) -> OnlineForCausalLM:
    """Shared by the tests, which leave it as it is; `copy.deepcopy` for the others."""
    return tiny_online(family, **{**WHOLE, **settings})


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    return left_padded([text(1, n, seed=n) for n in (14, 6, 11)])


def stepwise(model, ids, sizes, mask=None, **named):
    """Outputs of a cached forward over chunks of these sizes, and the cache."""
    cache, outs, end = model.new_cache(len(ids)), [], 0
    for size in sizes:
        start, end = end, end + size
        part = None if mask is None else mask[:, :end]
        outs.append(model(ids[:, start:end], attention_mask=part, cache=cache, **named))
    return outs, cache


# ---- what a forward returns ----


@pytest.mark.parametrize("family", SOME)
def test_hidden_states_at_birth_are_those_of_the_base(family):
    base, (ids, mask) = tiny_base(family), batch()
    config = OnlineConfig(
        text_config=base.config, split=(1, 2, 1), rate=1.0, quantise=0.0, num_concepts=8
    )
    asked = {"attention_mask": mask, "output_hidden_states": True}
    want = base(ids, position_ids=positions(mask), **asked).hidden_states
    got = OnlineForCausalLM(config, base).eval()(ids, **asked).hidden_states
    assert len(got) == len(want) == 5
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a[mask.bool()], b[mask.bool()], **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("split", [(1, 2, 1), (2, 0, 2), (1, 1, 2)], ids=str)
def test_hidden_states_are_one_for_each_layer_and_position(split):
    model, ids = made(split=split), text(3)
    out = model(ids, output_hidden_states=True)
    assert model(ids).hidden_states is None
    assert [tuple(h.shape) for h in out.hidden_states] == [(3, 20, 64)] * 5
    assert torch.equal(model.get_output_embeddings()(out.hidden_states[-1]), out.logits)
    silent = out.concept_ids == -1
    for h in out.hidden_states[split[0] + 1 : sum(split[:2]) + 1]:
        assert torch.equal(h[silent], out.hidden_states[split[0]][silent]), (
            "a token that writes nothing skips the middle"
        )
        assert not torch.isclose(h[~silent], out.hidden_states[split[0]][~silent]).all(-1).any()
    steps, _ = stepwise(
        model, ids, [3, *[1] * 17], output_hidden_states=True
    )  # steps in which no, some and all rows write
    for k, whole in enumerate(out.hidden_states):
        torch.testing.assert_close(
            torch.cat([step.hidden_states[k] for step in steps], 1), whole, **CLOSE
        )


def test_hidden_states_have_gradients():
    model, ids = made(), text(2)
    out = model(ids, output_hidden_states=True)
    for h in out.hidden_states[1:]:
        h.retain_grad()
    out.logits[0, -1].sum().backward()
    model.zero_grad()
    for h in out.hidden_states[1:2]:
        assert h.grad is not None and h.grad[0].abs().sum() > 0 and not h.grad[1].any(), (
            "rows do not mix"
        )


def test_embeddings_are_as_good_as_ids():
    model, (ids, mask) = made(), batch()
    embeds = model.get_input_embeddings()(ids)
    whole = model(inputs_embeds=embeds, attention_mask=mask).logits
    assert torch.equal(whole, model(ids, attention_mask=mask).logits)
    written = model.generate(inputs_embeds=embeds, attention_mask=mask, **GREEDY)
    same = model.generate(ids, attention_mask=mask, **GREEDY)
    assert torch.equal(written, same[:, ids.shape[1] :])


def test_logits_to_keep():
    model, ids = made(), text(2)
    whole, some = model(ids).logits, torch.tensor([3, 7, 19])
    assert torch.equal(model(ids, logits_to_keep=4).logits, whole[:, -4:])
    assert torch.equal(model(ids, logits_to_keep=0).logits, whole)
    assert torch.equal(model(ids, logits_to_keep=some).logits, whole[:, some])


def test_masks_of_every_dtype_and_explicit_positions():
    model, (ids, mask) = made(), batch()
    want = model(ids, attention_mask=mask).logits
    for same in (mask.bool(), mask.float(), mask.int()):
        assert torch.equal(model(ids, attention_mask=same).logits, want)
    assert torch.equal(model(ids, attention_mask=mask, position_ids=positions(mask)).logits, want)


def test_loss_is_the_cross_entropy_of_the_next_token():
    model, (ids, mask) = made(), batch()
    labels = ids.masked_fill(mask == 0, -100)
    out = model(ids, attention_mask=mask, labels=labels)
    want = F.cross_entropy(out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(
        out.loss, want, atol=1e-6, rtol=0
    )  # 0.0 seen; counting the padding in gives 0.5
    several = model(
        ids, attention_mask=mask, labels=labels, num_items_in_batch=56
    ).loss  # of a step in two parts
    torch.testing.assert_close(
        several, want * (labels[:, 1:] != -100).sum() / 56, atol=1e-6, rtol=0
    )


@pytest.mark.parametrize(
    "inputs, said",
    [
        ({}, "either input_ids or inputs_embeds"),
        (
            {"input_ids": text(2), "inputs_embeds": torch.zeros(2, 20, 64)},
            "either input_ids or inputs_embeds",
        ),
        (
            {"input_ids": text(2), "attention_mask": torch.ones(2, 1, 20, 20)},
            r"attention_mask has shape \(2, 1, 20, 20\)",
        ),
        ({"input_ids": text(2), "attention_mask": torch.ones(2, 5)}, r"need \(2, past \+ 20\)"),
        (
            {"input_ids": text(2), "cache": DynamicCache()},
            "is a DynamicCache: need this model's own",
        ),
        ({"input_ids": text(2), "output_attentions": True}, "no .* table of weights"),
    ],
)
def test_what_it_cannot_take_is_said_in_one_sentence(inputs, said):
    with pytest.raises(ValueError, match=said) as refused:
        made()(**inputs)
    assert "try:" in str(refused.value) and "\n" not in str(refused.value)


# ---- weights, dtypes, devices ----


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("rows", [105, 97, 80])
def test_resizing_the_vocabulary(tied, rows, tmp_path):
    base = tiny_base(tie_word_embeddings=tied)
    model = OnlineForCausalLM(
        OnlineConfig(
            text_config=base.config, split=(1, 2, 1), rate=0.4, max_tail=5, num_concepts=16
        ),
        base,
    )
    model.start_frame(text(16, 24))
    model.start_codes(text(16, 24))
    ids = text(2).clamp(max=79)
    before = model.eval()(ids).logits
    model.resize_token_embeddings(rows)
    kept = min(rows, 97)
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied
    assert model.config.get_text_config().vocab_size == model(ids).logits.shape[-1] == rows
    assert torch.equal(model(ids).logits[..., :kept], before[..., :kept])
    assert model.generate(ids, **GREEDY).shape == (2, 26)
    model.save_pretrained(tmp_path)
    assert torch.equal(
        AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits, model(ids).logits
    )


def test_resizing_what_would_not_be_saved_is_refused():
    model = made()
    assert model.resize_token_embeddings(97) is model.get_input_embeddings()
    for named in ({"new_num_tokens": 105}, {"pad_to_multiple_of": 8}):
        with pytest.raises(CheckpointError, match=r"need the 97 of 'tiny'. try: model.merged\(\)"):
            model.resize_token_embeddings(**named)
    assert copy.deepcopy(model).merged().resize_token_embeddings(105).num_embeddings == 105


def test_copies_and_state_dicts_are_the_same_model():
    model, ids = made(), text(2)
    want = model(ids)
    other = tiny_online(seed=4, **WHOLE)
    other.load_state_dict(model.state_dict(), strict=True)
    for same in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), other, model):
        got = same(ids)
        assert torch.equal(got.logits, want.logits) and torch.equal(
            got.concept_ids, want.concept_ids
        )


@torch.no_grad()
def test_copied_caches_go_on_apart():
    model, ids = made(), text(2, 30)
    _, cache = stepwise(model, ids, [9])
    other = copy.deepcopy(cache)
    elsewhere = torch.cat([ids[:, :9], text(2, 12, seed=5)], 1)
    got = model(elsewhere[:, 9:], cache=other).logits
    torch.testing.assert_close(got, model(elsewhere).logits[:, 9:], **CLOSE)
    torch.testing.assert_close(
        model(ids[:, 9:], cache=cache).logits, model(ids).logits[:, 9:], **CLOSE
    )


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(
    "settings",
    [{}, {"boundary": "threshold"}, {"boundary": "entropy"}, {"family": "mistral"}],
    ids=str,
)
def test_casting_the_whole_model(settings, dtype):
    """In 16 bits a position's rounding depends on the shape of its chunk, so a code close to
    another may change."""
    model, ids = copy.deepcopy(made(**settings)).to(dtype), text(4, 40)
    whole, (steps, cache) = model(ids), stepwise(model, ids, [7, *[1] * 33])
    assert whole.logits.dtype == model.dtype == dtype
    q, p = (
        x.double().log_softmax(-1)
        for x in (torch.cat([step.logits for step in steps], 1), whole.logits)
    )
    assert float((p.exp() * (p - q)).sum(-1).mean()) < KL_16_BIT
    assert (
        float((cache.concept_ids == whole.concept_ids).double().mean()) > 0.97
    )  # 0.994 at worst: one id of 160
    assert model.generate(ids, **GREEDY).shape == (4, 46)
    if dtype == torch.float64:
        assert torch.equal(model.float()(ids).logits, made(**settings)(ids).logits), (
            "there and back"
        )


def test_training_a_cast_model():
    model, ids = copy.deepcopy(made()).to(torch.bfloat16).train(), text(2)
    model(ids, labels=ids).loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@pytest.fixture(scope="module")
def folders(base_folder, tmp_path_factory):
    """The same model saved over its base, and merged."""
    root = tmp_path_factory.mktemp("saved")
    model = online_over(base_folder, text(16, 24), **WHOLE)
    model.save_pretrained(root / "adapted")
    model.merged().save_pretrained(root / "merged")
    return root


@pytest.mark.parametrize("kind", ["adapted", "merged"])
@pytest.mark.parametrize("dtype", ["bfloat16", torch.float16, "auto"])
def test_loading_in_a_dtype_keeps_the_codes(folders, kind, dtype):
    """The frame is near 100 in some bases, where bf16 has steps of 0.5: rounded, every id would be
    another."""
    whole, model = (
        AutoModelForCausalLM.from_pretrained(folders / kind, dtype=d)
        for d in (torch.float32, dtype)
    )
    want = {"bfloat16": torch.bfloat16, "auto": torch.float32}.get(dtype, dtype)
    assert (
        model.dtype
        == model.get_input_embeddings().weight.dtype
        == model.bridge.shallow.weight.dtype
        == want
    )
    state = model.state_dict()
    for name, value in whole.state_dict().items():
        own = name.split(".")[0]
        if own in ("head", "codes", "gate", "anchor") or (
            own == "bridge" and name.endswith(("mean", "scale"))
        ):
            assert torch.equal(state[name], value), name
    ids = text(2)
    assert model(ids).logits.dtype == want
    assert torch.equal(
        model.generate(ids, **GREEDY), model.generate(ids, use_cache=False, **GREEDY)
    )


@pytest.mark.parametrize("kind", ["adapted", "merged"])
def test_arguments_of_from_pretrained(folders, kind, tmp_path):
    def load(**named):
        return OnlineForCausalLM.from_pretrained(folders / kind, **named)

    ids = text(2)
    want = load()(ids).logits
    for device_map in ("cpu", "auto", {"": "cpu"}, torch.device("cpu")):
        assert torch.equal(load(device_map=device_map)(ids).logits, want)
    model = load()
    assert (
        load(rate=0.7).dial.rate
        == AutoModelForCausalLM.from_pretrained(folders / kind, rate=0.7).dial.rate
        == 0.7
    )
    torch.testing.assert_close(load(attn_implementation="eager")(ids).logits, want, **CLOSE)
    model.generation_config.temperature, model.generation_config.do_sample = 0.7, True
    model.save_pretrained(tmp_path / "again")
    assert (
        OnlineForCausalLM.from_pretrained(tmp_path / "again").generation_config.temperature == 0.7
    )
    state = {name: torch.zeros_like(value) for name, value in model.state_dict().items()}
    model.save_pretrained(
        tmp_path / "given", state_dict=state
    )  # as a Trainer does that has gathered shards
    assert not OnlineForCausalLM.from_pretrained(tmp_path / "given").writer.codes.weight.any()


def test_device_maps_over_several_devices_are_refused(folders):
    several = {"backbone": "cpu", "writer": "meta"}
    with pytest.raises(CheckpointError, match="need one device"):
        OnlineForCausalLM.from_pretrained(folders / "adapted", device_map=several)


def test_configurations_round_trip_and_build(folders):
    for kind in ("adapted", "merged"):
        config = AutoConfig.from_pretrained(folders / kind)
        assert type(config).from_dict(config.to_dict()).to_dict() == config.to_dict()
        built = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        assert (
            isinstance(built, OnlineForCausalLM) and built(text(1)).logits.dtype == torch.bfloat16
        )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_moving_to_a_gpu_and_back():
    model, ids = copy.deepcopy(made()), text(2)
    want, made_here = model(ids), model.generate(ids, **GREEDY)
    model.to("cuda")
    got = model(ids.cuda(), use_cache=True)
    torch.testing.assert_close(got.logits.cpu(), want.logits, atol=1e-2, rtol=0)  # TF32 may be on
    assert got.cache.concept_ids.device.type == "cuda"
    assert torch.equal(model.generate(ids.cuda(), **GREEDY).cpu(), made_here)
    assert torch.equal(model.cpu()(ids).logits, want.logits)


# ---- attention kernels ----


@torch.no_grad()
@pytest.mark.parametrize("family", SOME)
def test_kernels_agree_and_can_be_switched(family):
    model, (ids, mask) = copy.deepcopy(made(family)), batch()
    want, made_so = (
        model(ids, attention_mask=mask).logits,
        model.generate(ids, attention_mask=mask, **GREEDY),
    )
    model.set_attn_implementation("eager")
    got, _ = stepwise(model, ids, [5, 1, 8], mask)
    seen = mask.bool()
    torch.testing.assert_close(torch.cat([out.logits for out in got], 1)[seen], want[seen], **CLOSE)
    torch.testing.assert_close(model(ids, attention_mask=mask).logits[seen], want[seen], **CLOSE)
    assert torch.equal(model.generate(ids, attention_mask=mask, **GREEDY), made_so)
    model.set_attn_implementation("sdpa")
    assert torch.equal(model(ids, attention_mask=mask).logits, want)


@torch.no_grad()
@pytest.mark.parametrize("family", SOME)
@pytest.mark.parametrize("window", [None, 4])
def test_flex_agrees_and_can_be_switched(family, window, monkeypatch):
    """Its block masks, by the kernel's own reference; compiled it is for a GPU."""
    monkeypatch.setattr(masks, "FLEX_DEVICES", ("cpu",))
    monkeypatch.setattr(flex, "WrappedFlexAttention", lambda training: lambda: flex_attention)
    model, (ids, mask) = copy.deepcopy(made(family, shallow_window=window)), batch()
    want, made_so = (
        model(ids, attention_mask=mask).logits,
        model.generate(ids, attention_mask=mask, **GREEDY),
    )
    alone, calls, make = model(ids[:1, 1:]).logits, [], masks.segment_blocks
    monkeypatch.setattr(masks, "segment_blocks", lambda *lanes: calls.append(1) or make(*lanes))
    model.set_attn_implementation("flex_attention")
    seen = mask.bool()
    torch.testing.assert_close(model(ids, attention_mask=mask).logits[seen], want[seen], **CLOSE)
    torch.testing.assert_close(model(ids[:1, 1:]).logits, alone, **CLOSE)
    got, _ = stepwise(model, ids, [5, 1, 8], mask)
    torch.testing.assert_close(torch.cat([out.logits for out in got], 1)[seen], want[seen], **CLOSE)
    assert len(calls) >= 3 * 4, "each slice of each chunk that is more than a token"
    assert torch.equal(model.generate(ids, attention_mask=mask, **GREEDY), made_so)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_flex_agrees_compiled_with_gradients():
    model, (ids, mask) = copy.deepcopy(made()).cuda().train(), (x.cuda() for x in batch())
    found = {}
    for kernel in ("sdpa", "flex_attention"):
        model.set_attn_implementation(kernel)
        model.zero_grad()
        out = model(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100))
        out.loss.backward()
        found[kernel] = (
            out.logits[mask.bool()],
            [p.grad for p in model.parameters() if p.grad is not None],
        )
    for a, b in zip(found["sdpa"][1], found["flex_attention"][1], strict=True):
        torch.testing.assert_close(a, b, atol=1e-2, rtol=1e-2)  # TF32 may be on
    torch.testing.assert_close(*(logits for logits, _ in found.values()), atol=1e-2, rtol=0)


@pytest.mark.parametrize("kind", ["adapted", "merged"])
def test_other_kernels_are_refused_before_they_run(folders, kind):
    with pytest.raises(
        (CheckpointError, ImportError, ValueError),
        match=r"need one of sdpa, eager, flex_attention|[Ff]lash",
    ):
        AutoModelForCausalLM.from_pretrained(
            folders / kind, attn_implementation="flash_attention_2"
        )
    with pytest.raises((ValueError, ImportError), match=r"does not support|not supported"):
        copy.deepcopy(made()).set_attn_implementation("flash_attention_2")
    # On a CPU flex has no backward, and tried in the base's self-check it brought the whole process
    # down.
    model = AutoModelForCausalLM.from_pretrained(
        folders / kind, attn_implementation="flex_attention"
    )
    with pytest.raises(CheckpointError, match=r"'flex_attention' on cpu: need a GPU. try: sdpa"):
        model(text(1))
    with pytest.raises(CheckpointError, match=r"need one of sdpa, eager\. try: sdpa"):
        ControlForCausalLM(
            ControlConfig(text_config=tiny_base().config, attn_implementation="flex_attention")
        )


# ---- training ----


@pytest.mark.parametrize("family", SOME)
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_in_every_way(family, reentrant):
    """Whole models with padding, and with the cache that a training loop may ask for."""
    (ids, mask), grads = batch(), []
    for checkpointing in (False, True):
        model = copy.deepcopy(made(family)).train()
        if checkpointing:
            set_checkpointing(model, True, {"use_reentrant": reentrant})
            # a frozen base gives a re-entrant checkpoint no gradient to start from
            model.enable_input_require_grads()
        out = model(ids, attention_mask=mask, labels=ids, use_cache=checkpointing)
        assert out.cache is None, "checkpointed layers drop what a cache would hold"
        out.loss.backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys() and len(grads[0]) > 20
    for name, grad in grads[0].items():  # 0.0 seen: the same operations a second time
        torch.testing.assert_close(
            grad, grads[1][name], atol=1e-6, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )
    set_checkpointing(model, False)
    assert model(ids, use_cache=True).cache.get_seq_length() == 14


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"head": "joint"},
        {"boundary": "threshold"},
    ],
    ids=str,
)
def test_every_trainable_parameter_gets_a_gradient(settings):
    model, ids = copy.deepcopy(made(**settings)).train(), text(2)
    model(ids, labels=ids).loss.backward()
    missing = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not missing
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


@torch.no_grad()
def test_autocast_and_inference_mode():
    model, ids = made(), text(2)
    want = model.generate(ids, **GREEDY)
    with torch.inference_mode():
        assert torch.equal(model.generate(ids, **GREEDY), want)
    with torch.autocast("cpu", torch.bfloat16):
        out, cache = stepwise(model, ids, [13, 1, 6])
        assert out[0].logits.dtype == torch.bfloat16 and cache.get_seq_length() == 20
        assert model.generate(ids, **GREEDY).shape == want.shape


# ---- generate ----


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"family": "gemma3_text"},
        {"family": "mistral"},
        {"family": "qwen3"},
        {"boundary": "threshold"},
        {"boundary": "entropy"},
        {"boundary": "fixed"},
        {"head": "joint"},
        {"split": (2, 0, 2)},
        {"rate": 1.0},
        {"attention": "eager"},
    ],
    ids=str,
)
def test_a_row_does_not_depend_on_its_neighbours(settings):
    """Ragged rows in batches of 1, 2 and 5, and in another order: the same tokens and the same
    concepts, exactly."""
    model = made(**settings)
    rows = [text(1, n, seed=n) for n in (9, 3, 14, 1, 7)]

    def continued(which):
        ids, mask = left_padded([rows[i] for i in which])
        cache = model.new_cache(len(which))
        settings = GREEDY | {"max_new_tokens": 16, "min_new_tokens": 16}
        new = model.generate(ids, attention_mask=mask, cache=cache, **settings)
        concepts = [
            ids_T[mask_T.argmax() :].tolist()
            for ids_T, mask_T in zip(cache.concept_ids, mask, strict=True)
        ]
        return [(a[ids.shape[1] :].tolist(), c) for a, c in zip(new, concepts, strict=True)]

    alone = [continued([i])[0] for i in range(5)]
    assert continued([0, 1]) == alone[:2] and continued([3, 2]) == [alone[3], alone[2]]
    assert continued([0, 1, 2, 3, 4]) == alone and continued([4, 3, 2, 1, 0]) == alone[::-1]


def test_rows_that_end_early_do_not_disturb_the_others():
    model, ids = made(), text(5)
    ends = {
        "max_new_tokens": 20,
        "do_sample": False,
        "pad_token_id": 0,
        "eos_token_id": list(range(20, 28)),
    }
    together = model.generate(ids, **ends)
    alone = [model.generate(ids[i : i + 1], **ends)[0] for i in range(5)]
    assert len({len(row) for row in alone}) > 2, (
        "rows must end at different places for this to test anything"
    )
    for got, want in zip(together, alone, strict=True):
        assert torch.equal(got[: len(want)], want) and not got[len(want) :].any()


@pytest.mark.parametrize("family", SOME)
@pytest.mark.parametrize(
    "settings",
    [
        {"num_beams": 3, "num_return_sequences": 2},
        {"num_beams": 3, "do_sample": True, "min_new_tokens": None},
        {"do_sample": True, "top_p": 0.9, "num_return_sequences": 3, "min_new_tokens": None},
        {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "bad_words_ids": [[5]]},
        {"num_beams": 2, "length_penalty": 0.5, "early_stopping": True, "min_new_tokens": None},
    ],
    ids=str,
)
def test_left_padded_decoding_is_the_same_without_a_cache(family, settings):
    model, (ids, mask) = made(family), batch()
    drawn = []
    for use_cache in (True, False):
        torch.manual_seed(3)
        drawn.append(
            model.generate(ids, attention_mask=mask, use_cache=use_cache, **{**GREEDY, **settings})
        )
    assert torch.equal(*drawn)
    assert len(drawn[0]) == 3 * settings.get("num_return_sequences", 1)


@pytest.mark.parametrize(
    "settings",
    [{}, {"family": "mistral"}, {"boundary": "threshold"}, {"boundary": "entropy"}],
    ids=str,
)
def test_a_second_turn_behind_rows_that_ended_at_different_places(settings):
    """What is masked in the middle of a row is not there: neither for the gate, which compares
    neighbours, nor for what the cache remembers of the last token."""
    model = made(**settings)
    parts = [(text(1, n, seed=n), text(1, 7, seed=30 + n)) for n in (9, 4, 6)]
    ids = torch.cat([torch.cat([F.pad(a, (0, 9 - a.shape[1])), b], 1) for a, b in parts])
    mask = torch.cat(
        [
            torch.cat([F.pad(torch.ones_like(a), (0, 9 - a.shape[1])), torch.ones_like(b)], 1)
            for a, b in parts
        ]
    )
    steps, _ = stepwise(model, ids, [9, 1, 6], mask)
    whole, pieces = (
        model(ids, attention_mask=mask),
        torch.cat([step.concept_ids for step in steps], 1),
    )
    logits = torch.cat([step.logits for step in steps], 1)
    new = model.generate(ids, attention_mask=mask, **GREEDY)[:, 16:]
    for row, part in enumerate(parts):
        real, alone = mask[row].bool(), torch.cat(part, 1)
        want = model(alone)
        for got, written in ((whole.logits, whole.concept_ids), (logits, pieces)):
            torch.testing.assert_close(got[row, real], want.logits[0], **CLOSE)
            assert (
                torch.equal(written[row, real], want.concept_ids[0])
                and (written[row, ~real] == -1).all()
            )
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
    from transformers import pipeline

    tokenizer = byte_tokenizer()
    model = copy.deepcopy(made(family="llama", base=None, lora_rank=0))
    model.resize_token_embeddings(len(tokenizer))
    said, settings = (
        ["the cat", "a", "the dog saw"],
        {"max_new_tokens": 5, "do_sample": False, "return_full_text": False},
    )
    pipe = pipeline("text-generation", model=model, tokenizer=tokenizer)
    assert pipe(said, batch_size=3, **settings) == [pipe(one, **settings) for one in said]


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"assistant_early_exit": 2}, "take tokens back|takes tokens back"),
        ({"prompt_lookup_num_tokens": 3}, "takes tokens back"),
        ({"cache_implementation": "dynamic"}, "cache_implementation = 'dynamic'"),
        ({"cache_implementation": "quantized"}, "cache_implementation = 'quantized'"),
        ({"cache_implementation": "offloaded"}, "cache_implementation = 'offloaded'"),
        ({"cache": DynamicCache()}, "is a DynamicCache: need this model's own"),
        ({"output_attentions": True, "return_dict_in_generate": True}, "no .* table of weights"),
        ({"penalty_alpha": 0.6, "top_k": 4}, "Contrastive"),
        ({"dola_layers": "low"}, "Dola"),  # transformers' own refusals
    ],
    ids=str,
)
def test_decoding_that_cannot_work_is_refused(settings, said):
    with pytest.raises(ValueError, match=said) as refused:
        made().generate(text(1), **{**GREEDY, **settings})
    assert "\n" not in str(refused.value)


def test_assistants_are_refused_on_either_side():
    for model, assistant in ((made(), tiny_base()), (tiny_base(), made())):
        with pytest.raises(ValueError, match=r"try: generate without assistant_model"):
            model.generate(text(1), assistant_model=assistant, **GREEDY)


def test_caches_of_another_batch_are_refused():
    for settings in ({"num_beams": 3}, {"num_return_sequences": 3, "do_sample": True}):
        with pytest.raises(
            ValueError, match=r"the cache has 2 rows, the batch has 6.*try: new_cache\(6\)"
        ):
            made().generate(text(2), cache=made().new_cache(2), **{**GREEDY, **settings})
    want = made().generate(text(2), num_beams=3, **GREEDY)
    assert torch.equal(
        made().generate(text(2), num_beams=3, cache=made().new_cache(6), **GREEDY), want
    )
