"""Each key of a planner's files, as meanings.py has them for other systems; and the figures drawn
over its steps."""

from sememe.report.meanings import EVALUATE as OF_ALL
from sememe.report.meanings import METRICS as OF_TRAINING
from sememe.report.meanings import Instrument, Panel

MOST_TYPES = 5  # that are drawn over the steps: each has a look of its own

GIVEN: dict[str, str] = {
    "planner": "the planner's own plan",
    "posterior": "z*, found with the target in view",
    "shuffle": "plans shuffled",
    "random": "random plans",
    "empty": "no plan",
    "source (control)": "the source itself (control)",
}
"""What a target was read from → how the page says it."""

EVALUATE: dict[str, tuple[str, str]] = {
    "data": ("", "the pairs that were evaluated"),
    "pairs": ("count", "pairs of a source and a target"),
    "tokens": ("count", "target tokens that were predicted"),
    "nll": (
        "nats",
        "mean surprise per target token, written from the planner's own plan; lower is better",
    ),
    "nll_posterior": (
        "nats",
        "the same from z*, the best plan found with the target in view: what a planner could reach",
    ),
    "control_nll": ("nats", "the same of the control, which sees the source"),
    "bits_per_byte": OF_ALL["bits_per_byte"],
    "delta_nll_control": ("delta", "NLL minus that of the control"),
    "delta_nll_empty": ("delta", "what NLL rises by without a plan"),
    "delta_nll_shuffle": (
        "delta",
        "what NLL rises by when ids are shuffled within each type over all plans",
    ),
    "delta_nll_random": ("delta", "what NLL rises by when ids are random"),
    "delta_nll_zero": ("delta", "what NLL rises by when all concepts say nothing, in their places"),
    "plan_sizes": ("", "ids of each type"),
    "plan_most": ("", "concepts of each type at most"),
    "plan_lengths": ("", "concepts of each type in a plan of the planner, on average"),
    "posterior_lengths": ("", "the same in z*"),
    "plan_ids_used": ("", "ids of each type that occur at all"),
    "plan_perplexity": ("", "as varied as this many ids of the type used equally often"),
    "plan_entropy": ("nats", "how undecided the planner is where it writes; 0 is certain"),
    "plan_max_prob": ("share", "probability that it gives its first choice"),
    "soft_hard_cosine": OF_TRAINING["soft_hard_cosine"],
    "soft_hard_distance": OF_TRAINING["soft_hard_distance"],
    "answers": ("count", "targets written and compared by their last sentence"),
    **{key: OF_ALL[key] for key in ("by_data", "model", "control", "tokens_asked")},
    "system": ("", "planner: what is written is planned first"),
}
EVALUATE_DRAWN = frozenset({"nll_by_position", "samples", "given", "signals"})

METRICS: dict[str, tuple[str, str]] = {
    "step": ("count", "optimiser steps done"),
    "tokens": ("count", "source and target tokens trained on"),
    "seconds": ("time", "time spent"),
    "loss": ("nats", "training loss: nats per target token, and the plan's by its weight"),
    "target_nll": ("nats", "nats per target token, with z*"),
    "signal_nll": (
        "nats",
        "nats per label, summed over the signals, of the probes that read them off the plan",
    ),
    "plan_nll": ("nats", "nats per concept of z*, which the planner is to write"),
    "plan_match": ("share", "places of z* where it is the planner's first choice"),
    "heldout_nll": ("nats", "nats per target token of held-out pairs, with the planner's own plan"),
    "heldout_nll_shuffle": ("nats", "the same with plans shuffled"),
    "heldout_nll_random": ("nats", "the same with random plans"),
    "heldout_nll_empty": ("nats", "the same without a plan"),
    **{
        key: EVALUATE[key]
        for key in (
            "delta_nll_shuffle",
            "delta_nll_random",
            "delta_nll_empty",
            "plan_entropy",
            "plan_max_prob",
            "soft_hard_cosine",
            "soft_hard_distance",
        )
    },
    "plan_lengths": ("", "concepts of each type in z*, on average"),
    "plan_ids_used": ("", "ids of each type that occur in z* since the last line"),
    "plan_perplexity": ("", "as varied as this many ids of the type used equally often"),
    "plan_largest_share": ("", "share of each type's most frequent id"),
    "heldout_plan_lengths": ("", "concepts of each type in the planner's plans of held-out pairs"),
    "heldout_plan_ids_used": ("", "ids of each type that occur in them"),
    "heldout_plan_perplexity": ("", "as varied as this many ids"),
    "em_score": ("nats", "S of z*: log p(y | z) and the priced log p(z | u), nats per pair"),
    "em_target": ("nats", "log p(y | z*) alone"),
    "em_plan": ("nats", "log p(z* | u) alone"),
    "em_margin": ("nats", "S of the best plan over that of the second best"),
    "em_flips": ("share", "pairs whose plan the search changed"),
    "em_edits": ("", "ids that such a change touches, on average"),
    "em_staleness": ("nats", "what the new plans score above the old ones, both scored now"),
    "em_entropy": ("nats", "how undecided S is between the candidates"),
    "em_candidates": ("", "different candidates of a pair"),
    "em_nll": ("nats", "nats per target token of a few training pairs, with z*"),
    "em_nll_planner": ("nats", "the same with the planner's own plan"),
    "em_nll_shuffle": ("nats", "the same with z* shuffled over them"),
    **{
        f"em_by_{name}": ("share", f"changes that came from {what}")
        for name, what in (
            ("beam", "the planner's beam"),
            ("diverse", "its diverse beam"),
            ("sample", "its samples"),
            ("edit", "edits"),
            ("gradient", "swaps along the gradient"),
        )
    },
    "em_examples": ("count", "pairs searched"),
    "em_seconds": ("time", "time that the search took"),
    "learning_rate": OF_TRAINING["learning_rate"],
    "grad_norm": OF_TRAINING["grad_norm"],
    "grad_norm_planner": ("", "length of the gradient of the planner's adapter"),
    "grad_norm_executor": ("", "length of the gradient of the executor's adapter"),
    "grad_norm_plans": ("", "length of the gradient of the concepts, their heads and separators"),
    "grad_norm_probes": (
        "",
        "length of the gradient of the queries that write several concepts at once",
    ),
}
METRICS_DRAWN = frozenset(
    {"heldout_nll_by_position", "plan_entropy_by_slot", "plan_max_prob_by_slot"}
)


