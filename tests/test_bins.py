"""Word bins: rivals apart, codes that spell segments exactly, votes that find the words again, and
a beam search that finds the likeliest text."""

import functools
import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from families import text
from sememe.concepts.bins import bins_by_position, codes_by_length, confusion, sort_words
from sememe.models.compressor import model as compressor
from sememe.models.compressor.beams import beam_search
from sememe.models.compressor.encode import embed_text
from test_compressor import tiny_compressor


def tiny(**changes):
    values = {"boundary": "fixed", "content": "bins", "max_tail": 4, "num_concepts": 256}
    model = tiny_compressor(**values | {"beams": 16} | changes)
    model.decompressor.place.weight.data.zero_()
    if model.segmenter is not None:
        model.segmenter.more.data.zero_()
    return model


@example(4096, 2, 0.5, True)
@given(st.integers(17, 5000), st.integers(1, 17), st.floats(0.06, 1.0), st.booleans())
@settings(max_examples=200, deadline=None)
def test_codes_are_shared_out_among_lengths_and_positions(codes, lengths, rate, even):
    rate = max(rate, 1 / lengths)  # as a recipe's has to be
    counts = codes_by_length(codes, lengths, rate, even)
    assert len(counts) == lengths and min(counts) >= 1 and sum(counts) <= codes
    for positions, count in enumerate(counts, 1):
        bins = bins_by_position(count, positions, even)
        assert len(bins) == positions and min(bins) >= 1 and math.prod(bins) <= count
        assert not even or max(bins) - min(bins) <= 1
        assert even or bins[-1] == max(bins), "segments end at the word that is hard to predict"
    if (codes, lengths, rate) == (4096, 2, 0.5) and even:
        assert counts == [64, 4032] and bins == [63, 64], "all but all segments are pairs"


def test_words_that_are_confused_with_one_another_lie_apart():
    """Two cliques of 8 words each, and 84 words that no context calls for: in 8 bins no rivals
    meet, and none is left empty."""
    predictions = []
    for clique in (range(8), range(8, 16)):
        logits = torch.full((4, 100), -20.0)
        logits[:, list(clique)] = 0.0
        predictions += [(logits.log_softmax(-1), torch.full((4,), word)) for word in clique]
    bin_V = sort_words(*confusion(predictions, 100), 8)
    assert len(set(bin_V[:8])) == len(set(bin_V[8:16])) == 8
    assert sorted(set(bin_V)) == list(range(8)) and np.bincount(bin_V).max() <= 14
    pair_VV, _ = confusion([(torch.tensor([[0.0, -1.0, -30.0]]), torch.tensor([1]))], 3)
    pair_VV, weight = pair_VV.to_dense(), 1 / (1 + math.exp(-1))
    assert pair_VV[0, 1] == pair_VV[1, 0] == pytest.approx(weight)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"rate": 0.25, "codes_per_concept": 2},
        {"rate": 0.3, "head": "joint"},
        {"boundary": "null"},
        {"boundary": "surprise", "codes_per_concept": 2, "num_concepts": 64},
        {"boundary": "threshold", "head": "joint"},
        {"boundary": "autoregressive"},
    ],
    ids=str,
)
def test_a_code_spells_its_segment(changes):
    """Every state is one of the codes, the one with the bins of its words; what is voted for are
    the words of the bin."""
    model, ids = tiny(**changes), text(4, 21, seed=9)
    with torch.no_grad():
        encoded = model.encode(ids)
    segments, decompressor, codes = model.writer.readout, model.decompressor, model.writer.codes
    bins = segments.bins
    code_nD = codes.normalise(codes(encoded.ids_BC[encoded.coded_BC]))
    state_nD, _ = model.writer.inputs(encoded.decision)
    torch.testing.assert_close(code_nD, state_nD, atol=1e-4, rtol=1e-4)
    x_BSD, offset_BS = model.covering(encoded)
    x_BTD, offset_BT = x_BSD[:, :-1], offset_BS[:, :-1]
    length_BT = segments.length(x_BTD)
    assert len(length_BT.unique()) > 1
    size_BT = bins.size_NP[length_BT - 1, offset_BT]
    vote_BTD = decompressor.votes(x_BTD, offset_BT) / decompressor.gain
    vote_BTV = bins.votes(vote_BTD, offset_BT, length_BT)
    assert not vote_BTV[size_BT < 0].any()
    mate_BTV = bins.bin_LV[size_BT] == bins.bin_LV[size_BT, ids].unsqueeze(-1)
    nearest_BT = vote_BTV.masked_fill(~mate_BTV, torch.inf).amin(-1)
    apart_BT = nearest_BT > vote_BTV.masked_fill(mate_BTV, -torch.inf).amax(-1)
    # 64 coordinates for the vectors of several positions: now and then they are not told apart.
    assert apart_BT[size_BT >= 0].float().mean() > 0.9


