"""Memory of what is timed: what it needs at least, what is free, what it took at most. Bytes; None
where nobody can tell."""

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def needed_bytes(config, batch: int, tokens: int, dtype: torch.dtype, chunk: int = 0) -> int:
    """About what reading `batch` texts of `tokens` takes beside the weights, for a base's text
    configuration: the caches of both sides, the widest states of one layer, and the mask of a chunk
    (0: of the whole text) as the kernel wants it."""
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    caches = 2 * config.num_hidden_layers * 2 * heads * head * tokens
    states = tokens * (3 * config.intermediate_size + 4 * config.hidden_size)
    mask = tokens * min(chunk or tokens, tokens)
    return batch * ((caches + states + mask) * dtype.itemsize + mask)


def free_bytes(device: torch.device) -> int | None:
    """What can still be had. A process that takes more is killed without a word, and the same
    command would run into it again: so a point is refused beforehand."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return _kilobytes(Path("/proc/meminfo"), "MemAvailable")


def reset_peak(device: torch.device) -> bool:
    """`peak_bytes` counts from here. False where it cannot."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    try:
        RESET.write_text("5", encoding="utf-8")  # Linux: forget the peak of the resident set
    except OSError:
        return False
    return True


def peak_bytes(device: torch.device) -> int | None:
    """The most that was in use since `reset_peak`: on a GPU of its memory, else of the whole
    process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return _kilobytes(STATUS, "VmHWM")


def extra_bytes(job: Callable[[], Any], device: torch.device) -> int | None:
    """What `job` takes at most beside what is in use before it: of a GPU's memory, else of the
    process."""
    if not reset_peak(device):
        return None
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
    else:
        _give_back()
        before = _kilobytes(STATUS, "VmRSS")
        reset_peak(device)  # nothing of what was just given back
    job()
    after = peak_bytes(device)
    return None if before is None or after is None else max(0, after - before)


def weight_bytes(model: torch.nn.Module) -> int:
    """Bytes of parameters and buffers, shared ones once."""
    return sum(x.nbytes for x in [*model.parameters(), *model.buffers()])


def _give_back() -> None:
    """glibc keeps what was freed, and the next job would seem to take nothing; other libraries have
    no such call."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError, TypeError):
        return


def out_of_memory(error: BaseException) -> bool:
    """torch has a type of its own for a GPU, and says it in words on a CPU."""
    said = str(error).lower()
    return (
        isinstance(error, MemoryError | torch.OutOfMemoryError)
        or "allocate memory" in said
        or "out of memory" in said
    )


def _kilobytes(file: Path, key: str) -> int | None:
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except OSError:  # no Linux
        return None
    found = [line.split()[1] for line in lines if line.startswith(f"{key}:")]
    return 1024 * int(found[0]) if found else None
