"""Hard EM beside the ordinary trainer: (N, P) plans z* of the training pairs, on the disk, and the
E-steps between M-steps.

RUN/assignments belongs to the run's last step; every checkpoint holds it as it was then, so that a resumed run is the same run.
"""

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import TrainerCallback

from sememe.concepts.plan import NULL, PlanShape
from sememe.evaluation.plans import other_plans, planned, target_nll
from sememe.evaluation.quality import perplexity
from sememe.models.planner import PlannerForCausalLM
from sememe.pairs import IGNORED, PairTensors
from sememe.training.em.start import start_plans
from sememe.training.em.step import EStep
from sememe.training.em.store import Assignments
from sememe.training.em.words import word_plans
from sememe.training.pairing import PairExamples
from sememe.training.recipe import Recipe

FOLDER = "assignments"
DUE = "due.json"  # in a checkpoint: the step of the next E-step, and the interval
FEW = 8  # pairs of an E-step that the planner plans itself, to see whether it comes near


class PlanMeter:
    """One training interval of a planner: nats per target token and per concept, which plans it
    saw, how sure it was of them, and the E-step in it.

    Counted first and divided once."""

    def __init__(self, shape: PlanShape):
        self.shape = shape
        self.clear()

    def clear(self) -> None:
        self.target = self.plan = self.signal = 0.0
        self.tokens = self.concepts = self.rows = 0
        self.counts_I = torch.zeros(self.shape.types, dtype=torch.long)
        self.ids = [torch.zeros(size, dtype=torch.float64) for size in self.shape.sizes]
        self.sure_4P = torch.zeros(
            4, self.shape.slots
        )  # places asked for, entropy, largest probability, first choice is z*
        self.figures: dict[str, float] = {}

    def see(self, outputs, labels_BY: Tensor) -> None:
        """What a forward pass returned."""
        plan_BP = outputs.plan_ids.cpu()
        tokens = int((labels_BY != -100).sum())
        concepts = sum(
            int((self.shape.targets(plan_BP, i) != -100).sum()) for i in range(self.shape.types)
        )
        self.target += float(outputs.target_nll.detach()) * tokens
        self.plan += float(outputs.plan_nll.detach()) * concepts
        if outputs.signal_nll is not None:
            self.signal += float(outputs.signal_nll.detach()) * len(plan_BP)
        self.tokens, self.concepts, self.rows = (
            self.tokens + tokens,
            self.concepts + concepts,
            self.rows + len(plan_BP),
        )
        self.counts_I += self.shape.counts(plan_BP).sum(0)
        for i, counts_K in enumerate(self.ids):
            ids_BL = self.shape.of_type(plan_BP, i)
            counts_K += torch.bincount(ids_BL[ids_BL != NULL], minlength=len(counts_K))
        self.sure_4P += self._sure(outputs).cpu()

    @torch.no_grad()
    def _sure(self, outputs) -> Tensor:
        """(4, P) sums over the rows. What a slot holds is chosen one place ahead of it, so a type
        has as many places as slots: behind its last one nothing is asked."""
        found = []
        for i, x_BLK in enumerate(outputs.plan_logits):
            target_BL = self.shape.targets(outputs.plan_ids, i)[:, :-1]
            log_p_BLK = x_BLK[:, :-1].detach().float().log_softmax(-1)
            p_BLK = log_p_BLK.exp()
            most_BL, first_BL = p_BLK.max(-1)
            one_4BL = torch.stack(
                [
                    torch.ones_like(most_BL),
                    -(p_BLK * log_p_BLK).sum(-1),
                    most_BL,
                    (first_BL == target_BL).float(),
                ]
            )
            found.append((one_4BL * (target_BL != -100)).sum(1))
        return torch.cat(found, 1)

    def note(self, figures: dict[str, float]) -> None:
        """Figures of an E-step, for the next line of the log."""
        self.figures |= figures

    def read(self) -> dict[str, float | list]:
        """Figures since the last read."""
        found: dict[str, float | list] = dict(self.figures)
        if self.tokens:
            places_P = self.sure_4P[0]
            entropy, most = (
                [float(x) if n else None for x, n in zip(sums_P / places_P, places_P, strict=True)]
                for sums_P in self.sure_4P[1:3]
            )
            found = {
                "target_nll": self.target / self.tokens,
                "plan_nll": self.plan / max(self.concepts, 1),
                "plan_lengths": (self.counts_I / self.rows).tolist(),
                "plan_ids_used": [int((x > 0).sum()) for x in self.ids],
                "plan_perplexity": [perplexity(x) if bool(x.any()) else None for x in self.ids],
                "plan_largest_share": [
                    float(x.max() / x.sum()) if bool(x.any()) else None for x in self.ids
                ],
                "plan_match": float(self.sure_4P[3].sum() / places_P.sum().clamp(min=1)),
                **({"signal_nll": self.signal / self.rows} if self.signal else {}),
                "plan_entropy_by_slot": entropy,
                "plan_max_prob_by_slot": most,
            } | found
        self.clear()
        return found


