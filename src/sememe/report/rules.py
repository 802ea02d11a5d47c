"""The doctor's rules: which figures each reads, when they are sick, and what to try.

A new rule is one entry in RULES. How figures are named: `Log`; overrides: `Log.override`."""

import math
from collections.abc import Callable
from dataclasses import dataclass

from sememe.report.log import Log, Unmeasured

WORTH = 0.1
"""Nats per token that z* must be worth before we ask whether the planner comes near it."""
CONCEPTS = ("online", "compressor")
PLANNER = ("planner",)
TEXT = (*CONCEPTS, "control", "prune", "skip", "window")
EVERY = (*TEXT, *PLANNER)


@dataclass(frozen=True)
class Rule:
    name: str
    sign: str
    advice: str
    is_sick: Callable[[Log], bool]
    """What it looks up is the evidence, unless it sets another; raises Unmeasured."""
    tries: tuple[str, ...] = ()
    """Overrides of the recipe, each to be tried on its own: see `Log.override`."""
    systems: tuple[str, ...] = CONCEPTS


# ---- rules of more than one line ----


def not_finite(log: Log) -> bool:
    lines = log.run.lines
    log.evidence = {
        f"lines where {key} is not finite": count
        for key in ("loss", "grad_norm", "heldout_nll")
        if (count := sum(not math.isfinite(line.get(key) or 0) for line in lines))
    }
    return bool(log.evidence) or "stopped" in lines[-1]


def no_gradient(log: Log) -> bool:
    parts = {key for line in log.stage for key in line if key.startswith("grad_norm_")}
    if not parts:
        raise Unmeasured("no grad_norm of single modules in the lines that count")
    limit = 1e-4 * log("grad_norm.late")
    norms = {f"{part}.late": log(f"{part}.late") for part in sorted(parts)}
    log.evidence = {name: norm for name, norm in norms.items() if norm <= limit}
    return bool(log.evidence)


def only_first_positions(log: Log) -> bool:
    first, last = (
        log(f"heldout_nll_by_position.{i}.early") - log(f"heldout_nll_by_position.{i}.late")
        for i in (0, -1)
    )
    return first >= 0.05 and last < 0.1 * first


def off_target(log: Log) -> bool:
    target = log("target_rate.late")
    # a text cannot be nearer to the rate than one concept
    tolerance = max(0.03 * target, 1 / log("recipe.sequence_length"))
    return any(abs(log(key) - target) > tolerance for key in ("rate.late", "heldout_rate.last"))


def ids_collapsed(log: Log) -> bool:
    """Of the plans trained on. A type that says as much as one fixed plan would is collapsed,
    however many ids that plan has."""
    types = zip(log("recipe.plan.sizes"), log("recipe.plan.lengths"), strict=True)
    for kind, (size, slots) in enumerate(types):
        log.evidence = {}
        perplexity = log(f"plan_perplexity.{kind}.late")
        one_plan = 1.2 * max(1.0, log(f"plan_lengths.{kind}.late"))
        if (
            (size >= 2 * slots and perplexity <= one_plan)
            or perplexity < 0.2 * log(f"plan_ids_used.{kind}.late")
            or log(f"plan_largest_share.{kind}.late") > 0.8
        ):
            return True
    return False


def plans_ignored(log: Log) -> bool:
    """Where z* is worth something the executor does read plans, and it is the planner that is
    off."""
    best, _, without = _target_nll(log)
    return log("delta_nll_shuffle.final") < 0.02 and without - best < WORTH


def planner_far(log: Log) -> bool:
    best, own, without = _target_nll(log)
    return without - best >= WORTH and without - own < 0.2 * (without - best)


def _target_nll(log: Log) -> tuple[float, float, float]:
    """With z*, with the planner's own plan, and with the better of no plan and another's: of
    held-out pairs where evaluate.json has z* of them, else of training pairs in late E-steps."""
    if log.final.get("nll_posterior") is None:
        return log("em_nll.late"), log("em_nll_planner.late"), log("em_nll_shuffle.late")
    own = log("nll.final")
    cost = min(log("delta_nll_empty.final"), log("delta_nll_shuffle.final"))
    return log("nll_posterior.final"), own, own + cost


