"""Texts ⇄ files of concept ids: windows, the format and what is refused, batches, resuming, the
commands, Python."""

import json

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import sememe as package
from conftest import byte_tokenizer, sememe
from families import compressor_over, move, tiny_base, tiny_online
from sememe.compression import Codes
from sememe.compression.codes import checksum
from sememe.compression.files import Interrupted, compress_file, decompress_file
from sememe.compression.windows import cut_texts
from sememe.errors import CheckpointError, CodesError, DataError
from sememe.models import CompressorConfig, CompressorForCausalLM

MIXED = "Ünïcode 👩‍👩‍👧 日本語 и кириллица\r\n\n  ends with space \U0001f600 "
TEXTS = ["", "a", "😀", MIXED, "the cat sat on a mat and saw the dog. " * 2, " \n", "one"]


def blocks() -> torch.Tensor:
    return torch.randint(3, 259, (16, 24), generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="module")
def saved(base_folder, tmp_path_factory):
    """RUN/model of two digits a concept, as a finished run of windows of 16 has it."""
    run = tmp_path_factory.mktemp("compressor") / "run"
    compressor_over(base_folder, blocks(), codes_per_concept=2).save_pretrained(run / "model")
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
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"body": text}) + "\n" for text in TEXTS))
    return f"{path}#body"


def spaced_tokenizer() -> PreTrainedTokenizerFast:
    """As llama 2: a space ahead of every text, and bytes for what is not in the vocabulary."""
    vocab = {
        token: i
        for i, token in enumerate(
            ["<unk>", "▁", *"abcdehnost", *(f"<0x{i:02X}>" for i in range(256))]
        )
    }
    made = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True, unk_token="<unk>"))
    made.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    made.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return PreTrainedTokenizerFast(tokenizer_object=made)


# ---- windows ----


@pytest.mark.parametrize("make", [byte_tokenizer, spaced_tokenizer])
@pytest.mark.parametrize("window", [1, 3, 5, 16, 10_000])
def test_windows_put_together_are_the_document(make, window):
    tokenizer = make()
    for text, cuts in zip(TEXTS, cut_texts(TEXTS, tokenizer, window), strict=True):
        ids = [i for cut in cuts for i in cut.ids]
        assert (
            ids == tokenizer(text, add_special_tokens=False)["input_ids"]
            and tokenizer.decode(ids) == text
        )
        assert all(1 <= len(cut.ids) <= window for cut in cuts)
        assert "".join(text[slice(*cut.span)] for cut in cuts) == text
        assert [cut.span[0] for cut in cuts] == [0, *(cut.span[1] for cut in cuts)][: len(cuts)]


def test_a_window_does_not_end_within_a_character_where_it_need_not():
    tokenizer = byte_tokenizer()
    for window in (4, 5, 7):  # a character is up to 4 bytes
        for cut in cut_texts([MIXED], tokenizer, window)[0]:
            assert tokenizer.decode(cut.ids) == MIXED[slice(*cut.span)]
    assert [cut.span for cut in cut_texts(["😀"], tokenizer, 3)[0]] == [(0, 1), (1, 1)]


def test_half_a_character_and_what_is_no_text_are_refused():
    for wrong, said in (("a\ud800b", "half of a character"), (b"bytes", "document 0 is a bytes")):
        with pytest.raises(DataError, match=said):
            cut_texts([wrong], byte_tokenizer(), 8)


# ---- what survives ----


def test_documents_windows_and_ids_survive_the_file(codes, tmp_path):
    assert [document.characters for document in codes.documents] == [len(text) for text in TEXTS]
    assert [bool(document.windows) for document in codes.documents] == [
        bool(text) for text in TEXTS
    ]
    tokens = [len(byte_tokenizer()(text)["input_ids"]) for text in TEXTS]
    assert [
        sum(window.tokens for window in document.windows) for document in codes.documents
    ] == tokens
    assert (
        all(0 <= i < 256 for window in codes.windows for i in window.concepts)
        and max(w.tokens for w in codes.windows) == 16
    )
    codes.save(tmp_path / "codes.json")
    again = Codes.load(tmp_path / "codes.json")
    assert again == codes and again.sha256 == checksum(
        json.loads((tmp_path / "codes.json").read_text())
    )


