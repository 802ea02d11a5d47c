"""What being online costs: the same tokens behind the same context, from a compressor's codes and
by an online model."""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sememe.concepts.writer import NULL
from sememe.errors import CheckpointError
from sememe.evaluation.dial import rate_error
from sememe.models.compressor import CompressorForCausalLM
from sememe.models.configuration import ConceptConfig, OnlineConfig
from sememe.models.loading import load_model, model_folder, read_config
from sememe.models.online import OnlineForCausalLM

BESIDE = (
    ("base", "whole context"),
    ("model", "its codes"),
    ("base", "nothing"),
)  # lines of `continuation`


def load_online(
    name: str, model: str, compressor: CompressorForCausalLM, tokenizer, base: str | None = None
) -> OnlineForCausalLM:
    """The online model that `model`, a loaded compressor, is compared with.

    Raises:
        CheckpointError: no online model that writes codes, one over another base or with another
            tokenizer, or one that cannot run at the compressor's rate."""
    folder = model_folder(name)
    config = read_config(folder) if folder is not None else None
    if not isinstance(config, OnlineConfig) or config.quantise < 1:
        raise CheckpointError(
            f"--online {name} is no online model that writes codes: need a finished run of system: "
            "online. "
            "try: sememe train RECIPE system=online"
        )
    own = compressor.config.base_sha256
    if config.base_sha256 is None or config.base_sha256 != own:
        found = (
            "names none" if config.base_sha256 is None else f"has sha256 {config.base_sha256[:12]}…"
        )
        raise CheckpointError(
            f"the base of --online {name} {found}, that of {model} has {(own or 'none')[:12]}…: "
            "need the same "
            f"base for both. try: an online model over {compressor.config.base}, not merged"
        )
    least, rate = least_rate(config), compressor.dial.rate
    if rate < least - 1e-9:
        raise CheckpointError(
            f"{model} writes {rate:g} concepts per token, --online {name} at least {least:.3g} "
            "(max_tail = "
            f"{config.max_tail}): need both at one rate. try: an online model with a longer "
            "max_tail"
        )
    online, other = load_model(name, base=base)
    if other.get_vocab() != tokenizer.get_vocab():
        raise CheckpointError(
            f"--online {name} has another tokenizer than {model}: need the same tokens in both. "
            "try: the "
            "tokenizer of their base beside both"
        )
    return online


def least_rate(config: ConceptConfig) -> float:
    """Concepts per token that `max_tail` forces."""
    return 1 / (config.max_tail + 1)


@torch.no_grad()
def online_nll(
    online: OnlineForCausalLM,
    bos: int,
    ids_NT: Tensor,
    context: int,
    batch: int = 4,
    tick: Callable[[int], None] = lambda n: None,
) -> tuple[Tensor, Tensor]:
    """(N, n) NLL of the tokens behind `context`, and (N, context) whether a token of it wrote a
    concept. `bos` stands ahead, as for every reader: it is the sink, which tells nothing of the
    text and is not counted."""
    found, wrote, count = [], [], ids_NT.shape[1] - context
    for ids_BT in ids_NT.split(batch):
        ids_BT = ids_BT.to(online.device)
        made = online(
            input_ids=F.pad(ids_BT, (1, 0), value=bos), use_cache=False, logits_to_keep=count + 1
        )
        next_Bn = ids_BT[:, context:]
        nll = F.cross_entropy(
            made.logits[:, :-1].flatten(0, 1).float(), next_Bn.flatten(), reduction="none"
        )
        found.append(nll.view(next_Bn.shape).cpu())
        wrote.append((made.concept_ids[:, 1 : 1 + context] != NULL).cpu())
        tick(ids_BT.numel())
    return torch.cat(found), torch.cat(wrote)


def online_cost(
    online: OnlineForCausalLM,
    bos: int,
    ids_NT: Tensor,
    continued: dict[str, Any],
    batch: int = 4,
    tick: Callable[[int], None] = lambda n: None,
) -> dict[str, Any]:
    """The online model beside the lines of `continuation`, on the same (N, T) blocks. Its dial
    stands at the rate that the compressor realised on these contexts, and is put back
    afterwards."""
    config, context = online.config, continued["context"]
    target = min(1.0, max(continued["concept_rate"], least_rate(config)))
    with online.dial.at(rate=target):
        nll_Nn, wrote_Nc = online_nll(online, bos, ids_NT, context, batch, tick)
    lines = {(one["reader"], one["given"]): one for one in continued["given"]}
    whole, codes, nothing = (lines[key] for key in BESIDE)
    nll, rate = float(nll_Nn.mean()), float(wrote_Nc.double().mean())
    ids = config.codes_per_concept * rate * context
    last_N = torch.where(wrote_Nc, torch.arange(1, context + 1), 0).amax(1)
    row = {
        "reader": "online",
        "given": "its concepts",
        "length": ids,
        "nll": nll,
        "perplexity": math.exp(nll),
        "percent_over_whole": 100 * (math.exp(nll - whole["nll"]) - 1),
    }
    return {
        "context": context,
        "predicted": nll_Nn.numel(),
        "target_rate": target,
        "concept_rate": rate,
        "rate_error_percent": rate_error(rate, target),
        "compression_ratio": context / max(ids, 1e-9),
        "num_concepts": config.num_concepts,
        "codes_per_concept": config.codes_per_concept,
        "open_tail": float((context - last_N).double().mean()),
        "delta_nll": nll - codes["nll"],
        "given": [whole, codes, row, nothing],
    }
