"""Bases: a fingerprint is the weights, a fault is one sentence."""

import hashlib
import json
import shutil
from pathlib import Path

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
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=64,
        max_position_embeddings=64,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    words = Tokenizer(
        models.WordLevel({"<unk>": 0, "<eos>": 1, "one": 2, "two": 3}, unk_token="<unk>")
    )
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token="<eos>", unk_token="<unk>"
    )
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return save_tiny(tmp_path / "tiny")


def fail(*args: object, **kwargs: object) -> None:
    raise AssertionError("this must not be called")


# resolve


def test_resolve_folders(tiny: Path, tmp_path: Path) -> None:
    assert bases.resolve(str(tiny)) == tiny
    (tiny / "model.safetensors.index.json").write_text(
        '{"weight_map": {"a": "model-00002.safetensors"}}'
    )
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


def test_hub_offline_takes_the_cached_copy_or_says_so(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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
    with pytest.raises(
        BaseError, match=r"'org/other' is neither .*Name or service not known.* sememe pull"
    ):
        bases.resolve("org/other")
    assert bases.resolve("org/cached", pull_missing=False) == tiny
    assert asked == [
        "org/cached",
        "org/other",
    ]  # and not a third time: pull_missing=False is offline


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


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (truncate, "cannot be loaded"),
        (unknown_type, "cannot be loaded"),
        (broken_config, "cannot be loaded"),
        (drop_a_weight, r"lacks 1 weights, the first is model\.layers\.1\.mlp\.up_proj\.weight"),
    ],
)
def test_a_harmed_base_is_one_sentence(tiny: Path, harm, said: str) -> None:
    harm(tiny)
    with pytest.raises(BaseError, match=said) as caught:
        bases.load_base(tiny)
    assert "\n" not in str(caught.value)


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
    # The rule that a gguf loses: with it, the two newlines before a digit are one token, as in
    # training.
    assert tokenizer.tokenize("a\n\n10") == ["a", "ĊĊ", "1", "0"]
