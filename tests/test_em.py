"""Hard EM: scores together = scores alone, what proposers propose, the search against enumeration,
its figures, first plans."""

import itertools
import math

import pytest
import torch

from families import text
from sememe.concepts.plan import NULL, PlanShape
from sememe.errors import CheckpointError, DataError, RecipeError, TrainingError
from sememe.pairs import PairTensors
from sememe.training.em import score as scoring
from sememe.training.em import start as starting
from sememe.training.em.propose import PROPOSERS, Batch, edit, swap_gains
from sememe.training.em.score import Scores, score
from sememe.training.em.start import start_plans
from sememe.training.em.step import EStep, best_of, distance
from sememe.training.em.store import Assignments
from sememe.training.em.words import word_plans
from test_planner import CLOSE, SEARCHED, SHAPE, every_plan, plans, tiny_planner

SMALL = PlanShape((4, 3), (1, 1))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pairs(count: int = 6, length: int = 8, seed: int = 0) -> PairTensors:
    """Sources and targets of different lengths."""
    u, y, mask = (
        text(count, 7, seed),
        text(count, length, seed + 1),
        torch.ones(count, 7, dtype=torch.long),
    )
    for i in range(count):
        mask[i, : i % 5] = 0
        y[i, length - i % 3 :] = -100
    return PairTensors(u * mask, mask, y)


def batch_of(model, some: PairTensors) -> Batch:
    return Batch(
        some.source_NU,
        some.source_mask_NU,
        some.target_NY,
        model.read_source(some.source_NU, some.source_mask_NU),
    )


def store_of(folder, some: PairTensors, shape: PlanShape = SHAPE) -> Assignments:
    return Assignments.open(folder, shape, len(some), some.digest())


# ---- scores ----


@pytest.mark.parametrize("parallel, at_once", [(False, None), (True, None), (False, 1)])
def test_scores_together_are_scores_alone(parallel, at_once, monkeypatch):
    if at_once:
        monkeypatch.setattr(scoring, "TOKENS_AT_ONCE", at_once)
        monkeypatch.setattr(scoring, "CACHE_AT_ONCE", at_once)
    model, some = tiny_planner(parallel=parallel), pairs(3)
    plan = torch.stack([plans(4), plans(4, seed=1), plans(4, seed=2)])
    plan[1, 3], plan[2, 2] = plan[1, 0], plan[2, 1]
    u, mask, y = some.source_NU, some.source_mask_NU, some.target_NY
    s = score(model, u, mask, y, plan, price=0.5)
    with torch.no_grad():
        for b, n in itertools.product(range(3), range(4)):
            z, row = plan[b, n : n + 1], slice(b, b + 1)
            target, own = (
                model.target_log_prob(z, y[row]),
                model.plan_log_prob(u[row], mask[row], z),
            )
            want = torch.cat([target + 0.5 * own, target, own])
            torch.testing.assert_close(torch.stack([x[b, n] for x in s[:3]]), want, **CLOSE)
    assert (
        s.which[1, 3] == s.which[1, 0]
        and s.total[1, 3] == s.total[1, 0]
        and (
            s.first()
            == torch.tensor([[True] * 4, [True, True, True, False], [True, True, False, True]])
        ).all()
    ), "equal plans are scored once"
    read = model.read_source(u, mask)
    cached = read.cache.get_seq_length()
    again = score(model, u, mask, y, plan, read, 0.5)
    assert (
        all(torch.equal(a, b) for a, b in zip(s, again, strict=True))
        and read.cache.get_seq_length() == cached
    )
    with pytest.raises(CheckpointError, match="need ids"):
        score(model, u, mask, y, plan + 9)


# ---- proposers ----


