"""What transformers asks of a model, beyond what `test_online` (attention kernels against the base,
cached = parallel), `test_generation`, `test_calling`, `test_saving` and `test_training` hold.

Refused on purpose, each in one sentence: attention weights and hidden states (the slices work on
different lists of positions), 4D masks, other caches, assisted decoding (closed tails cannot come
back), flash attention, and flex attention on a CPU."""

import copy
import functools
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import flex_attention
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.integrations import flex_attention as flex

from families import left_padded, online_over, positions, stepwise, text, tiny_base, tiny_online
from sememe.backbone.calling import set_checkpointing
from sememe.concepts import masks
from sememe.errors import CheckpointError
from sememe.models import ControlConfig, ControlForCausalLM, OnlineForCausalLM

# As in test_online: 2e-5 at worst here, where a wrong mask or slot gives 0.1 and more.
CLOSE = {"atol": 2e-4, "rtol": 0}
GREEDY = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
# Plain layers, windows and two ropes, a window alone, normed queries.
SOME = ["llama", "gemma3_text", "mistral", "qwen3"]
# What the recipes train.
WHOLE = {"bridge": True, "anchor": True, "head": "nearest", "codes_per_concept": 2}
# Mean, in nats: 1e-4, and 4e-3 where rounding changes one code of 160. Casts that go wrong raise,
# or lose the codes; one wrong slot would pass (7e-3) and is for the fp32 tests to find.
KL_16_BIT = 0.02
SETTINGS = [{}, {"family": "mistral"}, {"boundary": "threshold"}, {"boundary": "entropy"}]
each_family = pytest.mark.parametrize("family", SOME)
each_kind = pytest.mark.parametrize("kind", ["adapted", "merged"])
on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@functools.cache
def made(family: str = "llama", **settings) -> OnlineForCausalLM:
    """Shared by the tests, which leave it as it is; `copy.deepcopy` for the others."""
    return tiny_online(family, **{**WHOLE, **settings})


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    return left_padded([text(1, n, seed=n) for n in (14, 6, 11)])


# ---- what a forward takes and returns ----


def test_embeddings_masks_and_positions_in_every_form():
    model, (ids, mask) = made(), batch()
    want = model(ids, attention_mask=mask).logits
    embeds = model.get_input_embeddings()(ids)
    for inputs in (
        {"inputs_embeds": embeds, "attention_mask": mask},
        {"input_ids": ids, "attention_mask": mask.bool()},
        {"input_ids": ids, "attention_mask": mask.float()},
        {"input_ids": ids, "attention_mask": mask, "position_ids": positions(mask)},
    ):
        assert torch.equal(model(**inputs).logits, want)
    right = {"input_ids": ids.flip(1), "attention_mask": mask.flip(1)}
    numbered = model(**right, position_ids=positions(mask.flip(1))).logits
    assert torch.equal(numbered, model(**right).logits)
    some = torch.tensor([3, 7, 13])
    for keep, kept in ((4, want[:, -4:]), (some, want[:, some])):
        assert torch.equal(model(ids, attention_mask=mask, logits_to_keep=keep).logits, kept)
    written = model.generate(inputs_embeds=embeds, attention_mask=mask, **GREEDY)
    assert torch.equal(written, model.generate(ids, attention_mask=mask, **GREEDY)[:, 14:])


