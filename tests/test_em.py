"""Hard EM: scores together = scores alone, what proposers propose, the search against enumeration,
its figures, first plans."""

import itertools
from functools import partial

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch.nn.functional import pad, rms_norm
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerFast

from families import text
from sememe.concepts.plan import PlanShape
from sememe.errors import CheckpointError, DataError, TrainingError
from sememe.keys import Em
from sememe.models.planner import em
from sememe.models.planner.em import best_of, e_step, score
from sememe.models.planner.first_plans import key_word_plans, piece_plans
from sememe.models.planner.proposers import PROPOSERS, PairBatch, swap_gains
from sememe.pairs import PairTensors
from test_planner import CLOSE, FEW, SHAPE, every_plan, plans, seeded, target_log_prob, tiny_planner


def pairs_of(y: torch.Tensor) -> PairTensors:
    """Targets with sources that do not matter."""
    return PairTensors(text(len(y), 3), torch.ones(len(y), 3, dtype=torch.long), y)


def pairs(count: int) -> PairTensors:
    """Sources and targets of different lengths."""
    u, y, mask = text(count, 7), text(count, 8, 1), torch.ones(count, 7, dtype=torch.long)
    for i in range(count):
        mask[i, : i % 5] = 0
        y[i, 8 - i % 3 :] = -100
    return PairTensors(u * mask, mask, y)


@pytest.mark.parametrize("parallel, at_once", [(False, None), (True, None), (False, 1)])
@torch.no_grad()
def test_scores_together_are_scores_alone(parallel, at_once, monkeypatch):
    if at_once:
        monkeypatch.setattr(em, "TOKENS_AT_ONCE", at_once)
    model = tiny_planner(parallel=parallel)
    batch = PairBatch.of(model, pairs(3))
    cached = batch.context.cache.get_seq_length()
    plan = torch.stack([plans(4), plans(4, seed=1), plans(4, seed=2)])
    plan[1, 3], plan[2, 2] = plan[1, 0], plan[2, 1]  # equal plans are scored once
    scores = score(model, batch, plan, 0.5)
    for b, n in itertools.product(range(3), range(4)):
        z = plan[b, n : n + 1]
        target = target_log_prob(model, z, batch.target_BY[b : b + 1])
        own = model.plan_log_prob(z, batch.context.pick(torch.tensor([b])))
        again = -torch.inf if (b, n) in ((1, 3), (2, 2)) else 0.0
        want = torch.cat([target + 0.5 * own, target, own]) + again
        torch.testing.assert_close(scores[:, b, n], want, **CLOSE)
    assert batch.context.cache.get_seq_length() == cached
    with pytest.raises(CheckpointError, match="need ids"):
        score(model, batch, plan + 9)


@pytest.mark.parametrize("name", PROPOSERS)
@pytest.mark.parametrize("parallel", [False, True])
def test_candidates_are_plans_and_the_generator_alone_decides(name, parallel):
    model, present = tiny_planner(parallel=parallel), plans(3)
    batch, propose = PairBatch.of(model, pairs(3)), PROPOSERS[name]
    a, b, c = (propose(model, batch, present, 5, seeded(seed)) for seed in (0, 0, 1))
    assert a.shape == (3, 5, 9) and SHAPE.check(a.flatten(0, 1)) is not None
    assert torch.equal(a, b) and torch.equal(a, c) == (name not in ("sample", "edit"))
    assert len(a[0].unique(dim=0)) > 2


def test_edits_are_one_or_two_changes_of_every_kind():
    rows = [[[1, 2, 3], [4], []], [[], [], []]]
    present = SHAPE.pack(rows)
    edited_BnP = PROPOSERS["edit"](tiny_planner(), None, present, 600, seeded())
    assert not (edited_BnP == present[:, None]).all(2).any(), "never itself"
    edited, added = (SHAPE.unpack(edited_nP) for edited_nP in edited_BnP)
    lengths = {tuple(map(len, x)) for x in edited}
    assert {(3, 1, 0), (2, 1, 0), (3, 0, 0), (3, 2, 0), (3, 1, 1)} < lengths
    assert {abs(sum(n) - 4) for n in lengths} == {0, 1, 2}
    assert {(3, 2, 1), (1, 3, 2), (2, 1, 3)} < {tuple(x[0]) for x in edited}, "exchanges"
    assert {x[2][0] for x in added if x[2]} == set(range(9)), "every id may be put in"


