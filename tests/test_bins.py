"""Word bins: rivals apart, codes that spell segments, votes that find the words, beam search."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from families import text
from sememe.concepts.bins import bins_by_position, codes_by_length, confusion, sort_words
from sememe.models.compressor.beams import MARGIN
from sememe.models.compressor.encode import embed_text
from test_compressor import tiny_compressor


def tiny(**changes):
    values = {"boundary": "fixed", "content": "bins", "max_tail": 4, "num_concepts": 256}
    model = tiny_compressor(**values | {"beams": 16} | changes)
    model.decompressor.place.weight.data.zero_()
    if model.segmenter is not None:
        model.segmenter.more.data.zero_()
    return model


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
@torch.no_grad()
def test_a_code_spells_its_segment(changes):
    """Every state is one of the codes, the one with the bins of its words; what is voted for are
    the words of the bin."""
    model, ids = tiny(**changes), text(4, 21, seed=9)
    encoded = model.encode(ids)
    bins, decompressor, codes = model.writer.readout.bins, model.decompressor, model.writer.codes
    code_nD = codes.normalise(codes(encoded.ids_BC[encoded.coded_BC]))
    state_nD, _ = model.writer.inputs(encoded.decision)
    torch.testing.assert_close(code_nD, state_nD, atol=1e-4, rtol=1e-4)
    x_BTD, offset_BT = (part[:, :-1] for part in model.covering(encoded))
    length_BT = decompressor.segments.length(x_BTD)
    assert len(length_BT.unique()) > 1
    size_BT = bins.size(offset_BT, length_BT)
    vote_BTD = decompressor.votes(x_BTD, offset_BT) / decompressor.gain
    vote_BTV = bins.votes(vote_BTD, offset_BT, length_BT)
    assert not vote_BTV[size_BT < 0].any()
    mate_BTV = bins.bin_LV[size_BT] == bins.bin_LV[size_BT, ids].unsqueeze(-1)
    nearest_BT = vote_BTV.masked_fill(~mate_BTV, torch.inf).amin(-1)
    apart_BT = nearest_BT > vote_BTV.masked_fill(mate_BTV, -torch.inf).amax(-1)
    # 64 coordinates for the vectors of several positions: now and then they are not told apart.
    assert apart_BT[size_BT >= 0].float().mean() > 0.9


@torch.no_grad()
def test_a_cached_search_is_the_plain_one_and_finds_likelier_texts():
    """Against beams that are scored from the first word on each time."""
    model, ids = tiny(num_concepts=32), text(4, 16, seed=3)
    concepts, decompressor = model.compress(ids), model.decompressor
    x_BSD, offset_BS = model.covering(model.encode(ids))

    def score(words: list[list[int]], row: int) -> torch.Tensor:
        """(n, S, V) of beams: log p by the words before, and the votes of the codes."""
        like = len(words), -1, -1
        x_nSD, offset_nS = x_BSD[row].expand(like), offset_BS[row].expand(like[:2])
        h_nSD = decompressor.states(embed_text(model, torch.tensor(words)), x_nSD, offset_nS)
        logits_nSV, votes_nSV = decompressor.scores(*decompressor.read(h_nSD, x_nSD, offset_nS))
        return logits_nSV.log_softmax(-1) + votes_nSV

    def search(row: int, width: int) -> tuple[float, list[int]]:
        beams = [(0.0, [])]
        for step in range(16):
            score_nV = score([words + [0] * (16 - step) for _, words in beams], row)[:, step]
            beams = [
                (total + float(more), [*words, word])
                for (total, words), more_V in zip(beams, score_nV, strict=True)
                for word, more in enumerate(more_V)
            ]
            beams = sorted(beams, reverse=True)[:width]
            beams = [beam for beam in beams if beam[0] >= beams[0][0] - MARGIN]
        return beams[0]

    greedy, best = ([search(row, width) for row in range(4)] for width in (1, 8))
    for width, found in ((1, greedy), (8, best)):
        assert model.decompress(concepts, width) == [words for _, words in found]
    gains = [after - before for (before, _), (after, _) in zip(greedy, best, strict=True)]
    assert sum(gains) / 4 > 0.05 and sum(gain > -1e-4 for gain in gains) >= 3