def test_loss_is_the_cross_entropy_of_the_next_token():
    """0.0 seen; counting the padding in gives 0.5."""
    model, (ids, mask) = made(), batch()
    named = {"attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
    targets, out = named["labels"][:, 1:], model(ids, **named)
    want = F.cross_entropy(out.logits[:, :-1].flatten(0, 1), targets.flatten())
    torch.testing.assert_close(out.loss, want, atol=1e-6, rtol=0)
    several = model(ids, **named, num_items_in_batch=56).loss  # of a step in two parts
    torch.testing.assert_close(several, want * (targets != -100).sum() / 56, atol=1e-6, rtol=0)


# ---- weights, dtypes, devices ----


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("rows", [105, 97, 80])
def test_resizing_the_vocabulary(tied, rows, tmp_path):
    model = copy.deepcopy(made(base=None, lora_rank=0, tied=tied))
    model.writer.gate.feedback = 0.5  # as in a model that is loaded
    ids, before = text(2).clamp(max=79), model(text(2).clamp(max=79)).logits
    model.resize_token_embeddings(rows)
    kept = min(rows, 97)
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied
    assert model.config.get_text_config().vocab_size == model(ids).logits.shape[-1] == rows
    assert torch.equal(model(ids).logits[..., :kept], before[..., :kept])
    assert model.generate(ids, **GREEDY).shape == (2, 26)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_resizing_what_would_not_be_saved_is_refused():
    model = made()
    assert model.resize_token_embeddings(97) is model.get_input_embeddings()
    for named in ({"new_num_tokens": 105}, {"pad_to_multiple_of": 8}):
        with pytest.raises(CheckpointError, match=r"need the 97 of 'tiny'. try: model.merged\(\)"):
            model.resize_token_embeddings(**named)
    assert copy.deepcopy(model).merged().resize_token_embeddings(105).num_embeddings == 105


@torch.no_grad()
def test_copies_of_models_and_caches():
    model, ids = made(), text(2, 30)
    want = model(ids)
    other = tiny_online(seed=4, **WHOLE)
    other.load_state_dict(model.state_dict(), strict=True)
    for same in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), other, model):
        assert torch.equal(same(ids).logits, want.logits)
        assert torch.equal(same(ids).concept_ids, want.concept_ids)
    *_, cache = stepwise(model, ids, [9])
    elsewhere = torch.cat([ids[:, :9], text(2, 12, seed=5)], 1)
    for one, whole in ((copy.deepcopy(cache), elsewhere), (cache, ids)):
        logits = model(whole[:, 9:], cache=one).logits
        torch.testing.assert_close(logits, model(whole).logits[:, 9:], **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_casting_the_whole_model(settings, dtype):
    """In 16 bits a position's rounding depends on the shape of its chunk, so a code close to
    another may change: 0.994 of the ids were the same at worst, one of 160."""
    model, ids = copy.deepcopy(made(**settings)).to(dtype), text(4, 40)
    whole, (logits, _, cache) = model(ids), stepwise(model, ids, range(7, 41))
    assert whole.logits.dtype == model.dtype == dtype
    q, p = (x.double().log_softmax(-1) for x in (logits, whole.logits))
    assert float((p.exp() * (p - q)).sum(-1).mean()) < KL_16_BIT
    assert float((cache.concept_ids == whole.concept_ids).double().mean()) > 0.97
    assert model.generate(ids, **GREEDY).shape == (4, 46)
    if dtype == torch.bfloat16:
        model.train()
        with torch.enable_grad():
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


@each_kind
@pytest.mark.parametrize("dtype", ["bfloat16", torch.float16, "auto"])
def test_loading_in_a_dtype_keeps_the_codes(folders, kind, dtype):
    """The frame is near 100 in some bases, where bf16 has steps of 0.5: rounded, every id would be
    another."""
    load = AutoModelForCausalLM.from_pretrained
    whole, model, ids = load(folders / kind), load(folders / kind, dtype=dtype), text(2)
    want = {"bfloat16": torch.bfloat16, "auto": torch.float32}.get(dtype, dtype)
    weights = model.get_input_embeddings().weight, model.bridge.shallow.weight, model(ids).logits
    assert {model.dtype, *(x.dtype for x in weights)} == {want}
    state = model.state_dict()
    for name, value in whole.state_dict().items():
        frame = name.startswith("bridge.") and name.endswith(("mean", "scale"))
        assert not (name.startswith("writer.") or frame) or torch.equal(state[name], value), name
    uncached = model.generate(ids, use_cache=False, **GREEDY)
    assert torch.equal(model.generate(ids, **GREEDY), uncached)


@each_kind
def test_arguments_of_loading_and_of_saving(folders, kind, tmp_path):
    load, ids = OnlineForCausalLM.from_pretrained, text(2)
    model = load(folders / kind)
    want = model(ids).logits
    for device_map in ("cpu", "auto", {"": "cpu"}, torch.device("cpu")):
        assert torch.equal(load(folders / kind, device_map=device_map)(ids).logits, want)
    assert AutoModelForCausalLM.from_pretrained(folders / kind, rate=0.7).dial.rate == 0.7
    model.generation_config.temperature, model.generation_config.do_sample = 0.7, True
    # As a Trainer does that has gathered shards.
    state = {name: torch.zeros_like(value) for name, value in model.state_dict().items()}
    model.save_pretrained(tmp_path / "zeros", state_dict=state)
    again = load(tmp_path / "zeros")
    assert again.generation_config.temperature == 0.7 and not again.writer.codes.weight.any()
    config = AutoConfig.from_pretrained(folders / kind)
    assert type(config).from_dict(config.to_dict()).to_dict() == config.to_dict()
    built = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    assert isinstance(built, OnlineForCausalLM) and built(ids).logits.dtype == torch.bfloat16


@on_a_gpu
def test_moving_to_a_gpu_and_back():
    model, ids = copy.deepcopy(made()), text(2)
    want, made_here = model(ids), model.generate(ids, **GREEDY)
    model.to("cuda")
    there = model(ids.cuda(), use_cache=True)
    torch.testing.assert_close(there.logits.cpu(), want.logits, atol=1e-2, rtol=0)  # TF32 may be on
    assert there.cache.concept_ids.device.type == "cuda"
    assert torch.equal(model.generate(ids.cuda(), **GREEDY).cpu(), made_here)
    assert torch.equal(model.cpu()(ids).logits, want.logits)


# ---- attention kernels ----


@torch.no_grad()
@each_family
@pytest.mark.parametrize("kernel, window", [("eager", None), (masks.FLEX, None), (masks.FLEX, 4)])
def test_kernels_agree_and_can_be_switched(family, kernel, window, monkeypatch):
    """Of flex its block masks, by the kernel's own reference; compiled it is for a GPU."""
    calls, blocks = [], masks.segment_blocks
    monkeypatch.setattr(masks, "segment_blocks", lambda *lanes: calls.append(1) or blocks(*lanes))
    monkeypatch.setattr(masks, "FLEX_DEVICES", ("cpu",))
    monkeypatch.setattr(flex, "WrappedFlexAttention", lambda training: lambda: flex_attention)
    model, (ids, mask) = copy.deepcopy(made(family, shallow_window=window)), batch()

    def run():
        whole = model(ids, attention_mask=mask).logits[mask.bool()]
        return whole, model(ids[:1, 1:]).logits, model.generate(ids, attention_mask=mask, **GREEDY)

    want, alone, written = run()
    model.set_attn_implementation(kernel)
    logits, *_ = stepwise(model, ids, [5, 6, 14], mask)
    whole, single, again = run()
    for close in (whole, logits[mask.bool()]):
        torch.testing.assert_close(close, want, **CLOSE)
    torch.testing.assert_close(single, alone, **CLOSE)
    assert torch.equal(again, written)
    assert kernel != masks.FLEX or len(calls) >= 3 * 4, "each slice of each chunk of some tokens"
    model.set_attn_implementation("sdpa")
    assert torch.equal(run()[0], want)


@on_a_gpu
def test_flex_agrees_compiled_with_gradients():
    model, (ids, mask) = copy.deepcopy(made()).cuda().train(), (x.cuda() for x in batch())
    logits, grads = [], []
    for kernel in ("sdpa", masks.FLEX):
        model.set_attn_implementation(kernel)
        model.zero_grad()
        out = model(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100))
        out.loss.backward()
        logits.append(out.logits[mask.bool()])
        grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    torch.testing.assert_close(*grads, atol=1e-2, rtol=1e-2)  # TF32 may be on
    torch.testing.assert_close(*logits, atol=1e-2, rtol=0)


