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

from sememe.backbone.calling import CACHE, cache_argument
from sememe.evaluation.reconstruction import coding_cost
from sememe.evaluation.results import Figures
from sememe.evaluation.subject import Subject
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


def peaks(jobs: Jobs, pair: dict[str, nn.Module]) -> dict[str, int | None]:
    """The peak of GPU memory of each side's job, in bytes: its weights, and what is taken beside
    them. None on a CPU, where nobody can tell."""
    if not torch.cuda.is_available():
        return dict.fromkeys(pair)
    peak_bytes = {}
    for name, model in pair.items():
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        jobs[name]()
        peak_bytes[name] = weight_bytes(model) + torch.cuda.max_memory_allocated() - before
    return peak_bytes


def ratio(sides: dict[str, Figures], key: str) -> float | None:
    """Concept / base; None where it was not measured."""
    concept, base = sides["concept"][key], sides["base"][key]
    return None if concept is None else concept / base


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


def ceiling_decode(base: nn.Module, config, rate: float) -> float:
    """Decode speed-up that the layer arithmetic allows at a realised rate, in multiply-accumulates
    per token of the linears; attention and overheads left out."""
    layers, lm_head = base.get_decoder().layers, base.lm_head.weight.numel()
    linears = [module for module in layers.modules() if isinstance(module, nn.Linear)]
    macs = sum(module.weight.numel() for module in linears)
    width = config.text_config.hidden_size
    # A joint head scores all codes at every token: its first stage is the gate too.
    lookups = config.codes_per_concept * rate + (1.0 - rate if config.head == "joint" else 0.0)
    writing = config.num_concepts * width * lookups + 2 * width**2 * bool(config.bridge)
    return (macs + lm_head) / (config.layer_share(rate) * macs + lm_head + writing)


