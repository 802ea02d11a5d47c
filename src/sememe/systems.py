"""What each system does its own way: one class per system, one object per name in `SYSTEMS`.

Everything else (trainer, sweep, command line) is the same for all of them and asks here."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from sememe.backbone.bases import read_config, resolve
from sememe.data import rows_and_heldout
from sememe.errors import RecipeError
from sememe.evaluation import measures
from sememe.evaluation.plans import nll_figures, pair_figures
from sememe.evaluation.results import Figures
from sememe.keys import (
    CompressorOptions,
    OnlineOptions,
    Options,
    Recipe,
    check_rate,
    known_keys,
    split_layers,
)
from sememe.models import MODELS
from sememe.models.adapted import AdaptedModel
from sememe.models.configuration import PLAN_KEYS, AdaptedConfig, OnlineConfig, sink_id
from sememe.models.loading import check_length, longest_text
from sememe.models.planner.first_plans import first_plans
from sememe.models.planner.signals import SignalReader
from sememe.pairs import PairForm, PairTensors
from sememe.training.callbacks import Schedule
from sememe.training.meters import ConceptMeter, heldout_figures
from sememe.training.plans import HardEM, PairExamples, PlanMeter
from sememe.training.trainer import Blocks

UNREAD = frozenset(
    ("quantise", "distil", "leave_out", "lora.shallow", "concept_learning_rate", "fitted_codes")
).union(
    ("calibration_tokens",),
    OnlineOptions.model_fields,
    CompressorOptions.model_fields,
    (key for key in known_keys() if key.startswith(("plan.", "em."))),
)
"""Keys that a baseline does not read, but for those it names: nearly all are about concepts."""


@dataclass
class Batches:
    """What a run trains on, in its order, and what it is measured on meanwhile."""

    examples: Any
    """`Blocks` or `PairExamples`."""
    heldout: Any
    """`TextBlocks` or `PairTensors`."""
    calibration_NT: Tensor | None = None
    """Blocks of training text that new modules are started on; None where it trains on pairs."""


@dataclass
class Run:
    """A run that is about to begin: what a system needs to start, watch and finish it."""

    system: "System"
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
    meter: Any
    """Counts over a training interval: `see` a forward pass, `read` the figures; or None."""
    guard: Any
    """Which steps are taken: `Guard`."""


class System:
    """A system that learns the next token of running text, by LoRA on a base; what a subclass does
    otherwise it overrides."""

    name = "base"
    measures = measures.TEXT
    lengthens = True
    """Whether a run can be trained on to more steps than it was begun with."""
    takes_documents = True
    """Whether rows of a batch may be of different lengths."""
    shifts_labels = True
    """Whether position t predicts label t + 1, as usual; a planner predicts label 0 as well."""
    refuses: tuple[str, ...] = ("distil", "pairs of data", "lora.rank = 0")
    """What of a recipe it cannot have, by the names in `check`. Baselines learn from the text
    alone, and have nothing to train but LoRA."""
    baselines: tuple[str, ...] = ()
    """Systems without concepts that a sweep trains beside it."""
    unread: frozenset[str] = frozenset({"leave_out"})
    """Recipe keys that it does not read. One that is missing here costs a sweep a baseline for each
    of its values; one too many would make the comparison unequal."""

    @property
    def config_class(self) -> type[AdaptedConfig]:
        return MODELS[self.name].config_class

    def check(self, recipe: Recipe, processes: int) -> None:
        """Raises RecipeError where the recipe cannot be trained in so many processes."""
        texts = recipe.data.train, recipe.data.heldout
        holds = {
            "distil": recipe.distil > 0,
            "pool": recipe.pool,
            "pairs of data": recipe.on_pairs,
            "pairs of several texts": recipe.on_pairs and {*map(type, texts)} != {str},
            "lora.rank = 0": recipe.lora.rank == 0,
        }
        for name in filter(holds.get, ("pairs of several texts", *self.refuses)):
            raise RecipeError(
                f"system = {self.name} cannot have {name}: need another system, or the recipe "
                "without. try: docs/options.md"
            )
        parts = processes * recipe.gradient_accumulation
        if recipe.batch_size % parts:
            raise RecipeError(
                f"batch_size = {recipe.batch_size} does not divide into {processes} processes × "
                f"{recipe.gradient_accumulation} parts: need a multiple. try: batch_size={parts}"
            )

    def options(self, recipe: Recipe, layers: int) -> dict:
        """Options of the model's configuration, over a base of so many layers, that are neither of
        the base nor of the LoRA on it."""
        keys = getattr(self.config_class, "options", Options).model_fields
        return {key: getattr(recipe, key) for key in keys}

    def config(self, recipe: Recipe, layers: int) -> AdaptedConfig:
        """The configuration of the recipe's model over a base of so many layers."""
        lora = {f"lora_{key}": getattr(recipe.lora, key) for key in ("rank", "alpha", "dropout")}
        base = {"base": recipe.base, "base_bits": recipe.base_bits}
        return self.config_class(**base, **lora, **self.options(recipe, layers))

    def build(self, recipe: Recipe, folder: Path) -> AdaptedModel:
        """The untrained model over the base in `folder`: it computes what the base computes."""
        layers = read_config(folder).get_text_config().num_hidden_layers
        torch.manual_seed(recipe.seed)
        return MODELS[self.name].from_base(self.config(recipe, layers), folder=folder)

    def beside(self, recipe: Recipe) -> list[dict[str, Any]]:
        """What its runs as baselines of a sweep's point change in the recipe of that point."""
        return [{}]

    def batches(self, recipe: Recipe, tokenizer, folder: Path, say) -> Batches:
        """(steps · batch_size, T) training blocks in their order, (N, T) held-out blocks, and the
        first training blocks for calibration; or pairs. Raises DataError: missing, empty or too
        short text, or sequences that are longer than the base has positions for."""
        base_config = read_config(folder).get_text_config()
        if recipe.on_pairs:
            return self.pair_batches(recipe, tokenizer, base_config, say)
        longest = longest_text(base_config, self.config_class.opens_with_bos)
        check_length(longest, recipe.sequence_length, "sequence_length=")
        rows, heldout = rows_and_heldout(recipe, tokenizer, self.takes_documents, say)
        examples = Blocks(rows, recipe)
        return Batches(examples, heldout, examples.first_blocks(recipe.calibration_tokens))

    def pair_batches(self, recipe: Recipe, tokenizer, base_config, say) -> Batches:
        """As many training pairs as the run can see, and held-out pairs of at least
        `heldout_tokens` target tokens."""
        form = PairForm.of(recipe.model_dump())
        train = form.load(recipe.data.train, tokenizer, max_pairs=recipe.steps * recipe.batch_size)
        heldout = form.load(recipe.data.heldout, tokenizer, min_tokens=recipe.heldout_tokens)
        if train.cut:
            say(f"{recipe.data.train}: {train.cut} pairs are cut to source_length, target_length")
        return Batches(self.pair_examples(recipe, train, tokenizer, base_config), heldout)

    def start(self, run: Run) -> Figures:
        """Sets what is set before the first step of a fresh run; returns what share of a variance
        each new module explains."""
        return {}

    def resume(self, run: Run) -> None:
        """Sets from its checkpoint what `start` set and no state of the trainer holds."""

    def meter(self, config: AdaptedConfig):
        """That of a run; None for a system of which the loss says all."""

    def callbacks(self, run: Run) -> list[TrainerCallback]:
        """Of its own; they come before all others."""
        return []

    def heldout(self, run: Run) -> Figures:
        """Figures of the held-out set while training. The model is in eval mode."""
        return heldout_figures(run.model, run.batches.heldout)

    def state(self, model: AdaptedModel) -> Figures:
        """What the schedule has set the model to, for the line of the log."""
        return {}

    def finish(self, run: Run) -> None:
        """Brings the trained model into the form that is saved. Own weights are rounded to bf16, so
        that what is saved is what is evaluated and the file is half as large."""
        run.model.round_own_weights()


