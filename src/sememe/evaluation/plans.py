"""What a planner's plans are worth: (N, U) sources, (N, P) plans, (N, Y) targets → NLL per target
token, over equal tokens.

The executor reads each target from the planner's own plan, from z* (found with the target in view),
from plans that are shuffled, random or empty; a control reads the source itself."""

import math
from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import Tensor

from sememe.concepts.ablation import ablate
from sememe.concepts.plan import NULL, PlanShape
from sememe.errors import CheckpointError, DataError
from sememe.evaluation.answers import Answers
from sememe.evaluation.quality import (
    batched,
    bucket_means,
    by_position,
    finite,
    perplexity,
    soft_hard,
)
from sememe.evaluation.results import Figures
from sememe.evaluation.subject import Subject
from sememe.models.configuration import sink_id
from sememe.models.losses import cross_entropy
from sememe.models.planner.em import best_plans, greedy_plans
from sememe.models.planner.signals import SignalProbe, SignalReader
from sememe.pairs import IGNORED, PairTensors
from sememe.progress import bar

KINDS = ("shuffle", "random", "empty")
CONTROL = "source (control)"
SAMPLES = 3
PAIRS = 8  # of a batch
MIN_PAIRS = 20  # that probes are fitted on


def other_plans(plan_NP: Tensor, shape: PlanShape, kind: str, seed: int = 0) -> Tensor:
    """Plans that lie. `shuffle`: ids of each type permuted over all its slots in all plans;
    `random`: drawn evenly from the type's vocabulary; lengths stay. `swap`: those of the next row;
    `empty`: none."""
    if kind == "swap":
        return plan_NP.roll(-1, 0)
    if kind == "empty":
        return torch.full_like(plan_NP, NULL)
    types = zip(plan_NP.split(shape.lengths, 1), shape.sizes, strict=True)
    return torch.cat([ablate(x, x != NULL, f"{kind}@{seed}", size)[0] for x, size in types], 1)


def of_pairs(job: Callable[[Tensor], tuple], pairs: PairTensors) -> list[Tensor]:
    """The tensors that `job` returns for the indices of a few pairs at a time, put together."""
    return batched(job, torch.arange(len(pairs)), PAIRS)


# ---- two ways of reading a target: from a plan, or without one from the source itself ----


def target_nll(
    model, pairs: PairTensors, plan_NP: Tensor | None = None, dropped_NP: Tensor | None = None
) -> Tensor:
    """(N, Y) nats of each target token, on the host; nan where there is none. `dropped`: slots
    whose concepts have the state in the middle of all embeddings instead, which says nothing."""

    def nll(index_B: Tensor) -> tuple[Tensor]:
        some = pairs.rows(index_B)
        target_BY = some.target_NY.to(model.device)
        if plan_NP is None:
            nll_BY = _after_source(model, some)
        else:
            plan_BP = plan_NP[index_B].to(model.device)
            e_BPD = model.plans(plan_BP)
            if dropped_NP is not None:
                dropped_BP1 = dropped_NP[index_B].to(model.device).unsqueeze(-1)
                e_BPD = torch.where(dropped_BP1, model.plans.mean, e_BPD)
            nll_BY = model.target_nll(plan_BP, target_BY, e_BPD)
        return (nll_BY.masked_fill(target_BY == IGNORED, torch.nan),)

    return of_pairs(nll, pairs)[0]


def _after_source(model, pairs: PairTensors) -> Tensor:
    """(B, Y) nats by a language model that reads source and target as one text."""
    joined = pairs.joined(sink_id(model.config.get_text_config()))
    ids_BT, mask_BT, labels_BT = (x.to(model.device) for x in joined)
    logits_BTV = model(input_ids=ids_BT, attention_mask=mask_BT, use_cache=False).logits
    nll_BT = cross_entropy(logits_BTV[:, :-1], labels_BT[:, 1:])
    nll_BY = nll_BT.new_zeros(pairs.target_NY.shape)
    nll_BY[pairs.target_NY != IGNORED] = nll_BT[labels_BT[:, 1:] != IGNORED]
    return nll_BY


def write_targets(
    model, pairs: PairTensors, plan_NP: Tensor | None, index_B: Tensor
) -> Iterable[Iterable[int]]:
    """The token ids that are written for some pairs, greedily."""
    width = pairs.target_NY.shape[1]
    if plan_NP is not None:
        return model.write(plan_NP[index_B], width)
    bos = sink_id(model.config.get_text_config())
    ids_BU, mask_BU = (x.to(model.device) for x in pairs.rows(index_B).prompts(bos))
    options = {"max_new_tokens": width, "do_sample": False, "pad_token_id": bos}
    return model.generate(ids_BU, attention_mask=mask_BU, **options)[:, ids_BU.shape[1] :]


def mean_nll(nll_NY: Tensor, pairs: PairTensors) -> float:
    """Per target token."""
    return float(nll_NY[pairs.target_NY != IGNORED].double().mean())


