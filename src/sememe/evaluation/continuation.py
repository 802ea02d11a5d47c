"""Going on from a compressed context: perplexity of the next tokens, beside the whole context, as
much of it, and none."""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sememe.evaluation.baselines import base_nll
from sememe.evaluation.coding import written_again
from sememe.models.compressor import CompressorForCausalLM

PASSES = 7  # over all tokens: what `continuation` ticks


@torch.no_grad()
def model_nll(
    model: CompressorForCausalLM,
    ids_NT: Tensor,
    context: int,
    given: str,
    batch: int = 4,
    tick: Callable[[int], None] = lambda n: None,
) -> tuple[Tensor, Tensor]:
    """(N, n) NLL of the tokens behind `context`, and (N,) concepts read. `given`: `codes`,
    `shuffled`, `words` (the context as it is, without any concept) or `nothing`."""
    found, counts = [], []
    for ids_BT in ids_NT.split(batch):
        ids_BT = ids_BT.to(model.device)
        next_Bn = ids_BT[:, context:]
        made = None
        if given in ("codes", "shuffled"):
            made = model.encode(
                ids_BT[:, :context], ablation="shuffle" if given == "shuffled" else None
            )
        logits_BnV = model.continuation_logits(made, ids_BT if given == "words" else next_Bn)[
            :, -next_Bn.shape[1] :
        ]
        nll = F.cross_entropy(logits_BnV.flatten(0, 1).float(), next_Bn.flatten(), reduction="none")
        found.append(nll.view(next_Bn.shape).cpu())
        counts.append(torch.zeros(len(ids_BT)) if made is None else made.coded_BC.sum(1).cpu())
        tick(ids_BT.numel())
    return torch.cat(found), torch.cat(counts).long()


def continuation(
    model: CompressorForCausalLM,
    base,
    ids_NT: Tensor,
    context: int,
    batch: int = 4,
    tick: Callable[[int], None] = lambda n: None,
    window: int | None = None,
) -> dict[str, Any]:
    """Perplexity of all tokens of (N, T) blocks but the first `context`, the same tokens in every
    line.

    The truncated context is the last tokens, for each block as many as there are ids, so that both
    readers are given lists of one length. The decompressed one is what the model writes from the
    ids, `window` tokens at a time, for the base to read. `percent_over_whole` is what perplexity is
    above that of the base with the whole context."""
    digits, count = model.config.codes_per_concept, ids_NT.shape[1] - context
    codes, concepts_N = model_nll(model, ids_NT, context, "codes", batch, tick)
    kept_N = (digits * concepts_N).clamp(max=context)
    truncated = [
        base_nll(base, model.bos, row_T[None, context - kept :], count)
        for row_T, kept in zip(ids_NT, kept_N.tolist(), strict=True)
    ]
    again = [
        ids_NT.new_tensor(row[-context:])
        for row in written_again(model, ids_NT[:, :context], window)
    ]
    decompressed = [
        base_nll(base, model.bos, torch.cat([text_n, row_T[context:]])[None], count)
        for text_n, row_T in zip(again, ids_NT, strict=True)
    ]
    tick(ids_NT.numel())
    kept, ids = float(kept_N.double().mean()), digits * float(concepts_N.double().mean())
    measured = [
        (
            "base",
            "whole context",
            float(context),
            base_nll(base, model.bos, ids_NT, count, batch, tick),
        ),
        ("base", "its last tokens", kept, torch.cat(truncated)),
        (
            "base",
            "the decompressed text",
            sum(map(len, again)) / len(again),
            torch.cat(decompressed),
        ),
        ("base", "nothing", 0.0, base_nll(base, model.bos, ids_NT[:, context:], count, batch)),
        ("model", "its codes", ids, codes),
        (
            "model",
            "codes shuffled",
            ids,
            model_nll(model, ids_NT, context, "shuffled", batch, tick)[0],
        ),
        (
            "model",
            "whole context",
            float(context),
            model_nll(model, ids_NT, context, "words", batch, tick)[0],
        ),
        ("model", "nothing", 0.0, model_nll(model, ids_NT, context, "nothing", batch, tick)[0]),
    ]
    tick(ids_NT.numel())
    measured = [(*line, float(nll.mean())) for *line, nll in measured]
    return {
        "context": context,
        "next_tokens": count,
        "blocks": len(ids_NT),
        "predicted": count * len(ids_NT),
        "concept_rate": float(concepts_N.double().mean()) / context,
        "compression_ratio": context / ids,
        "continuation_share": model.config.continuation_share,
        "given": [
            {
                "reader": reader,
                "given": given,
                "length": length,
                "nll": nll,
                "perplexity": math.exp(nll),
                "percent_over_whole": 100 * (math.exp(nll - measured[0][-1]) - 1),
            }
            for reader, given, length, nll in measured
        ],
    }
