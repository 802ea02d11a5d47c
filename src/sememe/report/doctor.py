"""A run folder → what is wrong with the run and what to try: the table RULES, each a sign and a
function that looks for it.

A new rule is a function and its line in RULES, of planners in doctor_plans.py. It gets the run and
its limits, and returns a Finding, or None where all is well, or raises Unknown where the run has
not measured what it needs. How to read the figures: docs/doctor.md."""

import math
from pathlib import Path
from statistics import fmean, median, pvariance
from typing import Any

from sememe.report.case import (
    Case,
    Finding,
    Rule,
    Unknown,
    gradient_parts,
    logged,
    read_case,
    thirds,
)
from sememe.report.doctor_plans import PLAN_RULES
from sememe.report.values import number

# ---- of every system ----


def not_finite(case: Case, limit: dict) -> Finding | None:
    stopped = case.lines[-1].get("stopped")
    if not case.damaged and not stopped:
        return None
    said = f"training stopped: {stopped.split('. try:')[0]}" if stopped else "a figure is no number"
    tries = (
        case.scaled("learning_rate", 0.1),
        *(() if case.recipe["precision"] == "fp32" else ("precision=fp32",)),
    )
    return Finding(dict(case.damaged), said, tries, case.lines[-1]["step"])


def unfinished(case: Case, limit: dict) -> Finding | None:
    if case.finished:
        return None
    step = case.lines[-1]["step"]
    said = f"still training, or broken off; `sememe train {case.path / 'recipe.yaml'} --out {case.path}` goes on"
    return Finding({"steps": case.recipe["steps"]}, said, (), step)


def loss_flat(case: Case, limit: dict) -> Finding | None:
    """Held-out text is the same each time; training loss has the noise of its batches."""
    early, late = thirds([loss for _, loss in case.points("loss")], "loss")
    fall, noise = (
        fmean(early) - fmean(late),
        2 * math.sqrt(pvariance(early) / len(early) + pvariance(late) / len(late)),
    )
    heldout = [value for _, value in logged(case.stage, "heldout_nll")]
    heldout_fall = heldout[0] - heldout[-1] if len(heldout) > 1 else None
    if fall >= max(limit["nats"], noise) or (
        heldout_fall is not None and heldout_fall >= limit["nats"]
    ):
        return None
    if heldout_fall is None and abs(fall) < noise:
        raise Unknown(
            f"loss moves by {fall:.2g} with a noise of {noise:.2g}, and heldout_nll is not "
            "measured twice"
        )
    evidence = {"loss early": fmean(early), "loss late": fmean(late)}
    if heldout_fall is not None:
        evidence |= {"heldout_nll early": heldout[0], "heldout_nll late": heldout[-1]}
    rises = (fall if heldout_fall is None else heldout_fall) < -limit["nats"]
    return Finding(
        evidence,
        "it rises: smaller steps" if rises else "nothing is learnt: larger steps, or more of them",
        (case.scaled("learning_rate", 0.3 if rises else 3), case.scaled("steps", 2)),
        case.stage[-1]["step"],
    )


def heldout_gap(case: Case, limit: dict) -> Finding | None:
    if case.recipe.get("distil"):
        raise Unknown("with distil the training loss is more than NLL")
    (step, heldout), loss = case.points("heldout_nll")[-1], fmean(case.late("loss"))
    if heldout - loss <= limit["nats"]:
        return None
    dropout = () if case.recipe["lora"]["dropout"] else ("lora.dropout=0.1",)
    return Finding(
        {"heldout_nll": heldout, "loss": loss},
        "learnt by heart, or other text than data.train: more text, or text that is alike",
        (*dropout, case.scaled("lora.rank", 0.5), case.scaled("steps", 0.5)),
        step,
    )


def heldout_rises(case: Case, limit: dict) -> Finding | None:
    """Where the training loss rises as well it is no learning by heart."""
    found = logged(case.stage, "heldout_nll")
    if len(found) < 2:
        raise Unknown("heldout_nll is not measured twice in the final stage")
    (at, best), (step, last) = min(found, key=lambda one: one[1]), found[-1]
    before, behind = (
        [loss for when, loss in logged(case.stage, "loss") if (when <= at) == early]
        for early in (True, False)
    )
    if last - best <= limit["nats"] or (before and fmean(behind) >= fmean(before)):
        return None
    return Finding(
        {"heldout_nll at best": best, "at step": at, "heldout_nll at last": last},
        "the rest of the run was learnt by heart: stop sooner, more text, a smaller adapter",
        (f"steps={at}", case.scaled("lora.rank", 0.5)),
        step,
    )


