"""Bins of words: rivals apart, codes that spell segments exactly, votes that find the words again,
and a search that finds the likeliest text."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from families import move, text, tiny_base
from sememe.backbone.split import Spine
from sememe.concepts.bins import Confusion, allot, radices, sort_words
from sememe.errors import RecipeError
from sememe.models import CompressorConfig, CompressorForCausalLM, decompressing
from sememe.models.beams import Beams


@given(st.integers(17, 5000), st.integers(1, 17), st.floats(0.06, 1.0), st.booleans())
@settings(max_examples=200, deadline=None)
def test_codes_are_shared_out_among_lengths_and_places(codes, lengths, rate, even):
    counts = allot(codes, lengths, rate, even)
    assert len(counts) == lengths and min(counts) >= 1 and sum(counts) <= codes
    for places, count in enumerate(counts, 1):
        found = radices(count, places, even)
        assert len(found) == places and min(found) >= 1 and math.prod(found) <= count
        assert not even or max(found) - min(found) <= 1
        assert even or found[-1] == max(found), (
            "segments end at the word that is hardest to foretell"
        )


def test_two_words_share_all_codes_where_all_segments_are_pairs():
    assert (
        allot(4096, 2, 0.5, True) == [64, 4032]
        and radices(4032, 2, True) == [63, 64]
        and radices(4096, 2, True) == [64, 64]
    )
    assert np.argmax(allot(4096, 9, 0.25, True)) == 3, "R = 4"


def test_words_that_are_taken_for_one_another_lie_apart():
    """Two cliques of 8 words each, and 84 words that no context calls for: in 8 bins no rivals
    meet, and none is left empty."""
    vocab, taken = 100, Confusion(100)
    for clique in (range(8), range(8, 16)):
        for word in clique:
            logits = torch.full((4, vocab), -20.0)
            logits[:, list(clique)] = 0.0
            taken.add(logits.log_softmax(-1), torch.full((4,), word))
    found = sort_words(taken.rivals(), 8)
    assert len(set(found[:8])) == len(set(found[8:16])) == 8
    assert sorted(set(found)) == list(range(8)) and np.bincount(found).max() <= 14
    own = Confusion(3)
    own.add(torch.tensor([[0.0, -1.0, -30.0]]), torch.tensor([1]))
    rivals = own.rivals()
    assert rivals.other[rivals.start[0] : rivals.start[1]].tolist() == [1], "both ways round"
    np.testing.assert_allclose(rivals.weight[rivals.start[1]], 1 / (1 + math.exp(-1)), rtol=1e-6)


def tiny(boundary: str = "fixed", **changes) -> CompressorForCausalLM:
    base, blocks = tiny_base("llama"), text(16, 24, seed=2)
    values = {
        "rate": 0.5,
        "max_tail": 4,
        "num_concepts": 256,
        "head": "nearest",
        "base": "tiny",
        "lora_rank": 4,
    }
    model = CompressorForCausalLM(
        CompressorConfig(text_config=base.config, boundary=boundary, **{**values, **changes}), base
    )
    move(model, torch.Generator().manual_seed(1))
    model.start_frame(blocks)
    model.start_codes(blocks)
    return model.eval()


@pytest.mark.parametrize(
    "boundary, changes",
    [
        ("fixed", {}),
        ("fixed", {"rate": 0.25, "codes_per_concept": 2}),
        ("fixed", {"rate": 0.3, "head": "joint"}),
        ("null", {}),
        ("surprise", {"codes_per_concept": 2, "num_concepts": 64}),
        ("threshold", {}),
        ("autoregressive", {}),
    ],
)
def test_a_code_spells_its_segment(boundary, changes):
    """Every state is one of the codes, the one with the bins of its words; what is voted for are
    the words of the bin."""
    model, ids = tiny(boundary, **changes), text(4, 21, seed=9)
    if model.segmenter is not None:
        model.segmenter.more.data.zero_()
    with torch.no_grad():
        made = model.encode(ids)
    coded, bins = made.read.coded_BC, model.bins
    x_nD = model.codes.normalise(made.read.h_BCD[coded])
    torch.testing.assert_close(
        model.codes.normalise(model.codes(made.ids_BC[coded])), x_nD, atol=1e-4, rtol=1e-4
    )
    e_BTD = made.e_BCD.gather(1, made.rank_BT.unsqueeze(-1).expand(-1, -1, made.e_BCD.shape[-1]))
    x_BTD = model.codes.normalise(e_BTD)
    length_BT, place_BT = model.reader.length(x_BTD), made.place_BT
    assert len(length_BT.unique()) > 1
    kind_BT = bins.kind_NP[length_BT - 1, place_BT]
    vote_BTV = bins.votes(
        model.reader.votes(x_BTD, place_BT) / model.reader.gain, place_BT, length_BT
    )
    apart = []
    for kind, word, vote_V in zip(
        kind_BT.flatten(), ids.flatten(), vote_BTV.flatten(0, 1), strict=True
    ):
        if kind < 0:
            assert not vote_V.any()
            continue
        mates = bins.bin_LV[kind] == bins.bin_LV[kind, word]
        apart.append(not (~mates).any() or bool(vote_V[mates].min() > vote_V[~mates].max()))
    assert sum(apart) > 0.9 * len(apart), (
        "64 coordinates for the vectors of several places: now and then they are not told apart"
    )


def test_with_a_bin_for_each_word_nothing_is_lost():
    """97 words in 97 bins at both places of a pair: untrained, the text comes back whole."""
    model, ids = tiny(num_concepts=97 * 97 + 97, max_tail=1), text(4, 20, seed=5)
    model.bins.counts, model.bins.bins = [97, 97 * 97], [[97], [97, 97]]
    model.bins.kinds, model.bins.kind_NP = [97], torch.zeros_like(model.bins.kind_NP)
    model.bins.bin_LV = torch.arange(97, dtype=torch.int32)[None]
    basis = torch.randn(97, 64, generator=torch.Generator().manual_seed(0))
    model.bins.basis_BD = basis / basis.norm(dim=1, keepdim=True) * 8
    model.start_codes(ids)
    model.reader.gain.fill_(64.0)
    assert model.decompress(model.compress(ids)) == ids.tolist()


@pytest.mark.parametrize("boundary", ["fixed", "null"])
def test_saved_and_loaded_it_spells_the_same(base_folder, tmp_path, boundary):
    model = CompressorForCausalLM.from_base(
        CompressorConfig(
            base=str(base_folder),
            num_concepts=64,
            head="nearest",
            rate=0.5,
            max_tail=3,
            boundary=boundary,
        )
    )
    ids = text(4, 24)
    model.start_frame(ids)
    model.start_codes(ids)
    model.eval().save_pretrained(tmp_path / "m")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    concepts = model.compress(ids)
    assert again.compress(ids) == concepts and again.decompress(concepts) == model.decompress(
        concepts
    )
    assert model.compress(ids) != model.compress(ids.flip(1))
    slower = AutoModelForCausalLM.from_pretrained(tmp_path / "m", rate=0.25)
    assert len(slower.compress(ids)[0]) < len(concepts[0])
    assert torch.equal(slower.bins.bin_LV, model.bins.bin_LV), "a dial moves no bins"
    adapters = {
        name
        for name in ("compressor", "decompressor")
        for key, _ in model.named_parameters()
        if f".{name}." in key
    }
    assert adapters == (
        {"decompressor"} if boundary == "fixed" else {"compressor", "decompressor"}
    ), "none where nobody reads"


def test_fewer_codes_than_lengths_are_refused():
    with pytest.raises(
        RecipeError,
        match=r"num_concepts = 8 with max_tail = 16: need a code for each length.*max_tail=7",
    ):
        CompressorConfig(text_config=tiny_base().config, num_concepts=8, max_tail=16).check()
    with pytest.raises(RecipeError, match="content = 'words': need one of bins, news"):
        CompressorConfig(text_config=tiny_base().config, content="words").check()


# ---- the search ----


def written(
    step_logits: list, most: int, ends: list[int], margin: float = math.inf
) -> tuple[list[list[int]], list[int]]:
    """Texts of a made-up model, log-odds of words given the word before, (V, V) for each row and
    place; and beams at each."""
    rows, beams = len(ends), []
    found = Beams(rows, 0, "cpu")
    for place, tables_BVV in enumerate(step_logits):
        row_n, logits_nV = found.row_n, tables_BVV[found.row_n, found.token_n]
        open_B = torch.tensor([place < end for end in ends])
        came = found.go_on(logits_nV.log_softmax(-1), open_B, most, margin)
        count_B, best_B = (
            found.row_n.bincount(minlength=rows),
            torch.tensor([float(found.score_n[found.row_n == b].max()) for b in range(rows)]),
        )
        assert (count_B >= 1).all() and (count_B <= most).all() and (count_B[~open_B] == 1).all()
        assert (found.score_n >= best_B[found.row_n] - margin).all()
        assert came is None if most == 1 else torch.equal(row_n[came], found.row_n), (
            "of its own row"
        )
        beams.append(len(found.row_n))
    return found.best(), beams


def test_enough_beams_find_the_likeliest_text():
    generator = torch.Generator().manual_seed(1)
    tables = [torch.randn(3, 5, 5, generator=generator) * 2 for _ in range(4)]
    ends = [4, 2, 0]
    best = []
    for row, end in enumerate(ends):

        def log_p(words, row=row):
            before = (0, *words)
            return sum(
                float(tables[i][row, before[i]].log_softmax(-1)[word])
                for i, word in enumerate(words)
            )

        best.append(list(max(itertools.product(range(5), repeat=end), key=log_p)))
    every, beams = written(tables, 625, ends)
    assert every == best and beams == [5 + 5 + 1, 25 + 25 + 1, 125 + 1 + 1, 625 + 1 + 1]
    greedy = [[], [], []]
    for row, end in enumerate(ends):
        for place in range(end):
            greedy[row].append(int(tables[place][row, greedy[row][-1] if place else 0].argmax()))
    assert (
        written(tables, 1, ends)[0] == written(tables, 625, ends, margin=0.0)[0] == greedy != best
    )
    alone = [
        written([table[row : row + 1] for table in tables], 2, ends[row : row + 1])[0][0]
        for row in range(3)
    ]
    assert written(tables, 2, ends)[0] == alone
    few, fewer = written(tables, 625, ends, margin=4.0)
    assert few == best and sum(fewer) < sum(beams) / 3, (
        "the likeliest was never far behind, most others were"
    )


def test_a_search_finds_likelier_texts_than_the_likeliest_word_each_time(monkeypatch):
    model, ids = tiny(num_concepts=32), text(8, 24, seed=3)
    concepts = model.compress(ids)

    def score(rows: list[list[int]]) -> torch.Tensor:
        """Of each text: log p of its words by themselves, and the votes of its codes."""
        words, spine = torch.tensor(rows), Spine(model.backbone)
        with torch.no_grad():
            made = model.encode(ids)
            made.ids_BS = model.opened(words)
            e_BTD = made.e_BCD.gather(
                1, made.rank_BT.unsqueeze(-1).expand(-1, -1, made.e_BCD.shape[-1])
            )
            x_BTD = spine.embed(made.ids_BS[:, :-1]) + model.told(e_BTD, made.place_BT)
            h_BTD = model._decompressor(
                spine, x_BTD, torch.arange(x_BTD.shape[1]).expand(x_BTD.shape[:2])
            )
            foreseen, votes = model._foreseen(spine, h_BTD, e_BTD, made.place_BT)
            torch.testing.assert_close(
                foreseen + votes, model._heard(spine, made)()[:, :-1], atol=1e-5, rtol=1e-5
            )
        return (foreseen.log_softmax(-1) + votes).gather(-1, words.unsqueeze(-1)).sum((1, 2))

    found = {beams: score(model.decompress(concepts, beams)) for beams in (1, 8)}
    monkeypatch.setattr(decompressing, "TEXTS_AT_ONCE", 24)
    assert torch.equal(score(model.decompress(concepts, 8)), found[8]), (
        "three rows at a time, with all of them eight"
    )
    assert (
        float((found[8] - found[1]).mean()) > 0.05
        and (found[8] >= found[1] - 1e-4).float().mean() > 0.7
    )
