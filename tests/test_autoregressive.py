"""Boundary autoregressive: slot by slot = all slots at once, rows alone = rows together, who sees
what, lengths that learn and the rate that they realise."""

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from conftest import ctrl_c, metrics, run
from families import FAMILIES, move, text, tiny_base
from sememe.backbone.split import Spine
from sememe.concepts.lengths import Lengths, covering
from sememe.errors import Interrupted, RecipeError
from sememe.models import (
    CompressorConfig,
    CompressorForCausalLM,
    OnlineConfig,
    OnlineForCausalLM,
    compressor,
)
from test_compressor import compressor_recipe, tiny_compressor, uncached


def ragged(lengths=(1, 7, 20), longest: int = 20) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, mask) of rows with padding on the right."""
    ids, mask = (
        text(len(lengths), longest, seed=4),
        torch.zeros(len(lengths), longest, dtype=torch.long),
    )
    for row, length in zip(mask, lengths, strict=True):
        row[:length] = 1
    return ids * mask, mask


@pytest.fixture(autouse=True, scope="module")
def one_vote():
    """Which weight votes start with is not what is tested here, and trying them out is most of the
    time that a start takes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compressor, "VOTES", (8.0,))
        yield


@functools.cache
def built(**changes) -> CompressorForCausalLM:
    return tiny_compressor(boundary="autoregressive", **changes)


def segmented(**changes) -> CompressorForCausalLM:
    """One of its own, built once for all tests."""
    return copy.deepcopy(built(**changes))


@pytest.mark.parametrize(
    "family, attention, changes",
    [
        *((family, "sdpa", {}) for family in FAMILIES),
        ("llama", "eager", {"codes_per_concept": 2, "depth": 2}),
        ("gemma3_text", "eager", {"rate": 0.25}),
        ("qwen3", "sdpa", {"quantise": 0.5}),
        ("qwen3", "sdpa", {"quantise": 0.0}),
    ],
)
def test_slot_by_slot_is_all_at_once(family, attention, changes):
    """Without gradient slots are written one by one with a cache; with it, one forward computes
    them all."""
    model = tiny_compressor(family, attention, boundary="autoregressive", **changes)
    for ids, mask in (ragged(), (text(2, 18), None))[: 1 if attention == "eager" else 2]:
        with torch.no_grad():
            stepped = model.encode(ids, mask)
        at_once = model.encode(ids, mask)
        assert torch.equal(stepped.read.written_BT, at_once.read.written_BT) and torch.equal(
            stepped.ids_BC, at_once.ids_BC
        )
        real = stepped.read.rest_BC > 0
        assert len(set(stepped.read.length_BC[real].tolist())) > 1, (
            "segments of one length test nothing"
        )
        coded = stepped.read.coded_BC
        # 1e-4: seen 1e-5 (log-probabilities near -20); a slot that sees one entry too many or too
        # few is off by 1e-1
        torch.testing.assert_close(
            stepped.read.log_p_BCN[real], at_once.read.log_p_BCN[real], atol=1e-4, rtol=1e-4
        )
        torch.testing.assert_close(
            stepped.read.h_BCD[coded], at_once.read.h_BCD[coded], atol=1e-4, rtol=1e-4
        )


def test_a_row_is_what_it_is_alone_and_covered_once():
    model = segmented(codes_per_concept=2)
    ids, mask = ragged((1, 7, 13, 20, 0))
    together, read = model.compress(ids, mask), model.encode(ids, mask).read
    assert together[-1] == [] and model.decompress([[], together[1]])[0] == []
    for row, (codes, length) in enumerate(zip(together, mask.sum(1).tolist(), strict=True)):
        if length:
            assert codes == model.compress(ids[row : row + 1, :length])[0]
            assert model.decompress(together)[row] == uncached(model, codes)
        real = read.rest_BC[row] > 0
        assert int(read.length_BC[row, real].sum()) == length
        assert int(real.sum()) == len(codes) == (max(1, round(0.5 * length)) if length else 0)


