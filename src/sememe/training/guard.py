"""Steps that must not be taken: a loss or gradient that is no finite number, or a loss far above
those before it. The rule is OLMo-core's, 6 deviations over 128 steps, but what it leaves out stays
out of its window: else the first such loss would hide the next ones."""

from __future__ import annotations

import math
from collections import deque
from typing import TYPE_CHECKING, Any

import numpy as np
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from sememe.errors import Diverged

if TYPE_CHECKING:
    from sememe.keys import Recipe

MIN_STEPS = 8  # fewer say little of a deviation
MIN_DEVIATION = 0.1  # of the mean: few losses may agree by chance, and every text is another
IN_A_ROW = 10


class Guard(TrainerCallback, ExportableState):
    """Says of each step whether it is taken, and counts those that are not. Its state is part of
    every checkpoint, so that a resumed run leaves out what the run that was never stopped does."""

    def __init__(self, recipe: Recipe, say):
        self.window, self.deviations = recipe.spike or (1, math.inf)
        self.steps = recipe.steps
        self.say = say
        self.losses: deque[float] = deque(maxlen=self.window)
        """Of the last steps that were taken."""
        self.unlogged: list[float] = []
        """Of those since the last line of the log."""
        self.norms: dict[str, float] = {}
        """Of the gradients of the last one, before they were clipped, by `gradient_norms`."""
        self.skipped = 0
        self.in_a_row = 0
        self.reason: str | None = None
        """Why the step in progress is not taken."""

    def allows(self, step: int, loss: float, norms: dict[str, float]) -> bool:
        """Whether step number `step` is taken. Raises Diverged with the last of ten in a row that
        are not, or of fewer at the end of the run, where none shows that it has recovered."""
        self.reason = self._fault(loss, norms)
        if self.reason is None:
            self.in_a_row = 0
            self.losses.append(loss)
            self.unlogged.append(loss)
            self.norms = norms
            return True
        self.skipped += 1
        self.in_a_row += 1
        if self.in_a_row == IN_A_ROW or (step == self.steps and self.in_a_row > 1):
            first = step - self.in_a_row + 1
            raise Diverged(
                f"no step from {first} to {step} could be taken ({self.reason} in "
                "the last): need a finite loss, like those before it; the last checkpoint is from "
                "before them. try: the same command with learning_rate=1e-4, precision=fp32 or "
                "spike=null, and --force"
            )
        return False

    def _fault(self, loss: float, norms: dict[str, float]) -> str | None:
        values = {"loss": loss} | {f"gradient of {part}": norm for part, norm in norms.items()}
        for name, value in values.items():
            if not math.isfinite(value):
                return f"the {name} is {value}"
        if len(self.losses) < min(MIN_STEPS, self.window):
            return None
        mean, deviation = np.mean(self.losses), np.std(self.losses)
        limit = mean + self.deviations * max(deviation, MIN_DEVIATION * abs(mean))
        return f"the loss is {loss:.3g}, with {mean:.3g} before it" if loss > limit else None

    def forget(self) -> None:
        """From here on the loss is another one: those before say nothing of it."""
        self.losses.clear()

    def figures(self) -> dict[str, Any]:
        """For the line of the log."""
        figures = {"skipped_steps": self.skipped}
        return figures | ({"skipped": self.reason} if self.reason else {})

    def state(self) -> dict[str, Any]:
        counts = {"skipped": self.skipped, "in_a_row": self.in_a_row}
        return {"losses": [*self.losses], "unlogged": [*self.unlogged]} | counts

    def restore(self, stored: dict[str, Any]) -> None:
        """Sets what `state` gave. Raises TypeError, ValueError or LookupError where it did not."""
        self.losses.extend(map(float, stored["losses"]))
        self.unlogged = [*map(float, stored["unlogged"])]
        self.skipped, self.in_a_row = int(stored["skipped"]), int(stored["in_a_row"])

    def on_step_end(self, args, state, control, **kwargs):
        if self.reason is None:
            return
        control.should_log = True
        # Ten in a row end the run, and the checkpoint that stands then is from before them.
        control.should_save &= state.global_step >= state.max_steps
        if state.is_world_process_zero:
            self.say(f"step {state.global_step} is left out: {self.reason}")