def gradient_explodes(case: Case, limit: dict) -> Finding | None:
    early, late = thirds([norm for _, norm in logged(case.lines, "grad_norm")], "grad_norm")
    if median(late) <= max(limit["growth"] * median(early), limit["clips"]):
        return None
    parts = {
        part: median(norms) for part, norms in gradient_parts(case.lines[-len(late) :]).items()
    }
    most = max(parts, key=parts.get, default="lora")
    keys = (
        ("learning_rate",)
        if most in ("lora", "planner", "executor")
        else ("concept_learning_rate", "learning_rate")
    )
    return Finding(
        {"grad_norm early": median(early), "grad_norm late": median(late)},
        f"mostly that of {most}: smaller steps",
        tuple(case.scaled(key, 0.3) for key in keys),
        case.lines[-1]["step"],
    )


def no_gradient(case: Case, limit: dict) -> Finding | None:
    shares = {
        part: median(found) for part, found in gradient_parts(case.stage, of_whole=True).items()
    }
    if not shares:
        raise Unknown(
            "no grad_norm of single modules at the final rate and quantise in metrics.jsonl"
        )
    dead = {
        f"grad_norm_{part} / grad_norm": share
        for part, share in shares.items()
        if share < limit["share"]
    }
    if not dead:
        return None
    return Finding(
        dead,
        "what gets no gradient learns nothing; codes that are chosen too surely give none: soften "
        "the choice",
        (_softer(case), "gumbel=1"),
        case.stage[-1]["step"],
    )


def _softer(case: Case) -> str:
    return (
        "code_temperature=1"
        if case.recipe["code_temperature"] < 1
        else case.scaled("code_temperature", 2)
    )


# ---- of online concepts ----


def rate_off_dial(case: Case, limit: dict) -> Finding | None:
    asked, found = case.recipe["rate"], {"rate": fmean(case.late("rate"))}
    if any("heldout_rate" in line for line in case.stage):
        found["heldout_rate"] = case.points("heldout_rate")[-1][1]
    worst = max(found.values(), key=lambda rate: abs(rate - asked))
    if abs(worst - asked) <= _slack(case, limit):
        return None
    tries = (
        case.scaled("calibration_tokens", 2),
        *((case.scaled("max_tail", 2),) if worst > asked else ()),
        "boundary=fixed",
    )
    return Finding(
        {"target_rate": asked, **found},
        "the gate does not hold it: more text to set the gate from, longer tails "
        "where concepts are forced too often, or the stride",
        tries,
        case.stage[-1]["step"],
    )


def rates_differ(case: Case, limit: dict) -> Finding | None:
    (step, heldout), trained = case.points("heldout_rate")[-1], fmean(case.late("rate"))
    if abs(trained - heldout) <= _slack(case, limit):
        return None
    return Finding(
        {"rate": trained, "heldout_rate": heldout},
        "the gate is used otherwise than it was trained: more text to set it from, or the stride",
        (case.scaled("calibration_tokens", 2), "boundary=fixed"),
        step,
    )


def _slack(case: Case, limit: dict) -> float:
    """A row cannot be nearer to the rate than one concept."""
    return max(limit["percent"] / 100 * case.recipe["rate"], 1 / case.recipe["sequence_length"])


def codes_ignored(case: Case, limit: dict) -> Finding | None:
    costs, step = case.final("delta_nll_shuffle", "delta_nll_zero")
    if min(costs.values()) >= limit["nats"]:
        return None
    stages = case.recipe.get("codes_per_concept", 1)
    richer = (f"codes_per_concept={stages + 1}",) if stages < 4 else ()
    return Finding(
        costs,
        "the model reads past its codes: more concepts, more bits in each, or LoRA that learns "
        "more slowly",
        (case.denser(), *richer, case.scaled("learning_rate", 0.3)),
        step,
    )


def codes_collapsed(case: Case, limit: dict) -> Finding | None:
    late = {
        key: median(case.late(key))
        for key in ("code_perplexity", "codes_used", "largest_code_share")
    }
    if (
        late["code_perplexity"] >= limit["share"] * late["codes_used"]
        and late["largest_code_share"] <= limit["largest"]
    ):
        return None
    return Finding(
        late,
        "few codes do all the work: noise on the choice, codes that learn more "
        "slowly, or fewer of them",
        (
            "gumbel=1",
            case.scaled("concept_learning_rate", 0.3),
            case.scaled("num_concepts", 0.25, least=2),
        ),
        case.stage[-1]["step"],
    )


def soft_hard_apart(case: Case, limit: dict) -> Finding | None:
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
        "the gradient is that of a mixture far from the code that is used: sharpen it",
        (sharper,),
        step,
    )


def sure_too_early(case: Case, limit: dict) -> Finding | None:
    first = next(
        (line for line in case.lines if number(line.get("code_entropy")) is not None), None
    )
    if first is None:
        raise Unknown("no code_entropy in metrics.jsonl")
    if first["code_entropy"] >= limit["nats"]:
        return None
    return Finding(
        {key: first[key] for key in ("code_entropy", "code_max_prob") if key in first},
        "the choice of codes was settled before it was learnt: soften it, or add noise",
        (_softer(case), "gumbel=1"),
        first["step"],
    )


