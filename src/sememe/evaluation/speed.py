"""Speed, cache and memory beside the unmodified base: same process, dtype and kernel, alternating,
medians (RUN/benchmark.json)."""

import copy
import math
import time
from collections.abc import Callable, Collection
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BatchEncoding
from transformers.cache_utils import Cache

from sememe.backbone.calling import CACHE, cache_argument
from sememe.concepts.proposals import OFFSETS, RANK, WORDS
from sememe.evaluation.reconstruction import coding_cost
from sememe.evaluation.results import Figures, of_rounds
from sememe.evaluation.subject import Options, Subject
from sememe.models.configuration import ControlConfig
from sememe.models.control import ControlForCausalLM
from sememe.models.loading import check_length, longest_text
from sememe.progress import bar

ROWS = 4  # of the ragged batch that is timed beside a single prompt


def clock() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def alternate(jobs: Collection[Callable[[], Any]], repeats: int) -> list[Figures]:
    """Seconds of each job over `repeats` rounds in which they take turns: what slows the machine
    slows all of them."""
    rounds = []
    for _ in bar(iterable=range(repeats + 1), desc="benchmark", unit="round"):
        times = [clock()]
        for job in jobs:
            job()
            times.append(clock())
        rounds.append([end - start for start, end in pairwise(times)])
    # The first one warms up.
    return [of_rounds(seconds) for seconds in zip(*rounds[1:], strict=True)]


def throughput(what: str, tokens: int, seconds: Figures) -> Figures:
    return {f"{what}_tokens_per_s": tokens / seconds["median"], f"{what}_seconds": seconds}


def ratio(sides: Figures, key: str) -> float | None:
    """Concept / base; None where it was not measured."""
    concept, base = sides["concept"][key], sides["base"][key]
    return None if concept is None else concept / base


def weight_bytes(model: nn.Module) -> int:
    """Bytes of parameters and buffers, shared ones once."""
    return sum(x.nbytes for x in [*model.parameters(), *model.buffers()])


def peak_bytes(model: nn.Module, job: Callable[[], Any]) -> int | None:
    """The peak of GPU memory of a job: the model's weights, and what is taken beside them. None on
    a CPU, where nobody can tell."""
    if not torch.cuda.is_available():
        return None
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    job()
    return weight_bytes(model) + torch.cuda.max_memory_allocated() - before


def race(
    what: str, job: Callable[[Any], Any], pair: Figures, tokens: int, repeats: int
) -> dict[str, Figures]:
    """Throughput of a job that takes a model, and its peak of memory, on each side of a pair."""
    jobs = {name: partial(job, side) for name, side in pair.items()}
    seconds = alternate(jobs.values(), repeats)
    return {
        name: throughput(what, tokens, times)
        | {f"{what}_peak_bytes": peak_bytes(pair[name], jobs[name])}
        for name, times in zip(pair, seconds, strict=True)
    }


def ceiling_decode(base: nn.Module, config, rate: float | None) -> float:
    """Decode speed-up that the layer arithmetic allows at a realised rate, None of a baseline, in
    multiply-accumulates per token of the weights; attention and overheads left out."""
    layers, lm_head = base.get_decoder().layers, base.lm_head.weight.numel()
    macs = sum(p.numel() for p in layers.parameters())
    own = 0
    if rate is not None:
        width = config.text_config.hidden_size
        # A joint head scores all codes at every token: its first stage is the gate too.
        lookups = config.codes_per_concept * rate + (1 - rate) * (config.head == "joint")
        own = config.num_concepts * width * lookups
        if config.boundary == "entropy":
            own += OFFSETS * RANK * (2 * width + WORDS)
    return (macs + lm_head) / (config.layer_share(rate) * macs + lm_head + own)


def cache_bytes(cache: Cache) -> int:
    """Bytes of all keys and values, the base's or our own."""
    if hasattr(cache, "bytes"):
        return cache.bytes()
    # Layers that share the keys of others have none.
    entries = (x for layer in cache.layers for x in (layer.keys, layer.values))
    return sum(x.nbytes for x in entries if x is not None)


@torch.no_grad()
def benchmark_online(model, base, prompts: BatchEncoding, options: Options) -> Figures:
    """Prefill, greedy decoding, cache and memory of a (merged) online model, or a baseline, beside
    its base. `prompts`: (B, T) `input_ids` and their `attention_mask`."""
    real_BT, new_tokens = prompts["attention_mask"], options.new_tokens
    pair = {"concept": model, "base": base}

    def prefill(side) -> None:
        side(**prompts, use_cache=True, logits_to_keep=1)

    def generate(name: str) -> None:
        caches[name] = pair[name].generate(
            **prompts,
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=0,
            return_dict_in_generate=True,
        )[CACHE]

    sides = race("prefill", prefill, pair, int(real_BT.sum()), options.repeats)
    caches = {}
    seconds = alternate([partial(generate, name) for name in pair], options.repeats)
    for (name, figures), times in zip(sides.items(), seconds, strict=True):
        # A difference, which noise can drown.
        decoding = max(times["median"] - figures["prefill_seconds"]["median"], 1e-9)
        figures |= {
            "decode_tokens_per_s": len(real_BT) * (new_tokens - 1) / decoding,
            "generate_seconds": times,
            "cache_bytes": cache_bytes(caches[name]),
            "weight_bytes": weight_bytes(pair[name]),
        }
    cache, rate = caches["concept"], None
    if hasattr(cache, "concepts"):
        rate = int(cache.concepts.sum()) / int(cache.tokens.sum())
    return sides | {
        "prefill_speedup": ratio(sides, "prefill_tokens_per_s"),
        "decode_speedup": ratio(sides, "decode_tokens_per_s"),
        "cache_reduction": 1 / ratio(sides, "cache_bytes"),
        "prefill_memory_ratio": ratio(sides, "prefill_peak_bytes"),
        "ceiling_decode_speedup": ceiling_decode(base, model.config, rate),
        "realised_rate": rate,
    }


