"""Heads, codes, gate, segments and masks, each against its definition."""

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
from sememe.concepts.masks import Lane, allow, segment_mask
from sememe.concepts.quantise import gumbel_like
from sememe.concepts.segments import packing, tail_lengths


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
    written = torch.tensor([[False, False, True, False, True, False]])
    valid = torch.tensor([[False, False, True, True, True, True]])
    mask = segment_mask(lane(written, valid), lane(written, valid))[0, 0]
    assert not mask[2:, :2].any(), "keys on padding must not be seen"
    assert mask[:2].all(), "queries on padding see everything, so that no row is empty"
    narrow = segment_mask(lane(written, valid), lane(written, valid), window=2)[0, 0]
    assert narrow[4].tolist() == [False, False, False, False, True, False]
    assert narrow[5].tolist() == [False, False, False, False, True, True]


def test_mask_for_eager_is_additive():
    mask = torch.tensor([[True, False]])
    assert allow(mask, torch.float32, "sdpa") is mask
    assert allow(mask, torch.float32, "eager").tolist() == [[0.0, torch.finfo(torch.float32).min]]


@given(st.lists(st.lists(st.booleans(), min_size=7, max_size=7), min_size=1, max_size=4))
def test_pack_and_unpack_are_inverse(rows):
    written = torch.tensor(rows)
    x = torch.randn(*written.shape, 3)
    pack = packing(written)
    for b in range(len(rows)):
        want = x[b][written[b]]
        assert torch.equal(pack.pack(x)[b, : len(want)], want)
        assert int(pack.valid_BC[b].sum()) == len(want)
    assert torch.equal(pack.unpack(pack.pack(x) * 2, x), torch.where(written[..., None], 2 * x, x))


def test_tail_lengths_count_since_the_last_concept():
    written = torch.tensor([[False, True, False, False, True, False]])
    valid = torch.tensor([[False, True, True, True, True, True]])
    assert tail_lengths(written, valid).tolist() == [[0, 0, 1, 2, 0, 1]]


@settings(deadline=None)
@given(st.integers(1, 8), st.integers(0, 9), st.floats(-1, 1), st.integers(0, 10_000))
def test_gate_is_the_naive_gate(stride, extra, threshold, seed):
    rate, max_tail = 1 / stride, stride + extra
    scores = np.random.default_rng(seed).normal(size=(1, 40)).astype(np.float32)
    gate = RateGate("null", 8)
    gate.threshold = lambda rate: (threshold, 0.1)
    written = decide(gate, torch.from_numpy(scores), rate, max_tail)
    assert written[0].tolist() == naive_decisions(
        scores[0].tolist(), rate, max_tail, threshold, 0.1
    )


@pytest.mark.parametrize("rate", [0.5, 0.25, 0.125])
def test_gate_realises_the_rate_and_bounds_the_tail(rate):
    """Within 5 % relative on unseen scores, also when they are shifted by half a standard
    deviation."""
    torch.manual_seed(0)
    gate = RateGate("null", 8)
    gate.calibrate(torch.randn(50_000))
    real = np.ones((8, 1024), bool)
    for shift in (0.0, 0.5):
        written = decide(gate, torch.randn(8, 1024) + shift, rate, int(4 / rate))
        assert abs(written.mean() / rate - 1) < 0.05, (rate, shift)
        assert int(tail_lengths(torch.from_numpy(written), torch.from_numpy(real)).max()) <= int(
            4 / rate
        )
    written = decide(gate, torch.full((1, 64), -100.0), 0.1, 9)
    assert written[0].nonzero()[0].tolist() == list(range(0, 64, 10)), "forced after max_tail NULLs"


def test_gate_without_score_is_a_fixed_stride():
    gate, x = RateGate("fixed", 8), torch.randn(2, 33, 8)
    score = gate.boundary.score(HEADS["nearest"](8, 5), x, x.roll(1, 1))
    written = decide(gate, score, 0.25, 16)
    assert written[1].nonzero()[0].tolist() == list(range(0, 33, 4))


def test_gate_goes_on_from_its_state():
    gate = RateGate("null", 8)
    scores, valid = torch.randn(3, 40), np.ones((3, 40), bool)
    whole = decide(gate, scores, 0.3, 8)
    first, state, _ = gate(scores[:, :13], valid[:, :13], 0.3, 8, GateState.start(3))
    second, _, _ = gate(scores[:, 13:], valid[:, 13:], 0.3, 8, state)
    assert (whole == np.concatenate([first, second], 1)).all()


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
    found, nearest = kmeans(
        points, 15, seed=1
    )  # three codes a cluster: no local optimum can miss one
    assert torch.cdist(centres, found).min(1).values.max() < 0.1
    assert len(nearest.unique()) == 15
    torch.testing.assert_close(
        assign(points, found)[1], (points - found[nearest]).square().sum(1), atol=1e-3, rtol=0
    )
    assert kmeans(points[:3], 5)[0].isfinite().all(), "fewer points than codes"
