"""What each system does its own way: one class per system, one object per name in `SYSTEMS`.

Everything else (trainer, sweep, command line) is the same for all of them and asks here."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, TrainerCallback

from sememe.data import block_order, read_texts, token_blocks
from sememe.errors import RecipeError
from sememe.evaluation import measures
from sememe.evaluation.plans import joined_figures, joined_nll, pair_figures
from sememe.keys import CompressorOptions, OnlineOptions, Options, Recipe, check_rate, split_layers
from sememe.models import MODELS
from sememe.models.adapted import AdaptedModel
from sememe.models.configuration import PLAN_KEYS, AdaptedConfig, sink_id
from sememe.models.loading import check_length, longest_text
from sememe.models.planner.signals import SignalReader
from sememe.pairs import PairForm, PairTensors
from sememe.training.callbacks import Schedule, calibrating
from sememe.training.meters import ConceptMeter, concept_figures, heldout_figures
from sememe.training.plans import HardEM, PairExamples, PlanMeter, first_plans, saved_plans
from sememe.training.trainer import Blocks

OF_CONCEPTS = frozenset(
    ("quantise", "distil", "lora.shallow", "concept_learning_rate", "calibration_tokens")
).union(OnlineOptions.model_fields, CompressorOptions.model_fields)
"""Keys that are about concepts alone."""


@dataclass
class Batches:
    """What a run trains on, in its order, and what it is measured on meanwhile."""

    examples: Any
    """`Blocks` or `PairExamples`."""
    heldout: Any
    """(N, T) blocks or `PairTensors`."""
    calibration_NT: Tensor | None = None
    """Blocks of training text that new modules are started on; None where it trains on pairs."""


@dataclass
class Run:
    """A run that is about to begin: what a system needs to start, watch and finish it."""

    recipe: Recipe
    folder: Path
    model: AdaptedModel
    tokenizer: Any
    batches: Batches
    checkpoint: Path | None
    """It resumes from there; None for a fresh run."""
    say: Callable[[str], None]
    show: bool
    """Whether progress bars are shown."""
    norms: dict[str, float] = field(default_factory=dict)
    """Of the last step's gradients, by `gradient_norms`, before they were clipped."""

    @property
    def system(self) -> "System":
        return SYSTEMS[self.recipe.system]


