"""A recipe → memory, work, time and cost of training it and of serving what it makes.

Of training: every operation of one step, recorded on fake tensors (`recording.py`), takes as long
as its products or its memory traffic at the hardware's figures. Of serving: bytes that a step of
decoding reads, and products that it makes. Weights are never loaded."""

import math
from typing import Any

import torch

from sememe.backbone.bases import read_config, resolve
from sememe.backbone.bits import pack
from sememe.backbone.calling import set_checkpointing
from sememe.backbone.exact import narrow
from sememe.errors import RecipeError
from sememe.keys import Recipe
from sememe.models import MODELS
from sememe.scaling.hardware import Hardware
from sememe.scaling.recording import Recorder, record
from sememe.scaling.steps import online_loss, plain_loss
from sememe.systems import SYSTEMS
from sememe.training.run import precision

SYSTEMS_KNOWN = ("online", "control", "skip", "window")
LOSSES = {"online": online_loss}
ADAM = 8  # bytes of its two fp32 moments of a weight
USED = 0.9  # of a GPU's memory; the rest is its context and what the allocator cannot use


def build(recipe: Recipe, base, bf16: bool = False):
    """The recipe's model over a base of that configuration, on the present device, as it is trained
    in bf16 or fp32."""
    config = SYSTEMS[recipe.system].config(recipe, base.num_hidden_layers)
    config.adopt(base)
    config._attn_implementation = "sdpa"
    model = MODELS[recipe.system](config)
    if recipe.gradient_checkpointing:
        set_checkpointing(model)
    if bf16:
        narrow(model.backbone)
    return model


def estimate(
    recipe: Recipe, gpu: str, gpus: int, tokens: float, hourly: float | None, context: int
) -> dict[str, Any]:
    """All figures, as JSON. `tokens`: to train on. `hourly`: of one GPU for an hour. `context`:
    tokens of a text that is served.

    Raises RecipeError for a system whose steps are not running text of fixed shape."""
    if recipe.system not in SYSTEMS_KNOWN or recipe.on_pairs:
        raise RecipeError(
            f"system = {recipe.system}{' on pairs' * recipe.on_pairs}: need one of "
            f"{', '.join(SYSTEMS_KNOWN)} on running text, whose steps have one shape. try: "
            "system=online"
        )
    SYSTEMS[recipe.system].check(recipe, gpus)
    folder = resolve(recipe.base, weights=False)
    base = read_config(folder, weights=False).get_text_config()
    hardware = Hardware.of(gpu)
    bf16 = precision(recipe) == "bf16" if gpu == "cpu" else recipe.precision != "fp32"
    rows = recipe.batch_size // gpus // recipe.gradient_accumulation
    shape = rows, recipe.sequence_length
    loss = LOSSES.get(recipe.system, plain_loss)
    models = []
    with torch.device("meta"):
        plain = build(recipe, base)  # packed weights would be too few numbers
    counts = parameters(plain)

    def keep():
        models[:] = [build(recipe, base, bf16)]
        pack(models[0].backbone, recipe.base_bits)
        return models[0]

    recorder = record(keep, loss, shape, bf16)
    weights = sum(p.nbytes for p in models[0].parameters())
    held = memory(recorder, counts, weights, hardware, gpus)
    work = step(recipe, recorder, counts, weights, hardware, gpus)
    if not held["fits"]:
        work["seconds"] = work["seconds_sharded"]
    return {
        "recipe": {"system": recipe.system, "base": recipe.base, "gpu": gpu, "gpus": gpus},
        "hardware": vars(hardware),
        "parameters": counts,
        "memory": held,
        "step": work,
        "training": training(work, tokens, gpus, hourly),
        "serving": serving(plain, counts, hardware, context, 4 if gpu == "cpu" else 2),
    }


def parameters(model) -> dict[str, int]:
    """How many numbers the base, LoRA and the new modules have."""
    counts = {"base": 0, "lora": 0, "new": 0}
    for name, p in model.named_parameters():
        kind = "lora" if "lora_" in name else "base" if name.startswith("backbone.") else "new"
        counts[kind] += p.numel()
    return counts


def memory(
    recorder: Recorder, counts: dict[str, int], weights: int, hardware: Hardware, gpus: int
) -> dict:
    """Bytes on each GPU in training: the `weights`, two moments and the gradients of what is
    trained, and what lives at the worst moment of a step."""
    trained = counts["lora"] + counts["new"]
    adam = ADAM * trained
    peak = recorder.peak + adam
    # A layer of shards that is whole for the moment is taken to fit into what is left.
    sharded = peak - (weights - weights / gpus)
    return {
        "weights": weights,
        "adam": adam,
        "step": recorder.peak - weights,
        "peak": peak,
        "peak_sharded": round(sharded),
        "fits": peak <= USED * hardware.memory,
        "fits_sharded": sharded <= USED * hardware.memory,
        "checkpoint": 4 * trained + adam,
    }


