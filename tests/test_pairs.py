"""Pairs: rows and documents become (u, y), and those become aligned token tensors."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from conftest import byte_tokenizer
from sememe import pairs
from sememe.errors import DataError
from sememe.pairs import Pair, pair_tensors, read_pairs

FIELDS = ("instruction", "response")


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


def jsonl(path, rows):
    path.write_text("\n\n".join(json.dumps(row) for row in rows) + "\n")
    return str(path)


# read_pairs


def test_two_named_fields_of_a_jsonl_and_a_parquet(tmp_path):
    rows = [
        {"instruction": "Say one.", "response": "one"},
        {"response": "two", "instruction": "Say two."},
    ]
    wanted = [Pair("Say one.", "one"), Pair("Say two.", "two")]
    assert read_pairs(jsonl(tmp_path / "a.jsonl", rows), FIELDS) == wanted
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert read_pairs(str(tmp_path / "a.parquet"), FIELDS) == wanted


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"instruction": "x", "response": " \n"}, r"line 3 has nothing in 'response'"),
        ({"instruction": "", "response": "y"}, r"line 3 has nothing in 'instruction'"),
        (
            {"instruction": "x", "response": "\ud83d"},
            r"line 3, field 'response', has half of a character",
        ),
        ({"instruction": "x"}, r"line 3 has no field 'response', it has 'instruction'"),
        ({"instruction": "x", "response": None}, r"line 3 has null in 'response'"),
    ],
)
def test_an_empty_or_missing_field_names_its_line(tmp_path, row, said):
    path = jsonl(
        tmp_path / "a.jsonl", [{"instruction": "x", "response": "y"}, row]
    )  # a blank line stands between
    with pytest.raises(DataError, match=said):
        read_pairs(path, FIELDS)


def test_an_empty_field_of_a_parquet_names_its_row(tmp_path):
    pq.write_table(pa.table({"u": ["a", "b"], "y": ["c", ""]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="row 1 has nothing in 'y'"):
        read_pairs(str(tmp_path / "a.parquet"), ("u", "y"))


@pytest.mark.parametrize(
    ("name", "fields", "said"),
    [
        ("a.jsonl#text", FIELDS, "names the field 'text'.*try: .*a.jsonl$"),
        ("a.jsonl", ("text", "text"), "both the field 'text'"),
        ("a.txt", FIELDS, "plain text, it has no fields"),
    ],
)
def test_fields_that_cannot_be_are_refused(tmp_path, name, fields, said):
    with pytest.raises(DataError, match=said):
        read_pairs(str(tmp_path / name), fields)


def test_a_hash_in_a_file_name_is_no_field(tmp_path):
    assert read_pairs(jsonl(tmp_path / "a#b.jsonl", [{"u": "one", "y": "two"}]), ("u", "y")) == [
        Pair("one", "two")
    ]


def test_documents_are_cut_in_front_of_the_white_space_nearest_to_the_opening(tmp_path):
    path = jsonl(
        tmp_path / "a.jsonl",
        [{"text": "one two three four"}, {"text": " \n"}, {"text": "word"}, {"text": " a\nb  "}],
    )
    assert read_pairs(path) == [Pair("one", " two three four"), Pair(" a", "\nb  ")]
    assert read_pairs(path, opening=0.7)[0] == Pair("one two three", " four")
    assert read_pairs(path, opening=0.01)[0] == Pair("one", " two three four")
    assert read_pairs(path, opening=0.99)[0] == Pair("one two three", " four")


def test_long_documents_give_several_pairs(tmp_path):
    (tmp_path / "a.txt").write_text(text := "the quick brown fox jumps " * 40)
    found = read_pairs(str(tmp_path / "a.txt"), chars=200)
    assert len(found) == -(-len(text) // 200)
    assert "".join(pair.source + pair.target for pair in found) == text
    assert max(len(pair.source + pair.target) for pair in found) < 210
    assert all(0.15 < len(pair.source) / len(pair.source + pair.target) < 0.35 for pair in found)
    assert len(read_pairs(str(tmp_path / "a.txt"))) == 1


@given(st.text("ab \n\t", max_size=60), st.floats(0.01, 0.99), st.none() | st.integers(2, 20))
def test_cutting_loses_nothing_and_both_sides_have_a_word(text, opening, chars):
    assert "".join(pairs._pieces(text, chars)) == text
    at = pairs._cut(text, opening)
    if len(text.split()) < 2:
        assert at is None
    else:
        assert (
            text[:at].strip()
            and text[at:].strip()
            and text[at].isspace()
            and not text[at - 1].isspace()
        )


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"opening": 0.0}, "opening = 0.0"),
        ({"opening": 1.0}, "opening = 1.0"),
        ({"chars": 1}, "pieces of 1 char"),
        ({}, "no document of two words"),
    ],
)
def test_what_cannot_be_cut_is_refused(tmp_path, options, said):
    with pytest.raises(DataError, match=said):
        read_pairs(jsonl(tmp_path / "a.jsonl", [{"text": "word"}]), **options)


# pair_tensors


def test_sources_end_and_targets_begin_at_the_same_column(tokenizer):
    made = pair_tensors([Pair("abc", "de"), Pair("f", "ghij")], tokenizer, 8, 8)
    a, b, c, d, e, f, g, h, i, j = (tokenizer.convert_tokens_to_ids(x) for x in "abcdefghij")
    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    assert made.source_NU.tolist() == [[a, b, c], [pad, pad, f]]
    assert made.source_mask_NU.tolist() == [[1, 1, 1], [0, 0, 1]]
    assert made.target_NY.tolist() == [[d, e, eos, -100, -100], [g, h, i, j, eos]]
    assert made.source_NU.dtype == made.source_mask_NU.dtype == made.target_NY.dtype == torch.long
    assert len(made) == 2 and made.cut() is None


def test_too_long_sources_keep_their_end_targets_their_beginning_and_that_is_said(tokenizer):
    made = pair_tensors(
        [Pair("abcd", "efgh"), Pair("abc", "efg"), Pair("a", "ef")], tokenizer, 3, 3
    )
    b, c, d, e, f, g = (tokenizer.convert_tokens_to_ids(x) for x in "bcdefg")
    assert made.source_NU[0].tolist() == [b, c, d]
    assert made.target_NY.tolist() == [
        [e, f, g],
        [e, f, g],
        [e, f, tokenizer.eos_token_id],
    ]  # the second has no room for eos
    assert (made.cut_sources, made.cut_targets) == (1, 1)
    assert (
        made.cut() == "of 3 pairs, 1 sources keep their last 3 tokens and 1 targets their first 3"
    )


def test_a_tokenizer_without_eos_and_pad_ends_nothing():
    bare = byte_tokenizer()
    bare.eos_token = bare.pad_token = None
    made = pair_tensors([Pair("ab", "c"), Pair("a", "cd")], bare, 4, 4)
    assert made.target_NY.shape == (2, 2) and made.target_NY[0, 1] == -100
    assert made.source_NU[1, 0] == 0 and made.source_mask_NU[1].tolist() == [0, 1]


def test_bytes_of_targets_are_those_of_the_text_without_what_was_cut(tokenizer):
    made = pair_tensors(
        [Pair("a", "日本"), Pair("a", "日"), Pair("a", "bc")], tokenizer, 4, 4
    )  # one token a byte
    assert made.target_bytes_N.tolist() == [4, 3, 2], (
        "an end of text has none, half a character those that are there"
    )
    assert made.rows(torch.tensor([2, 0])).target_bytes_N.tolist() == [2, 4]


@pytest.mark.parametrize(
    ("given", "lengths", "said"),
    [
        ([Pair("a", "b")], (0, 4), "0 source tokens and 4 target tokens"),
        ([], (4, 4), "there are no pairs"),
        ([Pair("a", "b"), Pair("", "b")], (4, 4), "source of pair 1 has no token"),
        ([Pair("a", "")], (4, 4), "target of pair 0 has no token"),
    ],
)
def test_what_has_no_tensor_is_refused(tokenizer, given, lengths, said):
    with pytest.raises(DataError, match=said):
        pair_tensors(given, tokenizer, *lengths)
