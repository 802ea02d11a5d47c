"""What happens around the steps: schedule, metrics, Ctrl-C, checkpoint seals."""

from __future__ import annotations

import contextlib
import json
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback

from sememe.progress import bar, leave_out
from sememe.report.files import last_values, read_metrics
from sememe.training.checkpoints import rotate, seal

if TYPE_CHECKING:
    from sememe.systems import Run


@contextlib.contextmanager
def calibrating() -> Iterator[None]:
    """What a model does before its first step, and before its first quantised one, tells the bars
    nothing of the time that further steps take."""
    began = time.time()
    yield
    leave_out(time.time() - began)


class Schedule(TrainerCallback):
    """Sets the share of the codes before each step; in the end it is 1. The codebook starts with
    the first step that is quantised, from the states as they are then."""

    def __init__(self, run: Run):
        self.run = run

    def _share(self, step: int) -> float:
        start, end = self.run.recipe.quantise
        done = step / max(1, self.run.recipe.steps - 1)
        return 1.0 if done >= end else max(0.0, (done - start) / (end - start))

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        step = state.global_step
        model.dial.quantise = self._share(step)
        if model.dial.quantise == 0 or (step > 0 and self._share(step - 1) > 0):
            return
        with calibrating():
            figures = model.start_codes(self.run.batches.calibration_NT, self.run.recipe.seed)
        shown = {key: x for key, x in figures.items() if isinstance(x, float)}
        self.run.say("codebook: " + ", ".join(f"{key} {x:.3g}" for key, x in shown.items()))
        if args.world_size > 1:  # equal on equal machines; made sure of on others
            for module in (model.writer.head, model.writer.codes):
                for value in module.state_dict().values():
                    torch.distributed.broadcast(value, 0)


class Recorder(TrainerCallback):
    """One line of metrics.jsonl per log, with held-out figures beside it, and the progress bar."""

    def __init__(self, run: Run, meter):
        self.run = run
        self.meter = meter
        self.bar = bar(disable=True)

    def on_train_begin(self, args, state, control, **kwargs):
        before = last_values(read_metrics(self.run.folder)) if self.run.checkpoint else {}
        self.started = time.monotonic() - before.get("seconds", 0.0)
        self.state = state
        self.bar = bar(
            total=state.max_steps,
            initial=state.global_step,
            desc=f"train {self.run.recipe.system}",
            unit="step",
            disable=not self.run.show,
        )

    def _is_heldout_due(self, step: int) -> bool:
        return step % self.run.recipe.heldout_every == 0 or step >= self.state.max_steps

    def on_step_end(self, args, state, control, **kwargs):
        self.bar.update(1)
        control.should_log |= self._is_heldout_due(state.global_step)

    def on_log(self, args, state, control, logs=None, model=None, **kwargs):
        if "loss" not in logs:
            return
        line = {k: float(logs[k]) for k in ("loss", "learning_rate", "grad_norm") if k in logs}
        line |= {f"grad_norm_{part}": norm for part, norm in self.run.norms.items()}
        if self.meter is not None:
            line |= self.meter.read()  # on every rank: it sums over them
        line |= self.run.system.state(model)
        if not state.is_world_process_zero:
            return
        if self._is_heldout_due(state.global_step):
            model.eval()
            line |= self.run.system.heldout(self.run)
            model.train()
        self._write(state.global_step, line)
        shown = {k: f"{line[k]:.3f}" for k in ("loss", "heldout_nll", "rate") if k in line}
        self.bar.set_postfix(shown)

    def _write(self, step: int, figures: dict) -> None:
        tokens = self.run.batches.examples.tokens(step)
        seconds = round(time.monotonic() - self.started, 2)
        line = {"step": step, "tokens": tokens, "seconds": seconds} | figures
        with (self.run.folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def stopped(self, reason: str) -> None:
        """Leaves the reason that the next step could not be taken in the log."""
        self._write(self.state.global_step + 1, {"stopped": reason})


class Stop(TrainerCallback):
    """Ctrl-C (or SIGTERM) ends the run after the step in progress, with a checkpoint; a second one
    at once. In a thread other than the main one Python lets nobody handle signals: training there
    goes on without."""

    requested = False

    def __init__(self):
        self.handlers: dict[int, Any] = {}

    def on_train_begin(self, *args, **kwargs):
        if threading.current_thread() is threading.main_thread():
            numbers = (signal.SIGINT, signal.SIGTERM)
            self.handlers = {number: signal.signal(number, self._request) for number in numbers}

    def _request(self, number, frame):
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True

    def on_step_end(self, args, state, control, **kwargs):
        if self.requested and state.global_step < state.max_steps:
            control.should_save = control.should_training_stop = True

    def restore(self) -> None:
        """Gives the signals back, however the run ended."""
        for number, handler in self.handlers.items():
            signal.signal(number, handler)


class Seal(TrainerCallback):
    """Writes a checkpoint's seal last: one without it was cut off while saving and is not resumed
    from. Then older ones go."""

    def on_save(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            seal(Path(args.output_dir) / f"checkpoint-{state.global_step}")
            rotate(Path(args.output_dir))
