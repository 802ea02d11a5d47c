"""The bridge: its least squares, and what it does in the online model."""

import torch

from families import text, tiny_online
from sememe.concepts.bridge import TailBridge


def test_least_squares_finds_a_linear_map():
    generator = torch.Generator().manual_seed(0)
    h, last = (3 + 5 * torch.randn(400, 8, generator=generator) for _ in range(2))
    a, b = (torch.randn(8, 8, generator=generator) for _ in range(2))
    target = h @ a + last @ b + 2
    bridge = TailBridge(8)
    torch.testing.assert_close(bridge(h, last), h)  # zero at birth
    assert bridge.start(h, last, target, penalty=1e-9) > 0.99999
    torch.testing.assert_close(bridge(h, last), target, atol=1e-2, rtol=1e-3)


def test_a_penalty_shrinks_and_few_states_do_not_break_it():
    h, last, target = torch.randn(
        3, 12, 8, generator=torch.Generator().manual_seed(0)
    )  # fewer states than features
    exact, shrunk = TailBridge(8), TailBridge(8)
    exact.start(h, last, target, penalty=1e-6)
    shrunk.start(h, last, target, penalty=10.0)
    assert shrunk.shallow.weight.norm() < 0.5 * exact.shallow.weight.norm()


@torch.no_grad()
def test_online_bridge_comes_closer_to_the_base_on_other_text():
    """States entering the deep slice at tail positions, against those of the base itself."""
    model, other = tiny_online(bridge=True, lora_rank=0, quantise=0.0), text(8, 24, seed=5)
    found = model.start_frame(text(600, 24, seed=3))
    assert 0.05 < found["bridge_explains"] < 1
    chunk, h = next(model._shallow_batches(other, tokens=8 * 24))
    decision = model.writer.decide(h, chunk)
    written = decision.written_BT
    full = model.spine.run(1, 3, h, chunk.position_BT, chunk.rope, lambda window: None)
    cache = model.new_cache(8, keeps=False)
    c = model._middle(decision.h_BCD, chunk, decision, cache)
    bridged, _ = model.bridge.tails(h, c, decision, cache.last_concept_BD)
    tail = ~written & (written.cumsum(1) > 1)
    assert (bridged - full)[tail].square().mean() < 0.97 * (h - full)[tail].square().mean()