def test_gradient_says_what_a_small_step_towards_another_concept_brings():
    model, plan, y = tiny_planner(), plans(3), pairs(3).target_NY
    gain = swap_gains(model, plan, y)
    assert all(p.grad is None for p in model.parameters())
    some = torch.isfinite(gain).nonzero()[::17].tolist()
    assert len(some) > 4
    for b, p, k in some:
        other = plan.clone()
        other[b, p] = k
        e, step = model.plans(plan), 0.01 * (model.plans(other) - model.plans(plan))
        towards, away = (target_log_prob(model, plan, y, x)[b] for x in (e + step, e - step))
        slope = float(towards - away) / 0.02
        assert abs(slope - gain[b, p, k]) < 0.02 + 0.05 * abs(slope), "curvature: 0.006 seen"
    propose = partial(PROPOSERS["gradient"], model, PairBatch(y, None))
    for b, made in enumerate(propose(plan, 4, None)):
        best = [divmod(i, 10) for i in gain[b].flatten().topk(4).indices.tolist()]
        assert (made != plan[b]).sum(1).tolist() == [1] * 4
        assert [int(z[p]) for z, (p, _) in zip(made, best, strict=True)] == [k for _, k in best]
    empty = SHAPE.pack([[[], [], []]] * 3)
    assert torch.equal(propose(empty, 90, None)[:, 7], empty), "nothing to replace"


def test_the_search_finds_the_best_of_all_plans():
    model, some, everything = tiny_planner(shape=FEW), pairs(3), every_plan(FEW)
    total = score(model, PairBatch.of(model, some), everything.expand(3, -1, -1), 0.7)[0]
    top, index = total.topk(2, dim=1)
    plan_NP = everything[:3].int()
    options = Em(proposers={"beam": len(everything)}, batch=2, planner_weight=0.7)
    figures = e_step(model, some, plan_NP, torch.arange(3), options, 0)
    assert torch.equal(plan_NP.long(), everything[index[:, 0]])
    assert figures["em_score"] == pytest.approx(float(top[:, 0].mean()), abs=1e-4)
    assert figures["em_margin"] == pytest.approx(float((top[:, 0] - top[:, 1]).mean()), abs=1e-4)
    total = figures["em_target"] + 0.7 * figures["em_plan"]
    assert figures["em_score"] == pytest.approx(total, abs=1e-4)
    assert figures["em_candidates"] == len(everything) and figures["em_by_beam"] == 1.0


def test_steps_climb_to_the_best_plan_and_never_fall():
    model, some = tiny_planner(shape=PlanShape((4, 3), (1, 1))), pairs(5)
    proposers = {"edit": 4, "gradient": 4, "sample": 2, "diverse": 2}
    batch, everything = PairBatch.of(model, some), every_plan(model.plans.shape).expand(5, -1, -1)
    best, options = score(model, batch, everything)[0].amax(1), Em(proposers=proposers, batch=2)
    plan_NP = everything[:, 0].int().clone()
    before = score(model, batch, plan_NP.long().unsqueeze(1))[0, :, 0]
    for number in range(6):
        figures = e_step(model, some, plan_NP, torch.arange(5), options, number)
        now = score(model, batch, plan_NP.long().unsqueeze(1))[0, :, 0]
        assert (now >= before - 1e-4).all(), "5e-5 is what batching alone changes"
        assert figures["em_staleness"] == pytest.approx(float((now - before).mean()), abs=1e-4)
        before = now
    torch.testing.assert_close(before, best, **CLOSE)
    assert figures["em_flips"] == 0 == figures["em_staleness"] and "em_by_edit" not in figures


def test_only_the_pairs_asked_for_are_searched_and_draws_depend_on_the_generator():
    model, some, index = tiny_planner(), pairs(7), torch.tensor([5, 0, 3, 6, 1])
    options = Em(proposers={"sample": 3, "edit": 3, "beam": 2}, batch=2)
    ticks, figures, first = [], [], plans(7).int()
    z = [first.clone() for _ in range(3)]
    for plan_NP, seed in zip(z, (3, 3, 4), strict=True):
        figures.append(e_step(model, some, plan_NP, index, options, seed, ticks.append))
    assert ticks == [2, 2, 1] * 3
    assert figures[0] == figures[1] != figures[2] and torch.equal(z[0], z[1])
    changed = (z[0] != first).any(1).nonzero().flatten().tolist()
    assert changed and set(changed) <= set(index.tolist())


def test_the_best_is_kept_on_a_tie_and_figures_are_what_they_say():
    shape = PlanShape((9,), (3,))
    rows = (
        ([1, 2], [3], [1, 2], [1, 2, 3]),  # a tie of the present plan and another: it stays
        ([1, 2, 3], [2, 3, 4], [7], [7]),  # better by 2, edited twice; the rival's copies are one
        ([4], [4], [4], [4]),  # nothing else was proposed
    )
    plan = torch.stack([shape.pack([[ids] for ids in row]) for row in rows])
    nan, no = torch.nan, -torch.inf
    total = torch.tensor([[-1, -1, no, -9], [-5, -3, -4, no], [-6, no, no, no]])
    scores = torch.stack([total, total - 1, total + 1])
    best, figures = best_of(plan, scores, [None, "beam", "edit", "edit"])
    assert shape.unpack(best) == [[[1, 2]], [[2, 3, 4]], [[4]]]
    for name, want in {
        "margin": [0, 1, nan],
        "flips": [0, 1, 0],
        "staleness": [0, 2, 0],
        "candidates": [3, 3, 1],
        "by_beam": [nan, 1, nan],
        "by_edit": [nan, 0, nan],
    }.items():
        want = torch.tensor(want, dtype=torch.float)
        torch.testing.assert_close(figures[f"em_{name}"], want, equal_nan=True, msg=name)


