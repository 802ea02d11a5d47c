"""Heads, gate, segment mask and k-means, each against its definition."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from reference import loop_decisions, naive_decisions, naive_rule
from sememe.concepts import gate as gate_module
from sememe.concepts.boundary import BOUNDARIES
from sememe.concepts.gate import GateState, RateGate
from sememe.concepts.head import HEADS
from sememe.concepts.kmeans import kmeans
from sememe.concepts.masks import Lane, segment_mask
from sememe.concepts.segments import tail_lengths


def decide(gate, scores, rate, max_tail) -> np.ndarray:
    """What a gate decides of texts without padding."""
    real = np.ones(scores.shape, bool)
    return gate(scores, real, rate, max_tail, GateState.start(len(scores)))[0]


@given(st.lists(st.booleans(), min_size=1, max_size=24), st.none() | st.integers(0, 24))
def test_mask_rule_is_the_double_loop(written, max_tail):
    row = torch.tensor([written])
    position = torch.arange(len(written))[None]
    count = (~row).cumsum(1)
    first = (count * row).cummax(1).values if max_tail is None else count - max_tail
    lane = Lane(position, count - 1, first, row, torch.ones_like(row))
    assert segment_mask(lane, lane)[0, 0].tolist() == naive_rule(written, max_tail)


@settings(deadline=None)
@given(st.integers(1, 8), st.integers(0, 9), st.floats(-1, 1), st.integers(0, 10_000))
def test_gate_is_the_naive_gate(stride, extra, threshold, seed):
    rate, max_tail = 1 / stride, stride + extra
    scores = np.random.default_rng(seed).normal(size=(1, 40)).astype(np.float32)
    gate = RateGate("null", 8, 16)
    gate.threshold = lambda rate: (threshold, 0.1)
    written = decide(gate, torch.from_numpy(scores), rate, max_tail)[0].tolist()
    assert written == naive_decisions(scores[0].tolist(), rate, max_tail, threshold, 0.1)


def test_blocks_decide_as_the_loop_does(monkeypatch):
    """1,000 cases: every boundary, rate of rows, tail and padding, and what is carried between two
    chunks. Blocks of 8 tokens, so that guesses are often wrong."""
    monkeypatch.setattr(gate_module, "BLOCK", 8)
    random, blocks, rounds = np.random.default_rng(0), [], []
    loop = RateGate._loop

    def spied(gate, scores, *others):
        rounds.append(scores.shape[1])
        return loop(gate, scores, *others)

    monkeypatch.setattr(RateGate, "_loop", spied)
    for case in range(1000):
        gate = RateGate([*BOUNDARIES][case % len(BOUNDARIES)], 8, 16)
        batch, length = random.integers(1, 5), random.integers(1, 100)
        scores = random.normal(random.normal(), random.uniform(0, 2), (batch, length))
        score_BT = torch.from_numpy(scores).float() * gate.boundary.scored
        gate.calibrate(torch.from_numpy(random.normal(size=300)))
        if gate.boundary.accumulates:
            score_BT, gate.quantiles = score_BT.abs(), gate.quantiles.abs()
        # Padding at the left, at the right, or anywhere.
        place, first = np.arange(length), random.integers(0, length, (batch, 1))
        masks = place >= 0, place >= first, place <= first, random.random((batch, length)) < 0.7
        real_BT = np.broadcast_to(masks[random.integers(4)], (batch, length))
        rate = float(random.choice([0.1, 0.25, 0.4, 1.0]))
        if random.integers(2):
            rate = random.choice([0.1, 0.25, 1.0], batch)
        chunk, max_tail = random.integers(0, length + 1), int(random.choice([0, 3, 16]))
        state, other = GateState.start(batch), GateState.start(batch)
        for part in (slice(0, chunk), slice(chunk, None)):
            text = score_BT[:, part], real_BT[:, part]
            if text[1].size == 0:
                continue
            written, state, _ = gate(*text, rate, max_tail, state)
            limits = *gate.threshold(rate), gate.boundary.accumulates
            expected, other = loop_decisions(*text, rate, max_tail, other, *limits)
            assert np.array_equal(written, expected), case
            blocks.append(written.shape[1] // 8)
            for name, x, y in zip(GateState._fields, state, other, strict=True):
                assert np.array_equal(x, y) and x.dtype == y.dtype, (case, name)
    assert max(blocks) > 8 and len(rounds) > 2 * len(blocks), "some guesses were wrong"


@pytest.mark.parametrize("rate", [0.5, 0.25, 0.125])
def test_gate_realises_the_rate_and_bounds_the_tail(rate):
    """Within 5 % relative on unseen scores, also when they are shifted by half a standard
    deviation."""
    torch.manual_seed(0)
    gate, longest = RateGate("null", 8, 16), int(4 / rate)
    gate.calibrate(torch.randn(50_000))
    for shift in (0.0, 0.5):
        written = torch.from_numpy(decide(gate, torch.randn(8, 1024) + shift, rate, longest))
        assert abs(written.double().mean() / rate - 1) < 0.05, shift
        assert int(tail_lengths(written, torch.ones_like(written)).max()) <= longest
    written = decide(gate, torch.full((1, 64), -100.0), 0.1, 9)
    assert written[0].nonzero()[0].tolist() == list(range(0, 64, 10)), "forced after max_tail NULLs"


@pytest.mark.parametrize("name", HEADS)
def test_head_gives_one_distribution_over_ids_and_null(name):
    """Whether times which; of the joint softmax that product is that softmax."""
    head = HEADS[name](8, 5)
    x, previous, table = torch.randn(3, 8), torch.randn(3, 8), torch.randn(5, 8)
    score = head.score(x, previous)[:, None]
    which = head.code_logits(x, table).log_softmax(-1)
    log_p = torch.cat([which + F.logsigmoid(score), F.logsigmoid(-score)], -1)
    torch.testing.assert_close(log_p.exp().sum(-1), torch.ones(3))
    if name == "joint":
        torch.testing.assert_close(log_p, head.logits[0](x).log_softmax(-1))


def test_kmeans_covers_separated_clusters_and_leaves_no_code_empty():
    torch.manual_seed(0)
    centres = 10 * torch.randn(5, 3)
    points = (centres[:, None] + 0.01 * torch.randn(5, 40, 3)).flatten(0, 1)
    # Three codes a cluster: no local optimum can miss one.
    found, nearest = kmeans(points, 15, seed=1)
    assert torch.cdist(centres, found).min(1).values.max() < 0.1
    assert len(nearest.unique()) == 15
    assert kmeans(points[:3], 5)[0].isfinite().all(), "fewer points than codes"
