"""A model for use: from a run folder, a saved model folder, or a plain base."""

import os
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from sememe import storage
from sememe.backbone.bases import base_of, load_base, load_tokenizer, read_config, resolve
from sememe.errors import CheckpointError, DataError, RecipeError, SememeError, reason
from sememe.models.adapted import default_device
from sememe.paths import existing, usable

SHIPPED = Path(__file__).parents[1] / "reference"


def shipped() -> dict[str, Path]:
    """Reference models that come with the package: name → folder with adapters and model card,
    without the base."""
    return {path.parent.name: path.parent for path in sorted(SHIPPED.glob("*/config.json"))}


def model_folder(model: str | Path) -> Path | None:
    """The folder of a saved model: RUN/model, the folder itself, or that of a name in `shipped`;
    None where `model` is none of ours.

    Raises:
        CheckpointError: a run that has not finished, or an empty folder."""
    path = existing(model)
    if path is None:
        return shipped().get(str(model))
    if not path.is_dir():
        return None
    folder = path / "model" if (path / "recipe.yaml").is_file() else path
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            f"{path} holds no model: need a finished run or a saved model. try: sememe train "
            f"RECIPE --out {path}"
        )
    return folder


def load_model(
    model: str | Path, *, merge: bool = True, dtype: torch.dtype = torch.float32
) -> tuple[PreTrainedModel, object]:
    """(model in eval mode, tokenizer). `merge` folds LoRA into the weights: the same function with
    fewer matmuls. Not into those of 8 or 4 bits, which would become large.

    Raises:
        CheckpointError: not a model, corrupt, or over another base.
        BaseError: `model` is neither a folder nor a base that can be had."""
    folder = model_folder(model) or resolve(str(model))
    config = read_config(folder)
    load = _load_own if hasattr(config, "system") else load_base
    loaded = load(folder, dtype=dtype)
    if merge and getattr(loaded, "foldable", False) and not loaded.config.base_bits:
        loaded.merged()
    return loaded.to(default_device()).eval(), load_tokenizer(tokenizer_folder(folder, config))


def _load_own(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    try:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, trust_remote_code=False)
    except SememeError:
        raise
    except Exception as error:  # what transformers and torch make of a configuration or weights
        raise CheckpointError(
            f"{folder} cannot be loaded ({reason(error)}): need the files of a model as they were "
            "saved together. try: RUN/model, or to train it again"
        ) from error


def tokenizer_folder(folder: Path, config) -> Path:
    """Where a model's tokenizer is: beside it, or for one that was saved without at its base."""
    base = getattr(config, "base", None)
    return folder if base is None or (folder / "tokenizer.json").is_file() else base_of(base)


def longest_text(config, bos: bool | None = None) -> int:
    """Tokens of a text that a model, or base, has positions for. `bos`: one of them is taken by the
    BOS; default: as for this model."""
    bos = getattr(config, "opens_with_bos", False) if bos is None else bos
    return config.get_text_config().max_position_embeddings - bos


def check_length(longest: int, tokens: int, option: str, more: int = 0) -> None:
    """Raises DataError where a text of `tokens` (at least 1), and `more` beside it, goes beyond the
    `longest` that the base has positions for: what a model says there means nothing. `option`: what
    a user sets `tokens` with."""
    if not 1 <= tokens <= longest - more:
        limit = max(1, longest - more)
        raise DataError(
            f"got {tokens} tokens of text and {more} beside them, and this base has positions for "
            f"{longest}: need 1 to {limit}. try: {option}{limit}"
        )


def check_rate(config, rate: float, model: str | Path) -> None:
    """Whether the dial of a model of this configuration may stand at `rate`: the gate holds any
    rate that `max_tail` allows from the scores it has (`concepts/gate.py`).

    Raises:
        CheckpointError: `config` is that of a model without concepts.
        RecipeError: a rate outside (0, 1], or below what the forced concepts alone make."""
    if not getattr(config, "writes_concepts", False):
        raise CheckpointError(
            f"{model} has no concepts to set a rate for: need a run of system: online. try: "
            "without --rate"
        )
    lowest = 1 / (config.max_tail + 1)
    if not lowest - 1e-9 <= rate <= 1:
        raise RecipeError(
            f"rate = {rate:g}: need from {lowest:.3g} to 1 concepts per token, because {model} "
            f"forces one after max_tail = {config.max_tail} tokens without. try: another --rate"
        )


def export_model(model: str | Path, to: Path) -> tuple[Path, int]:
    """Writes the merged model and its tokenizer to a new folder; returns it and its bytes."""
    to = usable(to)
    loaded, tokenizer = load_model(model, merge=False)
    if not hasattr(loaded, "merged"):
        raise CheckpointError(
            f"{model} is a plain base: need a trained model to merge. try: runs/demo"
        )
    loaded.merged()
    try:
        to.parent.mkdir(parents=True, exist_ok=True)
        temporary = tempfile.TemporaryDirectory(dir=to.parent, prefix=f".{to.name}-")
        with temporary as work, storage.writing(to):  # tokenizers raise faults of their own
            folder = Path(work, "model")
            tokenizer.save_pretrained(folder)
            loaded.save_pretrained(folder)  # and the manifest of all, last
            os.replace(folder, to)  # onto an empty folder, too
    except OSError as error:
        raise storage.unwritable(to, error) from error
    return to, sum(path.stat().st_size for path in to.iterdir())
