"""Data: files become documents, documents become blocks, equal seeds give equal orders."""

import json
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

from conftest import byte_tokenizer
from sememe import data, texts
from sememe.errors import DataError
from sememe.options import check_recipe
from sememe.paths import source_sha256

WORDS = "the quick brown fox, it jumps over 12 lazy dogs.\nAnd:\n\nparagraphs  with   gaps 3.\n"
MIXED = "Ünïcode 👩‍👩‍👧 日本語\r\n\n  and  spaces \t at the end 🙂 \n"


def train(kind="byte level", eos="<eos>"):
    """A small BPE tokenizer: over bytes, or with a space of its own before a text as Llama 2."""
    raw = Tokenizer(models.BPE(unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if kind == "prefix":
        raw.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
        space = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        raw.normalizer = normalizers.Sequence(space)
    if kind == "trimmed":  # as GPT-2: offsets leave white space out
        raw.post_processor = processors.ByteLevel(trim_offsets=True)
    alphabet, special = pre_tokenizers.ByteLevel.alphabet(), ["<unk>", "<eos>"]
    options = {"initial_alphabet": alphabet, "special_tokens": special, "show_progress": False}
    raw.train_from_iterator([WORDS * 20], BpeTrainer(vocab_size=400, **options))
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token=eos)


BYTE_LEVEL = train()


def blocks_of(documents: list[str], folder: Path, *options) -> data.TextBlocks:
    path = folder / "documents.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in documents))
    return data.heldout_blocks(str(path), *options)


def test_files_and_datasets_are_documents(tmp_path, monkeypatch):
    hub = {"org/name": datasets.Dataset.from_dict({"story": ["one", "two"]})}
    monkeypatch.setattr(datasets, "load_dataset", lambda source, split: hub[source])
    monkeypatch.chdir(tmp_path)
    Path("a#b.txt").write_bytes("\ufeffÄpfel\n\nund Birnen\n".encode())  # a # of its own
    rows = [{"text": "one\u2028still one", "response": "1"}, {"text": "", "response": "2"}]
    lines = "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    Path("a.jsonl").write_text(f"\ufeff\n{lines}\n", encoding="utf-8")
    pq.write_table(pa.table({"text": ["one", "two"], "null": ["x", None]}), "a.parquet")
    assert texts.read_texts("a#b.txt") == ["Äpfel\n\nund Birnen\n"]
    assert texts.read_texts(str(tmp_path / "a.jsonl")) == ["one\u2028still one", ""]
    assert texts.read_texts("a.jsonl#response") == ["1", "2"]
    assert texts.read_texts("a.parquet") == texts.read_texts("org/name#story") == ["one", "two"]
    for source, number in (("a.parquet#null", 2), ("org/name#null", 1)):
        with pytest.raises(DataError, match=f"line {number} has no field 'null' of text"):
            texts.read_texts(source)
    with pytest.raises(DataError, match=r"could not be loaded with datasets \(.*org/other.*try: "):
        texts.read_texts("org/other")


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("data/a#b/missing.txt", None, r"^data/a#b/missing\.txt does not exist"),
        ("once upon a time " * 30, None, r"^once .{60,80}… \(510 characters\) does not exist"),
        (".", None, "is a folder"),
        ("a.csv", b"text\nx\n", r"is a file \.csv: need one of \.txt, \.jsonl, \.parquet"),
        ("a.txt", b"good\nstill good\n\xc4pfel\n", "byte 0xc4 in position"),
        ("a.txt", b" \n\t\n", "is empty"),
        ("a.parquet", b"not parquet", "cannot be read"),
        ("a.jsonl", b'{"text": "\xff"}', "line 3 cannot be read"),
        ("a.jsonl", b'["a"]', r"line 3 has no field 'text' of text, it has \['a'\]"),
        ("a.jsonl", b'{"txt": "a"}', "line 3 has no field 'text' .*'txt': 'a'.*FILE#FIELD"),
        ("a.jsonl", b'{"text": null}', "line 3 has no field 'text' .*try: drop that row"),
        ("a.jsonl", b'{"text": "cut \\ud83d off"}', "line 3 has half of a character"),
    ],
)
def test_what_is_no_text_is_one_sentence(tmp_path, monkeypatch, name, content, match):
    monkeypatch.chdir(tmp_path)
    if content:
        before = b'{"text": "fine"}\n\n' if "line 3" in match else b""
        Path(name).write_bytes(before + content)
    with pytest.raises(DataError, match=match):
        texts.read_texts(name)
    assert len(source_sha256(name)) == 64


