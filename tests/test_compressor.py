"""Text → concepts → text: who sees what, cached = uncached, rows alone, training and saving."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from conftest import ctrl_c, run, sememe
from families import FAMILIES, compressor_over, move, text, tiny_base
from sememe.concepts.boundary import BOUNDARIES
from sememe.errors import CheckpointError, Interrupted, RecipeError
from sememe.evaluation.context import CODES, model_nll
from sememe.models import CompressorConfig, CompressorForCausalLM
from sememe.models.compressor.encode import embed_text
from sememe.models.compressor.model import NULL

TINY = {"rate": 0.5, "max_tail": 5, "num_concepts": 16, "codes_per_concept": 1, "beams": 1}
TINY |= {"head": "nearest", "base": "tiny", "lora_rank": 4, "content": "learned"}


def tiny_compressor(family: str = "llama", attention: str = "sdpa", **changes):
    """A compressor over a tiny base, with nothing at its starting point of 0."""
    base = tiny_base(family, attention=attention)
    config = CompressorConfig(text_config=base.config, **{**TINY, **changes})
    config._attn_implementation = attention
    model = CompressorForCausalLM(config, base)
    move(model, torch.Generator().manual_seed(1))
    blocks = text(16, 24, seed=2)
    model.start_frame(blocks)
    model.start_codes(blocks)
    generator = torch.Generator().manual_seed(3)
    sizes = {model.decompressor.place.weight: 0.1}
    if tokens := model.writer.readout.tokens:
        sizes[tokens.context] = 0.05
    if segmenter := model.segmenter:
        sizes |= {segmenter.before: 0.5, segmenter.more: 0.5, segmenter.lengths.weight: 4.0}
    for p, size in sizes.items():
        p.data.copy_(size * torch.randn(p.shape, generator=generator))
    model.calibrate_gate(blocks)
    return model.eval()


def changed_at(ids: torch.Tensor, place: int) -> torch.Tensor:
    other = ids.clone()
    other[:, place] = (ids[:, place] + 1) % 97
    return other


def ragged(lengths=(1, 7, 20), longest: int = 20) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, mask) of rows with padding on the right."""
    mask = (torch.arange(longest) < torch.tensor(lengths)[:, None]).long()
    return text(len(lengths), longest, seed=4) * mask, mask


def uncached(model: CompressorForCausalLM, ids: list[int]) -> list[int]:
    """The specification of `decompress`, one row, greedy: everything again for every token."""
    decompressor = model.decompressor
    x_CD = model.writer.codes.normalise(model.writer.codes(torch.tensor(ids)))
    words, ranks, offsets, rank, offset = [model.bos], [], [], 0, 0
    while rank < len(ids):
        ranks.append(rank)
        offsets.append(offset)
        # One more word, of which nothing is read.
        padded = embed_text(model, torch.tensor([[*words, 0]])[:, 1:])
        offset_1S = torch.tensor([[*offsets, 0]])
        h = decompressor.states(padded, x_CD[[*ranks, rank]][None], offset_1S)[:, -2]
        read = decompressor.read(h, x_CD[[rank]], torch.tensor([offset]))
        logits = decompressor.logits(*read)
        words.append(int(logits.argmax()))
        ends = offset + 1 >= int(decompressor.segments.length(x_CD[rank]))
        rank, offset = rank + ends, 0 if ends else offset + 1
    return words[1:]


@pytest.mark.parametrize(
    "family, boundary",
    [*((family, "null") for family in FAMILIES), *(("llama", b) for b in BOUNDARIES)],
)
def test_decompressing_with_a_cache_is_decompressing_without(family, boundary):
    model = tiny_compressor(family, boundary=boundary, codes_per_concept=2)
    ids = model.compress(text(3, 20))
    codes = model.writer.codes
    x = codes.normalise(codes(torch.tensor([i for row in ids for i in row])))
    assert len(model.decompressor.segments.length(x).unique()) > 1 or boundary == "fixed"
    assert model.decompress([[], *ids, []]) == [[], *(uncached(model, row) for row in ids), []]


