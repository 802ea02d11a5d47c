"""A conversation's cache in a file: another process goes on where this one was (docs/formats.md).

A row's gate, its concepts and its open tail say how many slots each slice has in use, so that a
file's tensors are held to them before any is taken over."""

import hashlib
from pathlib import Path

import safetensors.torch
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sememe import storage
from sememe.concepts.gate import GateState
from sememe.concepts.segments import Tails
from sememe.concepts.writer import Memory
from sememe.errors import CheckpointError, reason

KEY, FORMAT = "sememe", "cache-1"
TRY = "try: read the text again, and save its cache with this model"
TAILS = "tails.states", "tails.position", "tails.real"


def save_cache(cache, ids_BT: Tensor, path: Path) -> None:
    """`ConceptCache.save`."""
    if cache.model_sha256 is None:
        raise CheckpointError(
            "this cache is of a model that no folder holds, so nobody could tell it from another's:"
            " need one that was loaded. try: model.save_pretrained(FOLDER), then "
            "AutoModelForCausalLM.from_pretrained(FOLDER)"
        )
    rows, length = cache.concept_ids.shape
    if not 0 < length <= ids_BT.shape[-1] or ids_BT.shape[:-1] != (rows,):
        raise CheckpointError(
            f"got token ids of shape {tuple(ids_BT.shape)} for a cache of {rows} rows that has "
            f"read {length}: need ({rows}, {max(1, length)} or more), with padding. try: what "
            "generate returned"
        )
    state = {"tokens": ids_BT.long().cpu().contiguous(), **_state(cache)}
    model = cache.model_sha256
    # One entry: safetensors writes several in any order, and equal caches are to be equal files.
    note = {KEY: " ".join([FORMAT, model, _sha256(state, model)])}
    try:
        storage.write(path, safetensors.torch.save(state, note))
    except OSError as error:
        raise storage.unwritable(path, error) from error


def load_cache(model, path: Path) -> tuple:
    """`OnlineForCausalLM.load_cache`."""
    state, theirs, sha256 = _read(path)
    if theirs != model.source_sha256:
        raise CheckpointError(
            f"{path} is of a model with sha256 {theirs[:12]}…, and this one has "
            f"{(model.source_sha256 or 'none')[:12]}…: need the model that read the text. {TRY}"
        )
    if sha256 != _sha256(state, theirs):
        raise CheckpointError(f"{path} is corrupt: need the file as it was saved. {TRY}")
    ids_BT = state.pop("tokens", torch.empty(0))
    cache = _filled(model, state, ids_BT)
    if cache is None:
        raise CheckpointError(
            f"{path} does not fit this model, its dtype or itself: need a file that cache.save "
            f"wrote. {TRY}"
        )
    return cache, ids_BT.to(model.device)


def _read(path: Path) -> tuple[dict[str, Tensor], str, str]:
    """Tensors, and the hashes of their model and of all. Raises CheckpointError where it is no file
    of ours."""
    try:
        if not path.is_file():  # a pipe or a device may never end
            raise FileNotFoundError("no file is there")
        with safe_open(path, "pt") as file:
            note = (file.metadata() or {}).get(KEY, "").split()
            if len(note) != 3 or note[0] != FORMAT:
                raise ValueError(f"its metadata do not say {FORMAT}")
            return {name: file.get_tensor(name) for name in file.keys()}, *note[1:]  # noqa: SIM118
    except (OSError, ValueError, TypeError, SafetensorError) as error:
        raise CheckpointError(
            f"{path} holds no saved cache ({reason(error)}): need a file that cache.save wrote. "
            f"{TRY}"
        ) from error


