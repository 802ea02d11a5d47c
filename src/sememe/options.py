"""Every key of a recipe, once: its type, default, range and meaning.

Recipes are checked here, model configurations hold the same groups of keys, the sweep asks which
keys a system reads, and docs/options.md is printed from here: python -m sememe.options."""

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from sememe.errors import RecipeError
from sememe.paths import usable

PROPOSERS = ("beam", "diverse", "sample", "edit", "gradient")

Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]


def _ramp(shares: tuple[float, float]) -> tuple[float, float]:
    if shares[0] > shares[1]:
        raise ValueError("need start ≤ end, shares of the run")
    return shares


Ramp = Annotated[tuple[Share, Share], AfterValidator(_ramp)]


class Options(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_default=True, use_attribute_docstrings=True)


class Data(Options):
    """Texts"""

    train: str
    """Text to train on: .txt, .jsonl, .parquet (a field may be named: `file.jsonl#body`), or a
    datasets id."""
    heldout: str
    """Text that is never trained on; measured during the run and by `sememe evaluate`."""
    fields: tuple[str, str] | None = None
    """Fields of a row that are the source and the target of a pair, as `[instruction, response]`; a
    `planner` and its `control` train on pairs."""
    source_share: float | None = Field(None, gt=0, lt=1)
    """Share of each document that is the source, where no fields are named; a `planner` has
    0.25."""

    @model_validator(mode="after")
    def _differ(self) -> "Data":
        if self.train == self.heldout:
            raise ValueError(
                "train and heldout are the same text; held-out text is never trained on"
            )
        if self.fields and (self.fields[0] == self.fields[1] or self.source_share is not None):
            raise ValueError(
                f"fields = {list(self.fields)}, source_share = {self.source_share}: need two "
                "fields of a row, or else source_share alone to cut each text"
            )
        return self


class Task(Options):
    """What is trained on what"""

    system: Literal["online", "compressor", "planner", "control", "skip", "window"]
    """`online`; `compressor` (text → concepts → text); `planner` (source → plan → text); or a
    baseline on the same batches: `control` (same LoRA, no concepts), `skip` (no middle slice),
    `window` (the last tokens and the first one are all it sees)."""
    base: str
    """Known base (`sememe pull` lists them), local folder, or Hub id."""
    data: Data
    steps: Count
    """Optimizer steps."""
    sequence_length: int = Field(256, ge=8)
    """Tokens of a sequence of running text."""
    source_length: Count = 128
    """Tokens of a pair's source at most: its last ones."""
    target_length: Count = 128
    """Tokens of a pair's target at most: its first ones."""
    batch_size: Count = 2
    """Sequences per optimizer step, over all processes."""
    gradient_accumulation: Count = 1
    """Parts that `batch_size` is computed in."""
    seed: int = Field(0, ge=0)
    """Of the order of the data, of new weights and of all that is drawn."""