class System:
    """A system that learns the next token of running text, by LoRA on a base; what a subclass does
    otherwise it overrides."""

    name = "base"
    measures = measures.TEXT
    opens_with_bos = False
    """Whether the model reads a BOS ahead of each text, which takes one position."""
    shifts_labels = True
    """Whether position t predicts label t + 1, as usual; a planner predicts label 0 as well."""
    writes_concepts = False
    """Whether it has codes, which come in by the schedule: a run can be made longer once its ramp
    has ended; and something to train beside LoRA."""
    lengthens = True  # whether a run can be made longer at all
    distils = False
    """Whether its loss may be a distillation from the base; baselines learn from the text alone."""
    two_adapters = False
    """Layers that are computed again in the backward pass would meet the other adapter."""
    whole_segments = False  # codes stand for all tokens of a segment anyway
    reads_pairs = False
    """Whether it can be trained on pairs of a source and a target."""
    baselines: tuple[str, ...] = ()
    """Systems without concepts that a sweep trains beside it."""
    unread: frozenset[str] = frozenset()
    """Recipe keys that it does not read. One that is missing here costs a sweep a baseline for each
    of its values; one too many would make the comparison unequal."""

    def check(self, recipe: Recipe, processes: int) -> None:
        """Raises RecipeError where the recipe cannot be trained in so many processes."""
        parts = processes * recipe.gradient_accumulation
        refused = {
            f"distil = {recipe.distil}": recipe.distil > 0 and not self.distils,
            "pool = true": recipe.pool and self.whole_segments,
            "gradient_checkpointing = true": recipe.gradient_checkpointing and self.two_adapters,
            "pairs of data.fields or data.source_share": recipe.on_pairs and not self.reads_pairs,
            "lora.rank = 0, nothing to train,": recipe.lora.rank == 0 and not self.writes_concepts,
        }
        for key in (key for key, wrong in refused.items() if wrong):
            raise RecipeError(
                f"{key} with system = {self.name}, which cannot have it: need another system, or "
                "the recipe without. try: docs/options.md"
            )
        if recipe.batch_size % parts:
            raise RecipeError(
                f"batch_size = {recipe.batch_size} does not divide into {processes} processes × "
                f"{recipe.gradient_accumulation} parts: need a multiple. try: batch_size={parts}"
            )

    def options(self, recipe: Recipe, layers: int) -> dict[str, Any]:
        """Options of the model's configuration, over a base of so many layers, that are neither of
        the base nor of the LoRA on it."""
        return {}

    def config(self, recipe: Recipe, layers: int) -> AdaptedConfig:
        """The configuration of the recipe's model over a base of so many layers."""
        lora = {f"lora_{key}": getattr(recipe.lora, key) for key in ("rank", "alpha", "dropout")}
        options = self.options(recipe, layers)
        return MODELS[self.name].config_class(base=recipe.base, **lora, **options)

    def build(self, recipe: Recipe, folder: Path) -> AdaptedModel:
        """The untrained model over the base in `folder`: it computes what the base computes."""
        layers = AutoConfig.from_pretrained(folder).get_text_config().num_hidden_layers
        torch.manual_seed(recipe.seed)
        return MODELS[self.name].from_base(self.config(recipe, layers), folder=folder)

    def batches(self, recipe: Recipe, tokenizer, folder: Path, say) -> Batches:
        """(steps · batch_size, T) training blocks in their order, (N, T) held-out blocks, and the
        first training blocks for calibration; or pairs. Raises DataError: missing, empty or too
        short text, or sequences that are longer than the base has positions for."""
        base_config = AutoConfig.from_pretrained(folder).get_text_config()
        if recipe.on_pairs:
            return self.pair_batches(recipe, tokenizer, base_config, say)
        length, count = recipe.sequence_length, recipe.steps * recipe.batch_size
        check_length(longest_text(base_config, self.opens_with_bos), length, "sequence_length=")

        def blocks(text: str, tokens: int) -> Tensor:
            return token_blocks(read_texts(text), tokenizer, length, limit=tokens)

        train_NT = blocks(recipe.data.train, count * length)
        heldout_NT = blocks(recipe.data.heldout, max(recipe.heldout_tokens, length))
        ids_NT = train_NT[block_order(len(train_NT), recipe.steps, recipe.batch_size, recipe.seed)]
        calibration_NT = ids_NT[: max(1, recipe.calibration_tokens // length)]
        return Batches(Blocks(ids_NT, recipe.batch_size), heldout_NT, calibration_NT)

    def pair_batches(self, recipe: Recipe, tokenizer, base_config, say) -> Batches:
        """As many training pairs as the run can see, and held-out pairs of at least
        `heldout_tokens` target tokens."""
        form = PairForm.of(recipe.model_dump())
        train = form.load(recipe.data.train, tokenizer, max_pairs=recipe.steps * recipe.batch_size)
        heldout = form.load(recipe.data.heldout, tokenizer, min_tokens=recipe.heldout_tokens)
        if cut := train.cut():
            say(f"{recipe.data.train}: {cut}")
        return Batches(self.pair_examples(recipe, train, tokenizer, base_config), heldout)

    def start(self, run: Run) -> None:
        """What is set before the first step of a fresh run."""

    def meter(self, run: Run):
        """What counts over a training interval: `see` a forward pass, `read` the figures; None for
        a system of which the loss says all."""
        return None

    def callbacks(self, run: Run, meter) -> list[TrainerCallback]:
        """Callbacks of its own; they come before all others."""
        return []

    def heldout(self, run: Run) -> dict[str, float | list]:
        """Figures of the held-out set while training. The model is in eval mode."""
        return heldout_figures(run.model, run.batches.heldout)

    def state(self, model: AdaptedModel) -> dict[str, float]:
        """What the schedule has set the model to, for the line of the log."""
        return {}

    def finish(self, run: Run) -> None:
        """Brings the trained model into the form that is saved. Own weights are rounded to bf16, so
        that what is saved is what is evaluated and the file is half as large."""
        run.model.round_own_weights()


class Writing(System):
    """A system whose model writes concepts into running text."""

    writes_concepts = True

    def check(self, recipe: Recipe, processes: int) -> None:
        super().check(recipe, processes)
        check_rate(recipe.rate, recipe.max_tail)

    def start(self, run: Run) -> None:
        """Sets the frame of the codes, the gate and the bridge from states of the base."""
        with calibrating():
            shares = run.model.start_frame(run.batches.calibration_NT)
        _say_explained(run.say, shares)

    def meter(self, run: Run) -> ConceptMeter:
        return ConceptMeter(run.recipe.num_concepts, run.recipe.codes_per_concept)

    def callbacks(self, run: Run, meter) -> list[TrainerCallback]:
        return [Schedule(run)]

    def heldout(self, run: Run) -> dict[str, float | list]:
        return concept_figures(run.model, run.batches.heldout)

    def state(self, model: AdaptedModel) -> dict[str, float]:
        return {"target_rate": model.dial.rate, "quantise": model.dial.quantise}

    def finish(self, run: Run) -> None:
        """Also calibrates the gate once more, on training text and the weights as they are
        saved."""
        run.model.dial.quantise = 1.0
        super().finish(run)
        run.model.calibrate_gate(run.batches.calibration_NT)


class Online(Writing):
    """Reads and writes concepts while it goes: a shallow, a middle and a deep slice."""

    name = "online"
    distils = True
    baselines = ("control", "skip", "window")
    measures = measures.ONLINE

    def options(self, recipe: Recipe, layers: int) -> dict[str, Any]:
        split = split_layers(recipe.split, layers)
        first = 0 if recipe.lora.shallow else split[0]
        return _keys(recipe, OnlineOptions) | {"split": split, "lora_first": first}


class Compressor(Writing):
    """Text → concepts → text."""

    name = "compressor"
    two_adapters = True
    whole_segments = True
    measures = measures.COMPRESSOR
    opens_with_bos = True

    def options(self, recipe: Recipe, layers: int) -> dict[str, Any]:
        return _keys(recipe, CompressorOptions)

    def state(self, model: AdaptedModel) -> dict[str, float]:
        figures = super().state(model)
        if model.segmenter is not None:
            figures["length_penalty"] = float(model.segmenter.lengths.penalty)
        return figures


class Planner(System):
    """Source → plan of concepts → text, by hard EM over pairs."""

    name = "planner"
    measures = measures.PLANNER
    shifts_labels = False
    two_adapters = True
    reads_pairs = True
    lengthens = False  # its plans are of the pairs that its steps see

    def check(self, recipe: Recipe, processes: int) -> None:
        super().check(recipe, processes)
        if processes > 1:
            raise RecipeError(
                f"system = planner in {processes} processes: need one, E-steps are not shared out. "
                "try: sememe train without torchrun"
            )

    def options(self, recipe: Recipe, layers: int) -> dict[str, Any]:
        plan = {name: getattr(recipe.plan, key) for key, name in PLAN_KEYS.items()}
        return plan | {
            "plan_max_source": recipe.source_length,
            "code_temperature": recipe.code_temperature,
            "seed": recipe.seed,
        }

    def pair_examples(self, recipe: Recipe, pairs: PairTensors, tokenizer, base_config):
        # Source and target each stand beside a plan, never beside each other.
        longest = longest_text(base_config, bos=True)
        beside = 1 + sum(recipe.plan.lengths) + len(recipe.plan.lengths)
        check_length(longest, pairs.source_NU.shape[1], "source_length=", beside)
        check_length(longest, pairs.target_NY.shape[1], "target_length=", beside)
        examples = PairExamples(recipe, pairs)
        if recipe.plan.signals:
            texts = pairs.target_texts(tokenizer)
            examples.signals = SignalReader.fit(texts)(texts)
        return examples

    def start(self, run: Run) -> None:
        """Plans of the training pairs that the search begins with."""
        examples = run.batches.examples
        examples.plan_NP = first_plans(
            run.recipe, run.model, examples.pairs, run.tokenizer, run.say
        )

    def meter(self, run: Run) -> PlanMeter:
        return PlanMeter(run.model.config.plan_shape)

    def callbacks(self, run: Run, meter) -> list[TrainerCallback]:
        examples = run.batches.examples
        if run.checkpoint is not None:
            examples.plan_NP = saved_plans(run.checkpoint)
        return [HardEM(run.recipe, examples, meter, run.show)]

    def heldout(self, run: Run) -> dict[str, float | list]:
        return pair_figures(run.model, run.batches.heldout)


class Control(System):
    """The baseline: the base with the same LoRA on the same batches, and no concepts."""

    name = "control"
    reads_pairs = True
    unread = OF_CONCEPTS
    measures = measures.CONTROL

    def pair_examples(self, recipe: Recipe, pairs: PairTensors, tokenizer, base_config):
        longest = longest_text(base_config, bos=True)
        check_length(longest, pairs.source_NU.shape[1], "source_length=", pairs.target_NY.shape[1])
        return PairExamples(recipe, pairs, sink_id(base_config))

    def heldout(self, run: Run) -> dict[str, float | list]:
        if not run.recipe.on_pairs:
            return super().heldout(run)
        pairs = run.batches.heldout
        return joined_figures(joined_nll(run.model, pairs), pairs)


class Skip(Control):
    """A baseline without the middle slice."""

    name = "skip"
    reads_pairs = False
    unread = OF_CONCEPTS - {"split", "bridge", "concept_learning_rate", "calibration_tokens"}

    def options(self, recipe: Recipe, layers: int) -> dict[str, Any]:
        shallow, middle, _ = split_layers(recipe.split, layers)
        return {"skipped": (shallow, shallow + middle), "bridge": recipe.bridge}

    def start(self, run: Run) -> None:
        if run.recipe.bridge:
            _say_explained(run.say, run.model.start_bridge(run.batches.calibration_NT))


class Window(Control):
    """A baseline that sees the last tokens and the first one, with as much cache as `online`."""

    name = "window"
    reads_pairs = False
    unread = OF_CONCEPTS - {"rate", "split", "shallow_window"}

    def options(self, recipe: Recipe, layers: int) -> dict[str, Any]:
        shallow, middle, deep = split_layers(recipe.split, layers)
        # As many tokens as the caches of `online` have rows for at the end of a sequence; the first
        # token, which is always seen, takes one of them.
        rows = (shallow + (middle + deep) * recipe.rate) * recipe.sequence_length / layers
        return {"window": recipe.shallow_window or max(1, round(rows) - 1)}


SYSTEMS: dict[str, System] = {
    system.name: system
    for system in (Control(), Skip(), Window(), Online(), Compressor(), Planner())
}


def system_of(config) -> System:
    """The system of a model's configuration, `base` for a plain base."""
    return SYSTEMS.get(getattr(config, "system", None)) or System()


def _keys(recipe: Recipe, options: type[Options]) -> dict[str, Any]:
    """The options of a model's configuration, as the recipe has them."""
    return {key: getattr(recipe, key) for key in options.model_fields}


def _say_explained(say: Callable[[str], None], shares: dict[str, float]) -> None:
    for name, share in shares.items():
        say(f"start: {name.replace('_', ' ')} {share:.0%} of the variance")