def test_ids_are_what_the_model_writes_and_texts_what_it_reads(model, codes):
    ids = byte_tokenizer()(TEXTS[4], return_tensors="pt").input_ids[:, :16]
    assert codes.documents[4].windows[0].concepts == model.compress(ids)[0]
    back = package.decompress(model, codes)
    read = [
        i
        for row in model.decompress([window.concepts for window in codes.documents[4].windows])
        for i in row
    ]
    assert back[4] == byte_tokenizer().decode(read) and back[0] == "" and len(back) == len(TEXTS)


@pytest.mark.parametrize("batch", [1, 3, 64])
def test_batch_size_changes_nothing(model, codes, batch):
    assert package.compress(model, TEXTS, batch=batch) == codes
    assert package.decompress(model, codes, batch=batch) == package.decompress(model, codes)


def test_nothing_and_a_single_text(model, saved):
    assert package.decompress(model, package.compress(model, [])) == []
    assert package.decompress(model, package.compress(model, "")) == [""]
    assert package.compress(saved, "one").documents == package.compress(model, ["one"]).documents


def test_a_megabyte(tmp_path):
    words = ["concept", "segment", "windows", "decoder", "written"]
    picks = torch.randint(
        len(words), (130_000,), generator=torch.Generator().manual_seed(0)
    ).tolist()
    text = " ".join(words[i] for i in picks)
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    made.train_from_iterator(
        [text[:20_000]],
        trainers.BpeTrainer(
            vocab_size=320,
            show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    base = tiny_base(
        vocab_size=320, num_hidden_layers=1, hidden_size=32, head_dim=16, intermediate_size=32
    )
    big = CompressorForCausalLM(
        CompressorConfig(
            text_config=base.config,
            rate=0.25,
            max_tail=3,
            num_concepts=16,
            base="tiny",
            boundary="fixed",
        ),
        base,
    )
    ids = torch.randint(3, 97, (4, 24))
    big.start_frame(ids)
    big.start_codes(ids)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made)
    found = package.compress(big, text, window=128, batch=256, tokenizer=tokenizer)
    assert (
        len(text) > 1e6
        and found.documents[0].characters == len(text)
        and found.windows[-1].span[1] == len(text)
    )
    assert sum(window.tokens for window in found.windows) == len(tokenizer(text)["input_ids"])
    found.save(tmp_path / "codes.json")
    assert Codes.load(tmp_path / "codes.json") == found
    assert len(package.decompress(big, found, batch=1100, tokenizer=tokenizer)[0]) > 0


def test_what_was_learned_comes_back(base_folder):
    """A tiny model that has learned its texts by heart gives them back, over windows that cut
    them."""
    texts = ["the cat 😀 on ", "a mat and saw it"]
    model = compressor_over(base_folder, blocks(), boundary="fixed", num_concepts=256, lora_rank=8)
    ids = torch.tensor([cut.ids for cuts in cut_texts(texts, byte_tokenizer(), 8) for cut in cuts])
    optimizer = torch.optim.Adam([p for p in model.train().parameters() if p.requires_grad], 1e-2)
    for _ in range(60):
        loss = model(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    codes = package.compress(model, texts, window=8)
    assert model.training, "a model in memory is left as it was"
    assert package.decompress(model, codes) == texts


# ---- refusals ----


def reseal(value: dict) -> None:
    value["sha256"] = checksum(value)


def first(value: dict) -> dict:
    return value["documents"][4]["windows"][0]


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda v: first(v)["concepts"].__setitem__(0, 1), "checksum differs"),
        (lambda v: v["model"].update(name="another"), "checksum differs"),
        (
            lambda v: (first(v)["concepts"].__setitem__(0, 256), reseal(v)),
            "concept id 256, but ids are from 0 to 255",
        ),
        (lambda v: (first(v)["concepts"].__setitem__(0, -1), reseal(v)), "concept id -1"),
        (lambda v: (first(v)["concepts"].__setitem__(0, 1.5), reseal(v)), "valid integer"),
        (lambda v: (first(v).pop("span"), reseal(v)), "span: field required"),
        (lambda v: (first(v).update(tokens=17), reseal(v)), "at most 16"),
        (lambda v: (v["documents"][4]["windows"].pop(1), reseal(v)), "behind the one that ends at"),
        (lambda v: (v["documents"][4]["windows"].pop(), reseal(v)), "which has 76"),
        (lambda v: v.pop("sha256"), "sha256: field required"),
        (lambda v: (v.update(more=1), reseal(v)), "more: extra"),
        (lambda v: (v.update(version=2), reseal(v)), "version 2 of the format: need version 1"),
        (
            lambda v: (v.update(num_concepts=32), reseal(v)),
            "2 codes of 32 a concept, but .* has 2 of 16",
        ),
        (lambda v: (v.update(codes_per_concept=10**9), reseal(v)), "that no model has"),
        (lambda v: v.update(format="other"), 'no "format"'),
    ],
)
def test_a_file_that_was_changed_is_refused(saved, codes, tmp_path, change, said):
    value = json.loads(codes.as_json())
    change(value)
    (tmp_path / "codes.json").write_text(json.dumps(value))
    with pytest.raises(CodesError, match=said) as error:
        decompress_file(str(saved), tmp_path / "codes.json", tmp_path / "back.jsonl")
    assert "try: " in str(error.value) and "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["codes.json"]


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"\xff\xfe", b"[" * 100_000, b'{"format": "sememe-codes", "ver']
)
def test_what_is_no_file_of_codes_is_refused(saved, tmp_path, content):
    (tmp_path / "codes.json").write_bytes(content)
    message = sememe(
        "decompress", saved, tmp_path / "codes.json", "--out", tmp_path / "back.jsonl", code=1
    )
    assert (
        "need a " in message
        and "try: " in message
        and "\n" not in message
        and not (tmp_path / "back.jsonl").exists()
    )


