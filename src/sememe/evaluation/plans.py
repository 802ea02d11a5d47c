"""What a planner's plans are worth: (N, U) sources, (N, P) plans, (N, Y) targets → NLL per target
token, over equal tokens.

The executor reads each target from the planner's own plan, from z* (found with the target in view),
from plans that are shuffled, random or empty; a control reads the source itself."""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sememe.concepts.plan import NULL, PlanShape
from sememe.errors import DataError
from sememe.evaluation.answers import Answers
from sememe.evaluation.quality import BUCKET, perplexity
from sememe.models.configuration import sink_id
from sememe.models.planner import PlannerForCausalLM
from sememe.models.planner.em import greedy_plans as planned
from sememe.pairs import IGNORED, PairTensors

KINDS = ("shuffle", "random", "empty")
Tick = Callable[[int], None]


def other_plans(plan_NP: Tensor, shape: PlanShape, kind: str, seed: int = 0) -> Tensor:
    """Plans that lie. `shuffle`: ids of each type permuted over all its places in all plans;
    `random`: drawn evenly from the type's vocabulary; lengths stay. `swap`: those of the next row;
    `empty`: none."""
    if kind == "swap":
        return plan_NP.roll(-1, 0)
    generator, made = torch.Generator().manual_seed(seed), torch.full_like(plan_NP, NULL)
    for i, size in enumerate(shape.sizes if kind != "empty" else ()):
        old_NL, new_NL = shape.of_type(plan_NP, i), shape.of_type(made, i)
        ids_n = old_NL[old_NL != NULL]
        if kind == "shuffle":
            ids_n = ids_n[torch.randperm(len(ids_n), generator=generator)]
        else:
            ids_n = torch.randint(size, ids_n.shape, generator=generator)
        new_NL[old_NL != NULL] = ids_n
    return made


@torch.no_grad()
def target_nll(
    model: PlannerForCausalLM,
    pairs: PairTensors,
    plan_NP: Tensor,
    batch: int = 8,
    tick: Tick = lambda n: None,
    dropped_NP: Tensor | None = None,
) -> Tensor:
    """(N, Y) nats of each target token given its plan, on the host; 0 where there is none.
    `dropped`: slots whose concepts have the state in the middle of all embeddings instead, which
    says nothing."""
    found = []
    for index_B in torch.arange(len(pairs)).split(batch):
        plan_BP, target_BY = (
            plan_NP[index_B].to(model.device),
            pairs.target_NY[index_B].to(model.device),
        )
        e_BPD = None
        if dropped_NP is not None:
            dropped_BP1 = dropped_NP[index_B].to(model.device).unsqueeze(-1)
            e_BPD = torch.where(
                dropped_BP1, model.plans.mean.float(), model.plan_embeddings(plan_BP)
            )
        found.append(model.target_nll(plan_BP, target_BY, e_BPD).cpu())
        tick(len(index_B))
    return torch.cat(found)


@torch.no_grad()
def joined_nll(model, pairs: PairTensors, batch: int = 8, tick: Tick = lambda n: None) -> Tensor:
    """(N, Y) the same of a model that reads source and target as one text."""
    found, joined = [], pairs.joined(sink_id(model.config.get_text_config()))
    for index_B in torch.arange(len(pairs)).split(batch):
        ids_BT, mask_BT, labels_BT = (x[index_B].to(model.device) for x in joined)
        width = int(mask_BT.sum(1).max())
        logits_BTV = model(
            input_ids=ids_BT[:, :width], attention_mask=mask_BT[:, :width], use_cache=False
        ).logits
        loss = F.cross_entropy(
            logits_BTV[:, :-1].flatten(0, 1).float(),
            labels_BT[:, 1:width].flatten(),
            reduction="none",
            ignore_index=IGNORED,
        ).view(len(index_B), -1)
        nll_BY = torch.zeros(len(index_B), pairs.target_NY.shape[1])
        nll_BY[pairs.target_NY[index_B] != IGNORED] = loss[labels_BT[:, 1:width] != IGNORED].cpu()
        found.append(nll_BY)
        tick(len(index_B))
    return torch.cat(found)


