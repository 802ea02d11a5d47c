"""A model for use: from a run folder, a saved model folder, or a plain base."""

import shutil
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from sememe.backbone.bases import load_base, load_tokenizer, resolve
from sememe.errors import CheckpointError, DataError, RecipeError
from sememe.models.adapted import AdaptedModel
from sememe.models.configuration import AdaptedConfig, CompressorConfig, ConceptConfig
from sememe.paths import existing, usable

SHIPPED = Path(__file__).parents[1] / "reference"


def shipped() -> dict[str, Path]:
    """Reference models that come with the package: name → folder with adapters and model card,
    without the base."""
    return {
        folder.name: folder
        for folder in sorted(SHIPPED.glob("*"))
        if (folder / "config.json").is_file()
    }


def model_folder(model: str | Path) -> Path | None:
    """The folder of a saved model: RUN/model, the folder itself, or that of a name in `shipped`;
    None where `model` is none of ours.

    Raises:
        CheckpointError: a run that has not finished, or an empty folder."""
    path = existing(model)
    if path is None:
        return shipped().get(str(model))
    if (path / "recipe.yaml").is_file():
        if not (path / "model" / "config.json").is_file():
            raise CheckpointError(
                f"{path} is a run that has not finished: need RUN/model. try: sememe train "
                f"{path}/recipe.yaml --out {path}"
            )
        return path / "model"
    if path.is_dir() and not (path / "config.json").is_file():
        raise CheckpointError(
            f"{path} holds no model: need a run folder or a saved model. try: sememe train … --out "
            f"{path}"
        )
    return path if path.is_dir() else None


def read_config(folder: Path):
    """The configuration of a saved model or base. Raises CheckpointError where there is none."""
    try:
        return AutoConfig.from_pretrained(folder)
    except (ValueError, OSError) as error:
        raise CheckpointError(
            f"{folder}/config.json cannot be read ({str(error).splitlines()[0]}): need a saved "
            "model. try: RUN/model"
        ) from error


def load_model(
    model: str | Path,
    *,
    merge: bool = True,
    dtype: torch.dtype = torch.float32,
    attention: str = "sdpa",
    base: str | None = None,
    rate: float | None = None,
) -> tuple[PreTrainedModel, object]:
    """(model in eval mode, tokenizer). `merge` folds LoRA into the weights: the same function with
    fewer matmuls. `rate` is the dial: concepts per token to run at, instead of the rate that was
    trained for.

    Raises:
        CheckpointError: not a model, corrupt, over another base, or without concepts where `rate`
            is given.
        RecipeError: a rate that this model cannot hold.
        BaseError: `model` is neither a folder nor a base that can be had."""
    folder = model_folder(model)
    if folder is None:
        folder = resolve(str(model))
    config = read_config(folder)
    if rate is not None:
        check_rate(config, rate, model)  # refused before anything large is read
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if not isinstance(config, AdaptedConfig):
        return load_base(folder, dtype=dtype, attn_implementation=attention).to(
            device
        ).eval(), load_tokenizer(folder)
    extra = {"base_from": base} if base else {}
    loaded = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation=attention, **extra
    )
    if (
        merge
        and isinstance(loaded, AdaptedModel)
        and loaded.foldable
        and loaded.config.base is not None
    ):
        loaded.merged()
    if rate is not None:
        loaded.dial.rate = rate
    return loaded.to(device).eval(), load_tokenizer(tokenizer_folder(folder, config, base))


def tokenizer_folder(folder: Path, config, base: str | None = None) -> Path:
    """Where a saved model's tokenizer is: beside it, or for one that was saved without at its
    base."""
    return (
        folder
        if (folder / "tokenizer.json").is_file() or not config.base
        else resolve(base or config.base)
    )


def longest_text(config, opened: bool | None = None) -> int:
    """Tokens of a text that a model, or base, has places for. `opened`: a BOS takes one of them;
    default: as the compressor."""
    opened = isinstance(config, CompressorConfig) if opened is None else opened
    return config.get_text_config().max_position_embeddings - opened


def check_length(longest: int, tokens: int, option: str, more: int = 0) -> None:
    """Raises DataError where a text of `tokens` (at least 1), and `more` behind it, go beyond the
    `longest` that the base has places for: what a model says there means nothing. `option`: what a
    user sets `tokens` with."""
    most = max(1, longest - more)
    if not 1 <= tokens <= longest - more:
        behind = f" and {more} behind them" if more else ""
        raise DataError(
            f"got {tokens} tokens of text{behind}, and this base has places for {longest}: need 1 "
            f"to {most}. "
            f"try: {option}{most}"
        )


def check_rate(config, rate: float, model: str | Path) -> None:
    """Whether the dial of a model of this configuration may stand at `rate`: the gate holds any
    rate that `max_tail` allows from the scores it has (`concepts/gate.py`).

    Raises:
        CheckpointError: `config` is that of a model without concepts.
        RecipeError: a rate outside (0, 1], or below what the forced concepts alone make."""
    if not isinstance(config, ConceptConfig):
        raise CheckpointError(
            f"{model} has no concepts to set a rate for: need a run of system: online. try: "
            "without --rate"
        )
    least = 1 / (config.max_tail + 1)
    if not least - 1e-9 <= rate <= 1:
        raise RecipeError(
            f"rate = {rate:g}: need from {least:.3g} to 1 concepts per token, because {model} "
            "forces one after max_tail = "
            f"{config.max_tail} tokens without. try: --rate {max(config.rate, least):.3g}"
        )


def export_model(model: str | Path, to: Path, base: str | None = None) -> tuple[Path, int]:
    """Writes the merged model and its tokenizer to a new folder; returns it and its bytes."""
    to = usable(to)
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise CheckpointError(f"{to} is not empty: need a new or empty folder. try: --to {to}-2")
    loaded, tokenizer = load_model(model, base=base)
    if not isinstance(loaded, AdaptedModel):
        raise CheckpointError(
            f"{model} is a plain base: need a trained model to merge. try: runs/demo"
        )
    if not loaded.foldable:
        loaded.merged()  # says why not
    temporary = to.absolute().with_name(to.absolute().name + ".tmp")  # of `.` too
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        loaded.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        if to.exists():
            to.rmdir()
        temporary.rename(to)
    except (OSError, CheckpointError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(
            f"could not write {to} ({error.strerror}): need free space. try: another --to"
        ) from error
    return to, sum(p.stat().st_size for p in to.iterdir())
