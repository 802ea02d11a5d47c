"""The doctor's rules for planners: PLAN_RULES, as RULES in doctor.py, of runs that search for plans
by hard EM.

The stage of a planner are the lines behind its warm-up. NLL here is of a target, in nats per token;
margin and staleness gap are differences of S, in nats per pair. How to read the figures:
docs/doctor.md."""

import math
from statistics import fmean, median
from typing import Any

from sememe.report.case import Case, Finding, Rule, Unknown, gradient_parts, logged
from sememe.report.values import number

WORTH = 0.1
"""Nats per token that z* must be worth before we ask whether the planner comes near it."""


def plans_ignored(case: Case, limit: dict) -> Finding | None:
    """Of the planner's own plans; where z* is worth something the executor does read plans, and it
    is the planner that is off."""
    cost, step = case.final("delta_nll_shuffle")
    if cost["delta_nll_shuffle"] >= limit["nats"]:
        return None
    try:
        best, _, without, _ = _reach(case)
    except Unknown:
        pass
    else:
        if without - best >= WORTH:
            return None
        cost["of z*, where it was searched for"] = without - best
    return Finding(
        cost,
        "the executor writes as well from any plan: longer plans, a longer start on them alone, or "
        "an executor "
        "that learns more slowly (text that needs no plan looks the same)",
        (
            _longer(case),
            f"em.warmup={min(0.5, 1 - case.value('em.distil'), max(0.1, 2 * case.value('em.warmup'))):g}",
            case.scaled("learning_rate", 0.3),
        ),
        step,
    )


def undecided(case: Case, limit: dict) -> Finding | None:
    margin, flips = (_late(case, key) for key in ("em_margin", "em_flips"))
    if margin[0] >= limit["nats"] or flips[0] <= limit["share"]:
        return None
    return Finding(
        {"em_margin": margin[0], "em_flips": flips[0]},
        "one plan scores like another, so that each search picks "
        "a new one: more and more different candidates, searches nearer to each other, smaller "
        "steps",
        (*_more(case, "edit", "diverse"), _sooner(case), case.scaled("learning_rate", 0.3)),
        margin[1],
    )


