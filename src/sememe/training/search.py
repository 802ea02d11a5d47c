"""Hard EM beside the ordinary trainer: (N, P) plans z* of the training pairs, on the disk, and the E-steps between M-steps.

RUN/assignments belongs to the run's last step; every checkpoint holds it as it was then, so that a resumed run is the same run.
"""

import shutil
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import TrainerCallback

from sememe.concepts.plan import PlanShape
from sememe.models.planner import PlannerForCausalLM
from sememe.training.em.start import start_plans
from sememe.training.em.step import EStep
from sememe.training.em.store import Assignments
from sememe.training.pairing import PairExamples
from sememe.training.recipe import Recipe

FOLDER = "assignments"


class PlanMeter:
    """One training interval of a planner: nats per target token and per concept, which plans it saw, and the E-step in it.

    Counted first and divided once.
    """

    def __init__(self, shape: PlanShape):
        self.shape = shape
        self.clear()

    def clear(self) -> None:
        self.target = self.plan = 0.0
        self.tokens = self.concepts = self.rows = 0
        self.counts_I = torch.zeros(self.shape.types, dtype=torch.long)
        self.figures: dict[str, float] = {}

    def see(self, outputs, labels_BY: Tensor) -> None:
        """What a forward pass returned."""
        plan_BP = outputs.plan_ids.cpu()
        tokens = int((labels_BY != -100).sum())
        concepts = sum(int((self.shape.targets(plan_BP, i) != -100).sum()) for i in range(self.shape.types))
        self.target += float(outputs.target_nll.detach()) * tokens
        self.plan += float(outputs.plan_nll.detach()) * concepts
        self.tokens, self.concepts, self.rows = self.tokens + tokens, self.concepts + concepts, self.rows + len(plan_BP)
        self.counts_I += self.shape.counts(plan_BP).sum(0)

    def note(self, figures: dict[str, float]) -> None:
        """Figures of an E-step, for the next line of the log."""
        self.figures |= figures

    def read(self) -> dict[str, float | list]:
        """Figures since the last read."""
        found: dict[str, float | list] = dict(self.figures)
        if self.tokens:
            found = {"target_nll": self.target / self.tokens, "plan_nll": self.plan / max(self.concepts, 1),
                     "plan_lengths": (self.counts_I / self.rows).tolist()} | found
        self.clear()
        return found


class Search(TrainerCallback):
    """Keeps z* of every training pair, searches for better ones when it is time, and tells the model which stage it is in."""

    def __init__(self, recipe: Recipe, examples: PairExamples, shape: PlanShape, run: Path, checkpoint: Path | None,
                 meter: PlanMeter, say: Callable[[str], None], show: bool = True):
        """Plans are those of `checkpoint`. What the folder held else is of steps that are taken again.

        Raises CheckpointError where those are of other pairs or of another shape.
        """
        self.recipe, self.examples, self.shape, self.folder = recipe, examples, shape, run / FOLDER
        self.fresh, self.meter, self.say, self.show = checkpoint is None, meter, say, show
        shutil.rmtree(self.folder, ignore_errors=True)
        if checkpoint is not None:
            shutil.copytree(checkpoint / FOLDER, self.folder)
        self.store = Assignments.open(self.folder, shape, len(examples.pairs), examples.pairs.digest())
        examples.plans = self.store.read

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        if self.fresh:
            pairs = self.examples.pairs
            plan_NP = start_plans(model, pairs, self.shape, self.recipe.seed).cpu()
            self.store.write(torch.arange(len(pairs)), plan_NP)
            self.say(f"start: plans of {len(pairs)} pairs from k-means of their targets, {len(plan_NP.unique(dim=0))} of them "
                     "different")

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        recipe, step = self.recipe, state.global_step
        warm = step < round(recipe.em.warmup * recipe.steps)
        stage(model, recipe, warm)
        if recipe.em.due(step, recipe.steps):
            with torch.autocast(model.device.type, torch.bfloat16, enabled=args.bf16):
                self.search(model, step)

    def search(self, model: PlannerForCausalLM, step: int) -> None:
        """One E-step, over the pairs that are trained on next. All follows from the step, the weights and the plans."""
        em = self.recipe.em
        index_n = self.examples.upcoming(step, em.every)
        index_n = index_n[: em.examples or len(index_n)]
        generator = torch.Generator().manual_seed(self.recipe.seed * 1_000_003 + step)
        started = time.monotonic()
        with tqdm(total=len(index_n), desc=f"E-step at step {step}", unit="pair", leave=False, disable=not self.show) as bar:
            found = EStep(proposers=em.proposers, batch=em.batch, price=em.price).run(
                model, self.examples.pairs, self.store, index_n, generator, bar.update)
        self.meter.note(found | {"em_seconds": round(time.monotonic() - started, 2)})

    def on_save(self, args, state, control, **kwargs):
        self.store.copy_to(Path(args.output_dir) / f"checkpoint-{state.global_step}" / FOLDER)


def stage(model: PlannerForCausalLM, recipe: Recipe, warm: bool) -> None:
    """While it warms up the executor learns alone; the planner neither from plans nor through them."""
    model.config.plan_weight = 0.0 if warm else recipe.plan.weight
    model.config.straight_through = recipe.plan.straight_through and not warm