# ---- figures of plans ----


def planner_figures(model, pairs: PairTensors, plan_NP: Tensor) -> dict[str, float]:
    """What coding the plans costs, nats per target token; how sure the planner is where it writes,
    and how far the soft mixture of straight-through is from the concept that is read: means over
    the positions of its plans."""
    codes = model.plans

    def measure(index_B: Tensor) -> tuple[Tensor, ...]:
        plan_BP = plan_NP[index_B].to(model.device)
        source = model.source(pairs.source_NU[index_B], pairs.source_mask_NU[index_B])
        logits_BPM, target_BP = model.plan_logits(plan_BP, source), codes.shape.targets(plan_BP)
        p_nM = logits_BPM[target_BP != IGNORED].float().softmax(-1)
        states = codes.soft(logits_BPM, model.config.code_temperature), codes(plan_BP)
        soft_nD, hard_nD = (codes.to_frame(x_BPD)[plan_BP != NULL] for x_BPD in states)
        nats_B = cross_entropy(logits_BPM, target_BP).sum(1)
        entropy_n = torch.special.entr(p_nM).sum(-1)
        return nats_B, entropy_n, p_nM.amax(-1), *soft_hard(soft_nD, hard_nD)

    nats_N, *figures = of_pairs(measure, pairs)
    names = ("plan_entropy", "plan_max_prob", "soft_hard_cosine", "soft_hard_distance")
    means = zip(names, figures, strict=True)
    nats = float(nats_N.double().sum() / (pairs.target_NY != IGNORED).sum())
    return {"plan_nats_per_token": nats} | {
        key: float(x_n.double().mean()) for key, x_n in means if len(x_n)
    }


def plan_use(plan_NP: Tensor, shape: PlanShape) -> dict[str, list]:
    """Of each type: mean concepts of a plan, ids that occur, and exp of the entropy of their
    distribution (None where none)."""
    counts = shape.id_counts(plan_NP)
    return {
        "plan_lengths": shape.counts(plan_NP).double().mean(0).tolist(),
        "plan_ids_used": [int((x > 0).sum()) for x in counts],
        "plan_perplexity": [perplexity(x) for x in counts],
    }


def nll_figures(
    model, pairs: PairTensors, plan_NP: Tensor | None = None
) -> dict[str, float | list]:
    """The held-out figures of training that every model of pairs has. `model` is in eval mode."""
    nll_NY = target_nll(model, pairs, plan_NP)
    return {
        "heldout_nll": mean_nll(nll_NY, pairs),
        "heldout_nll_by_position": bucket_means(nll_NY),
    }


def pair_figures(model, pairs: PairTensors) -> dict[str, float | list]:
    """What the training of a planner is watched by on held-out pairs. `model` is in eval mode."""
    shape, plan_NP = model.plans.shape, greedy_plans(model, pairs)
    figures = nll_figures(model, pairs, plan_NP) | planner_figures(model, pairs, plan_NP)
    for kind in KINDS:
        nll = mean_nll(target_nll(model, pairs, other_plans(plan_NP, shape, kind)), pairs)
        figures[f"heldout_nll_{kind}"] = nll
        figures[f"delta_nll_{kind}"] = nll - figures["heldout_nll"]
    return figures | {f"heldout_{key}": x for key, x in plan_use(plan_NP, shape).items()}


@torch.no_grad()
def plan_samples(model, tokenizer, pairs: PairTensors, plan_NP: Tensor) -> list[Figures]:
    """Sources with their targets, a plan of each, and what is written from it."""
    written = model.write(plan_NP, 64)
    samples = {
        "source": pairs.source_texts(tokenizer),
        "target": pairs.target_texts(tokenizer),
        "plan": model.plans.shape.unpack(plan_NP),
        "written": tokenizer.batch_decode(written, skip_special_tokens=True),
    }
    rows = zip(*samples.values(), strict=True)
    return [dict(zip(samples, row, strict=True)) for row in rows]


@torch.no_grad()
def signal_figures(
    model, tokenizer, train: PairTensors, heldout: PairTensors
) -> dict[str, Figures]:
    """What plans tell of their targets (length, kind, names, numbers, key words), by linear probes
    fitted on training pairs: of each signal `loss` (nats a label) and `accuracy` on the held-out
    pairs, and `base_loss`, `base_accuracy` of saying what is most frequent in training. Raises
    DataError for fewer than 20 training pairs."""
    if len(train) < MIN_PAIRS:
        raise DataError(
            f"{len(train)} training pairs for the probes of signals: need at least {MIN_PAIRS}. "
            "try: --signals 200"
        )
    texts = train.target_texts(tokenizer)
    reader = SignalReader(texts)
    labels, heldout_labels = reader(texts), reader(heldout.target_texts(tokenizer))
    plans = [greedy_plans(model, pairs).to(model.device) for pairs in (train, heldout)]
    x_NF, x_MF = (model.plans.means(plan, model.plans(plan)).cpu() for plan in plans)
    mean_F, scale_F = x_NF.mean(0), x_NF.std(0, correction=0).clamp(min=1e-4)
    probe = SignalProbe(x_NF.shape[1]).fit((x_NF - mean_F) / scale_F, labels)
    return probe.score((x_MF - mean_F) / scale_F, heldout_labels, labels)