def _sha256(state: dict[str, Tensor], model: str) -> str:
    """Of all that a file holds, whatever the order of its header."""
    digest = hashlib.sha256(model.encode())
    for name, value in sorted(state.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _state(cache) -> dict[str, Tensor]:
    """What the next token depends on. Slots that are not in use are left out."""
    rows, memory = slice(len(cache.concept_ids)), cache.memory
    state = {f"gate.{name}": torch.from_numpy(x) for name, x in memory.gate._asdict().items()}
    state |= {
        "last_state": memory.last_BD,
        "open_segment": memory.open_segment,
        "last_concept": cache.last_concept_BD,
        "concept_ids": cache.concept_ids,
    }
    states, position, real = cache.tails
    state |= zip(TAILS, (states, position, torch.from_numpy(real)), strict=True)
    for number, part in enumerate(cache.slices):
        used = part.used()
        state[f"position.{number}"] = part.position[rows, :used]
        for layer, stored in part.states.items():
            state[f"layers.{layer}"] = stored[:, rows, :, :used]
    return {name: value.detach().cpu().contiguous() for name, value in state.items()}


@torch.inference_mode()
def _like(model) -> dict[str, Tensor]:
    """Names, dtypes and shapes of this model's, of a text of one token."""
    cache = model.new_cache(1)
    model(torch.tensor([[model.bos]], device=model.device), cache=cache)
    return _state(cache)


def _filled(model, state: dict[str, Tensor], ids_BT: Tensor):
    """The cache of this state; None where it cannot be one of this model."""
    like = _like(model)
    kinds, wanted = ({name: (x.dtype, x.dim()) for name, x in one.items()} for one in (state, like))
    if kinds != wanted:
        return None
    gate = GateState(*(state[f"gate.{name}"].numpy() for name in GateState._fields))
    if not _sound(model, state["concept_ids"], ids_BT, gate):
        return None
    rows = len(gate.tokens)
    cache = model.new_cache(rows)
    cache.use(gate, model.config.shallow_window)
    lengths = {"concept_ids": state["concept_ids"].shape[1]}
    lengths |= dict.fromkeys(TAILS, state[TAILS[0]].shape[1])
    lengths |= {f"position.{number}": part.used() for number, part in enumerate(cache.slices)}
    lengths |= {f"layers.{layer}": part.used() for layer, part in enumerate(cache.layers)}
    for name, value in like.items():
        row, slots = (1, 3) if name.startswith("layers.") else (0, 1)
        shape = list(value.shape)
        shape[row] = rows
        if name in lengths:
            shape[slots] = lengths[name]
        if list(state[name].shape) != shape or not state[name].isfinite().all():
            return None
    open_B = gate.tail if model.config.segment == "both" else 0 * gate.tail
    if (state["tails.real"].sum(1).numpy() != open_B).any():
        return None
    _fill(cache, {name: x.to(model.device) for name, x in state.items()}, gate)
    return cache


def _sound(model, written_BT: Tensor, ids_BT: Tensor, gate: GateState) -> bool:
    """Whether ids and counters can be those of a text."""
    config, (rows, length) = model.config, written_BT.shape
    is_text = ids_BT.dtype == torch.long and ids_BT.dim() == 2
    if not (rows and is_text and all(x.shape == (rows,) for x in gate)):
        return False
    bounds = (
        (ids_BT, 0, config.get_text_config().vocab_size - 1),
        (written_BT, -2, config.num_concepts**config.codes_per_concept - 1),
        (gate.tokens, 0, length),
        (gate.concepts, 0, gate.tokens),
        (gate.tail, 0, gate.normal),
    )
    inside = all(bool(((low <= x) & (x <= high)).all()) for x, low, high in bounds)
    return inside and len(ids_BT) == rows and 0 < length <= ids_BT.shape[1]


def _fill(cache, state: dict[str, Tensor], gate: GateState) -> None:
    cache.memory = Memory(gate, state["last_state"], state["open_segment"])
    cache.last_concept_BD = state["last_concept"]
    cache.concept_ids = state["concept_ids"]
    *tails, real = (state[name] for name in TAILS)
    cache.tails = Tails(*tails, real.cpu().numpy())
    for number, part in enumerate(cache.slices):
        part.position = F.pad(state[f"position.{number}"], (0, 1))
    for layer, part in enumerate(cache.layers):
        part.states[layer] = F.pad(state[f"layers.{layer}"], (0, 0, 0, 1))