# ---- the table ----

RULES = (
    Rule(
        "not finite",
        "loss, grad_norm or heldout_nll is no finite number, or training stopped over one",
        "smaller steps, or full precision",
        not_finite,
        ("learning_rate*0.1", "precision=fp32"),
        EVERY,
    ),
    Rule(
        "unfinished",
        "there is no model/manifest.json",
        "still training, or interrupted: the same `sememe train` continues it",
        lambda log: not (log.run.path / "model" / "manifest.json").is_file(),
        systems=EVERY,
    ),
    Rule(
        "loss does not fall",
        "in the final stage heldout_nll falls by less than 0.02 nats, and loss by less than 0.1",
        "nothing is learned: larger steps, or more; smaller ones where it rises",
        lambda log: (
            log("heldout_nll.early") - log("heldout_nll.late") < 0.02
            and log("loss.early") - log("loss.late") < 0.1
        ),
        ("learning_rate*3", "learning_rate*0.3", "steps*2"),
        EVERY,
    ),
    Rule(
        "held-out far above training",
        "heldout_nll is more than 0.5 nats above loss (without distil)",
        "memorised, or other text than data.train: more text, or text that is alike",
        lambda log: log("heldout_nll.last") - log("loss.late") > 0.5 and not log("recipe.distil"),
        ("lora.dropout=0.1", "lora.rank*0.5", "steps*0.5"),
        TEXT,
    ),
    Rule(
        "held-out text gets worse",
        "heldout_nll ends more than 0.1 nats above its minimum, while loss falls",
        "the rest of the run memorised: stop sooner, more text, a smaller adapter",
        lambda log: (
            log("heldout_nll.last") - log("heldout_nll.min") > 0.1
            and log("loss.late") < log("loss.early")
        ),
        ("steps*0.5", "lora.rank*0.5"),
        EVERY,
    ),
    Rule(
        "gradient explodes",
        "grad_norm in the last third of the run is over 3 times that of the first, and over 3",
        "smaller steps: of LoRA, or of the concepts, whichever grows",
        lambda log: log("run.grad_norm.late") > 3 * max(log("run.grad_norm.early"), 1),
        ("learning_rate*0.3", "concept_learning_rate*0.3"),
        EVERY,
    ),
    Rule(
        "no gradient",
        "the gradient norm of a module is below 1e-4 of grad_norm",
        "it learns nothing. Codes chosen too surely give none: soften the choice",
        no_gradient,
        ("code_temperature*2", "gumbel=1"),
        TEXT,
    ),
    Rule(
        "no gradient",
        "the gradient norm of a module is below 1e-4 of grad_norm",
        "it learns nothing: the planner by its own loss, or through the executor",
        no_gradient,
        ("plan.weight=1", "plan.straight_through=true", "concept_learning_rate*3"),
        PLANNER,
    ),
    Rule(
        "rate off target",
        "rate or heldout_rate is over 3 %, and one concept per text, off the recipe's",
        "the gate does not hold it: more text to calibrate on, longer tails, or the fixed stride",
        off_target,
        ("calibration_tokens*2", "max_tail*2", "boundary=fixed"),
    ),
    Rule(
        "codes ignored",
        "shuffling or zeroing all codes costs less than 0.02 nats",
        "the model reads past its codes: more concepts, more bits in each, slower LoRA",
        lambda log: min(log("delta_nll_shuffle.final"), log("delta_nll_zero.final")) < 0.02,
        ("rate*1.5", "codes_per_concept*2", "learning_rate*0.3"),
    ),
    Rule(
        "codes collapsed",
        "code_perplexity is below 0.2 of codes_used, or largest_code_share above 0.6",
        "few codes do all the work: noise on the choice, slower codes, or fewer of them",
        lambda log: (
            log("code_perplexity.late") < 0.2 * log("codes_used.late")
            or log("largest_code_share.late") > 0.6
        ),
        ("gumbel=1", "concept_learning_rate*0.3", "num_concepts*0.25"),
    ),
    Rule(
        "soft and hard codes apart",
        "soft_hard_cosine is below 0.9",
        "the gradient is that of a mixture far from the code that is read: sharpen it",
        lambda log: log("soft_hard_cosine.last") < 0.9,
        ("code_temperature*0.5",),
    ),
    Rule(
        "sure too early",
        "code_entropy is below 0.01 nats when first measured",
        "codes were settled before they were learned: soften the choice, or add noise",
        lambda log: log("run.code_entropy.first") < 0.01,
        ("code_temperature*2", "gumbel=1"),
    ),
    Rule(
        "only the opening improves",
        "the first 64 positions improve by 0.05 nats or more, the last by less than 0.1 of that",
        "concepts serve the opening alone: shorter texts first, or more concepts in a text",
        only_first_positions,
        ("sequence_length*0.5", "rate*1.5"),
    ),
    Rule(
        "only the opening improves",
        "the first 64 positions improve by 0.05 nats or more, the last by less than 0.1 of that",
        "plans serve the opening alone: a longer stage of short texts, or longer plans",
        only_first_positions,
        ("curriculum=[16,0.8]", "plan.lengths*2"),
        PLANNER,
    ),
    Rule(
        "plans ignored",
        "shuffling the planner's plans costs less than 0.02 nats, and z* is worth less than 0.1",
        "the text needs no plan, or ignores it: longer plans, a longer start on them, slower LoRA",
        plans_ignored,
        ("plan.lengths*2", "em.stages=[0.2,0.4]", "learning_rate*0.3"),
        PLANNER,
    ),
    Rule(
        "search undecided",
        "in late E-steps em_margin is below 0.5 nats and em_flips above 0.4",
        "one plan scores like another: more candidates, more frequent searches, smaller steps",
        lambda log: log("em_margin.late") < 0.5 and log("em_flips.late") > 0.4,
        ("em.proposers.edit=4", "em.proposers.diverse=4", "em.every*0.5", "learning_rate*0.3"),
        PLANNER,
    ),
    Rule(
        "search stuck early",
        "early on em_flips is at most 0.02 and the planner's entropy at most 0.35 nats, while a "
        "pair has fewer than 3 candidates or z* is worth less than 0.1 nats",
        "the planner is sure before any search and proposes what it has: candidates that differ, "
        "a weaker or shorter start",
        lambda log: (
            log("em_flips.early") <= 0.02
            and log("plan_entropy_by_slot.mean.early") <= 0.35
            and (
                log("em_candidates.early") < 3
                or log("em_nll_shuffle.early") - log("em_nll.early") < WORTH
            )
        ),
        (
            "em.proposers.diverse=4",
            "em.proposers.edit=4",
            "plan.weight*0.3",
            "em.stages=[0.1,0.15]",
        ),
        PLANNER,
    ),
    Rule(
        "plans stale",
        "in late E-steps em_staleness is above 0.1 nats and a quarter of em_margin",
        "training lags behind what a search would find now: more frequent searches, smaller steps",
        lambda log: log("em_staleness.late") >= max(0.1, 0.25 * log("em_margin.late")),
        ("em.every*0.5", "learning_rate*0.3"),
        PLANNER,
    ),
    Rule(
        "planner far from z*",
        "of what z* is worth, the planner's own plan keeps less than 0.2",
        "the source does not tell the planner what z* says: z* that is easier to plan, or a "
        "planner that learns harder",
        planner_far,
        ("em.planner_weight*2", "plan.weight*3", "plan.weight=1", "plan.straight_through=true"),
        PLANNER,
    ),
    Rule(
        "ids collapsed",
        "a type's plan_perplexity is at most 1.2 times its concepts in a plan, or below 0.2 of "
        "plan_ids_used, or its plan_largest_share is above 0.8",
        "few ids do all the work: candidates that use others, slower tables, or fewer ids",
        ids_collapsed,
        ("em.proposers.sample=4", "concept_learning_rate*0.3", "plan.sizes*0.25"),
        PLANNER,
    ),
    Rule(
        "soft and hard concepts apart",
        "with straight_through, soft_hard_cosine is below 0.5",
        "the planner's gradient is that of a mixture that nobody reads: sharpen it",
        lambda log: log("soft_hard_cosine.last") < 0.5 and log("recipe.plan.straight_through"),
        ("code_temperature*0.5",),
        PLANNER,
    ),
)
