"""Texts ⇄ files of concept ids: windows, the format and what is refused, batches, the commands."""

import copy
import itertools
import json
import re

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import sememe as package
from conftest import byte_tokenizer, sememe
from families import compressor_over, move, tiny_online
from sememe.codes import Codes, compress_file
from sememe.errors import CheckpointError, CodesError, DataError
from sememe.models.compressor import model as compressor
from sememe.texts import encoder, token_windows

MIXED = "Ünïcode 👩‍👩‍👧 日本語 и кириллица\r\n\n  ends with space \U0001f600 "
TEXTS = ["", "a", "😀", MIXED, "the cat sat on a mat and saw the dog. " * 2, " \n", "one"]


@pytest.fixture(scope="module")
def saved(base_folder, tmp_path_factory):
    """RUN/model of two codes a concept, as a finished run of windows of 16 has it."""
    run = tmp_path_factory.mktemp("compressor") / "run"
    ids = torch.randint(3, 259, (16, 24), generator=torch.Generator().manual_seed(2))
    compressor_over(base_folder, ids, codes_per_concept=2).save_pretrained(run / "model")
    (run / "recipe.yaml").write_text("system: compressor\nsequence_length: 16\n")
    return run


@pytest.fixture(scope="module")
def model(saved):
    return AutoModelForCausalLM.from_pretrained(saved / "model")


@pytest.fixture(scope="module")
def codes(model):
    return package.compress(model, TEXTS)


@pytest.fixture
def source(tmp_path):
    """A file of the texts."""
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"body": text}) + "\n" for text in TEXTS))
    return f"{path}#body"


def spaced_tokenizer() -> PreTrainedTokenizerFast:
    """As llama 2: a space before every text, and bytes for what is not in the vocabulary."""
    tokens = ["<unk>", "▁", *"abcdehnost", *(f"<0x{i:02X}>" for i in range(256))]
    vocab = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True, unk_token="<unk>"))
    spaces = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    tokenizer.normalizer = normalizers.Sequence(spaces)
    steps = [decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), *steps])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.mark.parametrize("make", [byte_tokenizer, spaced_tokenizer])
def test_windows_put_together_are_the_document(make):
    """And none ends within a character, of up to 4 bytes, where it need not."""
    tokenizer = make()
    for text, window in itertools.product(TEXTS, (1, 3, 5, 16, 10_000)):
        windows = list(token_windows(encoder(tokenizer)([text])[0], len(text), window))
        ids = [i for ids, _ in windows for i in ids]
        assert ids == tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids) == text
        assert all(1 <= len(ids) <= window for ids, _ in windows)
        assert "".join(text[slice(*span)] for _, span in windows) == text
        if window >= 4 and make is byte_tokenizer:
            assert all(tokenizer.decode(ids) == text[slice(*span)] for ids, span in windows)


def test_documents_and_ids_survive_the_file(model, codes, tmp_path):
    assert [document.characters for document in codes.documents] == [len(text) for text in TEXTS]
    tokens = [len(byte_tokenizer()(text)["input_ids"]) for text in TEXTS]
    assert [sum(w.tokens for w in document.windows) for document in codes.documents] == tokens
    assert all(0 <= i < 256 for window in codes.windows for i in window.concepts)
    assert max(window.tokens for window in codes.windows) == 16
    codes.save(tmp_path / "codes.json")
    assert Codes.load(tmp_path / "codes.json") == codes
    assert len((tmp_path / "codes.json").read_text().splitlines()) == 1 + len(codes.windows)
    ids = byte_tokenizer()(TEXTS[4], return_tensors="pt").input_ids[:, :16]
    assert codes.documents[4].windows[0].concepts == model.compress(ids)[0]
    back = package.decompress(model, codes)
    rows = model.decompress([window.concepts for window in codes.documents[4].windows])
    assert back[4] == byte_tokenizer().decode([i for row in rows for i in row])
    assert back[0] == "" and len(back) == len(TEXTS)