def benchmark_training(subject: Subject, ids_BT: Tensor) -> Figures:
    """Forward and backward of an online model against the same base with the same LoRA and no
    concepts: time and memory. The optimizer's share is the same for both. Leaves the model as it
    was."""
    model = subject.model
    keys = ("base", "base_bits", "lora_rank", "lora_alpha", "lora_dropout")
    config = ControlConfig(**{key: getattr(model.config, key) for key in keys})
    control = ControlForCausalLM.from_base(config, model.dtype).to(model.device)

    def step(side: nn.Module) -> None:
        side(input_ids=ids_BT, labels=ids_BT, use_cache=False).loss.backward()
        side.zero_grad()

    pair = {"concept": model.train(), "base": control.train()}
    gate = copy.deepcopy(model.writer.gate.state_dict())  # which follows what it sees in training
    sides = race("train", step, pair, ids_BT.numel(), subject.options.repeats)
    model.writer.gate.load_state_dict(gate)
    model.eval()
    return sides | {
        "train_step_ratio": 1 / ratio(sides, "train_tokens_per_s"),
        "train_memory_ratio": ratio(sides, "train_peak_bytes"),
    }


def about(subject: Subject, data: str | None, **settings: int) -> Figures:
    """What stands beside the figures of a benchmark."""
    options = subject.options
    settings |= {
        "repeats": options.repeats,
        "dtype": options.dtype,
        "attention": "sdpa",
        "threads": torch.get_num_threads(),
        "device": str(subject.model.device),
        "prompts": "text" if data or subject.recipe else "random tokens",
    }
    if hasattr(subject.model, "dial"):
        settings["target_rate"] = subject.model.dial.rate
    return {"base_name": subject.base_name, "settings": settings}


def benchmark_saved_online(subject: Subject, length: int | None, data: str | None) -> Figures:
    """All figures of a saved online model or baseline that was not merged yet, with a batch of
    prompts of the size that the options ask for; or of one prompt, and the decoding of a ragged
    batch beside it."""
    model, options = subject.model, subject.options
    length, batch, new_tokens = length or 512, options.batch or 1, options.new_tokens
    check_length(longest_text(model.config), length, "--prompt-tokens ", new_tokens)
    settings = about(subject, data, prompt_tokens=length, new_tokens=new_tokens, batch=batch)
    base, prompts = subject.load_base(), subject.prompts(data, length, batch)
    trained = {"concept": {}, "base": {}}
    if model.config.base is not None:
        if model.config.writes_concepts:
            trained = benchmark_training(subject, prompts["input_ids"])
        model.merged()
    used = benchmark_online(model, base, prompts, options)
    for name in ("concept", "base"):
        used[name] |= trained.pop(name)
    if options.batch is None:
        ragged = benchmark_online(model, base, subject.prompts(data, length, ROWS), options)
        used["ragged_decode_speedup"] = ragged["decode_speedup"]
    return trained | used | settings


@torch.no_grad()
def greedy(base, token_B1: Tensor, steps: int) -> Tensor:
    """The last of `steps` tokens that the base writes after another: its own cached decoding in a
    bare loop, as the decompressor's is."""
    cache = None
    for _ in range(steps):
        out = base(input_ids=token_B1, use_cache=True, **cache_argument(base, cache))
        token_B1, cache = out.logits[:, -1:].argmax(-1), out[CACHE]
    return token_B1


def benchmark_compressor(subject: Subject, length: int | None, data: str | None) -> Figures:
    """Windows of `length` tokens, compressed and decompressed all at once, beside the base that
    reads the same tokens (one plain forward with the logits of every token) and writes about as
    many."""
    subject.refuse("sweep", "an online model, whose rows write at different steps")
    model, base, options = subject.model, subject.load_base(), subject.options
    length = length or subject.block_length
    check_length(longest_text(model.config), length, "--prompt-tokens ")
    ids_BT = subject.prompts(data, length, options.batch or 16)["input_ids"]
    config, rows, tokens = model.config, len(ids_BT), ids_BT.numel()
    concepts = model.compress(ids_BT)
    written = sum(map(len, model.decompress(concepts)))
    steps = max(1, math.ceil(written / rows))
    jobs = (
        partial(model.compress, ids_BT),
        partial(model.decompress, concepts),
        torch.no_grad()(partial(base, input_ids=ids_BT, use_cache=False)),
        partial(greedy, base, torch.full_like(ids_BT[:, :1], model.bos), steps),
    )
    compress, decompress, forward, write = alternate(jobs, options.repeats)

    def side(model: nn.Module, reading: Figures, writing: Figures, written: int) -> Figures:
        speeds = throughput("read", tokens, reading) | throughput("write", written, writing)
        return speeds | {"tokens_written": written, "weight_bytes": weight_bytes(model)}

    sides = {
        "concept": side(model, compress, decompress, written),
        "base": side(base, forward, write, rows * steps),
    }
    cost = coding_cost(concepts, tokens, config)
    return {
        **about(subject, data, window=length, batch=rows),
        **sides,
        **cost,
        "compress_base_forwards": 1 / ratio(sides, "read_tokens_per_s"),
        "decompress_speedup": ratio(sides, "write_tokens_per_s"),
        "beams": config.beams,
        "realised_rate": cost["concept_rate"],
    }
