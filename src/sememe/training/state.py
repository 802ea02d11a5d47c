"""What a run needs beside its weights to go on as if it had never stopped: optimizer, progress and
random numbers, as safetensors and JSON. (The Trainer has pickles, which may hold any program.)"""

import contextlib
import json
import math
import random
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save
from torch.optim import Optimizer
from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from sememe import storage
from sememe.errors import CheckpointError, reason
from sememe.report.files import read_json

MOMENTS = "optimizer.safetensors"


def save_optimizer(folder: Path, optimizer: Optimizer) -> None:
    """Moments by the number of their parameter. Raises OSError."""
    moments = {
        f"{number}.{key}": value.contiguous()
        for number, values in optimizer.state_dict()["state"].items()
        for key, value in values.items()
    }
    storage.write(folder / MOMENTS, save(moments))


def load_optimizer(folder: Path, optimizer: Optimizer) -> None:
    """What `save_optimizer` saved. Raises ValueError or LookupError where it is of other
    parameters."""
    state: dict[int, dict] = defaultdict(dict)
    for name, value in load_file(folder / MOMENTS).items():
        number, key = name.split(".")
        state[int(number)][key] = value
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for number, values in state.items():
        p = parameters[number]
        wanted = {"step": (torch.Size(), torch.float32)}
        wanted |= dict.fromkeys(("exp_avg", "exp_avg_sq"), (p.shape, p.dtype))
        if number < 0 or {key: (x.shape, x.dtype) for key, x in values.items()} != wanted:
            raise ValueError(f"moments of parameter {number} of another kind")
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def load_progress(folder: Path, step: int) -> dict[str, Any]:
    """What the guard knew, from the Trainer's state after so many steps, all of which the Trainer
    will take over. Raises ValueError, TypeError or LookupError where it cannot."""
    loaded = TrainerState.load_from_json(str(folder / TRAINER_STATE_NAME))
    known = [loaded.global_step, loaded.best_model_checkpoint, loaded.log_history[:0]]
    if repr(known) != f"[{step}, None, []]" or not math.isfinite(loaded.total_flos):
        raise ValueError(f"{TRAINER_STATE_NAME} is of another step")
    return loaded.stateful_callbacks["Guard"]


def save_random(folder: Path, rank: int) -> None:
    """The generators of Python, numpy and torch, in one process of the run. Raises OSError."""
    _, numbers, position, *gauss = np.random.get_state()
    states = {
        "python": random.getstate(),
        "numpy": [numbers.tolist(), position, *gauss],
        "cpu": torch.get_rng_state().tolist(),
        "cuda": torch.cuda.get_rng_state().tolist() if torch.cuda.is_available() else None,
    }
    storage.write(_random(folder, rank), json.dumps(states).encode())


def load_random(folder: Path, rank: int) -> None:
    """What `save_random` saved, where the run had such a process."""
    states = read_json(_random(folder, rank))
    if not states:
        return
    position = states["numpy"][1]
    if not 0 <= position <= 624:  # which numpy takes as it is, and reads what lies there
        raise ValueError("no place among the numbers of numpy")
    version, numbers, gauss = states["python"]
    random.setstate((version, tuple(numbers), gauss))
    np.random.set_state(("MT19937", *states["numpy"]))
    torch.set_rng_state(torch.tensor(states["cpu"], dtype=torch.uint8))
    if states["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state(torch.tensor(states["cuda"], dtype=torch.uint8))


@contextlib.contextmanager
def resuming(checkpoint: Path) -> Iterator[None]:
    """Whatever is wrong with the content of a checkpoint is a CheckpointError."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as fault:
        raise CheckpointError(
            f"{checkpoint} cannot be resumed from ({reason(fault)}): need one that this release "
            "wrote for this recipe. try: another --out"
        ) from fault


def _random(folder: Path, rank: int) -> Path:
    return folder / f"random-{rank}.json"
