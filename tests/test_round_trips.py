"""What is packed, cut or written comes back as it was, for anything that there is: nothing, one
token and exactly a segment among it. Deterministic: the same examples everywhere."""

import functools
import random

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import byte_tokenizer
from families import stepwise, text, tiny_online
from sememe.codes import Codes, Document, Uncoded, Window, Writer
from sememe.concepts.gate import GateState, RateGate
from sememe.concepts.plan import PlanShape
from sememe.concepts.segments import packing, tail_lengths

some = settings(max_examples=100, deadline=None, derandomize=True, database=None)
byte_level = functools.cache(byte_tokenizer)
SEEDS = st.integers(0, 10**6)


@some
@given(st.integers(1, 4), st.integers(1, 40), SEEDS)
def test_packing_and_unpacking_and_the_lengths_of_tails(batch, length, seed):
    generator = torch.Generator().manual_seed(seed)
    share = torch.rand((), generator=generator)
    written = torch.rand(batch, length, generator=generator) < share
    x = torch.randn(batch, length, 3, generator=generator)
    pack = packing(written)
    back = pack.unpack(pack.pack(x), torch.zeros_like(x))
    assert torch.equal(back, x * written.unsqueeze(-1))
    assert torch.equal(pack.valid_BC.sum(1), written.sum(1))
    for row, tails in zip(written.tolist(), tail_lengths(written, written | True), strict=True):
        tail = 0
        for wrote, counted in zip(row, tails.tolist(), strict=True):
            tail = 0 if wrote else tail + 1
            assert tail == counted


@some
@given(st.integers(1, 3), st.integers(1, 40), st.integers(0, 40), st.booleans(), SEEDS)
def test_decisions_in_two_chunks_are_those_in_one(batch, length, cut, accumulates, seed):
    draw = np.random.default_rng(seed)
    gate = RateGate("threshold" if accumulates else "null", 8, 16)
    score = torch.from_numpy(draw.random((batch, length)))
    real, cut = draw.random((batch, length)) < 0.8, min(cut, length)
    rate, max_tail = draw.uniform(0.05, 1), int(draw.integers(0, 12))

    def decided(columns: slice, state: GateState) -> tuple[np.ndarray, GateState]:
        return gate(score[:, columns], real[:, columns], rate, max_tail, state)[:2]

    whole, end = decided(slice(None), GateState.start(batch))
    first, state = decided(slice(cut), GateState.start(batch))
    second, state = decided(slice(cut, None), state)
    assert (np.concatenate([first, second], 1) == whole).all() and not (whole & ~real).any()
    for x, y in zip(state, end, strict=True):
        np.testing.assert_array_equal(x, y)
    for row, there in zip(whole, real, strict=True):
        gaps = "".join("c" if wrote else "." for wrote in row[there]).split("c")
        assert max(map(len, gaps)) <= max_tail


SPANS = st.lists(st.tuples(st.integers(1, 8), st.lists(st.integers(0, 63), max_size=6)), max_size=4)


@some
@given(st.lists(SPANS, max_size=4), st.floats(0.01, 1))
def test_a_file_of_codes_holds_what_was_written(tmp_path_factory, documents, rate):
    rows = [
        [
            Window(span=(3 * n, 3 * n + 3), tokens=tokens, concepts=concepts)
            for n, (tokens, concepts) in enumerate(windows)
        ]
        for windows in documents
    ]
    codes = Codes(
        model=Writer(name='é\n"x', weights_sha256="0", base=None, base_sha256=None),
        num_concepts=8,
        codes_per_concept=2,
        rate=rate,
        window=8,
        documents=[Document(characters=3 * len(x), windows=x) for x in rows],
        sha256=None,
    )
    path = tmp_path_factory.getbasetemp() / "codes.json"
    codes.save(path)
    assert Codes.load(path) == codes


@some
@given(st.text(max_size=60) | st.text(" \n\tab.é😀漢\u200d\u0301", max_size=60), st.integers(4, 9))
def test_windows_are_the_text_in_its_order(string, window):
    tokenizer = byte_level()
    windows = Uncoded.cut(tokenizer, [string], window).windows
    ids = [token for part in windows for token in part.concepts]
    assert ids == tokenizer(string, add_special_tokens=False).input_ids
    assert all(1 <= part.tokens == len(part.concepts) <= window for part in windows)
    spans = [part.span for part in windows]
    assert "".join(string[start:end] for start, end in spans) == string


@some
@given(st.lists(st.tuples(st.integers(2, 9), st.integers(1, 4)), min_size=1, max_size=3), SEEDS)
def test_plans_are_packed_and_unpacked(types, seed):
    draw = random.Random(seed)
    sizes, lengths = zip(*types, strict=True)
    shape = PlanShape(sizes, lengths)
    plans = [
        [[draw.randrange(size) for _ in range(draw.randint(0, n))] for size, n in types]
        for _ in range(3)
    ]
    assert shape.unpack(shape.pack(plans)) == plans


@functools.cache
def built():
    return tiny_online(bridge=True, anchor=True, pool=True, rate=0.5)


@torch.no_grad()
def test_texts_of_a_token_of_a_segment_and_around_it():
    model = built()
    for length in (1, 2, 3, model.config.max_tail, model.config.max_tail + 1):
        ids = text(1, length)
        whole, (logits, written, _) = model(ids), stepwise(model, ids, range(1, length + 1))
        torch.testing.assert_close(logits, whole.logits, atol=2e-4, rtol=0)
        assert torch.equal(written, whole.concept_ids) and written[0, 0] == -2
