"""What happens around the steps: schedule, finite gradients, metrics, Ctrl-C, checkpoint seals."""

from __future__ import annotations

import contextlib
import json
import math
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import TrainerCallback

from sememe.errors import TrainingError
from sememe.progress import bar, leave_out
from sememe.training.checkpoints import rotate, seal
from sememe.training.meters import gradient_norms

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
    """Sets the share of the codes before each step; in the end it is 1.

    The codebook starts with the first step that is quantised, from the states as they are then. A
    checkpoint is written after that step: what came before takes as long as many steps."""

    def __init__(self, run: Run):
        self.run = run
        self.started = False

    def _share(self, step: int) -> float:
        recipe = self.run.recipe
        start, end = recipe.quantise
        done = step / max(1, recipe.steps - 1)
        return 1.0 if done >= end else max(0.0, (done - start) / (end - start))

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        step = state.global_step
        model.dial.quantise = self._share(step)
        if model.dial.quantise == 0 or (step > 0 and self._share(step - 1) > 0):
            return
        self.started = True
        with calibrating():
            figures = model.start_codes(self.run.batches.calibration_NT, self.run.recipe.seed)
        if "variance_left" in figures:
            self.run.say(
                f"codebook: k-means of {figures['states']:.0f} shallow states leaves "
                f"{figures['variance_left']:.0%} of their variance"
            )
        else:
            self.run.say(
                f"codebook: {figures['codes']:.0f} codes spell bins of words, which leave "
                f"{figures['vote_nll']:.2f} nats a token to guess"
            )
        if args.world_size > 1:  # equal on equal machines; made sure of on others
            for module in (model.writer.head, model.writer.codes):
                for value in module.state_dict().values():
                    torch.distributed.broadcast(value, 0)

    def on_step_end(self, args, state, control, **kwargs):
        control.should_save |= self.started
        self.started = False


class Finite(TrainerCallback):
    """A gradient that is not finite must not reach the optimizer either."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        for name, p in model.named_parameters():
            if p.grad is not None and not torch.isfinite(p.grad).all():
                raise TrainingError(
                    f"the gradient of {name} is not finite at step {state.global_step + 1}: the "
                    "step was not taken and the last checkpoint stands. try: learning_rate=1e-4, "
                    "or precision=fp32"
                )


def log_every(steps: int) -> int:
    """Steps between lines of the log: about 200 of them in a run."""
    return max(1, steps // 200)


def read_metrics(path: Path) -> list[dict]:
    """The lines of a metrics.jsonl; one that a crash cut off is left out."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        with contextlib.suppress(ValueError):
            lines.append(json.loads(line))
    return lines


class Recorder(TrainerCallback):
    """One line of metrics.jsonl per log, with held-out figures beside it, and the progress bar."""

    def __init__(self, run: Run, meter):
        self.run = run
        self.meter = meter
        self.path = run.folder / "metrics.jsonl"
        self.bar = bar(disable=True)
        self.heldout: dict[str, float | list] = {}
        self.norms: dict[str, float] = {}

    def on_train_begin(self, args, state, control, **kwargs):
        lines = read_metrics(self.path)
        earlier = lines[-1].get("seconds", 0.0) if lines else 0.0
        self.started = time.monotonic() - earlier
        self.state = state
        self.bar = bar(
            total=state.max_steps,
            initial=state.global_step,
            desc=f"train {self.run.recipe.system}",
            unit="step",
            disable=not self.run.show,
        )

    def _is_heldout_due(self, step: int, state) -> bool:
        return step % self.run.recipe.heldout_every == 0 or step >= state.max_steps

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        """The Trainer has clipped by now; `on_log` knows by how much."""
        step = state.global_step + 1
        if step % args.logging_steps == 0 or self._is_heldout_due(step, state):
            self.norms = gradient_norms(model)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.bar.update(1)
        if self._is_heldout_due(state.global_step, state):
            control.should_log = True
            if state.is_world_process_zero:
                model.eval()
                self.heldout = self.run.system.heldout(self.run)
                model.train()

    def on_log(self, args, state, control, logs=None, model=None, **kwargs):
        if "loss" not in (logs or {}):
            return
        line = self._place(state.global_step)
        line |= {k: float(logs[k]) for k in ("loss", "learning_rate", "grad_norm") if k in logs}
        if self.norms and "grad_norm" in line:
            # Clipping scaled all gradients alike: undone, so that the parts fit the whole.
            unclipped = line["grad_norm"] / max(math.hypot(*self.norms.values()), 1e-30)
            line |= {f"grad_norm_{part}": norm * unclipped for part, norm in self.norms.items()}
        if self.meter is not None:
            line |= self.meter.read()  # on every rank: it sums over them
        line |= self.run.system.state(model) | self.heldout
        self.heldout, self.norms = {}, {}
        if state.is_world_process_zero:
            self._write(line)
            shown = {k: f"{line[k]:.3f}" for k in ("loss", "heldout_nll", "rate") if k in line}
            self.bar.set_postfix(shown)

    def _place(self, step: int) -> dict[str, float]:
        tokens = self.run.batches.examples.tokens(step)
        seconds = round(time.monotonic() - self.started, 2)
        return {"step": step, "tokens": tokens, "seconds": seconds}

    def _write(self, line: dict) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def stopped(self, reason: str) -> None:
        """Leaves the reason that the next step could not be taken in the log."""
        self._write(self._place(self.state.global_step + 1) | {"stopped": reason})


class Stop(TrainerCallback):
    """Ctrl-C (or SIGTERM) ends the run after the step in progress, with a checkpoint; a second one
    at once. In a thread other than the main one Python lets nobody handle signals: training there
    goes on without."""

    def __init__(self):
        self.requested = False
        self.handlers: dict[int, object] = {}

    def on_train_begin(self, *args, **kwargs):
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self.handlers[number] = signal.signal(number, self._request)

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
