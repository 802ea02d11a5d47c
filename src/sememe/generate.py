"""Text from a prompt on the terminal: a continuation with its concepts, or a plan and its text."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sememe import storage
from sememe.detokenize import decode
from sememe.errors import CheckpointError, DataError, SememeError
from sememe.figures import concept_name
from sememe.models.loading import check_length, check_rate, load_model, longest_text
from sememe.systems import system_of
from sememe.terminal import ConceptStreamer, show_plan, write
from sememe.texts import check_text

EDIT = re.compile(r"\s*(\d+):(\d+)=(\d+)\s*")


@dataclass(frozen=True)
class Request:
    """What to write, and how tokens are chosen."""

    prompt: str
    max_new_tokens: int = 64
    temperature: float = 0.0
    """0 is greedy."""
    seed: int = 0
    show_concepts: bool = False
    edits: Sequence[str] = ()
    """Of a plan: `TYPE:SLOT=ID`."""
    rates: Sequence[float] = ()
    """One concept rate, or a planner's concepts of each type at most; empty: as trained."""
    cache: Path | None = None
    """A file of what was said before, if it is there; afterwards it holds this text too."""

    @property
    def sampling(self) -> dict[str, Any]:
        """For `generate`, and for a planner's `plan` and `write`."""
        # Logits over a temperature that is smaller still overflow.
        greedy = self.temperature < 1e-6
        return {} if greedy else {"do_sample": True, "temperature": self.temperature}


def generate_text(name: str, request: Request) -> dict[str, Any]:
    """Prints a continuation of the prompt as it is written, or the text that a planner writes.

    Returns prompt, text and new_tokens; of an online model also concept_ids, of every token that
    it read, and concept_rate; of a planner its plan, and with edits the text of the edited plan.

    Raises:
        DataError: an empty prompt, one that is not UTF-8, or one longer than the model's context.
        CheckpointError: the model has no concepts to show, no plan to edit, no cache to keep, or
            writes no text; or the file of the cache is not one of this model.
        SememeError: an edit that cannot be made."""
    if not check_text(request.prompt, "the prompt").strip():
        raise DataError(
            'the prompt is empty: need some text to go on from. try: --prompt "Once upon a time"'
        )
    if request.cache is not None:
        storage.check(request.cache)
    model, tokenizer = load_model(name)
    if request.cache is not None and not hasattr(model, "load_cache"):
        raise CheckpointError(
            f"{name} has no cache to keep in a file: need a run of system: online. try: without "
            "--cache"
        )
    write_text = WRITERS.get(system_of(model.config).name, _continue)
    return {"prompt": request.prompt} | write_text(name, model, tokenizer, request)


def _refuse(name: str, model, tokenizer, request: Request) -> dict[str, Any]:
    raise CheckpointError(
        f"{name} is a compressor, which writes a text again and none of its own: need a language "
        "model. try: sememe compress and sememe decompress"
    )


def _continue(name: str, model, tokenizer, request: Request) -> dict[str, Any]:
    """Streams a continuation; with concepts each segment in its colour."""
    config = model.config
    if request.rates:
        check_rate(config, request.rates[0], name)
        model.dial.rate = request.rates[0]
    if request.edits or (request.show_concepts and not hasattr(model, "new_cache")):
        raise CheckpointError(
            f"{name} has no {'plan' if request.edits else 'concepts'} to show or edit: need a run "
            "of another system. try: without --edit and --show-concepts"
        )
    cache, ids_1T = _conversation(model, tokenizer, request)
    beside = ids_1T.shape[1]
    check_length(longest_text(config), request.max_new_tokens, "--max-new-tokens ", beside)
    codes = [getattr(config, key, 1) for key in ("num_concepts", "codes_per_concept")]
    streamer = ConceptStreamer(
        tokenizer,
        request.prompt,
        cache if request.show_concepts else None,
        lambda concept: concept_name(concept, *codes),
    )
    torch.manual_seed(request.seed)
    new_1T = model.generate(
        ids_1T,
        attention_mask=torch.ones_like(ids_1T),
        max_new_tokens=request.max_new_tokens,
        streamer=streamer,
        pad_token_id=tokenizer.eos_token_id,
        **({} if cache is None else {"cache": cache}),
        **({"do_sample": False} | request.sampling),
    )
    if request.cache is not None:
        cache.save(request.cache, new_1T)
    # Decoded after the prompt: alone, the first new token may lose its space.
    known, text = (decode(tokenizer, x[0], skip_special_tokens=True) for x in (ids_1T, new_1T))
    result = {"text": text[len(known) :], "new_tokens": new_1T.shape[1] - ids_1T.shape[1]}
    if cache is not None:
        result["concept_ids"] = cache.concept_ids[0].tolist()
        result["concept_rate"] = float(cache.concepts[0] / cache.tokens[0])
    return result


