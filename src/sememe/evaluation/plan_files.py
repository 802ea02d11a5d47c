"""Planners and controls on pairs, by name → figures beside the run they belong to
(RUN/evaluate.json, RUN/ablate.json)."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from sememe.errors import CheckpointError, DataError, SememeError
from sememe.evaluation.answers import Answers
from sememe.evaluation.figures import CONTRACT, keep, run_recipe
from sememe.evaluation.heldout import refuse_trained
from sememe.evaluation.plan_ablation import plan_curve, plan_passes
from sememe.evaluation.plan_signals import signal_figures
from sememe.evaluation.plans import IGNORED, KINDS, by_position, joined_nll, plan_figures
from sememe.evaluation.quality import system_of
from sememe.models import PlannerConfig, PlannerForCausalLM
from sememe.models.loading import load_model, model_folder, read_config
from sememe.pairs import PairForm, PairTensors

SAMPLES, NEW_TOKENS = 3, 64
Search = Callable[..., Tensor]
"""(model, pairs, the recipe's `em` or {}, tick) → (N, P) plans z* found with the targets in
view."""


def pair_form(model: str) -> PairForm | None:
    """How the pairs of a planner, or of a control on pairs, are had; None for a model of running
    text."""
    recipe = _recipe(model)
    if recipe:
        return PairForm.of(recipe)
    folder = model_folder(model)
    planner = folder is not None and isinstance(read_config(folder), PlannerConfig)
    return PairForm() if planner else None


def _recipe(model: str) -> dict[str, Any]:
    """That of a run, given as its folder or as RUN/model."""
    return run_recipe(model) or (
        run_recipe(Path(model).parent) if Path(model).name == "model" else {}
    )


def _refuse(model: str, **options) -> None:
    """Raises SememeError for what is asked of running text alone."""
    for name, value in options.items():
        if value:
            raise SememeError(
                f"got --{name.replace('_', '-')}, but {model} reads pairs of a source and a "
                "target: need none. "
                f"try: without --{name.replace('_', '-')}"
            )


def evaluate_pair_files(
    model: str,
    data: Sequence[str],
    tokens: int = 8192,
    control: str | None = None,
    batch: int = 8,
    base: str | None = None,
    search: Search | None = None,
    sequence_length: int | None = None,
    rate: float | None = None,
    rates: Sequence[float] = (),
    answers: bool = False,
    signals: int = 0,
    budget: Sequence[int] = (),
) -> dict[str, Any]:
    """`plan_figures` of a saved planner on pairs of a text, or the NLL of a control on pairs; kept
    as RUN/evaluate.json.

    Several texts are measured one by one: the figures are those of the first, and `by_data` has one
    object for each. `search` finds z* of the held-out pairs, with their targets in view. With
    `answers` every target is written too, and those that end rightly are counted. With `signals`
    linear probes are fitted on the plans of so many training pairs. With `budget` the planner's own
    plans have so many concepts of each type at most; z* may have more.

    Raises:
        DataError: a text is missing, has no such pairs, or is the one that the run was trained on.
        CheckpointError: `model` or `control` cannot be loaded, their tokenizers differ, or the
            control was not trained on pairs.
        SememeError: an option that says nothing about pairs."""
    _refuse(model, sequence_length=sequence_length, rate=rate, rates=rates)
    form = pair_form(model)
    for name in data:
        refuse_trained(model, name)
    loaded, tokenizer = load_model(model, base=base)
    planner = isinstance(loaded, PlannerForCausalLM)
    if budget:
        if not planner:
            raise SememeError(
                f"got --rate, but {model} makes no plans: need a run of system: planner. try: "
                "without --rate"
            )
        loaded.limit(budget)
    taught = _training_pairs(model, loaded, tokenizer, signals) if signals else None
    other = None if control is None else _control(control, form, tokenizer, base)
    found = []
    for name in data:
        pairs = form.load(name, tokenizer, min_tokens=tokens)
        asked, best = Answers(tokenizer, pairs, batch) if answers else None, None
        if planner and search is not None:
            with tqdm(total=len(pairs), desc="z* of held-out pairs", unit="pair") as bar:
                best = search(loaded, pairs, _recipe(model).get("em", {}), bar.update)
        readings = 1 + (other is not None) + planner * (len(KINDS) + (best is not None))
        passes, written = (
            readings + 2 * planner,
            0 if asked is None else (readings if planner else 1) * len(asked.right),
        )
        with tqdm(
            total=passes * len(pairs) + written, desc="evaluate", unit="pair", mininterval=1
        ) as bar:
            if asked is not None:
                asked.tick = bar.update
            if planner:
                result = plan_figures(loaded, pairs, best, other, batch, bar.update, asked)
                result["samples"] = samples(loaded, tokenizer, pairs)
            else:
                result = _alone(loaded, pairs, other, batch, bar.update, asked)
        if taught is not None:
            with tqdm(
                total=len(taught) + len(pairs),
                desc="plans for the probes",
                unit="pair",
                mininterval=1,
            ) as bar:
                result["signals"] = signal_figures(
                    loaded, tokenizer, taught, pairs, batch, bar.update
                )
        result |= {
            "bits_per_byte": result["nll"]
            * result["tokens"]
            / math.log(2)
            / int(pairs.target_bytes_N.sum()),
            "system": system_of(loaded.config),
            "model": str(model),
            "data": str(name),
            "control": control,
            "tokens_asked": tokens,
            **({"budget": list(loaded.dial.budget)} if budget else {}),
            **({} if asked is None else {"answers": len(asked.right)}),
        }
        found.append(dict.fromkeys(CONTRACT) | result)
    result = found[0]
    if len(found) > 1:
        result["by_data"] = [
            {key: value for key, value in one.items() if key != "samples"} for one in found
        ]
    keep(model, "evaluate.json", result)
    return result


def _training_pairs(model: str, loaded, tokenizer, count: int) -> PairTensors:
    """The first pairs that a run was trained on. Raises SememeError where there are no plans, or no
    run."""
    recipe = _recipe(model)
    if not isinstance(loaded, PlannerForCausalLM) or not recipe:
        raise SememeError(
            f"got --signals, but {model} is no run of system: planner, on whose training pairs "
            "probes are fitted: "
            "need one. try: without --signals"
        )
    return pair_form(model).load(recipe["data"]["train"], tokenizer, max_pairs=count)


def _control(name: str, form: PairForm, tokenizer, base: str | None):
    """A language model to read source and target as one text: the control on equal pairs, or a base
    as it is."""
    if _recipe(name) and pair_form(name) != form:
        raise CheckpointError(
            f"{name} was not trained on pairs as these are: need the control of this planner. try: "
            "its recipe "
            "with system=control"
        )
    other, its_own = load_model(name, base=base)
    if isinstance(other, PlannerForCausalLM):
        raise CheckpointError(
            f"{name} is a planner: need a control, which sees the source. try: its recipe with "
            "system=control"
        )
    if its_own.get_vocab() != tokenizer.get_vocab():
        raise CheckpointError(
            f"{name} has another tokenizer: need the same base. try: the planner's own control"
        )
    return other


def _alone(
    model,
    pairs: PairTensors,
    control,
    batch: int,
    tick: Callable[[int], None],
    answers: Answers | None,
) -> dict[str, Any]:
    """A control on pairs: it sees the source, and the loss is of the target."""
    tokens = int((pairs.target_NY != IGNORED).sum())
    nll_NY, control_NY = (
        None if one is None else joined_nll(one, pairs, batch, tick) for one in (model, control)
    )
    nll = float(nll_NY.double().sum()) / tokens
    found = {
        "pairs": len(pairs),
        "tokens": tokens,
        "nll": nll,
        "nll_by_position": by_position(nll_NY, pairs, control_NY),
        "given": [
            {"given": "source", "nll": nll, "delta_nll": 0.0, "plan_nats_per_token": None}
            | ({} if answers is None else {"right": answers.of_sources(model)})
        ],
        "layer_share": 1.0,
    }
    if control_NY is not None:
        found["control_nll"] = float(control_NY.double().sum()) / tokens
        found["delta_nll_control"] = nll - found["control_nll"]
    return found


@torch.no_grad()
def samples(model: PlannerForCausalLM, tokenizer, pairs: PairTensors) -> list[dict[str, Any]]:
    """Some sources with their targets, the plan made of each, and what is written from it."""
    some = pairs.rows(slice(0, SAMPLES))
    plan_BP = model.plan(some.source_NU, some.source_mask_NU)[0][:, 0]
    texts, plans = model.write(plan_BP, NEW_TOKENS), model.plans.shape.unpack(plan_BP.cpu())

    def text(ids) -> str:
        return tokenizer.decode(ids, skip_special_tokens=True)

    return [
        {
            "source": text(some.source_NU[n][some.source_mask_NU[n].bool()]),
            "target": text(some.target_NY[n][some.target_NY[n] != IGNORED]),
            "plan": plans[n],
            "written": text(texts[n]),
        }
        for n in range(len(some))
    ]


def ablate_pair_files(
    model: str,
    data: str,
    tokens: int,
    shares: Sequence[float],
    seeds: int = 3,
    batch: int = 8,
    base: str | None = None,
    sequence_length: int | None = None,
    rate: float | None = None,
) -> dict[str, Any]:
    """`plan_curve` of a saved planner on pairs of a text; kept as RUN/ablate.json. Raises as
    `evaluate_pair_files`."""
    _refuse(model, sequence_length=sequence_length, rate=rate)
    refuse_trained(model, data)
    loaded, tokenizer = load_model(model, base=base)
    if not isinstance(loaded, PlannerForCausalLM):
        raise CheckpointError(
            f"{model} writes no plans to ablate: need a run of system: planner. try: sememe "
            f"evaluate {model}"
        )
    pairs = pair_form(model).load(data, tokenizer, min_tokens=tokens)
    if len(pairs) < 2:
        raise DataError(
            f"{data} and --tokens {tokens} make one pair: need at least two, to swap plans between "
            "them. "
            f"try: --tokens {4 * tokens}"
        )
    shares = sorted(set(shares))
    with tqdm(
        total=plan_passes(shares, seeds) * len(pairs), desc="ablate", unit="pair", mininterval=1
    ) as bar:
        result = {"model": str(model), "data": str(data)} | plan_curve(
            loaded, tokenizer, pairs, shares, seeds, batch, bar.update
        )
    keep(model, "ablate.json", result)
    return result