def test_another_model_is_refused(model, codes, base_folder, tmp_path):
    other = compressor_over(base_folder, blocks(), codes_per_concept=2, lora_rank=2)
    other.save_pretrained(tmp_path / "other")
    for wrong in (other, tmp_path / "other"):
        with pytest.raises(CodesError, match="need the model that wrote them"):
            package.decompress(wrong, codes)
    changed = AutoModelForCausalLM.from_pretrained(tmp_path / "other")
    assert package.decompress(changed, package.compress(tmp_path / "other", "one")), (
        "from memory it is the one in the folder"
    )
    kept = package.compress(changed, "one")
    move(changed, torch.Generator().manual_seed(5))
    with pytest.raises(CodesError, match="need the model that wrote them"):
        package.decompress(changed, kept)
    for wrong in (tiny_online(), base_folder):
        with pytest.raises(CheckpointError, match="is no compressor"):
            package.compress(wrong, "one")


def test_a_window_that_does_not_fit_is_refused(model):
    for window in (0, 256):
        with pytest.raises(DataError, match="need 1 to 255"):
            package.compress(model, "one", window=window)


# ---- the commands, and going on ----


def test_commands_go_there_and_back_and_give_figures(saved, source, tmp_path):
    out, back = tmp_path / "codes.json", tmp_path / "back.jsonl"
    printed = sememe(
        "compress", saved, source, "--out", out, "--batch", 3, "--json", tmp_path / "c.json"
    )
    found = json.loads((tmp_path / "c.json").read_text())
    codes = Codes.load(out)
    assert (
        codes.model.name == str(saved) and codes.window == 16 and found["documents"] == len(TEXTS)
    )
    assert (
        found["ids"] == 2 * found["concepts"]
        and found["compression_ratio"] == found["tokens"] / found["ids"]
    )
    assert (
        found["bits_per_token"] == pytest.approx(4 * found["ids"] / found["tokens"])
        and found["tokens_per_s"] > 0
    )
    assert "bits_per_token" in printed and "tokens_per_s" in printed
    sememe("decompress", saved, out, "--out", back, "--json", tmp_path / "d.json")
    texts = package.decompress(saved / "model", out)
    assert [json.loads(line)["text"] for line in back.read_text().split("\n")[:-1]] == texts
    found = json.loads((tmp_path / "d.json").read_text())
    assert (
        found["tokens_written"] > 0
        and found["tokens_per_s"] > 0
        and found["windows"] == len(codes.windows)
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "back.jsonl",
        "c.json",
        "codes.json",
        "d.json",
        "texts.jsonl",
    ]


