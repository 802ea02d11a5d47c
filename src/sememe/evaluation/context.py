"""What a compressed context is worth: perplexity of the tokens after it, beside the whole context,
as many tokens of it as there are ids, and none; and online vs offline."""

import itertools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from sememe.concepts.writer import NULL
from sememe.evaluation.quality import batched, rate_error, token_nll
from sememe.evaluation.reconstruction import base_nll
from sememe.evaluation.results import Figures
from sememe.models.losses import cross_entropy

CODES, WHOLE, NOTHING = "its codes", "whole context", "nothing"
BY_MODEL = (CODES, "codes shuffled", WHOLE, NOTHING)


def model_nll(model, ids_NT: Tensor, context: int, source: str) -> tuple[Tensor, Tensor]:
    """(N, n) NLL of the tokens after `context` by a compressor that reads one of `BY_MODEL`, and
    (N,) how many ids or tokens that is."""
    coded = context if "codes" in source else 0
    first = 0 if source == WHOLE else context

    def nll(ids_BT: Tensor) -> tuple[Tensor, Tensor]:
        ids_BT = ids_BT.to(model.device)
        ablation = "shuffle" if "shuffled" in source else None
        encoded = model.encode(ids_BT[:, :coded], ablation=ablation)
        logits_BTV = model.continuation_logits(encoded, ids_BT[:, first:])
        length_B = context - first + model.config.codes_per_concept * encoded.coded_BC.sum(1)
        return cross_entropy(logits_BTV, ids_BT[:, first:])[:, context - first :], length_B

    return tuple(batched(nll, ids_NT))


def base_contexts(model, context_NT: Tensor, window: int | None) -> dict[str, list[Tensor]]:
    """What the base is given instead of a compressor's ids of (N, T) contexts: all of it; its last
    tokens, for each as many as there are ids, so that both readers are given lists of one length;
    what the compressor writes from the ids, `window` tokens at a time (None: all at once); and
    nothing."""
    length = context_NT.shape[1]
    codes = model.config.codes_per_concept
    windows = context_NT.split(window or length, 1)
    parts = [model.decompress(model.compress(ids_Nw)) for ids_Nw in windows]
    again = [[*itertools.chain(*row)][-length:] for row in zip(*parts, strict=True)]
    return {
        WHOLE: [*context_NT],
        "its last tokens": [
            text_T[-codes * len(ids) :]
            for text_T, ids in zip(context_NT, model.compress(context_NT), strict=True)
        ],
        "the decompressed text": [*map(context_NT.new_tensor, again)],
        NOTHING: [*context_NT[:, :0]],
    }


def line(reader: str, source: str, length: float, nll: float, whole: float) -> Figures:
    """A line of the comparison. `percent_over_whole` is what perplexity is above that of the base
    with the whole context."""
    return {
        "reader": reader,
        "given": source,
        "length": length,
        "nll": nll,
        "perplexity": math.exp(nll),
        "percent_over_whole": 100 * (math.exp(nll - whole) - 1),
    }


def continuation(model, base, ids_NT: Tensor, context: int, window: int | None = None) -> Figures:
    """Perplexity of all tokens of (N, T) blocks but the first `context`, by what of it is read: the
    same tokens in every line."""
    next_Nn = ids_NT[:, context:]
    lines = {}
    for source, texts in base_contexts(model, ids_NT[:, :context], window).items():
        rows = [torch.cat(pair)[None] for pair in zip(texts, next_Nn, strict=True)]
        nll = [base_nll(base, model.bos, ids_1T)[:, -next_Nn.shape[1] :] for ids_1T in rows]
        lines["base", source] = sum(map(len, texts)) / len(texts), float(torch.cat(nll).mean())
    for source in BY_MODEL:
        nll_Nn, length_N = model_nll(model, ids_NT, context, source)
        lines["model", source] = float(length_N.double().mean()), float(nll_Nn.mean())
    whole, ids = lines["base", WHOLE][1], lines["model", CODES][0]
    return {
        "context": context,
        "next_tokens": next_Nn.shape[1],
        "blocks": len(ids_NT),
        "predicted": next_Nn.numel(),
        "concept_rate": ids / model.config.codes_per_concept / context,
        "compression_ratio": context / ids,
        "continuation_share": model.config.continuation_share,
        "given": [line(*key, *figures, whole) for key, figures in lines.items()],
    }


def online_nll(
    online, bos: int, ids_NT: Tensor, context: int, rate: float
) -> tuple[Tensor, Tensor]:
    """(N, n) NLL of the tokens after `context`, and (N, context) whether a token of it wrote a
    concept. `bos` comes first, as for every reader: it is the sink, which tells nothing of the text
    and is not counted."""
    with online.dial.at(rate=rate):
        nll_NT, concepts_NS = token_nll(online, F.pad(ids_NT, (1, 0), value=bos))
    return nll_NT[:, context:], concepts_NS[:, 1 : 1 + context] != NULL


def online_gap(online, bos: int, ids_NT: Tensor, continued: Figures) -> Figures:
    """Online vs offline: an online model beside the lines of `continuation`, on the same (N, T)
    blocks, at the rate that the compressor realised on these contexts."""
    context, config = continued["context"], online.config
    # No lower rate than `max_tail` forces.
    target = min(1.0, max(continued["concept_rate"], 1 / (config.max_tail + 1)))
    nll_Nn, wrote_Nc = online_nll(online, bos, ids_NT, context, target)
    lines = {(row["reader"], row["given"]): row for row in continued["given"]}
    whole, codes = lines["base", WHOLE], lines["model", CODES]
    rate = float(wrote_Nc.double().mean())
    ids = config.codes_per_concept * rate * context
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
        # From the last concept on, so many tokens are left.
        "open_tail": float((~wrote_Nc.flip(1)).double().cumprod(1).sum(1).mean()),
        "delta_nll": own["nll"] - codes["nll"],
        "given": [whole, codes, own, lines["base", NOTHING]],
    }
