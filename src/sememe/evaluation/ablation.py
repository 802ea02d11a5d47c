"""What concepts are worth: NLL over the share of them that is dropped, and with all of them zeroed
or exchanged (RUN/ablate.json). Of text as it is written, and of a planner's plans."""

import statistics
from collections.abc import Callable, Sequence

from torch import Tensor

from sememe.concepts.ablation import ablate
from sememe.concepts.plan import NULL
from sememe.errors import CheckpointError
from sememe.evaluation.plans import IGNORED, mean_nll, other_plans, plan_samples, target_nll
from sememe.evaluation.quality import BATCH, mean, realised_rate, token_nll
from sememe.evaluation.results import Figures
from sememe.evaluation.subject import Subject
from sememe.models.planner.em import greedy_plans
from sememe.progress import bar

KINDS = ("zero", "shuffle", "random", "swap")
PLAN_KINDS = ("zero", "empty", "shuffle", "random", "swap")
DRAWN = ("shuffle", "random", "drop")  # those that a seed makes a difference to
SHARES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)  # of the concepts that are dropped
SEEDS = 3
WRITTEN = 8  # pairs whose plans are swapped and written out


def cost_curve(
    name: str, coded: Tensor, kinds: Sequence[str], nll: Callable[[str, float, int], float]
) -> Figures:
    """ΔNLL of each kind of ablation, and of dropping each share of the concepts: mean, smallest and
    largest over the seeds. `coded`: where a concept has a code. `nll`: (kind, share, seed) → nats
    per token.

    Raises CheckpointError where there is no code."""
    if not coded.any():
        raise CheckpointError(
            f"{name} writes no codes on this text: need some to ablate. try: a finished run, or "
            "more text"
        )
    plain = nll("drop", 0.0, 0)

    def cost(kind: str, share: float = 1.0) -> Figures:
        draws = range(SEEDS if kind in DRAWN and share else 1)
        deltas = [nll(kind, share, seed) - plain for seed in draws]
        mean = statistics.fmean(deltas)
        return {"delta_nll": mean, "delta_nll_min": min(deltas), "delta_nll_max": max(deltas)}

    return {
        "coded_concepts": int(coded.sum()),
        "seeds": SEEDS,
        "nll": plain,
        "drop": [
            {"share": share} | cost("drop", share)
            for share in bar(iterable=SHARES, desc="drop", unit="share")
        ],
        **{kind: cost(kind) for kind in bar(iterable=kinds, desc="ablate", unit="kind")},
    }


def ablate_text(subject: Subject, data: str) -> Figures:
    """`cost_curve` of a model with concepts on a text; the gate decides as before, so the same
    positions write. Of one seed, a larger share drops the same concepts and more."""
    blocks = subject.heldout(data, min_rows=2)
    ids_NT, counted = blocks.ids_NT, {"counted_NT": blocks.counted_NT}
    model, batch = subject.model, BATCH
    while len(ids_NT) % batch == 1:  # no batch of one row: `swap` takes the codes of the next one
        batch += 1
    nll_NT, concepts_NT = token_nll(model, ids_NT, batch, **counted)

    def nll(kind: str, share: float, seed: int) -> float:
        spec = f"{kind}:{share}@{seed}" if kind == "drop" else f"{kind}@{seed}"
        return mean(token_nll(model, ids_NT, batch, **counted, ablation=spec)[0])

    return {
        "tokens": int((~nll_NT.isnan()).sum()),
        "sequence_length": ids_NT.shape[1],
        "batch": batch,
        **realised_rate(concepts_NT, model.dial.rate),
        **cost_curve(subject.name, concepts_NT >= 0, KINDS, nll),
    }


def ablate_plans(subject: Subject, data: str) -> Figures:
    """`cost_curve` of a planner's own plans, and texts written from another pair's plan. A dropped
    concept keeps its place and says nothing (`zero`: all of them); an `empty` plan has no place
    either."""
    pairs = subject.heldout(data, min_rows=2)
    model = subject.model
    plan_NP = greedy_plans(model, pairs)
    there_NP = plan_NP != NULL

    def nll(kind: str, share: float, seed: int) -> float:
        if kind in ("zero", "drop"):
            dropped_NP = ablate(plan_NP, there_NP, f"drop:{share}@{seed}", 0)[1]
            nll_NY = target_nll(model, pairs, plan_NP, dropped_NP)
        else:
            nll_NY = target_nll(model, pairs, other_plans(plan_NP, model.plans.shape, kind, seed))
        return mean_nll(nll_NY, pairs)

    return {
        "tokens": int((pairs.target_NY != IGNORED).sum()),
        "pairs": len(pairs),
        **cost_curve(subject.name, there_NP, PLAN_KINDS, nll),
        "samples": _swapped(subject, pairs.rows(slice(0, WRITTEN)), plan_NP[:WRITTEN]),
    }


def _swapped(subject: Subject, pairs, plan_NP: Tensor) -> list[Figures]:
    """Texts written from the next pair's plan."""
    other_NP = other_plans(plan_NP, subject.model.plans.shape, "swap")
    samples = plan_samples(subject.model, subject.tokenizer, pairs, other_NP)
    for sample, other in zip(samples, samples[1:] + samples[:1], strict=True):
        sample["plan_of"] = other["source"]
    return samples
