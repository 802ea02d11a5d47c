"""Boundary autoregressive: slot by slot = all at once, who sees what, the rate that it realises."""

import pytest
import torch
import torch.nn.functional as F

from families import FAMILIES, text, tiny_base
from sememe.concepts.lengths import Lengths, covering
from sememe.models import CompressorConfig, CompressorForCausalLM
from sememe.models.compressor import encode, start
from test_compressor import changed_at, ragged, tiny_compressor


@pytest.fixture(autouse=True)
def one_vote(monkeypatch):
    """Trying out which weight votes start with is most of the time that a start takes."""
    monkeypatch.setattr(start, "VOTES", (8.0,))


@pytest.mark.parametrize(
    "family, attention, changes",
    [
        *((family, "sdpa", {}) for family in FAMILIES),
        ("llama", "eager", {"codes_per_concept": 2, "depth": 2}),
        ("gemma3_text", "eager", {"rate": 0.25}),
        ("qwen3", "sdpa", {"quantise": 0.5}),
        ("qwen3", "sdpa", {"quantise": 0.0}),
    ],
)
def test_slot_by_slot_is_all_at_once(family, attention, changes):
    """Without gradient slots are written one by one with a cache; with it, one forward computes
    them all."""
    model = tiny_compressor(family, attention, boundary="autoregressive", **changes)
    with torch.no_grad():
        stepped = model.encode(*ragged())
    at_once = model.encode(*ragged())
    slots, again = stepped.slots, at_once.slots
    real = slots.rest_BC > 0
    assert torch.equal(slots.length_BC, again.length_BC)
    assert torch.equal(stepped.ids_BC, at_once.ids_BC)
    assert len(set(slots.length_BC[real].tolist())) > 1, "segments of one length test nothing"
    log_p, log_p_again = (model.segmenter.lengths(x.state_BCD[real]) for x in (slots, again))
    # 1e-4: seen 1e-5 (log-probabilities near -20); a slot that sees one entry too many or too few
    # is off by 1e-1
    torch.testing.assert_close(log_p, log_p_again, atol=1e-4, rtol=1e-4)
    x, x_again = (model.writer.inputs(part.decision)[0] for part in (stepped, at_once))
    torch.testing.assert_close(x, x_again, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_codes_depend_on_what_is_to_come_and_slots_on_earlier_ones_only():
    model, ids = tiny_compressor(boundary="autoregressive"), text(8, 20)
    changed = changed_at(ids, -1)
    encoded, other = model.encode(ids), model.encode(changed)
    slots = encoded.slots
    assert not torch.equal(slots.state_BCD[:, 0], other.slots.state_BCD[:, 0])
    assert model.compress(ids) != model.compress(changed)
    middle = slots.cursor_BC.shape[1] // 2
    before = encode.at_once(model, encoded.text, slots)
    slots.code_BCD[:, middle] += 1.0
    after = encode.at_once(model, encoded.text, slots)
    assert torch.equal(before[0], after[0]), "slots change nothing of the text's own states"
    assert torch.equal(before[1][:, :middle], after[1][:, :middle])
    assert not torch.equal(before[1][:, middle:], after[1][:, middle:])


def test_untrained_it_writes_at_the_rate():
    """At the start lengths are the same everywhere, and what slots add is nothing."""
    base, settings = tiny_base(), {"num_concepts": 32, "boundary": "autoregressive"}
    model = CompressorForCausalLM(CompressorConfig(text_config=base.config, **settings), base)
    assert not model.segmenter.before.any() and not model.segmenter.more.any()
    model.start_frame(text(8, 24))
    model.start_codes(text(8, 24))
    torch.manual_seed(0)
    encoded = model.train().encode(text(16, 64))
    assert abs(int(encoded.coded_BC.sum()) / (16 * 64) / 0.25 - 1) < 0.1, "the last one is cut"
    assert len(encoded.slots.length_BC[encoded.slots.rest_BC > 0].unique()) > 4


def test_what_a_segment_cost_reaches_its_own_length():
    """The term of one batch by hand: nats are summed over the tokens of each segment."""
    torch.manual_seed(0)
    model, (ids, mask) = tiny_compressor(boundary="autoregressive"), ragged((4, 13, 20))
    encoded, nll, terms = model.train().encode(ids, mask), torch.rand(3, 20) * mask, []
    model.segmenter.lengths.learn = lambda *args: terms.extend(args) or torch.zeros(())
    model.segmenter.length_loss(encoded.slots, encoded.rank_BS[:, :-1], nll, 0.5)
    want = [0.0]
    written = encoded.decision.written_BT[:, 1:][mask > 0]
    for cost, ends in zip(nll[mask > 0].tolist(), written.tolist(), strict=True):
        want[-1] += cost
        want += [0.0] * ends
    torch.testing.assert_close(terms[3], torch.tensor(want[:-1]))
    assert float(terms[2].sum()) == float(mask.sum())


def learned(penalty: float, nats, rate: float | None = None, steps: int = 150) -> float:
    """The mean length after some steps with that penalty, which the rate moves if there is one."""
    torch.manual_seed(0)
    lengths, x = Lengths(8, 10, 0.25), F.normalize(torch.randn(256, 8), dim=-1)
    start = {"penalty": penalty, "batches": 1.0, "nats": 1.0, "density": 0.25}
    lengths.load_state_dict({k: torch.tensor(v) for k, v in start.items()}, strict=False)
    optimizer = torch.optim.Adam(lengths.parameters(), 2e-2)
    for _ in range(steps):
        log_p, rest = lengths(x), torch.full((256,), 100)
        n = lengths.draw(log_p, rest)
        loss = lengths.learn(log_p, rest, n, nats(n.float()), rate or float(lengths.density))
        if rate is None:
            lengths.penalty.fill_(penalty)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return float((lengths(x).exp() @ torch.arange(1.0, 11)).mean())


def test_lengths_go_where_tokens_are_cheap_and_a_penalty_holds_the_rate():
    def convex(n):
        return 0.1 * n.square()  # the best length is √(penalty / 0.1)

    assert learned(0.0, lambda n: torch.where(n > 4, 0.0, n)) > 5
    assert 1.5 < learned(0.4, convex) < 3 and 5 < learned(4.0, convex) < 7.5
    assert abs(learned(0.0, convex, rate=0.2, steps=400) - 5) < 0.5


def test_lengths_that_reach_the_end_are_one():
    log_p = torch.log_softmax(torch.randn(3, 5, generator=torch.Generator().manual_seed(0)), -1)
    want = log_p.exp()
    for row, rest in ((0, 1), (1, 3)):
        want[row, rest - 1 :] = F.pad(want[row, rest - 1 :].sum()[None], (0, 5 - rest))
    torch.testing.assert_close(covering(log_p, torch.tensor([1, 3, 9])).exp(), want)


@pytest.mark.parametrize("requested", [0.25, 0.5])
@pytest.mark.parametrize("trained", [0.25, 0.5])
@torch.no_grad()
def test_every_token_is_covered_once_and_the_rate_is_realised(trained, requested):
    """Free running, at the rate that lengths are for and at another one."""
    model = tiny_compressor(boundary="autoregressive", rate=trained, max_tail=16)
    lengths = [1, 7, 13, 20, 0, *[48] * 24]
    with model.dial.at(rate=requested):
        encoded, again = (model.encode(*ragged(lengths, 48)) for _ in range(2))
    assert torch.equal(encoded.ids_BC, again.ids_BC), "nothing is drawn in use"
    real_BC = encoded.slots.rest_BC > 0
    assert (encoded.slots.length_BC * real_BC).sum(1).tolist() == lengths
    want = [max(1, round(requested * length)) if length else 0 for length in lengths]
    assert real_BC.sum(1).tolist() == encoded.coded_BC.sum(1).tolist() == want
    halves = encoded.decision.written_BT[5:, 1:25].float().mean(1)
    assert len(halves.unique()) > 1, "spent on the way as it likes"
    assert abs(float(halves.mean()) / requested - 1) < 0.2
