"""Every key of a recipe, once: its type, default, range and meaning. Model configurations hold the
same groups of keys. Reading and printing them: options.py."""

from collections.abc import Sequence
from typing import Annotated, Literal

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from sememe.errors import RecipeError

Share = Annotated[float, Field(ge=0, le=1)]
PositiveShare = Annotated[float, Field(gt=0, le=1)]
Dropout = Annotated[float, Field(ge=0, lt=1)]
Proposer = Literal["beam", "diverse", "sample", "edit", "gradient"]


def _ramp(shares: tuple[float, float]) -> tuple[float, float]:
    if shares[0] > shares[1]:
        raise ValueError("need start ≤ end, shares of the run")
    return shares


Ramp = Annotated[tuple[Share, Share], AfterValidator(_ramp)]


class Options(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_default=True, use_attribute_docstrings=True)


class Data(Options):
    """Texts"""

    train: str | dict[str, PositiveFloat]
    """Text to train on: .txt, .jsonl, .parquet (a field may be named: `file.jsonl#body`), a folder
    of `sememe tokenize`, or a datasets id. Of a text only as many tokens are read as the run can
    see, its first; a folder is drawn from all over. Several with their shares of the tokens,
    whatever they add up to: `{a.txt: 3, corpus: 1}`."""
    heldout: str | list[str]
    """Text that is never trained on; measured during the run and by `sememe evaluate`. Several, as
    `[wiki.txt, novel.txt]`, are measured one by one as well; `ablate`, `reconstruct` and sweeps
    take the first."""
    fields: tuple[str, str] | None = None
    """Fields of a row that are the source and the target of a pair, as `[instruction, response]`; a
    `planner` and its `control` train on pairs."""
    source_share: float | None = Field(None, gt=0, lt=1)
    """Share of each document that is the source, where no fields are named; a `planner` has
    0.25."""

    @model_validator(mode="after")
    def _differ(self) -> "Data":
        if self.fields and (self.source_share or len(set(self.fields)) < 2):
            raise ValueError("need two fields of a row, or else source_share to cut each text")
        if not (self.train and self.heldout):
            raise ValueError("train and heldout: need a text, or several, in each")
        return self


class Task(Options):
    """What is trained on what"""

    system: Literal["online", "compressor", "planner", "control", "skip", "window", "prune"]
    """`online`; `compressor` (text → concepts → text); `planner` (source → plan → text); or a
    baseline on the same batches: `control` (same LoRA, no concepts), `prune` (without some layers,
    a map in each gap), `skip` (that without the middle slice), `window` (the last tokens and
    the first one are all it sees)."""
    base: str
    """Known base (`sememe pull` lists them), local folder, or Hub id."""
    leave_out: PositiveInt | list[NonNegativeInt] | None = None
    """Of `prune`: how many layers are left out for every token, chosen by a scan of training text;
    or which, as `[3, 4, 7]`."""
    data: Data
    steps: PositiveInt
    """Optimizer steps."""
    sequence_length: int = Field(256, ge=8)
    """Tokens of a sequence of running text."""
    source_length: PositiveInt = 128
    """Tokens of a pair's source at most: its last ones."""
    target_length: PositiveInt = 128
    """Tokens of a pair's target at most: its first ones."""
    batch_size: PositiveInt = 2
    """Sequences per optimizer step, over all processes."""
    gradient_accumulation: PositiveInt = 1
    """Parts that `batch_size` is computed in."""
    seed: NonNegativeInt = 0
    """Of the order of the data, of new weights and of all that is drawn."""

    @model_validator(mode="after")
    def _layers_named(self):
        if self.system == "prune" and not self.leave_out:
            raise ValueError("system: prune: need leave_out, how many layers go or which, as 2")
        return self


