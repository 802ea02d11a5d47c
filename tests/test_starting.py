"""What an online model starts from: the vocabulary, fits to what the base makes of a text, LoRA."""

import math

import pytest
import torch
import torch.nn.functional as F

from families import text, tiny_online
from sememe.concepts.boundary import Surprise
from sememe.concepts.bridge import TailBridge
from sememe.concepts.codebook import vocabulary_blocks
from sememe.concepts.proposals import Proposals
from sememe.concepts.readout import TokenAnchor


def test_the_codebook_sees_every_token_of_the_vocabulary():
    ids = text(4, 60)
    blocks = vocabulary_blocks(ids, 97, seed=0)
    assert torch.equal(blocks[:, 0], ids[: len(blocks), 0]), "each opens as a text does"
    assert len(blocks[:, 1:].unique()) == len(blocks) * 59 == blocks[:, 1:].numel(), "none twice"
    assert not torch.equal(blocks, vocabulary_blocks(ids, 97, seed=1))
    assert len(vocabulary_blocks(ids[:, :20], 97, seed=0)[:, 1:].unique()) == 95, "whole blocks"
    assert vocabulary_blocks(text(2, 300), 97, seed=0).shape == (1, 300), "repeated in a long text"


def test_lora_may_spare_the_shallow_slice():
    model, ids = tiny_online(split=(2, 1, 1), lora_first=2), text(2)
    names = [name for name, _ in model.named_parameters() if "lora_" in name]
    assert {int(name.split("layers.")[1].split(".")[0]) for name in names} == {2, 3}
    before = model.shallow_states(ids)
    model.train()
    model(ids, labels=ids).loss.backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 1.0).step()
    torch.testing.assert_close(model.shallow_states(ids), before, rtol=0, atol=0)


def test_least_squares_finds_a_linear_map():
    """Of the gate's estimate, the token's anchor and the bridge; on other states too."""
    generator = torch.Generator().manual_seed(0)
    x, last = 3 + 5 * torch.randn(2, 2000, 8, generator=generator)
    a, b = torch.randn(2, 8, 8, generator=generator)
    surprise, both = 2 + x @ a[0] - last[:, 0], torch.cat([x, last], 1)
    boundary = Surprise(8, 16)
    explains = boundary.start(both[:1000].view(5, 200, 16), surprise[:1000].view(5, 200))
    assert explains["surprise_explains"] > 0.99
    score = boundary.score(None, x[1000:], last[1000:])
    assert torch.corrcoef(torch.stack([score, surprise[1000:]]))[0, 1] > 0.99

    embedding, anchor = x / 50, TokenAnchor(8)
    assert anchor(embedding).abs().max() == 0, "nothing at birth"
    target = 10 * embedding @ a + 3
    assert anchor.start(embedding[:300], target[:300])["anchor_explains"] > 0.99
    torch.testing.assert_close(anchor(embedding[300:]), target[300:], atol=0.3, rtol=0.1)

    target, bridge, shrunk = x @ a + last @ b + 2, TailBridge(8, 2), TailBridge(8, 0)
    torch.testing.assert_close(bridge(x, last), x)  # zero at birth
    assert bridge.start(x[:400], last[:400], target[:400], penalty=1e-9) > 0.99999
    torch.testing.assert_close(bridge(x, last), target, atol=1e-2, rtol=1e-3)
    shrunk.start(x[:12], last[:12], target[:12], penalty=10.0)  # fewer states than features
    assert shrunk.shallow.weight.norm() < 0.5 * bridge.shallow.weight.norm()


@torch.no_grad()
def test_proposals_learn_what_follows_and_are_distributions(monkeypatch):
    """A text that counts in threes modulo 7, over a vocabulary of 11 of which 6 are words: each
    head knows its own token, and the seventh number is one of five others."""
    monkeypatch.setattr("sememe.concepts.proposals.WORDS", 6)
    generator = torch.Generator().manual_seed(0)
    ids = (torch.randint(7, (40, 1), generator=generator) + 3 * torch.arange(20)) % 7
    ids[ids == 6] = torch.where(torch.rand(ids.shape, generator=generator) < 0.5, 6, 0)[ids == 6]
    proposals = Proposals(11, 11)
    proposals.set_words(ids)
    assert sorted(proposals.words.tolist()) == [0, 1, 2, 3, 4, 5]
    x = F.one_hot(ids, 11).float()
    p = F.one_hot(ids[:, 2:], 11).float()  # behind each token but the first and the last
    proposals.start(torch.cat([x[:, 1:-1], x[:, :-2]], -1), proposals.classes((p + 1e-9).log()))
    log_p = proposals(torch.cat([x[:, 1:-4], x[:, :-5]], -1).flatten(0, 1))
    for j, log_p_nW in enumerate(log_p):
        target = ids[:, 2 + j : 2 + j + 15].flatten()
        nll = proposals.nll(log_p_nW, target)
        assert nll[target < 6].mean() < 0.5 and nll[target == 6].min() > math.log(5), j
    every = torch.arange(11).expand(*log_p.shape[:2], 11)
    nll = proposals.nll(log_p.unsqueeze(2).expand(-1, -1, 11, -1), every)
    torch.testing.assert_close(nll.neg().exp().sum(-1), torch.ones_like(nll[..., 0]))
    torch.testing.assert_close(proposals.entropy(log_p), (nll * nll.neg().exp()).sum(-1))


@pytest.mark.parametrize("kind", ["entropy", "surprise"])
@torch.no_grad()
def test_a_gate_is_fitted_to_what_the_base_makes_of_the_text(kind):
    """On the text it was fitted to, it follows the base's own values; a random base gives a weak
    but real relation."""
    model, ids = tiny_online(boundary=kind, lora_rank=0), text(100, 24, seed=3)
    assert model.start_frame(ids)[f"{kind}_explains"] > 0.03
    score = model.writer.scores(model.shallow_states(ids)).flatten()
    log_p = F.log_softmax(model.backbone(ids).logits, -1)
    value = {
        "entropy": torch.special.entr(log_p.exp()).sum(-1)[:, 1:],
        "surprise": -log_p[:, :-1].gather(-1, ids[:, 1:, None]),
    }[kind]
    assert torch.corrcoef(torch.stack([score, value.flatten()]))[0, 1] > 0.15


@torch.no_grad()
def test_a_bridge_comes_closer_to_the_base_on_other_text():
    """States entering the deep slice at tail positions, against those of the base itself."""
    model, other = tiny_online(bridge=True, lora_rank=0, quantise=0.0), text(8, 24, seed=5)
    assert 0.05 < model.start_frame(text(600, 24, seed=3))["bridge_explains"] < 1
    chunk, h = next(model._shallow_batches(other, tokens=8 * 24))
    decision = model.writer.decide(h, chunk)
    full = model.spine.run(1, 3, h, chunk.position_BT, chunk.rope, lambda window: None)
    cache = model.new_cache(8, keeps=False)
    closed, _ = model._tails(h, chunk, decision, cache)
    c = model._middle(decision.h_BCD, chunk, decision, cache, closed)
    bridged, _ = model.bridge.tails(h, c, decision, cache.last_concept_BD)
    tail = ~decision.written_BT & (decision.written_BT.cumsum(1) > 1)
    assert (bridged - full)[tail].square().mean() < 0.97 * (h - full)[tail].square().mean()
