"""Whether a text that is written ends as its target does: of targets whose last sentence is the
answer, as in ProsQA or GSM8K."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sememe.errors import DataError
from sememe.evaluation.questions import bare
from sememe.models.configuration import sink_id
from sememe.models.planner import PlannerForCausalLM
from sememe.pairs import IGNORED, PairTensors


def ending(text: str) -> list[str]:
    """The words of a text's last sentence, which is on its last line; in lower case, without
    articles and punctuation."""
    last = text.strip().rpartition("\n")[2]
    return bare(re.split(r"(?<=[.!?])\s+", last)[-1])


@dataclass
class Answers:
    """The answers of those pairs whose targets are whole: targets that were cut have lost theirs.

    Raises DataError where no target is whole.
    """

    tokenizer: object
    pairs: PairTensors
    batch: int = 8
    tick: Callable[[int], None] = lambda n: None
    index_n: Tensor = field(init=False)
    right: list[list[str]] = field(init=False)

    def __post_init__(self):
        target_NY, eos = self.pairs.target_NY, self.tokenizer.eos_token_id
        self.index_n = (target_NY == (IGNORED - 1 if eos is None else eos)).any(1).nonzero()[:, 0]
        if not len(self.index_n):
            raise DataError(
                f"none of {len(target_NY)} targets ends within {target_NY.shape[1]} tokens, and "
                "answers stand at the "
                "end: need whole targets. try: a run with a longer target_length"
            )
        self.right = [
            ending(self._text(row[row != IGNORED].tolist())) for row in target_NY[self.index_n]
        ]

    def _text(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def of_plans(self, model: PlannerForCausalLM, plan_NP: Tensor) -> float:
        """Share of the answers that are right, written greedily from these plans of all pairs."""
        longest = self.pairs.target_NY.shape[1]
        return self._share(lambda index_B: model.write(plan_NP[index_B], longest))

    def of_sources(self, model) -> float:
        """The same of a language model that reads the sources themselves."""
        bos, longest = sink_id(model.config.get_text_config()), self.pairs.target_NY.shape[1]

        def written(index_B: Tensor) -> list[list[int]]:
            ids_BU, mask_BU = self.pairs.rows(index_B).prompts(bos)
            made_BT = model.generate(
                ids_BU.to(model.device),
                attention_mask=mask_BU.to(model.device),
                max_new_tokens=longest,
                do_sample=False,
                pad_token_id=self.tokenizer.eos_token_id,
            )
            return made_BT[:, ids_BU.shape[1] :].tolist()

        return self._share(written)

    @torch.no_grad()
    def _share(self, write: Callable[[Tensor], list[list[int]]]) -> float:
        said: list[list[str]] = []
        for index_B in self.index_n.split(self.batch):
            said += [ending(self._text(ids)) for ids in write(index_B)]
            self.tick(len(index_B))
        return sum(a == b for a, b in zip(said, self.right, strict=True)) / len(said)