def test_a_source_is_told_by_its_content_and_field(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a.jsonl", "copy.jsonl", "a.txt"):
        Path(name).write_text('{"text": "one", "body": "two"}\n')
    assert source_sha256("a.jsonl") == source_sha256(f"{tmp_path}/copy.jsonl#text")
    assert source_sha256("a.txt") == source_sha256("a.txt#any")
    names = ("a.jsonl", "a.jsonl#body", "a.txt", "org/name", "org/name#body")
    assert len({source_sha256(name) for name in names}) == 5


@pytest.mark.parametrize("eos", ["<eos>", None])
def test_blocks_are_the_stream_with_eos_between_documents(eos, tmp_path):
    tokenizer = train(eos=eos)
    between = [] if eos is None else [tokenizer.eos_token_id]
    stream = [*tokenizer.encode("the quick fox"), *between, *tokenizer.encode("lazy dogs")]
    for length in (1, 3):
        documents = ["the quick fox", " \n", "", "lazy dogs"]
        blocks = blocks_of(documents, tmp_path, tokenizer, length, 99).ids_NT
        starts = range(0, len(stream) - length + 1, length)
        assert blocks.tolist() == [stream[start : start + length] for start in starts]


@pytest.mark.parametrize("chars", [14, 20, 64])
def test_a_text_in_pieces_has_the_ids_of_the_whole(monkeypatch, tmp_path, chars):
    # No double spaces and no word over 13 characters, so that every piece ends before a lone space.
    text = "the quick brown fox, it jumps over 12 lazy dogs. And then two paragraphs with gaps " * 9
    monkeypatch.setattr(texts, "PIECE_CHARS", chars)
    ids_N1 = blocks_of([text], tmp_path, BYTE_LEVEL, 1, 9999).ids_NT
    assert ids_N1.flatten().tolist() == BYTE_LEVEL.encode(text)


@pytest.mark.parametrize("kind", ["byte level", "trimmed", "prefix"])
def test_blocks_have_the_bytes_of_the_source(kind, monkeypatch, tmp_path):
    tokenizer = train(kind)
    monkeypatch.setattr(texts, "PIECE_CHARS", 30)
    parts = [MIXED, " ", "x" * 99, MIXED * 3, " " * 99 + "z"]
    source = "".join(text for text in parts if text.strip()).encode()
    blocks = blocks_of(parts, tmp_path, tokenizer, 1, 9999)
    assert blocks.text == source == b"".join(blocks.windows())
    assert int(blocks.bytes_NT.sum()) == len(source) and int(blocks.bytes_NT.min()) >= 0
    eos = blocks.ids_NT == tokenizer.eos_token_id
    assert int(eos.sum()) == 3 and int(blocks.bytes_NT[eos].sum()) == 0
    few = blocks_of(parts, tmp_path, tokenizer, 7, 50)
    for cut, whole in ((few.ids_NT, blocks.ids_NT), (few.bytes_NT, blocks.bytes_NT)):
        assert cut.flatten().tolist() == whole.flatten()[:49].tolist()
    assert source.startswith(few.text)
    assert [len(window) for window in few.windows()] == few.bytes_NT.sum(1).tolist()
    # One token a byte, inside of characters.
    cut = blocks_of([MIXED], tmp_path, byte_tokenizer(), 5, 9999)
    assert set(cut.bytes_NT.flatten().tolist()) == {1} and cut.windows()[1] == MIXED.encode()[5:10]


def test_a_limit_stops_the_tokenizer_and_too_few_tokens_are_said(monkeypatch, tmp_path):
    seen, count, have = [], texts.byte_counts, len(BYTE_LEVEL.encode("lazy dogs"))
    assert blocks_of(["lazy dogs"], tmp_path, BYTE_LEVEL, have, 99).ids_NT.shape == (1, have)
    with pytest.raises(DataError, match=rf"has {have} tokens: need at least {have + 1}"):
        blocks_of(["lazy dogs"], tmp_path, BYTE_LEVEL, have + 1, 99)
    monkeypatch.setattr(texts, "PIECE_CHARS", 100)
    monkeypatch.setattr(texts, "byte_counts", lambda *args: seen.append(1) or count(*args))
    assert len(blocks_of([WORDS * 200], tmp_path, BYTE_LEVEL, 8, 50)) == 50 // 8
    assert len(seen) <= texts.BATCH


def test_order_is_a_new_shuffle_each_epoch_and_the_same_for_a_seed():
    before = torch.get_rng_state()
    order = data.block_order(num_blocks=10, steps=8, batch=3, seed=5)
    first, second = order[:10].tolist(), order[10:20].tolist()
    assert sorted(first) == sorted(second) == list(range(10)) and first != second
    assert not torch.equal(order, data.block_order(10, 8, 3, seed=6))
    assert torch.equal(order, data.block_order(10, 20, 3, seed=5)[:24]), "a longer run begins alike"
    assert torch.equal(before, torch.get_rng_state())


def test_a_text_that_goes_on_behind_the_run_is_said(recipe_values, tmp_path):
    said, long = [], tmp_path / "long.txt"
    long.write_text(WORDS * 100)
    recipe_values |= {"steps": 4, "batch_size": 2, "sequence_length": 32}
    for train_on in (str(long), {str(long): 1, recipe_values["data"]["heldout"]: 1}):
        recipe_values["data"] |= {"train": train_on}
        data.rows_and_heldout(
            check_recipe(recipe_values, "test"), byte_tokenizer(), False, said.append
        )
    recipe_values |= {"steps": 4000}
    data.rows_and_heldout(check_recipe(recipe_values, "test"), byte_tokenizer(), False, said.append)
    first, *_ = said
    assert first.startswith(f"{long}: only its first 256 tokens are trained on")
    assert [line.split(":")[0] for line in said].count(str(long)) == 2
