"""The doctor's rules: which figures each reads, when they are sick, and what to try.

A new rule is one entry in RULES. How figures are named: `Log.figure`; overrides: `Log.override`.
"""

from collections.abc import Callable
from dataclasses import dataclass

from sememe.figures import number
from sememe.report.log import Log, Unmeasured, warmup

WORTH = 0.1
"""Nats per token that z* must be worth before we ask whether the planner comes near it."""
Evidence = dict[str, float]


def when(is_sick: Callable[..., bool], *names: str) -> Callable[[Log], Evidence | None]:
    """A rule that reads figures by name; where `is_sick` says so of them they are the evidence."""

    def look(log: Log) -> Evidence | None:
        figures = {name: log.figure(name) for name in names}
        evidence = {name: x for name, x in figures.items() if not name.startswith("recipe.")}
        return evidence if is_sick(*figures.values()) else None

    return look


# ---- rules that need more than figures by name ----


def not_finite(log: Log) -> Evidence | None:
    broken = {
        f"lines where {key} is not finite": count
        for key in ("loss", "grad_norm", "heldout_nll")
        if (count := sum(x.get(key) is not None and number(x[key]) is None for x in log.lines))
    }
    return broken if broken or log.lines[-1].get("stopped") else None


def unfinished(log: Log) -> Evidence | None:
    finished = (log.path / "model" / "manifest.json").is_file()
    return None if finished else {"of steps": log.setting("steps")}


def no_gradient(log: Log) -> Evidence | None:
    parts = {key for line in log.stage for key in line if key.startswith("grad_norm_")}
    if log.lines[-1]["step"] <= warmup(log.recipe):
        parts.discard("grad_norm_planner")  # it is not to learn yet
    if not parts:
        raise Unmeasured("no grad_norm of single modules in metrics.jsonl")
    whole = max(log.figure("grad_norm.late"), 1e-30)
    shares = {f"{key} / grad_norm": log.figure(f"{key}.late") / whole for key in sorted(parts)}
    return {name: share for name, share in shares.items() if share < 1e-4} or None


def ids_collapsed(log: Log) -> Evidence | None:
    """Of the plans trained on. A type that says as much as one fixed plan would is collapsed,
    however many ids that plan has."""
    evidence = {}
    types = zip(log.setting("plan.sizes"), log.setting("plan.lengths"), strict=True)
    for kind, (size, slots) in enumerate(types):
        keys = ("perplexity", "ids_used", "largest_share", "lengths")
        names = [f"plan_{key}.{kind}.late" for key in keys]
        perplexity, used, largest, length = map(log.figure, names)
        is_one_plan = size >= 2 * slots and perplexity <= 1.2 * max(1.0, length)
        if is_one_plan or perplexity < 0.2 * used or largest > 0.8:
            evidence |= {names[0]: perplexity, names[2]: largest}
    return evidence or None


def plans_ignored(log: Log) -> Evidence | None:
    """Where z* is worth something the executor does read plans, and it is the planner that is
    off."""
    cost, (best, _, without) = log.figure("delta_nll_shuffle.final"), _readings(log)
    ignored = cost < 0.02 and without - best < WORTH
    return {"delta_nll_shuffle.final": cost, "z* is worth": without - best} if ignored else None


def planner_far(log: Log) -> Evidence | None:
    best, own, without = _readings(log)
    if without - best < WORTH:
        raise Unmeasured(f"z* is worth only {without - best:.2g} nats")
    evidence = {"NLL with z*": best, "with its own plan": own, "without, or shuffled": without}
    return evidence if without - own < 0.2 * (without - best) else None


def _readings(log: Log) -> tuple[float, float, float]:
    """NLL with z*, with the planner's own plan, and with the better of no plan and another's: of
    held-out pairs where evaluate.json has z* of them, else of training pairs in late E-steps."""
    if number(log.final.get("nll_posterior")) is None:
        keys = ("em_nll", "em_nll_planner", "em_nll_shuffle")
        best, own, without = (log.figure(f"run.{key}.late") for key in keys)
        return best, own, without
    keys = ("nll_posterior", "nll", "delta_nll_empty", "delta_nll_shuffle")
    best, own, *costs = (log.figure(f"{key}.final") for key in keys)
    return best, own, own + min(costs)


# ---- the table ----

CONCEPTS = ("online", "compressor")
TEXT = (*CONCEPTS, "control", "skip", "window")
PLANNER = ("planner",)
EVERY = (*TEXT, *PLANNER)


@dataclass(frozen=True)
class Rule:
    name: str
    sign: str
    advice: str
    look: Callable[[Log], Evidence | None]
    """None where all is well; raises Unmeasured."""
    tries: tuple[str, ...] = ()
    """Overrides of the recipe, each to be tried on its own: see `Log.override`."""
    systems: tuple[str, ...] = CONCEPTS


def _off_target(rate: float, heldout: float, target: float, length: float) -> bool:
    # a text cannot be nearer to the rate than one concept
    return max(abs(rate - target), abs(heldout - target)) > max(0.03 * target, 1 / length)


