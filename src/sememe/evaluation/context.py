"""What a compressed context is worth: perplexity of the tokens after it, beside the whole context,
as many tokens of it as there are ids, and none; and online vs offline."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from sememe.concepts.writer import NULL
from sememe.data import read_texts, token_blocks
from sememe.errors import CheckpointError, DataError
from sememe.evaluation.answers import answer_questions, read_questions
from sememe.evaluation.inputs import refuse_trained
from sememe.evaluation.quality import batched, rate_error
from sememe.evaluation.reconstruction import (
    base_nll,
    lossless,
    reconstruction_figures,
    written_again,
)
from sememe.evaluation.results import Figures
from sememe.evaluation.subject import Subject
from sememe.models.loading import check_length, longest_text
from sememe.models.losses import cross_entropy

CONTEXTS = tuple(2**power for power in range(9, 0, -1))  # tokens that a text goes on from
NEXT = 128  # tokens after them, at most


def model_nll(
    model, ids_NT: Tensor, context: int, given: str, batch: int = 4
) -> tuple[Tensor, Tensor]:
    """(N, n) NLL of the tokens after `context` by a compressor, and (N,) concepts read. `given`:
    `codes`, `shuffled` (over the batch), `words` (the context as it is) or `nothing`."""

    def nll(ids_BT: Tensor) -> tuple[Tensor, Tensor]:
        ids_BT = ids_BT.to(model.device)
        next_Bn = ids_BT[:, context:]
        encoded, count_B = None, torch.zeros(len(ids_BT), dtype=torch.long)
        if given in ("codes", "shuffled"):
            ablation = "shuffle" if given == "shuffled" else None
            encoded = model.encode(ids_BT[:, :context], ablation=ablation)
            count_B = encoded.coded_BC.sum(1)
        logits_BTV = model.continuation_logits(encoded, ids_BT if given == "words" else next_Bn)
        return cross_entropy(logits_BTV[:, -next_Bn.shape[1] :], next_Bn), count_B

    return tuple(batched(nll, ids_NT, batch))


def reading(reader: str, given: str, length: float, nll_Nn: Tensor, whole: Tensor) -> Figures:
    """A line of the comparison. `percent_over_whole` is what perplexity is above that of the base
    with the whole context."""
    nll = float(nll_Nn.mean())
    return {
        "reader": reader,
        "given": given,
        "length": length,
        "nll": nll,
        "perplexity": math.exp(nll),
        "percent_over_whole": 100 * (math.exp(nll - float(whole.mean())) - 1),
    }


def continuation(
    model, base, ids_NT: Tensor, context: int, window: int | None = None, batch: int = 4
) -> Figures:
    """Perplexity of all tokens of (N, T) blocks but the first `context`, the same tokens in every
    line.

    The truncated context is the last tokens, for each block as many as there are ids, so that both
    readers are given lists of one length. The decompressed one is what the model writes from the
    ids, `window` tokens at a time, for the base to read."""
    count = ids_NT.shape[1] - context
    next_Nn = ids_NT[:, context:]
    codes_Nn, concepts_N = model_nll(model, ids_NT, context, "codes", batch)
    concepts = float(concepts_N.double().mean())
    count_N = (model.config.codes_per_concept * concepts_N).clamp(max=context)
    ids = model.config.codes_per_concept * concepts

    def row_by_row(contexts: Sequence[Tensor]) -> Tensor:
        rows = zip(contexts, next_Nn, strict=True)
        texts = [torch.cat([text_n, next_n])[None] for text_n, next_n in rows]
        return torch.cat([base_nll(base, model.bos, ids_1T, count) for ids_1T in texts])

    cut = [row_T[context - length : context] for row_T, length in zip(ids_NT, count_N, strict=True)]
    again = written_again(model, ids_NT[:, :context], window)
    again = [ids_NT.new_tensor(row[-context:]) for row in again]
    whole_Nn = base_nll(base, model.bos, ids_NT, count, batch)
    by_model = {
        given: model_nll(model, ids_NT, context, given, batch)[0]
        for given in ("shuffled", "words", "nothing")
    }
    lines = [
        ("base", "whole context", float(context), whole_Nn),
        ("base", "its last tokens", float(count_N.double().mean()), row_by_row(cut)),
        ("base", "the decompressed text", sum(map(len, again)) / len(again), row_by_row(again)),
        ("base", "nothing", 0.0, base_nll(base, model.bos, next_Nn, count, batch)),
        ("model", "its codes", ids, codes_Nn),
        ("model", "codes shuffled", ids, by_model["shuffled"]),
        ("model", "whole context", float(context), by_model["words"]),
        ("model", "nothing", 0.0, by_model["nothing"]),
    ]
    return {
        "context": context,
        "next_tokens": count,
        "blocks": len(ids_NT),
        "predicted": next_Nn.numel(),
        "concept_rate": concepts / context,
        "compression_ratio": context / ids,
        "continuation_share": model.config.continuation_share,
        "given": [reading(*line, whole_Nn) for line in lines],
    }


def min_rate(config) -> float:
    """Concepts per token that `max_tail` forces."""
    return 1 / (config.max_tail + 1)


def online_nll(
    online, bos: int, ids_NT: Tensor, context: int, batch: int = 4
) -> tuple[Tensor, Tensor]:
    """(N, n) NLL of the tokens after `context`, and (N, context) whether a token of it wrote a
    concept. `bos` comes first, as for every reader: it is the sink, which tells nothing of the text
    and is not counted."""
    count = ids_NT.shape[1] - context

    def nll(ids_BT: Tensor) -> tuple[Tensor, Tensor]:
        ids_BS = F.pad(ids_BT.to(online.device), (1, 0), value=bos)
        out = online(input_ids=ids_BS, use_cache=False, logits_to_keep=count + 1)
        wrote_Bc = out.concept_ids[:, 1 : 1 + context] != NULL
        return cross_entropy(out.logits[:, :-1], ids_BS[:, -count:]), wrote_Bc

    return tuple(batched(nll, ids_NT, batch))


def online_gap(online, bos: int, ids_NT: Tensor, continued: Figures, batch: int = 4) -> Figures:
    """Online vs offline: an online model beside the lines of `continuation`, on the same (N, T)
    blocks, at the rate that the compressor realised on these contexts."""
    context, config = continued["context"], online.config
    target = min(1.0, max(continued["concept_rate"], min_rate(config)))
    with online.dial.at(rate=target):
        nll_Nn, wrote_Nc = online_nll(online, bos, ids_NT, context, batch)
    lines = {(line["reader"], line["given"]): line for line in continued["given"]}
    whole, codes = lines["base", "whole context"], lines["model", "its codes"]
    rate = float(wrote_Nc.double().mean())
    ids = config.codes_per_concept * rate * context
    last_N = torch.where(wrote_Nc, torch.arange(1, context + 1), 0).amax(1)
    line = reading("online", "its concepts", ids, nll_Nn, torch.tensor(whole["nll"]))
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
        "delta_nll": line["nll"] - codes["nll"],
        "given": [whole, codes, line, lines["base", "nothing"]],
    }


def evaluate_compressor(subject: Subject, data: str) -> Figures:
    """All figures of a saved compressor on a text: reconstruction, lossless coding cost, and what
    its codes are worth as a context."""
    model, tokenizer, options = subject.model, subject.tokenizer, subject.options
    if model.config.quantise < 1:
        raise CheckpointError(
            f"{subject.name} writes no codes yet: need a finished run. try: its command again"
        )
    questions = read_questions(options.questions) if options.questions else []
    model.config.beams = options.beams or model.config.beams
    blocks = subject.blocks(data, min_rows=2)
    window = blocks.ids_NT.shape[1]
    online = _online_model(subject, data) if options.online else None
    continued = continuation_blocks(subject, data)
    if online is not None and continued is None:
        raise DataError(
            f"--online compares how a text goes on, and there is no context to go on from in {data}"
            ": need context other than 0, and a text with room for it. try: more text, or "
            "without --online"
        )
    base = subject.load_base()
    batch = options.batch or 16
    figures = reconstruction_figures(model, tokenizer, blocks.ids_NT, subject.rates, batch)
    figures["lossless"] = lossless(base, model.bos, blocks)
    figures |= dict.fromkeys(("continuation", "online", "questions"))
    if continued is not None:
        figures["continuation"] = continuation(model, base, *continued, window)
        length = subject.recipe.get("sequence_length")
        is_trained = length is not None and model.config.continuation_share > 0
        figures["continuation"]["trained_context"] = length // 2 if is_trained else None
    if online is not None:
        gap = online_gap(online, model.bos, continued[0], figures["continuation"])
        figures["online"] = {"model": str(options.online)} | gap
    if questions:
        answers = answer_questions(model, base, tokenizer, questions, window)
        figures["questions"] = {"data": str(options.questions)} | answers
    return figures


def continuation_blocks(subject: Subject, data: str) -> tuple[Tensor, int] | None:
    """Blocks of a context and what follows it, and how long the context is: as the options have it,
    or the longest up to 512 tokens that text and positions allow; None for 0, or where the text has
    no room. Raises DataError where the options' own does not fit."""
    options, texts = subject.options, read_texts(data)
    if options.context == 0:
        return None
    fault = None
    for context in [options.context] if options.context else CONTEXTS:
        length = context + min(NEXT, context)
        try:
            check_length(longest_text(subject.model.config), length, "context=")
            limit = max(options.tokens, length)
            return token_blocks(texts, subject.tokenizer, length, limit=limit), context
        except DataError as error:
            fault = error
    if options.context:
        raise DataError(
            f"context = {context} and the {length - context} tokens after it do not fit "
            f"({str(fault).partition(':')[0]}): need {length} tokens. try: context="
            f"{context // 2}, or 0 for none"
        ) from fault
    return None


def _online_model(subject: Subject, data: str):
    """The online model that a compressor is compared with. Raises CheckpointError for one that
    writes no codes, is over another base, or cannot run at the compressor's rate."""
    name = subject.options.online
    refuse_trained(name, data)
    # A merged model no longer knows its base.
    model = subject.load_other(name, merge=False).model
    own, config, rate = subject.model.config, model.config, subject.model.dial.rate
    if not hasattr(config, "split") or config.quantise < 1:
        raise CheckpointError(
            f"--online {name} is no online model that writes codes: need a finished run of system: "
            "online. try: sememe train RECIPE system=online"
        )
    if config.base_sha256 is None or config.base_sha256 != own.base_sha256:
        raise CheckpointError(
            f"--online {name} is over the base {str(config.base_sha256)[:12]}, {subject.name} over "
            f"{str(own.base_sha256)[:12]}: need the same base for both. try: an online model over "
            f"{own.base}, not merged"
        )
    if rate < min_rate(config) - 1e-9:
        raise CheckpointError(
            f"{subject.name} writes {rate:g} concepts per token, --online {name} at least "
            f"{min_rate(config):.3g} (max_tail = {config.max_tail}): need both at one rate. try: "
            "an online model with a longer max_tail"
        )
    return model
