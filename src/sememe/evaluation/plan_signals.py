"""What plans tell of the texts that are written from them: linear probes read signals of the target
(length, kind, names, numbers, key words) off the planner's own plan, fitted on training pairs and
scored on held-out ones."""

import math
from typing import Any

import torch
from torch import Tensor

from sememe.errors import DataError
from sememe.evaluation.plans import Tick, planned
from sememe.models.planner import PlannerForCausalLM
from sememe.models.planner.signals import SignalProbe, SignalReader
from sememe.pairs import PairTensors

DECAYS = (1e-3, 1e-2, 1e-1, 1.0)  # tried on a fifth of the training pairs
LEAST = 20  # training pairs


@torch.no_grad()
def plan_states(model: PlannerForCausalLM, plan_NP: Tensor) -> Tensor:
    """(N, I · D) mean of each type's concepts in the tables' frame, 0 where it has none; on the
    host."""
    plan_NP = plan_NP.to(model.device)
    return model.plans.means(plan_NP, model.plan_embeddings(plan_NP)).cpu()


def signal_figures(
    model: PlannerForCausalLM,
    tokenizer,
    train: PairTensors,
    heldout: PairTensors,
    batch: int = 8,
    tick: Tick = lambda n: None,
) -> dict[str, dict[str, Any]]:
    """Of each signal `loss` (nats a label), `accuracy`, `auroc` (None where no label has both
    answers) on the held-out pairs, and `base_loss`, `base_accuracy` of saying what is most frequent
    in training. Raises DataError for fewer than 20 training pairs."""
    if len(train) < LEAST:
        raise DataError(
            f"{len(train)} training pairs for the probes of signals: need at least {LEAST}. try: "
            "--signals 200"
        )
    texts, heldout_texts = train.target_texts(tokenizer), heldout.target_texts(tokenizer)
    reader = SignalReader.fit(texts)
    labels, wanted = reader(texts), reader(heldout_texts)
    x_NF, x_MF = (
        plan_states(model, planned(model, pairs, batch, tick)) for pairs in (train, heldout)
    )
    most = len(train) - len(train) // 5

    def some(part: slice) -> dict[str, Tensor]:
        return {name: label[part] for name, label in labels.items()}

    def probe(part: slice, decay: float) -> SignalProbe:
        return SignalProbe(x_NF.shape[1]).fit(x_NF[part], some(part), decay)

    def left(decay: float) -> float:
        found = probe(slice(0, most), decay).score(
            x_NF[most:], some(slice(most, None)), some(slice(0, most))
        )
        return sum(one["loss"] for one in found.values())

    scores = probe(slice(None), min(DECAYS, key=left)).score(x_MF, wanted, labels)
    return {
        name: {key: None if math.isnan(x) else x for key, x in one.items()}
        for name, one in scores.items()
    }
