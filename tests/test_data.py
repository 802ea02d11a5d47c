"""Data: files become documents, documents become blocks, equal seeds give equal orders."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

from conftest import byte_tokenizer
from sememe import data
from sememe.errors import DataError
from sememe.paths import source_sha256

WORDS = (
    "the quick brown fox, it jumps over 12 lazy dogs.\n"
    "And then: two\n\nparagraphs  with   gaps 3.\n"
)
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
    raw.decoder = decoders.ByteLevel()
    special = ["<unk>", "<eos>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = BpeTrainer(
        vocab_size=400, initial_alphabet=alphabet, special_tokens=special, show_progress=False
    )
    raw.train_from_iterator([WORDS * 20], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token=eos)


@pytest.fixture(scope="module")
def tokenizer():
    return train()


def ids(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def test_files_are_documents(tmp_path):
    path = tmp_path / "a#b.txt"  # a file may have a # in its name
    path.write_bytes("\ufeffÄpfel\n\nund Birnen\n".encode())
    assert data.read_texts(str(path)) == ["Äpfel\n\nund Birnen\n"]
    rows = [{"text": "one\u2028still one", "response": "1"}, {"text": "", "response": "2"}]
    path = tmp_path / "a.jsonl"
    lines = "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    path.write_text(f"\ufeff\n{lines}\n", encoding="utf-8")
    assert data.read_texts(str(path)) == ["one\u2028still one", ""]
    assert data.read_texts(f"{path}#response") == ["1", "2"]
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["one", "two"], "n": [1, 2], "null": ["x", None]}), path)
    assert data.read_texts(str(path)) == ["one", "two"]
    for field, line in (("n", 1), ("null", 2), ("body", 1)):
        with pytest.raises(DataError, match=f"line {line} has no field '{field}' of text"):
            data.read_texts(f"{path}#{field}")


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("storys.txt", None, r"^storys\.txt does not exist"),
        ("data/a#b/missing.txt", None, r"^data/a#b/missing\.txt does not exist"),
        ("once upon a time " * 30, None, r"^once .{60,80}… \(510 characters\) does not exist"),
        ("nul\0.txt", None, "does not exist"),
        ("~nobody-of-that-name/a.txt", None, "does not exist"),
        ("x" * 300 + ".jsonl", None, "does not exist"),
        (".", None, "is a folder"),
        ("a.csv", b"text\nx\n", r"is a file \.csv: need one of \.txt, \.jsonl, \.parquet"),
        ("a.txt", b"good\nstill good\n\xc4pfel\n", "byte 0xc4 in position"),
        ("a.txt", b" \n\t\n", "is empty"),
        ("a.parquet", b"not parquet", "cannot be read"),
        ("a.jsonl", b'{"text": " "}\n', "is empty"),
        ("a.jsonl", b'{"text": "a"', "line 3 cannot be read"),
        ("a.jsonl", b'{"text": "\xff"}', "line 3 cannot be read"),
        ("a.jsonl", b'["a"]', r"line 3 has no field 'text' of text, it has \['a'\]"),
        ("a.jsonl", b'{"txt": "a"}', "line 3 has no field 'text' .*'txt': 'a'.*FILE#FIELD"),
        ("a.jsonl", b'{"text": 7}', "line 3 has no field 'text' of text"),
        ("a.jsonl", b'{"text": null}', "line 3 has no field 'text' .*try: drop that row"),
        ("a.jsonl", b'{"text": "cut \\ud83d off"}', "line 3 has half of a character"),
    ],
)
def test_what_is_no_text_is_one_sentence(tmp_path, monkeypatch, name, content, said):
    monkeypatch.chdir(tmp_path)
    if content:
        before = b'{"text": "fine"}\n\n' if "line 3" in said else b""
        (tmp_path / name).write_bytes(before + content)
    with pytest.raises(DataError, match=said):
        data.read_texts(name)
    assert len(source_sha256(name)) == 64


def test_a_source_is_told_by_its_content(tmp_path, monkeypatch):
    for name in ("a.jsonl", "copy.jsonl"):
        (tmp_path / name).write_text('{"text": "one", "body": "two"}\n')
    (tmp_path / "a.txt").write_text("one")
    monkeypatch.chdir(tmp_path)
    names = ("a.jsonl", "a.jsonl#text", str(tmp_path / "a.jsonl"), "copy.jsonl#text")
    same = {source_sha256(name) for name in names}
    assert len(same) == 1
    names = ("a.jsonl#body", "a.txt", "org/name", "org/name#body")
    assert len(same | {source_sha256(name) for name in names}) == 5
    assert source_sha256("a.txt") == source_sha256("a.txt#any")


def test_a_dataset_id(monkeypatch):
    import datasets

    def load_dataset(source, split):
        if source == "org/name":
            return datasets.Dataset.from_dict({"story": ["one", "two"]})
        raise ConnectionError("Name or service not known")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert data.read_texts("org/name#story") == ["one", "two"]
    for name, said in (("org/name", "no field 'text' of text"), ("org/other", "not known.*try: ")):
        with pytest.raises(DataError, match=said):
            data.read_texts(name)


def test_blocks_are_the_stream_with_eos_between_documents(tokenizer):
    fox, dogs = ids(tokenizer, "the quick fox"), ids(tokenizer, "lazy dogs")
    stream = [*fox, tokenizer.eos_token_id, *dogs]
    whole = data.token_blocks(["the quick fox", " \n", "", "lazy dogs"], tokenizer, 1)
    assert whole.dtype == torch.long and whole.flatten().tolist() == stream
    blocks = data.token_blocks(["the quick fox", "lazy dogs"], tokenizer, 3)
    assert blocks.tolist() == [stream[i : i + 3] for i in range(0, len(stream) - 2, 3)]
    bare = train(eos=None)
    whole = data.token_blocks(["fox", "dogs"], bare, 1).flatten().tolist()
    assert whole == ids(bare, "fox") + ids(bare, "dogs")


@pytest.mark.parametrize("chars", [14, 20, 64])
def test_pieces_give_the_ids_of_the_whole(monkeypatch, tokenizer, chars):
    # No double spaces and no word over 13 characters, so that every piece ends before a lone space.
    text = "the quick brown fox, it jumps over 12 lazy dogs. And then two paragraphs with gaps " * 9
    monkeypatch.setattr(data, "PIECE_CHARS", chars)
    pieces = [match.group() for match in data._pieces(text)]
    assert "".join(pieces) == text and len(pieces) > 3 and max(map(len, pieces)) <= chars
    assert all(piece[0] == " " != piece[1] for piece in pieces[1:])
    for other in ("word\n" * 40, "x" * 200, "a  b   " * 30, " " * 90 + "z"):
        assert "".join(match.group() for match in data._pieces(other)) == other, "nothing is lost"
    assert data.token_blocks([text], tokenizer, 1).flatten().tolist() == ids(tokenizer, text)


@pytest.mark.parametrize("kind", ["byte level", "trimmed", "prefix"])
def test_blocks_have_the_bytes_of_the_source(kind, monkeypatch):
    tokenizer = train(kind)
    monkeypatch.setattr(data, "PIECE_CHARS", 30)
    texts = [MIXED, " ", "go", MIXED * 3, "go"]
    source = "".join(text for text in texts if text.strip()).encode()
    blocks = data.text_blocks(texts, tokenizer, 1)
    assert blocks.text == source == b"".join(blocks.windows())
    assert int(blocks.bytes_NT.sum()) == len(source) and int(blocks.bytes_NT.min()) >= 0
    eos = blocks.ids_NT == tokenizer.eos_token_id
    assert int(eos.sum()) == 3 and int(blocks.bytes_NT[eos].sum()) == 0
    few = data.text_blocks(texts, tokenizer, 7, limit=50)
    assert few.ids_NT.flatten().tolist() == blocks.ids_NT.flatten()[:49].tolist()
    assert few.bytes_NT.flatten().tolist() == blocks.bytes_NT.flatten()[:49].tolist()
    assert source.startswith(few.text)
    assert [len(window) for window in few.windows()] == few.bytes_NT.sum(1).tolist()
    cut = data.text_blocks([MIXED], byte_tokenizer(), 5)  # one token a byte, inside of characters
    assert set(cut.bytes_NT.flatten().tolist()) == {1} and cut.windows()[1] == MIXED.encode()[5:10]


def test_limit_is_exact_and_stops_the_tokenizer(tokenizer, monkeypatch):
    monkeypatch.setattr(data, "PIECE_CHARS", 100)
    full = data.token_blocks([WORDS * 200], tokenizer, 8)
    seen = []
    count = data.byte_counts
    monkeypatch.setattr(data, "byte_counts", lambda *args: (seen.append(1), count(*args))[1])
    cut = data.token_blocks([WORDS * 200], tokenizer, 8, limit=50)
    assert cut.tolist() == full[:6].tolist()  # 50 tokens hold six blocks of eight
    assert len(seen) <= data.BATCH


def test_too_few_tokens_says_how_many(tokenizer):
    have = len(ids(tokenizer, "lazy dogs"))
    with pytest.raises(DataError, match=f"the text has {have} tokens: need at least {have + 1}"):
        data.token_blocks(["lazy dogs"], tokenizer, have + 1)
    assert data.token_blocks(["lazy dogs"], tokenizer, have).shape == (1, have)
    with pytest.raises(DataError, match="need at least 4"):
        data.token_blocks([WORDS], tokenizer, 4, limit=3)
    with pytest.raises(DataError, match="the text has 0 tokens"):
        data.token_blocks(["", " "], tokenizer, 4)


def test_order_is_a_new_shuffle_each_epoch_and_the_same_for_a_seed():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    order = data.block_order(num_blocks=10, steps=8, batch=3, seed=5)
    assert order.dtype == torch.long and order.shape == (24,)
    first, second = order[:10].tolist(), order[10:20].tolist()
    assert sorted(first) == sorted(second) == list(range(10)) and first != second
    assert torch.equal(order, data.block_order(10, 8, 3, seed=5))
    assert not torch.equal(order, data.block_order(10, 8, 3, seed=6))
    assert torch.equal(order, data.block_order(10, 20, 3, seed=5)[:24]), "a longer run begins alike"
    assert torch.equal(before, torch.get_rng_state())
