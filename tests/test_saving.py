"""Save → load → same logits; the wrong base, a flipped bit and a full disk are refused."""

import errno
import json
import re

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import sememe  # noqa: F401
from families import online_over, tiny_base
from sememe.backbone.bases import KNOWN
from sememe.errors import CheckpointError
from sememe.models import ControlConfig, ControlForCausalLM, OnlineForCausalLM
from sememe.models import adapted as adapted_module
from sememe.models.loading import export_model, load_model, model_folder, shipped
from sememe.storage import check_manifest

IDS = torch.randint(3, 250, (2, 24), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model(base_folder):
    return online_over(base_folder, IDS)


def saved(model, base_folder, folder):
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base_folder).save_pretrained(folder)
    return folder


def test_auto_classes_load_the_same_model(model, base_folder, tmp_path):
    folder = saved(model, base_folder, tmp_path / "m")
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert isinstance(loaded, OnlineForCausalLM) and not loaded.training
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    assert torch.equal(loaded(IDS).concept_ids, model(IDS).concept_ids)
    assert (
        AutoTokenizer.from_pretrained(folder)("hi").input_ids
        == AutoTokenizer.from_pretrained(base_folder)("hi").input_ids
    )
    assert not json.loads((folder / "config.json").read_text())["text_config"].get(
        "_name_or_path"
    ), "a folder of this machine"
    small = sum(p.numel() for p in model.parameters() if p.requires_grad) * 4
    assert (folder / "model.safetensors").stat().st_size < small * 1.2 + 20_000, "own weights only"


@pytest.mark.parametrize(
    "changes",
    [
        {"head": "nearest", "codes_per_concept": 2},
        {"head": "joint", "codes_per_concept": 2},
    ],
    ids=str,
)
def test_every_codebook_round_trips(base_folder, tmp_path, changes):
    model = online_over(base_folder, IDS, **changes)
    model.round_own_weights()
    loaded = AutoModelForCausalLM.from_pretrained(saved(model, base_folder, tmp_path / "m"))
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    assert (
        torch.equal(loaded(IDS).concept_ids, model(IDS).concept_ids)
        and int(model(IDS).concept_ids.max()) >= 16
    )


def test_rounded_weights_are_what_is_saved(model, base_folder, tmp_path):
    before = model(IDS).logits
    model.round_own_weights()
    loaded = AutoModelForCausalLM.from_pretrained(saved(model, base_folder, tmp_path / "m"))
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    assert not torch.equal(model(IDS).logits, before)


def test_merged_model_needs_no_base(model, base_folder, tmp_path):
    want = model(IDS).logits
    folder, size = export_model(saved(model, base_folder, tmp_path / "m"), tmp_path / "merged")
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert json.loads((folder / "config.json").read_text())["base"] is None
    torch.testing.assert_close(
        loaded(IDS).logits, want, atol=1e-4, rtol=0
    )  # folding LoRA reorders sums: 5e-6 seen
    assert size > 4 * sum(p.numel() for p in model.backbone.parameters()) * 0.9
    with pytest.raises(CheckpointError, match="not empty"):
        export_model(tmp_path / "m", tmp_path / "merged")


@pytest.mark.parametrize("skipped, window", [((), None), ((1, 3), None), ((), 3)])
def test_baselines_round_trip(base_folder, tmp_path, skipped, window):
    model = ControlForCausalLM.from_base(
        ControlConfig(base=str(base_folder), skipped=skipped, window=window)
    ).eval()
    assert (len(list(model.backbone.get_decoder().layers[1].parameters())) == 0) == bool(skipped)
    folder = saved(model, base_folder, tmp_path / "c")
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    greedy = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    for beams in (1, 3):
        assert torch.equal(
            loaded.generate(IDS, num_beams=beams, **greedy),
            model.generate(IDS, num_beams=beams, **greedy, use_cache=False),
        )
    if not skipped:
        base = AutoModelForCausalLM.from_pretrained(base_folder)
        assert torch.equal(model(IDS).logits, base(IDS).logits) == (window is None), (
            "fresh LoRA changes nothing"
        )


def test_wrong_base_is_refused(model, base_folder, tmp_path):
    folder, other = saved(model, base_folder, tmp_path / "m"), tmp_path / "other"
    tiny_base(seed=9, vocab_size=259).save_pretrained(other)
    AutoTokenizer.from_pretrained(base_folder).save_pretrained(other)
    with pytest.raises(
        CheckpointError,
        match=rf"trained on base .{re.escape(str(base_folder))}.*need the same weights",
    ):
        load_model(folder, base=str(other))


def test_a_flipped_bit_is_noticed(model, base_folder, tmp_path):
    folder = saved(model, base_folder, tmp_path / "m")
    raw = bytearray((folder / "model.safetensors").read_bytes())
    raw[-3] ^= 1
    (folder / "model.safetensors").write_bytes(raw)
    with pytest.raises(CheckpointError, match="is corrupt"):
        load_model(folder)
    with pytest.raises(CheckpointError, match="is corrupt"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_weights_of_another_configuration_are_refused(model, base_folder, tmp_path):
    folder = saved(model, base_folder, tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    config["num_concepts"] = 20
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="does not fit its configuration"):
        load_model(folder)


def test_full_disk_leaves_nothing_half_written(model, tmp_path, monkeypatch):
    saved_before = tmp_path / "m"
    model.save_pretrained(saved_before)
    before = (saved_before / "model.safetensors").read_bytes()

    def full(state, path, metadata):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(adapted_module, "save_file", full)
    with pytest.raises(CheckpointError, match="No space left"):
        model.save_pretrained(saved_before)
    assert (saved_before / "model.safetensors").read_bytes() == before
    assert not list(saved_before.glob("*.tmp"))


def test_pipeline_runs(model, base_folder, tmp_path):
    from transformers import pipeline

    pipe = pipeline(
        "text-generation",
        model=AutoModelForCausalLM.from_pretrained(saved(model, base_folder, tmp_path / "m")),
        tokenizer=AutoTokenizer.from_pretrained(base_folder),
    )
    made = pipe("the cat", max_new_tokens=4, do_sample=False)[0]["generated_text"]
    assert made.startswith("the cat")


@pytest.mark.parametrize("name", shipped())
def test_reference_models_are_whole_small_and_described(name):
    folder = shipped()[name]
    assert model_folder(name) == folder
    check_manifest(folder)
    assert (folder / "model.safetensors").stat().st_size <= 16_000_000
    config = AutoConfig.from_pretrained(folder)
    config.check()
    assert config.base in KNOWN and config.base_sha256
    card = (folder / "README.md").read_text()
    assert all(word in card for word in ("Licence", "Data", "Limits", "Δ control"))


def test_the_reference_model_is_there():
    assert "smollm2-135m-online" in shipped()
