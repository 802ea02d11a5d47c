"""Recipe → run folder: build, train or resume, save the finished model.

RUN/{recipe.yaml, env.json, inputs.json, metrics.jsonl, checkpoints/checkpoint-N/, model/,
tensorboard/}"""

import contextlib
import importlib.metadata
import json
import os
import platform
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from transformers import TrainingArguments

from sememe import storage
from sememe.backbone.bases import load_tokenizer, resolve
from sememe.backbone.bits import library
from sememe.backbone.calling import set_checkpointing
from sememe.backbone.exact import narrow
from sememe.backbone.processes import meet_on_this_machine
from sememe.errors import CheckpointError, DataError, RecipeError, TrainingError
from sememe.evaluation.inputs import INPUTS, content, hashes, record
from sememe.evaluation.results import put
from sememe.locks import only_user
from sememe.options import Recipe, load_recipe
from sememe.paths import usable
from sememe.report.files import COMMANDS, read_metrics
from sememe.systems import SYSTEMS, Run
from sememe.training.callbacks import Recorder, Seal, Shard, Stop
from sememe.training.checkpoints import remove_unsealed, resume_point, step_of
from sememe.training.guard import Guard
from sememe.training.resume import is_finished, same_run
from sememe.training.state import resuming
from sememe.training.trainer import ConceptTrainer

PACKAGES = ("sememe", "torch", "transformers", "peft", "accelerate", "safetensors")
"""Whose versions env.json keeps."""
RETRY = "free some space, and the same command: whole checkpoints stand"


def train(
    recipe: Recipe,
    folder: Path,
    say: Callable[[str], None] = print,
    show: bool = True,
    force: bool = False,
    sharded: bool = False,
) -> Path:
    """Trains `recipe` into `folder` and returns its model/. A finished run is left as it is, and an
    unfinished one resumes, with `force` whatever has changed. In a thread other than the main one
    there is no Ctrl-C handling. `sharded`: each of several processes holds a part of the base's
    layers; losses and files are the same.

    Raises:
        DataError: missing, empty or too short text, held-out text that is the training text, or
            sequences too long for the base.
        RecipeError: `folder` holds another recipe, or the system cannot be trained so.
        SememeError: somebody else trains in `folder`, or a disk is full.
        Diverged: ten steps in a row whose loss or gradient is not finite, or a spike.
        CheckpointError: checkpoints that are damaged, all of them.
        Interrupted: Ctrl-C, or SIGTERM (Terminated); a checkpoint was written."""
    folder = usable(folder)
    first = os.environ.get("RANK", "0") == "0"
    with only_user(folder):
        # The other ranks look only at a finished run: an unfinished one is being opened by the
        # first at this moment.
        if (first or is_finished(folder)) and same_run(recipe, folder, say if force else None):
            say(f"{folder} is finished: nothing to train")
        else:
            if recipe.base_bits and sharded:
                raise RecipeError(
                    f"base_bits = {recipe.base_bits} with --sharded: need weights of 16 or 32 "
                    "bits, packed ones are not cut into parts. try: without --sharded"
                )
            _run(_build(recipe, folder, say, show and first), first, sharded)
    return folder / "model"


def _run(run: Run, first: bool, sharded: bool) -> None:
    """From the first step that is left to the finished model."""
    if first:
        _open(run)
    recorder, stop = Recorder(run), Stop()
    # The system's own set the model before a step and write into a checkpoint, so they come first;
    # the seal of a checkpoint comes after all that is written into it.
    callbacks = [*run.system.callbacks(run), run.guard, stop, Seal(), recorder]
    if sharded and os.environ.get("WORLD_SIZE", "1") != "1":
        callbacks.insert(0, Shard(run))
    try:
        _train(run, callbacks, stop)
        _finish(run, first)
    except TrainingError as error:
        if first:
            recorder.stopped(str(error))
        raise
    finally:
        recorder.bar.close()
        stop.restore()


def _build(recipe: Recipe, folder: Path, say: Callable[[str], None], show: bool) -> Run:
    """Model and batches of a run, a fresh one started."""
    checkpoint = resume_point(folder / "checkpoints", say)
    system = SYSTEMS[recipe.system]
    system.check(recipe, int(os.environ.get("WORLD_SIZE", "1")))
    train, heldout = map(content, (recipe.data.train, recipe.data.heldout))
    if {*hashes(train)}.intersection(hashes(heldout)):
        raise DataError(
            f"{recipe.data.heldout} holds the same bytes as {recipe.data.train}: need held-out "
            "text that is never trained on. try: another file for data.heldout"
        )
    if recipe.base_bits == 4:
        library()  # before texts are read, which may take long
    base = resolve(recipe.base)
    tokenizer = load_tokenizer(base)
    batches = system.batches(recipe, tokenizer, base, say)
    model = system.build(recipe, base)
    if recipe.gradient_checkpointing:
        set_checkpointing(model)
    meter, guard = system.meter(model.config), Guard(recipe, say)
    run = Run(
        system, recipe, folder, model, tokenizer, batches, checkpoint, say, show, meter, guard
    )
    if checkpoint is not None:
        with resuming(checkpoint):  # one that does not fit is refused before anything is written
            system.resume(run)
            model.load_own_state(checkpoint)
    else:
        for name, share in system.start(run).items():
            say(f"start: {name.replace('_', ' ')} {share:.0%} of the variance")
    if precision(recipe) == "bf16":
        narrow(model.backbone)
    return run


