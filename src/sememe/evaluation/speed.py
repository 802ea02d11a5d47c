"""Speed, cache and memory beside the unmodified base: same process, dtype and kernel, alternating,
medians (RUN/benchmark.json)."""

import copy
import math
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from sememe.backbone.adapters import linear_names
from sememe.backbone.calling import CACHE, cache_argument
from sememe.errors import CheckpointError
from sememe.evaluation.reconstruction import coding_cost
from sememe.evaluation.results import Figures, Parts
from sememe.evaluation.subject import LENGTH, Subject
from sememe.models.configuration import ControlConfig
from sememe.models.control import ControlForCausalLM
from sememe.models.loading import check_length, longest_text, model_folder, resolve
from sememe.progress import bar

Jobs = dict[str, Callable[[], Any]]


def clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def alternate(jobs: Jobs, repeats: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of each job in each of `repeats` rounds, in turn, after one round not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    for _ in bar(iterable=range(repeats + 1), desc=f"time {', '.join(jobs)}", unit="round"):
        for name, job in jobs.items():
            start = clock(device)
            job()
            seconds[name].append(clock(device) - start)
    return {name: rounds[1:] for name, rounds in seconds.items()}


def summary(seconds: list[float]) -> dict[str, float]:
    return {"median": statistics.median(seconds), "min": min(seconds), "max": max(seconds)}


def weight_bytes(model: nn.Module) -> int:
    """Bytes of parameters and buffers, shared ones once."""
    return sum(x.nbytes for x in [*model.parameters(), *model.buffers()])


def cache_bytes(cache) -> int:
    """Bytes of all keys and values, summed from the tensors. Raises CheckpointError for an empty
    cache."""
    if hasattr(cache, "bytes"):
        size = cache.bytes()
    else:
        layers = [layer for layer in cache.layers if layer.keys is not None]
        size = sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)
    if not size:
        raise CheckpointError(
            "the cache is empty after generating: need one that holds what was read. try: the "
            "newest release of transformers that pyproject.toml allows"
        )
    return size


def peaks(pair: dict[str, nn.Module], job: Callable[[Any], Any]) -> dict[str, int | None]:
    """The peak of GPU memory of `job(side)` for each side, in bytes: its weights, and what is taken
    beside them. None on a CPU, where nobody can tell."""
    peak_bytes: dict[str, int | None] = dict.fromkeys(pair)
    for name, model in pair.items() if torch.cuda.is_available() else ():
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        job(model)
        peak_bytes[name] = weight_bytes(model) + torch.cuda.max_memory_allocated() - before
    return peak_bytes


def ratio(sides: dict[str, float | None]) -> float | None:
    """Concept / base; None where nobody can tell."""
    return None if None in sides.values() else sides["concept"] / sides["base"]


@torch.no_grad()
def prefill(model, ids_BT: Tensor) -> None:
    """Reads a prompt into a new cache, with logits of its last token."""
    model(input_ids=ids_BT, use_cache=True, logits_to_keep=1)


@torch.no_grad()
def generate(model, ids_BT: Tensor, new_tokens: int, cache) -> None:
    """Reads a prompt and writes exactly `new_tokens`, greedily."""
    model.generate(
        input_ids=ids_BT,
        attention_mask=torch.ones_like(ids_BT),
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        do_sample=False,
        pad_token_id=0,
        **{CACHE: cache},
    )


def throughput(
    fill: list[float], whole: list[float], batch: int, length: int, new_tokens: int
) -> Figures:
    """Tokens per second of reading (B, T) prompts and of writing, from the seconds of prefill and
    of all of `generate`."""
    fill, whole = summary(fill), summary(whole)
    decoding = max(whole["median"] - fill["median"], 1e-9)  # a difference, which noise can drown
    return {
        "prefill_tokens_per_s": batch * length / max(fill["median"], 1e-9),
        "decode_tokens_per_s": batch * (new_tokens - 1) / decoding,
        "prefill_seconds": fill,
        "generate_seconds": whole,
    }


