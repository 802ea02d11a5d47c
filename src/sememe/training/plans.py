"""Training on pairs and plans: examples in the order of a run, the hard EM between its steps, and
what a planner is watched by.

z*, the plans of the N training pairs, is one int32 tensor (N, P): `PairExamples.plan_NP`. Batches
read it when their step is taken, E-steps change it, and every checkpoint holds it as it was then,
so that a resumed run is the run that was never stopped."""

import math
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save
from torch import Tensor
from torch.utils.data import Dataset
from tqdm.auto import tqdm
from transformers import TrainerCallback

from sememe import storage
from sememe.concepts.plan import PlanShape
from sememe.data import block_order
from sememe.errors import CheckpointError
from sememe.evaluation.plans import mean_nll, other_plans, plan_use, target_nll
from sememe.models.planner.em import e_step, greedy_plans
from sememe.models.planner.first_plans import key_word_plans, piece_plans
from sememe.models.planner.model import PlannerForCausalLM
from sememe.options import Recipe
from sememe.pairs import IGNORED, PairTensors

PLANS = "plans.safetensors"  # in a checkpoint
FEW = 8  # pairs of an E-step whose plans are compared with the planner's own


class PairExamples(Dataset):
    """Examples of (U,) source and (Y,) target: equal pairs in an equal order for `planner` and
    `control`, targets as long as the curriculum has them.

    A planner's examples name their pair, and `prepare` reads its plan when the step is taken:
    loaders work in advance, and an E-step may come between. The control's are one text of BOS,
    source and target, with the loss on the target alone."""

    plan_NP: Tensor
    signals: dict[str, Tensor] | None = None  # labels of all pairs

    def __init__(self, recipe: Recipe, pairs: PairTensors, bos: int | None = None):
        """With `bos`, source and target are one text after it."""
        self.batch = recipe.batch_size
        self.pairs = pairs
        self.order_n = block_order(len(pairs), recipe.steps, self.batch, recipe.seed)
        self.joined = bos is not None
        sides = pairs.source_NU, pairs.source_mask_NU, pairs.target_NY
        self.columns = pairs.joined(bos) if self.joined else sides
        # Target tokens that each example may have.
        lengths = [recipe.target_tokens(i // self.batch) for i in range(len(self.order_n))]
        self.length_n = torch.tensor(lengths)
        target_n, source_n = (
            mask.sum(1)[self.order_n] for mask in (pairs.target_NY != IGNORED, pairs.source_mask_NU)
        )
        self.tokens_n = (target_n.minimum(self.length_n) + source_n).cumsum(0).tolist()

    def __len__(self) -> int:
        return len(self.order_n)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        n = self.order_n[i]
        ids_T, mask_T, labels_Y = (x[n] for x in self.columns)
        after_Y = (labels_Y != IGNORED).cumsum(0) > self.length_n[i]
        return {
            "input_ids": ids_T,
            "attention_mask": mask_T * ~after_Y if self.joined else mask_T,
            "labels": labels_Y.masked_fill(after_Y, IGNORED),
            "pair": n,
        }

    def tokens(self, step: int) -> int:
        """Source and target tokens that the first `step` steps train on."""
        return [0, *self.tokens_n][min(step * self.batch, len(self))]

    def upcoming(self, step: int, steps: int) -> Tensor:
        """(n,) the pairs of `steps` steps from number `step` on, in the order in which they are
        first met."""
        pairs = self.order_n[step * self.batch : (step + steps) * self.batch].tolist()
        return torch.tensor(list(dict.fromkeys(pairs)), dtype=torch.long)

    def prepare(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """A batch without columns that are padding in every row, and with its plans as they are
        now."""
        ids_BT, mask_BT, labels_BY, pair_B = inputs.values()
        some_T = mask_BT.bool().any(0)
        some_Y = some_T if self.joined else (labels_BY != IGNORED).any(0)
        batch = {
            "input_ids": ids_BT[:, some_T],
            "attention_mask": mask_BT[:, some_T],
            "labels": labels_BY[:, some_Y],
        }
        if self.joined:
            return batch
        chosen = pair_B.cpu()
        batch["plan_ids"] = self.plan_NP[chosen].long().to(pair_B.device)
        if self.signals is not None:
            batch["signals"] = {k: x_N[chosen].to(pair_B.device) for k, x_N in self.signals.items()}
        return batch


# ---- hard EM ----


def first_plans(
    recipe: Recipe, model: PlannerForCausalLM, pairs: PairTensors, tokenizer, say: Callable
) -> Tensor:
    """(N, P) plans that a run begins with, read off the targets; the model's vocabularies begin as
    what they mean.

    Raises DataError where the targets do not tell pairs apart, or have no words in common."""
    if recipe.plan.begins == "words":
        pieces_V = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
        plan_NP = key_word_plans(model, pairs, pieces_V)
        source = "key words"
    else:
        plan_NP = piece_plans(model, pairs, recipe.seed)
        source = "k-means"
    say(
        f"start: plans of {len(pairs)} pairs from {source} of their targets, "
        f"{len(plan_NP.unique(dim=0))} of them different"
    )
    return plan_NP.to(torch.int32)


def saved_plans(checkpoint: Path) -> Tensor:
    """(N, P) the plans of a checkpoint. Raises CheckpointError where an earlier version wrote
    it."""
    if not (checkpoint / PLANS).is_file():
        raise CheckpointError(
            f"{checkpoint} has no {PLANS}, its run was begun by an earlier version that kept plans "
            "in assignments/: need plans to resume. try: another --out, from the start"
        )
    return load_file(checkpoint / PLANS)["plans"]


class HardEM(TrainerCallback):
    """Takes an E-step every `em.every` steps, and sets the stage that the model is in: in the
    warm-up the executor learns alone, the planner neither from plans nor through them."""

    def __init__(self, recipe: Recipe, examples: PairExamples, meter: "PlanMeter", show: bool):
        self.recipe = recipe
        self.examples = examples
        self.meter = meter
        self.show = show

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        em = self.recipe.em
        step = state.global_step
        warm = step < round(em.stages[0] * self.recipe.steps)
        model.dial.plan_weight = 0.0 if warm else model.config.plan_weight
        model.dial.straight_through = model.config.straight_through and not warm
        after = step - round(em.stages[1] * self.recipe.steps)
        if em.every and after >= 0 and after % em.every == 0:
            with torch.autocast(model.device.type, torch.bfloat16, enabled=args.bf16):
                self.e_step(model, step)

    def e_step(self, model: PlannerForCausalLM, step: int) -> None:
        """Better plans for the pairs that are trained on next. All follows from the step, the
        weights and the plans."""
        em, pairs, plan_NP = self.recipe.em, self.examples.pairs, self.examples.plan_NP
        index_n = self.examples.upcoming(step, em.every)
        index_n = index_n[: em.examples or len(index_n)]
        seed = self.recipe.seed * 1_000_003 + step
        model.eval()
        started = time.monotonic()
        name = f"E-step at step {step}"
        with tqdm(total=len(index_n), desc=name, leave=False, disable=not self.show) as bar:
            figures = e_step(model, pairs, plan_NP, index_n, em, seed, bar.update)
        figures["em_seconds"] = round(time.monotonic() - started, 2)
        few_n = index_n[:FEW]
        self.meter.note(figures | own_plans_figures(model, pairs.rows(few_n), plan_NP[few_n], step))
        model.train()

    def on_save(self, args, state, control, **kwargs):
        checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        storage.write(checkpoint / PLANS, save({"plans": self.examples.plan_NP}))


@torch.no_grad()
def own_plans_figures(
    model: PlannerForCausalLM, pairs: PairTensors, plan_NP: Tensor, seed: int
) -> dict[str, float]:
    """Whether the planner's own plans do for training pairs what their z* do: nats per target token
    with z* (`em_nll`), with the planner's greedy plan, and with z* shuffled over the pairs."""
    plan_NP = plan_NP.long()
    plans = {
        "em_nll": plan_NP,
        "em_nll_planner": greedy_plans(model, pairs),
        "em_nll_shuffle": other_plans(plan_NP, model.plans.shape, "shuffle", seed),
    }
    return {k: mean_nll(target_nll(model, pairs, x_NP), pairs) for k, x_NP in plans.items()}


class PlanMeter:
    """One training interval of a planner: nats per target token and per concept, which plans it
    saw, how sure it was of them, and the E-step in it. Counted first and divided once."""

    def __init__(self, shape: PlanShape):
        self.shape = shape
        self.clear()

    def clear(self) -> None:
        self.sums: Counter[str] = Counter()
        self.counts: Counter[str] = Counter()
        self.plans: list[Tensor] = []
        # Of each slot: how often it was written, entropy, largest probability, first choice is z*.
        self.slots_4P = torch.zeros(4, self.shape.slots)
        self.figures: dict[str, float] = {}

    def see(self, outputs, labels_BY: Tensor) -> None:
        """What a forward pass returned."""
        slots_4P = self._slots(outputs).cpu()
        self.slots_4P += slots_4P
        self.plans.append(outputs.plan_ids.cpu())
        counts = {
            "target_nll": int((labels_BY != IGNORED).sum()),
            "plan_nll": float(slots_4P[0].sum()),
            "signal_nll": len(labels_BY),
        }
        for key, count in counts.items():
            if (nats := getattr(outputs, key)) is not None:
                self.sums[key] += float(nats.detach()) * count
                self.counts[key] += count

    @torch.no_grad()
    def _slots(self, outputs) -> Tensor:
        """(4, P) sums over the rows. What a slot holds is chosen one input before it."""
        target_BP = self.shape.targets(outputs.plan_ids)
        p_BPM = outputs.plan_logits.float().softmax(-1)
        max_BP, first_BP = p_BPM.max(-1)
        entropy_BP = torch.special.entr(p_BPM).sum(-1)
        written_BP = target_BP != IGNORED
        right_BP = first_BP == target_BP
        figures_4BP = torch.stack([written_BP.float(), entropy_BP, max_BP, right_BP])
        return (figures_4BP * written_BP).sum(1)

    def note(self, figures: dict[str, float]) -> None:
        """Figures of an E-step, for the next line of the log."""
        self.figures |= figures

    def read(self) -> dict[str, float | list]:
        """Figures since the last read."""
        figures: dict[str, float | list] = dict(self.figures)
        if self.plans:
            figures |= self._training_figures()
        self.clear()
        return figures

    def _training_figures(self) -> dict[str, float | list]:
        plan_NP = torch.cat(self.plans)
        written_P, entropy_P, max_P, right_P = self.slots_4P
        largest = [x_K.max() / x_K.sum() for x_K in self.shape.id_counts(plan_NP)]
        return {
            **{key: self.sums[key] / max(count, 1) for key, count in self.counts.items()},
            **plan_use(plan_NP, self.shape),
            "plan_largest_share": _known(torch.stack(largest)),
            "plan_match": float(right_P.sum() / written_P.sum().clamp(min=1)),
            "plan_entropy_by_slot": _known(entropy_P / written_P),
            "plan_max_prob_by_slot": _known(max_P / written_P),
        }


def _known(shares: Tensor) -> list[float | None]:
    """None where nothing was counted."""
    return [None if math.isnan(x) else x for x in shares.tolist()]
