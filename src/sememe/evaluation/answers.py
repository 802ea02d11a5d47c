"""Answers: of questions on a compressed context, as in SQuAD, and in the final sentence of a
target, as in ProsQA or GSM8K."""

import re
import string
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import BaseModel, Field, StringConstraints
from rapidfuzz.distance import Indel
from torch import Tensor

from sememe.data import jsonl_lines
from sememe.errors import DataError
from sememe.evaluation.reconstruction import base_nll, written_again
from sememe.evaluation.results import Figures
from sememe.evaluation.subject import Subject
from sememe.models.losses import cross_entropy
from sememe.pairs import IGNORED, PairTensors
from sememe.paths import usable
from sememe.progress import bar

MAX_ANSWER = 16  # tokens of an answer; it ends with its line
LINE = '{"context": "…", "question": "…", "answers": ["…"]}'
Text = Annotated[str, StringConstraints(pattern=r"\S")]


class Question(BaseModel):
    """A line of a file of questions, as in SQuAD."""

    context: Text
    question: Text
    answers: Annotated[list[Text], Field(min_length=1)]


def read_questions(path: str | Path) -> list[Question]:
    """The questions of a .jsonl, one a line. Raises DataError."""
    path = usable(path)
    try:
        lines = list(jsonl_lines(path))
    except OSError as error:
        raise DataError(
            f"{path} cannot be read ({error.strerror}): need questions in a .jsonl. try: lines as "
            f"{LINE}"
        ) from error
    questions = []
    for number, line in lines:
        try:
            questions.append(Question.model_validate_json(line, strict=True))
        except ValueError as error:
            raise DataError(
                f"{path} line {number} is no question: need the texts context and question, and a "
                f"list of answers. try: {LINE}"
            ) from error
    if not questions:
        raise DataError(f"{path} is empty: need questions, one a line. try: {LINE}")
    return questions


def bare_words(text: str) -> list[str]:
    """Words in lower case without articles and punctuation, as SQuAD compares them."""
    text = text.lower().translate(str.maketrans("", "", string.punctuation))
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def overlap(text: str, answers: Sequence[str]) -> tuple[float, float]:
    """(exact match, F1 of words), each to the answer that is nearest."""
    words, right = bare_words(text), [bare_words(answer) for answer in answers]
    # F1 leaves the order out: the longest common subsequence of sorted words is all they share.
    f1 = [Indel.normalized_similarity(sorted(words), sorted(answer)) for answer in right]
    return float(words in right), max(f1)


@torch.no_grad()
def base_answer(base, tokenizer, ids_1T: Tensor) -> str:
    """What the base says next, greedy, to the end of the line."""
    text_1T = base.generate(
        input_ids=ids_1T,
        attention_mask=torch.ones_like(ids_1T),
        max_new_tokens=MAX_ANSWER,
        do_sample=False,
        pad_token_id=0,
    )
    return _line(tokenizer, text_1T[0, ids_1T.shape[1] :].tolist())


@torch.no_grad()
def model_answer(model, tokenizer, encoded, words: list[int]) -> str:
    """What a compressor says next, greedy, after what it encoded and `words`."""
    answer: list[int] = []
    while len(answer) < MAX_ANSWER and "\n" not in tokenizer.decode(answer):
        # The last token is not read, only predicted.
        ids_1T = torch.tensor([[*words, *answer, 0]], device=model.device)
        answer.append(int(model.continuation_logits(encoded, ids_1T)[0, -1].argmax()))
        if answer[-1] == tokenizer.eos_token_id:
            break
    return _line(tokenizer, answer)


def _line(tokenizer, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=True).strip().partition("\n")[0]


def answer_questions(
    model, base, tokenizer, questions: Sequence[Question], window: int | None = None
) -> Figures:
    """Exact match, F1, and NLL of the first answer, by what is given of the context, which is
    decompressed `window` tokens at a time. The question is always read as it is; what does not fit
    the positions of the base is left out and counted."""
    positions = model.config.get_text_config().max_position_embeddings
    lines: dict[tuple[str, str], list[Tensor]] = {}
    gold_tokens = skipped = 0
    for question in bar(iterable=questions, desc="questions", unit="question"):
        texts = (question.context, f"\nQuestion: {question.question}\nAnswer:")
        context, words, gold = (
            tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            for text in (*texts, f" {question.answers[0]}")
        )
        if 1 + len(context) + len(words) + max(len(gold), MAX_ANSWER) > positions:
            skipped += 1
            continue
        gold_tokens += len(gold)
        by_given = _answers(model, base, tokenizer, (context, words, gold), window)
        for key, (length, text, nll) in by_given.items():
            row = torch.tensor([length, *overlap(text, question.answers), nll]).double()
            lines.setdefault(key, []).append(row)
    if not lines:
        raise DataError(
            f"no context of {len(questions)} questions fits the {positions} places of this base: "
            "need shorter ones. try: one paragraph each"
        )
    given = []
    for (reader, name), rows in lines.items():
        length, exact_match, f1, _ = torch.stack(rows).mean(0).tolist()
        answer_nll = float(sum(row[3] for row in rows)) / gold_tokens
        given.append(
            {
                "reader": reader,
                "given": name,
                "length": length,
                "exact_match": exact_match,
                "f1": f1,
                "answer_nll": answer_nll,
            }
        )
    return {"questions": len(questions) - skipped, "skipped": skipped, "given": given}


