"""Source → plan → text: who sees what, cached = uncached, rows alone = rows together, search
against enumeration, training."""

import itertools
import weakref

import pytest
import torch
from torch.nn.functional import pad
from transformers import AutoModelForCausalLM

from families import FAMILIES, left_padded, move, text, tiny_base
from sememe.backbone.split import Spine
from sememe.concepts.plan import NULL, PlanShape
from sememe.errors import CheckpointError, RecipeError
from sememe.models import MODELS, PlannerConfig, PlannerForCausalLM
from sememe.models.planner.beam import PlanSearch
from sememe.models.planner.signals import SignalReader

# Rows of other lengths, and a cache, make sums go another way: 4e-6 seen; one wrong mask entry or
# position gives > 1e-2.
CLOSE = {"atol": 5e-5, "rtol": 1e-4}
SHAPE = PlanShape((7, 5, 9), (3, 2, 4))
FEW = PlanShape((3, 3), (2, 2))  # 169 plans
both_ways = pytest.mark.parametrize("parallel", [False, True])
every_family = pytest.mark.parametrize("family", FAMILIES)
every_kernel = pytest.mark.parametrize(
    "family, attention", [*((family, "sdpa") for family in FAMILIES), ("gemma3_text", "eager")]
)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@torch.no_grad()
def tiny_planner(
    family: str = "llama", attention: str = "sdpa", shape: PlanShape = SHAPE, **changes
) -> PlannerForCausalLM:
    base = tiny_base(family, attention=attention)
    sizes = {"plan_sizes": shape.sizes, "plan_lengths": shape.lengths}
    settings = {"base": "tiny", "lora_rank": 4} | sizes | changes
    config = PlannerConfig(text_config=base.config, **settings)
    config._attn_implementation = attention
    model = PlannerForCausalLM(config, base)
    move(model, seeded(1))
    model.plans.bias.copy_(0.3 * torch.randn(model.plans.bias.shape, generator=seeded(2)))
    model.plans.bias[model.plans.row_IM[:, -1]] += 1.5  # plans of all lengths
    return model.eval()


def plans(count: int, seed: int = 0) -> torch.Tensor:
    """Random plans: empty types, full ones and all between."""
    generator = seeded(seed)

    def ids(size: int, longest: int) -> list[int]:
        length = int(torch.randint(longest + 1, (1,), generator=generator))
        return torch.randint(size, (length,), generator=generator).tolist()

    return SHAPE.pack([[*map(ids, SHAPE.sizes, SHAPE.lengths)] for _ in range(count)])


def every_plan(shape: PlanShape) -> torch.Tensor:
    of_type = [
        [list(ids) for n in range(longest + 1) for ids in itertools.product(range(size), repeat=n)]
        for size, longest in zip(shape.sizes, shape.lengths, strict=True)
    ]
    return shape.pack([list(plan) for plan in itertools.product(*of_type)])


def sources() -> tuple[torch.Tensor, torch.Tensor]:
    return left_padded([text(1, n, seed=n) for n in (3, 9, 1)])


@torch.no_grad()
def log_prob(model, u: torch.Tensor, mask: torch.Tensor | None, plan: torch.Tensor) -> torch.Tensor:
    """(B,) log p(z | u) without a cache."""
    return model.plan_log_prob(plan, model.source(u, mask))


@torch.no_grad()
def target_log_prob(model, *words: torch.Tensor) -> torch.Tensor:
    """(B,) log p(y | z)."""
    return -model.target_nll(*words).sum(1)


def test_plans_are_packed_and_their_targets_are_the_next_ids():
    rows = [[[1, 2], [], [0, 1, 2, 8]], [[6, 0, 3], [4], []]]
    plan, no = SHAPE.pack(rows), -100
    assert SHAPE.unpack(plan) == rows and SHAPE.counts(plan).tolist() == [[2, 0, 4], [3, 1, 0]]
    assert plan[0].tolist() == [1, 2, NULL, NULL, NULL, 0, 1, 2, 8]
    assert SHAPE.targets(plan).tolist() == [  # a full type needs no <EOS>
        [1, 2, 9, 9, no, 0, 1, 2, 8],
        [6, 0, 3, 4, 9, 9, no, no, no],
    ]
    assert SHAPE.pack([]).shape == (0, 9) and len(every_plan(FEW).unique(dim=0)) == 169


