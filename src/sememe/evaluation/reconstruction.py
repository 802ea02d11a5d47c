"""Text → concept ids → text, free-running: how much comes back, and for how many bits
(RUN/reconstruct.json)."""

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from tqdm.auto import tqdm

from sememe.data import token_blocks
from sememe.errors import CheckpointError, DataError
from sememe.evaluation import continuation as going_on
from sememe.evaluation import questions as asking
from sememe.evaluation.baselines import lossless
from sememe.evaluation.coding import Lists, Tick, compress, decompress, price, shuffled
from sememe.evaluation.dial import check_rates, rate_error
from sememe.evaluation.figures import keep, run_recipe
from sememe.evaluation.files import base_beside
from sememe.evaluation.heldout import heldout_blocks, heldout_texts
from sememe.evaluation.online_cost import load_online, online_cost
from sememe.evaluation.quality import token_nll
from sememe.evaluation.scores import scores
from sememe.models.compressor import CompressorForCausalLM
from sememe.models.loading import load_base, load_model, longest_text, resolve

CONTEXT, NEXT = 512, 128  # tokens that a continuation has ahead of it, and at most predicts


def reconstruct(
    model: CompressorForCausalLM,
    tokenizer,
    ids_NT: Tensor,
    batch: int = 16,
    tick: Tick = lambda n: None,
) -> tuple[dict[str, Any], Lists, Lists]:
    """Figures of (N, T) windows at the model's rate, its concept ids, and the token ids that they
    were read as."""
    concepts, config = compress(model, ids_NT, batch), model.config
    rebuilt = decompress(model, concepts, batch, tick, ids_NT.shape[1])
    nll = float(token_nll(model, ids_NT, batch=4, tick=tick)[0].mean())
    cost = price(concepts, ids_NT.numel(), config.num_concepts, config.codes_per_concept)
    return (
        {
            "target_rate": model.dial.rate,
            "rate_error_percent": rate_error(cost["concept_rate"], model.dial.rate),
            **scores(ids_NT.tolist(), rebuilt, tokenizer),
            "nll": nll,
            **cost,
            "bits_per_token_lossless": cost["bits_per_token"] + nll / math.log(2),
        },
        concepts,
        rebuilt,
    )


def curve(
    model: CompressorForCausalLM,
    tokenizer,
    ids_NT: Tensor,
    own: dict[str, Any],
    rates: Sequence[float],
    batch: int = 16,
    tick: Tick = lambda n: None,
) -> list[dict[str, Any]]:
    """Figures at each of the rates, in rising order. `own`: those at the model's own rate, which is
    put back afterwards."""
    rows = []
    for rate in sorted(set(rates)):
        if rate == model.dial.rate:
            rows.append(own)
            continue
        with model.dial.at(rate=rate):
            rows.append(reconstruct(model, tokenizer, ids_NT, batch, tick)[0])
    return rows


def continuation_blocks(
    texts: list[str], tokenizer, tokens: int, context: int | None, longest: int
) -> tuple[Tensor, int] | None:
    """Blocks of a context and what follows it, and how long the context is: `context`, or the
    longest up to 512 tokens that text and places allow; None for 0, or where the text has no room.
    Raises DataError where a named one does not fit."""
    if context == 0:
        return None
    wanted = context or CONTEXT
    while wanted >= 2:
        length = wanted + min(NEXT, wanted)
        try:
            if length <= longest:
                return token_blocks(texts, tokenizer, length, limit=max(tokens, length)), wanted
            fault = f"this base has places for {longest}"
        except DataError as error:
            fault = str(error).partition(":")[0]
        if context is not None:
            raise DataError(
                f"context = {context} and the {length - wanted} tokens behind it do not fit "
                f"({fault}): need "
                f"{length} tokens. try: context={wanted // 2}, or 0 for none"
            )
        wanted //= 2
    return None


