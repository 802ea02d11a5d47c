"""What a speed sweep times, by name: a concept model at any rate and split of a grid, and the
unmodified base beside it."""

import copy
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from sememe.backbone.split import self_check
from sememe.errors import CheckpointError
from sememe.evaluation.files import base_beside
from sememe.models.adapted import MANIFEST, WEIGHTS
from sememe.models.configuration import AdaptedConfig, OnlineConfig
from sememe.models.loading import (
    load_base,
    load_model,
    load_tokenizer,
    model_folder,
    read_config,
    resolve,
)
from sememe.models.online import OnlineForCausalLM

Split = tuple[int, int, int]


@dataclass(frozen=True)
class Subject:
    """`config`: that of a saved model with concepts, None for a plain base. `layers`, `places`: of
    the base, which reads at most so many tokens. `weights`: sha256 of a saved model."""

    model: str
    config: OnlineConfig | None
    base_name: str
    base_folder: Path
    layers: int
    places: int
    weights: str | None


def find_subject(model: str, base: str | None = None) -> Subject:
    """What `model` names: a run, a saved or a reference model, or a plain base. Reads no weights.

    Raises:
        CheckpointError: a model without concepts, one that is merged and names no base, or an
            unreadable one.
        BaseError: there is no such model or base."""
    folder = model_folder(model)
    config = read_config(folder if folder is not None else resolve(model))
    if not isinstance(config, AdaptedConfig):
        source = resolve(base or model)
        return Subject(model, None, base or model, source, *_sizes(read_config(source)), None)
    if not isinstance(config, OnlineConfig):
        raise CheckpointError(
            f"{model} has no concepts: need a run of system: online, or a base. try: {config.base}"
        )
    named = base_beside(model, config, base)
    return Subject(model, config, named, resolve(named), *_sizes(config), _weights(folder))


def _weights(folder: Path) -> str | None:
    """As the manifest has it; loading is what checks it."""
    try:
        return json.loads((folder / MANIFEST).read_text(encoding="utf-8")).get(WEIGHTS)
    except (OSError, ValueError):
        return None


def _sizes(config) -> tuple[int, int]:
    text = config.get_text_config()
    return text.num_hidden_layers, text.max_position_embeddings


class Bench:
    """Both sides in memory. `plain`: the base. `at`: the model with concepts, at a split and rate.

    Args:
        trained: time the saved model itself; else untrained ones over the very modules of `plain`,
            with random codes and a concept every 1 / rate tokens: what they write makes no
            difference to their speed.
        rates: all that will be asked for."""

    def __init__(
        self,
        subject: Subject,
        trained: bool,
        rates: Sequence[float],
        dtype: torch.dtype,
        base: str | None = None,
    ):
        self.subject, self.rates = subject, rates
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.plain = load_base(subject.base_folder, dtype=dtype).to(self.device).eval()
        self.tokenizer = load_tokenizer(subject.base_folder)
        self._split, self._model = None, None
        if trained:
            self._split, self._model = (
                tuple(subject.config.split),
                load_model(subject.model, dtype=dtype, base=base)[0],
            )
        else:
            self_check(self.plain)

    def at(self, split: Split, rate: float) -> OnlineForCausalLM:
        """The model to time, in eval mode; one at a time."""
        if self._split != split:
            self._split, self._model = (
                split,
                untrained(self.plain, split, self.rates, self.subject.config),
            )
        self._model.config.rate = rate
        return self._model


def untrained(
    plain, split: Split, rates: Sequence[float], like: OnlineConfig | None = None
) -> OnlineForCausalLM:
    """An online model around `plain` itself, which stays as it is: no LoRA, random codes, a concept
    every 1 / rate tokens. `like`: a model whose head, codes, bridge and whatever else costs time it
    shares; else a recipe's defaults."""
    config = (
        OnlineConfig(head="nearest", codes_per_concept=2, bridge=True)
        if like is None
        else copy.deepcopy(like)
    )
    config.adopt(copy.deepcopy(plain.config))
    config.base = config.base_sha256 = None  # as a merged model: the weights are in it
    config.split, config.rate, config.boundary, config.shared_map, config.lora_rank = (
        list(split),
        max(rates),
        "fixed",
        False,
        0,
    )
    config.max_tail = max(
        16, round(1 / min(rates))
    )  # never forces a concept: the stride is shorter
    config._attn_implementation = plain.config._attn_implementation
    torch.manual_seed(0)
    model = OnlineForCausalLM(config, plain).to(plain.device).eval()
    for p in model.bridge.parameters() if model.bridge is not None else ():
        p.data = p.data.to(plain.dtype)  # as loading does: they multiply states
    ids_BT = (
        torch.arange(1, 65, device=plain.device).view(2, 32)
        % plain.config.get_text_config().vocab_size
    )
    with torch.no_grad():  # codes of the size of the states that they replace
        model.codes.start_frame(model.shallow_states(ids_BT).flatten(0, 1))
    return model
