"""Save → load → same logits; the wrong base, a flipped bit and a full disk are refused."""

import errno
import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import sememe  # noqa: F401
from families import online_over, tiny_base
from sememe.backbone.bases import KNOWN
from sememe.errors import CheckpointError, SememeError
from sememe.models import ControlConfig, ControlForCausalLM, OnlineForCausalLM
from sememe.models import adapted as adapted_module
from sememe.models.loading import export_model, load_model, model_folder, shipped
from sememe.storage import check_manifest, write_manifest

IDS = torch.randint(3, 250, (2, 24), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model(base_folder):
    return online_over(base_folder, IDS)


@pytest.fixture
def folder(model, base_folder, tmp_path):
    return saved(model, base_folder, tmp_path / "m")


def saved(model, base_folder, folder):
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base_folder).save_pretrained(folder)
    return folder


def test_auto_classes_load_the_same_model(model, folder):
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert isinstance(loaded, OnlineForCausalLM) and not loaded.training
    out, want = loaded(IDS), model(IDS)
    assert torch.equal(out.logits, want.logits) and torch.equal(out.concept_ids, want.concept_ids)
    config = json.loads((folder / "config.json").read_text())
    assert not config["text_config"].get("_name_or_path"), "a folder of this machine"
    small = sum(p.numel() for p in model.parameters() if p.requires_grad) * 4
    assert (folder / "model.safetensors").stat().st_size < small * 1.2 + 20_000, "own weights only"


@pytest.mark.parametrize("head", ["nearest", "joint"])
def test_rounded_weights_and_every_codebook_are_what_is_saved(base_folder, tmp_path, head):
    model = online_over(base_folder, IDS, head=head, codes_per_concept=2)
    before = model(IDS).logits
    model.round_own_weights()
    loaded = AutoModelForCausalLM.from_pretrained(saved(model, base_folder, tmp_path / "m"))
    out = loaded(IDS)
    assert torch.equal(out.logits, model(IDS).logits) and not torch.equal(out.logits, before)
    assert torch.equal(out.concept_ids, model(IDS).concept_ids) and int(out.concept_ids.max()) >= 16


def test_merged_model_needs_no_base(model, folder, tmp_path):
    want = model(IDS).logits
    merged, size = export_model(folder, tmp_path / "merged")
    loaded = AutoModelForCausalLM.from_pretrained(merged)
    assert json.loads((merged / "config.json").read_text())["base"] is None
    # Folding LoRA reorders sums: 5e-6 seen.
    torch.testing.assert_close(loaded(IDS).logits, want, atol=1e-4, rtol=0)
    assert size > 4 * sum(p.numel() for p in model.backbone.parameters()) * 0.9
    with pytest.raises(SememeError, match="Directory not empty"):
        export_model(folder, merged)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"skipped": (1, 3)},
        {"skipped": (1, 3), "bridge": True},
        {"left_out": [1, 3], "bridge": True},
        {"window": 3},
    ],
)
def test_baselines_round_trip(base_folder, tmp_path, settings):
    model = ControlForCausalLM.from_base(ControlConfig(base=str(base_folder), **settings)).eval()
    loaded = AutoModelForCausalLM.from_pretrained(saved(model, base_folder, tmp_path / "c"))
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    base = AutoModelForCausalLM.from_pretrained(base_folder)
    assert torch.equal(model(IDS).logits, base(IDS).logits) == (not settings), "LoRA starts at zero"


def test_a_skip_of_an_older_release_loads(base_folder, tmp_path):
    """Its bridge was one of a concept model, whose part for concepts stayed 0."""
    config = ControlConfig(base=str(base_folder), skipped=(1, 3), bridge=True)
    model = ControlForCausalLM.from_base(config).eval()
    model.bridge[0].shallow.weight.data.normal_(std=0.1)
    folder = saved(model, base_folder, tmp_path / "old")
    state = load_file(folder / "model.safetensors")
    state = {name.replace("bridge.0.", "bridge."): value for name, value in state.items()}
    state |= {f"bridge.concept{name}": torch.zeros(3) for name in (".weight", "_mean", "_scale")}
    save_file(state, folder / "model.safetensors")
    write_manifest(folder)
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)


def test_wrong_base_is_refused(base_folder, folder, tmp_path, monkeypatch):
    other = tmp_path / "other"
    saved(tiny_base(seed=9, vocab_size=259), base_folder, other)
    said = rf"trained on base .{re.escape(str(base_folder))}.*need the same weights"
    monkeypatch.setenv("SEMEME_BASE", str(other))
    with pytest.raises(CheckpointError, match=said):
        load_model(folder)


@pytest.mark.parametrize(
    "name, change, said",
    [
        ("model.safetensors", lambda raw: raw[:-1] + bytes([raw[-1] ^ 1]), "is corrupt"),
        ("config.json", lambda raw: raw.replace(b": 16,", b": 20,"), "config.json is corrupt"),
        ("manifest.json", None, "holds no finished model"),
        ("config.json", None, "holds no model"),
    ],
)
def test_a_harmed_model_is_refused(folder, name, change, said):
    raw = (folder / name).read_bytes()
    (folder / name).unlink()
    if change:
        assert change(raw) != raw
        (folder / name).write_bytes(change(raw))
    with pytest.raises(CheckpointError, match=said):
        load_model(folder)


def test_full_disk_leaves_nothing_half_written(model, folder, monkeypatch):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def full(state, path, metadata):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(adapted_module, "save_file", full)
    with pytest.raises(SememeError, match="No space left"):
        model.save_pretrained(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_reference_models_are_whole_small_and_described():
    assert "smollm2-135m-online" in shipped()
    for name, folder in shipped().items():
        assert model_folder(name) == folder
        check_manifest(folder)
        assert (folder / "model.safetensors").stat().st_size <= 16_000_000
        config = AutoConfig.from_pretrained(folder)
        config.check()
        assert config.base in KNOWN and config.base_sha256
        card = (folder / "README.md").read_text()
        assert all(word in card for word in ("Licence", "Data", "Limits", "Δ control"))
