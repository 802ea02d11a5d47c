"""Pairs: rows and documents become (u, y), and those become aligned token tensors."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from conftest import byte_tokenizer
from sememe.errors import DataError, RecipeError
from sememe.pairs import IGNORED, Pair, PairForm, cut_pairs, pair_tensors, read_pairs

FIELDS = ("instruction", "response")
FOX = "the quick brown fox jumps " * 40
BYTES = byte_tokenizer()  # one token a byte


def test_two_named_fields_of_a_jsonl_and_a_parquet(tmp_path):
    rows = [{"instruction": f"Say {word}.", "response": word} for word in ("one", "two")]
    lines = "\n\n".join(map(json.dumps, rows))
    (tmp_path / "a#b.jsonl").write_text(lines)
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    for file in ("a#b.jsonl", "a.parquet"):
        want = [Pair("Say one.", "one"), Pair("Say two.", "two")]
        assert read_pairs(str(tmp_path / file), FIELDS) == want
    (tmp_path / "a.jsonl").write_text(lines.replace('"two"', '" \\n"'))
    with pytest.raises(DataError, match="line 3 has an empty field"):
        read_pairs(str(tmp_path / "a.jsonl"), FIELDS)


def test_documents_are_cut_before_the_white_space_nearest_to_the_share():
    texts = ["one two three four", " \n", "word", " a\nb  "]
    assert cut_pairs(texts, 0.25, 100) == [Pair("one", " two three four"), Pair(" a", "\nb  ")]
    for share, source in ((0.7, "one two three"), (0.01, "one"), (0.99, "one two three")):
        assert cut_pairs(texts, share, 100)[0].source == source


def test_long_documents_give_several_pairs():
    cut = cut_pairs([FOX], 0.25, 200)
    pieces = [pair.source + pair.target for pair in cut]
    assert len(cut) == -(-len(FOX) // 200) and "".join(pieces) == FOX
    for pair, piece in zip(cut, pieces, strict=True):
        assert len(piece) < 210 and 0.15 < len(pair.source) / len(piece) < 0.35


@given(st.text("ab \n\t", min_size=1, max_size=60), st.floats(0.01, 0.99))
def test_cutting_loses_nothing_and_both_sides_have_a_word(text, share):
    cut = cut_pairs([text], share, len(text))
    assert len(cut) == (len(text.split()) > 1)
    for source, target in cut:
        assert source + target == text and source.strip() and target.strip()
        assert target[0].isspace() and not source[-1].isspace()


def test_a_form_takes_pairs_up_to_a_count_or_until_there_are_tokens(tmp_path):
    (tmp_path / "a.txt").write_text(FOX)
    form = PairForm(None, 0.25, 16, 48)
    assert len(form.load(str(tmp_path / "a.txt"), BYTES, max_pairs=3)) == 3
    few = form.load(str(tmp_path / "a.txt"), BYTES, min_tokens=100)
    tokens_N = (few.target_NY != IGNORED).sum(1)
    assert int(tokens_N.sum()) >= 100 > int(tokens_N[:-1].sum())


def test_a_form_of_a_recipe():
    recipe = {"system": "online", "source_length": 8, "target_length": 9}
    data = {"train": "a", "heldout": "b"}
    assert PairForm.of(recipe | {"data": data}) is None
    planner = recipe | {"system": "planner", "data": data}
    assert PairForm.of(planner) == PairForm(None, 0.25, 8, 9)
    share = recipe | {"data": data | {"source_share": 0.5}}
    assert PairForm.of(share) == PairForm(None, 0.5, 8, 9)
    fields = recipe | {"data": data | {"fields": ["a", "b"], "source_share": None}}
    assert PairForm.of(fields) == PairForm(("a", "b"), 0.25, 8, 9)
    with pytest.raises(RecipeError, match=r"unknown key 'opening'.*try: "):  # an earlier release's
        PairForm.of(recipe | {"data": data | {"opening": 0.5}})


def test_sources_end_and_targets_begin_at_the_same_column():
    tensors = pair_tensors([Pair("abc", "de"), Pair("f", "ghij")], BYTES, 8, 8)
    a, b, c, d, e, f, g, h, i, j = (BYTES.convert_tokens_to_ids(x) for x in "abcdefghij")
    bos, eos, pad = 1, BYTES.eos_token_id, 0
    assert tensors.source_NU.tolist() == [[a, b, c], [pad, pad, f]]
    assert tensors.source_mask_NU.tolist() == [[1, 1, 1], [0, 0, 1]]
    assert tensors.target_NY.tolist() == [[d, e, eos, -100, -100], [g, h, i, j, eos]]
    assert tensors.target_texts(BYTES) == ["de", "ghij"] and tensors.cut == 0
    ids, mask = tensors.prompts(bos)
    assert ids.tolist() == [[bos, a, b, c], [pad, pad, bos, f]]
    assert mask.tolist() == [[1, 1, 1, 1], [0, 0, 1, 1]]
    ids, mask, labels = tensors.joined(bos)
    assert ids[1, :7].tolist() == [bos, f, g, h, i, j, eos]
    assert mask.tolist() == [[1] * 7 + [0] * 2] * 2
    assert labels[0].tolist() == [-100] * 4 + [d, e, eos, -100, -100]
    assert labels[1].tolist() == [-100] * 2 + [g, h, i, j, eos, -100, -100]


def test_too_long_sources_keep_their_end_targets_their_beginning_and_that_is_said():
    texts = [Pair("abcd", "efgh"), Pair("abc", "efg"), Pair("a", "ef")]
    tensors = pair_tensors(texts, BYTES, 3, 3)
    b, c, d, e, f, g = (BYTES.convert_tokens_to_ids(x) for x in "bcdefg")
    assert tensors.source_NU[0].tolist() == [b, c, d]
    # The second has no room for eos.
    assert tensors.target_NY.tolist() == [[e, f, g], [e, f, g], [e, f, BYTES.eos_token_id]]
    assert tensors.cut == 1


def test_a_tokenizer_without_eos_and_pad_ends_nothing_and_bytes_are_without_what_was_cut():
    bare = byte_tokenizer()
    bare.eos_token = bare.pad_token = None
    tensors = pair_tensors([Pair("ab", "日本"), Pair("a", "日"), Pair("a", "bc")], bare, 4, 4)
    assert (tensors.target_NY != IGNORED).sum(1).tolist() == [4, 3, 2]
    assert tensors.source_NU[1, 0] == 0 and tensors.source_mask_NU[1].tolist() == [0, 1]
    assert tensors.target_bytes_N.tolist() == [4, 3, 2]
    assert tensors.rows(torch.tensor([2, 0])).target_bytes_N.tolist() == [2, 4]
    with pytest.raises(DataError, match="two words to cut between"):
        pair_tensors([], bare, 4, 4)