class Writing(System):
    """A system whose model writes concepts into running text."""

    def check(self, recipe: Recipe, processes: int) -> None:
        super().check(recipe, processes)
        check_rate(recipe.rate, recipe.max_tail)

    def start(self, run: Run) -> Figures:
        """Sets the frame of the codes, the gate and the bridge from states of the base."""
        return run.model.start_frame(run.batches.calibration_NT)

    def meter(self, config: AdaptedConfig) -> ConceptMeter:
        return ConceptMeter(config.num_concepts, config.codes_per_concept)

    def callbacks(self, run: Run) -> list[TrainerCallback]:
        return [Schedule(run)]

    def state(self, model: AdaptedModel) -> Figures:
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
    refuses = ("pairs of data",)
    baselines = ("control", "prune", "window")
    measures = measures.ONLINE

    def options(self, recipe: Recipe, layers: int) -> dict:
        shallow = split_layers(recipe.split, layers)[0]
        first = 0 if recipe.lora.shallow else shallow
        return super().options(recipe, layers) | {"lora_first": first}


class Compressor(Writing):
    """Text → concepts → text. A code stands for all tokens of its segment without `pool`."""

    name = "compressor"
    takes_documents = False
    refuses = ("distil", "pairs of data", "pool")
    measures = measures.COMPRESSOR

    def state(self, model: AdaptedModel) -> Figures:
        figures = super().state(model)
        if model.segmenter is not None:
            figures["length_penalty"] = float(model.segmenter.lengths.penalty)
        return figures


