"""Tiny random bases of several families, online models over them, and what a cache is held to."""

import pytest
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoConfig, AutoModelForCausalLM

from sememe.models import CompressorConfig, CompressorForCausalLM, OnlineConfig, OnlineForCausalLM

COMMON = {"vocab_size": 97, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
COMMON |= {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "head_dim": 32}
COMMON |= {"num_attention_heads": 2, "num_key_value_heads": 1}
COMMON |= {"max_position_embeddings": 256, "initializer_range": 0.2}
ONLINE = {"split": (1, 2, 1), "rate": 0.4, "max_tail": 5, "num_concepts": 16, "lora_rank": 4}
COMPRESSOR = {"rate": 0.5, "max_tail": 3, "num_concepts": 16, "lora_rank": 4}
# A window of 6 places is shorter than every text in the tests, so a wrong window mask cannot hide.
WINDOW = {"sliding_window": 6}
FAMILIES = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "mistral": WINDOW,
    "olmo2": {},
    "gemma3_text": WINDOW | {"layer_types": ["sliding_attention", "full_attention"] * 2},
    "smollm3": {},
    "phi3": {},
}


def tiny_base(family: str = "llama", seed: int = 0, attention: str = "sdpa", **changes):
    torch.manual_seed(seed)
    config = AutoConfig.for_model(family, **{**COMMON, **FAMILIES[family], **changes})
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()


def tiny_online(
    family: str = "llama", seed: int = 0, attention: str = "sdpa", tied: bool = False, **changes
) -> OnlineForCausalLM:
    base = tiny_base(family, seed, attention, tie_word_embeddings=tied)
    config = OnlineConfig(text_config=base.config, **{**ONLINE, "base": "tiny", **changes})
    config._attn_implementation = attention
    model = OnlineForCausalLM(config, base)
    model.writer.gate.feedback = 0.1  # lets rows differ in their number of concepts
    generator = torch.Generator().manual_seed(seed + 1)
    move(model, generator)
    return started(model, torch.randint(3, 97, (16, 24), generator=generator))


def online_over(folder, ids_NT: torch.Tensor, **changes) -> OnlineForCausalLM:
    """The same over a saved base, its codes and gate started from `ids_NT`."""
    torch.manual_seed(0)
    config = OnlineConfig(base=str(folder), **{**ONLINE, **changes})
    model = OnlineForCausalLM.from_base(config)
    move(model, torch.Generator().manual_seed(0))
    return started(model, ids_NT)


def compressor_over(folder, ids_NT: torch.Tensor, **changes) -> CompressorForCausalLM:
    """A compressor over a saved base, in the same way. Its segments end at different lengths."""
    torch.manual_seed(0)
    settings = {**COMPRESSOR, "boundary": "null", "head": "nearest", **changes}
    model = CompressorForCausalLM.from_base(CompressorConfig(base=str(folder), **settings))
    generator = torch.Generator().manual_seed(0)
    move(model, generator)
    started(model, ids_NT)
    place = model.decompressor.place.weight
    place.data.copy_(0.1 * torch.randn(place.shape, generator=generator))
    return model


@torch.no_grad()
def move(model: OnlineForCausalLM, generator: torch.Generator) -> None:
    """What starts at 0 away from there, or it would hide faults."""
    for name, p in model.named_parameters():
        if "lora_B" in name or name.endswith("head.linear"):
            p.copy_(0.05 * torch.randn(p.shape, generator=generator))


def started(model, ids_NT: torch.Tensor):
    model.start_frame(ids_NT)
    model.start_codes(ids_NT)
    return model.eval()


def text(batch: int = 2, length: int = 20, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 97, (batch, length), generator=torch.Generator().manual_seed(seed))


def left_padded(rows: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """(1, n) rows of any lengths → (B, T) ids with 0 on the left, and the mask that hides it."""
    rows = [row[0] for row in rows]
    kinds = rows, [torch.ones_like(row) for row in rows]
    return tuple(pad_sequence(kind, True, padding_side="left") for kind in kinds)


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


def refused(call, said: str) -> None:
    """It raises ValueError with one sentence that matches and says what to try."""
    with pytest.raises(ValueError, match=said) as error:
        call()
    assert "try: " in str(error.value) and "\n" not in str(error.value)