class Concepts(Options):
    """Where concepts are written and what codes they have (`online` and `compressor`)"""

    rate: PositiveShare = 0.25
    """Concepts per normal token; the compression ratio R is 1 / rate."""
    max_tail: NonNegativeInt = 16
    """Longest run of normal tokens; then a concept is forced. So many of the last ones stay in the
    cache (`segment`)."""
    head: Literal["nearest", "joint"] = "nearest"
    """Which code a concept is: `nearest`, by distance, whether one is written apart; `joint`, one
    softmax over all codes and "none"."""
    boundary: Annotated[
        Literal["null", "threshold", "fixed", "entropy", "surprise", "autoregressive"],
        BeforeValidator(lambda name: name or "null"),  # `boundary: null` is None in YAML
    ] = "null"
    """How segments close. `null`: the head's score; `threshold`: integrate and fire; `fixed`: every
    1 / rate tokens; `entropy`: where what is proposed next is open; `surprise`: at tokens
    that it did not predict; `autoregressive`, of a `compressor`: each concept says how many tokens
    it covers."""
    num_concepts: int = Field(4096, ge=2)
    """Size of the codebook."""
    codes_per_concept: int = Field(2, ge=1, le=4)
    """Residual stages: a concept is that many digits of `num_concepts`, each coding what those
    before it left."""
    concept_dropout: Dropout = 0.0
    """Share of the concepts that carry nothing, in training."""
    code_temperature: PositiveFloat = 1.0
    """Of the softmax over the codes that the straight-through gradient is of."""
    gumbel: NonNegativeFloat = 0.0
    """Scale of Gumbel noise on the code logits in training; 0: none."""

    @model_validator(mode="after")
    def _codes_fit(self):
        if self.num_concepts**self.codes_per_concept > 2**48:
            raise ValueError(
                f"{self.codes_per_concept} codes of {self.num_concepts} in a concept: need at most "
                "48 bits"
            )
        return self


def check_rate(rate: float, max_tail: int) -> None:
    """Raises RecipeError where forced concepts alone are more than `rate`."""
    if rate * (max_tail + 1) < 1 - 1e-9:
        raise RecipeError(
            f"max_tail = {max_tail} forces a concept more often than rate = {rate}: need max_tail "
            f"≥ {round(1 / rate) - 1}. try: max_tail={4 * round(1 / rate)}"
        )


class OnlineOptions(Concepts):
    """Only for `online` (`split` and `bridge` for `skip` too)"""

    split: tuple[int | None, int | None, int | None] | None = None
    """Layers in the shallow, middle and deep slice, as `[4, 22, 4]`; one of them may be left open,
    as `[4, null, 4]`. None: 2/15 shallow, 2/15 deep, a thick middle."""
    segment: Literal["none", "deep", "both"] = "both"
    """Where the last `max_tail` normal tokens are seen, those of a concept's own segment among
    them. `deep`: in the deep slice, for nothing; `both`: in the middle slice too, by keys and
    values that are made of them; `none`: nowhere, a token sees its open tail alone."""
    shallow_window: PositiveInt | None = None
    """Tokens that a token sees in the shallow slice, with the first one beside them; none: all. Its
    cache stops growing. Of `window`: in every layer; none: as many as the caches of `rate` and
    `split` have room for at the end of a sequence."""
    bridge: bool = True
    """Tail states get a guess of what the middle slice would have added, by a map with hidden units
    that starts as it fits the base's own states; `skip` too."""
    anchor: bool = False
    """A concept starts from a linear map of the embedding of the token that writes it; the codes
    say the rest."""
    pool: bool = False
    """Codes are read from the mean of the segment's tail too, by a map that is trained; not with
    boundary: threshold, which reads the whole segment already."""


