"""Base models: name | folder | Hub id → local safetensors folder → fingerprint, model,
tokenizer."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sememe.backbone.pulling import (
    KNOWN,
    WEIGHTS,
    KnownBase,
    Say,
    _is_complete,
    _known_names,
    _line,
    _manifest,
    _quiet,
    _sha256,
    _tell,
    home,
    pull,
)
from sememe.errors import BaseError
from sememe.paths import existing, shown

if TYPE_CHECKING:  # transformers takes seconds to import: a wrong name must not cost them
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "KNOWN",
    "KnownBase",
    "fingerprint",
    "home",
    "load_base",
    "load_tokenizer",
    "pull",
    "resolve",
]

HUB_FILES = [
    "*.safetensors",
    "*.json",
    "*.jinja",
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "*.tiktoken",
]
HUB_TIMEOUT_S = 5


def resolve(base: str, pull_missing: bool = True, say: Say = _tell) -> Path:
    """The local folder of a base: a known name (pulled when missing), a folder, or a Hub id
    'org/name'.

    With `pull_missing` off nothing is downloaded. Raises BaseError when there is no such base, when
    it is incomplete, or when it has no safetensors weights."""
    if base in KNOWN:
        folder = home() / "bases" / base
        if not pull_missing and not _is_complete(folder, base):
            raise BaseError(
                f"base {base!r} is not on this machine: need it pulled. try: sememe pull {base}"
            )
        return pull(base, say=say)
    path = existing(base) if base else None  # Path('') is the current folder
    if path is not None and path.is_dir():
        return _checked(path)
    if path is not None or not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", base, re.ASCII):
        raise BaseError(
            f"base {shown(base)!r} is neither a known base, nor a local folder, nor a Hub id like "
            f"'org/name': {_known_names(base)}, or base=/path/to/folder"
        )
    return _checked(_from_hub(base, pull_missing, say))


def _from_hub(repo: str, download: bool, say: Say) -> Path:
    import huggingface_hub as hub
    from huggingface_hub.errors import RepositoryNotFoundError

    wanted: dict[str, Any] = {
        "allow_patterns": HUB_FILES,
        "ignore_patterns": ["*/*", "consolidated*"],
    }
    why = "nothing was asked of it"
    if download:
        try:
            # Asked first because snapshot_download has no timeout for its first question and can
            # hang.
            hub.HfApi().model_info(repo, timeout=HUB_TIMEOUT_S)
            say(f"fetching {repo} from the Hub")
            return Path(hub.snapshot_download(repo, **wanted))
        except RepositoryNotFoundError as fault:  # GatedRepoError is one too
            raise BaseError(
                f"base {repo!r} is neither a known base, nor a local folder, and on the Hub it "
                "is unknown, private or gated: need a public id, or a login that may read it. "
                "try: hf auth login, or base=/path/to/folder"
            ) from fault
        except Exception as fault:
            why = _line(fault)
    try:
        return Path(hub.snapshot_download(repo, local_files_only=True, **wanted))
    except Exception as fault:
        raise BaseError(
            f"base {repo!r} is neither a known base, nor a local folder, and the Hub could not "
            f"be reached ({why}): need a network connection or a cached copy. "
            f"try: sememe pull {next(iter(KNOWN))}, or base=/path/to/folder"
        ) from fault


def _checked(folder: Path) -> Path:
    """The folder, if it holds config.json and all its safetensors files."""
    if not (folder / "config.json").is_file():
        raise BaseError(
            f"{folder} has no config.json: need a base in the Hugging Face layout. "
            "try: base=/path/to/folder, or a known base"
        )
    here = {path.name for path in _safetensors(folder)}
    with contextlib.suppress(
        OSError, ValueError, KeyError, AttributeError, TypeError
    ):  # loading says so
        index = json.loads((folder / f"{WEIGHTS}.index.json").read_text(encoding="utf-8"))
        if missing := sorted(set(index["weight_map"].values()) - here):
            raise BaseError(
                f"{folder} is incomplete, {missing[0]} is missing: need every file that "
                f"{WEIGHTS}.index.json names. try: download the base again"
            )
    return folder


def _safetensors(folder: Path) -> list[Path]:
    files = sorted(Path(folder).glob("*.safetensors"), key=lambda path: path.name)
    if not files:
        raise BaseError(
            f"{folder} has no *.safetensors file: need safetensors weights. "
            "try: a base that has them, or convert it with save_pretrained"
        )
    return files


def fingerprint(folder: Path) -> str:
    """The sha256 of a base's weights: of the lines `sha256sum *.safetensors` prints, so a shell can
    check it.

    Raises BaseError when there are no weights or they cannot be read."""
    try:
        lines = [f"{_sha256(path)}  {path.name}\n" for path in _safetensors(Path(folder))]
    except OSError as fault:
        raise BaseError(
            f"the weights in {folder} cannot be read ({_line(fault)}): need readable files. "
            "try: check their permissions, or download the base again"
        ) from fault
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def load_base(
    folder: Path, dtype: torch.dtype = torch.float32, attn_implementation: str = "sdpa"
) -> PreTrainedModel:
    """The base as transformers loads it, every weight from its files.

    Raises BaseError for an unknown architecture, corrupt files, missing weights, or weights that
    differ from the folder's own manifest."""
    folder = _checked(Path(folder))
    _verify(folder)
    from transformers import AutoModelForCausalLM

    try:
        with _quiet():
            model, info = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=dtype,
                attn_implementation=attn_implementation,
                output_loading_info=True,
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
            )
    except (
        Exception
    ) as fault:  # OSError, ValueError, KeyError, SafetensorError, … by what is wrong with it
        raise BaseError(
            f"base {folder} cannot be loaded ({_line(fault)}): need intact files of a decoder "
            "that transformers knows. try: download it again, or another base"
        ) from fault
    if missing := sorted(info["missing_keys"]):  # transformers would fill these with random numbers
        raise BaseError(
            f"base {folder} lacks {len(missing)} weights, the first is {missing[0]}: need all of "
            "them. try: download it again"
        )
    return model


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The base's tokenizer. Raises BaseError when the folder has none that can be read."""
    from transformers import AutoTokenizer

    try:
        with _quiet():
            return AutoTokenizer.from_pretrained(
                Path(folder), local_files_only=True, trust_remote_code=False
            )
    except Exception as fault:
        raise BaseError(
            f"{folder} has no tokenizer that can be loaded ({_line(fault)}): need tokenizer.json "
            "or its like beside the weights. try: download the base again"
        ) from fault


def _verify(folder: Path) -> None:
    """A flipped bit in a safetensors file loads without a word; the manifest of a pulled base finds
    it."""
    kept, weights = _manifest(folder), folder / WEIGHTS
    if kept and weights.is_file() and (got := _sha256(weights)) != kept["sha256"]:
        raise BaseError(
            f"{weights} has sha256 {got[:12]}…, its manifest says {kept['sha256'][:12]}…: need "
            f"the weights as pulled. try: delete the folder, then sememe pull {kept['name']}"
        )