def _conversation(model, tokenizer, request: Request) -> tuple[Any, torch.Tensor]:
    """The cache, None for a model that has none of its own, and (1, T) ids up to the end of the
    prompt."""
    goes_on = request.cache is not None and request.cache.exists()
    prompt = tokenizer(request.prompt, return_tensors="pt", add_special_tokens=not goes_on)
    ids_1T = prompt.input_ids.to(model.device)
    if not goes_on:
        return model.new_cache(1) if hasattr(model, "new_cache") else None, ids_1T
    cache, before_BT = model.load_cache(request.cache)
    if len(before_BT) > 1:
        raise CheckpointError(
            f"{request.cache} holds {len(before_BT)} texts: need one. try: another file"
        )
    return cache, torch.cat([before_BT, ids_1T], 1)


def _plan_and_write(name: str, model, tokenizer, request: Request) -> dict[str, Any]:
    """Plans and writes; with edits once more from the edited plan, with the same random draws."""
    if request.rates:
        model.limit(request.rates)
    shape = model.config.plan_shape
    ids_1U = tokenizer(request.prompt, return_tensors="pt", add_special_tokens=False).input_ids
    longer = max(1 + ids_1U.shape[1], request.max_new_tokens)
    beside = shape.slots + shape.types + 1
    check_length(longest_text(model.config), longer, "--max-new-tokens ", beside)

    def options() -> dict[str, Any]:
        return {"generator": torch.Generator().manual_seed(request.seed), **request.sampling}

    ids_1U = ids_1U.to(model.device)
    plans_1RP, *_ = model.plan(ids_1U, torch.ones_like(ids_1U), **options())
    (plan,) = shape.unpack(plans_1RP[:, 0].cpu())

    def written(changed: list[list[int]]) -> dict[str, Any]:
        (ids_Y,) = model.write(shape.pack([changed]), request.max_new_tokens, **options())
        text = decode(tokenizer, ids_Y, skip_special_tokens=True)
        if request.show_concepts or request.edits:
            show_plan(changed, plan)
        write(f"{text}\n")
        return {"plan": changed, "text": text, "new_tokens": len(ids_Y)}

    if not request.edits:
        return written(plan)
    edited = edit_plan(plan, request.edits, shape)
    return written(plan) | {"edits": list(request.edits), "edited": written(edited)}


WRITERS = {"planner": _plan_and_write, "compressor": _refuse}
"""By system; all others continue the prompt."""


def edit_plan(plan: list[list[int]], edits: Sequence[str], shape) -> list[list[int]]:
    """The plan with concepts put in as `TYPE:SLOT=ID` says, slots counted from 0; the slot after
    the last one makes it longer. Raises SememeError for an edit that the plan has no place for."""
    edited = [list(concepts) for concepts in plan]
    for edit in edits:
        match = EDIT.fullmatch(edit)
        if match is None or int(match[1]) >= shape.types:
            raise SememeError(
                f"--edit {edit!r}: need TYPE:SLOT=ID in whole numbers, and this planner has types "
                f"0 to {shape.types - 1}. try: --edit 0:0=1"
            )
        kind, slot, concept = map(int, match.groups())
        last_slot = min(len(edited[kind]), shape.lengths[kind] - 1)
        if slot > last_slot or concept >= shape.sizes[kind]:
            raise SememeError(
                f"--edit {edit}: type {kind} has ids 0 to {shape.sizes[kind] - 1} and here slots 0 "
                f"to {last_slot}. try: --edit {kind}:0=0"
            )
        edited[kind][slot : slot + 1] = [concept]
    return edited