def test_codes_depend_on_what_is_to_come_and_slots_on_earlier_ones_only():
    model, ids = segmented(), text(8, 20)
    changed = ids.clone()
    changed[:, -1] = (ids[:, -1] + 1) % 97
    with torch.no_grad():
        a, b = model.encode(ids), model.encode(changed)
    assert not torch.equal(a.read.log_p_BCN[:, 0], b.read.log_p_BCN[:, 0]), (
        "the first slot has read the last token"
    )
    assert any(x != y for x, y in zip(model.compress(ids), model.compress(changed), strict=True))
    spine = Spine(model.backbone)
    with torch.no_grad(), model.compressing():
        step = model._step(spine, spine.embed(a.ids_BS), None, None, None)
        step.ids_BT = a.ids_BS
        slots = model._step_by_step(spine, step, draw=False)
        real, middle = slots.cursor_BC <= 20, slots.cursor_BC.shape[1] // 2
        before = model._at_once(spine, step, slots, real)
        slots.code_BCD[:, middle] += 1.0
        after = model._at_once(spine, step, slots, real)
    assert torch.equal(before[0], after[0]) and torch.equal(
        before[1][:, :middle], after[1][:, :middle]
    )
    assert not torch.equal(before[1][:, middle:], after[1][:, middle:])


def test_the_text_is_read_as_every_compressor_reads_it():
    """Slots change nothing of the text's own states, so a slot whose map is 0 leaves a segment's
    news as they were."""
    model, ids = segmented(), text(3, 20)
    with torch.no_grad():
        model.segmenter.more.zero_()
        read = model.encode(ids).read
        spine = Spine(model.backbone)
        h_BSD = spine.embed(model.opened(ids))
        step = model._step(spine, h_BSD, None, None, None)
        news = model._shallow(spine, h_BSD, step)
        want, _, _ = model._segments(None, news, None, read.written_BT, read.pack, step, None)
    # 1e-5: seen 7e-7, marks are set twice over
    torch.testing.assert_close(read.h_BCD, want, atol=1e-5, rtol=1e-4)


def test_untrained_it_writes_news_at_the_rate():
    """At the start lengths are the same everywhere, and what slots say is nothing."""
    base = tiny_base()
    for rate, longest in ((0.5, 5), (0.25, 16), (1.0, 3), (0.4, 9)):
        model = CompressorForCausalLM(
            CompressorConfig(
                text_config=base.config,
                rate=rate,
                max_tail=longest,
                num_concepts=16,
                head="nearest",
                boundary="autoregressive",
                content="news",
            ),
            tiny_base(),
        )
        mean = torch.softmax(model.segmenter.lengths.bias, 0) @ torch.arange(1.0, longest + 2)
        # 1e-2: where every length is 1 the tilt stops at 20
        torch.testing.assert_close(mean, torch.tensor(1 / rate), atol=1e-2, rtol=0)
        assert not model.segmenter.before.any() and not model.segmenter.more.any()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_all_of_it_learns(precision):
    """Under autocast too, where weights that the first pass cast without gradient must not serve
    the second."""
    torch.manual_seed(0)
    model, ids = segmented(continuation_share=0.25), text(4, 16)
    model.train()
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        model(ids, labels=ids).loss.backward()
    segmenter = model.segmenter
    for name, p in (
        ("before", segmenter.before),
        ("more", segmenter.more),
        *segmenter.lengths.named_parameters(),
    ):
        assert p.grad.abs().sum() > 0, name
    for name in ("compressor", "decompressor"):
        assert all(
            p.grad is not None and p.grad.abs().sum() > 0
            for n, p in model.named_parameters()
            if f".{name}." in n and "lora_B" in n
        ), name
    assert segmenter.lengths.price != 0 and segmenter.lengths.nats > 0


