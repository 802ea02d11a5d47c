"""What keeps a training step's memory small changes nothing of what it computes: logits in parts,
layers that are computed again, masks that are never whole."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from families import move, text, tiny_base, tiny_online
from sememe.backbone.calling import set_checkpointing
from sememe.backbone.exact import narrow
from sememe.concepts import masks
from sememe.models import ControlConfig, ControlForCausalLM, losses
from sememe.models.losses import token_losses
from test_compressor import ragged, tiny_compressor
from test_planner import plans, sources, tiny_planner

# Sums in another order: 8e-7 seen. Another adapter, a label that counts or a key that is not seen
# gives more than 1e-3.
CLOSE = {"atol": 5e-6, "rtol": 1e-4}
V = 97


def tiny_control(family="llama", **settings):
    base = tiny_base(family)
    config = ControlConfig(text_config=base.config, base="tiny", lora_rank=4, **settings)
    model = ControlForCausalLM(config, base)
    move(model, torch.Generator().manual_seed(1))
    return model


SYSTEMS = {
    "control": tiny_control,
    "window": lambda: tiny_control(window=5),
    "online": lambda: tiny_online(segment="both"),
    "strict": lambda: tiny_online("gemma3_text", segment="none", shallow_window=7, bridge=True),
    "compressor": lambda: tiny_compressor(continuation_share=0.5),
    "bins": lambda: tiny_compressor(content="bins"),
    "slots": lambda: tiny_compressor("mistral", boundary="autoregressive"),
    "planner": lambda: tiny_planner("mistral", multi_token=2, plan_weight=0.5),
    "straight_through": lambda: tiny_planner(straight_through=True, lora_dropout=0.3),
}
all_systems = pytest.mark.parametrize("system", SYSTEMS)


@pytest.fixture(scope="module")
def model_of():
    """Each system's model, made once, in training."""
    models = {}

    def model(system: str):
        if system not in models:
            models[system] = SYSTEMS[system]().train()
        return copy.deepcopy(models[system])

    return model


def step(model):
    """(loss, logits, gradients) of a batch of rows of several lengths."""
    ids, mask = ragged((12, 31, 40), 40)
    batch = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
    if hasattr(model, "plans"):
        u, mask = sources()
        batch |= {"input_ids": u, "attention_mask": mask, "plan_ids": plans(len(u))}
        batch["labels"] = batch["labels"][:1].repeat(len(u), 1)
    torch.manual_seed(0)
    out = model(**batch)
    out.loss.backward()
    return (
        out.loss,
        out.logits,
        {n: p.grad for n, p in model.named_parameters() if p.grad is not None},
    )


# ---- logits ----


@pytest.mark.parametrize("tied", [False, True])
def test_losses_in_parts_are_those_of_whole_logits(monkeypatch, tied):
    """Also with states that are whole numbers, as the offsets of a compressor's votes, and with
    such as learn nothing. 1e-6: 4e-7 seen."""
    head = tiny_base(tie_word_embeddings=tied).lm_head.requires_grad_(False)
    labels = text(3, 11).masked_fill(text(3, 11, seed=1) < 30, -100)
    kind, other = text(3, 11) % 2, torch.randn(3, 11, 64)
    start, weight = torch.randn(3, 11, 64), torch.rand(3, 11)

    def score(h, kind, other):
        return head(h + other) / (1 + kind.unsqueeze(-1))

    results = []
    for limit in (2**25, 7 * V, 1):
        monkeypatch.setattr(losses, "LOGITS_AT_ONCE", limit)
        h = start.clone().requires_grad_()
        loss = token_losses(head, labels, h, kind, other, score=score)
        (loss * weight).sum().backward()
        results.append((loss.detach(), h.grad))
    whole, *in_parts = results
    for found in in_parts:
        torch.testing.assert_close(found, whole, atol=1e-6, rtol=1e-6)
    assert (whole[0] == 0).equal(labels == -100) and whole[1].abs().max() > 0.1


def test_a_head_that_is_trained_keeps_its_gradient(monkeypatch):
    """Its own would be lost in parts, so there logits stay whole."""
    monkeypatch.setattr(losses, "LOGITS_AT_ONCE", 1)
    head, h = nn.Linear(8, V), torch.randn(2, 5, 8)
    token_losses(head, text(2, 5), h).sum().backward()
    assert head.weight.grad.abs().max() > 0


@all_systems
def test_a_step_without_logits_is_the_same_step(monkeypatch, model_of, system):
    want, logits, gradients = step(model_of(system))
    monkeypatch.setattr(losses, "LOGITS_AT_ONCE", 7 * V)
    loss, none, found = step(model_of(system))
    assert none is None
    assert (logits is None) == (system not in ("control", "window", "online", "strict"))
    torch.testing.assert_close(loss, want, **CLOSE)
    torch.testing.assert_close(found, gradients, **CLOSE)


