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

from sememe.backbone.calling import set_checkpointing
from sememe.concepts.signals import SignalReader
from sememe.errors import CheckpointError, Interrupted, RecipeError, TrainingError
from sememe.models.planner import PlannerForCausalLM
from sememe.models.writing import Writing
from sememe.paths import usable
from sememe.training.build import (
    base_and_tokenizer,
    build_blocks,
    build_model,
    build_pairs,
    check_apart,
)
from sememe.training.callbacks import Finite, Recorder, Schedule, Seal, Stop, calibrating
from sememe.training.checkpoints import last_checkpoint, step_of
from sememe.training.codes import Revive
from sememe.training.instruments import ConceptMeter
from sememe.training.pairing import PairExamples
from sememe.training.recipe import CONCEPTS, Recipe
from sememe.training.resume import open_run, same_run
from sememe.training.search import PlanMeter, Search, first_plans, stage
from sememe.training.trainer import Blocks, ConceptTrainer


def train(recipe: Recipe, run: Path, say: Callable[[str], None] = print, show: bool = True) -> Path:
    """Trains `recipe` into `run` and returns RUN/model. A finished run is left as it is; an
    unfinished one resumes, and one with fewer steps is made longer. In a thread other than the main
    one there is no Ctrl-C handling.

    Raises:
        DataError: missing, empty or too short text, held-out text that is the training text, or
            sequences too long for the base.
        RecipeError: `run` holds another recipe, or batch_size does not divide among processes and
            parts.
        TrainingError: a non-finite loss or gradient, or a disk that cannot take the checkpoint.
        Interrupted: Ctrl-C; a checkpoint was written."""
    run, first = usable(run), int(os.environ.get("RANK", "0")) == 0
    world = int(os.environ.get("WORLD_SIZE", "1"))
    # The other ranks look only at a finished run: an unfinished one is being opened by the first at
    # this moment.
    if (first or (run / "model" / "manifest.json").is_file()) and same_run(recipe, run):
        say(f"{run} is finished: nothing to train")
        return run / "model"
    if recipe.system not in CONCEPTS and recipe.lora.rank == 0:
        raise RecipeError(
            f"system = {recipe.system} with lora.rank = 0: need something to train. try: "
            "lora.rank=8"
        )
    if recipe.batch_size % (world * recipe.gradient_accumulation):
        raise RecipeError(
            f"batch_size = {recipe.batch_size} does not divide into {world} processes × "
            f"{recipe.gradient_accumulation} "
            f"parts: need a multiple. try: batch_size={world * recipe.gradient_accumulation}"
        )
    if recipe.system == "planner" and world > 1:
        raise RecipeError(
            f"system = planner in {world} processes: need one, E-steps are not shared out. try: "
            "sememe train "
            "without torchrun"
        )
    check_apart(recipe)
    folder, tokenizer = base_and_tokenizer(recipe, say)
    if recipe.pairs is None:
        blocks_NT, heldout = build_blocks(recipe, tokenizer)
        examples: Blocks | PairExamples = Blocks(blocks_NT, recipe.batch_size)
        calibration_NT = blocks_NT[: max(1, recipe.calibration_tokens // recipe.sequence_length)]
    else:
        examples, heldout = build_pairs(recipe, tokenizer, folder, say)
        calibration_NT = None
    model = build_model(recipe, folder)
    if recipe.gradient_checkpointing:
        set_checkpointing(model)
    checkpoint, first_NP = last_checkpoint(run / "checkpoints", clean=first), None
    if isinstance(model, PlannerForCausalLM) and model.signals is not None:
        texts = examples.pairs.target_texts(tokenizer)
        examples.signals = SignalReader.fit(texts)(texts)
    if isinstance(model, PlannerForCausalLM) and checkpoint is None:
        first_NP = first_plans(recipe, model, examples.pairs, tokenizer, say)
    if first:
        open_run(recipe, run, _environment(recipe), model.config.base_sha256, checkpoint, say)
    meter, stop = None, Stop()
    callbacks = [Finite(), stop, Seal()]
    if isinstance(model, Writing):
        meter = ConceptMeter(recipe.num_concepts, recipe.codes_per_concept)
        if checkpoint is None:
            with calibrating(model, calibration_NT, recipe.rate, 0, show and first):
                _say_start(say, model.start_frame(calibration_NT, recipe.rate))
        callbacks.insert(0, Schedule(recipe, calibration_NT, say, show and first))
        if recipe.revive_every:
            callbacks.insert(1, Revive(recipe, blocks_NT, say))
    elif recipe.bridge and recipe.system == "skip" and checkpoint is None:
        _say_start(say, model.start_bridge(calibration_NT))
    elif isinstance(model, PlannerForCausalLM):
        meter = PlanMeter(model.config.plan_shape)
        callbacks.insert(
            0,
            Search(
                recipe, examples, model.config.plan_shape, run, checkpoint, meter, first_NP, show
            ),
        )
    recorder = Recorder(recipe, run / "metrics.jsonl", heldout, meter, show, examples.tokens)
    trainer = ConceptTrainer(
        recipe, model, _arguments(recipe, run, world), examples, meter, [*callbacks, recorder]
    )
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.remove_callback(transformers.ProgressCallback)
    try:
        if checkpoint is not None:
            say(f"resuming from step {step_of(checkpoint)} of {recipe.steps}")
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        if trainer.state.global_step < recipe.steps:
            raise Interrupted(
                f"stopped at step {trainer.state.global_step} of {recipe.steps}; the same command "
                "goes on from there"
            )
        if first:
            _finish(recipe, model, tokenizer, run, calibration_NT)
    except TrainingError as error:
        if first:
            recorder.stopped(trainer.state.global_step + 1, str(error))
        raise
    except (OSError, CheckpointError, SafetensorError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "PytorchStreamWriter" not in str(error):
            raise
        last_checkpoint(run / "checkpoints", clean=first)  # takes the one that was cut off away
        raise TrainingError(
            f"could not write to {run} ({error.__cause__ or error}): need free space and write "
            "permission; whole "
            "checkpoints stand. try: free some space and run the same command again"
        ) from error
    finally:
        recorder.close()
        stop.restore()
    return run / "model"


def _say_start(say, found: dict[str, float]) -> None:
    for name, share in found.items():
        say(f"start: {name.replace('_', ' ')} {share:.0%} of the variance")


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


def _arguments(recipe: Recipe, run: Path, world: int) -> TrainingArguments:
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(run / "tensorboard")
    return TrainingArguments(
        output_dir=str(run / "checkpoints"),
        max_steps=recipe.steps,
        per_device_train_batch_size=recipe.batch_size // (world * recipe.gradient_accumulation),
        gradient_accumulation_steps=recipe.gradient_accumulation,
        max_grad_norm=1.0,
        bf16=precision(recipe) == "bf16",
        logging_steps=recipe.log_every,
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


def _finish(recipe: Recipe, model, tokenizer, run: Path, calibration_NT) -> None:
    """RUN/model, whole or not at all. Own weights are rounded to bf16 first, so that what is saved
    is what is evaluated and the file is half as large; then the gate is calibrated once more, on
    training text."""
    temporary = run / "model.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    if isinstance(model, Writing):
        model.config.rate, model.config.quantise = recipe.rate, 1.0
        model.codes.fold()
        model.config.shared_map = False
    if isinstance(model, PlannerForCausalLM):
        stage(model, recipe, warm=False)
    model.round_own_weights()
    if isinstance(model, Writing):
        model.calibrate_gate(calibration_NT)
    try:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        shutil.rmtree(
            run / "model", ignore_errors=True
        )  # one without its manifest: cut off, or taken apart
        os.replace(temporary, run / "model")
    except (OSError, CheckpointError):
        shutil.rmtree(temporary, ignore_errors=True)
        raise