@pytest.mark.parametrize(
    "plan, match",
    [
        ([0, -1, -1, 5, -1, -1, -1, -1, -1], "plan id 5 in slot 3: need ids from 0 to 4"),
        ([-2, -1, -1, 0, -1, -1, -1, -1, -1], "plan id -2 in slot 0: "),
        ([0, -1, -1, 0, -1, -1, 1, -1, -1], "plan id 1 in slot 6: .*after a type's last one"),
        ([0, -1, -1, 0], r"need \(rows, 9\)"),
    ],
)
def test_wrong_plans_are_refused(plan, match):
    model, plan = tiny_planner(), torch.tensor([plan])
    for use in (lambda: model.write(plan, 2), lambda: model(text(1, 3), plan_ids=plan)):
        with pytest.raises(CheckpointError, match=match):
            use()
    with pytest.raises(CheckpointError, match="3 types of at most"):
        SHAPE.pack([[[0] * 4, [], []]])


@every_family
def test_the_executor_sees_the_plan_and_the_text_so_far_and_never_the_source(family):
    model, plan = tiny_planner(family, straight_through=True).eval(), plans(3)
    y, u = text(3, 9, seed=9), text(3, 8)
    a, *others = (
        model(x, plan_ids=plan, labels=y).logits for x in (u, text(3, 8, seed=5), text(3, 4))
    )
    assert all(torch.equal(a, b) for b in others)
    states, changed = model.plans(plan), y.clone()
    changed[:, 4] = (y[:, 4] + 1) % 97
    with torch.no_grad():
        again, b = (model(u, plan_ids=plan, labels=x).logits for x in (y, changed))
        assert torch.equal(a, again), "the straight-through value is the concept's"
        assert torch.equal(a[:, :5], b[:, :5]) and not torch.equal(a[:, 5], b[:, 5])
        assert not torch.equal(a, model.executor_logits(plan - plan, y)), "it does see the plan"
        same = torch.where((plan == NULL)[..., None], torch.randn(states.shape), states)
        assert torch.equal(a, model.executor_logits(plan, y, same)), "nobody sees an empty slot"


@every_family
@both_ways
@torch.no_grad()
def test_the_planner_is_causal_and_types_in_parallel_are_apart(family, parallel):
    model = tiny_planner(family, parallel=parallel)
    plan = SHAPE.pack([[[1, 2, 3], [4, 0], [0, 1, 2, 8]]])
    changed = plan.clone()
    changed[0, 1] = 5  # the second concept of type 0
    a, b = (model.plan_logits(x, model.source(text(1, 6))) for x in (plan, changed))
    other = model.plan_logits(plan, model.source(text(1, 6, seed=7)))
    same = (a == b).all(-1)[0].tolist()
    assert same[:3] == [True, True, False], "it sees what it has written"
    assert same[3:] == [parallel] * 6, "later types see it unless they are written in parallel"
    assert not (a == other).all(-1).any(), "every type sees the source"


@every_family
@torch.no_grad()
def test_a_source_is_read_as_the_base_reads_it(family):
    base, (u, mask) = tiny_base(family), sources()
    want = base(pad(u[1:2], (1, 0), value=1)).logits
    model = PlannerForCausalLM(PlannerConfig(text_config=base.config, base="tiny"), base).eval()
    source = model.source(u, mask)  # fresh LoRA changes nothing
    h = model.run(source.inputs_BnD, source.slots, source.slots)
    torch.testing.assert_close(Spine(model.backbone).logits(h)[1:2], want, **CLOSE)


@every_family
def test_a_row_is_what_it_is_alone(family):
    model, (u, mask), plan, y = tiny_planner(family), sources(), plans(3, seed=1), text(3, 6)
    y[1, 3:] = -100
    own, words = log_prob(model, u, mask, plan), target_log_prob(model, plan, y)
    for i, row in enumerate(plan[:, None]):
        alone = log_prob(model, u[i : i + 1, mask[i] > 0], None, row)
        torch.testing.assert_close(own[i : i + 1], alone, **CLOSE)
        alone = target_log_prob(model, row, y[i : i + 1, y[i] >= 0])
        torch.testing.assert_close(words[i : i + 1], alone, **CLOSE)
    pads = torch.where(mask > 0, u, 5)
    assert torch.equal(own, log_prob(model, pads, mask, plan)), "whatever id padding has"


def test_padding_may_stand_on_either_side_and_long_sources_keep_their_end():
    model, plan, u = tiny_planner(plan_max_source=4), plans(2), text(2, 9)
    want = log_prob(model, u[:, 5:], None, plan)
    assert torch.equal(log_prob(model, u, None, plan), want)
    right, mask = pad(u[:, 5:], (0, 3)), torch.tensor([[1] * 4 + [0] * 3] * 2)
    torch.testing.assert_close(log_prob(model, right, mask, plan), want, **CLOSE)