@torch.no_grad()
def plan_nats(
    model: PlannerForCausalLM, pairs: PairTensors, plan_NP: Tensor, batch: int = 8
) -> float:
    """Mean of −log p(z | u): what telling the plan costs, nats per pair."""
    found = [
        model.plan_log_prob(
            plan_NP[i_B].to(model.device),
            model.encode_source(pairs.source_NU[i_B], pairs.source_mask_NU[i_B]),
        ).cpu()
        for i_B in torch.arange(len(pairs)).split(batch)
    ]
    return -float(torch.cat(found).double().mean())


@torch.no_grad()
def head_figures(
    model: PlannerForCausalLM, pairs: PairTensors, plan_NP: Tensor, batch: int = 8
) -> dict[str, float]:
    """How sure the planner is where it writes, and how far the soft mixture of straight-through is
    from the concept read: means over the places of its plans."""
    shape, sums, places, concepts = model.plans.shape, torch.zeros(4, dtype=torch.float64), 0, 0
    for index_B in torch.arange(len(pairs)).split(batch):
        plan_BP = plan_NP[index_B].to(model.device)
        source = model.source(pairs.source_NU[index_B], pairs.source_mask_NU[index_B])
        logits = model.plan_logits(plan_BP, source)
        p_nM = logits[shape.targets(plan_BP) != IGNORED].float().softmax(-1)
        sums[0] += float(torch.special.entr(p_nM).sum())
        sums[1] += float(p_nM.amax(-1).sum())
        places += len(p_nM)
        there_BP, frame = plan_BP != NULL, model.plans
        soft_nD, hard_nD = (
            (x[there_BP] - frame.mean) / frame.scale
            for x in (
                frame.soft(logits, model.config.code_temperature),
                model.plan_embeddings(plan_BP),
            )
        )
        sums[2] += float(F.cosine_similarity(soft_nD, hard_nD, dim=-1).sum())
        sums[3] += float(
            ((soft_nD - hard_nD).norm(dim=-1) / hard_nD.norm(dim=-1).clamp(min=1e-6)).sum()
        )
        concepts += len(hard_nD)
    entropy, sure, cosine, distance = sums.tolist()
    found = {"plan_entropy": entropy / max(places, 1), "plan_max_prob": sure / max(places, 1)}
    return found | (
        {"soft_hard_cosine": cosine / concepts, "soft_hard_distance": distance / concepts}
        if concepts
        else {}
    )


def plan_use(plan_NP: Tensor, shape: PlanShape) -> dict[str, list]:
    """Of each type: mean concepts of a plan, ids that occur, and exp of the entropy of their
    distribution (None where none)."""
    counts = shape.id_counts(plan_NP)
    return {
        "plan_lengths": shape.counts(plan_NP).double().mean(0).tolist(),
        "plan_ids_used": [int((x > 0).sum()) for x in counts],
        "plan_perplexity": [perplexity(x) if bool(x.any()) else None for x in counts],
    }


def _mean(nll_NY: Tensor, pairs: PairTensors) -> float:
    return float(nll_NY.double().sum() / (pairs.target_NY != IGNORED).sum())


def by_position(
    nll_NY: Tensor, pairs: PairTensors, control_NY: Tensor | None = None
) -> list[dict[str, float | None]]:
    """Mean NLL of every 64 target tokens."""
    here_NY, found = pairs.target_NY != IGNORED, []
    for start in range(0, nll_NY.shape[1], BUCKET):
        part = slice(start, start + BUCKET)
        nll, control = (
            None if x is None else float(x[:, part].sum() / here_NY[:, part].sum())
            for x in (nll_NY, control_NY)
        )
        found.append(
            {
                "from": start,
                "to": min(start + BUCKET, nll_NY.shape[1]),
                "nll": nll,
                "control_nll": control,
            }
        )
    return found


