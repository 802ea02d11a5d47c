"""Pairs in the order of a run: examples of (U,) source and (Y,) target, and what a step reads of
them.

A planner's examples name their pair, and its plan is read when the step is taken: loaders work
ahead, and an E-step may stand between. The control's are one text, BOS, source and target, with the
loss on the target alone."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.data import Dataset

from sememe.data import block_order
from sememe.pairs import IGNORED, PairTensors
from sememe.training.recipe import Recipe


class PairExamples(Dataset):
    """Equal pairs in an equal order for `planner` and `control`, targets as long as the curriculum
    has them."""

    def __init__(self, recipe: Recipe, pairs: PairTensors, bos: int | None = None):
        """With `bos`, source and target are one text behind it."""
        self.recipe, self.pairs = recipe, pairs
        self.order_n = block_order(len(pairs), recipe.steps, recipe.batch_size, recipe.seed)
        self.plans: Callable[[Tensor], Tensor] | None = None
        self.signals: dict[str, Tensor] | None = None  # labels of all pairs
        self.first_NP: Tensor | None = None  # plans that a fresh run begins with
        self._joined = None if bos is None else pairs.joined(bos)
        kept_n = torch.tensor([self._length(i) for i in range(len(self.order_n))])
        targets_n = (pairs.target_NY != IGNORED).sum(1)[self.order_n]
        self._tokens_n = (
            torch.minimum(targets_n, kept_n) + pairs.source_mask_NU.sum(1)[self.order_n]
        ).cumsum(0)

    def __len__(self) -> int:
        return len(self.order_n)

    def _length(self, i: int) -> int:
        recipe = self.recipe
        return recipe.curriculum.length(i // recipe.batch_size, recipe.steps, recipe.target_length)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        n, pairs = int(self.order_n[i]), self.pairs
        if self._joined is None:
            labels_Y = pairs.target_NY[n].clone()
            labels_Y[self._length(i) :] = IGNORED
            return {
                "input_ids": pairs.source_NU[n],
                "attention_mask": pairs.source_mask_NU[n],
                "labels": labels_Y,
                "pair": torch.tensor(n),
            }
        ids_T, mask_T, labels_T = (x[n] for x in self._joined)
        end = 1 + int(pairs.source_mask_NU[n].sum()) + self._length(i)
        labels_T, mask_T = labels_T.clone(), mask_T.clone()
        labels_T[end:], mask_T[end:] = IGNORED, 0
        return {"input_ids": ids_T, "attention_mask": mask_T, "labels": labels_T}

    def tokens(self, step: int) -> int:
        """Source and target tokens that the first `step` steps train on."""
        end = min(step * self.recipe.batch_size, len(self))
        return int(self._tokens_n[end - 1]) if end else 0

    def upcoming(self, step: int, steps: int) -> Tensor:
        """(n,) the pairs of `steps` steps from number `step` on, in the order in which they are
        first met."""
        batch = self.recipe.batch_size
        seen = self.order_n[step * batch : (step + steps) * batch].tolist()
        return torch.tensor(list(dict.fromkeys(seen)), dtype=torch.long)

    def prepare(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """A batch without columns that are padding in every row, and with its plans as they are
        now."""
        target_T, mask_T = (
            (inputs["labels"] != IGNORED).any(0),
            inputs["attention_mask"].bool().any(0),
        )
        if self._joined is not None:
            width = int(mask_T.sum())
            return {key: value[:, :width] for key, value in inputs.items()}
        first, width = int((~mask_T).sum()), int(target_T.sum())
        pair_B, device = inputs["pair"].cpu(), inputs["pair"].device
        made = {
            "input_ids": inputs["input_ids"][:, first:],
            "attention_mask": inputs["attention_mask"][:, first:],
            "labels": inputs["labels"][:, :width],
            "plan_ids": self.plans(pair_B).to(device),
        }
        if self.signals is not None:
            made["signals"] = {
                name: label[pair_B].to(device) for name, label in self.signals.items()
            }
        return made
