"""Speed, cache and memory beside the unmodified base: same process, dtype and kernel, alternating,
medians."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from sememe.backbone.adapters import linear_names
from sememe.backbone.calling import CACHE
from sememe.errors import CheckpointError
from sememe.evaluation.partial import Partial
from sememe.models.online import OnlineConfig, OnlineForCausalLM


def weight_bytes(model: nn.Module) -> int:
    """Bytes of parameters and buffers, shared ones once."""
    return sum(x.nbytes for x in [*model.parameters(), *model.buffers()])


def clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def in_turn(
    jobs: dict[str, Callable[[], Any]],
    repeats: int,
    device: torch.device,
    tick=lambda: None,
    partial: Partial | None = None,
    seconds: float | None = None,
    prefix: str = "",
) -> dict[str, list[float]]:
    """Seconds of each job in each of `repeats` rounds, in turn, after one round not counted.

    Rounds that `partial` holds are not run again. Where `seconds` run out, the rounds that there
    was time for, at least one."""
    partial, found = partial or Partial(), {name: [] for name in jobs}

    def timed(job: Callable[[], Any]) -> float:
        start = clock(device)
        job()
        return clock(device) - start

    spent, warm = 0.0, False
    for turn in range(repeats):
        keys = {name: f"{prefix}{name} {turn}" for name in jobs}
        if not warm and not all(map(partial.holds, keys.values())):
            warm, partial.reused = True, False
            for job in jobs.values():
                spent += timed(job)
                tick()
        if turn and seconds is not None and spent * (1 + 1 / (turn + warm)) > seconds:
            break
        for name, job in jobs.items():
            found[name].append(partial.part(keys[name], lambda job=job: timed(job)))
            spent += found[name][-1]
            tick()
    return found


def summary(seconds: list[float]) -> dict[str, float]:
    return {"median": statistics.median(seconds), "min": min(seconds), "max": max(seconds)}


def alternate(
    jobs: dict[str, Callable[[], Any]],
    repeats: int,
    device: torch.device,
    tick=lambda: None,
    partial: Partial | None = None,
    seconds: float | None = None,
    prefix: str = "",
) -> dict[str, dict]:
    """Seconds of each job over the rounds of `in_turn`: median, minimum and maximum."""
    return {
        name: summary(found)
        for name, found in in_turn(jobs, repeats, device, tick, partial, seconds, prefix).items()
    }


def layer_macs(base: nn.Module) -> tuple[int, int]:
    """Multiply-accumulates per token of one decoder layer's linears (mean over layers), and of the
    lm_head."""
    decoder = base.get_decoder()
    names = set(linear_names(decoder))
    total = sum(
        m.weight.numel()
        for n, m in decoder.layers.named_modules()
        if n.rsplit(".", 1)[-1] in names and isinstance(m, nn.Linear)
    )
    return total // len(decoder.layers), base.lm_head.weight.numel()


def ceiling_decode(base: nn.Module, config: OnlineConfig, rate: float) -> float:
    """Decode speed-up that the layer arithmetic allows at a realised rate; attention and overheads
    left out."""
    layer, head = layer_macs(base)
    shallow, middle, deep = config.split
    at = config.codes_per_concept * rate + (
        1.0 - rate if config.head == "joint" else 0.0
    )  # its first stage is the score too
    codes = config.num_concepts * config.text_config.hidden_size * at
    bridge = 2 * config.text_config.hidden_size**2 if config.bridge else 0
    layers = shallow + middle * rate + deep
    return (sum(config.split) * layer + head) / (layers * layer + head + codes + bridge)


@torch.no_grad()
def prefill(model, ids_BT: Tensor):
    return model(input_ids=ids_BT, use_cache=True, logits_to_keep=1)


def generate(model, ids_BT: Tensor, new_tokens: int, cache):
    return model.generate(
        ids_BT,
        attention_mask=torch.ones_like(ids_BT),
        max_new_tokens=new_tokens,
        use_cache=True,
        min_new_tokens=new_tokens,
        do_sample=False,
        pad_token_id=0,
        **{CACHE: cache},
    )


def cache_bytes(cache) -> int:
    """Bytes of all keys and values, summed from the tensors."""
    if hasattr(cache, "bytes"):
        return cache.bytes()
    return sum(
        layer.keys.nbytes + layer.values.nbytes for layer in cache.layers if layer.keys is not None
    )


def throughput(
    fill: dict[str, float], whole: dict[str, float], batch: int, length: int, new_tokens: int
) -> dict[str, Any]:
    """Tokens per second of reading (B, T) prompts and of writing, from the seconds of prefill and
    of all of `generate`."""
    decoding = max(whole["median"] - fill["median"], 1e-9)  # see `unclear`
    return {
        "prefill_tokens_per_s": batch * length / max(fill["median"], 1e-9),
        "decode_tokens_per_s": batch * (new_tokens - 1) / decoding,
        "prefill_seconds": fill,
        "generate_seconds": whole,
    }


def unclear(*sides: dict[str, Any]) -> str | None:
    """Why figures of `throughput` are none: the seconds of writing, a difference, drowned in the
    noise."""
    if all(
        side["generate_seconds"]["median"] > side["prefill_seconds"]["median"] for side in sides
    ):
        return None
    return (
        "writing took no longer than reading the prompt: need longer timing, or a machine with "
        "less to do. "
        "try: --new-tokens 128 --repeats 7"
    )


def peaks(
    pair: dict[str, nn.Module], job: Callable[[Any], Any], device: torch.device
) -> dict[str, int | None]:
    """The peak of GPU memory of `job(side)` for each side, in bytes: its weights, and what is taken
    beside them. None on a CPU, where the process does not tell."""
    if device.type != "cuda":
        return dict.fromkeys(pair)
    peak_bytes = {}
    for name, model in pair.items():
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        job(model)
        peak_bytes[name] = weight_bytes(model) + torch.cuda.max_memory_allocated(device) - before
    return peak_bytes


def ratio(found: dict[str, int | None]) -> float | None:
    """Concept / base; None where nobody could tell."""
    return None if None in found.values() else found["concept"] / found["base"]


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


def benchmark_use(
    model,
    base,
    ids_BT: Tensor,
    new_tokens: int,
    repeats: int,
    tick=lambda: None,
    partial: Partial | None = None,
    seconds: float | None = None,
) -> dict[str, Any]:
    """Prefill, decode, cache and memory figures of a (merged) concept model beside its base.

    `partial`, `seconds`: see `in_turn`, the latter of reading and of writing each. Raises
    CheckpointError where `model` has no concepts, or a cache stays empty."""
    if not isinstance(model, OnlineForCausalLM):
        raise CheckpointError(
            "this model has no concepts: need a run of system: online. try: runs/demo"
        )
    batch, length = ids_BT.shape
    caches: dict[str, Any] = {}

    def decode(name: str, one) -> Callable[[], None]:
        def job():
            caches[name] = (
                one.new_cache(batch) if name == "concept" else DynamicCache(config=one.config)
            )
            generate(one, ids_BT, new_tokens, caches[name])

        return job

    pair = {"concept": model, "base": base}
    for one in pair.values():
        prefill(one, ids_BT[:, :2])  # reads weights that are in a file still

    def cached() -> dict[str, float]:
        for name, one in pair.items():
            if name not in caches:  # all rounds were run before a stop
                decode(name, one)()
        cache = caches["concept"]
        found = {name: cache_bytes(caches[name]) for name in pair} | {
            "read": int(cache.tokens.sum())
        }
        if empty := [name for name, amount in found.items() if not amount]:
            raise CheckpointError(
                f"the cache is empty after {ids_BT.shape[1] + new_tokens} tokens ({empty[0]}): "
                "need one that "
                "holds what was read. try: the newest release of transformers that pyproject.toml "
                "allows"
            )
        return found | {"concepts": int(cache.concepts.sum())}

    partial = partial or Partial()
    memory = partial.part(
        "prefill peaks", lambda: peaks(pair, lambda m: prefill(m, ids_BT), ids_BT.device)
    )
    fill = alternate(
        {n: lambda m=m: prefill(m, ids_BT) for n, m in pair.items()},
        repeats,
        ids_BT.device,
        tick,
        partial,
        seconds,
        "prefill ",
    )
    whole = alternate(
        {n: decode(n, m) for n, m in pair.items()},
        repeats,
        ids_BT.device,
        tick,
        partial,
        seconds,
        "generate ",
    )
    held = partial.part("cache", cached)
    rate = held["concepts"] / held["read"]
    result: dict[str, Any] = {}
    for name in pair:
        result[name] = throughput(fill[name], whole[name], batch, length, new_tokens)
        result[name] |= {
            "cache_bytes": held[name],
            "weight_bytes": weight_bytes(pair[name]),
            "prefill_peak_bytes": memory[name],
        }
    concept, plain = result["concept"], result["base"]
    return result | {
        "prefill_speedup": concept["prefill_tokens_per_s"] / plain["prefill_tokens_per_s"],
        "decode_speedup": concept["decode_tokens_per_s"] / plain["decode_tokens_per_s"],
        "cache_reduction": plain["cache_bytes"] / concept["cache_bytes"],
        "prefill_memory_ratio": ratio(memory),
        "ceiling_decode_speedup": ceiling_decode(base, model.config, rate),
        "realised_rate": rate,
    }


def benchmark_training(
    model,
    control,
    ids_BT: Tensor,
    repeats: int,
    tick=lambda: None,
    partial: Partial | None = None,
    limit: float | None = None,
) -> dict[str, Any]:
    """Training step of the concept model against the same base with the same LoRA and no concepts:
    time and memory. `partial`, `limit`: as `partial` and `seconds` of `in_turn`."""
    partial = partial or Partial()
    pair = {"concept": model.train(), "base": control.train()}
    seconds = alternate(
        {n: lambda m=m: train_step(m, ids_BT) for n, m in pair.items()},
        repeats,
        ids_BT.device,
        tick,
        partial,
        limit,
        "train ",
    )
    memory = partial.part(
        "train peaks", lambda: peaks(pair, lambda m: train_twice(m, ids_BT), ids_BT.device)
    )
    return {
        **{
            n: {
                "train_tokens_per_s": ids_BT.numel() / s["median"],
                "train_peak_bytes": memory[n],
                "train_seconds": s,
            }
            for n, s in seconds.items()
        },
        "train_step_ratio": seconds["concept"]["median"] / seconds["base"]["median"],
        "train_memory_ratio": ratio(memory),
    }