def benchmark_online(model, base, ids_BT: Tensor, new_tokens: int, repeats: int) -> Figures:
    """Prefill, decode, cache and memory figures of a (merged) online model beside its base."""
    pair = {"concept": model, "base": base}
    caches: dict[str, Any] = {}

    def decode(name: str) -> None:
        is_ours = name == "concept"
        caches[name] = model.new_cache(len(ids_BT)) if is_ours else DynamicCache(config=base.config)
        generate(pair[name], ids_BT, new_tokens, caches[name])

    fill_jobs = _jobs(prefill, pair, ids_BT)
    fill = alternate(fill_jobs, repeats, ids_BT.device)
    whole = alternate({name: partial(decode, name) for name in pair}, repeats, ids_BT.device)
    memory = peaks(fill_jobs, pair)
    cache = caches["concept"]
    # Layers that share the keys of others have none.
    layers = [layer for layer in caches["base"].layers if layer.keys is not None]
    cache_bytes = {
        "concept": cache.bytes(),
        "base": sum(layer.keys.nbytes + layer.values.nbytes for layer in layers),
    }
    rate = int(cache.concepts.sum()) / max(1, int(cache.tokens.sum()))
    sides = {
        name: throughput(fill[name], whole[name], *ids_BT.shape, new_tokens)
        | {
            "cache_bytes": cache_bytes[name],
            "weight_bytes": weight_bytes(side),
            "prefill_peak_bytes": memory[name],
        }
        for name, side in pair.items()
    }
    return sides | {
        "prefill_speedup": ratio(sides, "prefill_tokens_per_s"),
        "decode_speedup": ratio(sides, "decode_tokens_per_s"),
        "cache_reduction": 1 / ratio(sides, "cache_bytes"),
        "prefill_memory_ratio": ratio(sides, "prefill_peak_bytes"),
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


def benchmark_training(model, control, ids_BT: Tensor, repeats: int) -> Figures:
    """Training step of an online model against the same base with the same LoRA and no concepts:
    time and memory."""
    pair = {"concept": model.train(), "base": control.train()}
    seconds = alternate(_jobs(train_step, pair, ids_BT), repeats, ids_BT.device)
    memory = peaks(_jobs(train_twice, pair, ids_BT), pair)
    sides = {
        name: {
            "train_tokens_per_s": ids_BT.numel() / statistics.median(seconds[name]),
            "train_peak_bytes": memory[name],
            "train_seconds": summary(seconds[name]),
        }
        for name in pair
    }
    return sides | {
        "train_step_ratio": 1 / ratio(sides, "train_tokens_per_s"),
        "train_memory_ratio": ratio(sides, "train_peak_bytes"),
    }


def _jobs(step: Callable[..., Any], pair: dict[str, nn.Module], *args: Any) -> Jobs:
    return {name: partial(step, side, *args) for name, side in pair.items()}


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


def benchmark_compressor(model, base, ids_BT: Tensor, repeats: int) -> Figures:
    """Figures of (B, T) windows, compressed and decompressed all at once, beside the base that
    reads the same tokens (one plain forward with the logits of every token) and writes about as
    many."""
    config, rows, tokens = model.config, len(ids_BT), ids_BT.numel()
    concepts = model.compress(ids_BT)
    written = sum(map(len, model.decompress(concepts)))
    steps = max(1, math.ceil(written / rows))
    forward = torch.no_grad()(partial(base, input_ids=ids_BT, use_cache=False))
    reading = {
        "compress": partial(model.compress, ids_BT),
        "forward": forward,
        "states": partial(forward, logits_to_keep=1),
    }
    writing = {
        "decompress": partial(model.decompress, concepts),
        "greedy": partial(greedy, base, model.bos, rows, steps),
    }
    seconds = alternate(reading, repeats, ids_BT.device)
    seconds |= alternate(writing, repeats, ids_BT.device)
    timed = {job: summary(rounds) | {"rounds": rounds} for job, rounds in seconds.items()}

    def side(model: nn.Module, read: str, write: str, written: int) -> Figures:
        return {
            "read_tokens_per_s": tokens / timed[read]["median"],
            "write_tokens_per_s": written / timed[write]["median"],
            "tokens_written": written,
            "weight_bytes": weight_bytes(model),
            "read_seconds": timed[read],
            "write_seconds": timed[write],
        }

    forwards, forwards_range = ratio_of(seconds, "compress", "forward")
    speedup, speedup_range = ratio_of(seconds, "greedy", "decompress")
    share = written / (rows * steps)  # of the base's tokens
    cost = coding_cost(concepts, tokens, config)
    plain = side(base, "forward", "greedy", rows * steps)
    return {
        "compress_base_forwards": forwards,
        "compress_base_forwards_range": forwards_range,
        "compress_base_forwards_no_logits": ratio_of(seconds, "compress", "states")[0],
        "decompress_speedup": share * speedup,
        "decompress_speedup_range": [share * end for end in speedup_range],
        "beams": config.beams,
        "realised_rate": cost["concept_rate"],
        **{key: cost[key] for key in ("ids_per_token", "compression_ratio")},
        "concept": side(model, "compress", "decompress", written),
        "base": plain | {"states_seconds": timed["states"]},
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
    base = subject.load_base()
    figures: Figures = {"concept": {}, "base": {}}
    if model.config.base is not None:
        # The gate follows what it sees in training: it is put back afterwards.
        gate = copy.deepcopy(model.writer.gate.state_dict())
        figures = benchmark_training(model, _control_of(subject), ids_BT, options.repeats)
        model.writer.gate.load_state_dict(gate)
        model.merged()
    use = benchmark_online(model.eval(), base, ids_BT, new_tokens, options.repeats)
    sides = {name: use[name] | figures[name] for name in ("concept", "base")}
    return figures | use | sides | about


def _control_of(subject: Subject) -> ControlForCausalLM:
    """An untrained control over the same base with the same LoRA."""
    model = subject.model
    keys = ("base", "lora_rank", "lora_alpha", "lora_dropout")
    config = ControlConfig(**{key: getattr(model.config, key) for key in keys})
    folder = resolve(subject.base_name)
    return ControlForCausalLM.from_base(config, model.dtype, folder=folder).to(model.device)


def benchmark_saved_compressor(subject: Subject, window: int | None, data: str | None) -> Figures:
    """`benchmark_compressor` of a saved compressor beside its base."""
    length, options = subject.block_length(window), subject.options
    ids_BT = subject.prompts(data, length, options.batch or 16)
    figures = benchmark_compressor(subject.model, subject.load_base(), ids_BT, options.repeats)
    return figures | _about(subject, ids_BT, data, window=length)