def test_a_score_that_is_no_number_stops_the_step():
    model, plan_NP = tiny_planner(), plans(3).int()
    with torch.no_grad():
        model.plans.separator.fill_(torch.nan)
    with pytest.raises(TrainingError, match="not finite"):
        e_step(model, pairs(3), plan_NP, torch.arange(3), Em(proposers={"edit": 1}), 0)
    assert torch.equal(plan_NP, plans(3).int())


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3_text"])
def test_equal_texts_start_with_equal_plans_and_other_kinds_with_others(family):
    """Three kinds of text, each over words of its own: the pieces' kinds are told apart."""
    shape = PlanShape((7, 8), (1, 4))  # with no id to spare k-means may put two kinds together
    model, kind = tiny_planner(family, shape=shape), torch.arange(12) % 3
    # To a random base all words are alike.
    y = torch.randint(2, (12, 16), generator=seeded()) + 5 + 30 * kind[:, None]
    y[9:] = y[:3]
    before = {n: p.clone() for n, p in model.named_parameters()}
    plan = piece_plans(model, pairs_of(y), seed=1)
    assert torch.equal(plan, piece_plans(model, pairs_of(y), seed=1))
    assert torch.equal(plan[9:], plan[:3]) and (shape.counts(plan) == torch.tensor([1, 4])).all()
    for ids in plan.split(shape.lengths, 1):
        used = [set(ids[kind == k].flatten().tolist()) for k in range(3)]
        assert len(set.union(*used)) == sum(map(len, used))
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == {"plans.weight"}


def test_key_words_are_the_rarest_in_their_order_and_begin_as_their_embeddings():
    rows = [[0, 1, 2, 5, 7], [0, 4, 1, 5], [3, 4, 0, 6, 5], [6, 0, 3, 2, 5], [0, 1, 5]]
    words = ["the", "cat", "sat", "dog", "runs", ".", "123", "bird"]
    of_words = Tokenizer(WordLevel({word: n for n, word in enumerate(words)}))
    of_words.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=of_words)
    y = pad_sequence([torch.tensor(ids) for ids in rows], True, -100)
    model = tiny_planner(shape=PlanShape((2, 8), (1, 2)))
    before = model.plans.weight.clone()
    plan = model.plans.shape.unpack(key_word_plans(model, pairs_of(y), tokenizer))
    # By texts · rarity²: 123 and dog (type 0), runs, sat, cat, and "the", which is everywhere;
    # "bird" stands in one text alone.
    assert plan == [[[], [2, 1]], [[], [0, 2]], [[1], [0, 3]], [[0], [3, 1]], [[], [3, 2]]]
    for i, words in enumerate(([6, 3], [4, 2, 1, 0])):
        want = model.plans.to_frame(model.get_input_embeddings().weight[words])
        before[model.plans.row_IM[i, : len(words)]] = rms_norm(want, want.shape[-1:], eps=1e-6)
    torch.testing.assert_close(model.plans.weight, before)
    with pytest.raises(DataError, match=r"type 1 of .* gets none.*try: more pairs"):
        key_word_plans(model, pairs_of(torch.tensor([[0, 1], [1, 0]])), tokenizer)


def test_short_texts_have_fewer_concepts_and_few_texts_fewer_ids():
    model, y = tiny_planner(), text(4, 8)
    y[1, 3:] = y[2, 1:] = -100
    plan = piece_plans(model, pairs_of(y))
    assert SHAPE.counts(plan).tolist() == [[3, 2, 4], [3, 2, 3], [1, 1, 1], [3, 2, 4]]
    wide = pairs_of(pad(y, (0, 5), value=-100))
    assert torch.equal(piece_plans(model, wide), plan), "padding is no text"
    model, y = tiny_planner(), text(2, 6)
    plan = piece_plans(model, pairs_of(y))
    assert plan[:, 3:5].unique().tolist() == [0, 1, 2, 3], "four pieces, four of five ids"
    for same in (y[:1].expand(2, -1), y[:1]):
        with pytest.raises(DataError, match="1 different targets"):
            piece_plans(tiny_planner(shape=PlanShape((4,), (1,))), pairs_of(same))