@every_kernel
@both_ways
def test_planning_with_a_cache_is_planning_without(family, attention, parallel):
    model, (u, mask) = tiny_planner(family, attention, parallel=parallel), sources()
    context = model.encode_source(u, mask)
    for options in ({"do_sample": True, "generator": seeded(3)}, {"num_beams": 4}):
        plan, score = model.plan(u, mask, num_return=4, **options)
        flat = plan.flatten(0, 1)
        assert len(SHAPE.counts(flat).unique(dim=0)) > 2, "plans of many lengths"
        each = (x.repeat_interleave(4, 0) for x in (u, mask))
        want = log_prob(model, *each, flat).view(3, 4)
        torch.testing.assert_close(score, want, **CLOSE)
        for _ in range(2):  # the shared cache is left as it was
            shared = model.plan_log_prob(flat, context).view(3, 4).detach()
            torch.testing.assert_close(shared, want, **CLOSE)


@every_kernel
def test_writing_with_a_cache_is_writing_without(family, attention):
    model, plan = tiny_planner(family, attention), plans(3, seed=3)
    for i, ids in enumerate(model.write(plan, 6)):
        words = []
        while len(words) < 6 and 2 not in words:
            target = torch.tensor([[*words, 0]])
            words.append(int(model.executor_logits(plan[i : i + 1], target)[0, -1].argmax()))
        assert ids == [x for x in words if x != 2]


@torch.no_grad()
def greedy(model: PlannerForCausalLM, u: torch.Tensor) -> torch.Tensor:
    """The specification of `plan`, one row: everything again for every step."""
    shape, plan = model.plans.shape, torch.full((1, model.plans.shape.slots), NULL)
    for i, length in enumerate(shape.lengths):
        count, first, ended = 0, int(shape.first_I[i]), False
        while count < length and not ended:
            anchor = None if model.probes is None else shape.counts(plan)
            h = model.plan_states(plan, model.source(u), anchor)
            logits = [model.slot_logits(h)[0, first + count]]
            if anchor is not None:
                queries = h[0, shape.types + shape.slots :].unflatten(0, (shape.types, -1))
                logits += model.plans.logits(model.normed(queries[i]), torch.tensor([i]))
            for concept in map(torch.argmax, logits[: length - count]):
                if ended := int(concept) == shape.eos:
                    break
                plan[0, first + count] = concept
                count += 1
    return plan


@pytest.mark.parametrize(
    "family, multi_token, parallel",
    [("llama", 1, False), ("llama", 4, True), ("mistral", 3, False), ("gemma3_text", 2, True)],
)
def test_greedy_plans_are_those_of_the_specification(family, multi_token, parallel):
    shape, (u, mask) = PlanShape((30, 5, 40), (5, 2, 7)), sources()
    model = tiny_planner(family, shape=shape, multi_token=multi_token, parallel=parallel)
    plan, score = model.plan(u, mask)
    want = torch.cat([greedy(model, u[i : i + 1, mask[i] > 0]) for i in range(3)])
    assert torch.equal(plan[:, 0], want)
    torch.testing.assert_close(score[:, 0], log_prob(model, u, mask, want), **CLOSE)


@both_ways
@torch.no_grad()
def test_queries_are_seen_by_nobody_else_and_see_nothing_after_their_concept(parallel):
    model, plan = tiny_planner(multi_token=3, parallel=parallel), plans(3, seed=1)
    source, anchor = model.source(*sources()), torch.zeros(3, 3, dtype=torch.long)
    changed = torch.cat([plan[:, :5], plans(3, seed=2)[:, 5:]], 1)  # type 2
    a, b = (model.plan_states(x, source, anchor) for x in (plan, changed))
    torch.testing.assert_close(a[:, :12], model.plan_states(plan, source), **CLOSE)
    assert a.shape[1] == 12 + 3 * 2 and torch.equal(a[:, 12:], b[:, 12:])


@both_ways
def test_search_against_all_plans_there_are(parallel):
    model, everything = tiny_planner(shape=FEW, parallel=parallel), every_plan(FEW)
    context = model.encode_source(*left_padded([text(1, 4), text(1, 2, seed=1)]))
    score = model.plan_log_prob(everything.repeat(2, 1), context).view(2, -1).detach()
    torch.testing.assert_close(score.exp().sum(1), torch.ones(2), atol=1e-5, rtol=0)
    (best, order), count = score.sort(dim=1, descending=True), len(everything)
    plan, scores = PlanSearch(num_beams=count, num_return=count)(model, context)
    torch.testing.assert_close(scores, best, **CLOSE)
    for i in range(2):
        assert torch.equal(plan[i, :5], everything[order[i, :5]])
        assert len(plan[i].unique(dim=0)) == count
    plan, scores = PlanSearch(num_return=count + 9)(model, context)
    assert torch.equal(plan[:, -1], plan[:, 0]) and torch.equal(scores[:, -1], scores[:, 0])
    narrow, first = (PlanSearch(num_beams=n)(model, context)[1][:, 0] for n in (3, 1))
    assert (narrow <= best[:, 0] + 1e-5).all() and (narrow >= first - 1e-5).all()


