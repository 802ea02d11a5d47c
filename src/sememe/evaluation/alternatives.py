"""What a user would otherwise run the same base with on this machine: transformers' `generate`, and
llama.cpp on the GGUF that the base's weights were made from. Rows beside a speed sweep, with their
precision named."""

import importlib
import statistics
from collections import deque
from collections.abc import Callable, Iterable
from functools import partial
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from sememe.backbone.pulling import fetch_gguf
from sememe.errors import BaseError
from sememe.evaluation.speed import alternate, throughput, unclear

TRANSFORMERS, LLAMA = "transformers", "llama.cpp"
SPEEDS = ("prefill_tokens_per_s", "decode_tokens_per_s")


def transformers_rows(points: list[dict[str, Any]], dtype: str) -> list[dict[str, Any]]:
    """The bases of all measured points, one row for each prompt length and batch: the median where
    there are several."""
    bases: dict[tuple, list[dict[str, Any]]] = {}
    for point in points:
        if point["fault"] is None:
            bases.setdefault((point["prompt_tokens"], point["batch"]), []).append(point["base"])
    return [
        row(TRANSFORMERS, dtype, *shape)
        | {key: statistics.median(one[key] for one in found) for key in SPEEDS}
        for shape, found in sorted(bases.items())
    ]


def row(
    name: str,
    precision: str | None = None,
    prompt_tokens: int | None = None,
    batch: int | None = None,
    fault: str | None = None,
) -> dict[str, Any]:
    return {
        "name": name,
        "precision": precision,
        "prompt_tokens": prompt_tokens,
        "batch": batch,
        **dict.fromkeys(SPEEDS),
        "concept_decode_speedup": None,
        "fault": fault,
    }


def compared(rows: list[dict[str, Any]], points: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with how many times as fast the fastest concept model of the grid writes, at the
    same prompt length and batch. The base of each point ran in turn with it: there the point's own
    ratio counts, not one over the median of all."""
    best: dict[tuple, tuple[float, float]] = {}
    for point in points:
        if point["fault"] is None:
            shape = point["prompt_tokens"], point["batch"]
            speeds = point["concept"]["decode_tokens_per_s"], point["decode_speedup"]
            best[shape] = tuple(map(max, best.get(shape, speeds), speeds))
    found = []
    for one in rows:
        speed, ratio = best.get((one["prompt_tokens"], one["batch"]), (None, None))
        if one["name"] != TRANSFORMERS:
            ratio = (
                speed / one["decode_tokens_per_s"] if speed and one["decode_tokens_per_s"] else None
            )
        found.append(one | {"concept_decode_speedup": ratio})
    return found


def llama_cpp() -> tuple[ModuleType | None, str | None]:
    """(the module, None), or (None, why there is none). It is no dependency of ours."""
    try:
        return importlib.import_module("llama_cpp"), None
    except ImportError:
        return None, "not installed (pip install llama-cpp-python)"
    except (
        Exception
    ) as error:  # its library was built for another machine: OSError, RuntimeError, …
        return None, f"installed, but it cannot be loaded ({_line(error)})"


def llama_rows(
    llama: ModuleType,
    gguf: Path,
    prompts: Iterable[Tensor],
    new_tokens: int,
    repeats: int,
    cuda: bool = False,
    tick: Callable[[], None] = lambda: None,
) -> Iterable[dict[str, Any]]:
    """One row for each prompt, (1, T) ids, as soon as it is measured; batch 1, which is what its
    Python class takes.

    As many threads as torch has, greedy, and otherwise its own defaults. The cache is float16."""
    prompts, threads = list(prompts), torch.get_num_threads()
    longest = max(ids_1T.shape[1] for ids_1T in prompts)
    offload = cuda and bool(llama.llama_supports_gpu_offload())
    model = llama.Llama(
        model_path=str(gguf),
        n_ctx=longest + new_tokens,
        n_threads=threads,
        n_threads_batch=threads,
        n_gpu_layers=-1 if offload else 0,
        verbose=False,
    )
    precision, version = precision_of(gguf), getattr(llama, "__version__", None)
    for ids_1T in prompts:
        length, ids = ids_1T.shape[1], ids_1T[0].tolist()

        def write(count: int, ids: list[int] = ids) -> None:
            model.reset()  # else it remembers the prompt and reads only what is new
            deque(islice(model.generate(ids, temp=0.0), count), maxlen=0)

        jobs = {"fill": partial(write, 1), "whole": partial(write, new_tokens)}
        seconds = alternate(jobs, repeats, torch.device("cpu"), tick)
        figures = throughput(seconds["fill"], seconds["whole"], 1, length, new_tokens)
        fault = unclear(figures)
        more = (
            {} if fault else figures | {"device": "cuda" if offload else "cpu", "version": version}
        )
        yield row(LLAMA, precision, length, 1, fault) | more


def gguf_of(base_name: str, folder: Path, say: Callable[[str], None]) -> Path:
    """The GGUF of a base: one beside its weights, or the one that a known base was made from.

    Raises BaseError where the base has none, or where it cannot be had.
    """
    beside = sorted(folder.glob("*.gguf"))
    found = beside[0] if beside else fetch_gguf(base_name, folder, say)
    if found is None:
        raise BaseError(
            f"{base_name} has no GGUF file: need one for llama.cpp. try: put it into {folder}"
        )
    return found


def precision_of(gguf: Path) -> str:
    """The quantisation that the file names for itself, such as Q4_1; without a name, the commonest
    type of its tensors."""
    from gguf import GGUFReader, LlamaFileType

    reader = GGUFReader(gguf)
    named = reader.get_field("general.file_type")
    if named is not None:
        return (
            LlamaFileType(int(named.contents())).name.removeprefix("MOSTLY_").removeprefix("ALL_")
        )
    sizes: dict[str, int] = {}
    for tensor in reader.tensors:
        sizes[tensor.tensor_type.name] = sizes.get(tensor.tensor_type.name, 0) + int(
            tensor.n_elements
        )
    return max(sizes, key=sizes.get, default="unknown")


def _line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