def layer_macs(base: nn.Module) -> tuple[int, int]:
    """Multiply-accumulates per token of one decoder layer's linears (mean over layers), and of the
    lm_head."""
    decoder = base.get_decoder()
    names = set(linear_names(decoder))
    linears = [
        module.weight.numel()
        for name, module in decoder.layers.named_modules()
        if name.rsplit(".", 1)[-1] in names and isinstance(module, nn.Linear)
    ]
    return sum(linears) // len(decoder.layers), base.lm_head.weight.numel()


def ceiling_decode(base: nn.Module, config, rate: float) -> float:
    """Decode speed-up that the layer arithmetic allows at a realised rate; attention and overheads
    left out."""
    layer, lm_head = layer_macs(base)
    shallow, middle, deep = config.split
    width = config.text_config.hidden_size
    # A joint head scores all codes at every token: its first stage is the gate too.
    lookups = config.codes_per_concept * rate + (1.0 - rate if config.head == "joint" else 0.0)
    codes = config.num_concepts * width * lookups
    bridge = 2 * width**2 if config.bridge else 0
    layers = shallow + middle * rate + deep
    whole = (shallow + middle + deep) * layer + lm_head
    return whole / (layers * layer + lm_head + codes + bridge)


def benchmark_online(
    model, base, ids_BT: Tensor, new_tokens: int, repeats: int, parts: Parts | None = None
) -> Figures:
    """Prefill, decode, cache and memory figures of a (merged) online model beside its base.
    `parts`: what was timed before a stop. Raises CheckpointError where a cache stays empty."""
    batch, length = ids_BT.shape
    parts, pair = parts or Parts(), {"concept": model, "base": base}
    caches: dict[str, Any] = {}

    def decode(name: str) -> None:
        is_ours = name == "concept"
        caches[name] = model.new_cache(batch) if is_ours else DynamicCache(config=base.config)
        generate(pair[name], ids_BT, new_tokens, caches[name])

    for side in pair.values():
        prefill(side, ids_BT[:, :2])  # reads weights that are in a file still
    fill_jobs = {name: partial(prefill, side, ids_BT) for name, side in pair.items()}
    whole_jobs = {name: partial(decode, name) for name in pair}
    fill = parts.part("prefill", lambda: alternate(fill_jobs, repeats, ids_BT.device))
    whole = parts.part("generate", lambda: alternate(whole_jobs, repeats, ids_BT.device))
    for name in pair.keys() - caches.keys():  # timed before a stop
        decode(name)
    memory = peaks(pair, lambda side: prefill(side, ids_BT))
    rate = int(caches["concept"].concepts.sum()) / max(1, int(caches["concept"].tokens.sum()))
    sides = {
        name: throughput(fill[name], whole[name], batch, length, new_tokens)
        | {
            "cache_bytes": cache_bytes(caches[name]),
            "weight_bytes": weight_bytes(side),
            "prefill_peak_bytes": memory[name],
        }
        for name, side in pair.items()
    }
    ratios = {
        key: ratio({name: side[key] for name, side in sides.items()})
        for key in ("prefill_tokens_per_s", "decode_tokens_per_s", "cache_bytes")
    }
    return sides | {
        "prefill_speedup": ratios["prefill_tokens_per_s"],
        "decode_speedup": ratios["decode_tokens_per_s"],
        "cache_reduction": 1 / ratios["cache_bytes"],
        "prefill_memory_ratio": ratio(memory),
        "ceiling_decode_speedup": ceiling_decode(base, model.config, rate),
        "realised_rate": rate,
    }