@pytest.mark.parametrize("system", ["control", "online", "compressor"])
def test_evaluation_has_its_logits(monkeypatch, model_of, system):
    monkeypatch.setattr(losses, "LOGITS_AT_ONCE", 7)
    model, ids = model_of(system).eval(), text(2, 12)
    out = model(input_ids=ids, labels=ids)
    want = F.cross_entropy(model(input_ids=ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert out.logits.shape == (2, 12, V)
    if system != "compressor":  # which predicts the first token too
        torch.testing.assert_close(out.loss, want)


# ---- layers that are computed again ----


@all_systems
def test_layers_are_computed_again_by_the_adapter_that_was_on(model_of, system):
    want, _, gradients = step(model_of(system))
    model = model_of(system)
    set_checkpointing(model)
    loss, _, found = step(model)
    assert torch.equal(loss, want)
    torch.testing.assert_close(found, gradients, **CLOSE)


# ---- masks ----


@all_systems
def test_a_mask_in_parts_is_the_whole_mask(monkeypatch, model_of, system):
    want, _, gradients = step(model_of(system))
    monkeypatch.setattr(masks, "MASK_AT_ONCE", 3 * 40 * 7)
    calls, in_parts = [], masks.attention_in_parts

    def counted(*args, **options):
        calls.append(args)
        return in_parts(*args, **options)

    monkeypatch.setattr(masks, "attention_in_parts", counted)
    loss, _, found = step(model_of(system))
    # Those that mask padding alone leave it to transformers, or have none.
    assert calls or system in ("control", "bins")
    torch.testing.assert_close(loss, want, **CLOSE)
    torch.testing.assert_close(found, gradients, **CLOSE)


def test_a_mask_is_never_whole(monkeypatch):
    """No part of it is larger than said, keys that nobody sees are left out, and what else might
    read it is refused."""
    monkeypatch.setattr(masks, "MASK_AT_ONCE", 2 * 40 * 7)
    seen, sizes = torch.ones(40, 40).tril().bool(), []
    seen[:, 3:30] = torch.eye(40, dtype=torch.bool)[:, 3:30]

    def part(rows: slice) -> torch.Tensor:
        sizes.append(seen[rows].numel())
        return seen[rows].expand(2, 1, -1, -1)

    mask = masks.mask_of(part, (2, 40, 40), torch.float32, "sdpa")
    assert mask.shape == (2, 1, 40, 40) and mask.dtype == torch.bool and not sizes
    q, k, v = torch.randn(3, 2, 4, 40, 8).requires_grad_()
    found, want = (F.scaled_dot_product_attention(q, k, v, attn_mask=x) for x in (mask, seen))
    torch.testing.assert_close(found, want, atol=1e-6, rtol=1e-6)
    assert sizes == [7 * 40] * 5 + [5 * 40]
    for use in (lambda: mask[:, :, :2], lambda: ~mask, lambda: mask.any()):
        with pytest.raises(TypeError, match="never whole"):
            use()


# ---- frozen weights in 16 bits ----


@pytest.mark.parametrize("system", ["control", "online", "slots", "planner", "scaled"])
def test_a_frozen_base_in_16_bits_trains_as_autocast_does(model_of, system):
    """Bit for bit, over a base that was published in bf16: autocast rounds its weights anyway. A
    table that Gemma scales stays as it is."""
    scaled = system == "scaled"
    made = tiny_control("gemma3_text").train() if scaled else model_of(system)
    for p in made.backbone.parameters():
        if not p.requires_grad:
            p.data = p.data.bfloat16().float()
    narrowed = copy.deepcopy(made)
    narrow(narrowed.backbone)
    frozen = {n: p for n, p in narrowed.named_parameters() if not p.requires_grad}
    bits = {n: p.element_size() for n, p in frozen.items() if p.dim() > 1}
    tables = {n for n in bits if "embed_tokens" in n or "lm_head" in n} if scaled else set()
    assert bits and {n for n, size in bits.items() if size == 4} == tables
    assert narrowed.dtype == torch.float32 and all(
        p.dtype == torch.float32 for p in narrowed.parameters() if p.requires_grad or p.dim() < 2
    )
    with torch.autocast("cpu", torch.bfloat16):
        (want, _, gradients), (loss, _, found) = map(step, (made, narrowed))
    assert torch.equal(loss, want) and gradients.keys() == found.keys()
    assert all(torch.equal(found[name], g) for name, g in gradients.items())
    # Outside of autocast it computes what fp32 computes, as held-out figures want it.
    torch.testing.assert_close(step(narrowed.eval())[0], step(made.eval())[0], **CLOSE)
