"""Recipe → model and token blocks."""

from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoConfig

from sememe.backbone.bases import load_tokenizer, resolve
from sememe.data import block_order, read_texts, token_blocks
from sememe.errors import DataError
from sememe.models import MODELS, CompressorConfig, ControlConfig, OnlineConfig, PlannerConfig
from sememe.models.adapted import AdaptedModel
from sememe.models.configuration import check_split, sink_id
from sememe.models.loading import check_length, longest_text
from sememe.pairs import PairTensors
from sememe.paths import source_sha256
from sememe.training.pairing import PairExamples
from sememe.training.recipe import BASELINES, Recipe


def build_model(recipe: Recipe, folder: Path) -> AdaptedModel:
    """The recipe's system over its base, untrained: identical to the base. `online` still lacks its
    codes."""
    layers = AutoConfig.from_pretrained(folder).get_text_config().num_hidden_layers
    split = recipe.split.resolve(layers)
    shared = {
        "base": recipe.base,
        "lora_rank": recipe.lora.rank,
        "lora_alpha": recipe.lora.alpha,
        "lora_dropout": recipe.lora.dropout,
    }
    if recipe.system == "compressor":
        config = CompressorConfig(
            depth=recipe.depth,
            continuation_share=recipe.continuation_share,
            content=recipe.content,
            **shared,
            **_concepts(recipe),
        )
    elif recipe.system == "planner":
        plan = recipe.plan
        config = PlannerConfig(
            plan_sizes=plan.sizes,
            plan_lengths=plan.lengths,
            parallel=plan.parallel,
            multi_token=plan.multi_token,
            plan_weight=plan.weight,
            plan_dropout=plan.dropout,
            straight_through=plan.straight_through,
            plan_signals=plan.signals,
            code_temperature=recipe.code_temperature,
            plan_max_source=recipe.source_length,
            seed=recipe.seed,
            **shared,
        )
    else:
        check_split(split, layers)
    if recipe.system == "online":
        config = OnlineConfig(
            split=split,
            shallow_window=recipe.shallow_window,
            bridge=recipe.bridge,
            anchor=recipe.anchor,
            overlap=recipe.overlap,
            lora_first=0 if recipe.lora.shallow else split[0],
            **shared,
            **_concepts(recipe),
        )
    elif recipe.system in BASELINES:
        skipped = (split[0], split[0] + split[1]) if recipe.system == "skip" else ()
        window = recipe.window(split) if recipe.system == "window" else None
        config = ControlConfig(
            skipped=skipped, bridge=recipe.bridge and bool(skipped), window=window, **shared
        )
    torch.manual_seed(recipe.seed)
    return MODELS[recipe.system].from_base(config, folder=folder)


def _concepts(recipe: Recipe) -> dict:
    """What a recipe says of concepts that every system with them has."""
    keys = (
        "rate",
        "max_tail",
        "num_concepts",
        "head",
        "boundary",
        "code_temperature",
        "gumbel",
        "pool",
        "gate_noise",
        "concept_dropout",
        "codes_per_concept",
        "shared_map",
        "estimator",
        "usage_weight",
        "commitment_weight",
    )
    return {key: getattr(recipe, key) for key in keys}


def build_blocks(recipe: Recipe, tokenizer) -> tuple[Tensor, Tensor]:
    """(steps · batch_size, T) training blocks in their order, and (N, T) held-out blocks.

    Raises:
        DataError: missing, empty or too short text.
    """
    length, wanted = recipe.sequence_length, recipe.steps * recipe.batch_size
    train = token_blocks(read_texts(recipe.data.train), tokenizer, length, limit=wanted * length)
    heldout = token_blocks(
        read_texts(recipe.data.heldout), tokenizer, length, limit=max(recipe.heldout_tokens, length)
    )
    order = block_order(len(train), recipe.steps, recipe.batch_size, recipe.seed)
    return train[order], heldout


def build_pairs(recipe: Recipe, tokenizer, folder: Path, say) -> tuple[PairExamples, PairTensors]:
    """Examples in their order, of as many pairs as the run can see, and held-out pairs of at least
    `heldout_tokens` target tokens.

    Raises DataError: missing or empty text or fields; more tokens of a pair than the base has
    places for."""
    form = recipe.pairs
    train = form.load(recipe.data.train, tokenizer, most=recipe.steps * recipe.batch_size)
    heldout = form.load(recipe.data.heldout, tokenizer, tokens=recipe.heldout_tokens)
    if cut := train.cut():
        say(f"{recipe.data.train}: {cut}")
    text_config = AutoConfig.from_pretrained(folder).get_text_config()
    longest, (source, target) = (
        longest_text(text_config, opened=True),
        (x.shape[1] for x in (train.source_NU, train.target_NY)),
    )
    if (
        recipe.system == "planner"
    ):  # source and target each stand beside a plan, never beside each other
        beside = 1 + sum(recipe.plan.lengths) + len(recipe.plan.lengths)
        check_length(longest, source, "source_length=", beside)
        check_length(longest, target, "target_length=", beside)
    else:
        check_length(longest, source, "source_length=", target)
    return PairExamples(recipe, train, sink_id(text_config)), heldout


def check_apart(recipe: Recipe) -> None:
    """Raises DataError where the held-out text is the training text."""
    if source_sha256(recipe.data.train) == source_sha256(recipe.data.heldout):
        raise DataError(
            f"{recipe.data.heldout} holds the same bytes as {recipe.data.train}: need held-out "
            "text that is never "
            "trained on. try: another file for data.heldout"
        )


def base_and_tokenizer(recipe: Recipe, say) -> tuple[Path, object]:
    """The folder of the base, and its tokenizer. Raises DataError where the recipe's sequences are
    longer than the base has places for."""
    folder = resolve(recipe.base, say=say)
    if recipe.pairs is None:
        longest = longest_text(
            AutoConfig.from_pretrained(folder), opened=recipe.system == "compressor"
        )
        check_length(longest, recipe.sequence_length, "sequence_length=")
    return folder, load_tokenizer(folder)
