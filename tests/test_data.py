"""Data: files become documents, documents become blocks, equal seeds give equal orders."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from sememe import data
from sememe.errors import DataError
from sememe.paths import source_sha256

WORDS = "the quick brown fox, it jumps over 12 lazy dogs.\nAnd then: two\n\nparagraphs  with   gaps 3.\n"


def train(
    pre_tokenizer: pre_tokenizers.PreTokenizer,
    eos: str | None,
    normalizer: normalizers.Normalizer | None = None,
) -> PreTrainedTokenizerFast:
    raw = Tokenizer(models.BPE(unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizer
    if normalizer:
        raw.normalizer = normalizer
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    raw.train_from_iterator(
        [WORDS * 20],
        trainers.BpeTrainer(
            vocab_size=400,
            initial_alphabet=alphabet,
            special_tokens=["<unk>", "<eos>"],
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token=eos)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train(pre_tokenizers.ByteLevel(add_prefix_space=False), "<eos>")


def ids(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


# read_texts


def test_txt_is_one_document(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeffÄpfel\n\nund Birnen\n".encode())
    assert data.read_texts(str(path)) == ["Äpfel\n\nund Birnen\n"]


def test_txt_in_another_encoding_names_the_line(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"good\nstill good\n\xc4pfel\n")
    with pytest.raises(DataError, match="line 3 has the byte 0xc4"):
        data.read_texts(str(path))


def test_jsonl_rows_keep_their_order_and_their_pairs(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    rows = [{"text": "one\u2028still one", "response": "1"}, {"text": "", "response": "2"}]
    path.write_text(
        "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n", encoding="utf-8"
    )
    assert data.read_texts(str(path)) == ["one\u2028still one", ""]
    assert (
        data.read_texts(f"{path}#response")
        == ["1", "2"]
        == data.read_texts(str(path), field="response")
    )


def test_a_hash_in_a_file_name_is_no_field(tmp_path: Path) -> None:
    (tmp_path / "a#b.txt").write_text("here")
    assert data.read_texts(str(tmp_path / "a#b.txt")) == ["here"]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b'{"text": "a"', "line 3 is not JSON"),
        (b'{"text": "\xff"}', "line 3 is not JSON"),
        (b'["a"]', "line 3 holds a list"),
        (b'{"txt": "a"}', r"line 3 has no field 'text', it has 'txt'.*FILE#txt"),
        (b'{"text": 7}', "line 3 has a int in 'text'"),
        (b'{"text": null}', "line 3 has null in 'text'.*try: drop that row"),
        (
            b'{"text": "cut \\ud83d off"}',
            r"line 3, field 'text', has half of a character \('\\ud83d'\) at character 4",
        ),
    ],
)
def test_a_bad_jsonl_line_is_named(tmp_path: Path, line: bytes, said: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "fine"}\n\n' + line + b"\n")
    with pytest.raises(DataError, match=said):
        data.read_texts(str(path))


def test_a_byte_order_mark_alone_is_no_row(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf\n{"text": "one"}\n')
    assert data.read_texts(str(path)) == ["one"]


def test_parquet(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["one", "two"], "n": [1, 2]}), path)
    assert data.read_texts(str(path)) == ["one", "two"]
    with pytest.raises(DataError, match="row 0 has a int in 'n'"):
        data.read_texts(f"{path}#n")
    pq.write_table(pa.table({"text": ["one", None]}), tmp_path / "null.parquet")
    with pytest.raises(DataError, match="row 1 has null in 'text'"):
        data.read_texts(str(tmp_path / "null.parquet"))
    with pytest.raises(DataError, match="no field 'body', it has 'text', 'n'"):
        data.read_texts(f"{path}#body")
    path.write_bytes(b"not parquet")
    with pytest.raises(DataError, match="not a readable parquet"):
        data.read_texts(str(path))


def test_a_missing_file_names_its_neighbours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "stories.txt").write_text("x")
    monkeypatch.setattr(
        data, "_from_datasets", lambda *args: pytest.fail("a path is no dataset id")
    )
    with pytest.raises(DataError, match=r"does not exist.*Did you mean .*stories\.txt\?"):
        data.read_texts(str(tmp_path / "storys.txt"))


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("data/a#b/missing.txt", r"^data/a#b/missing\.txt does not exist"),
        ("missing.txt#body", r"^missing\.txt#body does not exist"),
        (
            "once upon a time " * 30,
            r"^once upon .{60,80}… \(510 characters\) does not exist.*try: put a text into a \.txt "
            r"file",
        ),
        ("nul\0.txt", "does not exist"),
        ("~nobody-of-that-name/a.txt", "does not exist"),
        ("x" * 300 + ".jsonl", "does not exist"),
    ],
)
def test_what_is_no_path_is_one_sentence(source: str, said: str) -> None:
    with pytest.raises(DataError, match=said):
        data.read_texts(source)
    assert len(source_sha256(source)) == 64


def test_a_source_is_told_by_its_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a.jsonl", "copy.jsonl"):
        (tmp_path / name).write_text('{"text": "one", "body": "two"}\n')
    (tmp_path / "a.txt").write_text("one")
    monkeypatch.chdir(tmp_path)
    same = {
        source_sha256(str(name))
        for name in ("a.jsonl", "a.jsonl#text", tmp_path / "a.jsonl", "copy.jsonl#text")
    }
    assert len(same) == 1
    others = {
        source_sha256(name) for name in ("a.jsonl#body", "a.txt", "org/name", "org/name#body")
    }
    assert len(others | same) == 5
    assert source_sha256("a.txt") == source_sha256("a.txt#any")


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.csv", "text\nx\n", r"file \.csv: need one of \.txt, \.jsonl, \.parquet"),
        ("a.txt", "", "is empty"),
        ("a.txt", " \n\t\n", "is empty"),
        ("a.jsonl", "\n", "is empty"),
        ("a.jsonl", '{"text": " "}\n', "is empty"),
    ],
)
def test_other_kinds_and_empty_files_are_refused(
    tmp_path: Path, name: str, content: str, said: str
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=said):
        data.read_texts(str(tmp_path / name))


def test_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is a folder"):
        data.read_texts(str(tmp_path))


def test_a_dataset_id(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets
    from huggingface_hub import HfApi

    rows = datasets.Dataset.from_dict({"story": ["one", "two"]})
    monkeypatch.setattr(HfApi, "dataset_info", lambda *args, **kwargs: None)
    monkeypatch.setattr(
        datasets, "load_dataset", lambda source, split: rows if split == "test" else None
    )
    assert data.read_texts("org/name#story", split="test") == ["one", "two"]
    with pytest.raises(DataError, match="no field 'text', it has 'story'"):
        data.read_texts("org/name", split="test")

    def unreachable(*args: object, **kwargs: object) -> None:
        raise ConnectionError("Name or service not known")

    monkeypatch.setattr(HfApi, "dataset_info", unreachable)
    with pytest.raises(DataError, match="Name or service not known"):
        data.read_texts("org/name#story", split="test")


# token_blocks


def test_blocks_are_the_stream_with_eos_between_documents(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    one, two, eos = (
        ids(tokenizer, "the quick fox"),
        ids(tokenizer, "lazy dogs"),
        tokenizer.eos_token_id,
    )
    stream = [*one, eos, *two]
    whole = data.token_blocks(["the quick fox", " \n", "", "lazy dogs"], tokenizer, 1)
    assert whole.dtype == torch.long
    assert whole.flatten().tolist() == stream
    blocks = data.token_blocks(["the quick fox", "lazy dogs"], tokenizer, 3)
    assert blocks.tolist() == [stream[i : i + 3] for i in range(0, len(stream) - 2, 3)]


def test_a_tokenizer_without_eos_puts_nothing_between() -> None:
    bare = train(pre_tokenizers.ByteLevel(add_prefix_space=False), None)
    stream = data.token_blocks(["fox", "dogs"], bare, 1).flatten().tolist()
    assert stream == ids(bare, "fox") + ids(bare, "dogs")


@pytest.mark.parametrize("chars", [14, 20, 64])
@pytest.mark.parametrize("kind", ["byte level", "prefix"])
def test_pieces_give_the_ids_of_the_whole(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch, chars: int, kind: str
) -> None:
    if kind == "prefix":  # as llama 2: a space of its own before every text
        space = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        tokenizer = train(
            pre_tokenizers.Split("▁", "merged_with_next"), "<eos>", normalizers.Sequence(space)
        )
    # No double spaces and no word over 13 characters, so that every piece ends before a lone space.
    text = "the quick brown fox, it jumps over 12 lazy dogs. And then two paragraphs with gaps " * 9
    monkeypatch.setattr(data, "PIECE_CHARS", chars)
    pieces = list(data._pieces(text))
    assert "".join(pieces) == text
    assert len(pieces) > 3
    assert max(map(len, pieces)) <= chars
    assert data.token_blocks([text], tokenizer, 1).flatten().tolist() == ids(tokenizer, text)


def test_pieces_begin_at_a_lone_space_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "PIECE_CHARS", 32)
    pieces = list(data._pieces("one two.\nthree\n\nfour  five" * 20))
    assert len(pieces) > 10
    for piece in pieces[1:]:
        assert piece[0] == " "
        assert piece[1] != " "


@pytest.mark.parametrize("text", ["word\n" * 40, "x" * 200, "a  b   " * 30, " " * 90 + "z"])
def test_pieces_never_lose_a_character(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr(data, "PIECE_CHARS", 16)
    pieces = list(data._pieces(text))
    assert "".join(pieces) == text
    assert len(pieces) > 1


MIXED = "Ünïcode 👩‍👩‍👧 日本語\r\n\n  and  spaces \t at the end 🙂 \n"


@pytest.mark.parametrize("kind", ["byte level", "trimmed", "prefix", "slow"])
def test_blocks_have_the_bytes_of_the_source(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pieces = {"prefix": pre_tokenizers.Split("▁", "merged_with_next")}.get(
        kind, pre_tokenizers.ByteLevel(add_prefix_space=False)
    )
    space = (
        normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        if kind == "prefix"
        else None
    )
    tokenizer = train(pieces, "<eos>", space)
    if kind == "trimmed":  # as GPT-2: offsets leave white space out
        tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    if kind == "slow":
        fast = tokenizer
        tokenizer = lambda texts, **options: fast(texts, **options)  # noqa: E731
        tokenizer.eos_token_id = fast.eos_token_id
    monkeypatch.setattr(data, "PIECE_CHARS", 30)
    texts = [MIXED, " ", "go", MIXED * 3, "go"]
    whole = "".join(text for text in texts if text.strip()).encode()
    made = data.text_blocks(texts, tokenizer, 1)
    assert made.text == whole == b"".join(made.windows())
    assert made.ids_NT.tolist() == data.token_blocks(texts, tokenizer, 1).tolist()
    assert int(made.bytes_NT.sum()) == len(whole)
    assert int(made.bytes_NT.min()) >= 0
    eos = made.ids_NT == tokenizer.eos_token_id
    assert int(eos.sum()) == 3
    assert int(made.bytes_NT[eos].sum()) == 0
    few = data.text_blocks(texts, tokenizer, 7, limit=50)
    assert few.ids_NT.tolist() == data.token_blocks(texts, tokenizer, 7, limit=50).tolist()
    assert few.bytes_NT.flatten().tolist() == made.bytes_NT.flatten()[: few.ids_NT.numel()].tolist()
    assert whole.startswith(few.text)
    assert [len(window) for window in few.windows()] == few.bytes_NT.sum(1).tolist()


def test_a_row_that_is_cut_inside_a_character_has_its_own_bytes() -> None:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    raw.pre_tokenizer, raw.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    made = data.text_blocks(
        [MIXED], PreTrainedTokenizerFast(tokenizer_object=raw), 5
    )  # one token a byte
    assert set(made.bytes_NT.flatten().tolist()) == {1}
    assert made.windows() == [
        MIXED.encode()[at : at + 5] for at in range(0, made.ids_NT.numel(), 5)
    ]


def test_limit_is_exact_and_stops_the_tokenizer(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data, "PIECE_CHARS", 100)
    full = data.token_blocks([WORDS * 200], tokenizer, 8)
    seen: list[int] = []

    class Counting:
        eos_token_id = tokenizer.eos_token_id

        def __call__(self, text: str | list[str], **options: object) -> object:
            seen.append(len("".join(text)))
            return tokenizer(text, **options)

    cut = data.token_blocks([WORDS * 200], Counting(), 8, limit=50)
    assert cut.tolist() == full[:6].tolist()  # 50 tokens hold six blocks of eight
    assert sum(seen) < 500 < len(WORDS) * 200


def test_too_few_tokens_says_how_many(tokenizer: PreTrainedTokenizerFast) -> None:
    have = len(ids(tokenizer, "lazy dogs"))
    with pytest.raises(DataError, match=f"the text has {have} tokens: need at least {have + 1}"):
        data.token_blocks(["lazy dogs"], tokenizer, have + 1)
    assert data.token_blocks(["lazy dogs"], tokenizer, have).shape == (1, have)
    with pytest.raises(DataError, match="the limit leaves 3 tokens"):
        data.token_blocks([WORDS], tokenizer, 4, limit=3)
    with pytest.raises(DataError, match="the text has 0 tokens"):
        data.token_blocks(["", " "], tokenizer, 4)
    with pytest.raises(DataError, match="block of 0 tokens"):
        data.token_blocks([WORDS], tokenizer, 0)


# block_order


def test_order_is_a_new_shuffle_each_epoch_and_the_same_for_a_seed() -> None:
    order = data.block_order(num_blocks=10, steps=8, batch=3, seed=5)
    assert order.dtype == torch.long
    assert order.shape == (24,)
    first, second = order[:10].tolist(), order[10:20].tolist()
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second
    assert torch.equal(order, data.block_order(10, 8, 3, seed=5))
    assert not torch.equal(order, data.block_order(10, 8, 3, seed=6))


def test_order_of_a_longer_run_begins_alike_and_leaves_the_global_seed_alone() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    long = data.block_order(7, 20, 2, seed=1)
    assert torch.equal(long[:10], data.block_order(7, 5, 2, seed=1))
    assert torch.equal(before, torch.get_rng_state())
    assert data.block_order(7, 0, 2, seed=1).shape == (0,)
    with pytest.raises(DataError, match="0 blocks"):
        data.block_order(0, 1, 1, seed=0)