def pair_figures(model, pairs: PairTensors, batch: int = 8) -> dict[str, float | list]:
    """What a run is watched by on held-out pairs. `model` is in eval mode, a planner or its
    control."""
    if not isinstance(model, PlannerForCausalLM):
        nll_NY = joined_nll(model, pairs, batch)
        return {
            "heldout_nll": _mean(nll_NY, pairs),
            "heldout_nll_by_position": [b["nll"] for b in by_position(nll_NY, pairs)],
        }
    plan_NP, shape = planned(model, pairs, batch), model.plans.shape
    nll_NY = target_nll(model, pairs, plan_NP, batch)
    found = {"heldout_nll": (nll := _mean(nll_NY, pairs))}
    for kind in KINDS:
        found[f"heldout_nll_{kind}"] = _mean(
            target_nll(model, pairs, other_plans(plan_NP, shape, kind), batch), pairs
        )
        found[f"delta_nll_{kind}"] = found[f"heldout_nll_{kind}"] - nll
    found["heldout_nll_by_position"] = [b["nll"] for b in by_position(nll_NY, pairs)]
    return (
        found
        | head_figures(model, pairs, plan_NP, batch)
        | {f"heldout_{key}": value for key, value in plan_use(plan_NP, shape).items()}
    )


def plan_figures(
    model: PlannerForCausalLM,
    pairs: PairTensors,
    best: Tensor | None = None,
    control=None,
    batch: int = 8,
    tick: Tick = lambda n: None,
    answers: Answers | None = None,
) -> dict[str, Any]:
    """All figures of a planner on held-out pairs, always together. `best` (N, P): z* of these
    pairs, found with their targets in view, a posterior; `control`: a model that sees the source.

    `given` has a line for each reading: nats per target token, how much more than with the
    planner's own plan, of plans what telling them costs beside, nats per target token, and with
    `answers` the share of those that are right. Raises DataError for an NLL that is not finite."""
    shape, plan_NP = model.plans.shape, planned(model, pairs, batch, tick)
    tokens = int((pairs.target_NY != IGNORED).sum())
    nll_NY = target_nll(model, pairs, plan_NP, batch, tick)
    nll = _mean(nll_NY, pairs)
    if not math.isfinite(nll):
        raise DataError(
            f"the NLL is {nll}: need finite logits. try: another checkpoint, or float32"
        )
    zero_NY = target_nll(
        model, pairs, plan_NP, batch, tick, dropped_NP=torch.ones_like(plan_NP, dtype=torch.bool)
    )
    plans = {"planner": plan_NP, "posterior": best} | {
        kind: other_plans(plan_NP, shape, kind) for kind in KINDS
    }
    control_NY = None if control is None else joined_nll(control, pairs, batch, tick)
    given = []
    for name, other_NP in plans.items():
        if other_NP is None:
            continue
        one = (
            nll
            if name == "planner"
            else _mean(target_nll(model, pairs, other_NP, batch, tick), pairs)
        )
        told = (
            plan_nats(model, pairs, other_NP, batch) * len(pairs) / tokens
            if name in ("planner", "posterior")
            else None
        )
        given.append(
            {"given": name, "nll": one, "delta_nll": one - nll, "plan_nats_per_token": told}
            | ({} if answers is None else {"right": answers.of_plans(model, other_NP)})
        )
    if control_NY is not None:
        one = _mean(control_NY, pairs)
        given.append(
            {
                "given": "source (control)",
                "nll": one,
                "delta_nll": one - nll,
                "plan_nats_per_token": None,
            }
            | ({} if answers is None else {"right": answers.of_sources(control)})
        )
    at = {one["given"]: one for one in given}
    return {
        "pairs": len(pairs),
        "tokens": tokens,
        "nll": nll,
        "given": given,
        **{f"delta_nll_{kind}": at[kind]["delta_nll"] for kind in KINDS},
        "delta_nll_zero": _mean(zero_NY, pairs) - nll,
        "nll_posterior": at["posterior"]["nll"] if "posterior" in at else None,
        **(
            {}
            if control is None
            else {
                "control_nll": at["source (control)"]["nll"],
                "delta_nll_control": -at["source (control)"]["delta_nll"],
            }
        ),
        "plan_sizes": list(shape.sizes),
        "plan_most": list(shape.lengths),
        **plan_use(plan_NP, shape),
        **({} if best is None else {"posterior_lengths": plan_use(best, shape)["plan_lengths"]}),
        **head_figures(model, pairs, plan_NP, batch),
        "nll_by_position": by_position(nll_NY, pairs, control_NY),
    }
