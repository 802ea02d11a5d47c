"""A saved model that is measured, by name: the model, its recipe, and held-out text or pairs in the
form that it was trained on."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import BatchEncoding

from sememe.data import TextBlocks, heldout_blocks
from sememe.errors import CheckpointError, DataError, SememeError
from sememe.evaluation.inputs import refuse_trained, run_recipe
from sememe.models.loading import (
    check_rate,
    load_base,
    load_model,
    longest_text,
    resolve,
)
from sememe.pairs import PairForm, PairTensors

LENGTH = 512  # tokens of a block, where no run says what its model was trained on
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Options:
    """How a model is measured; None: as the system has it. What says nothing about a system is
    refused."""

    tokens: int = 8192
    """Tokens to measure on."""
    batch: int | None = None
    dtype: str = "float32"
    rate: Sequence[float] = ()
    """Concepts per token to run at instead of the rate that was trained for; several: a table over
    these. Of a planner: concepts of each type at most."""
    answers: bool = False
    """Of pairs: also counts targets whose final sentence is written right."""
    search: int = 0
    """Of a planner: rounds of search for the best plans z*."""
    signals: int = 0
    """Of a planner: training pairs that probes of its plans are fitted on."""
    new_tokens: int = 64
    sweep: bool = False
    """Of an online model: decoding of several batches, in phase and out of it."""
    repeats: int = 5
    online: str | None = None
    """Online model that a compressor is compared with."""
    bins: str | None = None
    """Compressor with bins of words that a compressor is compared with."""
    workers: int = 0
    """Processes that read text, each with the model; 0: this one."""
    beams: int | None = None
    """Texts kept beside each other while a compressor decompresses."""


@dataclass
class Subject:
    """A model under measurement."""

    name: str
    model: Any
    tokenizer: Any
    recipe: dict[str, Any]
    """That of its run, given as its folder or as RUN/model; empty where there is none."""
    options: Options

    @classmethod
    def load(cls, name: str, options: Options, merge: bool = True) -> "Subject":
        """Raises CheckpointError, BaseError or RecipeError where the model cannot be had as the
        options want it."""
        if options.dtype not in DTYPES:
            raise SememeError(
                f"dtype = {options.dtype!r}: need one of {', '.join(DTYPES)}. try: float32"
            )
        model, tokenizer = load_model(name, merge=merge, dtype=DTYPES[options.dtype])
        recipe = run_recipe(name) or run_recipe(str(Path(name)).removesuffix("/model"))
        subject = cls(name, model, tokenizer, recipe, options)
        if options.rate and hasattr(model, "plans"):
            model.limit(options.rate)
            return subject
        for rate in options.rate:
            check_rate(model.config, rate, name)
        if len(options.rate) == 1:
            model.dial.rate = options.rate[0]
        return subject

    @property
    def rates(self) -> Sequence[float]:
        """Further rates to measure at."""
        rate = self.options.rate
        return rate if len(rate) > 1 else ()

    @property
    def pairs_form(self) -> PairForm | None:
        """How its pairs are had; None where it was trained on running text."""
        if self.recipe:
            return PairForm.of(self.recipe)
        return PairForm() if hasattr(self.model, "plans") else None

    def refuse(self, names: str, needs: str) -> None:
        """Raises SememeError for options that say nothing about this model; `needs`: what they are
        for."""
        for name in names.split():
            if getattr(self.options, name):
                raise SememeError(
                    f"got --{name}, which says nothing about {self.name}: need {needs}. try: "
                    f"without --{name}"
                )

    def load_other(self, name: str, merge: bool = True) -> "Subject":
        """A model to compare with, over the same base. Raises CheckpointError for another
        tokenizer."""
        other = Subject.load(name, Options(dtype=self.options.dtype), merge)
        if other.tokenizer.get_vocab() != self.tokenizer.get_vocab():
            raise CheckpointError(
                f"{name} has another tokenizer than {self.name}: need the same base. try: its own "
                "control"
            )
        return other

    def load_base(self):
        """The unmodified base."""
        base = load_base(resolve(self.base_name), dtype=DTYPES[self.options.dtype])
        return base.to(self.model.device).eval()

    @property
    def base_name(self) -> str:
        """Raises CheckpointError where a merged model does not name its base."""
        named = os.environ.get("SEMEME_BASE") or self.model.config.base
        if named is None:
            raise CheckpointError(
                f"{self.name} is merged and does not name its base any more: need it to compare. "
                "try: SEMEME_BASE=NAME"
            )
        return named

    @property
    def block_length(self) -> int:
        """Tokens of a block: as in training, and no more than the base has positions for."""
        longest = longest_text(self.model.config)
        return min(self.recipe.get("sequence_length", LENGTH), longest)

    def heldout(self, data: str, min_rows: int = 1) -> TextBlocks | PairTensors:
        """A held-out text in the form that the model was trained on: blocks, or pairs. Raises
        DataError where the text was trained on, or has too few tokens."""
        refuse_trained(self.name, data)
        tokens, length = self.options.tokens, self.block_length
        if self.pairs_form:
            rows = self.pairs_form.load(data, self.tokenizer, min_tokens=tokens)
        else:
            rows = heldout_blocks(data, self.tokenizer, length, tokens)
        if len(rows) < min_rows:
            raise DataError(
                f"{data} and --tokens {tokens} make a single block or pair: need at least two, to "
                "exchange concepts between them. try: more of both"
            )
        return rows

    def prompts(self, data: str | None, length: int, batch: int) -> BatchEncoding:
        """(B, T) `input_ids`: different blocks of a text, by default of the run's held-out text, or
        random tokens where there is none; and their `attention_mask`. Rows have from half of the
        tokens to all, and are out of phase: of two, three or four tokens between concepts."""
        data = data or self.recipe.get("data", {}).get("heldout")
        row_B = torch.arange(batch)
        if data is None:
            torch.manual_seed(0)
            ids_BT = torch.randint(3, len(self.tokenizer), (batch, length))
        else:
            ids_NT = heldout_blocks(data, self.tokenizer, length, length * batch).ids_NT
            ids_BT = ids_NT[row_B % len(ids_NT)]
        step = length // (12 * batch) * 6 + 1  # has no factor with the number of tokens between
        padding_B1 = (row_B * step % length)[:, None]
        mask_BT = (torch.arange(length) >= padding_B1).long()
        prompts = BatchEncoding({"input_ids": ids_BT, "attention_mask": mask_BT})
        return prompts.to(self.model.device)
