"""Several processes that train one model (torchrun); one alone where there are none."""

from typing import Any

import torch.distributed as dist


def process_count() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank_of_process() -> int:
    return dist.get_rank() if process_count() > 1 else 0


def gathered(parts: list[Any]) -> list[Any]:
    """The parts of all processes, by rank; every process has to call it."""
    if process_count() == 1:
        return parts
    everyone: list[list[Any]] = [[]] * process_count()
    dist.all_gather_object(everyone, parts)
    return [part for parts in everyone for part in parts]


def from_first(value: Any) -> Any:
    """The value that the first process has; every process has to call it."""
    values = [value]
    if process_count() > 1:
        dist.broadcast_object_list(values, 0)
    return values[0]
