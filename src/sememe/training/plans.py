"""Training on pairs and plans: examples in the order of a run, the hard EM between its steps, and
what a planner is watched by.

z*, the plans of the N training pairs, is one int32 tensor (N, P): `PairExamples.plan_NP`. Batches
read it when their step is taken, E-steps change it, and every checkpoint holds it as it was then,
so that a resumed run is the run that was never stopped."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save
from torch import Tensor
from torch.utils.data import Dataset
from tqdm.auto import tqdm
from transformers import TrainerCallback

from sememe import storage
from sememe.backbone.processes import from_first, gathered
from sememe.backbone.sharding import whole
from sememe.concepts.plan import PlanShape
from sememe.data import block_order
from sememe.evaluation.plans import mean_nll, other_plans, plan_use, target_nll
from sememe.models.planner.em import e_step, greedy_plans
from sememe.models.planner.model import PlannerForCausalLM
from sememe.options import Recipe
from sememe.pairs import IGNORED, PairTensors

if TYPE_CHECKING:
    from sememe.systems import Run

PLANS = "plans.safetensors"  # in a checkpoint
FEW = 8  # pairs of an E-step whose plans are compared with the planner's own


class PairExamples(Dataset):
    """Examples of (U,) source and (Y,) target: equal pairs in an equal order for `planner` and
    `control`, targets as long as the curriculum has them.

    A planner's examples name their pair, and `prepare` reads its plan when the step is taken:
    loaders work in advance, and an E-step may come between. The control's are one text of BOS,
    source and target, with the loss on the target alone."""

    plan_NP: Tensor
    signals: dict[str, Tensor] = {}  # labels of all pairs

    def __init__(self, recipe: Recipe, pairs: PairTensors, bos: int | None = None):
        """With `bos`, source and target are one text after it."""
        self.batch = recipe.batch_size
        self.shape = PlanShape(tuple(recipe.plan.sizes), tuple(recipe.plan.lengths))
        self.pairs = pairs
        self.order_n = block_order(len(pairs), recipe.steps, self.batch, recipe.seed)
        self.joined = bos is not None
        sides = pairs.source_NU, pairs.source_mask_NU, pairs.target_NY
        self.sides = pairs.joined(bos) if self.joined else sides
        lengths = torch.tensor([recipe.target_tokens(step) for step in range(recipe.steps)])
        self.length_n = lengths.repeat_interleave(self.batch)  # target tokens at most
        target_n, source_n = (
            mask.sum(1)[self.order_n] for mask in (pairs.target_NY != IGNORED, pairs.source_mask_NU)
        )
        self.tokens_n = target_n.minimum(self.length_n) + source_n

    def load_plans(self, checkpoint: Path) -> None:
        """Sets z* as `HardEM.on_save` wrote it. Raises ValueError or CheckpointError where it is of
        other pairs or another shape."""
        plan_NP = self.shape.check(load_file(checkpoint / PLANS)["plans"])
        if plan_NP.dtype != torch.int32 or len(plan_NP) != len(self.pairs):
            raise ValueError(f"{len(plan_NP)} plans of {plan_NP.dtype}")
        self.plan_NP = plan_NP

    def __len__(self) -> int:
        return len(self.order_n)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        n = self.order_n[i]
        ids_T, mask_T, labels_Y = (x[n] for x in self.sides)
        after_Y = (labels_Y != IGNORED).cumsum(0) > self.length_n[i]
        return {
            "input_ids": ids_T,
            "attention_mask": mask_T * ~after_Y if self.joined else mask_T,
            "labels": labels_Y.masked_fill(after_Y, IGNORED),
            "pair": n,
            "step": i // self.batch,
        }

    def tokens(self, step: int) -> int:
        """Source and target tokens that the first `step` steps train on."""
        return int(self.tokens_n[: step * self.batch].sum())

    def upcoming(self, step: int, steps: int) -> Tensor:
        """(n,) the pairs of `steps` steps from number `step` on, in the order in which they are
        first met."""
        pairs = self.of_steps(step, steps).tolist()
        return torch.tensor(list(dict.fromkeys(pairs)), dtype=torch.long)

    def of_steps(self, step: int, steps: int = 1) -> Tensor:
        """(n,) the pairs of `steps` steps from number `step` on."""
        return self.order_n[step * self.batch : (step + steps) * self.batch]

    def prepare(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """A batch without positions that are padding in every row, and with its plans as they are
        now."""
        ids_BT, mask_BT, labels_BY, pair_B, step_B = inputs.values()
        some_T = mask_BT.bool().any(0)
        some_Y = some_T if self.joined else (labels_BY != IGNORED).any(0)
        batch = {
            "input_ids": ids_BT[:, some_T],
            "attention_mask": mask_BT[:, some_T],
            "labels": labels_BY[:, some_Y],
        }
        if self.joined:
            return batch
        chosen, device = pair_B.cpu(), pair_B.device
        batch["plan_ids"] = self.plan_NP[chosen].long().to(device)
        # Of all parts of the step's batch, in whatever process they are.
        written_bP = self.shape.targets(self.plan_NP[self.of_steps(int(step_B[0]))]) != IGNORED
        batch["concepts_in_batch"] = written_bP.sum().to(device)
        batch["rows_in_batch"] = len(written_bP)
        batch["signals"] = {name: x_N[chosen].to(device) for name, x_N in self.signals.items()}
        return batch


# ---- hard EM ----


class HardEM(TrainerCallback):
    """Takes an E-step every `em.every` steps, and sets the stage that the model is in: in the
    warm-up the executor learns alone, the planner neither from plans nor through them."""

    def __init__(self, run: Run):
        self.run = run
        self.examples: PairExamples = run.batches.examples

    def on_train_begin(self, args, state, control, **kwargs):
        # Equal in all processes on equal machines; made sure of on others.
        self.examples.plan_NP = from_first(self.examples.plan_NP)

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        em, step = self.run.recipe.em, state.global_step
        warm, search = (round(share * self.run.recipe.steps) for share in em.stages)
        model.dial.plan_weight = 0.0 if step < warm else model.config.plan_weight
        model.dial.straight_through = model.config.straight_through and step >= warm
        searches = em.every and step >= search and (step - search) % em.every == 0
        if searches:
            model.eval()
            autocast = torch.autocast(model.device.type, torch.bfloat16, enabled=args.bf16)
            with autocast, whole(model.backbone):
                self.run.meter.figures |= self.e_step(model, step)
            model.train()
        if searches or step == warm:  # other plans, or another loss
            self.run.guard.forget()

    def e_step(self, model: PlannerForCausalLM, step: int) -> dict[str, float]:
        """Better plans for the pairs that are trained on next. All follows from the step, the
        weights and the plans."""
        em, pairs, plan_NP = self.run.recipe.em, self.examples.pairs, self.examples.plan_NP
        index_n = self.examples.upcoming(step, em.every)
        index_n = index_n[: em.examples or len(index_n)]
        seed = self.run.recipe.seed * 1_000_003 + step
        started = time.monotonic()
        name = f"E-step at step {step}"
        with tqdm(total=len(index_n), desc=name, leave=False, disable=not self.run.show) as bar:
            figures = e_step(model, pairs, plan_NP, index_n, em, seed, bar.update, shared=True)
        figures["em_seconds"] = round(time.monotonic() - started, 2)
        # Whether the planner's own plans do for training pairs what their z* do.
        some, z_NP = pairs.rows(index_n[:FEW]), plan_NP[index_n[:FEW]].long()
        plans = {
            "em_nll": z_NP,
            "em_nll_planner": greedy_plans(model, some),
            "em_nll_shuffle": other_plans(z_NP, model.plans.shape, "shuffle", step),
        }
        nll = {key: mean_nll(target_nll(model, some, x_NP), some) for key, x_NP in plans.items()}
        return figures | nll

    def on_save(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            storage.write(checkpoint / PLANS, save({"plans": self.examples.plan_NP}))


class PlanMeter:
    """One training interval of a planner: nats per target token and per concept, which plans it
    saw, how sure it was of them, and the E-step in it. Counted first and divided once."""

    def __init__(self, shape: PlanShape):
        self.shape = shape
        self.clear()

    def clear(self) -> None:
        self.figures: dict[str, float | list] = {}
        """Of an E-step, for the next line of the log."""
        self.plans: list[Tensor] = []
        # Of each slot: how often it was written, entropy, largest probability, first choice is z*.
        self.slots_4P = torch.zeros(4, self.shape.slots)
        # Nats, and what they are counted over.
        self.sums: dict[str, Tensor] = defaultdict(lambda: torch.zeros(2))

    @torch.no_grad()
    def see(self, outputs, labels_BY: Tensor) -> None:
        """What a forward pass returned."""
        self.plans.append(outputs.plan_ids.cpu())
        target_BP = self.shape.targets(outputs.plan_ids)
        written_BP = target_BP != IGNORED
        p_BPM = outputs.plan_logits.float().softmax(-1)
        max_BP, first_BP = p_BPM.max(-1)
        entropy_BP = torch.special.entr(p_BPM).sum(-1)
        slots_4BP = torch.stack([written_BP.float(), entropy_BP, max_BP, first_BP == target_BP])
        self.slots_4P += (slots_4BP * written_BP).sum(1).cpu()
        counts = {
            "target_nll": (labels_BY != IGNORED).sum(),
            "plan_nll": written_BP.sum(),
            "signal_nll": len(labels_BY),
        }
        for key, count in counts.items():
            if (nats := getattr(outputs, key)) is not None:
                self.sums[key] += torch.tensor([float(nats) * count, count])

    def read(self) -> dict[str, float | list]:
        """Figures since the last read, of all processes."""
        figures = self.figures
        parts = gathered([(self.plans, self.slots_4P, dict(self.sums))])
        plans = [plan_BP for plans, _, _ in parts for plan_BP in plans]
        if plans:
            plan_NP = torch.cat(plans)
            written_P, entropy_P, max_P, right_P = sum(slots_4P for _, slots_4P, _ in parts)
            largest = [x_K.max() / x_K.sum() for x_K in self.shape.id_counts(plan_NP)]
            for key in parts[0][2]:
                nats, count = sum(sums[key] for _, _, sums in parts)
                figures[key] = float(nats / count)
            figures |= plan_use(plan_NP, self.shape) | {
                "plan_largest_share": _known(torch.stack(largest)),
                "plan_match": float(right_P.sum() / written_P.sum()),
                "plan_entropy_by_slot": _known(entropy_P / written_P),
                "plan_max_prob_by_slot": _known(max_P / written_P),
            }
        self.clear()
        return figures


def _known(shares: Tensor) -> list[float | None]:
    """None where nothing was counted."""
    return [None if math.isnan(x) else x for x in shares.tolist()]
