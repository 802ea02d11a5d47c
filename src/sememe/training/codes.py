"""Codes that nobody writes any more move to states that somebody has, while the run goes on."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from sememe.concepts.quantise import revive
from sememe.training.recipe import Recipe

# Of `ConceptEmbedding.use`, where a code that gets its even share stands at 4. A code starts at 1,
# so it is taken for dead after 5.5 K concepts without it at the earliest.
FLOOR = 0.25
TOKENS = 8192  # at most, read each time: twice as many states as codes of a usual table
LAST = 0.8  # share of the run after which codes stay: a new one needs steps to be learned


class Revive(TrainerCallback):
    """Every `revive_every` steps, with the shallow states of the blocks trained on last.

    All follows from the step and the weights, so a resumed run does the same.
    """

    def __init__(self, recipe: Recipe, blocks_NT: Tensor, say: Callable[[str], None]):
        self.recipe, self.blocks_NT, self.say = recipe, blocks_NT, say

    def on_step_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        recipe, step, codes = self.recipe, state.global_step, model.codes
        if (
            step == 0
            or step % recipe.revive_every
            or step >= LAST * recipe.steps
            or model.config.quantise == 0
        ):
            return
        if not bool((codes.use < FLOOR).any()):
            return
        end = step * recipe.batch_size
        blocks = max(1, min(TOKENS, recipe.calibration_tokens) // recipe.sequence_length)
        blocks_NT = self.blocks_NT[max(0, end - blocks) : end]
        moved_GK = revive(
            codes,
            model.head,
            model.code_inputs(blocks_NT),
            FLOOR,
            torch.Generator().manual_seed(recipe.seed + step),
        )
        if args.world_size > 1:  # equal on equal machines; made sure of on others
            moved = moved_GK.to(torch.uint8)
            for value in (*model.head.state_dict().values(), *codes.state_dict().values(), moved):
                torch.distributed.broadcast(value, 0)
            moved_GK = moved.bool()
        forget(optimizer, codes, model.head, moved_GK)
        self.say(f"step {step}: {int(moved_GK.sum())} unused codes moved to states of the text")


@torch.no_grad()
def forget(optimizer, codes: nn.Module, head: nn.Module, moved_GK: Tensor) -> None:
    """Zeroes the optimizer's moments of the codes that moved, and of their rows in the head."""
    for g, moved_K in enumerate(moved_GK):
        rows_n = moved_K.nonzero().flatten()
        for p, index in ((codes.weight, (g, rows_n)), *((p, rows_n) for p in head.rows(g))):
            for value in optimizer.state.get(p, {}).values():
                if torch.is_tensor(value) and value.shape == p.shape:
                    value[index] = 0.0