only_first_positions = when(
    lambda first, last, end_first, end_last: (
        first - last >= 0.05 and end_first - end_last < 0.1 * (first - last)
    ),
    "heldout_nll_by_position.0.early",
    "heldout_nll_by_position.0.late",
    "heldout_nll_by_position.end.early",
    "heldout_nll_by_position.end.late",
)
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
        unfinished,
        systems=EVERY,
    ),
    Rule(
        "loss does not fall",
        "in the final stage heldout_nll falls by less than 0.02 nats, and loss by less than 0.1",
        "nothing is learned: larger steps, or more; smaller ones where it rises",
        when(
            lambda first, last, early, late: first - last < 0.02 and early - late < 0.1,
            "heldout_nll.early",
            "heldout_nll.late",
            "loss.early",
            "loss.late",
        ),
        ("learning_rate*3", "learning_rate*0.3", "steps*2"),
        EVERY,
    ),
    Rule(
        "held-out far above training",
        "heldout_nll is more than 0.5 nats above loss (without distil)",
        "memorised, or other text than data.train: more text, or text that is alike",
        when(
            lambda heldout, loss, distil: not distil and heldout - loss > 0.5,
            "heldout_nll.last",
            "loss.late",
            "recipe.distil",
        ),
        ("lora.dropout=0.1", "lora.rank*0.5", "steps*0.5"),
        TEXT,
    ),
    Rule(
        "held-out text gets worse",
        "heldout_nll ends more than 0.1 nats above its minimum, while loss falls",
        "the rest of the run memorised: stop sooner, more text, a smaller adapter",
        when(
            lambda last, best, early, late: last - best > 0.1 and late < early,
            "heldout_nll.last",
            "heldout_nll.min",
            "loss.early",
            "loss.late",
        ),
        ("steps*0.5", "lora.rank*0.5"),
        EVERY,
    ),
    Rule(
        "gradient explodes",
        "grad_norm in the last third of the run is over 3 times that of the first, and over 3",
        "smaller steps: of LoRA, or of the concepts, whichever grows",
        when(
            lambda early, late: late > max(3 * early, 3),
            "run.grad_norm.early",
            "run.grad_norm.late",
        ),
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
        when(
            _off_target,
            "rate.late",
            "heldout_rate.last",
            "target_rate.late",
            "recipe.sequence_length",
        ),
        ("calibration_tokens*2", "max_tail*2", "boundary=fixed"),
    ),
    Rule(
        "codes ignored",
        "shuffling or zeroing all codes costs less than 0.02 nats",
        "the model reads past its codes: more concepts, more bits in each, slower LoRA",
        when(
            lambda shuffle, zero: min(shuffle, zero) < 0.02,
            "delta_nll_shuffle.final",
            "delta_nll_zero.final",
        ),
        ("rate*1.5", "codes_per_concept*2", "learning_rate*0.3"),
    ),
    Rule(
        "codes collapsed",
        "code_perplexity is below 0.2 of codes_used, or largest_code_share above 0.6",
        "few codes do all the work: noise on the choice, slower codes, or fewer of them",
        when(
            lambda perplexity, used, largest: perplexity < 0.2 * used or largest > 0.6,
            "code_perplexity.late",
            "codes_used.late",
            "largest_code_share.late",
        ),
        ("gumbel=1", "concept_learning_rate*0.3", "num_concepts*0.25"),
    ),
    Rule(
        "soft and hard codes apart",
        "soft_hard_cosine is below 0.9",
        "the gradient is that of a mixture far from the code that is read: sharpen it",
        when(lambda cosine: cosine < 0.9, "soft_hard_cosine.last"),
        ("code_temperature*0.5",),
    ),
    Rule(
        "sure too early",
        "code_entropy is below 0.01 nats when first measured",
        "codes were settled before they were learned: soften the choice, or add noise",
        when(lambda entropy: entropy < 0.01, "run.code_entropy.first"),
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
        when(
            lambda margin, flips: margin < 0.5 and flips > 0.4,
            "run.em_margin.late",
            "run.em_flips.late",
        ),
        ("em.proposers.edit=4", "em.proposers.diverse=4", "em.every*0.5", "learning_rate*0.3"),
        PLANNER,
    ),
    Rule(
        "search stuck early",
        "early on em_flips is at most 0.02 and the planner's entropy at most 0.35 nats, while a "
        "pair has fewer than 3 candidates or z* is worth less than 0.1 nats",
        "the planner is sure before any search and proposes what it has: candidates that differ, "
        "a weaker or shorter start",
        when(
            lambda flips, entropy, candidates, best, shuffled: (
                flips <= 0.02 and entropy <= 0.35 and (candidates < 3 or shuffled - best < WORTH)
            ),
            "run.em_flips.early",
            "run.plan_entropy_by_slot.mean.early",
            "run.em_candidates.early",
            "run.em_nll.early",
            "run.em_nll_shuffle.early",
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
        when(
            lambda gap, margin: gap >= max(0.1, 0.25 * margin),
            "run.em_staleness.late",
            "run.em_margin.late",
        ),
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
        when(
            lambda cosine, on: bool(on) and cosine < 0.5,
            "soft_hard_cosine.last",
            "recipe.plan.straight_through",
        ),
        ("code_temperature*0.5",),
        PLANNER,
    ),
)