@pytest.mark.parametrize("name", PROPOSERS)
@pytest.mark.parametrize("parallel", [False, True])
def test_candidates_are_plans_and_the_generator_alone_decides(name, parallel):
    model, incumbent = tiny_planner(parallel=parallel), plans(3)
    batch, proposer = batch_of(model, pairs(3)), PROPOSERS[name]()
    made = [proposer.propose(model, batch, incumbent, 5, seeded(seed)) for seed in (0, 0, 1)]
    assert made[0].shape == (3, 5, 9) and torch.equal(
        SHAPE.check(made[0].flatten(0, 1)).view(3, 5, 9), made[0]
    )
    assert torch.equal(made[0], made[1]) and torch.equal(made[0], made[2]) == (
        name not in ("sample", "edit")
    )
    assert proposer.propose(model, batch, incumbent, 1, seeded()).shape == (3, 1, 9)
    assert len(made[0][0].unique(dim=0)) > 2


def test_edits_are_one_or_two_changes_of_every_kind():
    model, incumbent = (
        tiny_planner(),
        torch.cat([plans(3), SHAPE.pack([[[], [], []], [[1, 1, 1], [0, 4], [1, 2, 3, 4]]])]),
    )
    made = PROPOSERS["edit"]().propose(model, None, incumbent, 60, seeded())
    far = [
        {distance(a, b) for b in SHAPE.unpack(row)}
        for a, row in zip(SHAPE.unpack(incumbent), made, strict=True)
    ]
    # An exchange of two ids is two changes by Levenshtein.
    assert all(min(x) == 1 and 2 <= max(x) <= 4 for x in far) and far[3] == {1, 2}
    row = [[1, 2, 3], [4], []]
    once = [edit(SHAPE, row, seeded(seed)) for seed in range(300)]
    assert all(x != row and SHAPE.pack([x]) is not None for x in once) and row == [
        [1, 2, 3],
        [4],
        [],
    ]
    assert {tuple(map(len, x)) for x in once} == {
        (3, 1, 0),
        (2, 1, 0),
        (3, 0, 0),
        (3, 2, 0),
        (3, 1, 1),
    }
    assert {(3, 2, 1), (1, 3, 2), (2, 1, 3)} < {tuple(x[0]) for x in once} and {
        x[2][0] for x in once if x[2]
    } == set(range(9))