def stuck(case: Case, limit: dict) -> Finding | None:
    """A task that is solved has no flips and no doubt either. What it has are other candidates that
    it refuses, and plans that are worth something."""
    searches = _searches(case, "em_flips")
    early = searches[: max(1, len(searches) // 3)]
    most = [
        math.log(size + 1)
        for size, slots in zip(case.value("plan.sizes"), case.value("plan.lengths"), strict=True)
        for _ in range(slots)
    ]
    sure = [
        x / of
        for line in early
        for x, of in zip(line.get("plan_entropy_by_slot") or (), most, strict=False)
        if number(x) is not None
    ]
    if not sure:
        raise Unknown("no plan_entropy_by_slot beside the first E-steps in metrics.jsonl")
    flips, entropy = fmean(line["em_flips"] for line in early), fmean(sure)
    if flips > limit["flips"] or entropy > limit["entropy"]:
        return None
    asked = 1 + sum(case.value("em.proposers").values())
    met = fmean(number(line.get("em_candidates")) or 0.0 for line in early) / asked
    worth = [line["em_nll_shuffle"] - line["em_nll"] for line in early if "em_nll_shuffle" in line]
    if met >= limit["differ"] and (not worth or fmean(worth) >= WORTH):
        return None
    evidence = {
        "em_flips": flips,
        "entropy, as a share of the most there can be": entropy,
        "candidates that differ": met,
    }
    return Finding(
        evidence | ({"z* is worth": fmean(worth)} if worth else {}),
        "the planner was sure before any search, and proposes what it has: candidates that differ, "
        "a weaker or "
        "shorter start on the first plans",
        (
            *_more(case, "diverse", "edit"),
            case.scaled("plan.weight", 0.3),
            case.scaled("em.distil", 0.5),
        ),
        early[-1]["step"],
    )


def stale(case: Case, limit: dict) -> Finding | None:
    """The first search gains over plans that nobody searched for: it is left out."""
    searches = _searches(case, "em_staleness", "em_margin")[1:]
    if not searches:
        raise Unknown("em_staleness and em_margin are not measured by two E-steps")
    late = searches[-max(1, len(searches) // 3) :]
    gap, margin = (fmean(line[key] for line in late) for key in ("em_staleness", "em_margin"))
    if gap < max(limit["nats"], limit["share"] * margin):
        return None
    return Finding(
        {"em_staleness": gap, "em_margin": margin},
        "what was trained on lies behind what would be found now: "
        "searches nearer to each other, smaller steps",
        (_sooner(case), case.scaled("learning_rate", 0.3)),
        late[-1]["step"],
    )


def only_opening(case: Case, limit: dict) -> Finding | None:
    measured = [line for line in case.stage if len(line.get("heldout_nll_by_position") or ()) > 1]
    if len(measured) < 2:
        raise Unknown(
            "heldout_nll_by_position is not measured twice behind the warm-up, on more than 64 "
            "positions"
        )
    first, last = (measured[i]["heldout_nll_by_position"] for i in (0, -1))
    opening, *others = (before - after for before, after in zip(first, last, strict=True))
    if opening < limit["nats"] or fmean(others) >= limit["share"] * opening:
        return None
    short = max(16, case.recipe["target_length"] // 4)
    return Finding(
        {"fall of the first bucket": opening, "fall of the others": fmean(others)},
        "the plan serves the opening alone: a longer stage of short texts, or longer plans",
        (f"curriculum={{start: {short}, until: 0.8}}", _longer(case)),
        measured[-1]["step"],
    )


def planner_far(case: Case, limit: dict) -> Finding | None:
    """Posterior collapse the other way: the executor lives on z*, and what the planner writes in
    its place is no better than another text's plan."""
    best, own, without, step = _reach(case)
    if without - best < WORTH:
        raise Unknown(
            f"z* is worth {without - best:.2g} nats: too little to see whether the planner comes "
            "near it"
        )
    if without - own >= limit["share"] * (without - best):
        return None
    price = case.value("em.planner_weight")
    weight = case.value("plan.weight")
    return Finding(
        {"NLL with z*": best, "with the planner's plan": own, "without, or shuffled": without},
        "z* says what the source does not tell the planner: plans that cost more, a planner that "
        "learns them harder, "
        "or through the executor",
        (
            f"em.planner_weight={2 * price if price else 1.0:g}",
            f"plan.weight={3 * weight or 1.0:g}",
            "plan.straight_through=true",
        ),
        step,
    )


def ids_collapsed(case: Case, limit: dict) -> Finding | None:
    """Of the plans trained on. A type that says as much as one fixed plan would is collapsed,
    however many ids that plan has."""
    keys = ("plan_perplexity", "plan_ids_used", "plan_largest_share", "plan_lengths")
    lines = [line for line in case.stage if all(isinstance(line.get(key), list) for key in keys)]
    if not lines:
        raise Unknown("no plan_perplexity behind the warm-up in metrics.jsonl")
    late, evidence = lines[-max(1, len(lines) // 3) :], {}
    for i, (size, most) in enumerate(
        zip(case.value("plan.sizes"), case.value("plan.lengths"), strict=True)
    ):
        found = {
            key: [x for line in late if (x := number(line[key][i])) is not None] for key in keys
        }
        if not all(found.values()):
            continue  # a type that is empty throughout
        perplexity, used, largest, length = (median(found[key]) for key in keys)
        one_plan = size >= 2 * most and perplexity <= limit["plans"] * max(1.0, length)
        if one_plan or perplexity < limit["share"] * used or largest > limit["largest"]:
            evidence |= {
                f"plan_perplexity of type {i}": perplexity,
                f"plan_ids_used of type {i}": used,
                f"plan_largest_share of type {i}": largest,
            }
    if not evidence:
        return None
    smaller = [max(2, size // 4) for size in case.value("plan.sizes")]
    return Finding(
        evidence,
        "few ids do all the work: candidates that use others, tables that learn more slowly, fewer "
        "ids",
        (
            *_more(case, "edit", "sample"),
            case.scaled("concept_learning_rate", 0.3),
            f"plan.sizes={smaller}",
        ),
        late[-1]["step"],
    )


def soft_hard_apart(case: Case, limit: dict) -> Finding | None:
    if not case.value("plan.straight_through"):
        raise Unknown("nothing passes through a soft mixture (plan.straight_through is off)")
    step, cosine = case.points("soft_hard_cosine")[-1]
    if cosine >= limit["cosine"]:
        return None
    sharper = (
        "code_temperature=1"
        if case.recipe["code_temperature"] > 1
        else case.scaled("code_temperature", 0.5)
    )
    return Finding(
        {"soft_hard_cosine": cosine},
        "the gradient that reaches the planner is that of a mixture far from the "
        "concept that is read: sharpen it",
        (sharper,),
        step,
    )


def no_gradient(case: Case, limit: dict) -> Finding | None:
    shares = {
        part: median(found) for part, found in gradient_parts(case.stage, of_whole=True).items()
    }
    if not shares:
        raise Unknown("no grad_norm of single modules in metrics.jsonl")
    if case.warming:
        shares.pop("planner", None)  # it is not to learn yet
    dead = {
        f"grad_norm_{part} / grad_norm": share
        for part, share in shares.items()
        if share < limit["share"]
    }
    if not dead:
        return None
    tries = (
        ("plan.weight=1", "plan.straight_through=true")
        if "grad_norm_planner / grad_norm" in dead
        else ()
    )
    return Finding(
        dead,
        "what gets no gradient learns nothing: the planner by its own loss or through the executor",
        (*tries, case.scaled("concept_learning_rate", 3)),
        case.stage[-1]["step"],
    )


# ---- what they share ----


def _searches(case: Case, *keys: str) -> list[dict]:
    """The lines with an E-step's figures, at least one."""
    found = [line for line in case.lines if all(number(line.get(key)) is not None for key in keys)]
    if not found:
        raise Unknown(f"no {' and '.join(keys)} in metrics.jsonl: no E-step has measured it yet")
    return found


def _late(case: Case, key: str) -> tuple[float, int]:
    """The mean over the last third of the E-steps, and the step of the last one."""
    found = logged(_searches(case, key), key)
    late = found[-max(1, len(found) // 3) :]
    return fmean(value for _, value in late), late[-1][0]


def _reach(case: Case) -> tuple[float, float, float, int | None]:
    """NLL with z*, with the planner's own plan, and with the better of no plan and another's: of
    held-out text where evaluate.json has z* of it, else of the training pairs of the last third of
    the E-steps; and the step."""
    keys = ("nll_posterior", "nll", "delta_nll_empty", "delta_nll_shuffle")
    final = {key: number(case.evaluate.get(key)) for key in keys}
    if None not in final.values():
        own = final["nll"]
        return (
            final["nll_posterior"],
            own,
            own + min(final["delta_nll_empty"], final["delta_nll_shuffle"]),
            None,
        )
    best, own, without = (
        _late(case, key) for key in ("em_nll", "em_nll_planner", "em_nll_shuffle")
    )
    return best[0], own[0], without[0], best[1]


def _longer(case: Case) -> str:
    return f"plan.lengths={[2 * length for length in case.value('plan.lengths')]}"


def _sooner(case: Case) -> str:
    return case.scaled("em.every", 0.5)


def _more(case: Case, *names: str) -> tuple[str, ...]:
    """Twice the candidates of these proposers, or four."""
    asked: dict[str, Any] = case.value("em.proposers")
    return tuple(f"em.proposers.{name}={2 * asked.get(name, 0) or 4}" for name in names)


PLANNER = ("planner",)
PLAN_RULES = (
    Rule(
        "no gradient",
        "a module's norm is below {share} of grad_norm (median)",
        {"share": 1e-4},
        no_gradient,
        PLANNER,
    ),
    Rule(
        "plans ignored",
        "shuffling all plans costs less than {nats} nats",
        {"nats": 0.02},
        plans_ignored,
        PLANNER,
    ),
    Rule(
        "search cannot decide",
        "in the last third of the E-steps em_margin is below {nats} nats and em_flips above "
        "{share}",
        {"nats": 0.5, "share": 0.4},
        undecided,
        PLANNER,
    ),
    Rule(
        "search is stuck early",
        "in the first third of the E-steps em_flips is at most {flips} and the planner's entropy "
        "at "
        "most {entropy} of what it can be, where less than {differ} of the candidates differ or z* "
        "is worth less than 0.1 nats",
        {"flips": 0.02, "entropy": 0.2, "differ": 0.5},
        stuck,
        PLANNER,
    ),
    Rule(
        "plans are stale",
        "after the first E-step em_staleness stays above {nats} nats and {share} of em_margin",
        {"nats": 0.1, "share": 0.25},
        stale,
        PLANNER,
    ),
    Rule(
        "only the opening improves",
        "behind the warm-up the first 64 positions improve by {nats} nats or more, the others by "
        "less than {share} of that",
        {"nats": 0.05, "share": 0.1},
        only_opening,
        PLANNER,
    ),
    Rule(
        "planner far from z*",
        "of what z* is worth, the planner's own plan keeps less than {share}",
        {"share": 0.2},
        planner_far,
        PLANNER,
    ),
    Rule(
        "concepts collapsed",
        "a type's plan_perplexity is at most {plans} times its concepts in one plan, or below "
        "{share} of "
        "plan_ids_used, or its plan_largest_share above {largest}",
        {"plans": 1.2, "share": 0.2, "largest": 0.8},
        ids_collapsed,
        PLANNER,
    ),
    Rule(
        "soft and hard concepts apart",
        "with straight_through, soft_hard_cosine is below {cosine}",
        {"cosine": 0.5},
        soft_hard_apart,
        PLANNER,
    ),
)
