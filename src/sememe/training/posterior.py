"""z* of pairs that nobody trains on: E-steps with their targets in view, from the planner's own
plans: a posterior."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sememe.evaluation.plans import planned
from sememe.models.planner import PlannerForCausalLM
from sememe.pairs import PairTensors
from sememe.training.em.step import EStep
from sememe.training.em.store import Assignments
from sememe.training.plan_recipe import Em

ROUNDS = 3  # of search, each from what the one before found


def best_plans(
    model: PlannerForCausalLM,
    pairs: PairTensors,
    em: dict[str, Any] | None = None,
    tick: Callable[[int], None] = lambda n: None,
    rounds: int = ROUNDS,
    seed: int = 0,
) -> Tensor:
    """(N, P) the best plans that `rounds` of the recipe's own search find, by log p(y | z) + price
    · log p(z | u)."""
    said, shape, index_N = Em(**(em or {})), model.plans.shape, torch.arange(len(pairs))
    done = 0

    def share(count: int) -> None:  # of the pairs, over all rounds
        nonlocal done
        before, done = done // rounds, done + count
        tick(done // rounds - before)

    with tempfile.TemporaryDirectory() as folder:
        store = Assignments.open(Path(folder), shape, len(pairs), pairs.digest())
        store.write(index_N, planned(model, pairs, said.batch))
        for number in range(rounds):
            generator = torch.Generator().manual_seed(seed * 1_000_003 + number)
            EStep(said.proposers, said.batch, said.price).run(
                model, pairs, store, index_N, generator, share
            )
        return store.read(index_N)