def test_gradient_says_what_a_small_step_towards_another_concept_brings():
    model, plan, y = tiny_planner(), plans(3), pairs(3).target_NY
    gain = swap_gains(model, plan, y)
    assert (
        gain.shape == (3, 9, 9)
        and (gain[plan == NULL] == -torch.inf).all()
        and (gain[:, 3:5, 5:] == -torch.inf).all()
    )
    assert all(p.grad is None for p in model.parameters())
    with torch.no_grad():
        e, seen = model.plan_embeddings(plan), 0
        for b, p, k in torch.isfinite(gain).nonzero()[::17].tolist():
            other = plan.clone()
            other[b, p] = k
            towards = e + 0.01 * (model.plan_embeddings(other) - e)
            away = e - 0.01 * (model.plan_embeddings(other) - e)
            got = (model.target_log_prob(plan, y, towards) - model.target_log_prob(plan, y, away))[
                b
            ] / 0.02
            assert abs(float(got - gain[b, p, k])) < 0.02 + 0.05 * abs(float(got)), (
                "curvature and fp32: 0.006 seen"
            )
            seen += 1
    assert seen > 4
    made = PROPOSERS["gradient"]().propose(model, Batch(None, None, y, None), plan, 4, None)
    for b in range(3):
        best = gain[b].flatten().topk(4).indices.tolist()
        assert [
            [int((z != plan[b]).sum()), int(z[i // 9])] for z, i in zip(made[b], best, strict=True)
        ] == [[1, i % 9] for i in best]
    empty = SHAPE.pack([[[], [], []]] * 3)
    assert torch.equal(
        PROPOSERS["gradient"]().propose(model, Batch(None, None, y, None), empty, 90, None)[:, 7],
        empty,
    )


# ---- the step ----


def test_the_search_finds_the_best_of_all_plans(tmp_path):
    model, some, everything = tiny_planner(shape=SEARCHED), pairs(3), every_plan(SEARCHED)
    count = len(everything)
    all_of = score(
        model,
        some.source_NU,
        some.source_mask_NU,
        some.target_NY,
        everything.expand(3, -1, -1),
        price=0.7,
    )
    top, index = all_of.total.topk(2, dim=1)
    store = store_of(tmp_path, some, SEARCHED)
    store.write(torch.arange(3), everything[:3])
    said = EStep({"beam": count}, batch=2, price=0.7).run(
        model, some, store, torch.arange(3), seeded()
    )
    assert torch.equal(store.read(torch.arange(3)), everything[index[:, 0]])
    found = store.scores(torch.arange(3))
    torch.testing.assert_close(found[:, 0], top[:, 0], **CLOSE)
    torch.testing.assert_close(found[:, 3], top[:, 0] - top[:, 1], **CLOSE)
    torch.testing.assert_close(found[:, 1] + 0.7 * found[:, 2], found[:, 0], **CLOSE)
    assert said["em_candidates"] == count and said["em_by_beam"] == 1.0 and said["em_margin"] >= 0
    entropy = torch.distributions.Categorical(logits=all_of.total).entropy().mean()
    assert said["em_entropy"] == pytest.approx(float(entropy), abs=1e-4)


@pytest.mark.parametrize(
    "proposers", [{"edit": 12}, {"edit": 4, "gradient": 4, "sample": 2, "diverse": 2}]
)
def test_steps_climb_to_the_best_plan_and_never_fall(tmp_path, proposers):
    model, some, index = tiny_planner(shape=SMALL).train(), pairs(5), torch.arange(5)
    everything = every_plan(SMALL).expand(5, -1, -1)
    best = score(
        model.eval(), some.source_NU, some.source_mask_NU, some.target_NY, everything
    ).total.amax(1)
    store, before = store_of(tmp_path, some, SMALL), torch.full((5,), -torch.inf)
    step = EStep(proposers, batch=2)
    for number in range(6):
        said = step.run(model.train(), some, store, index, seeded(number))
        now = store.scores(index)[:, 0]
        assert model.training and (now >= before - 1e-4).all(), (
            "5e-5 is what batching alone changes"
        )
        if number:
            assert said["em_staleness"] == pytest.approx(float((now - before).mean()), abs=1e-4)
        before = now
    torch.testing.assert_close(before, best, **CLOSE)
    assert (
        said["em_flips"] == 0
        and "em_edits" not in said
        and said["em_staleness"] == 0
        and store.version == 6
    )


def test_an_interrupted_step_ends_as_if_it_had_not_been(tmp_path):
    model, some, index = tiny_planner(), pairs(7), torch.tensor([5, 0, 3, 6, 1])
    step, ticks = EStep({"sample": 3, "edit": 3, "beam": 2}, batch=2), []

    def stop(done: int) -> None:
        ticks.append(done)
        if len(ticks) in (1, 3):
            raise KeyboardInterrupt

    whole, cut = store_of(tmp_path / "whole", some), store_of(tmp_path / "cut", some)
    for store in (whole, cut):
        store.write(torch.arange(4), plans(4))
    want = step.run(model, some, whole, index, seeded(3))
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            step.run(model, some, cut, index, seeded(3), stop)
        cut = store_of(tmp_path / "cut", some)
        assert cut.version == 0
    real, searched = EStep.search, []

    def search(self, model, rows, *rest):
        searched.append(len(rows))
        return real(self, model, rows, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(EStep, "search", search)
        got = step.run(model, some, cut, index, seeded(3), ticks.append)
    assert (
        searched == [1]
        and ticks == [2, 2, 2, 2, 2, 1]
        and got == want
        and cut.version == whole.version == 1
    )
    for name in ("plans", "scores", "moves", "steps"):
        assert (tmp_path / "cut" / f"{name}.bin").read_bytes() == (
            tmp_path / "whole" / f"{name}.bin"
        ).read_bytes()
    assert cut.assigned(torch.arange(7)).tolist() == [True] * 4 + [False, True, True]
    assert want["em_examples"] == 5 and not torch.equal(plans(7)[index], cut.read(index))
    again = store_of(tmp_path / "again", some)
    again.write(torch.arange(4), plans(4))
    assert step.run(model, some, again, index, seeded(4)) != want


def test_the_best_is_kept_on_a_tie_and_figures_are_what_they_say(tmp_path):
    shape = PlanShape((9,), (3,))
    plan = torch.stack(
        [
            shape.pack([[ids] for ids in row])
            for row in (
                ([1, 2], [3], [1, 2], [1, 2, 3]),  # a tie of incumbent and another: it stays
                (
                    [1, 2, 3],
                    [2, 3, 4],
                    [7],
                    [7],
                ),  # better by 2, edited twice; the rival's copies are one
                ([5], [], [5], [5]),  # had no incumbent
                ([4], [4], [4], [4]),  # nothing else was proposed
            )
        ]
    )
    which = torch.tensor([[0, 1, 0, 2], [3, 4, 5, 5], [6, 7, 6, 6], [8, 8, 8, 8]])
    total = torch.tensor(
        [[-1.0, -1, -1, -9], [-5.0, -3, -4, -4], [-2.0, -1, -2, -2], [-6.0, -6, -6, -6]]
    )
    s = Scores(total, total - 1, torch.ones_like(total), which)
    found = best_of(
        shape, plan, s, torch.tensor([0, 1, 4, 4]), torch.tensor([True, True, False, True])
    )
    assert shape.unpack(found[0]) == [[[1, 2]], [[2, 3, 4]], [[]], [[4]]]
    nan = math.nan
    assert found[1].nan_to_num(7).tolist() == [
        [-1, -2, 1, 0],
        [-3, -4, 1, 1],
        [-1, -2, 1, 1],
        [-6, -7, 1, 7],
    ]
    edits, gain, _, candidates, proposer = found[2].unbind(1)
    for column, want in (
        (edits, [0, 2, nan, 0]),
        (gain, [0, 2, nan, 0]),
        (candidates, [3, 3, 2, 1]),
        (proposer, [0, 1, nan, 0]),
    ):
        torch.testing.assert_close(column, torch.tensor(want, dtype=torch.float), equal_nan=True)
    entropy = [
        torch.distributions.Categorical(logits=torch.tensor(x)).entropy()
        for x in ([-1.0, -1, -9], [-5.0, -3, -4], [-2.0, -1], [0.0])
    ]
    torch.testing.assert_close(found[2][:, 2], torch.stack(entropy), **CLOSE)
    model, some = tiny_planner(shape=shape), pairs(6)
    store = store_of(tmp_path, some, shape)
    store.write(torch.tensor([0, 1, 3]), plan[[0, 1, 3], 0])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(EStep, "search", lambda self, *rest: found)
        said = EStep({"beam": 1}).run(model, some, store, torch.arange(4), seeded())
    assert said == pytest.approx(
        {
            "em_score": -11 / 4,
            "em_target": -15 / 4,
            "em_plan": 1,
            "em_margin": 2 / 3,
            "em_flips": 1 / 3,
            "em_edits": 2,
            "em_by_beam": 1,
            "em_staleness": 2 / 3,
            "em_entropy": float(torch.stack(entropy).mean()),
            "em_candidates": 9 / 4,
            "em_examples": 4,
        }
    )
    assert (
        distance([[1, 2, 3], []], [[2, 3], [4]]) == 2
        and distance([[1, 2]], [[2, 1]]) == 2
        and distance([[]], [[]]) == 0
    )


@pytest.mark.parametrize(
    "wrong, match",
    [
        ({"proposers": {"beams": 4}}, "names beams: need some of beam"),
        ({"proposers": {"edit": 0}}, "one candidate"),
        ({"proposers": {"edit": 4, "beam": -1}}, "counts from 0"),
        ({"batch": 0}, "at least 1"),
        ({"price": -0.1}, "at least 0"),
    ],
)
def test_searches_that_cannot_be_are_one_sentence(wrong, match):
    with pytest.raises(RecipeError, match=match):
        EStep(**wrong)


def test_a_score_that_is_no_number_stops_the_step(tmp_path):
    model, some = tiny_planner(), pairs(3)
    with torch.no_grad():
        model.plans.separator.fill_(torch.nan)
    store = store_of(tmp_path, some)
    store.write(torch.arange(3), plans(3))
    with pytest.raises(TrainingError, match="not finite"):
        EStep({"edit": 1}).run(model, some, store, torch.arange(3), seeded())
    assert (
        store.version == 0
        and not store.searched(torch.arange(3)).any()
        and torch.equal(store.read(torch.arange(3)), plans(3))
    )


# ---- first plans ----


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3_text"])
def test_equal_texts_start_with_equal_plans_and_other_kinds_with_others(family):
    """Three kinds of text, each over words of its own: the pieces' kinds are told apart, the tables
    hold their centroids."""
    shape = PlanShape((7, 8), (1, 4))  # with no id to spare k-means may put two kinds together
    model, kind = tiny_planner(family, shape=shape), torch.arange(12) % 3
    y = (
        torch.randint(2, (12, 16), generator=seeded()) + 5 + 30 * kind[:, None]
    )  # to a random base all words are alike
    y[9:] = y[:3]
    some = PairTensors(text(12, 3), torch.ones(12, 3, dtype=torch.long), y)
    before = {n: p.clone() for n, p in model.named_parameters()}
    plan = start_plans(model.train(), some, shape, seed=1)
    assert model.training and torch.equal(plan, start_plans(model, some, shape, seed=1))
    assert torch.equal(plan[9:], plan[:3]) and (shape.counts(plan) == torch.tensor([1, 4])).all()
    for i in range(2):
        used = [set(shape.of_type(plan[kind == k], i).flatten().tolist()) for k in range(3)]
        assert not (used[0] & used[1] or used[0] & used[2] or used[1] & used[2])
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == {"plans.types.0.weight", "plans.types.1.weight"}
    for one in model.plans.types:
        torch.testing.assert_close(one.weight.square().mean(1), torch.ones(len(one.weight)))
        assert len(one.weight.round(decimals=3).unique(dim=0)) == len(one.weight)


def test_key_words_are_the_rarest_in_their_order_and_begin_as_their_embeddings():
    pieces = ["Ġthe", "Ġcat", "Ġsat", "▁dog", "Ġru", "ns", ".", "Ġ12", "3", "Ġbird"]
    rows = [[0, 1, 2, 6, 9], [0, 4, 5, 1, 6], [3, 4, 5, 0, 7, 8, 6], [7, 8, 0, 3, 2, 6], [0, 1, 6]]
    y = torch.full((5, 8), -100)
    for row, ids in enumerate(rows):
        y[row, : len(ids)] = torch.tensor(ids)
    shape = PlanShape((2, 8), (1, 2))
    model, some = (
        tiny_planner(shape=shape),
        PairTensors(text(5, 3), torch.ones(5, 3, dtype=torch.long), y),
    )
    before = [one.weight.clone() for one in model.plans.types]
    plan = shape.unpack(word_plans(model, some, pieces))
    # By texts · news²: 123 and dog (type 0), runs, sat, cat, and "the", which is everywhere; "bird"
    # stands in one text alone.
    assert plan == [[[], [2, 1]], [[], [0, 2]], [[1], [0, 3]], [[0], [3, 1]], [[], [3, 2]]]
    for i, words in enumerate(([[7, 8], [3]], [[4, 5], [2], [1], [0]])):
        want = torch.stack(
            [model.get_input_embeddings().weight[torch.tensor(ids)].mean(0) for ids in words]
        )
        want = torch.nn.functional.rms_norm(
            (want - model.plans.mean) / model.plans.scale, want.shape[-1:], eps=1e-6
        )
        torch.testing.assert_close(model.plans.types[i].weight[: len(words)], want)
        assert torch.equal(model.plans.types[i].weight[len(words) :], before[i][len(words) :])


def test_too_few_words_are_refused_in_a_sentence():
    model = tiny_planner(shape=PlanShape((2, 8), (1, 2)))
    some = PairTensors(
        text(2, 3), torch.ones(2, 3, dtype=torch.long), torch.tensor([[0, 1], [1, 0]])
    )
    with pytest.raises(DataError, match=r"type 1 of .* gets none.*try: more pairs"):
        word_plans(model, some, ["Ġa", "Ġb"])


def test_short_texts_have_fewer_concepts_and_pieces_are_of_the_text_alone():
    model, y = tiny_planner(shape=SHAPE), text(4, 8)
    y[1, 3:], y[2, 1:] = -100, -100
    wide = torch.nn.functional.pad(y, (0, 5), value=-100)
    sides = text(4, 3), torch.ones(4, 3, dtype=torch.long)
    plan = start_plans(model, PairTensors(*sides, y), SHAPE)
    assert SHAPE.counts(plan).tolist() == [[3, 2, 4], [3, 2, 3], [1, 1, 1], [3, 2, 4]]
    assert torch.equal(start_plans(model, PairTensors(*sides, wide), SHAPE), plan), (
        "padding is no text"
    )
    h = torch.arange(10.0).view(1, 10, 1)
    mean, there = starting._pieces(h, torch.tensor([7]), 3)
    assert mean.flatten().tolist() == [1, 3.5, 5.5] and there.all(), "0 1 2 · 3 4 · 5 6"
    mean, there = starting._pieces(h, torch.tensor([2]), 3)
    assert mean.flatten()[:2].tolist() == [0, 1] and there.tolist() == [[True, True, False]]


def test_more_texts_than_are_looked_at_get_the_nearest_centroid(monkeypatch):
    """What k-means never saw is assigned by the same rule; a text that it saw as well gets the same
    plan either way."""
    shape, y = PlanShape((2, 3), (1, 2)), text(40, 8)
    model, some = (
        tiny_planner(shape=shape),
        PairTensors(text(40, 3), torch.ones(40, 3, dtype=torch.long), y),
    )
    monkeypatch.setattr(starting, "TOKENS_AT_ONCE", 40)
    monkeypatch.setattr(starting, "POINTS", 4)
    plan, seen = start_plans(model, some, shape), []
    real = starting._nearest
    monkeypatch.setattr(
        starting,
        "_nearest",
        lambda pieces, frames: (seen.append((pieces, frames)), real(pieces, frames))[1],
    )
    assert torch.equal(start_plans(model, some, shape), plan) and len(seen) == 1 + (40 - 8 + 3) // 4
    with monkeypatch.context() as patch:
        patch.setattr(starting, "kmeans", lambda x, k, seed: (seen[0][1][k - 2][2], None))
        patch.setattr(starting, "POINTS", 256)
        patch.setattr(starting, "_nearest", lambda pieces, frames: real(pieces, seen[0][1]))
        assert torch.equal(start_plans(model, some, shape), plan)


def test_too_few_texts_use_fewer_ids_or_are_refused():
    model, y = tiny_planner(shape=SHAPE), text(2, 6)
    sides = text(2, 3), torch.ones(2, 3, dtype=torch.long)
    before = [one.weight.clone() for one in model.plans.types]
    plan = start_plans(model, PairTensors(*sides, y), SHAPE)
    assert plan[:, 3:5].unique().tolist() == [0, 1, 2, 3], "four pieces, four of five ids"
    assert torch.equal(model.plans.types[1].weight[4], before[1][4]), "nothing stands for the last"
    for same in (
        PairTensors(*sides, y[:1].expand(2, -1)),
        PairTensors(*(x[:1] for x in (*sides, y))),
    ):
        one = PlanShape((4,), (1,))
        with pytest.raises(DataError, match="1 different targets"):
            start_plans(tiny_planner(shape=one), same, one)
    with pytest.raises(CheckpointError, match="model's own"):
        start_plans(model, PairTensors(*sides, y), SMALL)
