"""Answers out of a compressed context, as in SQuAD: beside the whole context, as much of it as
there are ids, and none."""

import json
import re
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rapidfuzz.distance import Indel
from torch import Tensor

from sememe.data import check_text, jsonl_lines
from sememe.errors import DataError
from sememe.evaluation.baselines import base_nll
from sememe.evaluation.coding import written_again
from sememe.models.compressor import CompressorForCausalLM, Encoded
from sememe.paths import usable

LONGEST = 16  # tokens of an answer; it ends with its line
LINE = '{"context": "…", "question": "…", "answers": ["…"]}'


@dataclass(frozen=True)
class Question:
    context: str
    question: str
    answers: tuple[str, ...]


def read_questions(path: str | Path) -> list[Question]:
    """One JSON object a line, with the texts `context` and `question` and the list `answers`.
    Raises DataError."""
    path, found = usable(path), []
    try:
        rows = list(jsonl_lines(path))
    except OSError as error:
        raise DataError(
            f"{path} cannot be read ({error.strerror}): need questions in a .jsonl. try: lines as "
            f"{LINE}"
        ) from error
    for number, line in rows:
        try:
            row = json.loads(line.decode("utf-8"))
            one = Question(row["context"], row["question"], tuple(row["answers"]))
            whole = (
                isinstance(row["answers"], list)
                and bool(one.answers)
                and all(
                    isinstance(text, str) and text.strip()
                    for text in (one.context, one.question, *one.answers)
                )
            )
        except (ValueError, KeyError, TypeError):
            whole = False
        if not whole:
            raise DataError(
                f"{path} line {number} is no question: need the texts context and question, and a "
                "list of answers. "
                f"try: {LINE}"
            )
        for text in (one.context, one.question, *one.answers):
            check_text(text, f"{path} line {number}")
        found.append(one)
    if not found:
        raise DataError(f"{path} is empty: need questions, one a line. try: {LINE}")
    return found


def bare(text: str) -> list[str]:
    """Words in lower case without articles and punctuation, as SQuAD compares them."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def overlap(text: str, answers: Sequence[str]) -> tuple[float, float]:
    """(exact match, F1 of words), each to the answer that is nearest."""
    words = sorted(bare(text))
    # F1 leaves the order out: the longest common subsequence of sorted words is all they share.
    f1 = [Indel.normalized_similarity(words, sorted(bare(answer))) for answer in answers]
    return float(any(bare(text) == bare(answer) for answer in answers)), max(f1)


@torch.no_grad()
def base_answer(base, tokenizer, ids_1T: Tensor) -> str:
    """What the base says next, greedy, to the end of the line."""
    out = base.generate(
        input_ids=ids_1T,
        attention_mask=torch.ones_like(ids_1T),
        max_new_tokens=LONGEST,
        do_sample=False,
        pad_token_id=0,
    )
    return line_of(tokenizer, out[0, ids_1T.shape[1] :].tolist())


@torch.no_grad()
def model_answer(
    model: CompressorForCausalLM, tokenizer, made: Encoded | None, words: list[int]
) -> str:
    """What the model says next, greedy, behind what it encoded and `words`."""
    said: list[int] = []
    while len(said) < LONGEST and "\n" not in tokenizer.decode(said):
        ids_1T = torch.tensor(
            [[*words, *said, 0]], device=model.device
        )  # the last one is not read, only predicted
        said.append(int(model.continuation_logits(made, ids_1T)[0, -1].argmax()))
        if said[-1] == tokenizer.eos_token_id:
            break
    return line_of(tokenizer, said)


def line_of(tokenizer, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=True).strip().partition("\n")[0]


@torch.no_grad()
def answer(
    model: CompressorForCausalLM,
    base,
    tokenizer,
    questions: Sequence[Question],
    tick: Callable[[int], None] = lambda n: None,
    window: int | None = None,
) -> dict[str, Any]:
    """Exact match, F1, and NLL of the first answer, by what is given of the context, which is
    decompressed `window` tokens at a time. The question is always read as it is; what does not fit
    the places of the base is left out and counted."""
    places, digits = (
        model.config.get_text_config().max_position_embeddings,
        model.config.codes_per_concept,
    )
    lines: dict[tuple[str, str], list[tuple[float, float, float, float, int]]] = {}

    def tokens(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    skipped = 0
    for one in questions:
        tick(1)
        context, words, gold = (
            tokens(one.context),
            tokens(f"\nQuestion: {one.question}\nAnswer:"),
            tokens(" " + one.answers[0]),
        )
        if 1 + len(context) + len(words) + max(len(gold), LONGEST) > places:
            skipped += 1
            continue
        context_1T = torch.tensor([context], device=model.device)
        made, again = model.encode(context_1T), written_again(model, context_1T, window)[0]
        ids = digits * int(made.coded_BC.sum())
        given = {
            "whole context": context,
            "its last tokens": context[-ids:],
            "the decompressed text": again[-len(context) :],
            "nothing": [],
        }
        for name, read in given.items():
            ids_1T = torch.tensor([[*read, *words, *gold]], device=base.device)
            nll = float(base_nll(base, model.bos, ids_1T, len(gold)).sum())
            said = base_answer(
                base, tokenizer, F.pad(ids_1T[:, : -len(gold)], (1, 0), value=model.bos)
            )
            lines.setdefault(("base", name), []).append(
                (len(read), *overlap(said, one.answers), nll, len(gold))
            )
        for name, encoded in (("its codes", made), ("nothing", None)):
            ids_1T = torch.tensor([[*words, *gold]], device=model.device)
            logits_nV = model.continuation_logits(encoded, ids_1T)[0, -len(gold) :].float()
            nll = float(F.cross_entropy(logits_nV, ids_1T[0, -len(gold) :], reduction="sum"))
            said = model_answer(model, tokenizer, encoded, words)
            length = ids if encoded is not None else 0
            lines.setdefault(("model", name), []).append(
                (length, *overlap(said, one.answers), nll, len(gold))
            )
    if skipped == len(questions):
        raise DataError(
            f"no context of {len(questions)} questions fits the {places} places of this base: need "
            "shorter ones. "
            "try: one paragraph each"
        )
    count = len(questions) - skipped
    return {
        "questions": count,
        "skipped": skipped,
        "given": [
            {
                "reader": reader,
                "given": name,
                "length": sum(x[0] for x in found) / count,
                "exact_match": sum(x[1] for x in found) / count,
                "f1": sum(x[2] for x in found) / count,
                "answer_nll": sum(x[3] for x in found) / sum(x[4] for x in found),
            }
            for (reader, name), found in lines.items()
        ],
    }
