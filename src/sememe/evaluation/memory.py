"""Memory of a timed point: what it needs at least, what is free, what it took at most. Bytes; None where nobody can tell."""

from pathlib import Path

import torch

STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def needed_bytes(config, batch: int, tokens: int, dtype: torch.dtype, chunk: int = 0) -> int:
    """About what reading `batch` texts of `tokens` takes beside the weights, for a base's text configuration: the caches of
    both sides, the widest states of one layer, and the mask of a chunk (0: of the whole text) as the kernel wants it."""
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    caches = 2 * config.num_hidden_layers * 2 * heads * head * tokens
    states = tokens * (3 * config.intermediate_size + 4 * config.hidden_size)
    mask = tokens * min(chunk or tokens, tokens)
    return batch * ((caches + states + mask) * dtype.itemsize + mask)


def free_bytes(device: torch.device) -> int | None:
    """What can still be had. A process that takes more is killed without a word, and the same command would run into it
    again: so a point is refused beforehand."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return _kilobytes(Path("/proc/meminfo"), "MemAvailable")


def reset_peak(device: torch.device) -> None:
    """`peak_bytes` counts from here."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    try:
        RESET.write_text("5")  # Linux: forget the peak of the resident set
    except OSError:
        return


def peak_bytes(device: torch.device) -> int | None:
    """The most that was in use since `reset_peak`: on a GPU of its memory, else of the whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return _kilobytes(STATUS, "VmHWM")


def out_of_memory(error: BaseException) -> bool:
    """torch has a type of its own for a GPU, and says it in words on a CPU."""
    said = str(error).lower()
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in said or "out of memory" in said


def _kilobytes(file: Path, key: str) -> int | None:
    try:
        lines = file.read_text().splitlines()
    except OSError:  # no Linux
        return None
    found = [line.split()[1] for line in lines if line.startswith(f"{key}:")]
    return 1024 * int(found[0]) if found else None
