"""Answers in the final sentence of a target, as in ProsQA or GSM8K."""

import re
import string
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from sememe.errors import DataError
from sememe.evaluation.quality import BATCH
from sememe.pairs import PairTensors


def final_sentence(text: str) -> list[str]:
    """The words of a text's last sentence, which is on its last line; in lower case, without
    articles and punctuation, as SQuAD compares them."""
    last = re.split(r"(?<=[.!?])\s+", text.strip().rpartition("\n")[2])[-1]
    words = last.lower().translate(str.maketrans("", "", string.punctuation))
    return re.sub(r"\b(a|an|the)\b", " ", words).split()


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