def step(
    recipe: Recipe,
    recorder: Recorder,
    counts: dict[str, int],
    weights: int,
    hardware: Hardware,
    gpus: int,
) -> dict[str, Any]:
    """One optimizer step of all GPUs. `seconds_at_best`: nothing is lost; `seconds`: products run
    at the share of the peak that large runs reach, of a CPU, which is measured, at all of it."""
    parts = recipe.gradient_accumulation
    operations = recorder.operations
    flops = sum(x.flops for x in operations) * parts
    trained = 4 * (counts["lora"] + counts["new"])
    # Weight, gradient and moments are read, all but the gradient written.
    adam = 7 * trained / hardware.bandwidth
    best = hardware.seconds(operations) * parts + adam
    usual = sum(x.flops / (hardware.bf16 if x.width == 2 else hardware.fp32) for x in operations)
    compute = max(best, usual * parts / hardware.reached)
    around = 2 * (gpus - 1) / gpus / hardware.exchange(gpus)  # of a ring: each byte, there and back
    reduced = trained * around
    # Sharded weights come twice: forward and backward.
    gathered = around * weights * parts
    tokens = recipe.batch_size * recipe.sequence_length
    return {
        "tokens": tokens,
        "flops": flops,
        "bytes": sum(x.bytes for x in operations) * parts,
        "operations": len(operations) * parts,
        "seconds_at_best": best,
        "seconds": compute + reduced,
        "seconds_reducing": reduced,
        "seconds_gathering": gathered,
        "seconds_sharded": max(compute, gathered) + reduced,
    }


def training(work: dict, tokens: float, gpus: int, hourly: float | None) -> dict[str, Any]:
    """All steps of a run. `cost` in the price's currency, None without a price."""
    hours = tokens / work["tokens"] * work["seconds"] / 3600
    return {
        "tokens": tokens,
        "steps": math.ceil(tokens / work["tokens"]),
        "tokens_per_s": work["tokens"] / work["seconds"],
        "hours": hours,
        "gpu_hours": hours * gpus,
        "cost": None if hourly is None else hours * gpus * hourly,
    }


def serving(
    model, counts: dict[str, int], hardware: Hardware, context: int, width: int
) -> dict[str, Any]:
    """One GPU that decodes as many rows as fit at texts of `context` tokens, rows out of phase; and
    the base beside it. `width`: bytes of a number; a shallow slice of 16 bits stays in 32."""
    config, base = model.config, model.config.text_config
    query, key = config.attention_widths()
    layers = model.backbone.get_decoder().layers
    layer = sum(p.numel() for n, p in layers.named_parameters() if "lora_" not in n) / len(layers)
    head = base.vocab_size * base.hidden_size
    own = [(n, round(keys), share) for n, keys, share in config.slices(context)]
    sides = {"own": own, "base": [(base.num_hidden_layers, context, 1)]}
    figures = {}
    for name, parts in sides.items():
        concepts = name == "own" and config.writes_concepts
        widths = [4, width, width] if concepts else [width]
        cache = sum(n * s * 2 * key * w for (n, s, _), w in zip(parts, widths, strict=True))
        weights = sum(n * layer * w for (n, *_), w in zip(parts, widths, strict=True))
        weights += width * (counts["new"] * concepts + head * (2 - base.tie_word_embeddings))
        rows = max(0, math.floor((USED * hardware.memory - weights) / cache))
        read = width * head
        flops = 2.0 * rows * head
        for (n, s, share), w in zip(parts, widths, strict=True):
            # A slice is read where any of the rows writes.
            read += n * (layer * w * (1 - (1 - share) ** rows) + rows * share * s * 2 * key * w)
            flops += n * rows * share * (2 * layer + 4 * s * query)
        peak = hardware.bf16 if width == 2 else hardware.fp32
        seconds = max(read / hardware.bandwidth, flops / peak)
        figures |= {
            f"{name}_weights": weights,
            f"{name}_cache_per_row": cache,
            f"{name}_cache_per_token": cache / context,
            f"{name}_rows": rows,
            f"{name}_tokens_per_s": rows / seconds if rows else 0.0,
        }
    return {"context": context} | figures
