"""Answers: of questions on a compressed context, as in SQuAD, and in the final sentence of a
target, as in ProsQA or GSM8K."""

import re
import string
from collections import defaultdict
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
from sememe.evaluation.context import CODES, base_contexts, readings
from sememe.evaluation.quality import BATCH
from sememe.evaluation.results import Figures
from sememe.pairs import PairTensors
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
    questions = []
    # A file without a line has a fault in its first one.
    for number, line in list(jsonl_lines(usable(path))) or [(1, b"")]:
        try:
            questions.append(Question.model_validate_json(line, strict=True))
        except ValueError as error:
            raise DataError(
                f"{path} line {number} is no question: need the texts context and question, and a "
                f"list of answers. try: {LINE}"
            ) from error
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
    rows: dict[tuple[str, str], list[Tensor]] = defaultdict(list)
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
        ids_1T = torch.tensor([[*context, *words, *gold]], device=model.device)
        by_model = (CODES, "nothing")
        lines = readings(model, base, ids_1T, len(context), window, by_model)
        answers = _answers(model, base, tokenizer, (context, words), window)
        for key, (length, nll_1n) in lines.items():
            figures = (length, *overlap(answers[key], question.answers))
            nll = float(nll_1n[:, -len(gold) :].sum())
            rows[key].append(torch.tensor([*figures, nll]).double())
    if not rows:
        raise DataError(
            f"no context of {len(questions)} questions fits the {positions} places of this base: "
            "need shorter ones. try: one paragraph each"
        )
    given = []
    for (reader, name), rows_n4 in rows.items():
        *means, nll = torch.stack(rows_n4).sum(0).tolist()
        length, exact_match, f1 = (total / len(rows_n4) for total in means)
        given.append(
            {
                "reader": reader,
                "given": name,
                "length": length,
                "exact_match": exact_match,
                "f1": f1,
                "answer_nll": nll / gold_tokens,
            }
        )
    return {"questions": len(questions) - skipped, "skipped": skipped, "given": given}


@torch.no_grad()
def _answers(
    model, base, tokenizer, ids: tuple[list[int], list[int]], window: int | None
) -> dict[tuple[str, str], str]:
    """(reader, given) → the answer. `ids`: of the context and of the question."""
    context, words = ids
    context_1T = torch.tensor([context], device=model.device)
    encoded = model.encode(context_1T)
    count_1 = model.config.codes_per_concept * encoded.coded_BC.sum(1)
    answers = {}
    for given, (text_T,) in base_contexts(model, context_1T, count_1, window).items():
        prompt_1T = torch.cat([text_T, text_T.new_tensor(words)])[None]
        prompt_1T = F.pad(prompt_1T, (1, 0), value=model.bos)
        answers["base", given] = base_answer(base, tokenizer, prompt_1T)
    for given, by_model in ((CODES, encoded), ("nothing", None)):
        answers["model", given] = model_answer(model, tokenizer, by_model, words)
    return answers


def final_sentence(text: str) -> list[str]:
    """The words of a text's last sentence, which is on its last line; in lower case, without
    articles and punctuation."""
    last = text.strip().rpartition("\n")[2]
    return bare_words(re.split(r"(?<=[.!?])\s+", last)[-1])


class Answers:
    """Exact match of the final sentence with the target's, as in ProsQA or GSM8K, of those pairs
    whose targets are whole: targets that were cut have lost theirs.

    Raises DataError where no target is whole."""

    def __init__(self, tokenizer, pairs: PairTensors):
        self.tokenizer = tokenizer
        eos = tokenizer.eos_token_id
        whole_N = (pairs.target_NY == (-1 if eos is None else eos)).any(1)
        self.index_n = whole_N.nonzero()[:, 0]
        if not len(self.index_n):
            raise DataError(
                f"none of {len(pairs)} targets ends within {pairs.target_NY.shape[1]} tokens, and "
                "answers stand at the end: need whole targets. try: a run with a longer "
                "target_length"
            )
        texts = pairs.rows(self.index_n).target_texts(tokenizer)
        self.answers = [final_sentence(text) for text in texts]

    @torch.no_grad()
    def right(self, write: Callable[[Tensor], Iterable]) -> float:
        """Share of right answers, where `write` writes the texts of some pairs greedily."""
        texts: list[str] = []
        for index_B in self.index_n.split(BATCH):
            texts += self.tokenizer.batch_decode(write(index_B), skip_special_tokens=True)
        endings = [final_sentence(text) for text in texts]
        return sum(map(list.__eq__, endings, self.answers)) / len(endings)