def instruments(types: int) -> tuple[Instrument, ...]:
    """Drawn over the steps, where their keys are in metrics.jsonl; `key.i` is the i-th entry of a
    list, one for each type."""

    def of_types(key: str) -> dict[str, str]:
        return {f"{key}.{i}": f"type {i}" for i in range(min(types, MOST_TYPES))}

    return (
        Instrument(
            "Cost of other plans",
            "What NLL on held-out pairs rises by with plans that lie, and without any: near 0 for "
            "shuffled, the text is written "
            "past its plan; near 0 for none, the planner's plans are worth nothing.",
            (
                Panel(
                    "NLL rises by (nats)",
                    {
                        "delta_nll_shuffle": "shuffled",
                        "delta_nll_random": "random",
                        "delta_nll_empty": "none",
                    },
                ),
            ),
        ),
        Instrument(
            "Text and plan",
            "Surprise of the text given z*, and of z* given the source. Each search may lift the "
            "second, since its plans are new "
            "to the planner; a plan that stays a surprise is one that the source does not tell.",
            (
                Panel("nats per token", {"target_nll": "text"}),
                Panel("nats per concept", {"plan_nll": "plan"}),
            ),
        ),
        Instrument(
            "Planner against z*",
            "Surprise of the same few training texts, written from z*, from the planner's own "
            "plan, and from another's z*. The "
            "planner should stand near z*; at or above the shuffled line, its plans are no better "
            "than another text's.",
            (
                Panel(
                    "nats per token",
                    {
                        "em_nll": "z*",
                        "em_nll_planner": "planner's plan",
                        "em_nll_shuffle": "shuffled",
                    },
                ),
            ),
        ),
        Instrument(
            "Score of the search",
            "S of the best plans found, and its two parts: of the text, and of the plan. S rises "
            "while the model learns.",
            (Panel("nats per pair", {"em_score": "S", "em_target": "text", "em_plan": "plan"}),),
        ),
        Instrument(
            "Margin and flips",
            "By how much the best plan beats the second best, and how many plans a search changes. "
            "Flips should fall and the "
            "margin settle: no margin and many flips, the search cannot decide; no flips at all "
            "from the start, it may be stuck.",
            (
                Panel("margin (nats)", {"em_margin": "margin"}),
                Panel("share", {"em_flips": "flips"}),
            ),
        ),
        Instrument(
            "Staleness gap",
            "What the new plans score above the old ones at the same moment. Large throughout: "
            "what is trained on lies behind "
            "what would be found now, so search more often or learn more slowly.",
            (Panel("nats per pair", {"em_staleness": "gap"}),),
        ),
        Instrument(
            "How sure the planner is",
            "Entropy at each concept it writes, the probability of its first choice, and how often "
            "that is z*'s: certain early, "
            "the search finds nothing new; undecided to the end, the plan is not told by the "
            "source.",
            (
                Panel("entropy (nats)", {"plan_entropy": "entropy"}),
                Panel("share", {"plan_max_prob": "first choice", "plan_match": "it is z*'s"}),
            ),
        ),
        Instrument(
            "Ids in use",
            "As varied as how many ids used equally often, of each type, in the plans trained on: "
            "near the concepts of a single "
            "plan, all texts have the same one.",
            (Panel("perplexity", of_types("plan_perplexity"), log=True),),
        ),
        Instrument(
            "Soft mixture against concept",
            "With straight-through the gradient sees the soft mixture and the text is written from "
            "the concept: a cosine that "
            "stays low means that training improves something else than what is used.",
            (
                Panel("cosine", {"soft_hard_cosine": "cosine"}),
                Panel("distance", {"soft_hard_distance": "distance"}),
            ),
        ),
        Instrument(
            "Gradient norms",
            "Length of the gradient, before clipping, of everything and of each module: near 0, a "
            "module learns nothing (the "
            "planner in its warm-up); growing without end, the learning rate is too high.",
            (
                Panel(
                    "norm",
                    {
                        "grad_norm": "all",
                        "grad_norm_planner": "planner",
                        "grad_norm_executor": "executor",
                        "grad_norm_plans": "concepts",
                        "grad_norm_probes": "queries",
                    },
                    log=True,
                ),
            ),
        ),
    )
