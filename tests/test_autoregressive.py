"""Boundary autoregressive: slot by slot = all slots at once, rows alone = rows together, who sees
what, lengths that learn and the rate that they realise."""

import copy
import functools

import pytest
import torch
import torch.nn.functional as F

from families import FAMILIES, text, tiny_base
from sememe.concepts.lengths import Lengths, covering
from sememe.models import CompressorConfig, CompressorForCausalLM
from sememe.models.compressor import encode, start
from test_compressor import ragged, tiny_compressor


@pytest.fixture(autouse=True, scope="module")
def one_vote():
    """Which weight votes start with is not what is tested here, and trying them out is most of the
    time that a start takes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(start, "VOTES", (8.0,))
        yield


built = functools.cache(functools.partial(tiny_compressor, boundary="autoregressive"))


def segmented(**changes) -> CompressorForCausalLM:
    """One of its own, built once for all tests."""
    return copy.deepcopy(built(**changes))


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


def test_codes_depend_on_what_is_to_come_and_slots_on_earlier_ones_only():
    model, ids = segmented(), text(8, 20)
    changed = ids.clone()
    changed[:, -1] = (ids[:, -1] + 1) % 97
    with torch.no_grad():
        a, b = (model.encode(x).slots.state_BCD[:, 0] for x in (ids, changed))
        assert not torch.equal(a, b), "the first slot has read the last token"
        assert model.compress(ids) != model.compress(changed)
        encoded = model.encode(ids)
        slots = encoded.slots
        middle = slots.cursor_BC.shape[1] // 2
        before = encode.at_once(model, encoded.text, slots)
        slots.code_BCD[:, middle] += 1.0
        after = encode.at_once(model, encoded.text, slots)
    assert torch.equal(before[0], after[0]), "slots change nothing of the text's own states"
    assert torch.equal(before[1][:, :middle], after[1][:, :middle])
    assert not torch.equal(before[1][:, middle:], after[1][:, middle:])


def test_untrained_it_writes_news_at_the_rate():
    """At the start lengths are the same everywhere, and what slots add is nothing."""
    for rate, longest in ((0.5, 6), (0.25, 17), (1.0, 4), (0.4, 10)):
        mean = torch.softmax(Lengths(8, longest, rate).bias, 0) @ torch.arange(1.0, longest + 1)
        # 1e-2: where every length is 1 the tilt stops at 20
        torch.testing.assert_close(mean, torch.tensor(1 / rate), atol=1e-2, rtol=0)
    base = tiny_base()
    settings = {"num_concepts": 32, "boundary": "autoregressive", "content": "bins"}
    model = CompressorForCausalLM(CompressorConfig(text_config=base.config, **settings), base)
    assert not model.segmenter.before.any() and not model.segmenter.more.any()
    model.start_frame(text(8, 24))
    model.start_codes(text(8, 24))
    model.train()
    torch.manual_seed(0)
    encoded = model.encode(text(16, 64))
    assert abs(int(encoded.coded_BC.sum()) / (16 * 64) / 0.25 - 1) < 0.1, "the last one is cut"
    slots = encoded.slots
    assert len(set(slots.length_BC[slots.rest_BC > 0].tolist())) > 4


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_all_of_it_learns(precision):
    """Under autocast too, where weights that the first pass cast without gradient must not serve
    the second."""
    torch.manual_seed(0)
    model, ids = segmented(continuation_share=0.25), text(4, 16)
    model.train()
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        model(ids, labels=ids).loss.backward()
    assert all(p.grad.abs().sum() > 0 for p in model.segmenter.parameters())
    for name, p in model.named_parameters():
        if "lora_B" in name:
            assert p.grad is not None and p.grad.abs().sum() > 0, name
    assert model.segmenter.lengths.penalty != 0 and model.segmenter.lengths.nats > 0


def test_what_a_segment_cost_reaches_its_own_length():
    """The term of one batch by hand: nats are summed over the tokens of each segment."""
    torch.manual_seed(0)
    model, (ids, mask) = segmented(), ragged((4, 13, 20))
    model.train()
    encoded, seen = model.encode(ids, mask), []
    model.segmenter.lengths.learn = lambda *args: seen.append(args) or torch.zeros(())
    nll = torch.rand(3, 20) * mask
    model.segmenter.length_loss(encoded.slots, encoded.rank_BS[:, :-1], nll, 0.5)
    want, total = [], 0.0
    written_BT = encoded.decision.written_BT[:, 1:]
    for cost, written in zip(nll[mask > 0].tolist(), written_BT[mask > 0].tolist(), strict=True):
        total += cost
        if written:
            want.append(total)
            total = 0.0
    torch.testing.assert_close(seen[0][3], torch.tensor(want))
    assert float(seen[0][2].sum()) == float(mask.sum())


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
    p = covering(log_p, torch.tensor([1, 3, 9])).exp()
    torch.testing.assert_close(p.sum(1), torch.ones(3))
    assert p[0].tolist()[1:] == [0] * 4 and p[1, 3:].tolist() == [0, 0]
    torch.testing.assert_close(p[1, 2], log_p[1, 2:].exp().sum())
    torch.testing.assert_close(p[2], log_p[2].exp())


@pytest.mark.parametrize("requested", [0.25, 0.5])
@pytest.mark.parametrize("trained", [0.25, 0.5])
def test_every_token_is_covered_once_and_the_rate_is_realised(trained, requested):
    """Free running, at the rate that lengths are for and at another one."""
    model, lengths = segmented(rate=trained, max_tail=16), [1, 7, 13, 20, 0, *[48] * 24]
    with torch.no_grad(), model.dial.at(rate=requested):
        encoded, again = (model.encode(*ragged(lengths, 48)) for _ in range(2))
    assert torch.equal(encoded.ids_BC, again.ids_BC), "nothing is drawn in use"
    real_BC = encoded.slots.rest_BC > 0
    assert (encoded.slots.length_BC * real_BC).sum(1).tolist() == lengths
    want = [max(1, round(requested * length)) if length else 0 for length in lengths]
    assert real_BC.sum(1).tolist() == encoded.coded_BC.sum(1).tolist() == want
    halves = encoded.decision.written_BT[5:, 1:25].float().mean(1)
    assert len(set(halves.tolist())) > 1, "spent on the way as it likes"
    assert abs(float(halves.mean()) / requested - 1) < 0.2
