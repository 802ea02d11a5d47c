"""Ablations and the dial: codes change and positions do not, the curve's ends are exact, errors are
one sentence."""

import json
import math
import os
import re

import pytest
import torch
import yaml

from conftest import byte_tokenizer, sememe
from families import online_over, text, tiny_online
from sememe.concepts.ablation import ablate, parse
from sememe.data import TextBlocks, token_blocks
from sememe.errors import CheckpointError
from sememe.evaluation.ablation import DRAWN, ablation_curve, passes
from sememe.evaluation.dial import dial
from sememe.evaluation.figures import keep, kept
from sememe.evaluation.quality import evaluate

SPECS = ("zero", "shuffle", "random", "swap", "drop:0.5", "drop:1", "shuffle@1")
PADDED = torch.tensor([[0] * 6 + [1] * 14, [1] * 20, [0] * 15 + [1] * 5])


def packed(batch: int = 3, width: int = 7, seed: int = 0):
    """Ids all different, and ragged coded positions: a sink in front, padding behind, one row
    without any."""
    ids_BC = torch.arange(batch * width).view(batch, width) + 100
    count_B = torch.tensor([5, 0, 2, 6, 1])[:batch]
    rank_C = torch.arange(width)
    return ids_BC, (rank_C >= 1) & (rank_C <= count_B[:, None])


def test_specs():
    assert parse("zero") == ("zero", 1.0, 0) and parse("swap@3") == ("swap", 1.0, 3)
    assert parse("drop:0.25") == ("drop", 0.25, 0) and parse("drop:0@2") == ("drop", 0.0, 2)


@pytest.mark.parametrize(
    "spec",
    [
        "",
        "none",
        "drop",
        "drop:",
        "drop:1.1",
        "drop:-1",
        "drop:nan",
        "drop:x",
        "zero:0.5",
        "swap@x",
    ],
)
def test_an_unknown_spec_is_a_value_error(spec):
    with pytest.raises(ValueError, match="need one of zero, shuffle, random, swap, drop"):
        ablate(*packed(), spec, 16)


@pytest.mark.parametrize("batch", [1, 2, 3, 4, 5])
def test_swap_takes_the_next_row_by_rank_and_wraps_around(batch):
    ids_BC, coded_BC = packed(batch)
    got, dropped = ablate(ids_BC, coded_BC, "swap", 1000)
    assert not dropped.any()
    for row in range(batch):
        theirs = ids_BC[(row + 1) % batch][coded_BC[(row + 1) % batch]].tolist()
        own = ids_BC[row][coded_BC[row]].tolist()
        want = [theirs[k % len(theirs)] for k in range(len(own))] if theirs else own
        assert got[row][coded_BC[row]].tolist() == want
    assert torch.equal(got[~coded_BC], ids_BC[~coded_BC])


def test_shuffle_keeps_the_codes_and_random_uses_all_ids():
    ids_BC, coded_BC = packed(5)
    got, _ = ablate(ids_BC, coded_BC, "shuffle", 16)
    assert torch.equal(got[coded_BC].sort().values, ids_BC[coded_BC].sort().values)
    assert not torch.equal(got, ids_BC) and torch.equal(got[~coded_BC], ids_BC[~coded_BC])
    assert not torch.equal(got, ablate(ids_BC, coded_BC, "shuffle@1", 16)[0])
    many = torch.zeros(4, 5000, dtype=torch.long)
    drawn, _ = ablate(
        many, torch.ones_like(many).bool(), "random", 4096**2
    )  # two codes of 4096 in one id
    assert int(drawn.min()) >= 0 and 4090 * 4096 < int(drawn.max()) < 4096**2


def test_drop_is_an_exact_share_and_larger_shares_drop_the_same_and_more():
    ids_BC, coded_BC = (
        torch.zeros(4, 25).long(),
        torch.rand(4, 25, generator=torch.Generator().manual_seed(0)) < 0.8,
    )
    before = torch.zeros_like(coded_BC)
    for tenth in range(11):
        got, dropped = ablate(ids_BC, coded_BC, f"drop:{tenth / 10}@1", 16)
        assert torch.equal(got, ids_BC) and int(dropped.sum()) == round(
            tenth / 10 * int(coded_BC.sum())
        )
        assert not (dropped & ~coded_BC).any() and not (before & ~dropped).any()
        before = dropped
    assert torch.equal(before, coded_BC)
    half = [ablate(ids_BC, coded_BC, f"drop:0.5@{seed}", 16)[1] for seed in (0, 1, 0)]
    assert torch.equal(half[0], half[2]) and not torch.equal(half[0], half[1])


