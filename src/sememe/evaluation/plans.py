"""What a planner's plans are worth: (N, U) sources, (N, P) plans, (N, Y) targets → NLL per target
token, over equal tokens.

The executor reads each target from the planner's own plan, from z* (found with the target in view),
from plans that are shuffled, random or empty; a control reads the source itself."""

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from sememe.concepts.ablation import ablate
from sememe.concepts.plan import NULL, PlanShape
from sememe.errors import CheckpointError, DataError, SememeError
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
from sememe.models.planner.em import best_plans
from sememe.models.planner.em import greedy_plans as planned
from sememe.models.planner.signals import SignalProbe, SignalReader
from sememe.pairs import IGNORED, PairTensors
from sememe.progress import bar

KINDS = ("shuffle", "random", "empty")
CONTROL = "source (control)"
SAMPLES = 3
PAIRS = 8  # of a batch
DECAYS = (1e-3, 1e-2, 1e-1, 1.0)  # of the probes; tried on a fifth of the training pairs
MIN_PAIRS = 20  # that probes are fitted on


def other_plans(plan_NP: Tensor, shape: PlanShape, kind: str, seed: int = 0) -> Tensor:
    """Plans that lie. `shuffle`: ids of each type permuted over all its places in all plans;
    `random`: drawn evenly from the type's vocabulary; lengths stay. `swap`: those of the next row;
    `empty`: none."""
    if kind == "swap":
        return plan_NP.roll(-1, 0)
    if kind == "empty":
        return torch.full_like(plan_NP, NULL)
    types = zip(plan_NP.split(shape.lengths, 1), shape.sizes, strict=True)
    return torch.cat([ablate(x, x != NULL, f"{kind}@{seed}", size)[0] for x, size in types], 1)


def batched_pairs(job: Callable[[Tensor], tuple], pairs: PairTensors) -> list[Tensor]:
    """`batched`, where `job` takes the index of a few pairs."""
    return batched(job, torch.arange(len(pairs)), PAIRS)


def target_nll(
    model, pairs: PairTensors, plan_NP: Tensor, dropped_NP: Tensor | None = None
) -> Tensor:
    """(N, Y) nats of each target token given its plan, on the host; 0 where there is none.
    `dropped`: slots whose concepts have the state in the middle of all embeddings instead, which
    says nothing."""

    def nll(index_B: Tensor) -> tuple[Tensor]:
        plan_BP, target_BY = (x[index_B].to(model.device) for x in (plan_NP, pairs.target_NY))
        e_BPD = None
        if dropped_NP is not None:
            dropped_BP1 = dropped_NP[index_B].to(model.device).unsqueeze(-1)
            mean_D = model.plans.mean.float()
            e_BPD = torch.where(dropped_BP1, mean_D, model.plans(plan_BP))
        return (model.target_nll(plan_BP, target_BY, e_BPD),)

    return batched_pairs(nll, pairs)[0]


def joined_nll(model, pairs: PairTensors) -> Tensor:
    """(N, Y) the same of a model that reads source and target as one text."""

    def nll(index_B: Tensor) -> tuple[Tensor]:
        some = pairs.rows(index_B)
        joined = some.joined(sink_id(model.config.get_text_config()))
        width = int(joined[1].sum(1).max())
        ids_BT, mask_BT, labels_BT = (x[:, :width].to(model.device) for x in joined)
        logits_BTV = model(input_ids=ids_BT, attention_mask=mask_BT, use_cache=False).logits
        nll_BT = cross_entropy(logits_BTV[:, :-1], labels_BT[:, 1:])
        nll_BY = torch.zeros(some.target_NY.shape)
        nll_BY[some.target_NY != IGNORED] = nll_BT[labels_BT[:, 1:] != IGNORED].cpu()
        return (nll_BY,)

    return batched_pairs(nll, pairs)[0]


def plan_nats(model, pairs: PairTensors, plan_NP: Tensor) -> float:
    """Mean of −log p(z | u): what coding the plan costs, nats per pair."""

    def log_prob(index_B: Tensor) -> tuple[Tensor]:
        some = pairs.rows(index_B)
        context = model.encode_source(some.source_NU, some.source_mask_NU)
        return (model.plan_log_prob(plan_NP[index_B].to(model.device), context),)

    (log_prob_N,) = batched_pairs(log_prob, pairs)
    return -float(log_prob_N.double().mean())


