"""Files from somebody else: nothing in them runs or is waited for, sizes are checked first, and
a base is held to what it was."""

import contextlib
import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from conftest import sememe
from families import compressor_over
from sememe.backbone import base_files, bases
from sememe.codes import Codes, compress, decompress, trained_window
from sememe.errors import BaseError, CodesError, SememeError
from sememe.models.loading import load_model
from sememe.options import check_recipe, load_recipe
from sememe.report.files import read_run
from sememe.storage import write_manifest
from sememe.texts import read_texts

IDS = torch.randint(3, 250, (4, 24), generator=torch.Generator().manual_seed(0))
TAG = "!!python/object/apply:os.system ['touch MARK']"


@pytest.fixture
def base(base_folder, tmp_path):
    return shutil.copytree(base_folder, tmp_path / "base")


def edit(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# ---- recipes ----


def test_a_recipe_reads_no_environment(recipe_values, tmp_path, monkeypatch):
    monkeypatch.setenv("SECRET", "sesame")
    path = tmp_path / "r.yaml"
    path.write_text(json.dumps(recipe_values | {"base": "${oc.env:SECRET}"}))
    plain = tmp_path / "plain.yaml"
    plain.write_text(json.dumps(recipe_values))
    for words in ([path], [plain, "base=${oc.env:SECRET}"], [plain, "data=${oc.env:SECRET}"]):
        said = sememe("train", *words, "--out", tmp_path / "out", code=1)
        assert "refers to something with ${…}" in said and "sesame" not in said


def test_only_plain_values_in_recipes(recipe_values, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run, good = tmp_path / "run", tmp_path / "good.yaml"
    run.mkdir()
    good.write_text(check_recipe(recipe_values, "test").yaml())
    (run / "metrics.jsonl").write_text('{"step": 1, "loss": 2}\n')
    laughs = "".join(f"{b}: &{b} [{','.join([f'*{a}'] * 9)}]\n" for a, b in ("ab", "bc", "cd"))
    contents = {
        "tag": TAG,
        "tag inside": f"seed: {TAG}",
        "aliases": f"a: &a [x]\n{laughs}",
        "deep": "[" * 5000,
        "a list": "[1, 2]",
        "long": "# " + "x" * 40_000,
    }
    for text in contents.values():
        (run / "recipe.yaml").write_text(text)
        for words in (("train", good, "--out", run), ("doctor", run), ("report", run)):
            assert "try: " in sememe(*words, code=1)
        with pytest.raises(SememeError, match=r"need .* try: "):
            load_recipe(run / "recipe.yaml")
    model = type("Config", (), {"name_or_path": str(run / "model")})
    with pytest.raises(SememeError, match=r"need .*try: "):  # which a compressor looks into
        trained_window(model)
    assert not (tmp_path / "MARK").exists()


# ---- what has no end ----


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
@pytest.mark.parametrize("kind", ["device", "pipe", "other text"])
def test_a_base_is_of_regular_files(base, name, kind, recipe_values, tmp_path):
    (base / name).unlink()
    if kind == "pipe":
        os.mkfifo(base / name)
    else:
        (base / name).symlink_to("/dev/zero" if kind == "device" else "/etc/passwd")
    recipe = tmp_path / "r.yaml"
    recipe.write_text(json.dumps(recipe_values | {"base": str(base)}))
    for words in (("generate", base, "--prompt", "x"), ("train", recipe, "--out", tmp_path / "o")):
        said = sememe(*words, code=1)
        assert "try: " in said and (kind == "other text" or "need" in said)


@pytest.mark.parametrize("kind", ["device", "pipe"])
def test_a_manifest_is_a_regular_file(base, kind, tmp_path):
    compressor_over(base, IDS).save_pretrained(tmp_path / "m")
    path = tmp_path / "m" / "manifest.json"
    path.unlink()
    os.mkfifo(path) if kind == "pipe" else path.symlink_to("/dev/zero")
    assert "need a regular file" in sememe("generate", tmp_path / "m", "--prompt", "x", code=1)


def test_texts_codes_and_recipes_are_regular_files_too(tmp_path):
    for name, read in (("a.txt", read_texts), ("c.json", Codes.load), ("r.yaml", load_recipe)):
        (tmp_path / name).symlink_to("/dev/zero")
        with pytest.raises(SememeError, match=r"need .*try: "):
            read(str(tmp_path / name))


# ---- sizes ----


@pytest.mark.parametrize(
    "changes",
    [
        {"num_hidden_layers": 9 * 10**18},
        {"num_hidden_layers": 9 * 10**18, "model_type": "qwen3"},  # which lists its layers
        {"hidden_size": 10**9},
        {"vocab_size": 30_000, "intermediate_size": 30_000},  # each of them could be
        {"head_dim": 2**62},
    ],
)
def test_sizes_are_held_against_the_weights(base, changes):
    edit(base / "config.json", **changes)
    with pytest.raises(BaseError, match=r"the weights beside it .*try: "):
        bases.load_base(base)


def test_sizes_of_a_saved_model_too(base, tmp_path):
    model = compressor_over(base, IDS)
    model.save_pretrained(tmp_path / "m")
    bases.load_tokenizer(base).save_pretrained(tmp_path / "m")
    path = tmp_path / "m" / "config.json"
    whole = path.read_text()
    text = {"text_config": json.loads(whole)["text_config"] | {"num_hidden_layers": 9 * 10**18}}
    for changes in ({"num_concepts": 10**9}, {"lora_rank": 10**7}, {"max_tail": 31}, text):
        edit(path, **changes)
        write_manifest(tmp_path / "m")  # that fits, as a sender would make it
        with pytest.raises(SememeError, match=r"the weights beside it|does not fit its config"):
            load_model(tmp_path / "m")
        path.write_text(whole)


def test_codes_that_stand_for_too_much_are_refused_before_the_work(base):
    model = compressor_over(base, IDS)
    model.config.name_or_path = str(base)
    codes = compress(model, ["the cat sat on a mat"], window=16)
    window = codes.windows[0]
    longest = max(range(model.config.num_concepts), key=lambda concept: model.length([concept]))
    window.tokens, window.concepts = 255, [longest] * 255  # as many as tokens, and each of several
    with pytest.raises(CodesError, match=r"stand for more than 255 tokens.*try: "):
        decompress(model, codes)
    window.concepts = [longest] * 100_000
    with pytest.raises(CodesError, match=r"more concepts than tokens.*try: "):
        decompress(model, codes)
    window.concepts, codes.num_concepts = [longest], 2**48
    with pytest.raises(CodesError, match=r"ids that no code stands for.*try: "):
        decompress(model, codes)
    written = json.dumps(codes.model_dump() | {"rate": float("nan"), "sha256": None})
    (base / "codes.json").write_text(written)
    with pytest.raises(CodesError, match=r"rate Input should be a finite number.*try: "):
        Codes.load(base / "codes.json")


@pytest.mark.parametrize("shard", ["../secret.safetensors", "/etc/passwd", ["a"], 3])
def test_an_index_names_what_is_beside_it(base, shard):
    shutil.copy(base / "model.safetensors", base.parent / "secret.safetensors")
    names = base_files.shapes_of(base / "model.safetensors")
    (base / "model.safetensors").rename(base / "a.safetensors")
    path = base / "model.safetensors.index.json"
    for content in ({"weight_map": dict.fromkeys(names, shard)}, [], {}, {"weight_map": []}):
        path.write_text(json.dumps(content))
        with pytest.raises(BaseError, match=r"need .*try: "):
            bases.load_base(base)
    path.write_text(
        json.dumps({"metadata": {}, "weight_map": dict.fromkeys(names, "a.safetensors")})
    )
    bases.load_base(base)


# ---- code ----


def test_what_would_run_or_lies_outside_ends_with_code_2(base, tmp_path):
    """Whatever answers for the folder can tell it from one that is damaged."""
    named = {"model_type": "evil", "auto_map": {"AutoConfig": "modeling_evil.C"}}
    edit(base / "config.json", auto_map=named["auto_map"])  # of a kind that needs none
    sememe("generate", base, "--prompt", "x", "--max-new-tokens", 1)
    config = (base / "config.json").read_text()
    edit(base / "config.json", **named)
    assert "asks for code of its own" in sememe("generate", base, "--prompt", "x", code=2)
    (base / "config.json").write_text(config)
    compressor_over(base, IDS).save_pretrained(tmp_path / "m")
    inner = json.loads((tmp_path / "m" / "config.json").read_text())["text_config"] | named
    edit(tmp_path / "m" / "config.json", text_config=inner)
    write_manifest(tmp_path / "m")
    assert "asks for code of its own" in sememe("generate", tmp_path / "m", "--prompt", "x", code=2)
    weights = base / "model.safetensors"
    shutil.copy(weights, tmp_path / "model.safetensors")
    names = base_files.shapes_of(weights)
    weights.unlink()
    for name in ("pytorch_model.bin", "model.ckpt", "consolidated.00.pth"):
        (base / name).write_bytes(b"")
        said = sememe("generate", base, "--prompt", "x", code=2)
        assert "which may hold any program" in said
        (base / name).rename(tmp_path / name)
    (base / "other.safetensors").write_bytes(b"")
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "../model.safetensors")}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "is not beside it" in sememe("generate", base, "--prompt", "x", code=2)