def reconstruct_files(
    model: str,
    data: str,
    tokens: int = 4096,
    window: int | None = None,
    rates: Sequence[float] = (),
    context: int | None = None,
    batch: int = 16,
    base: str | None = None,
    questions: str | None = None,
    online: str | None = None,
    beams: int | None = None,
) -> dict[str, Any]:
    """All figures of a saved compressor on a text; kept as RUN/reconstruct.json. `online`: a model
    to go on from the same contexts at the same rate. `beams`: of decompressing; default: as the
    model has it.

    Raises:
        DataError: the text is missing, too short for two windows, or one that a model was trained
            on; or bad `questions`.
        CheckpointError: `model` cannot be loaded, or is no compressor that writes codes; or
            `online` does not go with it.
        RecipeError: a rate that the model cannot hold."""
    texts = heldout_texts(model, data)
    asked = asking.read_questions(questions) if questions is not None else []
    loaded, tokenizer = load_model(model, base=base)
    if not isinstance(loaded, CompressorForCausalLM) or loaded.config.quantise < 1:
        raise CheckpointError(
            f"{model} cannot write a text again from codes: need a finished run of system: "
            "compressor. "
            "try: sememe evaluate, which takes any model"
        )
    check_rates(loaded, rates, model)
    loaded.config.beams = beams or loaded.config.beams
    blocks = heldout_blocks(model, loaded, tokenizer, texts, tokens, window, "window=")
    ids_NT = blocks.ids_NT
    if len(ids_NT) < 2:
        length = ids_NT.shape[1]
        raise DataError(
            f"{data} and --tokens {tokens} make one window of {length} tokens: need at least two, "
            "to shuffle ids "
            f"between them. try: --tokens {2 * length}"
        )
    other = None
    if online is not None:
        heldout_texts(online, data)
        other = load_online(online, model, loaded, tokenizer, base)
    found = continuation_blocks(texts, tokenizer, tokens, context, longest_text(loaded.config))
    if other is not None and found is None:
        raise DataError(
            "--online compares how a text goes on, and there is no context to go on from in "
            f"{data}: need context = "
            "other than 0, and a text with room for it. try: more text, or without --online"
        )
    plain = load_base(resolve(base_beside(model, loaded.config, base))).to(loaded.device).eval()
    points = 1 + len(set(rates) - {loaded.dial.rate})
    passes = going_on.PASSES + (other is not None)
    total = (2 * points + 3) * ids_NT.numel() + (0 if found is None else passes * found[0].numel())
    with tqdm(total=total, desc="reconstruct", unit="token", mininterval=1) as bar:
        own, concepts, rebuilt = reconstruct(loaded, tokenizer, ids_NT, batch, bar.update)
        mixed = decompress(loaded, shuffled(concepts), batch, bar.update, ids_NT.shape[1])
        result = {
            "model": str(model),
            "data": str(data),
            "tokens": ids_NT.numel(),
            "tokens_asked": tokens,
            "windows": len(ids_NT),
            "window": ids_NT.shape[1],
            "num_concepts": loaded.config.num_concepts,
            "codes_per_concept": loaded.config.codes_per_concept,
            "beams": loaded.config.beams,
            **own,
            "shuffled": scores(ids_NT.tolist(), mixed, tokenizer)
            | {"nll": float(token_nll(loaded, ids_NT, 4, "shuffle", bar.update)[0].mean())},
            "curve": curve(loaded, tokenizer, ids_NT, own, rates, batch, bar.update),
            "lossless": lossless(plain, loaded.bos, blocks, tick=bar.update),
            "continuation": None,
            "online": None,
            "questions": None,
            "samples": [
                sample(*three, tokenizer)
                for three in zip(ids_NT[:3].tolist(), rebuilt, concepts, strict=False)
            ],
        }
        if found is not None:
            result["continuation"] = going_on.continuation(
                loaded, plain, *found, tick=bar.update, window=ids_NT.shape[1]
            )
        if other is not None:
            cost = online_cost(other, loaded.bos, found[0], result["continuation"], tick=bar.update)
            result["online"] = {"model": str(online)} | cost
    if asked:
        with tqdm(total=len(asked), desc="questions", unit="question", mininterval=1) as bar:
            answers = asking.answer(loaded, plain, tokenizer, asked, bar.update, ids_NT.shape[1])
            result["questions"] = {"data": str(questions)} | answers
    length = run_recipe(model).get("sequence_length")
    if result["continuation"] is not None:
        trained = length is not None and loaded.config.continuation_share > 0
        result["continuation"]["trained_context"] = length // 2 if trained else None
    keep(model, "reconstruct.json", result)
    return result


def sample(ids: list[int], rebuilt: list[int], concepts: list[int], tokenizer) -> dict[str, Any]:
    """A window, what it was read as, and the ids between them."""
    text, back = (
        tokenizer.decode(one, clean_up_tokenization_spaces=False) for one in (ids, rebuilt)
    )
    return {"text": text, "rebuilt": back, "concept_ids": concepts}