def head_figures(model, pairs: PairTensors, plan_NP: Tensor) -> dict[str, float]:
    """How sure the planner is where it writes, and how far the soft mixture of straight-through is
    from the concept that is read: means over the positions of its plans."""
    frame = model.plans

    def measure(index_B: Tensor) -> tuple[Tensor, ...]:
        plan_BP = plan_NP[index_B].to(model.device)
        source = model.source(pairs.source_NU[index_B], pairs.source_mask_NU[index_B])
        logits = model.plan_logits(plan_BP, source)
        p_nM = logits[frame.shape.targets(plan_BP) != IGNORED].float().softmax(-1)
        states = (frame.soft(logits, model.config.code_temperature), model.plans(plan_BP))
        soft_nD, hard_nD = (frame.to_frame(x_BPD)[plan_BP != NULL] for x_BPD in states)
        return torch.special.entr(p_nM).sum(-1), p_nM.amax(-1), *soft_hard(soft_nD, hard_nD)

    columns = batched_pairs(measure, pairs)
    names = ("plan_entropy", "plan_max_prob", "soft_hard_cosine", "soft_hard_distance")
    means = zip(names, columns, strict=True)
    return {key: float(x_n.double().mean()) for key, x_n in means if len(x_n)}


def plan_use(plan_NP: Tensor, shape: PlanShape) -> dict[str, list]:
    """Of each type: mean concepts of a plan, ids that occur, and exp of the entropy of their
    distribution (None where none)."""
    counts = shape.id_counts(plan_NP)
    return {
        "plan_lengths": shape.counts(plan_NP).double().mean(0).tolist(),
        "plan_ids_used": [int((x > 0).sum()) for x in counts],
        "plan_perplexity": [perplexity(x) for x in counts],
    }


def mean_nll(nll_NY: Tensor, pairs: PairTensors) -> float:
    """Per target token."""
    return float(nll_NY.double().nansum() / (pairs.target_NY != IGNORED).sum())


def pair_figures(model, pairs: PairTensors) -> dict[str, float | list]:
    """What the training of a planner is watched by on held-out pairs. `model` is in eval mode."""
    shape = model.plans.shape
    plan_NP = planned(model, pairs)
    nll_NY = target_nll(model, pairs, plan_NP)
    figures = joined_figures(nll_NY, pairs)
    for kind in KINDS:
        other_NY = target_nll(model, pairs, other_plans(plan_NP, shape, kind))
        figures[f"heldout_nll_{kind}"] = mean_nll(other_NY, pairs)
        figures[f"delta_nll_{kind}"] = figures[f"heldout_nll_{kind}"] - figures["heldout_nll"]
    use = {f"heldout_{key}": value for key, value in plan_use(plan_NP, shape).items()}
    return figures | head_figures(model, pairs, plan_NP) | use


def joined_figures(nll_NY: Tensor, pairs: PairTensors) -> dict[str, float | list]:
    """The held-out figures of training that every model of pairs has."""
    return {
        "heldout_nll": mean_nll(nll_NY, pairs),
        "heldout_nll_by_position": bucket_means(of_targets(nll_NY, pairs)),
    }


def of_targets(nll_NY: Tensor, pairs: PairTensors) -> Tensor:
    """nan where there is no target token."""
    return nll_NY.masked_fill(pairs.target_NY == IGNORED, torch.nan)


@torch.no_grad()
def plan_samples(model, tokenizer, pairs: PairTensors, plan_NP: Tensor) -> list[Figures]:
    """Sources with their targets, a plan of each, and what is written from it."""
    written = model.write(plan_NP.to(model.device), 64)
    samples = {
        "source": pairs.source_texts(tokenizer),
        "target": pairs.target_texts(tokenizer),
        "plan": model.plans.shape.unpack(plan_NP),
        "written": tokenizer.batch_decode(written, skip_special_tokens=True),
    }
    rows = zip(*samples.values(), strict=True)
    return [dict(zip(samples, row, strict=True)) for row in rows]