# ---- sememe evaluate ----


def evaluate_sources(subject: Subject, pairs: PairTensors, control: Subject | None) -> Figures:
    """Held-out figures of a language model on pairs."""
    subject.refuse("signals", "a run of system: planner, which makes plans")
    subject.refuse("workers", "a model of running text")
    return _compare(subject, pairs, {"source": None}, control) | {
        "layer_share": 1.0,
        "cache_share": 1.0,
    }


def evaluate_plans(subject: Subject, pairs: PairTensors, control: Subject | None) -> Figures:
    """All figures of a planner on held-out pairs, always together.

    `given` has a line for each reading: nats per target token, how much more than with the
    planner's own plan, of plans what coding them costs beside, nats per target token, and with
    `answers` the share of those that are right."""
    subject.refuse("workers", "a model of running text")
    model, tokenizer, options = subject.model, subject.tokenizer, subject.options
    shape = model.plans.shape
    if not subject.recipe:
        subject.refuse("signals", "a run, on whose training pairs probes are fitted")
    plan_NP = greedy_plans(model, pairs)
    own = {"planner": plan_NP}
    if options.search:
        em = subject.recipe.get("em", {})
        with bar(total=len(pairs), desc="z* of held-out pairs", unit="pair") as shown:
            own["posterior"] = best_plans(model, pairs, em, shown.update, options.search)
    lies = {kind: other_plans(plan_NP, shape, kind) for kind in KINDS}
    figures = _compare(subject, pairs, own | lies, control)
    lines = {line["given"]: line for line in figures["given"]}
    sure = {name: planner_figures(model, pairs, plans) for name, plans in own.items()}
    for name in own:
        lines[name]["plan_nats_per_token"] = sure[name].pop("plan_nats_per_token")
    zero_NY = target_nll(model, pairs, plan_NP, torch.ones_like(plan_NP) > 0)
    some = slice(0, SAMPLES)
    figures |= {
        **{f"delta_nll_{kind}": lines[kind]["delta_nll"] for kind in KINDS},
        "delta_nll_zero": mean_nll(zero_NY, pairs) - figures["nll"],
        "plan_sizes": list(shape.sizes),
        "plan_most": list(shape.lengths),
        **plan_use(plan_NP, shape),
        **sure["planner"],
        "samples": plan_samples(model, tokenizer, pairs.rows(some), plan_NP[some]),
    }
    if options.search:
        figures["nll_posterior"] = lines["posterior"]["nll"]
    if options.rate:
        figures["budget"] = list(model.dial.budget)
    if options.signals:
        source = subject.recipe["data"]["train"]
        train = subject.pairs_form.load(source, tokenizer, max_pairs=options.signals)
        figures["signals"] = signal_figures(model, tokenizer, train, pairs)
    return figures


def _compare(
    subject: Subject,
    pairs: PairTensors,
    readings: dict[str, Tensor | None],
    control: Subject | None,
) -> Figures:
    """Every reading of the same targets, from plans or from the source, the first of them the
    model's own. Raises DataError for an NLL that is not finite."""
    if control is not None:
        if control.recipe and control.pairs_form != subject.pairs_form:
            raise CheckpointError(
                f"{control.name} was not trained on pairs as these are: need the control of this "
                "planner. try: its recipe with system=control"
            )
        readings = readings | {CONTROL: None}
    answers = Answers(subject.tokenizer, pairs) if subject.options.answers else None
    nll, lines = {}, []
    for name, plan_NP in bar(iterable=readings.items(), desc="evaluate", unit="reading"):
        model = control.model if name == CONTROL else subject.model
        nll[name] = target_nll(model, pairs, plan_NP)
        lines.append({"given": name, "nll": finite(mean_nll(nll[name], pairs))})
        lines[-1]["delta_nll"] = lines[-1]["nll"] - lines[0]["nll"]
        if answers is not None:
            lines[-1]["right"] = answers.right(partial(write_targets, model, pairs, plan_NP))
    own, tokens = lines[0]["nll"], int((pairs.target_NY != IGNORED).sum())
    figures = {
        "pairs": len(pairs),
        "tokens": tokens,
        "nll": own,
        "bits_per_byte": own * tokens / math.log(2) / int(pairs.target_bytes_N.sum()),
        "nll_by_position": by_position(nll[lines[0]["given"]], nll.get(CONTROL)),
        "given": lines,
    }
    if answers is not None:
        figures["answers"] = len(answers.index_n)
    if control is not None:
        figures["control_nll"] = lines[-1]["nll"]
        figures["delta_nll_control"] = -lines[-1]["delta_nll"]
    return figures