def train_step(model, ids_BT: Tensor, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Forward and backward. The optimizer's share of the time is the same for both, but not of the
    memory."""
    model(input_ids=ids_BT, labels=ids_BT, use_cache=False).loss.backward()
    if optimizer is not None:
        optimizer.step()
    model.zero_grad(set_to_none=True)


def train_twice(model, ids_BT: Tensor) -> None:
    """Two steps that change no weight; the second has the optimizer's state beside it."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.0, weight_decay=0.0)
    for _ in range(2):
        train_step(model, ids_BT, optimizer)


def benchmark_training(
    model, control, ids_BT: Tensor, repeats: int, parts: Parts | None = None
) -> Figures:
    """Training step of an online model against the same base with the same LoRA and no concepts:
    time and memory."""
    pair = {"concept": model.train(), "base": control.train()}
    jobs = {name: partial(train_step, side, ids_BT) for name, side in pair.items()}
    seconds = (parts or Parts()).part("train", lambda: alternate(jobs, repeats, ids_BT.device))
    memory = peaks(pair, lambda side: train_twice(side, ids_BT))
    summaries = {name: summary(rounds) for name, rounds in seconds.items()}
    medians = {name: side["median"] for name, side in summaries.items()}
    sides = {
        name: {
            "train_tokens_per_s": ids_BT.numel() / medians[name],
            "train_peak_bytes": memory[name],
            "train_seconds": summaries[name],
        }
        for name in pair
    }
    return sides | {"train_step_ratio": ratio(medians), "train_memory_ratio": ratio(memory)}


@torch.no_grad()
def greedy(base, bos: int, batch: int, tokens: int) -> Tensor:
    """(B, n) tokens that the base writes after `bos`: its own cached decoding in a bare loop, as
    the decompressor's is."""
    cache = DynamicCache(config=base.config)
    written = [torch.full((batch, 1), bos, device=base.device)]
    for _ in range(tokens):
        out = base(input_ids=written[-1], use_cache=True, **cache_argument(base, cache))
        written.append(out.logits[:, -1:].argmax(-1))
    return torch.cat(written[1:], 1)


def ratio_of(seconds: dict[str, list[float]], job: str, other: str) -> tuple[float, list[float]]:
    """Median seconds of a job over those of another; and [min, max]: the fastest round of one
    against the slowest of the other, and the other way round."""
    a, b = summary(seconds[job]), summary(seconds[other])
    return a["median"] / b["median"], [a["min"] / b["max"], a["max"] / b["min"]]


def benchmark_compressor(
    model, base, ids_BT: Tensor, repeats: int, parts: Parts | None = None
) -> Figures:
    """Figures of (B, T) windows, compressed and decompressed all at once, beside the base that
    reads the same tokens (one plain forward with the logits of every token) and writes about as
    many."""
    config, rows = model.config, len(ids_BT)
    concepts = model.compress(ids_BT)
    written = sum(map(len, model.decompress(concepts)))
    steps = max(1, math.ceil(written / rows))

    @torch.no_grad()
    def forward(logits: int) -> None:
        base(input_ids=ids_BT, use_cache=False, logits_to_keep=logits)

    reading = {
        "compress": partial(model.compress, ids_BT),
        "forward": partial(forward, 0),
        "states": partial(forward, 1),
    }
    writing = {
        "decompress": partial(model.decompress, concepts),
        "greedy": partial(greedy, base, model.bos, rows, steps),
    }
    parts = parts or Parts()
    seconds = parts.part("read", lambda: alternate(reading, repeats, ids_BT.device))
    seconds |= parts.part("write", lambda: alternate(writing, repeats, ids_BT.device))
    forwards, forwards_range = ratio_of(seconds, "compress", "forward")
    speedup, speedup_range = ratio_of(seconds, "greedy", "decompress")
    share = written / (rows * steps)  # of the base's tokens
    cost = coding_cost(concepts, ids_BT.numel(), config.num_concepts, config.codes_per_concept)
    tokens, states = ids_BT.numel(), {"states_seconds": _timed(seconds["states"])}
    return {
        "compress_base_forwards": forwards,
        "compress_base_forwards_range": forwards_range,
        "compress_base_forwards_no_logits": ratio_of(seconds, "compress", "states")[0],
        "decompress_speedup": share * speedup,
        "decompress_speedup_range": [share * end for end in speedup_range],
        "beams": config.beams,
        "realised_rate": cost["concept_rate"],
        **{key: cost[key] for key in ("ids_per_token", "compression_ratio")},
        "concept": _side(model, seconds["compress"], seconds["decompress"], tokens, written),
        "base": _side(base, seconds["forward"], seconds["greedy"], tokens, rows * steps) | states,
    }


def _timed(seconds: list[float]) -> Figures:
    return summary(seconds) | {"rounds": seconds}


def _side(
    model: nn.Module, read: list[float], write: list[float], tokens: int, written: int
) -> Figures:
    """The compressor, or the base that stands beside it."""
    return {
        "read_tokens_per_s": tokens / statistics.median(read),
        "write_tokens_per_s": written / statistics.median(write),
        "tokens_written": written,
        "weight_bytes": weight_bytes(model),
        "read_seconds": _timed(read),
        "write_seconds": _timed(write),
    }


def _about(subject: Subject, ids_BT: Tensor, data: str | None, **lengths: int) -> Figures:
    """What stands beside the figures of a benchmark."""
    options = subject.options
    settings = {
        "batch": len(ids_BT),
        "repeats": options.repeats,
        "dtype": options.dtype,
        "attention": "sdpa",
        "threads": torch.get_num_threads(),
        "device": str(ids_BT.device),
        "prompts": "text" if data or subject.recipe else "random tokens",
        "model_folder": str(model_folder(subject.name)),
        "target_rate": subject.model.dial.rate,
    }
    return {"base_name": subject.base_name, "settings": lengths | settings}


def benchmark_saved_online(
    subject: Subject, prompt_tokens: int | None, data: str | None
) -> Figures:
    """`benchmark_online` and `benchmark_training` of a saved model that was not merged yet."""
    model, options = subject.model, subject.options
    length, new_tokens = prompt_tokens or 512, options.new_tokens
    check_length(longest_text(model.config), length, "--prompt-tokens ", new_tokens)
    ids_BT = subject.prompts(data, length, options.batch or 1)
    about = _about(subject, ids_BT, data, prompt_tokens=length, new_tokens=new_tokens)
    parts, base = subject.parts("benchmark", ids_BT), subject.load_base()
    empty = {"train_tokens_per_s": None, "train_peak_bytes": None}
    figures = {
        "concept": empty,
        "base": empty,
        "train_step_ratio": None,
        "train_memory_ratio": None,
    }
    if model.config.base is not None:
        # The gate follows what it sees in training: it is put back afterwards.
        gate = copy.deepcopy(model.writer.gate.state_dict())
        control = _control_of(subject)
        figures = benchmark_training(model, control, ids_BT, options.repeats, parts)
        model.writer.gate.load_state_dict(gate)
        model.merged()
    use = benchmark_online(model.eval(), base, ids_BT, new_tokens, options.repeats, parts)
    sides = {name: use[name] | figures[name] for name in ("concept", "base")}
    return figures | use | sides | about


def _control_of(subject: Subject) -> ControlForCausalLM:
    """An untrained control over the same base with the same LoRA."""
    config = subject.model.config
    keys = ("base", "lora_rank", "lora_alpha", "lora_dropout")
    control = ControlForCausalLM.from_base(
        ControlConfig(**{key: getattr(config, key) for key in keys}),
        subject.model.dtype,
        folder=resolve(subject.base_name),
    )
    return control.to(subject.model.device)


def benchmark_saved_compressor(subject: Subject, window: int | None, data: str | None) -> Figures:
    """`benchmark_compressor` of a saved compressor beside its base."""
    longest = longest_text(subject.model.config)
    length = window or min(subject.recipe.get("sequence_length", LENGTH), longest)
    check_length(longest, length, "--prompt-tokens ")
    ids_BT = subject.prompts(data, length, subject.options.batch or 16)
    about = _about(subject, ids_BT, data, window=length)
    parts, base = subject.parts("benchmark", ids_BT), subject.load_base()
    repeats = subject.options.repeats
    return benchmark_compressor(subject.model, base, ids_BT, repeats, parts) | about