def split_layers(split: Sequence[int | None] | None, layers: int) -> tuple[int, int, int]:
    """The option `split` over a base of so many layers: what is open is filled. Raises RecipeError
    unless the three slices fill the base."""
    edge = max(1, round(layers * 2 / 15))  # a thick middle, which is where the gain is
    split = split or (edge, None, edge)
    rest = layers - sum(filter(None, split))
    shallow, middle, deep = (rest if count is None else count for count in split)
    if min(shallow, middle + 1, deep) < 1 or shallow + middle + deep != layers:
        raise RecipeError(
            f"split {shallow}/{middle}/{deep}: need at least 1 shallow and 1 deep layer, and "
            f"{layers} in all, as this base has. try: split=[1,null,1]"
        )
    return shallow, middle, deep


class CompressorOptions(Concepts):
    """Only for `compressor`"""

    content: Literal["learned", "bins"] = "learned"
    """What codes say. `learned`: what the layers read, so that a text can go on from them; `bins`:
    which of the words that the base takes for one another it is, to write a text again, a
    baseline."""
    depth: PositiveInt | None = None
    """Layers that read a text; none: all."""
    continuation_share: Share = 0.0
    """Share of the loss that is going on from the concepts of a block's first half, instead of
    writing the block again."""


class Plan(Options):
    """What a `planner` writes before a text"""

    sizes: Annotated[list[Annotated[int, Field(ge=2)]], Field(min_length=1)] = [64, 512]
    """Ids of each type of concept; types may be levels, coarse ones first."""
    lengths: list[PositiveInt] = [2, 8]
    """Concepts of each type at most."""
    begins: Literal["pieces", "words", "random"] = "pieces"
    """What ids stand for at first: `words`, key words of the target; `pieces`, clusters of the
    words in its pieces; `random`, nothing: plans are drawn."""
    dropout: Dropout = 0.0
    """Share of the targets that the executor learns to write without a plan."""
    parallel: bool = False
    """Types are written at the same time, each from the source alone; else each also from those
    before it."""
    multi_token: PositiveInt = 1
    """Concepts that one step of the planner writes."""
    weight: NonNegativeFloat = 1.0
    """Of the plan's own cross entropy in the loss: nats per concept, beside nats per target
    token."""
    straight_through: bool = False
    """What the executor reads passes its gradient on to the planner."""
    signals: NonNegativeFloat = 0.0
    """Weight of the loss of linear probes of the plan on the target's length, kind, names, numbers
    and key words: nats per label."""

    @model_validator(mode="after")
    def _types_fit(self) -> "Plan":
        if len(self.sizes) != len(self.lengths):
            raise ValueError("sizes and lengths: need one of each for every type")
        if self.multi_token > max(self.lengths):
            raise ValueError(f"multi_token: need at most {max(self.lengths)}, the longest type's")
        return self


class Em(Options):
    """Hard EM of a `planner`: which plans are searched for, and when"""

    every: NonNegativeInt = 50
    """Steps between E-steps; 0: never."""
    stages: Ramp = (0.1, 0.2)
    """Shares of the run. Up to the first the executor learns alone, on the plans that are read off
    the targets; up to the second the planner learns those plans too; then better ones are searched
    for."""
    proposers: dict[Proposer, NonNegativeInt] = {"beam": 4, "sample": 4, "edit": 8}
    """Candidates that each way of proposing (`beam`, `diverse`, `sample`, `edit`, `gradient`) adds
    to the present plan."""
    examples: NonNegativeInt = 0
    """Pairs of one E-step at most, those first that are trained on next; 0: all that the steps up
    to the next one see."""
    batch: PositiveInt = 8
    """Pairs whose candidates are scored at once."""
    planner_weight: NonNegativeFloat = 1.0
    """Of log p(z | u) in a plan's score log p(y | z) + planner_weight · log p(z | u)."""


class Lora(Options):
    """LoRA on all linears of the decoder layers"""

    rank: NonNegativeInt = 8
    """0: none."""
    alpha: PositiveFloat = 16.0
    """Its scale is alpha / rank."""
    dropout: Dropout = 0.0
    """Of its inputs, in training."""
    shallow: bool = True
    """Whether an `online` model's shallow slice has LoRA; without it the states that the codes
    stand for stay put."""


