"""Save → load → same logits; the wrong base, a flipped bit and a full disk are refused."""

import errno
import json
import re

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, pipeline

import sememe  # noqa: F401
from families import online_over, tiny_base
from sememe.backbone.bases import KNOWN
from sememe.errors import CheckpointError, SememeError
from sememe.models import ControlConfig, ControlForCausalLM, OnlineForCausalLM
from sememe.models import adapted as adapted_module
from sememe.models.loading import export_model, load_model, model_folder, shipped
from sememe.storage import check_manifest

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
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    assert torch.equal(loaded(IDS).concept_ids, model(IDS).concept_ids)
    config = json.loads((folder / "config.json").read_text())
    assert not config["text_config"].get("_name_or_path"), "a folder of this machine"
    small = sum(p.numel() for p in model.parameters() if p.requires_grad) * 4
    assert (folder / "model.safetensors").stat().st_size < small * 1.2 + 20_000, "own weights only"
    pipe = pipeline("text-generation", loaded, tokenizer=AutoTokenizer.from_pretrained(folder))
    (made,) = pipe("the cat", max_new_tokens=4, do_sample=False)
    assert made["generated_text"].startswith("the cat")


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
    "settings", [{}, {"skipped": (1, 3)}, {"skipped": (1, 3), "bridge": True}, {"window": 3}]
)
def test_baselines_round_trip(base_folder, tmp_path, settings):
    model = ControlForCausalLM.from_base(ControlConfig(base=str(base_folder), **settings)).eval()
    loaded = AutoModelForCausalLM.from_pretrained(saved(model, base_folder, tmp_path / "c"))
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    for beams in (1, 3):
        greedy = {"num_beams": beams, "max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
        uncached = model.generate(IDS, **greedy, use_cache=False)
        assert torch.equal(loaded.generate(IDS, **greedy), uncached)
    base = AutoModelForCausalLM.from_pretrained(base_folder)
    assert torch.equal(model(IDS).logits, base(IDS).logits) == (not settings), "LoRA starts at zero"


def test_wrong_base_is_refused(base_folder, folder, tmp_path, monkeypatch):
    other = tmp_path / "other"
    saved(tiny_base(seed=9, vocab_size=259), base_folder, other)
    said = rf"trained on base .{re.escape(str(base_folder))}.*need the same weights"
    monkeypatch.setenv("SEMEME_BASE", str(other))
    with pytest.raises(CheckpointError, match=said):
        load_model(folder)


def flip_a_bit(folder):
    raw = bytearray((folder / "model.safetensors").read_bytes())
    raw[-3] ^= 1
    (folder / "model.safetensors").write_bytes(raw)


def change_the_configuration(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_concepts": 20}))


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (flip_a_bit, "is corrupt"),
        (change_the_configuration, "does not fit its configuration"),
        (lambda folder: (folder / "manifest.json").unlink(), "holds no finished model"),
        (lambda folder: (folder / "config.json").unlink(), "holds no model"),
    ],
)
def test_a_harmed_model_is_refused(folder, harm, said):
    harm(folder)
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