class Concepts(Options):
    """Where concepts are written and what codes they have (`online` and `compressor`)"""

    rate: float = Field(0.25, gt=0, le=1)
    """Concepts per normal token; the compression ratio R is 1 / rate."""
    max_tail: int = Field(16, ge=0)
    """Longest run of normal tokens; then a concept is forced."""
    head: Literal["nearest", "joint"] = "nearest"
    """Which code a concept is: `nearest`, by distance, whether one is written apart; `joint`, one
    softmax over all codes and "none"."""
    boundary: Annotated[
        Literal["null", "threshold", "fixed", "entropy", "surprise", "autoregressive"],
        BeforeValidator(lambda name: name or "null"),  # `boundary: null` is None in YAML
    ] = "null"
    """How segments close. `null`: the head's score; `threshold`: integrate and fire; `fixed`: every
    1 / rate tokens; `entropy`: where the base is unsure of the next token; `surprise`: at tokens
    that it did not predict; `autoregressive`, of a `compressor`: each concept says how many tokens
    it covers."""
    num_concepts: int = Field(4096, ge=2)
    """Size of the codebook."""
    codes_per_concept: int = Field(2, ge=1, le=4)
    """Residual stages: a concept is that many digits of `num_concepts`, each coding what those
    before it left."""
    concept_dropout: float = Field(0.0, ge=0, lt=1)
    """Share of the concepts that carry nothing, in training."""
    code_temperature: float = Field(1.0, gt=0)
    """Of the softmax over the codes that the straight-through gradient is of."""
    gumbel: float = Field(0.0, ge=0)
    """Scale of Gumbel noise on the code logits in training; 0: none."""

    @model_validator(mode="after")
    def _codes_fit(self):
        if self.num_concepts**self.codes_per_concept > 2**48:
            raise ValueError(
                f"codes_per_concept = {self.codes_per_concept} of num_concepts = "
                f"{self.num_concepts}: need at most 48 bits per concept"
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
    shallow_window: int | None = Field(None, ge=1)
    """Tokens that a token sees in the shallow slice, with the first one beside them; none: all. Its
    cache stops growing. Of `window`: in every layer; none: as many as the caches of `rate` and
    `split` have room for at the end of a sequence."""
    bridge: bool = True
    """Tail states get a linear guess of what the middle slice would have added, started by least
    squares; `skip` too."""
    anchor: bool = False
    """A concept starts from a linear map of the embedding of the token that writes it; the codes
    say the rest."""
    pool: bool = False
    """Codes are read from the mean of the segment's tail too, by a map that is trained; not with
    boundary: threshold, which reads the whole segment already."""

    @model_validator(mode="after")
    def _online_fits(self):
        if self.split and self.split.count(None) > 1:
            raise ValueError(
                f"split = {list(self.split)}: need at most one count open, which the others fix"
            )
        return self


def split_layers(split: Sequence[int | None] | None, layers: int) -> tuple[int, int, int]:
    """The option `split` over a base of so many layers: what is open is filled. Raises RecipeError
    unless the three slices fill the base."""
    if split is None:
        edge = max(1, round(layers * 2 / 15))  # a thick middle, which is where the gain is
        split = (edge, layers - 2 * edge, edge)
    known = sum(count for count in split if count is not None)
    shallow, middle, deep = (layers - known if count is None else count for count in split)
    if min(shallow, middle + 1, deep) < 1:
        raise RecipeError(
            f"split {shallow}/{middle}/{deep}: need at least 1 shallow and 1 deep layer. try: "
            f"split=[1,{layers - 2},1]"
        )
    if shallow + middle + deep != layers:
        raise RecipeError(
            f"shallow + middle + deep = {shallow + middle + deep}, but this base has {layers} "
            f"layers: need {layers}. try: split=[{shallow},null,{deep}]"
        )
    return shallow, middle, deep


class CompressorOptions(Concepts):
    """Only for `compressor`"""

    content: Literal["bins", "news"] = "bins"
    """What codes stand for. `bins`: which of the words that the base takes for one another it is,
    to write a text again; `news`: what words add to what was predicted, words that mean alike
    together."""
    depth: int | None = Field(None, ge=1)
    """Layers that read a text; none: all."""
    continuation_share: Share = 0.0
    """Share of the loss that is going on from the concepts of a block's first half, instead of
    writing the block again."""


class Plan(Options):
    """What a `planner` writes before a text"""

    sizes: list[int] = Field([64, 512], min_length=1)
    """Ids of each type of concept; types may be levels, coarse ones first."""
    lengths: list[Count] = [2, 8]
    """Concepts of each type at most."""
    begins: Literal["pieces", "words"] = "pieces"
    """What ids stand for at first: `words`, key words of the target; `pieces`, clusters of the
    words in its pieces."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Share of the targets that the executor learns to write without a plan."""
    parallel: bool = False
    """Types are written at the same time, each from the source alone; else each also from those
    before it."""
    multi_token: Count = 1
    """Concepts that one step of the planner writes."""
    weight: float = Field(1.0, ge=0)
    """Of the plan's own cross entropy in the loss: nats per concept, beside nats per target
    token."""
    straight_through: bool = False
    """What the executor reads passes its gradient on to the planner."""
    signals: float = Field(0.0, ge=0)
    """Weight of the loss of linear probes of the plan on the target's length, kind, names, numbers
    and key words: nats per label."""

    @model_validator(mode="after")
    def _types_fit(self) -> "Plan":
        if len(self.sizes) != len(self.lengths) or min(self.sizes) < 2:
            raise ValueError(
                f"sizes = {self.sizes} and lengths = {self.lengths}: need one of each for every "
                "type, at least 2 ids"
            )
        if self.multi_token > max(self.lengths):
            raise ValueError(
                f"multi_token = {self.multi_token}: need at most {max(self.lengths)}, the longest "
                "type's concepts"
            )
        return self


class Em(Options):
    """Hard EM of a `planner`: which plans are searched for, and when"""

    every: int = Field(50, ge=0)
    """Steps between E-steps; 0: never."""
    stages: Ramp = (0.1, 0.2)
    """Shares of the run. Up to the first the executor learns alone, on the plans that are read off
    the targets; up to the second the planner learns those plans too; then better ones are searched
    for."""
    proposers: dict[str, Annotated[int, Field(ge=0)]] = {"beam": 4, "sample": 4, "edit": 8}
    """Candidates that each way of proposing (`beam`, `diverse`, `sample`, `edit`, `gradient`) adds
    to the present plan."""
    examples: int = Field(0, ge=0)
    """Pairs of one E-step at most, those first that are trained on next; 0: all that the steps up
    to the next one see."""
    batch: Count = 8
    """Pairs whose candidates are scored at once."""
    planner_weight: float = Field(1.0, ge=0)
    """Of log p(z | u) in a plan's score log p(y | z) + planner_weight · log p(z | u)."""

    @model_validator(mode="after")
    def _proposers_fit(self) -> "Em":
        if unknown := set(self.proposers) - set(PROPOSERS):
            raise ValueError(
                f"{unknown.pop()!r} is no way to propose plans, need some of {', '.join(PROPOSERS)}"
            )
        if self.every and not any(self.proposers.values()):
            raise ValueError(
                f"every = {self.every} without proposers, need candidates to choose from"
            )
        return self


class Lora(Options):
    """LoRA on all linears of the decoder layers"""

    rank: int = Field(8, ge=0)
    """0: none."""
    alpha: float = Field(16.0, gt=0)
    """Its scale is alpha / rank."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Of its inputs, in training."""
    shallow: bool = True
    """Whether an `online` model's shallow slice has LoRA; without it the states that the codes
    stand for stay put."""


class Recipe(OnlineOptions, CompressorOptions, Task):
    """How it is trained"""

    plan: Plan = Plan()
    em: Em = Em()
    curriculum: tuple[Count, Annotated[float, Field(gt=0, le=1)]] | None = None
    """Short targets first: target tokens at the first step, and the share of the run at which
    targets are whole, as `[32, 0.3]`. None: whole from the start."""
    quantise: Ramp = (0.3, 0.6)
    """The code's share in a concept's state rises from 0 to 1 between these shares of the run."""
    lora: Lora = Lora()
    learning_rate: float = Field(1e-3, gt=0)
    """Of LoRA; warmed up over the first 5 % of the steps, then cosine to 10 %."""
    concept_learning_rate: float = Field(1e-3, gt=0)
    """Of all new modules."""
    distil: Share = 0.0
    """Share of the loss that is KL to the frozen base's next-token distribution instead of cross
    entropy; `online`."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """`auto`: bf16 where the hardware has it, GPU or CPU."""
    gradient_checkpointing: bool = False
    """Layers are computed again in the backward pass, which takes less memory and more time; not
    with two adapters, so not for `compressor` and `planner`."""
    heldout_every: Count = 50
    """Steps between figures of the held-out text."""
    heldout_tokens: int = Field(2048, ge=8)
    """How much of it."""
    save_every: Count = 50
    """Steps between checkpoints; the last two are kept."""
    calibration_tokens: int = Field(32768, ge=64)
    """Training tokens whose states start the codebook, the gate, the bridge and the entropy
    estimate."""

    @model_validator(mode="after")
    def _curriculum_fits(self) -> "Recipe":
        if self.curriculum and self.curriculum[0] > self.target_length:
            raise ValueError(
                f"curriculum = {list(self.curriculum)} starts with more than target_length = "
                f"{self.target_length} tokens"
            )
        return self

    def target_tokens(self, step: int) -> int:
        """Tokens of a target that step number `step` trains on at most: those of the curriculum."""
        start, until = self.curriculum or (self.target_length, 1.0)
        if step >= until * self.steps:
            return self.target_length
        return start + int((self.target_length - start) * step / (until * self.steps))

    @property
    def on_pairs(self) -> bool:
        """Whether the data say how a source and a target are had."""
        return self.data.fields is not None or self.data.source_share is not None

    def yaml(self, whole: bool = True) -> str:
        """As a file; not `whole`: only what differs from the defaults."""
        values = self.model_dump(mode="json", exclude_defaults=not whole)
        return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


GROUPS: tuple[tuple[str, type[Options]], ...] = (
    ("", Task),
    ("data.", Data),
    ("", Concepts),
    ("", OnlineOptions),
    ("", CompressorOptions),
    ("", Recipe),
    ("lora.", Lora),
    ("plan.", Plan),
    ("em.", Em),
)
"""(Prefix, options) of each section of docs/options.md."""


def load_recipe(path: Path | str, overrides: Sequence[str] = ()) -> Recipe:
    """Reads a recipe and applies dotted `key=value` overrides.

    Raises:
        RecipeError: file missing or not YAML, an unknown key, a value out of range.
    """
    path = usable(path)
    if not path.is_file():
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.yaml")], 1)
        hint = str(path.parent / near[0]) if near else "recipes/tiny-cpu.yaml"
        raise RecipeError(f"no recipe at {path}: need a YAML file. try: {hint}")
    if bad := [word for word in overrides if "=" not in word or word.startswith("=")]:
        raise RecipeError(f"override {bad[0]!r}: need key=value. try: rate=0.5")
    try:
        merged = OmegaConf.merge(OmegaConf.load(path), OmegaConf.from_dotlist(list(overrides)))
        values = OmegaConf.to_container(merged, resolve=True)
    except (yaml.YAMLError, OmegaConfBaseException, OSError, ValueError, TypeError) as error:
        first = str(error).splitlines()[0]
        raise RecipeError(
            f"{path} cannot be read as a recipe ({first}): need YAML key: value pairs. try: "
            "recipes/"
        ) from error
    return check_recipe(values, str(path))


def read_recipe(path: Path) -> Recipe:
    """The recipe that a run was begun with. Raises RecipeError where it cannot be read."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise RecipeError(
            f"{path} cannot be read ({str(error).splitlines()[0]}): need the recipe of a run. "
            "try: another --out"
        ) from error
    return check_recipe(values, str(path))