class Recipe(OnlineOptions, CompressorOptions, Task):
    """How it is trained"""

    plan: Plan = Plan()
    em: Em = Em()
    curriculum: tuple[PositiveInt, PositiveShare] | None = None
    """Short targets first: target tokens at the first step, and the share of the run at which
    targets are whole, as `[32, 0.3]`. None: whole from the start."""
    quantise: Ramp = (0.3, 0.6)
    """The code's share in a concept's state rises from 0 to 1 between these shares of the run."""
    fitted_codes: bool = True
    """Codes, head and anchor start as they fit states of training text, by k-means and least
    squares; else they are drawn."""
    lora: Lora = Lora()
    learning_rate: PositiveFloat = 1e-3
    """Of LoRA; warmed up over the first 5 % of the steps, then cosine to 10 %."""
    concept_learning_rate: PositiveFloat = 1e-3
    """Of all new modules. Codes that fit move little: 1e-4 is best for `online` (docs/log.md)."""
    distil: Share = 0.0
    """Share of the loss that is KL to the frozen base's next-token distribution instead of cross
    entropy; `online`."""
    spike: tuple[Annotated[int, Field(ge=8)], PositiveFloat] | None = (128, 6.0)
    """A step is left out, as one is whose loss or gradient is not finite, where its loss is so many
    standard deviations above the mean of the last steps, as `[steps, deviations]`; ten in a row end
    the run. None: only what is not finite is left out."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """`auto`: bf16 where the hardware has it, GPU or CPU. Frozen weights are then held in it too;
    LoRA and new modules stay in fp32."""
    base_bits: Literal[8, 4] | None = None
    """Bits of a frozen weight of the base's layers, in training and in use; 4 want the extra
    `bitsandbytes`. Embeddings and lm_head stay whole. None: as `precision` has it."""
    gradient_checkpointing: bool = False
    """Layers are computed again in the backward pass, which takes less memory and more time."""
    heldout_every: PositiveInt = 50
    """Steps between figures of the held-out text."""
    heldout_tokens: int = Field(2048, ge=8)
    """How much of it; several texts have equal shares, and a row at least."""
    save_every: PositiveInt = 50
    """Steps between checkpoints; the last two are kept."""
    calibration_tokens: int = Field(32768, ge=64)
    """Training tokens whose states start the codebook, the gate, the bridge and what a boundary
    estimates or proposes."""

    def target_tokens(self, step: int) -> int:
        """Tokens of a target that step number `step` trains on at most: those of the curriculum."""
        start, until = self.curriculum or (self.target_length, 1.0)
        if step >= until * self.steps:
            return self.target_length
        return start + int((self.target_length - start) * step / (until * self.steps))

    @property
    def on_pairs(self) -> bool:
        """Whether it is trained on pairs of a source and a target."""
        return self.system == "planner" or bool(self.data.fields or self.data.source_share)

    def yaml(self, whole: bool = True) -> str:
        """As a file; not `whole`: only what differs from the defaults."""
        values = self.model_dump(mode="json", exclude_defaults=not whole)
        return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


GROUPS: dict[type[Options], str] = {
    Task: "",
    Data: "data.",
    Concepts: "",
    OnlineOptions: "",
    CompressorOptions: "",
    Recipe: "",
    Lora: "lora.",
    Plan: "plan.",
    Em: "em.",
}
"""Sections of docs/options.md, and what a recipe's keys in each begin with."""


def own_keys(group: type[Options]) -> list[str]:
    """The keys that are defined in this group, and that are no group themselves."""
    return [name for name in group.__annotations__ if f"{name}." not in GROUPS.values()]


def known_keys() -> list[str]:
    """All dotted keys of a recipe."""
    return [prefix + name for group, prefix in GROUPS.items() for name in own_keys(group)]
