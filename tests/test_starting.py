"""What an online model starts from: vocabulary coverage, the entropy estimate, LoRA that spares the
shallow slice."""

import pytest
import torch
import torch.nn.functional as F

from families import text, tiny_online
from sememe.concepts.boundary import Entropy
from sememe.concepts.codebook import vocabulary_blocks
from sememe.concepts.readout import TokenAnchor


def test_the_codebook_sees_every_token_of_the_vocabulary():
    ids = text(4, 60)
    blocks = vocabulary_blocks(ids, 97, seed=0)
    assert blocks.shape[1] == 60 and torch.equal(blocks[:, 0], ids[: len(blocks), 0]), (
        "each opens as a text does"
    )
    seen = blocks[:, 1:].flatten().tolist()
    assert len(set(seen)) == len(seen) == len(blocks) * 59, "no token twice"
    assert len(set(vocabulary_blocks(text(4, 20), 97, seed=0)[:, 1:].flatten().tolist())) == 95, (
        "whole blocks, of 97 tokens"
    )
    assert not torch.equal(blocks, vocabulary_blocks(ids, 97, seed=1))


def test_a_text_longer_than_the_vocabulary_repeats_it():
    assert vocabulary_blocks(text(2, 300), 97, seed=0).shape == (1, 300)


def test_lora_may_spare_the_shallow_slice():
    model, ids = tiny_online(split=(2, 1, 1), lora_first=2), text(2)
    layers = {
        int(name.split("layers.")[1].split(".")[0])
        for name, _ in model.named_parameters()
        if "lora_" in name
    }
    assert layers == {2, 3}
    before = model.shallow_states(ids)
    model.train()
    model(ids, labels=ids).loss.backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 1.0).step()
    torch.testing.assert_close(model.shallow_states(ids), before, rtol=0, atol=0)


def test_the_entropy_estimate_is_the_least_squares_fit():
    generator = torch.Generator().manual_seed(0)
    x, previous = torch.randn(2, 2000, 8, generator=generator)
    wanted = 2 + x @ torch.arange(8.0) - previous[:, 0]
    boundary = Entropy(8)
    assert boundary.start(x[:1000], previous[:1000], wanted[:1000])["entropy_explains"] > 0.99
    score = boundary.score(None, x[1000:], previous[1000:])
    assert torch.corrcoef(torch.stack([score, wanted[1000:]]))[0, 1] > 0.99, "on other states"


@pytest.mark.parametrize("kind", ["entropy", "surprise"])
@torch.no_grad()
def test_it_is_fitted_to_what_the_base_makes_of_the_text(kind):
    """On the text it was fitted to, it follows the base's own values; a random base gives a weak
    but real relation."""
    model, ids = tiny_online(boundary=kind, lora_rank=0), text(100, 24, seed=3)
    assert model.start_frame(ids)[f"{kind}_explains"] > 0.03
    h = model.shallow_states(ids)
    score = model.writer.scores(h).flatten()
    log_p = F.log_softmax(model.backbone(ids).logits, -1)
    entropy = -(log_p.exp() * log_p).sum(-1)[:, 1:].flatten()
    surprise = -log_p[:, :-1].gather(-1, ids[:, 1:, None]).flatten()
    assert (
        torch.corrcoef(torch.stack([score, entropy if kind == "entropy" else surprise]))[0, 1]
        > 0.15
    )


def test_the_anchor_is_the_least_squares_fit_of_the_token():
    generator = torch.Generator().manual_seed(0)
    embedding = 0.1 * torch.randn(500, 8, generator=generator)
    x = 10 * embedding @ torch.randn(8, 8, generator=generator) + 3
    anchor = TokenAnchor(8)
    assert anchor(embedding).abs().max() == 0, "nothing at birth"
    assert anchor.start(embedding[:300], x[:300])["anchor_explains"] > 0.99
    torch.testing.assert_close(anchor(embedding[300:]), x[300:], atol=0.3, rtol=0.1)


@torch.no_grad()
def test_with_an_anchor_the_codes_say_the_rest():
    ids, other = text(300, 24, seed=3), text(16, 24, seed=9)
    left = {}
    for anchored in (False, True):
        model = tiny_online(anchor=anchored, lora_rank=0)
        model.start_frame(ids)
        found = model.start_codes(ids)
        h, token = next(model._code_states(other))
        x = model.writer.codes.normalise(h) - model.writer.readout.anchor(token)
        left[anchored] = float((x - model.writer.quantise(x, soft=False).hard_nD).square().mean())
    assert found["anchor_explains"] > 0.03
    assert left[True] < left[False], "on other text"