@each_kind
def test_other_kernels_and_devices_are_refused_before_they_run(folders, kind):
    load, flash = AutoModelForCausalLM.from_pretrained, "flash_attention_2"
    errors = CheckpointError, ImportError, ValueError
    with pytest.raises(errors, match=r"need one of sdpa, eager, flex_attention|[Ff]lash"):
        load(folders / kind, attn_implementation=flash)
    with pytest.raises(errors, match=r"does not support|not supported"):
        copy.deepcopy(made()).set_attn_implementation(flash)
    # On a CPU flex has no backward, and tried in the base's self-check it brought the whole process
    # down.
    model = load(folders / kind, attn_implementation=masks.FLEX)
    with pytest.raises(CheckpointError, match=r"'flex_attention' on cpu: need a GPU. try: sdpa"):
        model(text(1))
    with pytest.raises(CheckpointError, match=r"need one of sdpa, eager\. try: sdpa"):
        config = ControlConfig(text_config=tiny_base().config, attn_implementation=masks.FLEX)
        ControlForCausalLM(config)
    if kind == "adapted":
        with pytest.raises(CheckpointError, match="need one device"):
            load(folders / kind, device_map={"backbone": "cpu", "writer": "meta"})


# ---- training ----


@each_family
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_in_every_way(family, reentrant):
    """Whole models with padding, and with the cache that a training loop may ask for."""
    (ids, mask), grads = batch(), []
    for checkpointing in (False, True):
        model = copy.deepcopy(made(family)).train()
        if checkpointing:
            set_checkpointing(model, True, {"use_reentrant": reentrant})
            # A frozen base gives a re-entrant checkpoint no gradient to start from.
            model.enable_input_require_grads()
        out = model(ids, attention_mask=mask, labels=ids, use_cache=checkpointing)
        assert out.cache is None, "checkpointed layers drop what a cache would hold"
        out.loss.backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert {name for name, p in model.named_parameters() if p.requires_grad} == set(grads[0])
    torch.testing.assert_close(*grads, atol=1e-6, rtol=1e-4)  # 0.0 seen: the same once more
    set_checkpointing(model, False)
    assert model(ids, use_cache=True).cache.get_seq_length() == 14


@torch.no_grad()
def test_autocast_and_inference_mode():
    model, ids = made(), text(2)
    want = model.generate(ids, **GREEDY)
    with torch.inference_mode():
        assert torch.equal(model.generate(ids, **GREEDY), want)
    with torch.autocast("cpu", torch.bfloat16):
        logits, _, cache = stepwise(model, ids, [13, 14, 20])
        assert logits.dtype == torch.bfloat16 and cache.get_seq_length() == 20
        assert model.generate(ids, **GREEDY).shape == want.shape
