"""A saved model that is measured, by name: the model, its recipe, and held-out text or pairs in the
form that it was trained on."""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sememe.data import TextBlocks, read_texts, text_blocks, token_blocks
from sememe.errors import CheckpointError, DataError, SememeError
from sememe.evaluation.inputs import refuse_trained, run_recipe
from sememe.evaluation.results import Parts
from sememe.models.loading import (
    check_length,
    check_rate,
    load_base,
    load_model,
    longest_text,
    model_folder,
    resolve,
)
from sememe.pairs import PairForm, PairTensors
from sememe.paths import usable
from sememe.storage import MANIFEST

LENGTH = 512  # tokens of a block, where no run says what its model was trained on
SHARES = tuple(tenth / 10 for tenth in range(10))
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Options:
    """How a model is measured; None: as the system has it. What says nothing about a system is
    refused."""

    tokens: int = 8192
    """Tokens to measure on."""
    batch: int | None = None
    sequence_length: int | None = None
    """Tokens of a block or window; default: that of the run, or 512."""
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
    shares: Sequence[float] = SHARES
    """Of the concepts to drop."""
    seeds: int = 3
    """Draws of whatever is random."""
    new_tokens: int = 64
    repeats: int = 5
    context: int | None = None
    """Tokens that a text goes on from; default: 512 or what fits, 0 for none."""
    questions: str | None = None
    """File of questions on compressed contexts."""
    online: str | None = None
    """Online model that a compressor is compared with."""
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
        parent = Path(name).parent if Path(name).name == "model" else name
        model, tokenizer = load_model(name, merge=merge, dtype=DTYPES[options.dtype])
        subject = cls(name, model, tokenizer, run_recipe(name) or run_recipe(parent), options)
        if options.rate and hasattr(model, "plans"):
            model.limit(plan_budget(options.rate))
            return subject
        for rate in options.rate:
            check_rate(model.config, rate, name)
        if len(options.rate) == 1:
            model.dial.rate = options.rate[0]
        return subject

    @property
    def rates(self) -> Sequence[float]:
        """Further rates to measure at."""
        return self.options.rate if len(self.options.rate) > 1 else ()

    @property
    def pairs_form(self) -> PairForm | None:
        """How its pairs are had; None where it was trained on running text."""
        if self.recipe:
            return PairForm.of(self.recipe)
        return PairForm() if hasattr(self.model, "plans") else None

    def refuse(self, names: str, needs: str) -> None:
        """Raises SememeError for options that say nothing about this model; `needs`: what they are
        for."""
        defaults = {field.name: field.default for field in fields(Options)}
        for name in names.split():
            value = getattr(self.options, name)
            if value != defaults[name] and value != []:
                option = f"--{name.replace('_', '-')}"
                raise SememeError(
                    f"got {option}, which says nothing about {self.name}: need {needs}. try: "
                    f"without {option}"
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
        """The unmodified base. Raises CheckpointError where a merged model does not name it."""
        named = self.base_name
        base = load_base(resolve(named), dtype=DTYPES[self.options.dtype])
        return base.to(self.model.device).eval()

    @property
    def base_name(self) -> str:
        named = os.environ.get("SEMEME_BASE") or self.model.config.base
        if named is None:
            raise CheckpointError(
                f"{self.name} is merged and does not name its base any more: need it to compare. "
                "try: SEMEME_BASE=NAME"
            )
        return named

    def block_length(self) -> int:
        """Tokens of a block. Raises DataError where the base has no positions for so many."""
        longest = longest_text(self.model.config)
        default = min(self.recipe.get("sequence_length", LENGTH), longest)
        length = self.options.sequence_length or default
        check_length(longest, length, "sequence_length=")
        return length

    def heldout(self, data: str) -> TextBlocks | PairTensors:
        """A held-out text in the form that the model was trained on."""
        return self.pairs(data) if self.pairs_form else self.blocks(data)

    def blocks(self, data: str, min_rows: int = 1) -> TextBlocks:
        """(N, T) held-out blocks of a text. Raises DataError where the text was trained on, or has
        too few tokens."""
        refuse_trained(self.name, data)
        texts, length = read_texts(data), self.block_length()
        blocks = text_blocks(texts, self.tokenizer, length, limit=max(self.options.tokens, length))
        if len(blocks.ids_NT) < min_rows:
            raise DataError(
                f"{data} and --tokens {self.options.tokens} make one block of {length} tokens: "
                f"need at least two, to exchange codes between them. try: --tokens {2 * length}"
            )
        return blocks

    def pairs(self, data: str, min_rows: int = 1) -> PairTensors:
        """Held-out pairs of a text, as the model was trained on. Raises DataError."""
        refuse_trained(self.name, data)
        tokens = self.options.tokens
        pairs = self.pairs_form.load(data, self.tokenizer, min_tokens=tokens)
        if len(pairs) < min_rows:
            raise DataError(
                f"{data} and --tokens {tokens} make one pair: need at least two, to swap plans "
                f"between them. try: --tokens {4 * tokens}"
            )
        return pairs

    def prompts(self, data: str | None, length: int, batch: int) -> Tensor:
        """(B, T) prompts: different blocks of a text, by default of the run's held-out text, or
        random tokens where there is none."""
        data = data or self.recipe.get("data", {}).get("heldout")
        if data is None:
            generator = torch.Generator().manual_seed(0)
            ids_BT = torch.randint(3, len(self.tokenizer), (batch, length), generator=generator)
        else:
            ids_NT = token_blocks(read_texts(data), self.tokenizer, length, limit=length * batch)
            ids_BT = ids_NT[torch.arange(batch) % len(ids_NT)]
        return ids_BT.to(self.model.device)

    def parts(self, command: str, ids_NT: Tensor, *others: "Subject") -> Parts:
        """The parts of RUN/COMMAND.json that are known from before a stop: of these token ids, of
        the weights as they are, and of the same options."""
        if not run_recipe(self.name):
            return Parts()
        digest = hashlib.sha256(ids_NT.cpu().numpy().tobytes())
        for subject in (self, *others):
            folder = model_folder(subject.name)
            manifest = None if folder is None else folder / MANIFEST
            is_there = manifest is not None and manifest.is_file()
            digest.update(manifest.read_bytes() if is_there else subject.name.encode())
        digest.update(repr((self.options, torch.get_num_threads(), self.model.device)).encode())
        return Parts(usable(self.name) / f"{command}-{digest.hexdigest()[:12]}.partial.jsonl")


def plan_budget(rates: Sequence[float]) -> list[int]:
    """`--rate` of a planner: concepts of each type at most. Raises SememeError for fractions."""
    if not all(float(count).is_integer() for count in rates):
        raise SememeError(
            f"--rate {','.join(f'{count:g}' for count in rates)}: of a planner it is concepts of "
            "each type at most, need whole numbers. try: --rate 2,4"
        )
    return [int(count) for count in rates]