@both_ways
def test_samples_come_as_often_as_the_model_says(parallel):
    model, u = tiny_planner(shape=FEW, parallel=parallel), text(1, 3)
    everything = every_plan(FEW)
    draw = {"do_sample": True, "generator": seeded()}
    drawn, _ = model.plan(u, num_return=1000, **draw)
    p = model.plan_log_prob(everything, model.encode_source(u)).exp()
    often = (drawn[0][:, None] == everything).all(-1).float().mean(0)
    # 4.5 deviations; what is rare counts as one.
    assert ((often - p).abs() < 4.5 * ((p + 1e-3) / 1000).sqrt()).all()
    cold, _ = model.plan(u, num_return=3, temperature=1e-4, **draw)
    assert torch.equal(cold, model.plan(u)[0].expand(-1, 3, -1))


@both_ways
def test_diverse_beams_differ_and_plans_keep_to_their_budget(parallel):
    model, (u, mask) = tiny_planner(parallel=parallel), sources()
    for row in model.plan(u, mask, num_return=5, diversity=50.0)[0]:
        assert len(row[:, 0].unique()) == 5, "all begin with another concept or with none"
    for wrong in ({"temperature": 0.0}, {"num_beams": 0}, {"num_return": 0}, {"diversity": -1.0}):
        with pytest.raises(RecipeError, match="need above 0"):
            model.plan(u, mask, **wrong)
    for wrong in ([1, 1], [-1]):
        with pytest.raises(RecipeError, match=r"a budget of .* each of 3 types"):
            model.limit(wrong)
    searches = ({}, {"num_beams": 3}, {"do_sample": True})
    for budget, options in itertools.product(([1, 2, 2], [1], [0]), searches):
        model.limit(budget)
        counts = SHAPE.counts(model.plan(u, mask, **options)[0][:, 0])
        assert (counts <= torch.tensor(budget)).all()


def test_generate_plans_and_then_writes():
    model, (u, mask) = tiny_planner(), sources()
    ids = model.generate(u, mask, max_new_tokens=6, num_beams=2)
    plan = model.plan(u, mask, num_beams=2)[0][:, 0]
    assert torch.equal(ids[:, :9], u)
    for row, words in zip(ids[:, 9:].tolist(), model.write(plan, 6), strict=True):
        assert row[: len(words)] == words and set(row[len(words) :]) <= {2}
    a, b, c = (model.write(plan, 6, do_sample=True, generator=seeded(s)) for s in (0, 0, 1))
    assert a == b != c


def learned(model: PlannerForCausalLM) -> set[str]:
    """Which parts have a gradient that is not 0."""
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    names = {n for n, grad in grads.items() if grad.any()}
    return {next((part for part in ("planner", "executor") if f".{part}." in n), n) for n in names}


@pytest.mark.parametrize("straight_through", [False, True])
def test_gradients_reach_what_they_are_for(straight_through):
    model, plan = tiny_planner(straight_through=straight_through), plans(3)
    u, y = text(3, 6), text(3, 5)
    model.train()(u, plan_ids=plan, labels=y).target_nll.backward()
    assert {"executor", "plans.weight", "plans.separator", "plans.kind"} <= learned(model)
    assert ("planner" in learned(model)) == straight_through, "the text's loss reaches it so alone"
    model.zero_grad()
    model(u, plan_ids=plan).loss.backward()
    assert {"planner", "plans.weight", "plans.bias", "plans.log_sharpness"} <= learned(model)
    assert model.plans.weight.grad[model.plans.row_IM[:, -1]].any(1).all(), "each <EOS>"
    assert "executor" not in learned(model)
    model.zero_grad()
    model(u, plan_ids=plan, labels=y).loss.backward()
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {n for n, p in model.named_parameters() if p.grad is not None}
    assert not any(n.startswith("backbone.") and "lora_" not in n for n in trained)