@torch.no_grad()
def plan_states(model, plan_NP: Tensor) -> Tensor:
    """(N, I · D) mean of each type's concepts in the tables' frame, 0 where it has none; on the
    host."""
    plan_NP = plan_NP.to(model.device)
    return model.plans.means(plan_NP, model.plans(plan_NP)).cpu()


def signal_figures(
    model, tokenizer, train: PairTensors, heldout: PairTensors
) -> dict[str, Figures]:
    """What plans tell of their targets (length, kind, names, numbers, key words), by linear probes
    fitted on training pairs: of each signal `loss` (nats a label), `accuracy`, `auroc` (None where
    no label has both answers) on the held-out pairs, and `base_loss`, `base_accuracy` of saying
    what is most frequent in training. Raises DataError for fewer than 20 training pairs."""
    if len(train) < MIN_PAIRS:
        raise DataError(
            f"{len(train)} training pairs for the probes of signals: need at least {MIN_PAIRS}. "
            "try: --signals 200"
        )
    texts = train.target_texts(tokenizer)
    reader = SignalReader(texts)
    labels, heldout_labels = reader(texts), reader(heldout.target_texts(tokenizer))
    x_NF, x_MF = (plan_states(model, planned(model, pairs)) for pairs in (train, heldout))
    count = len(train) - len(train) // 5
    first, rest = ({name: x.split(count)[i] for name, x in labels.items()} for i in (0, 1))

    def loss(decay: float) -> float:
        """On training pairs that the probe was not fitted on."""
        probe = SignalProbe(x_NF.shape[1]).fit(x_NF[:count], first, decay)
        scores = probe.score(x_NF[count:], rest, first)
        return sum(score["loss"] for score in scores.values())

    probe = SignalProbe(x_NF.shape[1]).fit(x_NF, labels, min(DECAYS, key=loss))
    return {
        name: {key: None if math.isnan(x) else x for key, x in score.items()}
        for name, score in probe.score(x_MF, heldout_labels, labels).items()
    }


class Reading(NamedTuple):
    """One way of reading targets."""

    nll: Callable[[], Tensor]
    """(N, Y) nats of each target token."""
    write: Callable[[Tensor], Iterable]
    """Index of some pairs → the token ids that are written for them."""


def plan_reading(subject: Subject, pairs: PairTensors, plan_NP: Tensor) -> Reading:
    """The executor reads a plan."""
    model, width = subject.model, pairs.target_NY.shape[1]
    return Reading(
        partial(target_nll, model, pairs, plan_NP),
        lambda index_B: model.write(plan_NP[index_B], width),
    )


def source_reading(subject: Subject, pairs: PairTensors) -> Reading:
    """A language model reads the source itself."""
    model = subject.model

    def write(index_B: Tensor) -> Tensor:
        ids_BU, mask_BU = pairs.rows(index_B).prompts(sink_id(model.config.get_text_config()))
        text_BT = model.generate(
            ids_BU.to(model.device),
            attention_mask=mask_BU.to(model.device),
            max_new_tokens=pairs.target_NY.shape[1],
            do_sample=False,
            pad_token_id=subject.tokenizer.eos_token_id,
        )
        return text_BT[:, ids_BU.shape[1] :]

    return Reading(partial(joined_nll, model, pairs), write)


def evaluate_sources(subject: Subject, pairs: PairTensors, control: Subject | None) -> Figures:
    """Held-out figures of a language model on pairs."""
    subject.refuse("signals", "a run of system: planner, which makes plans")
    readings = {"source": source_reading(subject, pairs)}
    return _compare(subject, pairs, readings, control) | {"layer_share": 1.0}