def check_recipe(values: Any, where: str) -> Recipe:
    """A Recipe from plain values; every fault becomes one sentence."""
    if not isinstance(values, dict):
        raise RecipeError(
            f"{where} holds no key: value pairs: need a recipe. try: recipes/tiny-cpu.yaml"
        )
    return checked(Recipe, upgraded(values, where), f"{where}: ")


def checked(group: type[Options], values: dict[str, Any], where: str = "") -> Any:
    """A group of options from plain values; every fault becomes one sentence."""
    try:
        return group.model_validate(values)
    except ValidationError as error:
        raise RecipeError(where + _sentence(error)) from error


def _sentence(error: ValidationError) -> str:
    fault = error.errors()[0]
    key = ".".join(str(part) for part in fault["loc"])
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    if fault["type"] == "extra_forbidden":
        near = difflib.get_close_matches(key, known_keys(), 1, 0.4)
        hint = near[0] if near else "docs/options.md"
        return f"unknown key {key!r}: need one of a recipe's keys. try: {hint}{more}"
    if fault["type"] == "missing":
        return f"key {key!r} is missing: need a value. try: {key}=…{more}"
    got, message = fault.get("input"), fault["msg"].removeprefix("Value error, ")
    if key:
        value = "" if isinstance(got, dict) else f" = {got!r}"
        return f"{key}{value}: {message}. try: another value for {key}{more}"
    return f"{message}. try: another value{more}"