class Planner(System):
    """Source → plan of concepts → text, by hard EM over pairs."""

    name = "planner"
    measures = measures.PLANNER
    lengthens = False  # its plans are of the pairs that its steps see
    shifts_labels = False
    baselines = ("control",)
    refuses = ("distil", "lora.rank = 0")

    def options(self, recipe: Recipe, layers: int) -> dict:
        return {
            "plan_max_source": recipe.source_length,
            "code_temperature": recipe.code_temperature,
            "seed": recipe.seed,
            **{name: getattr(recipe.plan, key) for key, name in PLAN_KEYS.items()},
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
            examples.signals = SignalReader(texts)(texts)
        return examples

    def start(self, run: Run) -> Figures:
        """Plans of the training pairs that the search begins with."""
        examples = run.batches.examples
        examples.plan_NP = first_plans(run.recipe, run.model, examples.pairs, run.tokenizer)
        different = len(examples.plan_NP.unique(dim=0))
        run.say(f"start: plans of {len(examples.pairs)} pairs, {different} of them different")
        return {}

    def resume(self, run: Run) -> None:
        run.batches.examples.load_plans(run.checkpoint)

    def meter(self, config: AdaptedConfig) -> PlanMeter:
        return PlanMeter(config.plan_shape)

    def callbacks(self, run: Run) -> list[TrainerCallback]:
        return [HardEM(run)]

    def heldout(self, run: Run) -> Figures:
        return pair_figures(run.model, run.batches.heldout)


class Control(System):
    """The baseline: the base with the same LoRA on the same batches, and no concepts."""

    name = "control"
    refuses = ("distil", "lora.rank = 0")
    unread = UNREAD
    measures = measures.CONTROL

    def pair_examples(self, recipe: Recipe, pairs: PairTensors, tokenizer, base_config):
        longest = longest_text(base_config, bos=True)
        check_length(longest, pairs.source_NU.shape[1], "source_length=", pairs.target_NY.shape[1])
        return PairExamples(recipe, pairs, sink_id(base_config))

    def heldout(self, run: Run) -> Figures:
        if not run.recipe.on_pairs:
            return super().heldout(run)
        return nll_figures(run.model, run.batches.heldout)


class Skip(Control):
    """A baseline without the middle slice."""

    name = "skip"
    refuses = System.refuses
    unread = UNREAD - {"split", "bridge", "concept_learning_rate", "calibration_tokens"}

    def options(self, recipe: Recipe, layers: int) -> dict:
        shallow, middle, _ = split_layers(recipe.split, layers)
        return {"skipped": (shallow, shallow + middle), "bridge": recipe.bridge}

    def start(self, run: Run) -> Figures:
        return run.model.start_bridge(run.batches.calibration_NT) if run.recipe.bridge else {}


class Prune(Control):
    """A baseline without some layers, wherever they are, and with a linear map in each gap: what
    the same compute gives without concepts."""

    name = "prune"
    refuses = System.refuses
    unread = UNREAD - {"leave_out", "concept_learning_rate", "calibration_tokens"}

    def beside(self, recipe: Recipe) -> list[dict[str, Any]]:
        """The numbers of layers on both sides of what the recipe's model runs for a token."""
        base = read_config(resolve(recipe.base)).get_text_config()
        config = SYSTEMS[recipe.system].config(recipe, base.num_hidden_layers)
        config.adopt(base)
        config.check()
        less = round(sum(n * (1 - share) for n, _, share in config.slices(1)), 6)
        return [{"leave_out": n} for n in sorted({math.ceil(less), math.floor(less)} - {0})]

    def start(self, run: Run) -> Figures:
        text_NT = run.batches.calibration_NT
        return run.model.prune(text_NT, run.recipe.leave_out, run.say, run.show)

    def resume(self, run: Run) -> None:
        run.model.leave_out(self.config_class.from_pretrained(run.checkpoint).left_out)


class Window(Control):
    """A baseline that sees the last tokens and the first one, with as much cache as `online`."""

    name = "window"
    refuses = System.refuses
    reads = {"rate", "split", "max_tail", "segment"}
    unread = UNREAD - reads - {"shallow_window"}

    def options(self, recipe: Recipe, layers: int) -> dict:
        # As many tokens as the caches of `online` have rows for at the end of a sequence; the first
        # token, which is always seen, takes one of them.
        named = {key: getattr(recipe, key) for key in self.reads}
        base = {"model_type": "llama", "num_hidden_layers": layers}
        online = OnlineConfig(base, **named | {"split": split_layers(recipe.split, layers)})
        rows = online.cache_share(recipe.sequence_length) * recipe.sequence_length
        return {"window": recipe.shallow_window or max(1, round(rows) - 1)}


SYSTEMS: dict[str, System] = {
    system.name: system
    for system in (Control(), Skip(), Prune(), Window(), Online(), Compressor(), Planner())
}


def system_of(config) -> System:
    """The system of a model's configuration, `base` for a plain base."""
    return SYSTEMS.get(getattr(config, "system", None)) or System()
