"""What a planner's plans are worth: (N, U) sources, (N, P) plans, (N, Y) targets → NLL per target
token, over equal tokens.

The executor reads each target from the planner's own plan, from z* (found with the target in view),
from plans that are shuffled, random or empty; a control reads the source itself."""

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sememe.concepts.plan import NULL, PlanShape
from sememe.errors import CheckpointError, DataError, SememeError
from sememe.evaluation.answers import Answers, texts_of
from sememe.evaluation.quality import batched, by_position, perplexity
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
DECAYS = (1e-3, 1e-2, 1e-1, 1.0)  # of the probes; tried on a fifth of the training pairs
MIN_PAIRS = 20  # that probes are fitted on


def other_plans(plan_NP: Tensor, shape: PlanShape, kind: str, seed: int = 0) -> Tensor:
    """Plans that lie. `shuffle`: ids of each type permuted over all its places in all plans;
    `random`: drawn evenly from the type's vocabulary; lengths stay. `swap`: those of the next row;
    `empty`: none."""
    if kind == "swap":
        return plan_NP.roll(-1, 0)
    generator = torch.Generator().manual_seed(seed)
    other_NP = torch.full_like(plan_NP, NULL)
    for i, size in enumerate(shape.sizes if kind != "empty" else ()):
        old_NL, new_NL = shape.of_type(plan_NP, i), shape.of_type(other_NP, i)
        ids_n = old_NL[old_NL != NULL]
        if kind == "shuffle":
            ids_n = ids_n[torch.randperm(len(ids_n), generator=generator)]
        else:
            ids_n = torch.randint(size, ids_n.shape, generator=generator)
        new_NL[old_NL != NULL] = ids_n
    return other_NP


