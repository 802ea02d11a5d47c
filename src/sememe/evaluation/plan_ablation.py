"""What a planner's plans are worth: NLL over the share of concepts dropped, and with plans
exchanged; whose words a swapped plan brings (RUN/ablate.json)."""

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from sememe.concepts.plan import NULL
from sememe.errors import CheckpointError
from sememe.evaluation.plans import IGNORED, other_plans, planned, target_nll
from sememe.models.planner import PlannerForCausalLM
from sememe.pairs import PairTensors

DRAWN = {
    "zero": False,
    "empty": False,
    "shuffle": True,
    "random": True,
    "swap": False,
}  # whether a seed makes a difference
WRITTEN = 8  # pairs whose plans are swapped and written out


def plan_passes(shares: Sequence[float], seeds: int) -> int:
    """Times that `plan_curve` goes through the pairs."""
    return (
        2
        + sum(seeds if drawn else 1 for drawn in DRAWN.values())
        + seeds * sum(0 < share < 1 for share in shares)
    )


def dropped(plan_NP: Tensor, share: float, seed: int) -> Tensor:
    """(N, P) bool: that share of all concepts, exactly. Of one seed, a larger share drops the same
    ones and more."""
    there_NP = plan_NP != NULL
    order_NP = torch.rand(plan_NP.shape, generator=torch.Generator().manual_seed(seed)).masked_fill(
        ~there_NP, 2.0
    )
    rank_NP = order_NP.flatten().argsort().argsort().view(plan_NP.shape)
    return there_NP & (rank_NP < round(share * int(there_NP.sum())))


def plan_curve(
    model: PlannerForCausalLM,
    tokenizer,
    pairs: PairTensors,
    shares: Sequence[float],
    seeds: int = 3,
    batch: int = 8,
    tick: Callable[[int], None] = lambda n: None,
    new_tokens: int = 64,
) -> dict[str, Any]:
    """ΔNLL to the planner's own plans, each as {delta_nll, delta_nll_min, delta_nll_max} over the
    seeds, and samples.

    A dropped concept keeps its place and says nothing (`zero`: all of them); an `empty` plan has no
    place either. Raises CheckpointError where the planner writes only empty plans."""
    plan_NP, shape = planned(model, pairs, batch, tick), model.plans.shape
    tokens, concepts = int((pairs.target_NY != IGNORED).sum()), int((plan_NP != NULL).sum())
    if not concepts:
        raise CheckpointError(
            "this planner writes empty plans on these pairs: need concepts to ablate. try: a "
            "longer run"
        )

    def nll(kind: str, seed: int = 0, share: float = 1.0) -> float:
        lost_NP = dropped(plan_NP, share, seed) if kind in ("zero", "drop") else None
        other_NP = (
            plan_NP
            if kind in ("plain", "zero", "drop")
            else other_plans(plan_NP, shape, kind, seed)
        )
        return (
            float(target_nll(model, pairs, other_NP, batch, tick, lost_NP).double().sum()) / tokens
        )

    plain = nll("plain")

    def cost(kind: str, drawn: bool, share: float = 1.0) -> dict[str, float]:
        deltas = [nll(kind, seed, share) - plain for seed in range(seeds if drawn else 1)]
        return {
            "delta_nll": sum(deltas) / len(deltas),
            "delta_nll_min": min(deltas),
            "delta_nll_max": max(deltas),
        }

    kinds = {kind: cost(kind, drawn) for kind, drawn in DRAWN.items()}
    ends = {0.0: dict.fromkeys(kinds["zero"], 0.0), 1.0: kinds["zero"]}
    drop = [{"share": share} | (ends.get(share) or cost("drop", True, share)) for share in shares]
    return {
        "tokens": tokens,
        "pairs": len(pairs),
        "batch": batch,
        "seeds": seeds,
        "nll": plain,
        "coded_concepts": concepts,
        "drop": drop,
        **kinds,
        **_swapped(model, tokenizer, pairs, plan_NP, new_tokens),
    }


def _swapped(
    model: PlannerForCausalLM, tokenizer, pairs: PairTensors, plan_NP: Tensor, new_tokens: int
) -> dict[str, Any]:
    """Texts written from the next pair's plan: whose words are in them. `content`: mean share of
    the words of the row's own target, and of the one whose plan it is, that occur."""
    shape = model.plans.shape

    def decoded(ids_NT: Tensor, kept_NT: Tensor) -> list[str]:
        return [
            tokenizer.decode(ids[kept], skip_special_tokens=True)
            for ids, kept in zip(ids_NT, kept_NT, strict=True)
        ]

    some = pairs.rows(slice(0, WRITTEN))
    other_NP = other_plans(plan_NP[: len(some)], shape, "swap")
    texts = [
        tokenizer.decode(ids, skip_special_tokens=True)
        for ids in model.write(other_NP.to(model.device), new_tokens)
    ]
    sources = decoded(some.source_NU, some.source_mask_NU.bool())
    targets = decoded(some.target_NY, some.target_NY != IGNORED)
    samples = [
        {
            "source": sources[n],
            "plan_of": sources[m := (n + 1) % len(some)],
            "plan": shape.unpack(other_NP[n : n + 1])[0],
            "written": texts[n],
            "own_words": _shared(texts[n], targets[n]),
            "plans_words": _shared(texts[n], targets[m]),
        }
        for n in range(len(some))
    ]
    content = {
        key: sum(one[key] for one in samples) / len(samples) for key in ("own_words", "plans_words")
    }
    return {"content": content, "samples": samples}


def _shared(text: str, target: str) -> float:
    """Share of the target's different words that occur in the text."""
    words, wanted = (set(re.findall(r"\w+", x.lower())) for x in (text, target))
    return len(words & wanted) / max(1, len(wanted))
