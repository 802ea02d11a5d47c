"""Codebook, heads' code logits and quantisation: each stage against its definition."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sememe.concepts.codebook import ConceptEmbedding, start_from_states
from sememe.concepts.head import HEADS
from sememe.concepts.kmeans import assign
from sememe.concepts.quantise import quantise


def started(name: str = "joint", stages: int = 1, moved: float = 0.02):
    """(codes, head, normalised states, figures), started, and then moved a little so that nothing
    is at its starting point."""
    torch.manual_seed(0)
    codes, head = ConceptEmbedding(7, 8, stages), HEADS[name](8, 7, stages)
    states = 3 + 2 * torch.randn(500, 8)
    codes.start_frame(states)
    x = codes.normalise(states)
    figures = start_from_states(codes, head, x)
    with torch.no_grad():
        for p in (*codes.parameters(), *head.parameters()):
            p += moved * torch.randn_like(p)
    return codes, head, x, figures


@given(st.integers(2, 4096), st.integers(1, 4), st.integers(0, 2**48 - 1))
def test_ids_and_digits_are_inverse(k, stages, number):
    codes, number = ConceptEmbedding(k, 1, stages), number % k**stages
    digits = codes.digits(torch.tensor([[number]]))
    assert digits.tolist() == [[[number // k**g % k for g in range(stages)]]]
    assert codes.combine(digits).tolist() == [[number]]


@pytest.mark.parametrize("name", HEADS)
def test_head_starts_as_nearest_centroid_of_what_is_left(name):
    codes, head, x, figures = started(name, 3, moved=0.0)
    left, by_stage = x, []
    for g in range(3):
        nearest = assign(left, codes.table(g).detach())[0]
        assert torch.equal(head.code_logits(left, codes.table(g), g).argmax(-1), nearest)
        left = left - codes.table(g)[nearest].detach()
        by_stage.append(float(left.square().sum() / x.square().sum()))
    assert figures["variance_left_by_stage"] == pytest.approx(by_stage, rel=1e-4)
    assert figures["variance_left"] == pytest.approx(by_stage[2], rel=1e-4)
    assert 1 > by_stage[0] > by_stage[1] > by_stage[2]


@pytest.mark.parametrize("stages", [1, 3])
@pytest.mark.parametrize("name", HEADS)
def test_a_quantised_value_is_the_sum_of_codes_and_its_gradient_that_of_the_mixtures(name, stages):
    """Against a loop over states that spells the estimator out."""
    codes, head, x, _ = started(name, stages)
    slow_codes, slow_head = copy.deepcopy(codes), copy.deepcopy(head)
    fast_x, slow_x = x[:30].clone().requires_grad_(), x[:30].clone().requires_grad_()
    want = torch.randn(30, 8)

    quantised = quantise(codes, head, fast_x, temperature=0.7)
    plain = quantise(codes, head, fast_x, soft=False)
    assert torch.equal(quantised.state_nD, plain.state_nD) and plain.soft_nD is None
    assert torch.equal(codes.to_states(quantised.state_nD), codes(quantised.ids_n)), "exactly"
    (quantised.state_nD - want).square().sum().backward()

    total, entropies, sure = 0, [], []
    for x_D, want_D in zip(slow_x, want, strict=True):
        left, hard, soft = x_D, 0, 0
        for g in range(stages):
            table = slow_codes.weight[g]
            log_p = (slow_head.code_logits(left, table, g) / 0.7).log_softmax(-1)
            p = log_p.exp()
            hard, soft = hard + table[p.argmax()].detach(), soft + p @ table
            left = x_D - hard
            entropies.append(-(p * log_p).sum())
            sure.append(float(p.max()))
        total = total + (2 * (hard - want_D) * soft).sum()
    total.backward()

    fast = (fast_x, *codes.parameters(), *head.parameters())
    slow = (slow_x, *slow_codes.parameters(), *slow_head.parameters())
    for a, b in zip(fast, slow, strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-4, rtol=1e-3)  # of order 10
    assert float(quantised.entropy) == pytest.approx(float(sum(entropies)) / 30, abs=1e-4)
    assert float(quantised.max_prob) == pytest.approx(sum(sure) / len(sure), abs=1e-5)
