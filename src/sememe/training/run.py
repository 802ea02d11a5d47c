"""Recipe → run folder: build, train or resume, save the finished model.

RUN/{recipe.yaml, env.json, inputs.json, metrics.jsonl, checkpoints/checkpoint-N/, model/, tensorboard/}, of a planner also
assignments/"""

import importlib.metadata
import os
import platform
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from transformers import TrainingArguments

from sememe.backbone.bases import load_tokenizer, resolve
from sememe.backbone.calling import set_checkpointing
from sememe.errors import CheckpointError, DataError, Interrupted, TrainingError
from sememe.options import Recipe
from sememe.paths import source_sha256, usable
from sememe.systems import SYSTEMS, Run
from sememe.training.callbacks import Finite, Recorder, Seal, Stop, log_every
from sememe.training.checkpoints import last_checkpoint, step_of
from sememe.training.resume import open_run, same_run
from sememe.training.trainer import ConceptTrainer


def train(
    recipe: Recipe, folder: Path, say: Callable[[str], None] = print, show: bool = True
) -> Path:
    """Trains `recipe` into `folder` and returns its model/. A finished run is left as it is; an
    unfinished one resumes, and one with fewer steps is made longer. In a thread other than the main
    one there is no Ctrl-C handling.

    Raises:
        DataError: missing, empty or too short text, held-out text that is the training text, or
            sequences too long for the base.
        RecipeError: `folder` holds another recipe, or batch_size does not divide among processes
            and parts.
        TrainingError: a non-finite loss or gradient, or a disk that cannot take the checkpoint.
        Interrupted: Ctrl-C; a checkpoint was written."""
    folder = usable(folder)
    first = int(os.environ.get("RANK", "0")) == 0
    # The other ranks look only at a finished run: an unfinished one is being opened by the first at
    # this moment.
    if (first or (folder / "model" / "manifest.json").is_file()) and same_run(recipe, folder):
        say(f"{folder} is finished: nothing to train")
        return folder / "model"
    run = _build(recipe, folder, say, show, first)
    stop = Stop()
    trainer, recorder = _trainer(run, stop)
    try:
        if run.checkpoint is not None:
            say(f"resuming from step {step_of(run.checkpoint)} of {recipe.steps}")
        trainer.train(resume_from_checkpoint=str(run.checkpoint) if run.checkpoint else None)
        if trainer.state.global_step < recipe.steps:
            raise Interrupted(
                f"stopped at step {trainer.state.global_step} of {recipe.steps}; the same command "
                "goes on from there"
            )
        if first:
            _finish(run)
    except TrainingError as error:
        if first:
            recorder.stopped(trainer.state.global_step + 1, str(error))
        raise
    except (OSError, CheckpointError, SafetensorError) as error:
        last_checkpoint(folder / "checkpoints", clean=first)  # takes one that was cut off away
        raise TrainingError(
            f"could not write to {folder} ({error.__cause__ or error}): need free space and write "
            "permission; whole checkpoints stand. try: free some space and run the same command "
            "again"
        ) from error
    finally:
        recorder.close()
        stop.restore()
    return folder / "model"


def _build(
    recipe: Recipe, folder: Path, say: Callable[[str], None], show: bool, first: bool
) -> Run:
    """Model, batches and folder of a run, a fresh one started."""
    system = SYSTEMS[recipe.system]
    system.check(recipe, int(os.environ.get("WORLD_SIZE", "1")))
    _check_apart(recipe)
    base = resolve(recipe.base, say=say)
    system.check_lengths(recipe, base)
    tokenizer = load_tokenizer(base)
    batches = system.batches(recipe, tokenizer, base, say)
    model = system.build(recipe, base)
    if recipe.gradient_checkpointing:
        set_checkpointing(model)
    checkpoint = last_checkpoint(folder / "checkpoints", clean=first)
    run = Run(recipe, folder, model, tokenizer, batches, checkpoint, say, show and first)
    if checkpoint is None:
        system.start(run)
    if first:
        sha256 = model.config.base_sha256
        open_run(recipe, folder, _environment(recipe), sha256, checkpoint, say)
    return run


def _check_apart(recipe: Recipe) -> None:
    """Raises DataError where the held-out text is the training text."""
    if source_sha256(recipe.data.train) == source_sha256(recipe.data.heldout):
        raise DataError(
            f"{recipe.data.heldout} holds the same bytes as {recipe.data.train}: need held-out "
            "text that is never trained on. try: another file for data.heldout"
        )


def _trainer(run: Run, stop: Stop) -> tuple[ConceptTrainer, Recorder]:
    """The trainer with its callbacks in their order: the system's own, which set the model before a
    step and write into a checkpoint, then what every run has; the seal of a checkpoint comes after
    all that is written into it."""
    system = SYSTEMS[run.recipe.system]
    meter = system.meter(run.recipe, run.model)
    recorder = Recorder(
        run.recipe,
        run.folder / "metrics.jsonl",
        lambda model: system.heldout(model, run.batches.heldout),
        system.state,
        meter,
        run.batches.examples.tokens,
        run.show,
    )
    trainer = ConceptTrainer(
        run.recipe,
        run.model,
        _arguments(run.recipe, run.folder),
        run.batches.examples,
        meter,
        [*system.callbacks(run, meter), Finite(), stop, Seal(), recorder],
        system.shifts_labels,
    )
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.remove_callback(transformers.ProgressCallback)
    return trainer, recorder


def _environment(recipe: Recipe) -> dict[str, Any]:
    packages = ("sememe", "torch", "transformers", "peft", "accelerate", "safetensors")
    return {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        "cuda": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
        "precision": precision(recipe),
        **{name: importlib.metadata.version(name) for name in packages},
    }


def precision(recipe: Recipe) -> str:
    """fp32 or bf16: what `auto` means on this machine."""
    if recipe.precision != "auto":
        return recipe.precision
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported() else "fp32"
    return "bf16" if torch.cpu._is_avx512_bf16_supported() else "fp32"


def _arguments(recipe: Recipe, folder: Path) -> TrainingArguments:
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(folder / "tensorboard")
    world = int(os.environ.get("WORLD_SIZE", "1"))
    return TrainingArguments(
        output_dir=str(folder / "checkpoints"),
        max_steps=recipe.steps,
        per_device_train_batch_size=recipe.batch_size // (world * recipe.gradient_accumulation),
        gradient_accumulation_steps=recipe.gradient_accumulation,
        max_grad_norm=1.0,
        bf16=precision(recipe) == "bf16",
        logging_steps=log_every(recipe.steps),
        logging_nan_inf_filter=False,
        save_strategy="steps",
        save_steps=recipe.save_every,
        seed=recipe.seed,
        report_to=["tensorboard"],
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        use_cpu=not torch.cuda.is_available(),
        ddp_find_unused_parameters=False,
        ignore_data_skip=False,
    )


def _finish(run: Run) -> None:
    """RUN/model, whole or not at all."""
    model, temporary = run.folder / "model", run.folder / "model.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    SYSTEMS[run.recipe.system].finish(run)
    try:
        run.model.save_pretrained(temporary)
        run.tokenizer.save_pretrained(temporary)
        # one without its manifest: cut off, or taken apart
        shutil.rmtree(model, ignore_errors=True)
        os.replace(temporary, model)
    except (OSError, CheckpointError):
        shutil.rmtree(temporary, ignore_errors=True)
        raise
