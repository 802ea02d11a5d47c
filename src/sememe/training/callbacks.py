"""What happens around the steps: schedule, finite gradients, metrics, Ctrl-C, checkpoint
manifests."""

import contextlib
import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from transformers import TrainerCallback

from sememe.errors import TrainingError
from sememe.options import Recipe
from sememe.progress import bar, leave_out
from sememe.training.checkpoints import rotate, seal
from sememe.training.instruments import gradient_norms


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

    def __init__(
        self, recipe: Recipe, calibration_NT: Tensor, say: Callable[[str], None], show: bool = False
    ):
        self.recipe, self.calibration_NT, self.say, self.show, self.started = (
            recipe,
            calibration_NT,
            say,
            show,
            False,
        )

    def _at(self, step: int) -> float:
        start, end = self.recipe.quantise
        done = step / max(1, self.recipe.steps - 1)
        return 1.0 if done >= end else max(0.0, (done - start) / (end - start))

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        step = state.global_step
        model.dial.quantise = self._at(step)
        if model.dial.quantise > 0 and (step == 0 or self._at(step - 1) == 0):
            with calibrating():
                found = model.start_codes(self.calibration_NT, self.recipe.seed)
            self.started = True
            if "variance_left" in found:
                self.say(
                    f"codebook: k-means of {found['states']:.0f} shallow states leaves "
                    f"{found['variance_left']:.0%} of "
                    "their variance"
                )
            else:
                self.say(
                    f"codebook: {found['codes']:.0f} codes spell bins of words, which leave "
                    f"{found['vote_nll']:.2f} nats a "
                    "token to guess"
                )
            if args.world_size > 1:  # equal on equal machines; made sure of on others
                for value in (
                    *model.writer.head.state_dict().values(),
                    *model.writer.codes.state_dict().values(),
                ):
                    torch.distributed.broadcast(value, 0)

    def on_step_end(self, args, state, control, **kwargs):
        control.should_save |= self.started
        self.started = False


class Finite(TrainerCallback):
    """A gradient that is not finite must not reach the optimizer either."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        bad = [
            n
            for n, p in model.named_parameters()
            if p.grad is not None and not torch.isfinite(p.grad).all()
        ]
        if bad:
            raise TrainingError(
                f"the gradient of {bad[0]} is not finite at step {state.global_step + 1}: the step "
                "was not taken and the "
                "last checkpoint stands. try: learning_rate=1e-4, or precision=fp32"
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

    def __init__(
        self,
        recipe: Recipe,
        path: Path,
        heldout_figures: Callable,
        state_figures: Callable,
        meter,
        tokens: Callable[[int], int],
        show: bool,
    ):
        """`heldout_figures` and `state_figures` are of the model as it is then; `tokens` are those
        that the first steps train on."""
        self.recipe = recipe
        self.path = path
        self.heldout_figures = heldout_figures
        self.state_figures = state_figures
        self.meter = meter
        self.tokens = tokens
        self.show = show
        self.bar = None
        self.heldout: dict[str, float | list] = {}
        self.norms: dict[str, float] = {}

    def on_train_begin(self, args, state, control, **kwargs):
        self.started = time.monotonic() - self._before()
        if state.is_world_process_zero:
            self.bar = bar(
                total=state.max_steps,
                initial=state.global_step,
                desc=f"train {self.recipe.system}",
                unit="step",
                disable=not self.show,
            )

    def _before(self) -> float:
        """Seconds that earlier parts of this run took."""
        lines = read_metrics(self.path)
        return lines[-1].get("seconds", 0.0) if lines else 0.0

    def _due(self, step: int, state) -> bool:
        return step % self.recipe.heldout_every == 0 or step >= state.max_steps

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        """The Trainer has clipped by now; `on_log` knows by how much."""
        step = state.global_step + 1
        if step % log_every(self.recipe.steps) == 0 or self._due(step, state):
            self.norms = gradient_norms(model)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if self.bar is not None:
            self.bar.update(1)
        due = self._due(state.global_step, state)
        if due and state.is_world_process_zero:
            model.eval()
            self.heldout = self.heldout_figures(model)
            model.train()
        control.should_log |= due

    def on_log(self, args, state, control, logs=None, model=None, **kwargs):
        logs = logs or {}
        if "loss" not in logs:
            return
        line = self._place(state.global_step)
        line |= {
            key: float(logs[key]) for key in ("loss", "learning_rate", "grad_norm") if key in logs
        }
        if (
            self.norms and "grad_norm" in line
        ):  # clipping scaled all gradients alike: undone, so that parts fit the whole
            unclipped = line["grad_norm"] / max(math.hypot(*self.norms.values()), 1e-30)
            line |= {f"grad_norm_{part}": norm * unclipped for part, norm in self.norms.items()}
        if self.meter is not None:
            line |= self.meter.read()
        line |= self.state_figures(model) | self.heldout
        self.heldout, self.norms = {}, {}
        if state.is_world_process_zero:
            self._write(line)
            if self.bar is not None:
                shown = {k: f"{line[k]:.3f}" for k in ("loss", "heldout_nll", "rate") if k in line}
                self.bar.set_postfix(shown)

    def _place(self, step: int) -> dict[str, float]:
        return {
            "step": step,
            "tokens": self.tokens(step),
            "seconds": round(time.monotonic() - self.started, 2),
        }

    def _write(self, line: dict) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def stopped(self, step: int, reason: str) -> None:
        """Leaves the reason that step number `step` could not be taken in the log."""
        self._write(self._place(step) | {"stopped": reason})

    def close(self) -> None:
        """Ends the progress bar's line, however the run ended."""
        if self.bar is not None:
            self.bar.close()


class Stop(TrainerCallback):
    """Ctrl-C (or SIGTERM) ends the run after the step in progress, with a checkpoint; a second one
    at once.

    In a thread other than the main one Python lets nobody handle signals: training there goes on
    without."""

    def __init__(self):
        self.asked = False
        self._old: dict[int, object] = {}

    def on_train_begin(self, *args, **kwargs):
        main = threading.current_thread() is threading.main_thread()
        for number in (signal.SIGINT, signal.SIGTERM) if main else ():
            self._old[number] = signal.signal(number, self._ask)

    def _ask(self, number, frame):
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True

    def on_step_end(self, args, state, control, **kwargs):
        if self.asked and state.global_step < state.max_steps:
            control.should_save = control.should_training_stop = True

    def restore(self) -> None:
        """Gives the signals back, however the run ended."""
        for number, handler in self._old.items():
            signal.signal(number, handler)


class Seal(TrainerCallback):
    """Writes a checkpoint's manifest last: one without it was cut off while saving and is not
    resumed from. Then older ones go."""

    def on_save(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            seal(Path(args.output_dir) / f"checkpoint-{state.global_step}")
            rotate(Path(args.output_dir))