def test_the_dial_and_the_terminal(saved, tmp_path):
    (tmp_path / "a.txt").write_text("the cat sat on a mat")
    few = compress_file(str(saved), str(tmp_path / "a.txt"), tmp_path / "few.json", rate=0.3)
    many = compress_file(
        str(saved), str(tmp_path / "a.txt"), tmp_path / "few.json", rate=1.0
    )  # codes may be written over
    assert few["concepts"] < many["concepts"] == few["tokens"]
    text = package.decompress(saved, tmp_path / "few.json")[0]
    assert text + "\n" in sememe("decompress", saved, tmp_path / "few.json")
    sememe("decompress", saved, tmp_path / "few.json", "--out", tmp_path / "b.txt")
    assert (tmp_path / "b.txt").read_bytes() == text.encode()


def test_no_text_is_written_over(saved, source, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("the cat")
    codes = tmp_path / "codes.json"
    compress_file(str(saved), source, codes)
    for words, said in (
        (("compress", saved, text, "--out", text), "is the file that is read"),
        (("compress", saved, source, "--out", text), "holds no codes"),
        (("compress", saved, source, "--out", tmp_path / "no" / "x.json"), "which is no folder"),
        (("compress", saved, source, "--out", tmp_path), "is a folder"),
        (("decompress", saved, codes, "--out", codes), "is the file that is read"),
        (("decompress", saved, codes, "--out", text), "no text is written over"),
        (("decompress", saved, codes, "--out", tmp_path / "x.txt"), "need a .jsonl"),
    ):
        assert said in sememe(*words, code=1)
    assert text.read_text() == "the cat" and Codes.load(codes)


@pytest.mark.parametrize("cut", [0, 5], ids=["ctrl-c", "kill within a line"])
def test_the_same_command_goes_on(saved, source, tmp_path, monkeypatch, cut):
    whole, out, back = tmp_path / "whole.json", tmp_path / "codes.json", tmp_path / "back.jsonl"
    windows = compress_file(str(saved), source, whole, batch=2)["windows"]
    want = decompress_file(str(saved), whole)[1]

    def stopping(real, after=3):
        calls = []

        def stop(self, *args):
            calls.append(1)
            if len(calls) > after:
                raise KeyboardInterrupt
            return real(self, *args)

        return stop

    for name, do, to in (
        ("compress", lambda: compress_file(str(saved), source, out, batch=2), out),
        ("decompress", lambda: decompress_file(str(saved), out, back, batch=2)[0], back),
    ):
        partial = to.with_name(to.name + ".partial")
        with monkeypatch.context() as patch:
            patch.setattr(
                CompressorForCausalLM, name, stopping(getattr(CompressorForCausalLM, name))
            )
            with pytest.raises(Interrupted, match="the same command goes on"):
                do()
        assert partial.is_file() and not to.exists()
        partial.write_bytes(partial.read_bytes()[: len(partial.read_bytes()) - cut])
        found = do()
        assert 4 <= found["resumed_windows"] + (cut > 0) <= 6 and found["windows"] == windows
        assert to.exists() and not partial.exists()
    assert out.read_bytes() == whole.read_bytes() and back.read_text() == want


def test_what_another_command_left_is_not_gone_on_with(saved, source, tmp_path):
    partial = tmp_path / "codes.json.partial"
    partial.write_text(
        json.dumps({"command": "compress", "model": "another", "window": 16}) + "\n[0, [1]]\n"
    )
    with pytest.raises(CodesError, match="model, rate, text differs"):
        compress_file(str(saved), source, tmp_path / "codes.json")
    partial.write_text('{"command": "comp')  # killed before there was anything
    assert compress_file(str(saved), source, tmp_path / "codes.json")["resumed_windows"] == 0
