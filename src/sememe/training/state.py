"""What a run needs beside its weights to go on as if it had never stopped: optimizer, schedule and
random numbers, as safetensors and JSON. (The Trainer has pickles, which may hold any program.)"""

import contextlib
import json
import random
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from sememe import storage
from sememe.errors import CheckpointError, reason
from sememe.report.files import read_json

MOMENTS, SCHEDULE = "optimizer.safetensors", "schedule.json"


def save_optimizer(folder: Path, optimizer: Optimizer, schedule: LRScheduler) -> None:
    """Moments by the number of their parameter, and all that is no tensor. Raises OSError."""
    state = optimizer.state_dict()
    moments = {
        f"{number}.{key}": value.contiguous()
        for number, values in state["state"].items()
        for key, value in values.items()
    }
    storage.write(folder / MOMENTS, save(moments))
    rest = {"groups": state["param_groups"], "schedule": schedule.state_dict()}
    storage.write(folder / SCHEDULE, json.dumps(rest).encode())


def load_optimizer(folder: Path, optimizer: Optimizer, schedule: LRScheduler) -> None:
    """What `save_optimizer` saved."""
    state: dict[int, dict] = defaultdict(dict)
    for name, value in load_file(folder / MOMENTS).items():
        number, key = name.split(".")
        state[int(number)][key] = value
    rest = read_json(folder / SCHEDULE)
    optimizer.load_state_dict({"state": state, "param_groups": rest["groups"]})
    schedule.load_state_dict(rest["schedule"])


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
