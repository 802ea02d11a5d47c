"""What a compressed context is worth: perplexity of the tokens after it, beside the whole context,
as many tokens of it as there are ids, and none; and online vs offline."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from sememe.concepts.writer import NULL
from sememe.evaluation.quality import batched, rate_error
from sememe.evaluation.reconstruction import base_nll, written_again
from sememe.evaluation.results import Figures
from sememe.models.losses import cross_entropy

CODES = "its codes"
BY_MODEL = (CODES, "codes shuffled", "whole context", "nothing")


def model_nll(model, ids_NT: Tensor, context: int, given: str) -> tuple[Tensor, Tensor]:
    """(N, n) NLL of the tokens after `context` by a compressor that reads one of `BY_MODEL`, and
    (N,) how many ids or tokens that is."""

    def nll(ids_BT: Tensor) -> tuple[Tensor, Tensor]:
        ids_BT = ids_BT.to(model.device)
        next_Bn = ids_BT[:, context:]
        encoded = None
        length_B = torch.full((len(ids_BT),), context if given == "whole context" else 0)
        if "codes" in given:
            ablation = None if given == CODES else "shuffle"
            encoded = model.encode(ids_BT[:, :context], ablation=ablation)
            length_B = model.config.codes_per_concept * encoded.coded_BC.sum(1)
        after_BT = ids_BT if given == "whole context" else next_Bn
        logits_BTV = model.continuation_logits(encoded, after_BT)
        return cross_entropy(logits_BTV[:, -next_Bn.shape[1] :], next_Bn), length_B

    return tuple(batched(nll, ids_NT))


def base_contexts(
    model, context_NT: Tensor, count_N: Tensor, window: int | None
) -> dict[str, list[Tensor]]:
    """What the base is given instead of a compressor's ids of (N, T) contexts: all of it; its last
    tokens, for each as many as there are ids, so that both readers are given lists of one length;
    what the compressor writes from the ids, `window` tokens at a time; and nothing."""
    length = context_NT.shape[1]
    again = written_again(model, context_NT, window)
    return {
        "whole context": [*context_NT],
        "its last tokens": [
            text_T[length - min(count, length) :]
            for text_T, count in zip(context_NT, count_N.tolist(), strict=True)
        ],
        "the decompressed text": [context_NT.new_tensor(ids[-length:]) for ids in again],
        "nothing": [*context_NT[:, :0]],
    }


def readings(
    model,
    base,
    ids_NT: Tensor,
    context: int,
    window: int | None = None,
    by_model: Sequence[str] = BY_MODEL,
) -> dict[tuple[str, str], tuple[float, Tensor]]:
    """(reader, given) → mean length of what is given, and (N, n) NLL of all tokens of (N, T) blocks
    but the first `context`: the same tokens in every line."""
    next_Nn = ids_NT[:, context:]
    own = {given: model_nll(model, ids_NT, context, given) for given in by_model}
    lines = {}
    contexts = base_contexts(model, ids_NT[:, :context], own[CODES][1], window)
    for given, texts in contexts.items():
        rows = [torch.cat(pair)[None] for pair in zip(texts, next_Nn, strict=True)]
        nll = [base_nll(base, model.bos, ids_1T, next_Nn.shape[1]) for ids_1T in rows]
        lines["base", given] = sum(map(len, texts)) / len(texts), torch.cat(nll)
    for given, (nll_Nn, length_N) in own.items():
        lines["model", given] = float(length_N.double().mean()), nll_Nn
    return lines


def line(reader: str, given: str, length: float, nll: float, whole: float) -> Figures:
    """A line of the comparison. `percent_over_whole` is what perplexity is above that of the base
    with the whole context."""
    return {
        "reader": reader,
        "given": given,
        "length": length,
        "nll": nll,
        "perplexity": math.exp(nll),
        "percent_over_whole": 100 * (math.exp(nll - whole) - 1),
    }


def continuation(model, base, ids_NT: Tensor, context: int, window: int | None = None) -> Figures:
    """Perplexity of all tokens of (N, T) blocks but the first `context`, by what of it is read."""
    lines = readings(model, base, ids_NT, context, window)
    means = {key: (length, float(nll_Nn.mean())) for key, (length, nll_Nn) in lines.items()}
    whole = means["base", "whole context"][1]
    ids = means["model", CODES][0]
    config = model.config
    return {
        "context": context,
        "next_tokens": ids_NT.shape[1] - context,
        "blocks": len(ids_NT),
        "predicted": ids_NT[:, context:].numel(),
        "concept_rate": ids / config.codes_per_concept / context,
        "compression_ratio": context / ids,
        "continuation_share": config.continuation_share,
        "given": [line(*key, *figures, whole) for key, figures in means.items()],
    }


def online_nll(online, bos: int, ids_NT: Tensor, context: int) -> tuple[Tensor, Tensor]:
    """(N, n) NLL of the tokens after `context`, and (N, context) whether a token of it wrote a
    concept. `bos` comes first, as for every reader: it is the sink, which tells nothing of the text
    and is not counted."""
    count = ids_NT.shape[1] - context

    def nll(ids_BT: Tensor) -> tuple[Tensor, Tensor]:
        ids_BS = F.pad(ids_BT.to(online.device), (1, 0), value=bos)
        out = online(input_ids=ids_BS, use_cache=False, logits_to_keep=count + 1)
        wrote_Bc = out.concept_ids[:, 1 : 1 + context] != NULL
        return cross_entropy(out.logits[:, :-1], ids_BS[:, -count:]), wrote_Bc

    return tuple(batched(nll, ids_NT))


def online_gap(online, bos: int, ids_NT: Tensor, continued: Figures) -> Figures:
    """Online vs offline: an online model beside the lines of `continuation`, on the same (N, T)
    blocks, at the rate that the compressor realised on these contexts."""
    context, config = continued["context"], online.config
    # No lower rate than `max_tail` forces.
    target = min(1.0, max(continued["concept_rate"], 1 / (config.max_tail + 1)))
    with online.dial.at(rate=target):
        nll_Nn, wrote_Nc = online_nll(online, bos, ids_NT, context)
    lines = {(row["reader"], row["given"]): row for row in continued["given"]}
    whole, codes = lines["base", "whole context"], lines["model", CODES]
    rate = float(wrote_Nc.double().mean())
    ids = config.codes_per_concept * rate * context
    last_N = torch.where(wrote_Nc, torch.arange(1, context + 1), 0).amax(1)
    own = line("online", "its concepts", ids, float(nll_Nn.mean()), whole["nll"])
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
        "delta_nll": own["nll"] - codes["nll"],
        "given": [whole, codes, own, lines["base", "nothing"]],
    }