@pytest.mark.parametrize("boundary", BOUNDARIES)
@torch.no_grad()
def test_a_row_is_what_it_is_alone_and_its_tokens_are_covered_in_order(boundary):
    model, (padded, mask) = tiny_compressor(boundary=boundary), ragged()
    encoded = model.encode(padded, mask)
    coded = zip(encoded.ids_BC, encoded.coded_BC, strict=True)
    together = [ids[real].tolist() for ids, real in coded]
    rows = [ids[None, : int(real.sum())] for ids, real in zip(padded, mask, strict=True)]
    assert together == [model.compress(row)[0] for row in rows]
    with pytest.raises(CheckpointError, match="concept id 16: need ids from 0 to 15"):
        model.decompress([[3, 16]])
    out, alone = model(padded, attention_mask=mask, labels=padded), model(rows[1])
    assert (out.concept_ids[1, 7:] == NULL).all() and out.concept_ids[1, 6] != NULL
    # 1e-5: seen 1e-6, padded rows go through a masked kernel
    torch.testing.assert_close(out.logits[1, :6], alone.logits[0, :6], atol=1e-5, rtol=1e-5)
    assert torch.isfinite(out.loss)

    # Every token is in a segment, and the last one of a row ends one.
    next_BS2 = torch.stack([encoded.rank_BS, encoded.offset_BS], -1)
    for row, length in enumerate(mask.sum(1).tolist()):
        want, concept, at = [], 1, 0
        for wrote in encoded.decision.written_BT[row, 1 : 1 + length].tolist():
            want.append([concept, at])
            concept, at = (concept + 1, 0) if wrote else (concept, at + 1)
        assert next_BS2[row, :length].tolist() == want and at == 0
    if not BOUNDARIES[boundary].offline:  # concepts are written before what follows is read
        other = model(changed_at(padded, 12), attention_mask=mask)
        assert torch.equal(out.concept_ids[2, :12], other.concept_ids[2, :12])


@torch.no_grad()
def test_the_decompressor_sees_the_text_through_the_concepts_alone():
    model, ids = tiny_compressor(boundary="fixed", rate=0.25, num_concepts=64), text(8, 24)
    changed = changed_at(ids, 14)  # in the segment 12 … 15
    plain, other = (model(x, ablation="zero").logits for x in (ids, changed))
    before, after = model(ids), model(changed)
    assert torch.equal(plain[:, :14], other[:, :14]), "without codes it is a causal language model"
    assert not torch.equal(plain[:, 14], other[:, 14])
    wrote = before.concept_ids[:, 15] != after.concept_ids[:, 15]
    assert wrote.any(), "the change must reach the code"
    assert not torch.equal(before.logits[wrote, 11], after.logits[wrote, 11])
    assert torch.equal(before.logits[:, :11], after.logits[:, :11]), "and nothing before it"


