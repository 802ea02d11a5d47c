"""The Hugging Face Trainer with a fixed batch order, two learning rates, and no non-finite step."""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset
from transformers import Trainer

from sememe.backbone.adapters import without_lora
from sememe.errors import CheckpointError, TrainingError
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
    return 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


class Blocks(Dataset):
    """(N, T) token blocks as language-model examples, in a fixed order."""

    def __init__(self, ids_NT: Tensor, batch: int):
        self.ids_NT = ids_NT
        self.batch = batch

    def __len__(self) -> int:
        return len(self.ids_NT)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {"input_ids": self.ids_NT[i], "labels": self.ids_NT[i]}

    def tokens(self, step: int) -> int:
        """Tokens that the first `step` steps train on."""
        return min(step * self.batch, len(self)) * self.ids_NT.shape[1]

    def prepare(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """A batch as the model takes it."""
        return inputs


class ConceptTrainer(Trainer):
    """`run`: what it trains on, and in which order; `meter`: what sees each forward pass."""

    def __init__(self, run: Run, meter=None, **trainer):
        self.run = run
        self.meter = meter
        super().__init__(model=run.model, train_dataset=run.batches.examples, **trainer)
        self._loss_shifts_labels = run.system.shifts_labels

    def _save_checkpoint(self, *args, **kwargs):
        try:
            super()._save_checkpoint(*args, **kwargs)
        except RuntimeError as error:  # of torch.save, where the disk takes no more
            raise CheckpointError(str(error)) from error

    def _clip_grad_norm(self, model):
        """A gradient that is not finite must not reach the optimizer either."""
        self.run.norms = gradient_norms(self.model)
        for part, norm in self.run.norms.items():
            if not math.isfinite(norm):
                raise TrainingError(
                    f"the gradient of {part} is not finite at step {self.state.global_step + 1}: "
                    "the step was not taken and the last checkpoint stands. try: "
                    "learning_rate=1e-4, or precision=fp32"
                )
        return super()._clip_grad_norm(model)

    def _prepare_inputs(self, inputs):
        """On the device; a batch of pairs as its step wants it."""
        return self.train_dataset.prepare(super()._prepare_inputs(inputs))

    def create_optimizer(self, *args, **kwargs):
        """LoRA and new modules apart; no weight decay, since zero is no better a code than
        another."""
        lora, own = [], []
        for name, p in self.model.named_parameters():
            if p.requires_grad:
                (lora if "lora_" in name else own).append(p)
        groups = [
            {"params": lora, "lr": self.run.recipe.learning_rate},
            {"params": own, "lr": self.run.recipe.concept_learning_rate},
        ]
        groups = [group for group in groups if group["params"]]
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer=None):
        factor = partial(cosine, steps=num_training_steps)
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, factor)
        return self.lr_scheduler

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Cross entropy, or a mix with distillation; one that is not finite never reaches the
        gradients, on any rank."""
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        share = self.run.recipe.distil
        if share > 0 and model.training:
            loss = (1 - share) * loss + share * self._divergence(inputs, outputs.logits, loss)
        finite = torch.isfinite(loss.detach()).float()
        if self.args.world_size > 1:
            torch.distributed.all_reduce(finite, op=torch.distributed.ReduceOp.MIN)
        if not bool(finite):
            raise TrainingError(
                f"the loss is {float(loss.detach())} at step {self.state.global_step + 1}: need a "
                "finite one; nothing was changed and the last checkpoint stands. try: "
                "learning_rate=1e-4, or precision=fp32"
            )
        if self.meter is not None:
            self.meter.see(outputs, inputs["labels"])
        return (loss, outputs) if return_outputs else loss

    def _divergence(self, inputs, logits_BTV: Tensor, loss: Tensor) -> Tensor:
        """KL of the model's next-token distribution from the frozen base's, nats per token, on the
        scale of `loss`, which the Trainer divides by what it accumulates over."""
        backbone = self.accelerator.unwrap_model(self.model).backbone
        with torch.no_grad(), without_lora(backbone):
            base_BTV = backbone(input_ids=inputs["input_ids"], use_cache=False).logits
        base, own = (F.log_softmax(x[:, :-1].float(), -1) for x in (base_BTV, logits_BTV))
        divergence = F.kl_div(own, base, log_target=True, reduction="none").sum(-1).mean()
        nll = F.nll_loss(own.flatten(0, 1), inputs["input_ids"][:, 1:].flatten())
        return divergence * (loss.detach() / nll.detach())