@pytest.mark.parametrize("mask", [None, PADDED], ids=["whole", "padded"])
@pytest.mark.parametrize("spec", SPECS)
def test_positions_never_change(spec, mask):
    model, ids = tiny_online(), text(3)
    plain, out = model(ids, attention_mask=mask), model(ids, attention_mask=mask, ablation=spec)
    for special in (-1, -2):
        assert torch.equal(out.concept_ids == special, plain.concept_ids == special)
    seen = torch.ones_like(ids).bool() if mask is None else mask.bool()
    assert not torch.allclose(out.logits[seen], plain.logits[seen])
    before = (plain.concept_ids >= 0).cumsum(
        1
    ) == 0  # nothing is coded yet, so nothing can have changed
    torch.testing.assert_close(
        out.logits[seen & before], plain.logits[seen & before], atol=0, rtol=0
    )
    if spec.startswith("shuffle"):
        coded, shuffled = (one.concept_ids[one.concept_ids >= 0] for one in (plain, out))
        assert torch.equal(shuffled.sort().values, coded.sort().values)


@pytest.mark.parametrize("settings", [{}, {"codes_per_concept": 2}, {"quantise": 0.5}], ids=str)
def test_the_ends_of_drop_are_exact(settings):
    model, ids = tiny_online(**settings), text(3)
    assert torch.equal(model(ids, ablation="drop:0").logits, model(ids).logits)
    assert torch.equal(model(ids, ablation="drop:1.0").logits, model(ids, ablation="zero").logits)
    half = model(ids, ablation="drop:0.5").logits
    assert not torch.allclose(half, model(ids).logits) and not torch.allclose(
        half, model(ids, ablation="zero").logits
    )


def entering(model, ids, monkeypatch, **settings):
    """Output, (B, C, D) states that enter the middle slice, and their packing."""
    seen = {}
    inner = type(model)._middle

    def middle(self, spine, e_BCD, chunk, decision, *rest):
        seen.update(e=e_BCD, pack=decision.pack)
        return inner(self, spine, e_BCD, chunk, decision, *rest)

    monkeypatch.setattr(type(model), "_middle", middle)
    out = model(ids, **settings)
    monkeypatch.undo()
    return out, seen["e"], seen["pack"]


def test_swap_feeds_the_neighbours_codes_to_the_middle_slice(monkeypatch):
    model, ids = tiny_online(), text(3)
    own = [row[row >= 0] for row in model(ids).concept_ids]
    assert len({len(row) for row in own}) > 1, (
        "rows must be ragged for this to test wrapping around"
    )
    out, e_BCD, _ = entering(model, ids, monkeypatch, ablation="swap")
    for row in range(3):
        theirs, count = own[(row + 1) % 3], len(own[row])
        want = theirs[torch.arange(count) % len(theirs)]
        assert out.concept_ids[row][out.concept_ids[row] >= 0].tolist() == want.tolist()
        torch.testing.assert_close(
            e_BCD[row, 1 : 1 + count], model.writer.codes(want), atol=0, rtol=0
        )


def test_drop_sets_states_to_zero_and_leaves_the_others(monkeypatch):
    model, ids = tiny_online(), text(3)
    _, plain, pack = entering(model, ids, monkeypatch)
    _, e_BCD, _ = entering(model, ids, monkeypatch, ablation="drop:0.5")
    zero_BC = (e_BCD == 0).all(-1)
    coded = int(pack.valid_BC[:, 1:].sum())
    assert int((zero_BC & pack.valid_BC).sum()) == round(0.5 * coded) and not zero_BC[:, 0].any()
    kept = pack.valid_BC & ~zero_BC
    assert torch.equal(e_BCD[kept], plain[kept])


def blocks_of(ids):
    return TextBlocks(ids, torch.ones_like(ids), b"x" * ids.numel())


def test_the_curve():
    model, ids = tiny_online(), text(5, 32)
    ticks, shares = [], (0.0, 0.25, 0.5, 1.0)
    found = ablation_curve(model, ids, shares, seeds=2, batch=4, tick=ticks.append)
    assert sum(ticks) == passes(shares, 2) * ids.numel()
    assert found["batch"] == 5, "a last batch of one row would keep its own codes under swap"
    whole = evaluate(model, byte_tokenizer(), blocks_of(ids), batch=5, samples=0)
    assert found["nll"] == whole["nll"] and found["concept_rate"] == pytest.approx(
        whole["concept_rate"]
    )
    assert found["zero"]["delta_nll"] == whole["delta_nll_zero"]
    for kind in (
        "shuffle",
        "random",
    ):  # of several seeds the first is the one that every evaluation takes
        assert (
            found[kind]["delta_nll_min"]
            <= whole[f"delta_nll_{kind}"]
            <= found[kind]["delta_nll_max"]
        )
        assert found[kind]["delta_nll_min"] < found[kind]["delta_nll_max"]
    assert [one["share"] for one in found["drop"]] == list(shares)
    assert (
        found["drop"][0]["delta_nll"] == 0 and found["drop"][-1] == {"share": 1.0} | found["zero"]
    )
    for one in (*found["drop"], *(found[kind] for kind in DRAWN)):
        assert one["delta_nll_min"] <= one["delta_nll"] <= one["delta_nll_max"] and math.isfinite(
            one["delta_nll"]
        )


