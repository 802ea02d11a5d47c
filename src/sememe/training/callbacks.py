"""What happens around the steps: schedule, metrics, Ctrl-C, checkpoint seals."""

from __future__ import annotations

import contextlib
import json
import signal
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import TrainerCallback

from sememe.backbone.processes import gathered, process_count
from sememe.backbone.sharding import leave_to_shards, shard
from sememe.errors import CheckpointError, Interrupted, Terminated
from sememe.progress import bar
from sememe.report.files import last_values, read_metrics
from sememe.training.checkpoints import rotate, seal, step_of
from sememe.training.throughput import Throughput

if TYPE_CHECKING:
    from sememe.systems import Run


MAX_RISE = 0.2  # of the codes' share in one step: above it the loss is another one


class Schedule(TrainerCallback):
    """Sets the share of the codes before each step; in the end it is 1. The codebook starts with
    the first step that is quantised, from the states as they are then, unless it stays as it was
    drawn."""

    def __init__(self, run: Run):
        self.run = run

    def _share(self, step: int) -> float:
        done = step / max(1, self.run.recipe.steps - 1)
        return float(np.interp(done, self.run.recipe.quantise, (0, 1)))

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        step = state.global_step
        share, before = self._share(step), self._share(step - 1)
        model.dial.quantise = share
        if share - before > MAX_RISE:
            self.run.guard.forget()
        is_first = share > 0 and before == 0
        if not (is_first and self.run.recipe.fitted_codes):
            return
        figures = model.start_codes(self.run.batches.calibration_NT, self.run.recipe.seed)
        shown = [f"{key} {x:.3g}" for key, x in figures.items() if isinstance(x, float)]
        self.run.say("codebook: " + ", ".join(shown))
        if args.world_size > 1:  # equal on equal machines; made sure of on others
            for value in model.writer.state_dict().values():
                torch.distributed.broadcast(value, 0)


class Shard(TrainerCallback):
    """Spreads the base over the processes, once DDP has taken what is trained."""

    def __init__(self, run: Run):
        self.run = run
        leave_to_shards(run.model, run.model.backbone)

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        own, total = (size / 2**20 for size in shard(model.backbone))
        self.run.say(
            f"sharded over {process_count()} processes: {own:.2f} of the {total:.2f} MiB of the "
            "base's layers in each"
        )


class Recorder(TrainerCallback):
    """One line of metrics.jsonl per log, with held-out figures beside it, and the progress bar."""

    def __init__(self, run: Run):
        self.run = run
        self.started = time.monotonic()
        self.step = step_of(run.checkpoint) if run.checkpoint else 0
        self.throughput = Throughput(run, self.step)
        with contextlib.suppress(CheckpointError):  # nothing was logged yet
            self.started -= last_values(read_metrics(run.folder)).get("seconds", 0.0)
        self.bar = bar(
            total=run.recipe.steps,
            initial=self.step,
            desc=f"train {run.recipe.system}",
            unit="step",
            disable=not run.show,
        )

    def on_step_begin(self, *args, **kwargs):
        self.throughput.begin()

    def on_step_end(self, args, state, control, **kwargs):
        self.throughput.end()
        self.bar.update(1)
        self.step = state.global_step
        self.is_heldout_due = (
            self.step % self.run.recipe.heldout_every == 0 or self.step >= state.max_steps
        )
        control.should_log |= self.is_heldout_due

    def on_log(self, args, state, control, logs=None, model=None, **kwargs):
        if "learning_rate" not in logs:  # the summary at the end
            return
        run = self.run
        shown = ("loss", "learning_rate", "grad_norm")
        line = {key: float(logs[key]) for key in shown if key in logs} | run.guard.figures()
        line |= {f"grad_norm_{part}": norm for part, norm in run.guard.norms.items()}
        if run.meter is not None:
            line |= run.meter.read()  # on every rank: it sums over them
        line |= run.system.state(model)
        if self.is_heldout_due:  # on every rank too: each may hold a part of the base
            model.eval()
            line |= run.system.heldout(run)
            model.train()
        if not state.is_world_process_zero:
            return
        line |= self.throughput.read(self.step, line.get("rate"), args.bf16)
        self._write(self.step, line)
        self.bar.set_postfix(loss=line.get("loss"))

    def _write(self, step: int, figures: dict) -> None:
        tokens = self.run.batches.examples.tokens(step)
        seconds = round(time.monotonic() - self.started, 2)
        line = {"step": step, "tokens": tokens, "seconds": seconds} | figures
        with (self.run.folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def stopped(self, reason: str) -> None:
        """Leaves the reason that the next step could not be taken in the log."""
        self._write(self.step + 1, {"stopped": reason})


class Stop(TrainerCallback):
    """Ctrl-C (or SIGTERM) ends the run after the step in progress, with a checkpoint; a second one
    at once. In a thread other than the main one Python lets nobody handle signals: training there
    goes on without."""

    requested: int = 0
    """The signal that came; 0: none."""

    def __init__(self):
        self.handlers: dict[int, Any] = {}

    def on_train_begin(self, *args, **kwargs):
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self.handlers[number] = signal.signal(number, self._request)

    def _request(self, number, frame):
        self.requested = number
        self.restore()

    def on_step_end(self, args, state, control, **kwargs):
        # All processes end with the same step: one alone would wait for the others in the next.
        # A signal that comes in the meantime is not written over: it ends the next step.
        if requested := max(gathered([self.requested])):
            self.requested = requested
            if state.global_step < state.max_steps:
                control.should_save = control.should_training_stop = True

    def interruption(self, done: int, steps: int) -> Interrupted:
        """What ends a run that was stopped after `done` of its steps."""
        kind = Terminated if self.requested == signal.SIGTERM else Interrupted
        return kind(f"stopped at step {done} of {steps}; the same command goes on from there")

    def restore(self) -> None:
        """Gives the signals back, however the run ended."""
        for number, handler in self.handlers.items():
            signal.signal(number, handler)


class Seal(TrainerCallback):
    """Writes a checkpoint's seal last: one without it was cut off while saving and is not resumed
    from. Then older ones go."""

    def on_save(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            folder = Path(args.output_dir)
            seal(folder / f"checkpoint-{state.global_step}")
            rotate(folder)