def test_a_tokenizer_of_another_vocabulary_is_refused(base, tmp_path):
    """An id without an embedding would be an IndexError at the first text that has it."""
    tokenizer = bases.load_tokenizer(base)
    tokenizer.add_tokens(["cat"])
    tokenizer.save_pretrained(base)
    for read in (bases.load_tokenizer, load_model):
        with pytest.raises(BaseError, match=r"'cat' as id 259, .* 259 embeddings: need .* try: "):
            read(base)
    model = bases.load_base(base)
    model.resize_token_embeddings(300)  # more than the tokenizer has, as many bases have
    model.save_pretrained(tmp_path / "larger")
    tokenizer.save_pretrained(tmp_path / "larger")
    assert bases.load_tokenizer(tmp_path / "larger")("cat").input_ids == [259]


@pytest.mark.parametrize("kind", ["evil", "llama"])
def test_no_code_of_a_folder_runs_whatever_is_answered(base, kind, tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *words: "y")
    mark = tmp_path / "MARK"
    (base / "modeling_evil.py").write_text(f"open({str(mark)!r}, 'w')\n")
    named = {"AutoConfig": "modeling_evil.C", "AutoModelForCausalLM": "modeling_evil.M"}
    edit(base / "config.json", model_type=kind, auto_map=named)
    edit(base / "tokenizer_config.json", auto_map={"AutoTokenizer": ["modeling_evil.T", None]})
    for load in (bases.load_base, bases.load_tokenizer, bases.read_config):
        with contextlib.suppress(BaseError):
            load(base)
    assert not mark.exists()