@torch.no_grad()
def reach(
    model: PlannerForCausalLM, pairs: PairTensors, plan_NP: Tensor, seed: int
) -> dict[str, float]:
    """Whether the planner's own plans do for training pairs what their z* do: nats per target token
    with z* (`em_nll`), with the planner's greedy plan, and with z* shuffled over the pairs, by the
    same few pairs. `model` is put into `eval` meanwhile."""
    some, training = pairs.rows(slice(0, FEW)), model.training
    plan_NP, tokens = plan_NP[:FEW], int((some.target_NY != IGNORED).sum())
    model.eval()
    plans = {
        "em_nll": plan_NP,
        "em_nll_planner": planned(model, some),
        "em_nll_shuffle": other_plans(plan_NP, model.plans.shape, "shuffle", seed),
    }
    found = {
        key: float(target_nll(model, some, one_NP).double().sum()) / max(tokens, 1)
        for key, one_NP in plans.items()
    }
    model.train(training)
    return found


def first_plans(
    recipe: Recipe,
    model: PlannerForCausalLM,
    pairs: PairTensors,
    tokenizer,
    say: Callable[[str], None],
) -> Tensor:
    """(N, P) plans that a run begins with, read off the targets; the model's tables begin as what
    they mean.

    Raises DataError where the targets do not tell pairs apart, or have no words in common."""
    if recipe.plan.begins == "words":
        plan_NP, means = (
            word_plans(model, pairs, tokenizer.convert_ids_to_tokens(range(len(tokenizer)))),
            "key words",
        )
    else:
        plan_NP, means = start_plans(model, pairs, model.plans.shape, recipe.seed).cpu(), "k-means"
    say(
        f"start: plans of {len(pairs)} pairs from {means} of their targets, "
        f"{len(plan_NP.unique(dim=0))} of them different"
    )
    return plan_NP


class Search(TrainerCallback):
    """Keeps z* of every training pair, searches for better ones when it is time, and tells the
    model which stage it is in."""

    def __init__(
        self,
        recipe: Recipe,
        examples: PairExamples,
        shape: PlanShape,
        run: Path,
        checkpoint: Path | None,
        meter: PlanMeter,
        first_NP: Tensor | None = None,
        show: bool = True,
    ):
        """Plans are those of `checkpoint`, or of a fresh run `first_NP`; what the folder held else
        is of steps that are taken again.

        Raises CheckpointError where those are of other pairs or of another shape."""
        self.recipe, self.examples, self.shape, self.folder = recipe, examples, shape, run / FOLDER
        self.meter, self.show = meter, show
        self.next, self.interval = recipe.em.starts(recipe.steps), recipe.em.every
        shutil.rmtree(self.folder, ignore_errors=True)
        if checkpoint is not None:
            shutil.copytree(checkpoint / FOLDER, self.folder)
            if (self.folder / DUE).exists():  # not in those of earlier versions
                self.next, self.interval = json.loads(
                    (self.folder / DUE).read_text(encoding="utf-8")
                )
        self.store = Assignments.open(
            self.folder, shape, len(examples.pairs), examples.pairs.digest()
        )
        if first_NP is not None:
            self.store.write(torch.arange(len(first_NP)), first_NP)
        examples.plans = self.store.read

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        recipe, step = self.recipe, state.global_step
        warm = step < round(recipe.em.warmup * recipe.steps)
        stage(model, recipe, warm)
        if recipe.em.every and step >= self.next:
            with torch.autocast(model.device.type, torch.bfloat16, enabled=args.bf16):
                self.search(model, step)

    def search(self, model: PlannerForCausalLM, step: int) -> None:
        """One E-step, over the pairs that are trained on next. All follows from the step, the
        weights and the plans."""
        em = self.recipe.em
        index_n = self.examples.upcoming(step, self.interval)
        index_n = index_n[: em.examples or len(index_n)]
        generator = torch.Generator().manual_seed(self.recipe.seed * 1_000_003 + step)
        started = time.monotonic()
        with tqdm(
            total=len(index_n),
            desc=f"E-step at step {step}",
            unit="pair",
            leave=False,
            disable=not self.show,
        ) as bar:
            found = EStep(proposers=em.proposers, batch=em.batch, price=em.price).run(
                model, self.examples.pairs, self.store, index_n, generator, bar.update
            )
        seconds = round(time.monotonic() - started, 2)
        found |= reach(model, self.examples.pairs.rows(index_n), self.store.read(index_n), step)
        self.interval = em.interval(self.interval, found.get("em_flips"))
        self.next = step + self.interval
        self.meter.note(found | {"em_seconds": seconds, "em_interval": self.interval})

    def on_save(self, args, state, control, **kwargs):
        kept = Path(args.output_dir) / f"checkpoint-{state.global_step}" / FOLDER
        self.store.copy_to(kept)
        (kept / DUE).write_text(json.dumps([self.next, self.interval]), encoding="utf-8")


def stage(model: PlannerForCausalLM, recipe: Recipe, warm: bool) -> None:
    """While it warms up the executor learns alone; the planner neither from plans nor through
    them."""
    model.config.plan_weight = 0.0 if warm else recipe.plan.weight
    model.config.straight_through = recipe.plan.straight_through and not warm
