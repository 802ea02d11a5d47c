"""Codebook, heads' code logits and quantisation: each stage against its definition, and codes that
come back to life."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sememe.concepts.codebook import ConceptEmbedding, start_from_states
from sememe.concepts.head import HEADS
from sememe.concepts.kmeans import assign
from sememe.concepts.quantise import quantise, revive
from sememe.evaluation.quality import rate_and_codes

SETTINGS = [
    (head, stages, mapped)
    for head in HEADS
    for stages, mapped in ((1, False), (3, False), (2, True))
]


def started(
    head: str = "factored",
    stages: int = 1,
    mapped: bool = False,
    k: int = 7,
    width: int = 8,
    count: int = 500,
):
    """(codes, head, normalised states), started, and then moved a little so that nothing is at its
    starting point."""
    torch.manual_seed(0)
    codes, made = ConceptEmbedding(k, width, stages, mapped), HEADS[head](width, k, stages)
    states = 3 + 2 * torch.randn(count, width)
    codes.start_frame(states)
    start_from_states(codes, made, states)
    with torch.no_grad():
        for p in (*codes.parameters(), *made.parameters()):
            p += 0.02 * torch.randn_like(p)
    return codes, made, codes.normalise(states)


@given(st.integers(2, 4096), st.integers(1, 4), st.integers(0, 2**48 - 1))
def test_ids_and_digits_are_inverse(k, stages, number):
    codes, number = ConceptEmbedding(k, 1, stages), number % k**stages
    found = codes.digits(torch.tensor([[number]]))
    assert found.shape == (1, 1, stages) and int(found.min()) >= 0 and int(found.max()) < k
    assert found.flatten().tolist() == [number // k**g % k for g in range(stages)]
    assert codes.combine(found).tolist() == [[number]]


def test_use_is_that_of_the_digits():
    """Ids 0 and 15 + 16·3 as often as each other: one bit in each of two stages, and a sink and
    NULLs that are no codes."""
    ids = torch.tensor([[-2, 0, -1, 63, -1, 0, -1, 63]])
    found = rate_and_codes(ids, 16, 2)
    assert (
        found["concept_rate"] == 5 / 8
        and found["codes_used"] == 2
        and found["code_counts"] == [2, 2]
    )
    assert found["bits_per_concept"] == pytest.approx(2) and found[
        "code_perplexity_by_stage"
    ] == pytest.approx([2, 2])
    assert rate_and_codes(ids[:, :1], 16, 2)["bits_per_concept"] is None


@pytest.mark.parametrize("name", HEADS)
def test_head_starts_as_nearest_centroid_of_what_is_left(name):
    torch.manual_seed(0)
    codes, head, states = (
        ConceptEmbedding(7, 8, 3),
        HEADS[name](8, 7, 3),
        3 + 2 * torch.randn(500, 8),
    )
    codes.start_frame(states)
    found = start_from_states(codes, head, states)
    left, by_stage = codes.normalise(states), []
    for g in range(3):
        nearest = assign(left, codes.table(g).detach())[0]
        assert torch.equal(head.code_logits(left, codes.table(g), g).argmax(-1), nearest)
        left = left - codes.table(g)[nearest].detach()
        by_stage.append(float(left.square().sum() / codes.normalise(states).square().sum()))
    assert found["variance_left_by_stage"] == pytest.approx(by_stage, rel=1e-4)
    assert (
        1
        > by_stage[0]
        > by_stage[1]
        > by_stage[2]
        == pytest.approx(found["variance_left"], rel=1e-4)
    )


@pytest.mark.parametrize("name, stages, mapped", SETTINGS)
def test_quantised_value_is_the_sum_of_the_codes(name, stages, mapped):
    codes, head, x = started(name, stages, mapped)
    for settings in ({}, {"soft": False}, {"temperature": 0.7}, {"estimator": "identity"}):
        found = quantise(codes, head, x, **settings)
        assert torch.equal(found.state_nD, found.hard_nD), "exactly the chosen rows"
        assert torch.equal(codes.to_states(found.state_nD), codes(found.ids_n))
        assert (found.soft_nD is None) == (settings.get("soft") is False)


@pytest.mark.parametrize("name, stages, mapped", SETTINGS)
@pytest.mark.parametrize("usage, commitment", [(0.0, 0.0), (0.3, 0.2)])
def test_gradient_is_that_of_the_mixtures(name, stages, mapped, usage, commitment):
    """Against a loop over states that spells the estimator out."""
    codes, head, x = started(name, stages, mapped)
    slow_codes, slow_head = copy.deepcopy(codes), copy.deepcopy(head)
    fast_x, slow_x = x[:30].clone().requires_grad_(), x[:30].clone().requires_grad_()
    want = torch.randn(30, 8)

    found = quantise(codes, head, fast_x, temperature=0.7, usage=usage, commitment=commitment)
    loss = (found.state_nD - want).square().sum() + (0 if found.term is None else found.term)
    loss.backward()

    total, shares, entropies, sure = 0, [[] for _ in range(stages)], [], []
    for x_D, want_D in zip(slow_x, want, strict=True):
        left, hard, soft = x_D, 0, 0
        for g in range(stages):
            table = slow_codes.weight[g] @ slow_codes.map if mapped else slow_codes.weight[g]
            log_p = (slow_head.code_logits(left, table, g) / 0.7).log_softmax(-1)
            p = log_p.exp()
            hard, soft = hard + table[p.argmax()].detach(), soft + p @ table
            left = x_D - hard
            shares[g].append(p)
            entropies.append(-(p * log_p).sum())
            sure.append(float(p.max()))
        total = (
            total
            + (2 * (hard - want_D) * soft).sum()
            + commitment * (x_D - hard).square().mean() / 30
        )
    for p in shares:
        mean = torch.stack(p).mean(0).clamp(min=1e-12)
        total = total + usage * (mean * mean.log()).sum()
    (total + usage * sum(entropies) / 30).backward()

    torch.testing.assert_close(fast_x.grad, slow_x.grad, atol=1e-4, rtol=1e-3)
    for fast, slow in zip(
        [*codes.parameters(), *head.parameters()],
        [*slow_codes.parameters(), *slow_head.parameters()],
        strict=True,
    ):
        torch.testing.assert_close(
            fast.grad, slow.grad, atol=1e-4, rtol=1e-3
        )  # of order 10; rounding is 2e-5
    assert float(found.entropy) == pytest.approx(float(sum(entropies)) / 30, abs=1e-4)
    assert float(found.max_prob) == pytest.approx(sum(sure) / len(sure), abs=1e-5)


@pytest.mark.parametrize("name", HEADS)
def test_probabilities_are_kept_once_a_stage(name):
    codes, head, x = started(name, 2)
    kept = set()

    def pack(saved):
        if saved.numel() == 30 * 7:
            kept.add(saved.untyped_storage().data_ptr())
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        found = quantise(codes, head, x[:30].clone().requires_grad_(), temperature=0.7)
    assert found.state_nD.requires_grad and len(kept) == 2


def test_identity_passes_the_gradient_and_draws_the_codes():
    codes, head, x = started("nearest", 2)
    x = x[:30].clone().requires_grad_()
    found = quantise(codes, head, x, soft=False, estimator="identity", commitment=0.25)
    want = torch.randn(30, 8)
    (found.state_nD * want).sum().backward(retain_graph=True)
    assert torch.equal(x.grad, want) and codes.weight.grad is None
    x.grad = None
    found.term.backward()
    away = (x - found.hard_nD).detach()
    torch.testing.assert_close(found.term.detach(), 1.25 * away.square().mean())
    torch.testing.assert_close(x.grad, 0.25 * 2 * away / away.numel())
    digit = codes.digits(found.ids_n)
    for g in range(2):
        want_grad = torch.zeros(7, 8).index_add_(0, digit[:, g], -2 * away / away.numel())
        torch.testing.assert_close(codes.weight.grad[g], want_grad)


def test_no_states_give_no_codes_and_no_gradient():
    codes, head, x = started(stages=2)
    found = quantise(codes, head, x[:0].requires_grad_(), usage=1.0, commitment=1.0)
    assert found.ids_n.shape == (0,) and found.state_nD.shape == (0, 8)
    (found.term + found.state_nD.sum()).backward()
    assert abs(float(found.term)) < 1e-6 and all(not p.grad.any() for p in codes.parameters())


def test_folding_the_map_changes_nothing():
    codes, head, x = started(stages=2, mapped=True)
    before, count = quantise(codes, head, x, soft=False), len(codes.state_dict())
    codes.fold()
    after = quantise(codes, head, x, soft=False)
    assert torch.equal(after.ids_n, before.ids_n) and len(codes.state_dict()) == count - 1
    torch.testing.assert_close(after.state_nD, before.state_nD)


def test_use_fades_at_the_same_pace_in_small_and_large_steps():
    a, b = ConceptEmbedding(8, 2, 2), ConceptEmbedding(8, 2, 2)
    ids = torch.full((240,), a.combine(torch.tensor([3, 5])).item())
    a.count(ids)
    for part in ids.split(1):
        b.count(part)
    assert a.use[0, 0] == pytest.approx(float(b.use[0, 0]), rel=1e-4) and a.use[0, 0] < 1e-3
    assert a.use[0, 3] > 100 and a.use[1, 5] > 100
    assert b.use[0, 3] == pytest.approx(4 * 8, rel=0.05), "all of what it looks back on"


@pytest.mark.parametrize("name, stages, mapped", SETTINGS)
def test_revival_moves_dead_codes_alone(name, stages, mapped):
    codes, head, x = started(name, stages, mapped, k=16)
    with torch.no_grad():
        for g in range(stages):
            dead, far = (
                torch.tensor([2, 9]),
                torch.full((2, 8), 50.0),
            )  # from everything: no head writes them
            codes.set_rows(g, dead, far)
            head.start(g, far, torch.tensor(0.1), dead)
    head_before, before = (
        copy.deepcopy(head),
        [codes.table(g).detach().clone() for g in range(stages)],
    )
    codes.use.fill_(3.0)
    codes.use[:, [2, 9]] = 0.1
    moved = revive(codes, head, x, 0.5, torch.Generator().manual_seed(1))
    assert moved.nonzero().tolist() == [[g, k] for g in range(stages) for k in (2, 9)]
    assert (codes.use[:, [2, 9]] == 1).all() and not revive(
        codes, head, x, 0.5, torch.Generator()
    ).any()
    left = x
    for g in range(stages):
        table, kept = codes.table(g).detach(), ~moved[g]
        assert torch.equal(table[kept], before[g][kept])
        assert torch.cdist(table[moved[g]], left).min(1).values.max() < 5e-3, (
            "at states of this stage"
        )
        for now, was in zip(head.rows(g), head_before.rows(g), strict=True):
            same = (now == was)[:16].flatten(1).all(1) if now.dim() > 1 else (now == was)[:16]
            assert same.tolist() == kept.tolist()
        chosen = head.code_logits(left, table, g).argmax(-1)
        assert set(chosen.tolist()) >= {2, 9}, "they are written again"
        left = left - table[chosen]