@torch.no_grad()
def _answers(
    model, base, tokenizer, ids: tuple[list[int], ...], window: int | None
) -> dict[tuple[str, str], tuple[int, str, float]]:
    """(reader, given) → tokens given, the answer, nats of the right one. `ids`: of the context, of
    the question and of the right answer."""
    context, words, gold = ids
    context_1T = torch.tensor([context], device=model.device)
    encoded = model.encode(context_1T)
    again = written_again(model, context_1T, window)[0]
    count = model.config.codes_per_concept * int(encoded.coded_BC.sum())
    given = {
        "whole context": context,
        "its last tokens": context[-count:],
        "the decompressed text": again[-len(context) :],
        "nothing": [],
    }
    answers = {}
    for name, before in given.items():
        ids_1T = torch.tensor([[*before, *words, *gold]], device=base.device)
        nll = float(base_nll(base, model.bos, ids_1T, len(gold)).sum())
        prompt_1T = F.pad(ids_1T[:, : -len(gold)], (1, 0), value=model.bos)
        answers["base", name] = (len(before), base_answer(base, tokenizer, prompt_1T), nll)
    for name, by_model, length in (("its codes", encoded, count), ("nothing", None, 0)):
        ids_1T = torch.tensor([[*words, *gold]], device=model.device)
        logits_1nV = model.continuation_logits(by_model, ids_1T)[:, -len(gold) :]
        nll = float(cross_entropy(logits_1nV, ids_1T[:, -len(gold) :]).sum())
        text = model_answer(model, tokenizer, by_model, words)
        answers["model", name] = (length, text, nll)
    return answers


def texts_of(tokenizer, rows: Iterable, masks: Iterable | None = None) -> list[str]:
    """Texts of token ids; of a tensor those that its mask keeps."""
    if masks is not None:
        rows = [ids_T[mask_T] for ids_T, mask_T in zip(rows, masks, strict=True)]
    return [tokenizer.decode(ids, skip_special_tokens=True) for ids in rows]


def final_sentence(text: str) -> list[str]:
    """The words of a text's last sentence, which is on its last line; in lower case, without
    articles and punctuation."""
    last = text.strip().rpartition("\n")[2]
    return bare_words(re.split(r"(?<=[.!?])\s+", last)[-1])


class Answers:
    """Exact match of the final sentence with the target's, as in ProsQA or GSM8K, of those pairs
    whose targets are whole: targets that were cut have lost theirs.

    Raises DataError where no target is whole."""

    def __init__(self, subject: Subject, pairs: PairTensors):
        self.subject = subject
        target_NY, eos = pairs.target_NY, subject.tokenizer.eos_token_id
        whole_NY = target_NY == (IGNORED - 1 if eos is None else eos)
        self.index_n = whole_NY.any(1).nonzero()[:, 0]
        if not len(self.index_n):
            raise DataError(
                f"none of {len(target_NY)} targets ends within {target_NY.shape[1]} tokens, and "
                "answers stand at the end: need whole targets. try: a run with a longer "
                "target_length"
            )
        target_nY = target_NY[self.index_n]
        self.answers = self._endings(target_nY, target_nY != IGNORED)

    def _endings(self, rows: Iterable, masks: Iterable | None = None) -> list[list[str]]:
        return [final_sentence(text) for text in texts_of(self.subject.tokenizer, rows, masks)]

    @torch.no_grad()
    def right(self, write: Callable[[Tensor], Iterable]) -> float:
        """Share of right answers, where `write` writes the texts of some pairs greedily."""
        endings: list[list[str]] = []
        for index_B in self.index_n.split(self.subject.options.batch or 8):
            endings += self._endings(write(index_B))
        return sum(map(list.__eq__, endings, self.answers)) / len(endings)