def test_an_adapter_is_no_base(base):
    (base / "adapter_config.json").write_text("{}")
    with pytest.raises(BaseError, match=r"an adapter over a base.*try: "):
        bases.load_base(base)


def test_a_generation_config_of_other_values_is_one_sentence(base):
    path = base / "generation_config.json"
    for changes in ({"eos_token_id": "x"}, {"bos_token_id": [[1]]}, {"pad_token_id": 10**6}):
        edit(path, **changes)
        with pytest.raises(BaseError, match=r"need .*try: "):
            bases.load_base(base)


# ---- a base is what it was ----


def test_a_base_is_held_to_what_it_was_at_first_use(base):
    weights, config = base / "model.safetensors", base / "config.json"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    with pytest.raises(BaseError, match="cannot be loaded"):
        bases.load_base(base)  # nothing is kept of a base that cannot be
    weights.write_bytes(whole)
    bases.load_base(base)
    (base / "notes.json").write_text("{}")  # is not read
    bases.load_base(base)
    before = config.read_text()
    config.write_text(before.replace("rms_norm_eps", "rms_norl_eps"))
    for load in (bases.load_base, bases.load_tokenizer):
        with pytest.raises(BaseError, match=r"first use \(config.json differ\).*purpose, rm (.*)"):
            load(base)
    with pytest.raises(BaseError) as refused:
        bases.load_base(base)
    Path(str(refused.value).rsplit(" rm ", 1)[1]).unlink()  # changed on purpose
    bases.load_base(base)
    flipped = bytearray(whole)
    flipped[-7] ^= 1
    weights.write_bytes(flipped)
    with pytest.raises(BaseError, match=r"\(model.safetensors differ\)"):
        bases.load_base(base)


def test_a_base_in_a_home_that_cannot_be_written_is_used_all_the_same(base, tmp_path, monkeypatch):
    (tmp_path / "home").write_text("a file")
    for home in (tmp_path / "home", "x" * 300):
        monkeypatch.setenv("SEMEME_HOME", str(home))
        bases.load_base(base)


def test_the_hashes_of_a_base_are_those_of_its_files(base):
    found = base_files.hashes(base)
    assert found.keys() >= {"config.json", "model.safetensors", "tokenizer.json"}
    for name, sha256 in found.items():
        assert sha256 == hashlib.sha256((base / name).read_bytes()).hexdigest()


# ---- a run ----


def test_a_log_of_other_values_is_one_sentence(recipe_values, tmp_path):
    (tmp_path / "recipe.yaml").write_text(check_recipe(recipe_values, "test").yaml())
    log = tmp_path / "metrics.jsonl"
    log.write_text('{"step": 1, "loss": 2}\n12\n[]\n"x"\n{"step": "x"}\n{"loss": 3}\n' + "[" * 9999)
    assert [line["step"] for line in read_run(tmp_path).lines] == [1]
    # Twelve lines that a rule looks at.
    row = {"loss": [1], "heldout_nll": "<b>", "grad_norm": {}, "quantise": 1, "concept_rate": "x"}
    log.write_text("".join(json.dumps(row | {"step": n}) + "\n" for n in range(12)))
    for command in ("doctor", "report"):
        assert "hold other values than a run has" in sememe(command, tmp_path, code=1)
