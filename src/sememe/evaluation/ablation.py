"""What concepts are worth: NLL over the share of them that is dropped, and with all of them zeroed
or exchanged (RUN/ablate.json). Of text as it is written, and of a planner's plans."""

import re
import statistics
from collections.abc import Callable, Sequence

from torch import Tensor

from sememe.concepts.ablation import ablate
from sememe.concepts.plan import NULL as NO_CONCEPT
from sememe.concepts.writer import NULL
from sememe.errors import CheckpointError
from sememe.evaluation.plans import IGNORED, mean_nll, other_plans, plan_samples, target_nll
from sememe.evaluation.quality import BATCH, token_nll
from sememe.evaluation.results import Figures
from sememe.evaluation.subject import Subject
from sememe.models.planner.em import greedy_plans
from sememe.progress import bar

KINDS = ("zero", "shuffle", "random", "swap")
PLAN_KINDS = ("zero", "empty", "shuffle", "random", "swap")
DRAWN = ("shuffle", "random", "drop")  # those that a seed makes a difference to
SHARES = tuple(tenth / 10 for tenth in range(1, 10))  # of the concepts that are dropped
SEEDS = 3
WRITTEN = 8  # pairs whose plans are swapped and written out
DELTAS = ("delta_nll", "delta_nll_min", "delta_nll_max")


def cost_curve(kinds: Sequence[str], nll: Callable[[str, float, int], float]) -> Figures:
    """ΔNLL of each kind of ablation, and of dropping each share of the concepts: mean, smallest and
    largest over the seeds. `nll`: (kind, share, seed) → nats per token."""
    plain = nll("drop", 0.0, 0)
    jobs = [(kind, 1.0) for kind in kinds] + [("drop", share) for share in SHARES]
    costs = {}
    for kind, share in bar(iterable=jobs, desc="ablate", unit="ablation"):
        draws = range(SEEDS if kind in DRAWN else 1)
        deltas = [nll(kind, share, seed) - plain for seed in draws]
        values = (statistics.fmean(deltas), min(deltas), max(deltas))
        costs[kind, share] = dict(zip(DELTAS, values, strict=True))
    none = {"share": 0.0} | dict.fromkeys(DELTAS, 0.0)
    return {
        "seeds": SEEDS,
        "nll": plain,
        "drop": [none, *({"share": share} | costs["drop", share] for share in SHARES)],
        **{kind: costs[kind, 1.0] for kind in kinds},
    }


def ablate_text(subject: Subject, data: str) -> Figures:
    """`cost_curve` of a model with concepts on a text; the gate decides as before, so the same
    positions write. Of one seed, a larger share drops the same concepts and more.

    Raises CheckpointError where none of its concepts has a code."""
    ids_NT = subject.heldout(data, min_rows=2).ids_NT
    model, batch = subject.model, BATCH
    while len(ids_NT) % batch == 1:  # no batch of one row: `swap` takes the codes of the next one
        batch += 1
    nll_NT, concepts_NT = token_nll(model, ids_NT, batch)
    coded = _some(concepts_NT >= 0, subject)

    def nll(kind: str, share: float, seed: int) -> float:
        spec = f"{kind}:{share}@{seed}" if kind == "drop" else f"{kind}@{seed}"
        return float(token_nll(model, ids_NT, batch, spec)[0].mean())

    return {
        "tokens": nll_NT.numel(),
        "sequence_length": ids_NT.shape[1],
        "batch": batch,
        "target_rate": model.dial.rate,
        "concept_rate": float((concepts_NT != NULL).double().mean()),
        "coded_concepts": coded,
        **cost_curve(KINDS, nll),
    }


def ablate_plans(subject: Subject, data: str) -> Figures:
    """`cost_curve` of a planner's own plans, and texts written from another pair's plan. A dropped
    concept keeps its place and says nothing (`zero`: all of them); an `empty` plan has no place
    either.

    Raises CheckpointError where the planner writes only empty plans."""
    pairs = subject.heldout(data, min_rows=2)
    model = subject.model
    plan_NP = greedy_plans(model, pairs)
    there_NP = plan_NP != NO_CONCEPT
    coded = _some(there_NP, subject)

    def nll(kind: str, share: float, seed: int) -> float:
        other_NP, dropped_NP = plan_NP, None
        if kind in ("zero", "drop"):
            dropped_NP = ablate(plan_NP, there_NP, f"drop:{share}@{seed}", 0)[1]
        else:
            other_NP = other_plans(plan_NP, model.plans.shape, kind, seed)
        return mean_nll(target_nll(model, pairs, other_NP, dropped_NP), pairs)

    return {
        "tokens": int((pairs.target_NY != IGNORED).sum()),
        "pairs": len(pairs),
        "coded_concepts": coded,
        **cost_curve(PLAN_KINDS, nll),
        **_swapped(subject, pairs.rows(slice(0, WRITTEN)), plan_NP[:WRITTEN]),
    }


def _some(coded: Tensor, subject: Subject) -> int:
    if not coded.any():
        raise CheckpointError(
            f"{subject.name} writes no codes on this text: need some to ablate. try: a finished "
            "run, or more text"
        )
    return int(coded.sum())


def _swapped(subject: Subject, pairs, plan_NP: Tensor) -> Figures:
    """Texts written from the next pair's plan, and `content`: the mean share of the words of the
    row's own target, and of the one whose plan it is, that occur in them."""
    other_NP = other_plans(plan_NP, subject.model.plans.shape, "swap")
    samples = plan_samples(subject.model, subject.tokenizer, pairs, other_NP)
    for sample, other in zip(samples, samples[1:] + samples[:1], strict=True):
        sample["plan_of"] = other["source"]
        sample["own_words"] = _shared(sample["written"], sample["target"])
        sample["plans_words"] = _shared(sample["written"], other["target"])
    content = {
        key: statistics.fmean(sample[key] for sample in samples)
        for key in ("own_words", "plans_words")
    }
    return {"content": content, "samples": samples}


def _shared(text: str, target: str) -> float:
    """Share of the target's different words that occur in the text."""
    words, targets = (set(re.findall(r"\w+", x.lower())) for x in (text, target))
    return len(words & targets) / max(1, len(targets))
