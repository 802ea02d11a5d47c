"""What concepts are worth: NLL over the share of them that is dropped, and with all of them zeroed
or exchanged (RUN/ablate.json). Of text as it is written, and of a planner's plans."""

import re
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from sememe.concepts.plan import NULL as NO_CONCEPT
from sememe.concepts.writer import NULL
from sememe.errors import CheckpointError
from sememe.evaluation.answers import texts_of
from sememe.evaluation.plans import (
    IGNORED,
    mean_nll,
    other_plans,
    planned,
    target_nll,
)
from sememe.evaluation.quality import token_nll
from sememe.evaluation.results import Figures
from sememe.evaluation.subject import Options, Subject
from sememe.progress import bar

KINDS = ("zero", "shuffle", "random", "swap")
PLAN_KINDS = ("zero", "empty", "shuffle", "random", "swap")
DRAWN = ("shuffle", "random", "drop")  # those that a seed makes a difference to
WRITTEN = 8  # pairs whose plans are swapped and written out
DELTAS = ("delta_nll", "delta_nll_min", "delta_nll_max")


def cost_curve(
    options: Options, kinds: Sequence[str], plain: float, nll: Callable[[str, float, int], float]
) -> Figures:
    """ΔNLL to `plain` of each kind of ablation, and of dropping each share of the concepts: mean,
    smallest and largest over the seeds. `nll`: (kind, share, seed) → nats per token."""
    shares = sorted(set(options.shares))
    jobs = [(kind, 1.0) for kind in kinds]
    jobs += [("drop", share) for share in shares if 0 < share < 1]
    costs = {("drop", 0.0): dict.fromkeys(DELTAS, 0.0)}
    for kind, share in bar(iterable=jobs, desc="ablate", unit="ablation"):
        draws = range(options.seeds if kind in DRAWN else 1)
        deltas = [nll(kind, share, seed) - plain for seed in draws]
        values = (sum(deltas) / len(deltas), min(deltas), max(deltas))
        costs[kind, share] = dict(zip(DELTAS, values, strict=True))
    costs["drop", 1.0] = costs["zero", 1.0]
    return {
        "seeds": options.seeds,
        "nll": plain,
        "drop": [{"share": share} | costs["drop", share] for share in shares],
        **{kind: costs[kind, 1.0] for kind in kinds},
    }


def ablate_text(subject: Subject, data: str) -> Figures:
    """`cost_curve` of a model with concepts on a text; the gate decides as before, so the same
    positions write. Of one seed, a larger share drops the same concepts and more.

    Raises CheckpointError where none of its concepts has a code."""
    ids_NT = subject.blocks(data, min_rows=2).ids_NT
    model, batch = subject.model, subject.options.batch or 4
    while len(ids_NT) % batch == 1:  # no batch of one row: `swap` takes the codes of the next one
        batch += 1
    nll_NT, concepts_NT = token_nll(model, ids_NT, batch)
    coded = _some(int((concepts_NT >= 0).sum()), subject)

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
        **cost_curve(subject.options, KINDS, float(nll_NT.mean()), nll),
    }


def ablate_plans(subject: Subject, data: str) -> Figures:
    """`cost_curve` of a planner's own plans, and texts written from another pair's plan. A dropped
    concept keeps its place and says nothing (`zero`: all of them); an `empty` plan has no place
    either.

    Raises CheckpointError where the planner writes only empty plans."""
    subject.refuse("sequence_length", "a model of running text")
    pairs = subject.pairs(data, min_rows=2)
    model, batch = subject.model, subject.options.batch or 8
    plan_NP = planned(model, pairs, batch)
    coded = _some(int((plan_NP != NO_CONCEPT).sum()), subject)

    def nll(kind: str, share: float, seed: int) -> float:
        is_drop = kind in ("zero", "drop")
        dropped_NP = dropped(plan_NP, share, seed) if is_drop else None
        other_NP = plan_NP if is_drop else other_plans(plan_NP, model.plans.shape, kind, seed)
        return mean_nll(target_nll(model, pairs, other_NP, batch, dropped_NP), pairs)

    return {
        "tokens": int((pairs.target_NY != IGNORED).sum()),
        "pairs": len(pairs),
        "batch": batch,
        "coded_concepts": coded,
        **cost_curve(subject.options, PLAN_KINDS, nll("drop", 0.0, 0), nll),
        **_swapped(model, subject.tokenizer, pairs.rows(slice(0, WRITTEN)), plan_NP[:WRITTEN]),
    }


def _some(concepts: int, subject: Subject) -> int:
    if not concepts:
        raise CheckpointError(
            f"{subject.name} writes no codes on this text: need some to ablate. try: a finished "
            "run, or more text"
        )
    return concepts


def dropped(plan_NP: Tensor, share: float, seed: int) -> Tensor:
    """(N, P) bool: that share of all concepts, exactly. Of one seed, a larger share drops the same
    ones and more."""
    there_NP = plan_NP != NO_CONCEPT
    order_NP = torch.rand(plan_NP.shape, generator=torch.Generator().manual_seed(seed))
    rank_NP = order_NP.masked_fill(~there_NP, 2.0).flatten().argsort().argsort().view_as(plan_NP)
    return there_NP & (rank_NP < round(share * int(there_NP.sum())))


def _swapped(model, tokenizer, pairs, plan_NP: Tensor) -> Figures:
    """Texts written from the next pair's plan, and `content`: the mean share of the words of the
    row's own target, and of the one whose plan it is, that occur in them."""
    other_NP = other_plans(plan_NP, model.plans.shape, "swap")
    texts = texts_of(tokenizer, model.write(other_NP.to(model.device), 64))
    sources = texts_of(tokenizer, pairs.source_NU, pairs.source_mask_NU.bool())
    targets = texts_of(tokenizer, pairs.target_NY, pairs.target_NY != IGNORED)
    plans = model.plans.shape.unpack(other_NP)
    samples = []
    for n, text in enumerate(texts):
        other = (n + 1) % len(texts)
        samples.append(
            {
                "source": sources[n],
                "plan_of": sources[other],
                "plan": plans[n],
                "written": text,
                "own_words": _shared(text, targets[n]),
                "plans_words": _shared(text, targets[other]),
            }
        )
    content = {
        key: sum(sample[key] for sample in samples) / len(samples)
        for key in ("own_words", "plans_words")
    }
    return {"content": content, "samples": samples}


def _shared(text: str, target: str) -> float:
    """Share of the target's different words that occur in the text."""
    words, targets = (set(re.findall(r"\w+", x.lower())) for x in (text, target))
    return len(words & targets) / max(1, len(targets))