@torch.no_grad()
def test_losses_are_the_sums_they_say():
    model, plan, u, y = tiny_planner(plan_weight=0.5), plans(3), text(3, 6), text(3, 5)
    y[0, 2:] = -100
    out, tokens = model(u, plan_ids=plan, labels=y), int((y >= 0).sum())
    before = log_prob(model, u, None, plan), target_log_prob(model, plan, y)
    concepts = (SHAPE.targets(plan) != -100).sum()
    torch.testing.assert_close(out.target_nll, -before[1].sum() / tokens)
    torch.testing.assert_close(out.plan_nll, -before[0].sum() / concepts)
    torch.testing.assert_close(out.loss, out.target_nll + 0.5 * out.plan_nll)
    of_both = {"num_items_in_batch": 2 * tokens, "concepts_in_batch": 2 * concepts}
    torch.testing.assert_close(model(u, plan_ids=plan, labels=y, **of_both).loss, out.loss / 2)
    torch.testing.assert_close(model(u, plan_ids=plan).loss, out.plan_nll)
    assert torch.equal(model(u, labels=y).plan_ids, model.plan(u)[0][:, 0])


@pytest.mark.parametrize("straight_through", [False, True])
def test_probes_of_signals_are_a_term_of_the_loss_and_move_the_concepts(straight_through):
    model = tiny_planner(plan_signals=0.5, straight_through=straight_through)
    plan, u, y, codes = plans(3), text(3, 6), text(3, 5), model.plans
    torch.nn.init.normal_(model.signals.linear.weight, generator=seeded())  # it starts at 0
    labels = SignalReader(["the whale"])(["It was 1969.", "- one\n- two", "We met Anna there."])
    out, plain = (model(u, plan_ids=plan, labels=y, signals=x) for x in (labels, None))
    assert plain.signal_nll is None and torch.equal(out.logits, plain.logits), "nobody reads them"
    torch.testing.assert_close(out.loss, plain.loss + 0.5 * out.signal_nll)
    rows = [codes.row_IM[i, ids] for row in SHAPE.unpack(plan) for i, ids in enumerate(row)]
    means = torch.stack([codes.weight[x].sum(0) / max(len(x), 1) for x in rows])
    nll = model.signals(means.view(3, -1), labels).values()
    torch.testing.assert_close(out.signal_nll, sum(nll))
    out.signal_nll.backward()
    reached = learned(model)
    assert {"signals.linear.weight", "plans.weight"} <= reached and "executor" not in reached
    assert ("planner" in reached) == straight_through


def test_the_planners_gradients_are_taken_early_and_nothing_is_kept(monkeypatch):
    changes = {"parallel": True, "multi_token": 2, "plan_weight": 0.3, "plan_dropout": 0.4}
    (u, mask), y = sources(), text(3, 6, seed=2)

    def gradients() -> tuple[dict[str, torch.Tensor], int]:
        class Kept:
            def __init__(self, x):
                self.x = x
                kept.add(self)

        model, kept = tiny_planner(**changes).train(), weakref.WeakSet()
        torch.manual_seed(0)  # of queries and dropped plans
        with torch.autograd.graph.saved_tensors_hooks(Kept, lambda one: one.x):
            loss = model(u, mask, plans(3), labels=y, num_items_in_batch=7).loss
            count = len(kept)
            (2 * loss).backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, count

    early, count = gradients()
    monkeypatch.setattr("sememe.models.planner.model.differentiated", lambda loss, _: loss)
    plain, more = gradients()
    assert early.keys() == plain.keys() and count < 0.7 * more
    for name, gradient in plain.items():
        torch.testing.assert_close(early[name], gradient, atol=1e-6, rtol=1e-4, msg=name)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_saved_and_loaded_it_is_the_same(base_folder, tmp_path, attention):
    sizes = {"plan_sizes": SHAPE.sizes, "plan_lengths": SHAPE.lengths}
    config = PlannerConfig(base=str(base_folder), multi_token=2, seed=3, plan_signals=0.1, **sizes)
    model = PlannerForCausalLM.from_base(config, attention=attention).eval()
    move(model, seeded())
    with torch.no_grad():
        model.signals.linear.weight.fill_(0.25)
        model.plans.weight[:7].mul_(1.5)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=attention)
    assert type(again) is PlannerForCausalLM is MODELS["planner"] and again.plans.shape == SHAPE
    other = again.own_state()
    assert all(torch.equal(value, other[key]) for key, value in model.own_state().items())
    u, plan = text(2, 6), plans(2)
    assert torch.equal(model.plan(u)[0], again.plan(u)[0])
    assert model.write(plan, 4) == again.write(plan, 4)
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.plans.weight.dtype == torch.float32
    assert half.plan_logits(plan, half.source(u)).dtype == torch.float32
    assert half.generate(u, max_new_tokens=2).shape[0] == 2
    with pytest.raises(CheckpointError, match="two adapters"):
        again.merged()