def only_opening(case: Case, limit: dict) -> Finding | None:
    measured = [line for line in case.stage if line.get("heldout_nll_by_position")]
    first, last = ((measured[i]["heldout_nll_by_position"] if measured else []) for i in (0, -1))
    if len(measured) < 2 or len(first) < 2:
        raise Unknown(
            "heldout_nll_by_position is not measured twice, on more than 64 positions, at the "
            "final rate and quantise"
        )
    opening, *others = (before - after for before, after in zip(first, last, strict=True))
    if opening < limit["nats"] or fmean(others) >= limit["share"] * opening:
        return None
    return Finding(
        {"fall of the first bucket": opening, "fall of the others": fmean(others)},
        "the concepts serve the opening alone: shorter texts first, or more concepts in a text",
        (case.scaled("sequence_length", 0.5, least=8), case.denser()),
        measured[-1]["step"],
    )


PLANLESS = ("online", "control", "skip", "window")
EVERY = (*PLANLESS, "planner")
RULES = (
    Rule(
        "not finite",
        "a figure is no finite number, or training stopped over one",
        {},
        not_finite,
        EVERY,
    ),
    Rule("unfinished", "there is no model/manifest.json", {}, unfinished, EVERY),
    Rule(
        "loss does not fall",
        "in the final stage neither loss (first third to last third, beyond its noise) nor "
        "heldout_nll "
        "(first to last) falls by {nats} nats",
        {"nats": 0.02},
        loss_flat,
        EVERY,
    ),
    Rule(
        "held-out far above training",
        "heldout_nll is more than {nats} nats above loss",
        {"nats": 0.5},
        heldout_gap,
        PLANLESS,
    ),
    Rule(
        "held-out text gets worse",
        "in the final stage heldout_nll ends more than {nats} nats above its least, while loss "
        "falls",
        {"nats": 0.1},
        heldout_rises,
        EVERY,
    ),
    Rule(
        "gradient explodes",
        "grad_norm in the last third of the run is over {growth} times that of the first and over "
        "{clips} "
        "(medians; it is clipped at 1)",
        {"growth": 3, "clips": 3},
        gradient_explodes,
        EVERY,
    ),
    Rule(
        "no gradient",
        "a module's norm is below {share} of grad_norm (median)",
        {"share": 1e-4},
        no_gradient,
        PLANLESS,
    ),
    Rule(
        "rate off the dial",
        "rate or heldout_rate is more than {percent} % and one concept per text off the recipe's",
        {"percent": 3},
        rate_off_dial,
    ),
    Rule(
        "train rate is not held-out rate",
        "rate and heldout_rate differ by more than {percent} % of the recipe's and one "
        "concept per text",
        {"percent": 5},
        rates_differ,
    ),
    Rule(
        "codes ignored",
        "shuffling or zeroing all codes costs less than {nats} nats",
        {"nats": 0.02},
        codes_ignored,
    ),
    Rule(
        "codes collapsed",
        "code_perplexity is below {share} of codes_used, or largest_code_share above {largest}",
        {"share": 0.2, "largest": 0.6},
        codes_collapsed,
    ),
    Rule(
        "soft and hard codes apart",
        "soft_hard_cosine is below {cosine}",
        {"cosine": 0.9},
        soft_hard_apart,
    ),
    Rule(
        "sure too early",
        "code_entropy is below {nats} nats when first measured",
        {"nats": 0.01},
        sure_too_early,
    ),
    Rule(
        "only the opening improves",
        "in the final stage the first 64 positions improve by {nats} nats or more, the others by "
        "less than {share} of that",
        {"nats": 0.05, "share": 0.1},
        only_opening,
    ),
    *PLAN_RULES,
)


def examine(run: Path) -> dict[str, Any]:
    """What every rule for its system says of a run folder.

    Raises CheckpointError or RecipeError where `run` is none, or has logged nothing yet.
    """
    case = read_case(run)
    findings, passed, unchecked = [], [], []
    for rule in RULES:
        if case.recipe["system"] not in rule.systems:
            continue
        try:
            found = rule.look(case, rule.limit)
        except Unknown as missing:
            unchecked.append({"rule": rule.name, "because": str(missing)})
            continue
        if found is None:
            passed.append(rule.name)
        else:
            findings.append(
                {
                    "rule": rule.name,
                    "sign": rule.sign.format(**rule.limit),
                    "evidence": found.evidence,
                    "step": found.step,
                    "advice": found.advice,
                    "try": [x for x in found.tries if case.changes(x)],
                }
            )
    return {
        "run": str(run),
        "system": case.recipe["system"],
        "step": case.lines[-1]["step"],
        "healthy": not findings,
        "findings": findings,
        "passed": passed,
        "unchecked": unchecked,
    }