def test_what_a_segment_cost_reaches_its_own_length():
    """The term of one batch by hand: nats are summed over the tokens of each segment."""
    torch.manual_seed(0)
    model, (ids, mask) = segmented(), ragged((4, 13, 20))
    model.train()
    made, seen = model.encode(ids, mask), []
    model.segmenter.lengths.learn = lambda *args: seen.append(args) or torch.zeros(())
    nll = torch.rand(3, 20) * mask
    model._length_term(made.read, made.rank_BT, nll)
    want = []
    for row, (written, length) in enumerate(
        zip(made.read.written_BT[:, 1:], mask.sum(1).tolist(), strict=True)
    ):
        total = 0.0
        for t in range(length):
            total += float(nll[row, t])
            if written[t]:
                want.append(total)
                total = 0.0
    torch.testing.assert_close(seen[0][3], torch.tensor(want))
    assert float(seen[0][2].sum()) == float(mask.sum())


def learned(price: float, nats, rate: float | None = None, steps: int = 150) -> float:
    """The mean length after some steps with that price, which the rate moves if there is one."""
    torch.manual_seed(0)
    lengths, x = Lengths(8, 10, 0.25), F.normalize(torch.randn(256, 8), dim=-1)
    lengths.price.fill_(price)
    lengths.batches.fill_(1)
    lengths.nats.fill_(1.0)
    lengths.density.fill_(0.25)
    optimizer = torch.optim.Adam(lengths.parameters(), 2e-2)
    for _ in range(steps):
        log_p, rest = lengths(x), torch.full((256,), 100)
        n = lengths.draw(log_p, rest)
        loss = lengths.learn(log_p, rest, n, nats(n.float()), rate or float(lengths.density))
        if rate:
            lengths.hold(rate)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return float((lengths(x).exp() @ torch.arange(1.0, 11)).mean())


def test_lengths_go_where_tokens_are_cheap():
    def long_is_free(n):
        return torch.where(n > 4, 0.0, n)

    def short_is_free(n):
        return torch.where(n > 4, n, 0.0)

    assert learned(0.0, long_is_free) > 5 and learned(0.0, short_is_free) < 4


def test_a_price_makes_segments_longer_and_holds_the_rate():
    def convex(n):
        return 0.1 * n.square()  # the best length is √(price / 0.1)

    cheap, dear = learned(0.4, convex), learned(4.0, convex)
    assert 1.5 < cheap < 3 and 5 < dear < 7.5
    assert abs(learned(0.0, convex, rate=0.2, steps=400) - 5) < 0.5


def test_lengths_that_reach_the_end_are_one():
    log_p = torch.log_softmax(torch.randn(3, 5, generator=torch.Generator().manual_seed(0)), -1)
    ways = covering(log_p, torch.tensor([1, 3, 9])).exp()
    torch.testing.assert_close(ways.sum(1), torch.ones(3))
    assert ways[0].tolist()[1:] == [0] * 4 and ways[1, 3:].tolist() == [0, 0]
    torch.testing.assert_close(ways[1, 2], log_p[1, 2:].exp().sum())
    torch.testing.assert_close(ways[2], log_p[2].exp())


@pytest.mark.parametrize("asked", [0.25, 0.5])
@pytest.mark.parametrize("trained", [0.25, 0.5])
def test_the_rate_is_realised(trained, asked):
    """Free running, at the rate that lengths are for and at another one, texts of 48 tokens."""
    model = segmented(rate=trained, max_tail=16)
    model.dial.rate = asked
    ids = text(24, 48, seed=9)
    with torch.no_grad():
        written = model(ids).concept_ids >= 0
    assert [int(row.sum()) for row in written] == [48 * asked] * 24, "each text gets its share"
    halves = written[:, :24].float().mean(1)
    assert len(set(halves.tolist())) > 1 and abs(float(halves.mean()) / asked - 1) < 0.2, (
        "spent on the way as it likes"
    )
    assert model.compress(ids) == model.compress(ids), "nothing is drawn in use"


