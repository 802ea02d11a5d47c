"""Dial: what may change while a model runs. Its configuration never does."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from torch import nn


@dataclass
class Dial:
    """Run-time values of a model that writes concepts.

    rate: concepts per normal token that the gate holds; of each row, if they differ.
    quantise: share of the code in a concept's state: 0 carries the state itself, 1 the code alone.
    """

    rate: float | np.ndarray
    quantise: float = 1.0

    @contextmanager
    def at(self, **values: float | np.ndarray) -> Iterator[None]:
        """These values inside, the former ones again afterwards."""
        before = dict(vars(self))
        vars(self).update(values)
        try:
            yield
        finally:
            vars(self).update(before)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode inside, the former mode again afterwards."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