def test_a_model_that_carries_states_has_nothing_to_ablate():
    with pytest.raises(CheckpointError, match="writes no codes"):
        ablation_curve(tiny_online(quantise=0.0), text(4, 32))


def test_the_dial_holds_its_rates_and_is_put_back():
    model, ids = tiny_online(), text(4, 64)
    rows = dial(model, ids, (0.2, 0.4, 0.75, 1.0), control_nll=1.0)
    assert model.dial.rate == 0.4
    assert rows[1]["nll"] == evaluate(model, byte_tokenizer(), blocks_of(ids), samples=0)["nll"]
    for row in rows:
        # The weak feedback of these models lets rows of 64 tokens end 6 % off; a dial that does
        # nothing is 20 % off.
        assert abs(row["concept_rate"] - row["target_rate"]) < 0.1
        assert row["rate_error_percent"] == pytest.approx(
            100 * (row["concept_rate"] / row["target_rate"] - 1)
        )
        assert row["delta_nll_control"] == row["nll"] - 1.0
    assert rows[-1]["concept_rate"] == 1 and rows[-1]["rate_error_percent"] == 0


@pytest.fixture(scope="module")
def run(tmp_path_factory, base_folder, texts):
    """A run folder as `train` leaves it, without the training."""
    folder = tmp_path_factory.mktemp("runs") / "r"
    tokenizer = byte_tokenizer()
    blocks = token_blocks([texts[0].read_text()], tokenizer, 32, limit=1024)
    online_over(base_folder, blocks, rate=0.5, max_tail=6).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    (folder / "recipe.yaml").write_text(
        yaml.safe_dump(
            {
                "data": {"train": str(texts[0]), "heldout": str(texts[1])},
                "sequence_length": 32,
            }
        )
    )
    return folder


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """Text of another domain."""
    path = tmp_path_factory.mktemp("other") / "numbers.txt"
    path.write_text(" ".join(str(7 * n % 1000) for n in range(600)))
    return path


def test_ablate_prints_the_curve_and_keeps_it(run, texts, tmp_path):
    words = ("--data", texts[1], "--json", tmp_path / "a.json")
    printed = sememe("ablate", run, *words, "--tokens", 160)
    figures = json.loads((tmp_path / "a.json").read_text())
    assert json.loads((run / "ablate.json").read_text()) == figures
    assert [point["share"] for point in figures["drop"]] == [tenth / 10 for tenth in range(10)]
    assert figures["seeds"] == 3 and figures["batch"] == 5
    for word in (
        "50 %",
        "zero",
        "shuffle",
        "random",
        "swap",
        f"{figures['zero']['delta_nll']:+.4f}".replace("-", "−"),
    ):
        assert word in printed
    sememe("ablate", run / "model", *words, "--tokens", 512, "--rate", 0.9)
    at_rate = json.loads((tmp_path / "a.json").read_text())
    assert at_rate["target_rate"] == 0.9 and at_rate["concept_rate"] > 0.75
    assert json.loads((run / "ablate.json").read_text()) == figures, "only a run keeps figures"


def test_evaluate_over_the_dial_and_by_text(run, texts, other, tmp_path):
    def figures(*words):
        printed = sememe("evaluate", run, "--tokens", 256, "--json", tmp_path / "e.json", *words)
        return printed, json.loads((tmp_path / "e.json").read_text())

    _, plain = figures("--data", texts[1])
    assert plain["target_rate"] == 0.5 and "dial" not in plain and "by_data" not in plain
    printed, turned = figures(
        "--data", texts[1], "--rate", "0.25,0.5,1", "--control", run / "model"
    )
    assert [line["target_rate"] for line in turned["dial"]] == [
        0.25,
        0.5,
        1,
    ] and "dial" in printed
    assert (
        turned["dial"][1]["nll"] == plain["nll"] == turned["nll"]
        and turned["dial"][1]["delta_nll_control"] == 0
    )
    assert abs(turned["dial"][0]["rate_error_percent"]) < 20
    _, alone = figures("--data", other, "--rate", 1)
    assert alone["target_rate"] == alone["concept_rate"] == 1 and alone["nll_in_tail"] is None
    printed, both = figures("--data", texts[1], "--data", other)
    assert [one["data"] for one in both["by_data"]] == [
        str(texts[1]),
        str(other),
    ] and "by_data" in printed
    assert {key: both[key] for key in plain} == plain, "the figures are those of the first text"
    assert both["by_data"][1]["nll"] == figures("--data", other)[1]["nll"] != plain["nll"]
    assert json.loads((run / "evaluate.json").read_text())["data"] == str(other)


