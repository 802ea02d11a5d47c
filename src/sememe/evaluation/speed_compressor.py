"""Speed of a compressor beside the unmodified base: same process, windows, dtype and kernel,
alternating, medians."""

import math
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from sememe.backbone.calling import cache_argument
from sememe.evaluation.coding import price
from sememe.evaluation.figures import keep, run_recipe
from sememe.evaluation.files import base_beside, prompts, torch_dtype
from sememe.evaluation.partial import Partial, partial_of
from sememe.evaluation.speed import in_turn, summary, weight_bytes
from sememe.models.compressor import CompressorForCausalLM
from sememe.models.configuration import CompressorConfig
from sememe.models.loading import (
    check_length,
    load_base,
    load_model,
    load_tokenizer,
    longest_text,
    model_folder,
    read_config,
    resolve,
)
from sememe.progress import advance
from sememe.progress import bar as progress_bar

WINDOW, BATCH = (
    512,
    16,
    # tokens of a window where no run says otherwise, and windows at once: as `sememe compress` has
    # them
)
JOBS = 5  # runs in a round


def is_compressor(model: str) -> bool:
    """Whether `model` names a saved compressor. Reads no weights."""
    folder = model_folder(model)
    return folder is not None and isinstance(read_config(folder), CompressorConfig)


@torch.no_grad()
def greedy(base, bos: int, batch: int, tokens: int) -> Tensor:
    """(B, n) tokens that the base writes behind `bos`: its own cached decoding in a bare loop, as
    the decompressor's is."""
    cache, written = (
        DynamicCache(config=base.config),
        [torch.full((batch, 1), bos, device=base.device)],
    )
    for _ in range(tokens):
        logits_B1V = base(
            input_ids=written[-1], use_cache=True, **cache_argument(base, cache)
        ).logits
        written.append(logits_B1V[:, -1:].argmax(-1))
    return torch.cat(written[1:], 1)


def ratio_of(seconds: dict[str, list[float]], job: str, other: str) -> tuple[float, list[float]]:
    """Median seconds of a job over those of another; and [least, most]: the fastest round of one
    against the slowest of the other, and the other way round."""
    a, b = summary(seconds[job]), summary(seconds[other])
    return a["median"] / b["median"], [a["min"] / b["max"], a["max"] / b["min"]]


def timed(seconds: list[float]) -> dict[str, Any]:
    """Every round, in order, and what they come to."""
    return summary(seconds) | {"rounds": seconds}


def side(model, read: list[float], write: list[float], tokens: int, written: int) -> dict[str, Any]:
    return {
        "read_tokens_per_s": tokens / summary(read)["median"],
        "write_tokens_per_s": written / summary(write)["median"],
        "tokens_written": written,
        "weight_bytes": weight_bytes(model),
        "read_seconds": timed(read),
        "write_seconds": timed(write),
    }


def benchmark_compressor(
    model: CompressorForCausalLM,
    base,
    ids_BT: Tensor,
    repeats: int,
    tick=lambda: None,
    partial: Partial | None = None,
) -> dict[str, Any]:
    """Figures of (B, T) windows, compressed and decompressed all at once, beside the base that
    reads the same tokens (one plain forward with the logits of every token) and writes about as
    many."""
    model, base, config = model.eval(), base.eval(), model.config
    concepts = model.compress(ids_BT)
    written = sum(map(len, model.decompress(concepts)))
    steps = max(1, math.ceil(written / len(ids_BT)))

    def forward(keep_logits: int):
        with torch.no_grad():
            base(input_ids=ids_BT, use_cache=False, logits_to_keep=keep_logits)

    rows, device = len(ids_BT), ids_BT.device
    read = {
        "compress": lambda: model.compress(ids_BT),
        "forward": lambda: forward(0),
        "states": lambda: forward(1),
    }
    write = {
        "decompress": lambda: model.decompress(concepts),
        "greedy": lambda: greedy(base, model.bos, rows, steps),
    }
    seconds = in_turn(read, repeats, device, tick, partial) | in_turn(
        write, repeats, device, tick, partial
    )
    forwards, forwards_range = ratio_of(seconds, "compress", "forward")
    share = written / (rows * steps)  # of the base's tokens
    speedup, speedup_range = ratio_of(seconds, "greedy", "decompress")
    cost = price(concepts, ids_BT.numel(), config.num_concepts, config.codes_per_concept)
    return {
        "compress_base_forwards": forwards,
        "compress_base_forwards_range": forwards_range,
        "compress_base_forwards_no_logits": ratio_of(seconds, "compress", "states")[0],
        "decompress_speedup": share * speedup,
        "decompress_speedup_range": [share * end for end in speedup_range],
        "beams": config.beams,
        "realised_rate": cost["concept_rate"],
        "ids_per_token": cost["ids_per_token"],
        "compression_ratio": cost["compression_ratio"],
        "concept": side(model, seconds["compress"], seconds["decompress"], ids_BT.numel(), written),
        "base": side(base, seconds["forward"], seconds["greedy"], ids_BT.numel(), rows * steps)
        | {"states_seconds": timed(seconds["states"])},
    }


def benchmark_compressor_files(
    model: str,
    window: int | None = None,
    batch: int = BATCH,
    repeats: int = 5,
    data: str | None = None,
    dtype: str = "float32",
    base: str | None = None,
    rate: float | None = None,
) -> dict[str, Any]:
    """`benchmark_compressor` on a saved compressor beside its base; kept as RUN/benchmark.json.

    Args:
        window: tokens of a window; default: the run's `sequence_length`, or 512.
        batch: windows at once.

    Raises:
        CheckpointError: `model` cannot be loaded, or its base is not known any more.
        DataError: a window that does not fit the base's places, or a text that is too short for
            one.
        RecipeError: a rate that the model cannot hold."""
    kind, recipe = torch_dtype(dtype), run_recipe(model)
    loaded, _ = load_model(model, dtype=kind, base=base, rate=rate)
    named = base_beside(model, loaded.config, base)
    source = resolve(named)
    longest = longest_text(loaded.config)
    length = window or min(recipe.get("sequence_length", WINDOW), longest)
    check_length(longest, length, "--prompt-tokens ")
    source_text = data or recipe.get("data", {}).get("heldout")
    ids_BT = prompts(source_text, load_tokenizer(source), length, batch).to(loaded.device)
    plain = load_base(source, dtype=kind).to(loaded.device).eval()
    settings = {
        "window": length,
        "batch": batch,
        "repeats": repeats,
        "dtype": dtype,
        "attention": "sdpa",
        "threads": torch.get_num_threads(),
        "device": str(loaded.device),
        "prompts": "text" if source_text else "random tokens",
        "model_folder": str(model_folder(model)),
        "target_rate": loaded.dial.rate,
    }
    partial = partial_of(model, "benchmark.json", texts=[ids_BT], **settings)
    with progress_bar(total=JOBS * (repeats + 1), desc="benchmark", unit="run") as bar:
        result = benchmark_compressor(
            loaded, plain, ids_BT, repeats, lambda: advance(bar, 1, partial.reused), partial
        )
    result |= {"model": str(model), "base_name": named, "settings": settings}
    keep(model, "benchmark.json", result)
    partial.finish()
    return result