@pytest.mark.parametrize("boundary", ["null", "autoregressive"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_all_of_it_learns_and_each_adapter_is_its_own(boundary, precision):
    """Under autocast too, where weights that the first pass of slots cast without gradient must not
    serve the second."""
    torch.manual_seed(0)
    model, ids = tiny_compressor(boundary=boundary, continuation_share=0.25).train(), text(4, 16)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        model(ids, labels=ids).loss.backward()
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    still = [n for n, p in named.items() if p.grad is None or not p.grad.any()]
    # The head's own weights only say where concepts end, and there the segmenter does.
    assert all(model.segmenter and "writer.head." in name for name in still), still
    if model.segmenter:
        assert model.segmenter.lengths.penalty != 0 and model.segmenter.lengths.nats > 0
    concepts = model.eval().compress(ids)
    words = model.decompress(concepts)
    with torch.no_grad():
        for n, p in named.items():
            p.mul_(3 if ".decompressor." in n else 1)
    assert model.compress(ids) == concepts and model.decompress(concepts) != words


def learn(model, ids: torch.Tensor) -> None:
    """Sixty steps on the same texts; the last gradients are left."""
    torch.manual_seed(0)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        optimizer.step()


def test_texts_come_back_from_their_concepts_and_not_from_others():
    """A tiny model learns a few texts by their concepts alone, and writes another where it reads
    another's."""
    ids = text(8, 12)
    model = tiny_compressor(boundary="fixed", num_concepts=256, lora_rank=8).train()
    learn(model, ids)
    concepts = model.eval().compress(ids)

    def right(rows: list[list[int]]) -> float:
        padded = torch.tensor([(row + [-1] * 12)[:12] for row in model.decompress(rows)])
        return float((padded == ids).float().mean())

    assert right(concepts) > 0.9 and right(concepts[::-1]) < 0.5


def test_a_text_goes_on_from_its_own_concepts_and_not_from_others():
    """The second half of each text repeats the first, which only the concepts say. Only the loss of
    going on is trained, and through the codes it reaches the layers that read."""
    ids = text(8, 6).repeat(1, 2)
    model = tiny_compressor(boundary="fixed", num_concepts=64, continuation_share=1.0).train()
    learn(model, ids)
    reads = [p.grad for name, p in model.named_parameters() if ".compressor." in name]
    assert all(grad.any() for grad in reads)
    model.eval()
    own, others = (
        float(model_nll(model, ids, 6, source)[0].mean()) for source in (CODES, "codes shuffled")
    )
    assert own < 1 and others > own + 0.5


@torch.no_grad()
def test_untrained_codes_are_words_and_read_as_their_embeddings():
    """The first code of a pair is for its first word, the second for the other: with a code for
    each word of the vocabulary, of that very word."""
    changes = {"boundary": "fixed", "num_concepts": 97, "codes_per_concept": 2, "max_tail": 1}
    config = CompressorConfig(text_config=tiny_base().config, **TINY | changes)
    model, blocks = CompressorForCausalLM(config, tiny_base()), text(64, 24, seed=2)
    assert model.start_frame(blocks)["words_read"] > 0.9
    model.start_codes(blocks)
    table_VD, ids = model.get_input_embeddings().weight, text(4, 24)
    code_BCGD = model.writer.codes.by_stage(model.encode(ids).ids_BC[:, 1:])
    read_BTD = model.decompressor.read_codes(code_BCGD).flatten(1, 2)
    nearest_BT = torch.cdist(read_BTD, table_VD).argmin(-1)
    assert (nearest_BT == ids).float().mean() > 0.7


@torch.no_grad()
def test_continuation_reads_concepts_and_the_words_before():
    model, ids = tiny_compressor(boundary="null", codes_per_concept=2), text(3, 16)

    def logits(x, given=8):
        return model.continuation_logits(model.encode(x[:, :given]), x[:, 8:])

    whole, other = logits(ids), logits(changed_at(ids, 12))
    assert whole.shape == (3, 8, 97) and torch.equal(whole[:, :5], other[:, :5])
    assert not torch.equal(whole[:, 5], other[:, 5])
    # 1e-5 seen 2e-6: rows with fewer concepts are padded, and sums go another way
    alone = torch.cat([logits(row) for row in ids.split(1)])
    torch.testing.assert_close(whole, alone, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(whole, logits(ids, given=0)), "the concepts are read"


@pytest.mark.parametrize(
    "attention, changes",
    [
        ("sdpa", {"boundary": "fixed", "depth": 2}),
        ("eager", {"content": "bins", "depth": 2}),
        ("sdpa", {"content": "bins", "boundary": "fixed", "num_concepts": 64}),
        ("eager", {"boundary": "autoregressive", "num_concepts": 32}),
    ],
)
def test_saved_and_loaded_it_is_the_same(base_folder, tmp_path, attention, changes):
    ids = text(4, 24)
    model = compressor_over(base_folder, ids, **changes)
    model.set_attn_implementation(attention)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=attention)
    concepts = model.compress(ids)
    assert again.compress(ids) == concepts
    assert again.decompress(concepts) == model.decompress(concepts)
    assert torch.equal(again(ids).logits, model(ids).logits)
    names = [n for n, _ in model.named_parameters() if ".compressor." in n]
    reads = () if {"fixed", "bins"} <= {*changes.values()} else range(changes.get("depth", 4))
    assert {int(n.split(".layers.")[1].split(".")[0]) for n in names} == {*reads}, "where it reads"
    with pytest.raises(CheckpointError, match="two adapters"):
        again.merged()
    slower = AutoModelForCausalLM.from_pretrained(tmp_path, rate=0.25)
    assert len(slower.compress(ids)[0]) < len(concepts[0])
    if (bins := slower.writer.readout.bins) is not None:
        assert torch.equal(bins.bin_LV, model.writer.readout.bins.bin_LV), "a rate moves no bins"


def compressor_recipe(values: dict, **changes) -> dict:
    own = {"system": "compressor", "boundary": "fixed", "quantise": [0.0, 0.3]}
    return values | own | changes


@pytest.mark.parametrize(
    "changes", [{"boundary": "null"}, {"boundary": "autoregressive", "rate": 0.25}], ids=str
)
def test_training_resumes_where_it_stopped(recipe_values, tmp_path, changes):
    values = compressor_recipe(recipe_values, continuation_share=0.25, **changes)
    whole = run(values, tmp_path / "whole")
    with ctrl_c(5), pytest.raises(Interrupted):
        run(values, tmp_path / "cut")
    cut = run(values, tmp_path / "cut")
    keys = ("step", "loss", "heldout_nll", "rate", "code_perplexity", "length_penalty")
    figures, again = ([[line.get(k) for k in keys] for line in x] for x in (whole, cut))
    assert figures == again and len(whole) == 8
    assert {"delta_nll_shuffle", "heldout_nll", "grad_norm_codes"} <= set(whole[-1])
    if changes["boundary"] == "autoregressive":
        assert whole[-1]["length_penalty"] != whole[0]["length_penalty"]
        assert abs(whole[-1]["heldout_rate"] - 0.25) < 0.0125


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"depth": 9}, r"depth = 9: .* at most 4\."),
        ({"continuation_share": 1.5}, "continuation_share"),
        ({"rate": 0.1, "max_tail": 2}, "max_tail"),
        ({"max_tail": 40}, r"max_tail = 40: .* at most 31\."),
        ({"content": "bins", "num_concepts": 8, "max_tail": 16}, r"max_tail = 16: .* at most 7\."),
        ({"pool": True}, "system = compressor cannot have pool"),
        ({"boundary": "autoregressive", "system": "online"}, "need system: compressor"),
    ],
)
def test_what_cannot_be_trained_is_one_sentence(recipe_values, tmp_path, changes, message):
    with pytest.raises(RecipeError, match=message):
        run(compressor_recipe(recipe_values, **changes), tmp_path / "run")


def test_commands_for_language_models_say_what_a_compressor_is(recipe_values, texts, tmp_path):
    folder, few = tmp_path / "run", ("--data", texts[1], "--tokens", 128)
    run(compressor_recipe(recipe_values), folder)
    assert "is a compressor" in sememe("generate", folder, "--prompt", "the cat", code=1)
    assert "two adapters" in sememe("export", folder, "--out", tmp_path / "x", code=1)
    assert not (tmp_path / "x").exists()
    printed = sememe("evaluate", folder, *few, "--rate", "0.25,0.5")
    assert "25 %" in printed and "delta_nll_shuffle" in printed
    assert "report.html" in sememe("report", folder)
    assert "shuffle" in sememe("ablate", folder, *few)
