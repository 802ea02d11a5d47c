"""Tiny random bases of several families, online models over them, and what a cache is held to."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from sememe.models import CompressorConfig, CompressorForCausalLM, OnlineConfig, OnlineForCausalLM

COMMON = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.2,
}
ONLINE = {"split": (1, 2, 1), "rate": 0.4, "max_tail": 5, "num_concepts": 16, "lora_rank": 4}
# A window of 6 places is shorter than every text in the tests, so a wrong window mask cannot hide.
FAMILIES = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "mistral": {"sliding_window": 6},
    "olmo2": {},
    "gemma3_text": {
        "sliding_window": 6,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "smollm3": {},
    "phi3": {"pad_token_id": 0},
}


def tiny_base(family: str = "llama", seed: int = 0, attention: str = "sdpa", **changes):
    torch.manual_seed(seed)
    config = AutoConfig.for_model(family, **{**COMMON, **FAMILIES[family], **changes})
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()


def tiny_online(
    family: str = "llama", seed: int = 0, attention: str = "sdpa", tied: bool = False, **changes
) -> OnlineForCausalLM:
    """An online model over a tiny base, with LoRA, codes and gate off their starting points so that
    nothing is 0."""
    base = tiny_base(family, seed, attention, tie_word_embeddings=tied)
    config = OnlineConfig(text_config=base.config, **{**ONLINE, "base": "tiny", **changes})
    config._attn_implementation = attention
    model = OnlineForCausalLM(config, base)
    generator = torch.Generator().manual_seed(seed + 1)
    move(model, generator)
    model.writer.gate.feedback = 0.1  # lets rows differ in their number of concepts
    blocks = torch.randint(3, 97, (16, 24), generator=generator)
    model.start_frame(blocks)
    model.start_codes(blocks)
    return model.eval()


def online_over(folder, ids_NT: torch.Tensor, **changes) -> OnlineForCausalLM:
    """The same over a saved base, its codes and gate started from `ids_NT`."""
    torch.manual_seed(0)
    config = OnlineConfig(base=str(folder), **{**ONLINE, **changes})
    model = OnlineForCausalLM.from_base(config)
    move(model, torch.Generator().manual_seed(0))
    model.start_frame(ids_NT)
    model.start_codes(ids_NT)
    return model.eval()


def compressor_over(folder, ids_NT: torch.Tensor, **changes) -> CompressorForCausalLM:
    """A compressor over a saved base, its codes and gate started from `ids_NT`. Its segments end at
    different lengths."""
    torch.manual_seed(0)
    settings = {
        "rate": 0.5,
        "max_tail": 3,
        "num_concepts": 16,
        "boundary": "null",
        "head": "nearest",
        "lora_rank": 4,
    }
    model = CompressorForCausalLM.from_base(
        CompressorConfig(base=str(folder), **{**settings, **changes})
    )
    generator = torch.Generator().manual_seed(0)
    move(model, generator)
    model.start_frame(ids_NT)
    model.start_codes(ids_NT)
    place = model.decompressor.place.weight
    place.data.copy_(0.1 * torch.randn(place.shape, generator=generator))
    return model.eval()


@torch.no_grad()
def move(model: OnlineForCausalLM, generator: torch.Generator) -> None:
    """What starts at 0 away from there, or it would hide faults."""
    for name, p in model.named_parameters():
        if "lora_B" in name or name.endswith("head.linear"):
            p.copy_(0.05 * torch.randn(p.shape, generator=generator))


def text(batch: int = 2, length: int = 20, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 97, (batch, length), generator=torch.Generator().manual_seed(seed))


def left_padded(rows: list[torch.Tensor], pad: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """(1, n) rows of any lengths → (B, T) ids with `pad` on the left, and the mask that hides
    it."""
    longest = max(row.shape[1] for row in rows)
    ids, mask = (
        [torch.nn.functional.pad(row, (longest - row.shape[1], 0), value=value) for row in kind]
        for kind, value in ((rows, pad), ([torch.ones_like(row) for row in rows], 0))
    )
    return torch.cat(ids), torch.cat(mask)


def positions(mask: torch.Tensor) -> torch.Tensor:
    """Places in the text, counted from the first real token."""
    return (mask.cumsum(1) - 1).clamp(min=0)


def stepwise(model, ids, ends, mask=None):
    """Logits and concept ids of a cached forward over chunks that end there, and the cache."""
    cache, outs, start = model.new_cache(len(ids)), [], 0
    for end in ends:
        part = None if mask is None else mask[:, :end]
        outs.append(model(ids[:, start:end], attention_mask=part, cache=cache))
        start = end
    logits, written = ([getattr(out, name) for out in outs] for name in ("logits", "concept_ids"))
    return torch.cat(logits, 1), torch.cat(written, 1), cache


def uncached_greedy(model, ids: torch.Tensor, steps: int = 12) -> torch.Tensor:
    """One full forward per token: no cache to be wrong."""
    for _ in range(steps):
        logits = model(ids).logits[:, -1]
        logits[:, model.generation_config.eos_token_id] = -torch.inf
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
    return ids