def test_with_a_bin_for_each_word_nothing_is_lost():
    """97 words in 97 bins at both positions of a pair: untrained, the text comes back whole."""
    model, ids = tiny(num_concepts=97 * 97 + 97, max_tail=1), text(4, 20, seed=5)
    bins = model.writer.readout.bins
    bins.counts, bins.layout = [97, 97 * 97], [[(97, 0)], [(97, 0), (97, 0)]]
    bins.sizes, bins.size_NP = [97], torch.zeros_like(bins.size_NP)
    bins.bin_LV = torch.arange(97, dtype=torch.int32)[None]
    basis = torch.randn(97, 64, generator=torch.Generator().manual_seed(0))
    bins.basis_BD = basis / basis.norm(dim=1, keepdim=True) * 8
    model.start_codes(ids)
    model.decompressor.gain.fill_(64.0)
    assert model.decompress(model.compress(ids)) == ids.tolist()


# ---- the search ----


def search(tables: list, width: int, ends: list[int], margin: float = math.inf):
    """Texts of a made-up model, logits of words given the word before, (V, V) for each row and
    position; and the number of beams at each but the first."""
    counts = []

    def score(row_n, text_nS, parent_n):
        position = text_nS.shape[1] - 1
        count_B = row_n.bincount(minlength=len(ends))
        closed_B = torch.tensor(ends) < position
        assert (count_B >= 1).all() and (count_B <= width).all() and (count_B[closed_B] == 1).all()
        assert len(parent_n) == len(row_n)
        counts.append(len(row_n))
        return tables[position][row_n, text_nS[:, -1]].log_softmax(-1)

    return beam_search(score, torch.tensor(ends), 0, width, margin), counts[1:]


def test_enough_beams_find_the_likeliest_text():
    generator = torch.Generator().manual_seed(1)
    tables = [torch.randn(3, 5, 5, generator=generator) * 2 for _ in range(4)]
    ends = [4, 2, 0]

    def log_p(words, row):
        steps = zip(tables, (0, *words), words, strict=False)
        return sum(float(t[row, before].log_softmax(-1)[word]) for t, before, word in steps)

    best, greedy = [], [[], [], []]
    for row, end in enumerate(ends):
        texts = itertools.product(range(5), repeat=end)
        best.append(list(max(texts, key=functools.partial(log_p, row=row))))
        for table in tables[:end]:
            greedy[row].append(int(table[row, (greedy[row] or [0])[-1]].argmax()))
    texts, counts = search(tables, 625, ends)
    assert texts == best and counts[:2] == [5 + 5 + 1, 25 + 25 + 1]
    assert search(tables, 1, ends)[0] == search(tables, 625, ends, margin=0.0)[0] == greedy != best
    alone = [search([t[i : i + 1] for t in tables], 2, ends[i : i + 1])[0][0] for i in range(3)]
    assert search(tables, 2, ends)[0] == alone
    few, fewer = search(tables, 625, ends, margin=4.0)
    assert few == best and sum(fewer) < sum(counts) / 2, "the best was never far below"


def test_a_search_finds_likelier_texts_than_the_likeliest_word_each_time(monkeypatch):
    model, ids = tiny(num_concepts=32), text(8, 24, seed=3)
    concepts = model.compress(ids)

    @torch.no_grad()
    def score(rows: list[list[int]]) -> torch.Tensor:
        """Of each text: log p of its words by themselves, and the votes of its codes."""
        decompressor = model.decompressor
        x_BSD, offset_BS = model.covering(model.encode(ids))
        words = embed_text(model, torch.tensor(rows))
        h_BSD = decompressor.states(words, x_BSD, offset_BS)
        logits, votes = decompressor.scores(h_BSD, x_BSD, offset_BS)
        scores = (logits.log_softmax(-1) + votes)[:, :-1]
        return scores.gather(-1, torch.tensor(rows).unsqueeze(-1)).sum((1, 2))

    greedy, best = (score(model.decompress(concepts, beams)) for beams in (1, 8))
    monkeypatch.setattr(compressor, "BEAMS_AT_ONCE", 24)
    assert torch.equal(score(model.decompress(concepts, 8)), best), "three rows at a time"
    assert float((best - greedy).mean()) > 0.05
    assert (best >= greedy - 1e-4).float().mean() > 0.7
