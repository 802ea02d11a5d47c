"""A compressor by name or from memory, ready for use, with what tells it from all others."""

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file

from sememe.compression.codes import Codes, Writer
from sememe.errors import CheckpointError, CodesError
from sememe.models import CompressorConfig, CompressorForCausalLM
from sememe.models.adapted import MANIFEST, WEIGHTS, check_manifest
from sememe.models.loading import (
    load_model,
    load_tokenizer,
    longest_text,
    model_folder,
    read_config,
    resolve,
    set_rate,
    tokenizer_folder,
)

WINDOW = 512  # tokens, where no run says what its model was trained on


@dataclass
class Opened:
    """A compressor ready for use, and what tells it from others. `window`: tokens of the texts that
    it was trained on."""

    model: CompressorForCausalLM
    tokenizer: Any
    writer: Writer
    window: int

    @property
    def longest(self) -> int:
        """Tokens that fit behind the BOS."""
        return longest_text(self.model.config)


@contextlib.contextmanager
def opened(
    model,
    tokenizer=None,
    base: str | None = None,
    rate: float | None = None,
    check: Callable[[Writer], None] = lambda writer: None,
) -> Iterator[Opened]:
    """A compressor from a folder or from memory, in eval mode; one in memory is left as it was.
    `check` may refuse it before anything large is read. Raises CheckpointError for anything
    else."""
    if not isinstance(model, (str, Path)):
        if not isinstance(model, CompressorForCausalLM):
            raise not_ours(type(model).__name__)
        folder = kept_in(model)
        if tokenizer is None and folder is None and model.config.base is None:
            raise CheckpointError(
                "this model is in no folder and names no base: need a tokenizer for it. try: "
                "tokenizer=…"
            )
        writer = writer_of(
            model.config,
            model.config.name_or_path or type(model).__name__,
            weights_sha256(model, folder),
        )
        check(writer)
        if tokenizer is None:
            place = (
                resolve(base or model.config.base)
                if folder is None
                else tokenizer_folder(folder, model.config, base)
            )
            tokenizer = load_tokenizer(place)
        training, asked = model.training, model.config.rate
        try:
            if rate is not None:
                set_rate(model.config, rate, writer.name)
            yield Opened(model.eval(), tokenizer, writer, trained_window(folder))
        finally:
            model.config.rate = asked
            model.train(training)
        return
    folder = model_folder(model)
    config = read_config(folder) if folder is not None else None
    if not isinstance(config, CompressorConfig):
        raise not_ours(model)
    check_manifest(folder)
    writer = writer_of(config, str(model), saved_sha256(folder))
    check(writer)
    loaded, found = load_model(model, base=base, rate=rate)
    yield Opened(loaded, tokenizer or found, writer, trained_window(folder))


def not_ours(what: Any) -> CheckpointError:
    return CheckpointError(
        f"{what} is no compressor: need a run of system: compressor, or its saved model. "
        "try: sememe train RECIPE system=compressor --out runs/compressor"
    )


def writer_of(config: CompressorConfig, name: str, weights: str) -> Writer:
    return Writer(
        name=name, weights_sha256=weights, base=config.base, base_sha256=config.base_sha256
    )


def saved_sha256(folder: Path) -> str:
    return json.loads((folder / MANIFEST).read_text(encoding="utf-8"))[WEIGHTS]


def kept_in(model: CompressorForCausalLM) -> Path | None:
    """The folder that a model in memory was loaded from, as long as it still equals what is saved
    there."""
    folder = Path(model.config.name_or_path or "")
    if not (folder / MANIFEST).is_file():
        return None
    check_manifest(folder)
    saved, own = load_file(folder / WEIGHTS), model.own_state()
    same = saved.keys() == own.keys() and all(
        torch.equal(saved[k].float(), own[k].float().cpu()) for k in saved
    )
    return folder if same else None


def weights_sha256(model: CompressorForCausalLM, folder: Path | None) -> str:
    """That of the saved file, or of a model that is in none: of its tensors."""
    if folder is not None:
        return saved_sha256(folder)
    digest = hashlib.sha256()
    for name, value in sorted(model.own_state().items()):
        digest.update(name.encode() + value.float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def trained_window(folder: Path | None) -> int:
    """The `sequence_length` of the run that a saved model is in, else 512."""
    recipe = Path() if folder is None else folder.parent / "recipe.yaml"
    if not recipe.is_file():
        return WINDOW
    return (yaml.safe_load(recipe.read_text(encoding="utf-8")) or {}).get("sequence_length", WINDOW)


def check_writer(codes: Codes, writer: Writer) -> None:
    """Raises CodesError where another model than `writer` made the codes."""
    if (codes.model.weights_sha256, codes.model.base_sha256) != (
        writer.weights_sha256,
        writer.base_sha256,
    ):
        raise CodesError(
            f"these codes are of {codes.model.name} (weights sha256 "
            f"{codes.model.weights_sha256[:12]}…), but {writer.name} has "
            f"{writer.weights_sha256[:12]}…: need the model that wrote them. try: "
            f"{codes.model.name} as it was then"
        )