def test_drawn_lengths_have_the_rate_of_the_start():
    base = tiny_base()
    config = CompressorConfig(
        text_config=base.config,
        rate=0.25,
        num_concepts=32,
        head="nearest",
        boundary="autoregressive",
    )
    model = CompressorForCausalLM(config, base)
    model.start_frame(text(8, 24))
    model.start_codes(text(8, 24))
    model.train()
    torch.manual_seed(0)
    read = model.encode(text(16, 64)).read
    assert abs(int(read.coded_BC.sum()) / (16 * 64) / 0.25 - 1) < 0.1, "the last segment is cut"
    assert len(set(read.length_BC[read.rest_BC > 0].tolist())) > 4


def test_at_rate_1_every_token_is_a_concept():
    model, ids = segmented(max_tail=0, rate=1.0), text(2, 9)
    model.train()
    out = model(ids, labels=ids)
    assert (out.concept_ids >= 0).all() and torch.isfinite(out.loss)


def test_ablations_and_continuation_are_those_of_every_compressor():
    model, ids = segmented(codes_per_concept=2), text(4, 16)
    with torch.no_grad():
        plain, shuffled, zero = (model(ids, ablation=kind) for kind in (None, "shuffle", "zero"))
        assert torch.equal(plain.concept_ids >= 0, shuffled.concept_ids >= 0), (
            "what is replaced is the codes alone"
        )
        assert not torch.equal(plain.logits, shuffled.logits) and not torch.equal(
            plain.logits, zero.logits
        )
        assert model.continuation_logits(model.encode(ids[:, :8]), ids[:, 8:]).shape == (4, 8, 97)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_saved_and_loaded_it_is_the_same(base_folder, tmp_path, attention):
    torch.manual_seed(0)
    config = CompressorConfig(
        base=str(base_folder), num_concepts=32, head="nearest", rate=0.5, boundary="autoregressive"
    )
    model = CompressorForCausalLM.from_base(config, attention=attention)
    move(model, torch.Generator().manual_seed(0))
    with torch.no_grad():
        model.segmenter.lengths.weight.normal_()
    ids = text(4, 24)
    model.start_frame(ids)
    model.start_codes(ids)
    model.eval().save_pretrained(tmp_path / "m")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "m", attn_implementation=attention)
    assert again.compress(ids) == model.compress(ids)
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, model(ids).logits, atol=0, rtol=0)


def test_training_resumes_where_it_stopped(recipe_values, tmp_path):
    values = compressor_recipe(
        recipe_values, boundary="autoregressive", rate=0.25, steps=6, save_every=3, heldout_every=6
    )
    run(values, tmp_path / "whole")
    with ctrl_c(4), pytest.raises(Interrupted):
        run(values, tmp_path / "cut")
    run(values, tmp_path / "cut")
    keys = (
        "step",
        "loss",
        "heldout_nll",
        "rate",
        "heldout_rate",
        "price",
        "tail_mean",
        "code_perplexity",
    )
    lines = [
        [{k: line.get(k) for k in keys} for line in metrics(tmp_path / name)]
        for name in ("whole", "cut")
    ]
    assert lines[0] == lines[1]
    assert (
        all(line["price"] is not None for line in lines[0])
        and lines[0][-1]["price"] != lines[0][0]["price"]
    )
    assert abs(lines[0][-1]["heldout_rate"] - 0.25) < 0.0125
    assert "grad_norm_segmenter" in metrics(tmp_path / "whole")[-1]


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"system": "online"}, "reads all of a text.*need system: compressor"),
        ({"system": "control"}, "need system: compressor"),
        ({"system": "skip"}, "need system: compressor"),
    ],
)
def test_what_cannot_be_trained_is_one_sentence(recipe_values, tmp_path, changes, said):
    with pytest.raises(RecipeError, match=said):
        run(
            {**compressor_recipe(recipe_values, boundary="autoregressive"), **changes},
            tmp_path / "run",
        )


def test_an_online_model_cannot_have_it():
    base = tiny_base()
    with pytest.raises(RecipeError, match="need system: compressor for it"):
        OnlineForCausalLM(
            OnlineConfig(text_config=base.config, split=(1, 2, 1), boundary="autoregressive"), base
        )
