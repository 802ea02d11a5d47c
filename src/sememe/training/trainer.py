"""The Hugging Face Trainer with a fixed batch order, two learning rates, and no non-finite step."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import Dataset
from transformers import Trainer

from sememe.backbone.adapters import without_lora
from sememe.concepts.gate import RateGate
from sememe.concepts.writer import PADDED
from sememe.keys import Recipe
from sememe.rows import IGNORED, Mixture, Ordered
from sememe.training import state
from sememe.training.checkpoints import step_of
from sememe.training.meters import gradient_norms

if TYPE_CHECKING:
    from sememe.systems import Run


def cosine(step: int, steps: int) -> float:
    """The learning rate's share of its peak at a step: linear warm-up over 5 % of the steps, cosine
    to 10 %."""
    warm = max(1, steps // 20)
    if step < warm:
        return (step + 1) / warm
    done = (step - warm) / max(1, steps - warm)
    return 0.55 + 0.45 * math.cos(math.pi * done)


def adamw(model: torch.nn.Module, recipe: Recipe) -> AdamW:
    """LoRA and new modules apart; no weight decay, since zero is no better a code than another."""
    lora, own = [], []
    for name, p in model.named_parameters():
        if p.requires_grad:
            (lora if "lora_" in name else own).append(p)
    rates = (lora, recipe.learning_rate), (own, recipe.concept_learning_rate)
    groups = [{"params": parameters, "lr": rate} for parameters, rate in rates if parameters]
    return AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0)


class Blocks(Dataset):
    """Rows of tokens as language-model examples, in the order of training."""

    def __init__(self, rows: Ordered | Mixture, recipe: Recipe):
        self.rows = rows
        self.batch, self.steps = recipe.batch_size, recipe.steps
        self.length = recipe.sequence_length
        self.tokens_before = 0, 0
        """Rows whose tokens were counted, and how many they are."""

    def __len__(self) -> int:
        return self.steps * self.batch

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        row = self.rows[i]
        if not self.rows.ragged:
            ids_T = torch.from_numpy(row.ids)
            return {"input_ids": ids_T, "labels": ids_T}
        ids_T, _, counted_T = map(torch.from_numpy, row.padded(self.length))
        return {
            "input_ids": ids_T.clamp(min=0),
            "attention_mask": (ids_T != IGNORED).long(),
            "labels": ids_T.masked_fill(~counted_T, IGNORED),
        }

    def tokens(self, step: int) -> int:
        """Tokens that the first `step` steps train on."""
        end = step * self.batch
        if not self.rows.ragged:
            return end * self.length
        first, total = self.tokens_before if end >= self.tokens_before[0] else (0, 0)
        total += sum(len(self.rows[i].ids) for i in range(first, end))
        self.tokens_before = end, total
        return total

    def prepare(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """A batch as the model takes it: without what is padding in all rows."""
        if not self.rows.ragged:
            return inputs
        length = int(inputs["attention_mask"].sum(1).max())
        return {name: x_BT[:, :length] for name, x_BT in inputs.items()}

    def first_blocks(self, tokens: int) -> Tensor:
        """(N, T) blocks of about so many tokens, the first that are trained on, without padding."""
        wanted = max(self.length, tokens - tokens % self.length)
        rows, total = [], 0
        for i in range(len(self)):
            rows.append(torch.from_numpy(self.rows[i].ids))
            total += len(rows[-1])
            if total >= wanted:
                break
        length = min(self.length, total)
        total = min(total, wanted) // length * length
        return torch.cat(rows)[:total].view(-1, length)


class ConceptTrainer(Trainer):
    """`run`: what it trains on, and in which order, and the meter that sees each forward pass."""

    def __init__(self, run: Run, **trainer):
        self.run = run
        for gate in (module for module in run.model.modules() if isinstance(module, RateGate)):
            gate.parts = run.recipe.gradient_accumulation
        optimizer = adamw(run.model, run.recipe)
        self.schedule = LambdaLR(optimizer, partial(cosine, steps=run.recipe.steps))
        super().__init__(
            model=run.model,
            train_dataset=run.batches.examples,
            optimizers=(optimizer, self.schedule),
            **trainer,
        )
        self._loss_shifts_labels = run.system.shifts_labels
        if run.recipe.distil > 0:  # takes logits, of which a model with labels may have none
            self.compute_loss_func = self._cross_entropy
        self.parts: list[Tensor] = []
        """The loss of the step in progress, by the parts that it is computed in."""
        self.buffers: list[tuple[Tensor, Tensor]] = []
        """What a forward pass may track (quantiles of the gate), and how it was before the step."""

    # ---- what a checkpoint holds: see `state.py`; the Trainer's own are pickles ----

    def _save_checkpoint(self, *args, **kwargs):
        super()._save_checkpoint(*args, **kwargs)
        self.accelerator.wait_for_everyone()  # every process has written its part before the seal

    def _save(self, output_dir: str, state_dict: dict | None = None) -> None:
        self.model.save_pretrained(output_dir, is_main_process=self.args.should_save)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.args.should_save:
            state.save_optimizer(Path(output_dir), self.optimizer)

    def _save_rng_state(self, output_dir: str) -> None:
        Path(output_dir).mkdir(parents=True, exist_ok=True)  # another process may not be there yet
        state.save_random(Path(output_dir), self.args.process_index)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        """The weights are there already, since before anything was written."""
        folder = Path(resume_from_checkpoint)
        with state.resuming(folder):
            self.run.guard.restore(state.load_progress(folder, step_of(folder)))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Rates are those of the recipe, at the checkpoint's step: a resumed run may be forced to
        others."""
        if checkpoint is None:
            return
        with state.resuming(Path(checkpoint)):
            state.load_optimizer(Path(checkpoint), self.optimizer)
        self.schedule.last_epoch = step_of(Path(checkpoint))
        share = cosine(self.schedule.last_epoch, self.run.recipe.steps)
        self.schedule._last_lr = [rate * share for rate in self.schedule.base_lrs]
        for group, lr in zip(self.optimizer.param_groups, self.schedule._last_lr, strict=True):
            group["lr"] = lr

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            with state.resuming(Path(checkpoint)):
                state.load_random(Path(checkpoint), self.args.process_index)

    def _load_scaler(self, checkpoint: str | None) -> None:
        """There is none for bf16 and fp32."""

    # ---- steps ----

    def _prepare_inputs(self, inputs):
        """On the device; a batch of pairs as its step wants it."""
        return self.train_dataset.prepare(super()._prepare_inputs(inputs))

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Cross entropy, or a mix with distillation. Nobody here asks for the outputs."""
        loss, outputs = super().compute_loss(model, {**inputs}, True, num_items_in_batch)
        if (share := self.run.recipe.distil) > 0:
            loss = (1 - share) * loss + share * self._divergence(inputs, outputs.logits, loss)
        if "attention_mask" in inputs and hasattr(outputs, "concept_ids"):
            ids_BT, real_BT = outputs.concept_ids, inputs["attention_mask"] != 0
            outputs.concept_ids = ids_BT.where(real_BT, PADDED)
        if self.run.meter is not None:
            self.run.meter.see(outputs, inputs["labels"])
        return loss

    def _cross_entropy(self, outputs, labels_BT: Tensor, num_items_in_batch=None) -> Tensor:
        """What the model would have computed itself."""
        logits, vocab = outputs.logits, outputs.logits.shape[-1]
        loss_function = self.accelerator.unwrap_model(self.model).loss_function
        return loss_function(logits, labels_BT, vocab, num_items_in_batch=num_items_in_batch)

    def _divergence(self, inputs, logits_BTV: Tensor, loss: Tensor) -> Tensor:
        """KL of the model's next-token distribution from the frozen base's, nats per token, on the
        scale of `loss`, which the Trainer divides by what it accumulates over."""
        backbone = self.accelerator.unwrap_model(self.model).backbone
        with torch.no_grad(), without_lora(backbone):
            base_BTV = backbone(input_ids=inputs["input_ids"], use_cache=False).logits
        base_nV, own_nV = (
            x_BTV[:, :-1].flatten(0, 1).float().log_softmax(-1) for x_BTV in (base_BTV, logits_BTV)
        )
        divergence = F.kl_div(own_nV, base_nV, log_target=True, reduction="batchmean")
        nll = F.nll_loss(own_nV, inputs["input_ids"][:, 1:].flatten())
        return divergence * (loss.detach() / nll.detach())

    def training_step(self, *args, **kwargs):
        if not self.parts:
            self.buffers = [(buffer, buffer.clone()) for buffer in self.model.buffers()]
        self.parts.append(super().training_step(*args, **kwargs))
        return self.parts[-1]

    def _clip_grad_norm(self, model):
        """A step that is not allowed has no gradients, so that no weight and no state of the
        optimizer changes. Loss and gradients are those of all ranks by now: all leave it out."""
        loss = float(self.accelerator.gather(sum(self.parts)).mean())
        self.parts = []
        norms = gradient_norms(self.model)
        if not self.run.guard.allows(self.state.global_step + 1, loss, norms):
            self.model.zero_grad()
            for buffer, before in self.buffers:
                buffer.copy_(before)
        return super()._clip_grad_norm(model)

    def log(self, logs, *args, **kwargs):
        """The loss is the mean over the steps that were taken; there may be none."""
        if "loss" in logs:
            losses, self.run.guard.unlogged = self.run.guard.unlogged, []
            del logs["loss"]
            logs |= {"loss": fmean(losses)} if losses else {}
        super().log(logs, *args, **kwargs)