def known_keys() -> list[str]:
    """All dotted keys of a recipe."""
    return [prefix + name for prefix, group in GROUPS for name in _own(group)]


def _own(group: type[Options]) -> list[str]:
    """The keys that are defined in this group, and that are no group themselves."""
    nested = {prefix.removesuffix(".") for prefix, _ in GROUPS}
    return [name for name in group.model_fields if name in group.__annotations__.keys() - nested]


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts → dotted keys."""
    dotted: dict[str, Any] = {}
    for key, value in values.items():
        inner = isinstance(value, dict) and value
        dotted |= flat(value, f"{prefix}{key}.") if inner else {prefix + str(key): value}
    return dotted


def nested(dotted: dict[str, Any]) -> dict[str, Any]:
    """Dotted keys → nested dicts."""
    values: dict[str, Any] = {}
    for key, value in dotted.items():
        *outer, last = key.split(".")
        inner = values
        for name in outer:
            inner = inner.setdefault(name, {})
        inner[last] = value
    return values


ANY = object()
REMOVED = {
    "estimator": "soft",
    "commitment_weight": 0,
    "usage_weight": 0,
    "shared_map": False,
    "revive_every": 0,
    "overlap": False,
    "gate_noise": 0,
    "schedule.rate": [0, 0],
    "schedule.lora": [0, 0],
    "em.adaptive": False,
    "log_every": ANY,
}
"""Keys of earlier releases → the value at which they did nothing."""
RENAMED = {
    "data.opening": "data.source_share",
    "em.price": "em.planner_weight",
    "schedule.quantise": "quantise",
}
JOINED = {
    "data.fields": {"data.source": None, "data.target": None},
    "split": {"split.shallow": None, "split.middle": None, "split.deep": None},
    "em.stages": {"em.warmup": 0.1, "em.distil": 0.1},
    "curriculum": {"curriculum.start": 0, "curriculum.until": 0.5},
}
"""Key → the keys of earlier releases that it takes the place of, with their defaults."""


def upgraded(values: dict[str, Any], where: str) -> dict[str, Any]:
    """Values of a recipe of an earlier release as this one writes them. Raises RecipeError where a
    key is no more, and did something."""
    dotted = flat(values)
    for key, neutral in REMOVED.items():
        value = dotted.pop(key, ANY)
        if value not in (ANY, neutral) and neutral is not ANY:
            raise RecipeError(
                f"{where}: {key} = {value!r}, and the option is no more: need {neutral!r}, or the "
                "key left out. try: an earlier release of sememe"
            )
    for old, new in RENAMED.items():
        if old in dotted:
            dotted[new] = dotted.pop(old)
    for new, old in JOINED.items():
        if any(key in dotted for key in old):
            dotted[new] = [dotted.pop(key, default) for key, default in old.items()]
            if not any(dotted[new]) or (new == "curriculum" and not dotted[new][0]):
                dotted[new] = None
            elif new == "em.stages":
                dotted[new][1] += dotted[new][0]
    for key in ("schedule", "split", "curriculum"):  # as an empty group
        if dotted.get(key) == {}:
            del dotted[key]
    return nested(dotted)


def page() -> str:
    """docs/options.md."""
    lines = [
        "# Options",
        "",
        "Every key of a recipe. Printed by `python -m sememe.options > docs/options.md`.",
        "A run keeps all of them in RUN/recipe.yaml; `key=value` on the command line overrides one.",
    ]
    for prefix, group in GROUPS:
        lines += ["", f"## {group.__doc__}", "", "| key | default | meaning |", "|---|---|---|"]
        for name in _own(group):
            field = group.model_fields[name]
            default = "" if field.is_required() else f"`{_yaml(field.default)}`"
            meaning = " ".join((field.description or "").split()).replace("|", "\\|")
            lines.append(f"| `{prefix}{name}` | {default} | {meaning} |")
    return "\n".join(lines)


def _yaml(value: Any) -> str:
    plain = list(value) if isinstance(value, tuple) else value
    return yaml.safe_dump(plain, default_flow_style=True).split("\n")[0]


if __name__ == "__main__":
    print(page())
