"""Training on pairs and plans: examples in the order of a run, the hard EM between its steps, and
what a planner is watched by.

z*, the plans of the N training pairs, is one int32 tensor (N, P): `PairExamples.plan_NP`. Batches
read it when their step is taken, E-steps change it, and every checkpoint holds it as it was then,
so that a resumed run is the run that was never stopped."""

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
from sememe.evaluation.plans import other_plans, plan_use, target_nll
from sememe.models.planner.em import EStep, evaluating, greedy_plans
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
        self.recipe = recipe
        self.pairs = pairs
        self.order_n = block_order(len(pairs), recipe.steps, recipe.batch_size, recipe.seed)
        self._joined = None if bos is None else pairs.joined(bos)
        length_n = torch.tensor([self._length(i) for i in range(len(self.order_n))])
        target_n = (pairs.target_NY != IGNORED).sum(1)[self.order_n].minimum(length_n)
        self._tokens_n = (target_n + pairs.source_mask_NU.sum(1)[self.order_n]).cumsum(0)

    def __len__(self) -> int:
        return len(self.order_n)

    def _length(self, i: int) -> int:
        """Target tokens that example i may have."""
        return self.recipe.target_tokens(i // self.recipe.batch_size)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        n = int(self.order_n[i])
        pairs = self.pairs
        if self._joined is None:
            labels_Y = pairs.target_NY[n].clone()
            labels_Y[self._length(i) :] = IGNORED
            return {
                "input_ids": pairs.source_NU[n],
                "attention_mask": pairs.source_mask_NU[n],
                "labels": labels_Y,
                "pair": torch.tensor(n),
            }
        ids_T, mask_T, labels_T = (x[n].clone() for x in self._joined)
        end = 1 + int(pairs.source_mask_NU[n].sum()) + self._length(i)
        labels_T[end:] = IGNORED
        mask_T[end:] = 0
        return {"input_ids": ids_T, "attention_mask": mask_T, "labels": labels_T}

    def tokens(self, step: int) -> int:
        """Source and target tokens that the first `step` steps train on."""
        end = min(step * self.recipe.batch_size, len(self))
        return int(self._tokens_n[end - 1]) if end else 0

    def upcoming(self, step: int, steps: int) -> Tensor:
        """(n,) the pairs of `steps` steps from number `step` on, in the order in which they are
        first met."""
        batch = self.recipe.batch_size
        pairs = self.order_n[step * batch : (step + steps) * batch].tolist()
        return torch.tensor(list(dict.fromkeys(pairs)), dtype=torch.long)

    def prepare(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """A batch without columns that are padding in every row, and with its plans as they are
        now."""
        mask_T = inputs["attention_mask"].bool().any(0)
        if self._joined is not None:
            return {key: value[:, : int(mask_T.sum())] for key, value in inputs.items()}
        first = int((~mask_T).sum())
        width = int((inputs["labels"] != IGNORED).any(0).sum())
        device = inputs["pair"].device
        pair_B = inputs["pair"].cpu()
        batch = {
            "input_ids": inputs["input_ids"][:, first:],
            "attention_mask": inputs["attention_mask"][:, first:],
            "labels": inputs["labels"][:, :width],
            "plan_ids": self.plan_NP[pair_B].long().to(device),
        }
        if self.signals is not None:
            batch["signals"] = {name: x_N[pair_B].to(device) for name, x_N in self.signals.items()}
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
        em = self.recipe.em
        index_n = self.examples.upcoming(step, em.every)
        index_n = index_n[: em.examples or len(index_n)]
        search = EStep(em.proposers, em.batch, em.planner_weight)
        seed = self.recipe.seed * 1_000_003 + step
        pairs = self.examples.pairs
        plan_NP = self.examples.plan_NP
        started = time.monotonic()
        name = f"E-step at step {step}"
        with tqdm(total=len(index_n), desc=name, leave=False, disable=not self.show) as bar:
            figures = search.run(model, pairs, plan_NP, index_n, seed, bar.update)
        figures["em_seconds"] = round(time.monotonic() - started, 2)
        few_n = index_n[:FEW]
        self.meter.note(figures | own_plans_figures(model, pairs.rows(few_n), plan_NP[few_n], step))

    def on_save(self, args, state, control, **kwargs):
        checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        storage.write(checkpoint / PLANS, save({"plans": self.examples.plan_NP}))


@torch.no_grad()
def own_plans_figures(
    model: PlannerForCausalLM, pairs: PairTensors, plan_NP: Tensor, seed: int
) -> dict[str, float]:
    """Whether the planner's own plans do for training pairs what their z* do: nats per target token
    with z* (`em_nll`), with the planner's greedy plan, and with z* shuffled over the pairs. `model`
    is put into `eval` meanwhile."""
    plan_NP = plan_NP.long()
    tokens = int((pairs.target_NY != IGNORED).sum())
    with evaluating(model):
        plans = {
            "em_nll": plan_NP,
            "em_nll_planner": greedy_plans(model, pairs),
            "em_nll_shuffle": other_plans(plan_NP, model.plans.shape, "shuffle", seed),
        }
        return {
            key: float(target_nll(model, pairs, x_NP).double().sum()) / max(tokens, 1)
            for key, x_NP in plans.items()
        }


class PlanMeter:
    """One training interval of a planner: nats per target token and per concept, which plans it
    saw, how sure it was of them, and the E-step in it. Counted first and divided once."""

    def __init__(self, shape: PlanShape):
        self.shape = shape
        self.clear()

    def clear(self) -> None:
        self.sums: Counter[str] = Counter()
        self.plans: list[Tensor] = []
        # Of each slot: how often it was written, entropy, largest probability, first choice is z*.
        self.slots_4P = torch.zeros(4, self.shape.slots)
        self.figures: dict[str, float] = {}

    def see(self, outputs, labels_BY: Tensor) -> None:
        """What a forward pass returned."""
        slots_4P = self._slots(outputs).cpu()
        tokens = int((labels_BY != IGNORED).sum())
        self.slots_4P += slots_4P
        self.plans.append(outputs.plan_ids.cpu())
        self.sums["tokens"] += tokens
        self.sums["target"] += float(outputs.target_nll.detach()) * tokens
        self.sums["plan"] += float(outputs.plan_nll.detach()) * float(slots_4P[0].sum())
        if outputs.signal_nll is not None:
            self.sums["signal"] += float(outputs.signal_nll.detach()) * len(outputs.plan_ids)

    @torch.no_grad()
    def _slots(self, outputs) -> Tensor:
        """(4, P) sums over the rows. What a slot holds is chosen one input before it."""
        *_, full_C = self.shape.layout(outputs.plan_ids.device)
        target_BP = self.shape.targets(outputs.plan_ids)[:, ~full_C]
        p_BPM = outputs.plan_logits[:, ~full_C].float().softmax(-1)
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
        if self.sums["tokens"]:
            figures |= self._training_figures()
        self.clear()
        return figures

    def _training_figures(self) -> dict[str, float | list]:
        plan_NP = torch.cat(self.plans)
        written_P, *sums_3P = self.slots_4P
        entropy, max_prob, _ = (
            [float(x) if n else None for x, n in zip(sums_P / written_P, written_P, strict=True)]
            for sums_P in sums_3P
        )
        signal = {"signal_nll": self.sums["signal"] / len(plan_NP)} if self.sums["signal"] else {}
        return {
            "target_nll": self.sums["target"] / self.sums["tokens"],
            "plan_nll": self.sums["plan"] / max(float(written_P.sum()), 1),
            **signal,
            **plan_use(plan_NP, self.shape),
            "plan_largest_share": [
                float(count_K.max() / count_K.sum()) if bool(count_K.any()) else None
                for count_K in self.shape.id_counts(plan_NP)
            ],
            "plan_match": float(sums_3P[2].sum() / written_P.sum().clamp(min=1)),
            "plan_entropy_by_slot": entropy,
            "plan_max_prob_by_slot": max_prob,
        }