def evaluate_plans(subject: Subject, pairs: PairTensors, control: Subject | None) -> Figures:
    """All figures of a planner on held-out pairs, always together.

    `given` has a line for each reading: nats per target token, how much more than with the
    planner's own plan, of plans what coding them costs beside, nats per target token, and with
    `answers` the share of those that are right."""
    model, tokenizer, options = subject.model, subject.tokenizer, subject.options
    shape = model.plans.shape
    train = _training_pairs(subject) if options.signals else None
    plan_NP = planned(model, pairs)
    plans = {"planner": plan_NP}
    if options.search:
        em = subject.recipe.get("em", {})
        with bar(total=len(pairs), desc="z* of held-out pairs", unit="pair") as shown:
            plans["posterior"] = best_plans(model, pairs, em, shown.update, options.search)
    own = [*plans]
    plans |= {kind: other_plans(plan_NP, shape, kind) for kind in KINDS}
    readings = {name: plan_reading(subject, pairs, plan) for name, plan in plans.items()}
    figures = _compare(subject, pairs, readings, control)
    given = {line["given"]: line for line in figures["given"]}
    for name in own:
        nats = plan_nats(model, pairs, plans[name]) * len(pairs)
        given[name]["plan_nats_per_token"] = nats / figures["tokens"]
    zero_NY = target_nll(model, pairs, plan_NP, torch.ones_like(plan_NP) > 0)
    some = slice(0, SAMPLES)
    figures |= {f"delta_nll_{kind}": given[kind]["delta_nll"] for kind in KINDS} | {
        "delta_nll_zero": mean_nll(zero_NY, pairs) - figures["nll"],
        "plan_sizes": list(shape.sizes),
        "plan_most": list(shape.lengths),
        **plan_use(plan_NP, shape),
        **head_figures(model, pairs, plan_NP),
        "samples": plan_samples(model, tokenizer, pairs.rows(some), plan_NP[some]),
    }
    if options.search:
        figures["nll_posterior"] = given["posterior"]["nll"]
        figures["posterior_lengths"] = plan_use(plans["posterior"], shape)["plan_lengths"]
    if options.rate:
        figures["budget"] = list(model.dial.budget)
    if train is not None:
        figures["signals"] = signal_figures(model, tokenizer, train, pairs)
    return figures


def _compare(
    subject: Subject, pairs: PairTensors, readings: dict[str, Reading], control: Subject | None
) -> Figures:
    """Every reading of the same targets, the first of them the model's own. Raises DataError for an
    NLL that is not finite."""
    if control is not None:
        if control.recipe and control.pairs_form != subject.pairs_form:
            raise CheckpointError(
                f"{control.name} was not trained on pairs as these are: need the control of this "
                "planner. try: its recipe with system=control"
            )
        readings = readings | {CONTROL: source_reading(control, pairs)}
    answers = Answers(subject.tokenizer, pairs) if subject.options.answers else None
    nll, given = {}, []
    for name, reading in bar(iterable=readings.items(), desc="evaluate", unit="reading"):
        nll[name] = of_targets(reading.nll(), pairs)
        line = {"given": name, "nll": finite(mean_nll(nll[name], pairs))}
        line["delta_nll"] = line["nll"] - (given or [line])[0]["nll"]
        if answers is not None:
            line["right"] = answers.right(reading.write)
        given.append(line)
    own_NY, *_ = nll.values()
    nats = float(own_NY.double().nansum())
    figures = {
        "pairs": len(pairs),
        "tokens": int((pairs.target_NY != IGNORED).sum()),
        "nll": given[0]["nll"],
        "bits_per_byte": nats / math.log(2) / int(pairs.target_bytes_N.sum()),
        "nll_by_position": by_position(own_NY, nll.get(CONTROL)),
        "given": given,
    }
    if answers is not None:
        figures["answers"] = len(answers.index_n)
    if control is not None:
        figures["control_nll"] = given[-1]["nll"]
        figures["delta_nll_control"] = -given[-1]["delta_nll"]
    return figures


def _training_pairs(subject: Subject) -> PairTensors:
    """The first pairs that a run was trained on. Raises SememeError where there is no run."""
    if not subject.recipe:
        raise SememeError(
            f"got --signals, but {subject.name} is no run, on whose training pairs probes are "
            "fitted: need one. try: without --signals"
        )
    train = subject.recipe["data"]["train"]
    return subject.pairs_form.load(train, subject.tokenizer, max_pairs=subject.options.signals)
