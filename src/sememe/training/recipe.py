"""A recipe: one YAML file = one experiment; typed, validated, printed, and saved beside its run."""

import difflib
from pathlib import Path
from typing import Any, Literal

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import (
    BaseModel,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from sememe.concepts.boundary import BOUNDARIES
from sememe.concepts.head import HEADS
from sememe.errors import RecipeError
from sememe.models.configuration import default_split
from sememe.pairs import PairForm
from sememe.paths import usable
from sememe.training.plan_recipe import Curriculum, Em, Plan, Strict

CONCEPTS = ("online", "compressor")  # systems that write them
BASELINES = ("control", "skip", "window")


class Data(Strict):
    train: str
    """Text to train on: .txt, .jsonl, .parquet (a field may be named: `file.jsonl#body`), or a
    datasets id."""
    heldout: str
    """Text that is never trained on; measured during the run and by `sememe evaluate`."""
    source: str | None = None
    """Field of a row that a `planner` is given. With `target`, it and its `control` train on
    pairs."""
    target: str | None = None
    """Field of a row that it writes."""
    source_share: float | None = Field(None, gt=0, lt=1)
    """Share of each document that is the source, where no fields are named; a `planner` has
    0.25."""

    @model_validator(mode="after")
    def _one_way(self) -> "Data":
        if (self.source is None) != (self.target is None):
            raise ValueError(
                f"source = {self.source} and target = {self.target}: need both fields of a row, or "
                "neither"
            )
        share = self.source_share
        if self.source is not None and (self.source == self.target or share is not None):
            raise ValueError(
                f"source = {self.source}, target = {self.target}, source_share = {share}: need two "
                "fields of a row, or else source_share alone to cut each text"
            )
        return self


class Split(Strict):
    """Layers in each slice. Any two fix the third; none at all: 2/15 shallow, 2/15 deep, a thick
    middle."""

    shallow: int | None = Field(None, ge=1)
    middle: int | None = Field(None, ge=0)
    deep: int | None = Field(None, ge=1)

    def resolve(self, layers: int) -> tuple[int, int, int]:
        """The three counts for a base of `layers`. What is left open is filled; what does not fit
        is for the model's configuration to refuse."""
        edge = default_split(layers)[0]
        shallow, middle, deep = self.shallow, self.middle, self.deep
        if shallow is None:
            shallow = edge if middle is None or deep is None else layers - middle - deep
        if deep is None:
            deep = edge if middle is None else layers - middle - shallow
        if middle is None:
            middle = layers - shallow - deep
        return shallow, middle, deep


class Lora(Strict):
    rank: int = Field(8, ge=0)
    alpha: float = Field(16.0, gt=0)
    dropout: float = Field(0.0, ge=0, lt=1)
    shallow: bool = True
    """Whether an `online` model's shallow slice has LoRA; without it the states that the codes
    stand for stay put."""


class Schedule(Strict):
    """Identity → concepts. With the bridge a run may start at its final rate (docs/log.md)."""

    quantise: tuple[float, float] = (0.3, 0.6)
    """The code's share in a concept's state rises from 0 to 1 between these shares of the run."""

    @field_validator("quantise")
    @classmethod
    def _ordered(cls, shares: tuple[float, float]) -> tuple[float, float]:
        if not 0 <= shares[0] <= shares[1] <= 1:
            raise ValueError("needs 0 ≤ start ≤ end ≤ 1, shares of the run")
        return shares

    def at(self, progress: float) -> float:
        """The share of the code when this share of the run is done."""
        return ramp(progress, *self.quantise)


def ramp(x: float, start: float, end: float) -> float:
    """0 up to `start`, 1 from `end` on."""
    if x >= end:
        return 1.0
    return 0.0 if x <= start else (x - start) / (end - start)


class Recipe(Strict):
    """Every key of a recipe, with its default."""

    system: Literal["online", "compressor", "planner", "control", "skip", "window"]
    """`online`; `compressor` (text → concepts → text); `planner` (source → plan → text); or a
    baseline on the same batches: `control` (same LoRA, no concepts), `skip` (no middle slice),
    `window` (the last tokens and the first one are all it sees)."""
    base: str
    """Known base (`sememe pull` lists them), local folder, or Hub id."""
    data: Data
    steps: int = Field(ge=1)
    sequence_length: int = Field(256, ge=8)
    """Tokens of a sequence of running text."""
    source_length: int = Field(128, ge=1)
    """Tokens of a pair's source at most: its last ones."""
    target_length: int = Field(128, ge=1)
    """Tokens of a pair's target at most: its first ones."""
    batch_size: int = Field(2, ge=1)
    """Sequences per optimizer step, over all processes."""
    gradient_accumulation: int = Field(1, ge=1)
    """Parts that `batch_size` is computed in."""
    rate: float = Field(0.25, gt=0, le=1)
    """Concepts per normal token; the compression ratio R is 1 / rate."""
    split: Split = Split()
    max_tail: int = Field(16, ge=0)
    """Longest run of normal tokens; then a concept is forced."""
    head: str = "nearest"
    boundary: str = "null"
    """How segments close; see `concepts/boundary.py`. `autoregressive` is for `compressor`: its
    concepts say themselves how many tokens they cover."""
    num_concepts: int = Field(4096, ge=2)
    codes_per_concept: int = Field(2, ge=1, le=4)
    """Residual stages: a concept is that many digits of `num_concepts`, each coding what those
    before it left."""
    bridge: bool = True
    """Tail states get a linear guess of what the middle slice would have added, started by least
    squares; `skip` too."""
    shallow_window: int | None = Field(None, ge=1)
    """Tokens that a token sees in the shallow slice, with the first one beside them; none: all. Its
    cache stops growing. Of `window`: in every layer; none: as many as the caches of `rate` and
    `split` have room for at the end of a sequence."""
    anchor: bool = False
    """A concept starts from what the token that writes it tells, by a linear map of its embedding;
    the codes say the rest."""
    pool: bool = False
    """Codes of `online` are read from the mean of the segment's tail too, by a map that is trained;
    not with boundary: threshold. Those of a `compressor` always stand for all of their segment."""
    content: Literal["bins", "news"] = "bins"
    """What codes of a `compressor` stand for. `bins`: which of the words that the base takes for
    one another it is, to write a text again; `news`: what words add to what was foretold, words
    that mean alike together."""
    depth: int | None = Field(None, ge=1)
    """Layers that a `compressor` reads a text with; none: all."""
    continuation_share: float = Field(0.0, ge=0, le=1)
    """Of a `compressor`'s loss: going on from the concepts of a block's first half, instead of
    writing the block again."""
    concept_dropout: float = Field(0.0, ge=0, lt=1)
    """Share of the concepts that carry nothing, in training."""
    schedule: Schedule = Schedule()
    code_temperature: float = Field(1.0, gt=0)
    gumbel: float = Field(0.0, ge=0)
    lora: Lora = Lora()
    distil: float = Field(0.0, ge=0, le=1)
    """Share of the loss that is KL to the frozen base's next-token distribution instead of cross
    entropy; `online`."""
    learning_rate: float = Field(1e-3, gt=0)
    """Of LoRA; warmed up over the first 5 % of the steps, then cosine to 10 %."""
    concept_learning_rate: float = Field(1e-3, gt=0)
    """Of head, codebook and bridge."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """`auto`: bf16 where the hardware has it, GPU or CPU."""
    gradient_checkpointing: bool = False
    log_every: int = Field(5, ge=1)
    heldout_every: int = Field(50, ge=1)
    heldout_tokens: int = Field(2048, ge=8)
    save_every: int = Field(50, ge=1)
    plan: Plan = Plan()
    em: Em = Em()
    curriculum: Curriculum = Curriculum()
    calibration_tokens: int = Field(32768, ge=64)
    """Training tokens whose states start the codebook, the gate, the bridge and the entropy
    estimate."""
    seed: int = Field(0, ge=0)

    @field_validator("boundary", mode="before")
    @classmethod
    def _yaml_null(cls, value: Any) -> Any:
        return "null" if value is None else value  # `boundary: null` is YAML's None

    @field_validator("data", mode="after")
    @classmethod
    def _different(cls, data: Data) -> Data:
        if data.train == data.heldout:
            raise ValueError(
                "train and heldout are the same text; held-out text is never trained on"
            )
        return data

    @field_validator("head", "boundary")
    @classmethod
    def _known(cls, value: str, info: ValidationInfo) -> str:
        known = {"head": HEADS, "boundary": BOUNDARIES}[info.field_name]
        if value not in known:
            raise ValueError(f"needs one of {', '.join(known)}")
        return value

    @model_validator(mode="after")
    def _tail_fits(self) -> "Recipe":
        if self.system in CONCEPTS and self.rate * (self.max_tail + 1) < 1 - 1e-9:
            raise ValueError(
                f"max_tail = {self.max_tail} forces a concept more often than rate = {self.rate}"
            )
        return self

    @model_validator(mode="after")
    def _options_fit(self) -> "Recipe":
        if self.distil > 0 and self.system != "online":
            raise ValueError(
                f"distil = {self.distil} is for system: online; a baseline is trained on the text "
                "alone"
            )
        if self.gradient_checkpointing and self.system == "compressor":
            raise ValueError(
                "gradient_checkpointing = true computes layers again when the other adapter is on; "
                "a compressor "
                "cannot have it. try: gradient_accumulation, or a shorter sequence_length"
            )
        if self.pool and self.system == "compressor":
            raise ValueError(
                "pool = true is for system: online; a compressor's codes stand for all of their "
                "segment anyway"
            )
        if self.gradient_checkpointing and self.system == "planner":
            raise ValueError(
                "gradient_checkpointing = true computes layers again when the other adapter is on; "
                "a planner cannot "
                "have it. try: gradient_accumulation, or a shorter target_length"
            )
        if self.pairs is not None and self.system not in ("planner", "control"):
            raise ValueError(
                "data.source, data.target and data.source_share make pairs, which system: "
                f"{self.system} is not trained "
                "on; need a planner or its control"
            )
        if self.curriculum.start > self.target_length:
            raise ValueError(
                f"curriculum.start = {self.curriculum.start} is more than target_length = "
                f"{self.target_length}"
            )
        if BOUNDARIES[self.boundary].offline and self.system != "compressor":
            raise ValueError(
                f"boundary = {self.boundary!r} with system = {self.system!r}: it reads all of a "
                "text before it "
                "writes a concept; need system: compressor. try: boundary=null"
            )
        return self

    @property
    def pairs(self) -> PairForm | None:
        """How its pairs are had; None where it trains on running text."""
        return PairForm.of(self.model_dump())

    def window(self, split: tuple[int, int, int]) -> int:
        """Tokens that a `window` sees beside the first: the first one itself takes a place in its
        cache."""
        shallow, middle, deep = split
        rows = (shallow + (middle + deep) * self.rate) * self.sequence_length / sum(split)
        return self.shallow_window or max(1, round(rows) - 1)

    def yaml(self, whole: bool = True) -> str:
        """As a file. Not `whole`: without the keys that only pairs and plans have, where this
        recipe has neither."""
        unused = (
            set()
            if whole or self.pairs is not None
            else {"source_length", "target_length", "plan", "em", "curriculum"}
        )
        return yaml.safe_dump(
            self.model_dump(mode="json", exclude=unused), sort_keys=False, allow_unicode=True
        )


def load_recipe(path: Path | str, overrides: list[str] | tuple[str, ...] = ()) -> Recipe:
    """Reads a recipe and applies dotted `key=value` overrides.

    Raises:
        RecipeError: file missing or not YAML, an unknown key, a value out of range.
    """
    path = usable(path)
    if not path.is_file():
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.yaml")], 1)
        hint = str(path.parent / near[0]) if near else "recipes/tiny-cpu.yaml"
        raise RecipeError(f"no recipe at {path}: need a YAML file. try: {hint}")
    bad = [word for word in overrides if "=" not in word or word.startswith("=")]
    if bad:
        raise RecipeError(f"override {bad[0]!r}: need key=value. try: rate=0.5")
    try:
        loaded = OmegaConf.load(path)
        merged = OmegaConf.merge(loaded, OmegaConf.from_dotlist(list(overrides)))
        values = OmegaConf.to_container(merged, resolve=True)
    except (yaml.YAMLError, OmegaConfBaseException, OSError, ValueError, TypeError) as error:
        first = str(error).splitlines()[0]
        raise RecipeError(
            f"{path} cannot be read as a recipe ({first}): need YAML key: value pairs. try: "
            "recipes/"
        ) from error
    return check_recipe(values, str(path))


def check_recipe(values: Any, where: str) -> Recipe:
    """A Recipe from plain values; every fault becomes one sentence."""
    if not isinstance(values, dict):
        raise RecipeError(
            f"{where} holds no key: value pairs: need a recipe. try: recipes/tiny-cpu.yaml"
        )
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise RecipeError(f"{where}: {_sentence(error)}") from error


def _sentence(error: ValidationError) -> str:
    fault = error.errors()[0]
    key = ".".join(str(part) for part in fault["loc"])
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    if fault["type"] == "extra_forbidden":
        near = difflib.get_close_matches(key, known_keys(), 1, 0.4)
        hint = f"try: {near[0]}" if near else "try: sememe train --help"
        return f"unknown key {key!r}: need one of a recipe's keys. {hint}{more}"
    if fault["type"] == "missing":
        return f"key {key!r} is missing: need a value. try: {key}=…{more}"
    got = fault.get("input")
    said = fault["msg"].removeprefix("Value error, ")
    named = (
        f"{key} = {got!r}: {said}"
        if key and not isinstance(got, dict)
        else f"{key + ': ' if key else ''}{said}"
    )
    return f"{named}. try: another value{f' for {key}' if key else ''}{more}"


def known_keys() -> list[str]:
    """All dotted keys of a recipe."""
    keys = []
    for name, field in Recipe.model_fields.items():
        inner = field.annotation
        nested = isinstance(inner, type) and issubclass(inner, BaseModel)
        keys += [f"{name}.{sub}" for sub in inner.model_fields] if nested else [name]
    return keys