def target_nll(
    model, pairs: PairTensors, plan_NP: Tensor, batch: int = 8, dropped_NP: Tensor | None = None
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
            e_BPD = torch.where(dropped_BP1, mean_D, model.plan_embeddings(plan_BP))
        return (model.target_nll(plan_BP, target_BY, e_BPD),)

    return batched(nll, torch.arange(len(pairs)), batch)[0]


def joined_nll(model, pairs: PairTensors, batch: int = 8) -> Tensor:
    """(N, Y) the same of a model that reads source and target as one text."""
    joined = pairs.joined(sink_id(model.config.get_text_config()))

    def nll(index_B: Tensor) -> tuple[Tensor]:
        ids_BT, mask_BT, labels_BT = (x[index_B] for x in joined)
        width = int(mask_BT.sum(1).max())
        ids_BT, mask_BT, labels_BT = (
            x[:, :width].to(model.device) for x in (ids_BT, mask_BT, labels_BT)
        )
        logits_BTV = model(input_ids=ids_BT, attention_mask=mask_BT, use_cache=False).logits
        nll_BT = cross_entropy(logits_BTV[:, :-1], labels_BT[:, 1:])
        nll_BY = torch.zeros(len(index_B), pairs.target_NY.shape[1])
        is_target_BT = labels_BT[:, 1:] != IGNORED
        nll_BY[pairs.target_NY[index_B] != IGNORED] = nll_BT[is_target_BT].cpu()
        return (nll_BY,)

    return batched(nll, torch.arange(len(pairs)), batch)[0]


def plan_nats(model, pairs: PairTensors, plan_NP: Tensor, batch: int = 8) -> float:
    """Mean of −log p(z | u): what coding the plan costs, nats per pair."""

    def log_prob(index_B: Tensor) -> tuple[Tensor]:
        some = pairs.rows(index_B)
        context = model.encode_source(some.source_NU, some.source_mask_NU)
        return (model.plan_log_prob(plan_NP[index_B].to(model.device), context),)

    (log_prob_N,) = batched(log_prob, torch.arange(len(pairs)), batch)
    return -float(log_prob_N.double().mean())


@torch.no_grad()
def head_figures(model, pairs: PairTensors, plan_NP: Tensor, batch: int = 8) -> dict[str, float]:
    """How sure the planner is where it writes, and how far the soft mixture of straight-through is
    from the concept that is read: means over the positions of its plans."""
    frame = model.plans
    entropy, max_prob, cosine, distance = [], [], [], []
    for index_B in torch.arange(len(pairs)).split(batch):
        plan_BP = plan_NP[index_B].to(model.device)
        source = model.source(pairs.source_NU[index_B], pairs.source_mask_NU[index_B])
        logits = model.plan_logits(plan_BP, source)
        p_nM = logits[frame.shape.targets(plan_BP) != IGNORED].float().softmax(-1)
        entropy.append(torch.special.entr(p_nM).sum(-1))
        max_prob.append(p_nM.amax(-1))
        soft_BPD = frame.soft(logits, model.config.code_temperature)
        soft_nD, hard_nD = (
            (x[plan_BP != NULL] - frame.mean) / frame.scale
            for x in (soft_BPD, model.plan_embeddings(plan_BP))
        )
        cosine.append(F.cosine_similarity(soft_nD, hard_nD, dim=-1))
        norm_n = hard_nD.norm(dim=-1).clamp(min=1e-6)
        distance.append((soft_nD - hard_nD).norm(dim=-1) / norm_n)
    values = {
        "plan_entropy": torch.cat(entropy),
        "plan_max_prob": torch.cat(max_prob),
        "soft_hard_cosine": torch.cat(cosine),
        "soft_hard_distance": torch.cat(distance),
    }
    return {key: float(x_n.double().mean()) for key, x_n in values.items() if len(x_n)}


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
    return float(nll_NY.double().sum() / (pairs.target_NY != IGNORED).sum())


def pair_figures(model, pairs: PairTensors, batch: int = 8) -> dict[str, float | list]:
    """What the training of a planner is watched by on held-out pairs. `model` is in eval mode."""
    shape = model.plans.shape
    plan_NP = planned(model, pairs, batch)
    nll_NY = target_nll(model, pairs, plan_NP, batch)
    figures = joined_figures(nll_NY, pairs)
    for kind in KINDS:
        other_NY = target_nll(model, pairs, other_plans(plan_NP, shape, kind), batch)
        figures[f"heldout_nll_{kind}"] = mean_nll(other_NY, pairs)
        figures[f"delta_nll_{kind}"] = figures[f"heldout_nll_{kind}"] - figures["heldout_nll"]
    use = {f"heldout_{key}": value for key, value in plan_use(plan_NP, shape).items()}
    return figures | head_figures(model, pairs, plan_NP, batch) | use


def joined_figures(nll_NY: Tensor, pairs: PairTensors) -> dict[str, float | list]:
    """The held-out figures of training that every model of pairs has."""
    buckets = by_position(nll_NY, here_NT=pairs.target_NY != IGNORED)
    return {
        "heldout_nll": mean_nll(nll_NY, pairs),
        "heldout_nll_by_position": [bucket["nll"] for bucket in buckets],
    }


@torch.no_grad()
def plan_samples(model, tokenizer, pairs: PairTensors) -> list[Figures]:
    """Some sources with their targets, the plan made of each, and what is written from it."""
    some = pairs.rows(slice(0, SAMPLES))
    plan_BP = model.plan(some.source_NU, some.source_mask_NU)[0][:, 0]
    samples = {
        "source": texts_of(tokenizer, some.source_NU, some.source_mask_NU.bool()),
        "target": texts_of(tokenizer, some.target_NY, some.target_NY != IGNORED),
        "plan": model.plans.shape.unpack(plan_BP.cpu()),
        "written": texts_of(tokenizer, model.write(plan_BP, 64)),
    }
    rows = zip(*samples.values(), strict=True)
    return [dict(zip(samples, row, strict=True)) for row in rows]


@torch.no_grad()
def plan_states(model, plan_NP: Tensor) -> Tensor:
    """(N, I · D) mean of each type's concepts in the tables' frame, 0 where it has none; on the
    host."""
    plan_NP = plan_NP.to(model.device)
    return model.plans.means(plan_NP, model.plan_embeddings(plan_NP)).cpu()


def signal_figures(
    model, tokenizer, train: PairTensors, heldout: PairTensors, batch: int = 8
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
    reader = SignalReader.fit(texts)
    labels, heldout_labels = reader(texts), reader(heldout.target_texts(tokenizer))
    x_NF, x_MF = (plan_states(model, planned(model, pairs, batch)) for pairs in (train, heldout))
    first = slice(0, len(train) - len(train) // 5)
    rest = slice(first.stop, None)

    def some(part: slice) -> dict[str, Tensor]:
        return {name: label[part] for name, label in labels.items()}

    def probe(part: slice, decay: float) -> SignalProbe:
        return SignalProbe(x_NF.shape[1]).fit(x_NF[part], some(part), decay)

    def loss(decay: float) -> float:
        scores = probe(first, decay).score(x_NF[rest], some(rest), some(first))
        return sum(score["loss"] for score in scores.values())

    scores = probe(slice(None), min(DECAYS, key=loss)).score(x_MF, heldout_labels, labels)
    return {
        name: {key: None if math.isnan(x) else x for key, x in score.items()}
        for name, score in scores.items()
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
        partial(target_nll, model, pairs, plan_NP, subject.options.batch or 8),
        lambda index_B: model.write(plan_NP[index_B], width),
    )


def source_reading(subject: Subject, pairs: PairTensors) -> Reading:
    """A language model reads the source itself."""
    model, batch = subject.model, subject.options.batch or 8

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

    return Reading(partial(joined_nll, model, pairs, batch), write)


def evaluate_sources(subject: Subject, pairs: PairTensors, control: Subject | None) -> Figures:
    """Held-out figures of a language model on pairs."""
    subject.refuse("signals rate", "a run of system: planner, which makes plans")
    readings = {"source": source_reading(subject, pairs)}
    return _compare(subject, pairs, readings, control) | {"layer_share": 1.0}


def evaluate_plans(subject: Subject, pairs: PairTensors, control: Subject | None) -> Figures:
    """All figures of a planner on held-out pairs, always together.

    `given` has a line for each reading: nats per target token, how much more than with the
    planner's own plan, of plans what coding them costs beside, nats per target token, and with
    `answers` the share of those that are right."""
    model, tokenizer, options = subject.model, subject.tokenizer, subject.options
    shape, batch = model.plans.shape, options.batch or 8
    train = _training_pairs(subject) if options.signals else None
    plan_NP = planned(model, pairs, batch)
    plans = {"planner": plan_NP}
    if options.search:
        em = subject.recipe.get("em", {})
        with bar(total=len(pairs), desc="z* of held-out pairs", unit="pair") as shown:
            plans["posterior"] = best_plans(model, pairs, em, shown.update, options.search)
    plans |= {kind: other_plans(plan_NP, shape, kind) for kind in KINDS}
    readings = {name: plan_reading(subject, pairs, plan) for name, plan in plans.items()}
    figures = _compare(subject, pairs, readings, control)
    given = {line["given"]: line for line in figures["given"]}
    for name in ("planner", "posterior") if options.search else ("planner",):
        nats = plan_nats(model, pairs, plans[name], batch) * len(pairs)
        given[name]["plan_nats_per_token"] = nats / figures["tokens"]
    figures |= {f"delta_nll_{kind}": given[kind]["delta_nll"] for kind in KINDS}
    all_NP = torch.ones_like(plan_NP, dtype=torch.bool)
    zero_NY = target_nll(model, pairs, plan_NP, batch, all_NP)
    figures |= {
        "delta_nll_zero": mean_nll(zero_NY, pairs) - figures["nll"],
        "nll_posterior": given["posterior"]["nll"] if options.search else None,
        "plan_sizes": list(shape.sizes),
        "plan_most": list(shape.lengths),
        **plan_use(plan_NP, shape),
        **head_figures(model, pairs, plan_NP, batch),
        "samples": plan_samples(model, tokenizer, pairs),
    }
    if options.search:
        figures["posterior_lengths"] = plan_use(plans["posterior"], shape)["plan_lengths"]
    if options.rate:
        figures["budget"] = list(model.dial.budget)
    if train is not None:
        figures["signals"] = signal_figures(model, tokenizer, train, pairs, batch)
    return figures


def _compare(
    subject: Subject, pairs: PairTensors, readings: dict[str, Reading], control: Subject | None
) -> Figures:
    """Every reading of the same targets, the first of them the model's own. Raises DataError for an
    NLL that is not finite."""
    subject.refuse("sequence_length", "a model of running text")
    if control is not None:
        if control.recipe and control.pairs_form != subject.pairs_form:
            raise CheckpointError(
                f"{control.name} was not trained on pairs as these are: need the control of this "
                "planner. try: its recipe with system=control"
            )
        readings = readings | {CONTROL: source_reading(control, pairs)}
    answers = Answers(subject, pairs) if subject.options.answers else None
    nll, given = {}, []
    for name, reading in bar(iterable=readings.items(), desc="evaluate", unit="reading"):
        nll[name] = reading.nll()
        line = {"given": name, "nll": mean_nll(nll[name], pairs), "plan_nats_per_token": None}
        line["delta_nll"] = line["nll"] - (given or [line])[0]["nll"]
        if answers is not None:
            line["right"] = answers.right(reading.write)
        given.append(line)
    own = given[0]["nll"]
    if not math.isfinite(own):
        raise DataError(
            f"the NLL is {own}: need finite logits. try: another checkpoint, or float32"
        )
    own_NY, is_target_NY = next(iter(nll.values())), pairs.target_NY != IGNORED
    tokens = int(is_target_NY.sum())
    figures = {
        "pairs": len(pairs),
        "tokens": tokens,
        "nll": own,
        "bits_per_byte": own * tokens / math.log(2) / int(pairs.target_bytes_N.sum()),
        "nll_by_position": by_position(own_NY, nll.get(CONTROL), is_target_NY),
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
