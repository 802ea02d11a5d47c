"""Heads, gate, segments and masks, each against its definition."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from reference import naive_decisions, naive_segment_rule
from sememe.concepts.gate import GateState, RateGate
from sememe.concepts.head import HEADS
from sememe.concepts.kmeans import assign, kmeans
from sememe.concepts.masks import Lane, segment_mask
from sememe.concepts.quantise import gumbel_like
from sememe.concepts.segments import tail_lengths


def lane(written: torch.Tensor, valid: torch.Tensor | None = None) -> Lane:
    valid = torch.ones_like(written) if valid is None else valid
    position = valid.cumsum(1) - 1
    return Lane(position, (position * written).cummax(1).values, written, valid)


def decide(gate, scores, rate, max_tail) -> np.ndarray:
    """What a gate decides of texts without padding."""
    real = np.ones(scores.shape, bool)
    return gate(scores, real, rate, max_tail, GateState.start(len(scores)))[0]


@given(st.lists(st.booleans(), min_size=1, max_size=24))
def test_mask_rule_is_the_double_loop(written):
    row = torch.tensor([written])
    assert segment_mask(lane(row), lane(row))[0, 0].tolist() == naive_segment_rule(written)


def test_mask_hides_padding_keys_and_far_keys():
    here = lane(
        torch.tensor([[False, False, True, False, True, False]]), torch.arange(6)[None] >= 2
    )
    mask = segment_mask(here, here)[0, 0]
    assert not mask[2:, :2].any(), "keys on padding must not be seen"
    assert mask[:2].all(), "queries on padding see everything, so that no row is empty"
    narrow = segment_mask(here, here, window=2)[0, 0]
    assert [row.nonzero().flatten().tolist() for row in narrow[4:]] == [[4], [4, 5]]


def test_tail_lengths_count_since_the_last_concept():
    written = torch.tensor([[False, True, False, False, True, False]])
    assert tail_lengths(written, torch.arange(6)[None] >= 1).tolist() == [[0, 0, 1, 2, 0, 1]]


@settings(deadline=None)
@given(st.integers(1, 8), st.integers(0, 9), st.floats(-1, 1), st.integers(0, 10_000))
def test_gate_is_the_naive_gate(stride, extra, threshold, seed):
    rate, max_tail = 1 / stride, stride + extra
    scores = np.random.default_rng(seed).normal(size=(1, 40)).astype(np.float32)
    gate = RateGate("null", 8)
    gate.threshold = lambda rate: (threshold, 0.1)
    written = decide(gate, torch.from_numpy(scores), rate, max_tail)[0].tolist()
    assert written == naive_decisions(scores[0].tolist(), rate, max_tail, threshold, 0.1)


@pytest.mark.parametrize("rate", [0.5, 0.25, 0.125])
def test_gate_realises_the_rate_and_bounds_the_tail(rate):
    """Within 5 % relative on unseen scores, also when they are shifted by half a standard
    deviation."""
    torch.manual_seed(0)
    gate, longest = RateGate("null", 8), int(4 / rate)
    gate.calibrate(torch.randn(50_000))
    for shift in (0.0, 0.5):
        written = torch.from_numpy(decide(gate, torch.randn(8, 1024) + shift, rate, longest))
        assert abs(written.double().mean() / rate - 1) < 0.05, shift
        assert int(tail_lengths(written, torch.ones_like(written)).max()) <= longest
    written = decide(gate, torch.full((1, 64), -100.0), 0.1, 9)
    assert written[0].nonzero()[0].tolist() == list(range(0, 64, 10)), "forced after max_tail NULLs"


def test_gate_without_score_is_a_fixed_stride():
    gate, x = RateGate("fixed", 8), torch.randn(2, 33, 8)
    score = gate.boundary.score(HEADS["nearest"](8, 5), x, x.roll(1, 1))
    assert decide(gate, score, 0.25, 16)[1].nonzero()[0].tolist() == list(range(0, 33, 4))


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


def test_gumbel_argmax_samples_the_softmax():
    torch.manual_seed(0)
    logits = torch.tensor([1.0, 0.0, -1.0]).expand(40_000, 3)
    share = torch.bincount((logits + gumbel_like(logits)).argmax(-1), minlength=3) / 40_000
    assert torch.allclose(share, logits[0].softmax(-1), atol=0.01)  # 3 standard errors are 0.0075


def test_kmeans_covers_separated_clusters_and_leaves_no_code_empty():
    torch.manual_seed(0)
    centres = 10 * torch.randn(5, 3)
    points = (centres[:, None] + 0.01 * torch.randn(5, 40, 3)).flatten(0, 1)
    # Three codes a cluster: no local optimum can miss one.
    found, nearest = kmeans(points, 15, seed=1)
    assert torch.cdist(centres, found).min(1).values.max() < 0.1
    assert len(nearest.unique()) == 15
    left = (points - found[nearest]).square().sum(1)
    torch.testing.assert_close(assign(points, found)[1], left, atol=1e-3, rtol=0)
    assert kmeans(points[:3], 5)[0].isfinite().all(), "fewer points than codes"