def test_generate_and_benchmark_take_the_dial(run, tmp_path):
    shown = tmp_path / "g.json"
    sememe(
        "generate",
        run,
        "--prompt",
        "the cat sat on",
        "--max-new-tokens",
        4,
        "--rate",
        1,
        "--json",
        shown,
    )
    assert json.loads(shown.read_text())["concept_rate"] == 1
    sememe(
        "benchmark",
        run,
        "--prompt-tokens",
        24,
        "--new-tokens",
        4,
        "--repeats",
        1,
        "--rate",
        1,
        "--json",
        shown,
    )
    found = json.loads(shown.read_text())
    assert found["settings"]["target_rate"] == found["realised_rate"] == 1


def test_kept_figures_are_of_this_model_and_measured_alike(tmp_path):
    weights = tmp_path / "model" / "model.safetensors"
    weights.parent.mkdir()
    weights.touch()
    (tmp_path / "recipe.yaml").write_text("rate: 0.5\ndata: {train: a.txt, heldout: b.txt}")
    figures = {"nll": 1.5, "settings": {"target_rate": 0.5, "dtype": "float32"}}
    keep(tmp_path, "benchmark.json", figures)
    assert kept(tmp_path, "benchmark.json", nll=1.5, settings={"target_rate": 0.5}) == figures
    assert kept(tmp_path, "evaluate.json") is None
    for other in (
        {"nll": 2},
        {"settings": {"target_rate": 1.0}},
        {"nll": {"target_rate": 0.5}},
        {"tokens": 64},
    ):
        assert kept(tmp_path, "benchmark.json", **other) is None, other
    os.utime(weights, (weights.stat().st_atime, (tmp_path / "benchmark.json").stat().st_mtime + 1))
    assert kept(tmp_path, "benchmark.json") is None, "of a model that was trained anew"


@pytest.mark.parametrize(
    "words, said",
    [
        (("ablate", "BASE", "--data", "HELD"), "has no concepts to ablate"),
        (("ablate", "RUN", "--data", "TRAIN"), "is what .* was trained on"),
        (("ablate", "RUN", "--data", "EMPTY"), "is empty"),
        (("ablate", "RUN", "--data", "SHORT"), "has 14 tokens: need at least 32"),
        (("ablate", "RUN", "--data", "ONE"), "make one block of 32 tokens: need at least two"),
        (("ablate", "RUN", "--data", "HELD", "--rate", "0"), "rate = 0: need from 0.143 to 1"),
        (
            ("evaluate", "RUN", "--data", "HELD", "--rate", "1.5"),
            "rate = 1.5: need from 0.143 to 1",
        ),
        (("evaluate", "RUN", "--data", "HELD", "--rate", "nan"), "rate = nan"),
        (("evaluate", "RUN", "--data", "HELD", "--rate", "0.5,0.1"), "max_tail = 6"),
        (("evaluate", "RUN", "--data", "HELD", "--rate", ""), "need numbers with commas"),
        (
            ("evaluate", "BASE", "--data", "HELD", "--rate", "0.5"),
            "has no concepts to set a rate for",
        ),
        (("evaluate", "RUN", "--data", "HELD", "--data", "EMPTY"), "is empty"),
        (
            ("generate", "BASE", "--prompt", "cat", "--rate", "0.5"),
            "has no concepts to set a rate for",
        ),
        (("generate", "RUN", "--prompt", "cat", "--rate", "-1"), "rate = -1"),
        (("benchmark", "RUN", "--rate", "0.1"), "forces one after max_tail = 6"),
    ],
)
def test_bad_input_is_one_sentence(run, base_folder, texts, tmp_path, words, said):
    for name, written in (
        ("EMPTY", " \n"),
        ("SHORT", "the cat sat on"),
        ("ONE", "the cat sat on a mat " * 2),
    ):
        (tmp_path / f"{name}.txt").write_text(written)
    known = {"RUN": run, "BASE": base_folder, "TRAIN": texts[0], "HELD": texts[1]}
    known |= {name: tmp_path / f"{name}.txt" for name in ("EMPTY", "SHORT", "ONE")}
    kept = {path: path.read_text() for path in run.glob("*.json")}
    message = sememe(*(known.get(word, word) for word in words), code=1)
    assert re.search(said, message), message
    assert "try: " in message and "\n" not in message
    assert {path: path.read_text() for path in run.glob("*.json")} == kept