def _open(run: Run) -> None:
    """What a run folder holds from the start."""
    folder, recipe = run.folder, run.recipe
    folder.mkdir(parents=True, exist_ok=True)
    if is_finished(folder):  # it is made longer: the model so far stays beside, with its figures
        steps = load_recipe(folder / "recipe.yaml").steps
        run.say(f"{folder} goes on from {steps} to {recipe.steps} steps; model-{steps} is kept")
        os.replace(folder / "model", folder / f"model-{steps}")
        for path in (folder / f"{name}.json" for name in COMMANDS):
            if path.is_file():
                os.replace(path, folder / f"model-{steps}" / path.name)
    remove_unsealed(folder / "checkpoints")
    storage.remove_temporaries(folder)
    (folder / storage.MANIFEST).unlink(missing_ok=True)  # else one of other files
    put(folder / "env.json", _environment(recipe))
    base = resolve(recipe.base)
    put(folder / INPUTS, record(folder, base, run.model.config.base_sha256, recipe))
    storage.write(folder / "recipe.yaml", recipe.yaml().encode())
    storage.write_manifest(folder, ("env.json", INPUTS, "recipe.yaml"))
    _trim_log(folder, step_of(run.checkpoint) if run.checkpoint else 0)


def _trim_log(folder: Path, step: int) -> None:
    """Leaves of the log what there is a checkpoint of: steps that are taken again are logged again,
    and a run that was killed may have left half a line."""
    path, lines = folder / "metrics.jsonl", []
    if path.is_file():
        with contextlib.suppress(CheckpointError):  # no whole line
            lines = [line for line in read_metrics(folder) if line["step"] <= step]
        storage.write(path, "".join(json.dumps(line) + "\n" for line in lines).encode())


def _train(run: Run, callbacks: list[transformers.TrainerCallback], stop: Stop) -> None:
    """All steps that are left. Raises Interrupted where Ctrl-C came first."""
    meet_on_this_machine()
    trainer = ConceptTrainer(run, args=_arguments(run.recipe, run.folder), callbacks=callbacks)
    trainer.remove_callback(transformers.PrinterCallback)
    steps = run.recipe.steps
    if run.checkpoint is not None:
        run.say(f"resuming from step {step_of(run.checkpoint)} of {steps}")
    with storage.writing(run.folder, RETRY):
        trainer.train(resume_from_checkpoint=run.checkpoint and str(run.checkpoint))
    done = trainer.state.global_step
    if done < steps:
        raise stop.interruption(done, steps)


def _environment(recipe: Recipe) -> dict:
    return {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        "cuda": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
        "precision": precision(recipe),
        **{name: importlib.metadata.version(name) for name in PACKAGES},
    }


def precision(recipe: Recipe) -> str:
    """fp32 or bf16: what `auto` means on this machine."""
    if recipe.precision != "auto":
        return recipe.precision
    on_gpu = torch.cuda.is_available()
    has_bf16 = torch.cuda.is_bf16_supported if on_gpu else torch.cpu._is_avx512_bf16_supported
    return "bf16" if has_bf16() else "fp32"


def _arguments(recipe: Recipe, folder: Path) -> TrainingArguments:
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(folder / "tensorboard")
    parts = int(os.environ.get("WORLD_SIZE", "1")) * recipe.gradient_accumulation
    return TrainingArguments(
        output_dir=str(folder / "checkpoints"),
        max_steps=recipe.steps,
        per_device_train_batch_size=recipe.batch_size // parts,
        gradient_accumulation_steps=recipe.gradient_accumulation,
        bf16=precision(recipe) == "bf16",
        logging_steps=max(1, recipe.steps // 200),
        # The order is in the data set: the same for every system.
        train_sampling_strategy="sequential",
        save_steps=recipe.save_every,
        # Dropout and noise are drawn anew in each process.
        seed=recipe.seed + int(os.environ.get("RANK", "0")),
        report_to="tensorboard",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        use_cpu=not torch.cuda.is_available(),
        ddp_find_unused_parameters=False,
    )


def _finish(run: Run, first: bool) -> None:
    """RUN/model; its manifest, without which it does not count, comes last."""
    folder = run.folder / "model"
    run.system.finish(run)  # in every process: each may hold a part of the base
    if not first:
        return
    storage.remove_temporaries(folder)
    with storage.writing(folder, RETRY):
        run.tokenizer.save_pretrained(folder)
        run.model.save_pretrained(folder)