def test_batch_size_changes_nothing(model, saved, codes, monkeypatch):
    back = package.decompress(model, codes)
    monkeypatch.setattr(compressor, "ROWS_AT_ONCE", 1)
    monkeypatch.setattr(compressor, "BEAMS_AT_ONCE", 1)
    assert package.compress(model, TEXTS) == codes
    assert package.decompress(model, codes) == back
    for texts, want in (([], []), ("", [""])):
        assert package.decompress(model, package.compress(model, texts)) == want
    training = copy.deepcopy(model).train()
    documents = package.compress(training, ["one"]).documents
    assert package.compress(saved, "one").documents == documents
    assert training.training, "a model in memory is left as it was"


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda v: v["documents"][4]["windows"][0]["concepts"].reverse(), "checksum differs"),
        (lambda v: v["documents"][1].update(characters=1.5), "characters .*valid integer"),
        (lambda v: v["documents"][4]["windows"][0].pop("span"), "0.span field required"),
        (lambda v: v.pop("sha256"), "sha256 field required"),
        (lambda v: v.update(more=1), "more extra"),
        (lambda v: v.update(version=2), "version input should be 1"),
        (lambda v: v.update(format="other"), "format input should be 'sememe-codes'"),
        *((content, "") for content in (b"", b"[]", b"\xff\xfe", b"[" * 100_000, b'{"format": "s')),
    ],
)
def test_what_is_no_file_of_codes_is_refused(saved, codes, tmp_path, change, message):
    """Changed, or never one."""
    value = json.loads(codes.model_dump_json())
    if callable(change):
        change(value)
        change = json.dumps(value).encode()
    (tmp_path / "codes.json").write_bytes(change)
    words = (saved, tmp_path / "codes.json", "--out", tmp_path / "back.jsonl")
    printed = sememe("decompress", *words, code=1)
    assert re.search(f"(?i){message}.*need a .*try: ", printed) and "\n" not in printed
    assert [path.name for path in tmp_path.iterdir()] == ["codes.json"]


def test_other_models_texts_and_windows_are_refused(saved, codes, base_folder):
    changed = AutoModelForCausalLM.from_pretrained(saved / "model")
    assert package.decompress(changed, codes), "the model of a folder, in memory, is that model"
    move(changed, torch.Generator().manual_seed(5))
    with pytest.raises(CodesError, match="need the model that wrote them"):
        package.decompress(changed, codes)
    for wrong in (tiny_online(), base_folder):
        with pytest.raises(CheckpointError, match="is no compressor"):
            package.compress(wrong, "one")
    for window in (0, 256):
        with pytest.raises(DataError, match="need 1 to 255"):
            package.compress(changed, "one", window=window)
    with pytest.raises(DataError, match="half of a character"):
        package.compress(changed, "a\ud800b")


def test_commands_go_there_and_back_and_give_figures(saved, source, tmp_path):
    out, back = tmp_path / "codes.json", tmp_path / "back.jsonl"
    printed = sememe("compress", saved, source, "--out", out, "--json", tmp_path / "c.json")
    figures, codes = json.loads((tmp_path / "c.json").read_text()), Codes.load(out)
    assert codes.model.name == str(saved / "model") and codes.window == 16
    assert figures["documents"] == len(TEXTS) and figures["ids"] == 2 * figures["concepts"]
    assert figures["compression_ratio"] == figures["tokens"] / figures["ids"]
    assert figures["bits_per_token"] == pytest.approx(4 * figures["ids"] / figures["tokens"])
    assert "bits_per_token" in printed and "tokens_per_s" in printed
    sememe("decompress", saved, out, "--out", back, "--json", tmp_path / "d.json")
    texts = package.decompress(saved / "model", out)
    assert [json.loads(line)["text"] for line in back.read_text().split("\n")[:-1]] == texts
    figures = json.loads((tmp_path / "d.json").read_text())
    assert figures["windows"] == len(codes.windows) and figures["tokens_per_s"] > 0
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["back.jsonl", "c.json", "codes.json", "d.json", "texts.jsonl"]


def test_the_rate_the_terminal_and_nothing_written_over(saved, source, tmp_path):
    path, codes, back = (tmp_path / name for name in ("a.txt", "1.0.json", "b.txt"))
    path.write_text("the cat sat on a mat")
    few, many = (
        compress_file(str(saved), str(path), tmp_path / f"{rate}.json", rate=rate)
        for rate in (0.3, 1.0)
    )
    assert few["concepts"] < many["concepts"] == few["tokens"]
    text = package.decompress(saved, codes)[0]
    assert text.strip() in sememe("decompress", saved, codes)
    sememe("decompress", saved, codes, "--out", back)
    assert back.read_bytes() == text.encode()
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    for words, message in (
        (("compress", saved, path, "--out", path), "nothing is written over"),
        (("compress", saved, source, "--out", tmp_path / "no" / "x.json"), "could not write"),
        (("compress", saved, source, "--out", tmp_path), "is there"),
        (("decompress", saved, codes, "--out", codes), "is there"),
        (("decompress", saved, codes, "--out", tmp_path / "texts.jsonl"), "is there"),
    ):
        assert message in sememe(*words, code=1)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
