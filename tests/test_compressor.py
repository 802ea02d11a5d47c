"""Text → concepts → text: what each adapter may see, cached = uncached, rows alone = rows together,
training and saving."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from conftest import ctrl_c, metrics, run, sememe
from families import FAMILIES, move, text, tiny_base
from sememe.errors import CheckpointError, Interrupted, RecipeError
from sememe.models import CompressorConfig, CompressorForCausalLM
from sememe.models.compressor.encode import embed_text
from sememe.models.compressor.model import NULL

ONLINE = ("fixed", "null", "threshold", "entropy", "surprise")
BOUNDARIES = (*ONLINE, "autoregressive")
TINY = {"rate": 0.5, "max_tail": 5, "num_concepts": 16, "codes_per_concept": 1, "beams": 1}
TINY |= {"head": "nearest", "base": "tiny", "lora_rank": 4, "content": "news"}


def tiny_compressor(
    family: str = "llama", attention: str = "sdpa", **changes
) -> CompressorForCausalLM:
    """Over a tiny base, with nothing at its starting point of 0."""
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
    if segmenter := model.segmenter:
        sizes |= {segmenter.before: 0.5, segmenter.more: 0.5, segmenter.lengths.weight: 4.0}
    for p, size in sizes.items():
        p.data.copy_(size * torch.randn(p.shape, generator=generator))
    model.calibrate_gate(blocks)
    return model.eval()


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
        logits = decompressor.logits(h, x_CD[[rank]], torch.tensor([offset]))
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
    assert model.decompress(ids) == [uncached(model, row) for row in ids]


@pytest.mark.parametrize("boundary", BOUNDARIES)
def test_a_row_is_what_it_is_alone_and_its_tokens_are_covered_in_order(boundary):
    model = tiny_compressor(boundary=boundary)
    padded, mask = ragged()
    with torch.no_grad():
        encoded = model.encode(padded, mask)
    coded = zip(encoded.ids_BC, encoded.coded_BC, strict=True)
    together = [ids[real].tolist() for ids, real in coded]
    rows = [ids[None, : int(real.sum())] for ids, real in zip(padded, mask, strict=True)]
    assert together == [model.compress(row)[0] for row in rows]
    alone = [model.decompress([ids])[0] for ids in together]
    assert model.decompress([[], *together, []]) == [[], *alone, []]
    with pytest.raises(CheckpointError, match="concept id 16: need ids from 0 to 15"):
        model.decompress([[3, 16]])
    with torch.no_grad():
        out = model(padded, attention_mask=mask, labels=padded)
        alone = model(rows[1])
    assert (out.concept_ids[1, 7:] == NULL).all() and out.concept_ids[1, 6] != NULL
    # 1e-5: seen 1e-6, padded rows go through a masked kernel
    torch.testing.assert_close(out.logits[1, :6], alone.logits[0, :6], atol=1e-5, rtol=1e-5)
    assert torch.isfinite(out.loss)

    # Every token is in a segment, and the last one of a row ends one.
    written_BS = encoded.decision.written_BT
    next_BS2 = torch.stack([encoded.rank_BS, encoded.offset_BS], -1)
    for row, length in enumerate(mask.sum(1).tolist()):
        want, concept, at = [], 1, 0
        for wrote in written_BS[row, 1 : 1 + length].tolist():
            want.append([concept, at])
            concept, at = (concept + 1, 0) if wrote else (concept, at + 1)
        assert next_BS2[row, :length].tolist() == want and at == 0
    if boundary in ONLINE:  # concepts are written before what follows is read
        changed = padded.clone()
        changed[2, 12] = (padded[2, 12] + 1) % 97
        with torch.no_grad():
            other = model(changed, attention_mask=mask)
        assert torch.equal(out.concept_ids[2, :12], other.concept_ids[2, :12])


def test_the_decompressor_sees_the_text_through_the_concepts_alone():
    model, ids = tiny_compressor(boundary="fixed", rate=0.25, num_concepts=64), text(8, 24)
    changed = ids.clone()
    changed[:, 14] = (ids[:, 14] + 1) % 97  # in the segment 12 … 15
    with torch.no_grad():
        plain, other = (model(x, ablation="zero").logits for x in (ids, changed))
        before, after = model(ids), model(changed)
    assert torch.equal(plain[:, :14], other[:, :14]), "without codes it is a causal language model"
    assert not torch.equal(plain[:, 14], other[:, 14])
    wrote = before.concept_ids[:, 15] != after.concept_ids[:, 15]
    assert wrote.any(), "the change must reach the code"
    assert not torch.equal(before.logits[wrote, 11], after.logits[wrote, 11])
    assert torch.equal(before.logits[:, :11], after.logits[:, :11]), "and nothing before it"


def test_each_adapter_is_its_own_and_both_learn():
    model, ids = tiny_compressor(boundary="null"), text(2, 16)
    model.train()
    model(ids, labels=ids).loss.backward()
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    moved = [n for n, p in named if p.grad is not None and p.grad.abs().sum() > 0]
    modules = ("writer.head", "writer.codes", "next_embedding", "decompressor.state")
    for part in (*modules, "lora_B.compressor", "lora_B.decompressor"):
        assert any(part in n for n in moved), part
    concepts = model.eval().compress(ids)
    words = model.decompress(concepts)
    with torch.no_grad():
        for n, p in named:
            p.mul_(3 if ".decompressor." in n else 1)
    assert model.compress(ids) == concepts and model.decompress(concepts) != words


def test_texts_come_back_from_their_concepts_and_not_from_others():
    """A tiny model learns a few texts by their concepts alone, and writes another where it reads
    another's."""
    ids = text(8, 12)
    model = tiny_compressor(boundary="fixed", num_concepts=256, lora_rank=8).train()
    torch.manual_seed(0)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        optimizer.step()
    concepts = model.eval().compress(ids)

    def right(rows: list[list[int]]) -> float:
        padded = torch.tensor([(row + [-1] * 12)[:12] for row in model.decompress(rows)])
        return float((padded == ids).float().mean())

    assert right(concepts) > 0.9 and right(concepts[::-1]) < 0.5


def test_continuation_reads_concepts_and_the_words_before():
    model, ids = tiny_compressor(boundary="null", codes_per_concept=2), text(3, 16)
    with torch.no_grad():
        encoded = model.encode(ids[:, :8])
        logits = model.continuation_logits(encoded, ids[:, 8:])
        changed = ids.clone()
        changed[:, 12] = (ids[:, 12] + 1) % 97
        other = model.continuation_logits(encoded, changed[:, 8:])
        alone = [model.continuation_logits(model.encode(x[:, :8]), x[:, 8:]) for x in ids.split(1)]
        nothing = model.continuation_logits(model.encode(ids[:, :0]), ids[:, 8:])
    assert logits.shape == (3, 8, 97) and torch.equal(logits[:, :5], other[:, :5])
    assert not torch.equal(logits[:, 5], other[:, 5])
    # 1e-5 seen 2e-6: rows with fewer concepts are padded, and sums go another way
    torch.testing.assert_close(logits, torch.cat(alone), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(logits, nothing), "the concepts are read"


@pytest.mark.parametrize(
    "attention, changes",
    [
        ("sdpa", {"content": "news", "depth": 2}),
        ("eager", {"depth": 2}),
        ("sdpa", {"boundary": "fixed", "num_concepts": 64}),
        ("eager", {"boundary": "autoregressive", "num_concepts": 32}),
    ],
)
def test_saved_and_loaded_it_is_the_same(base_folder, tmp_path, attention, changes):
    torch.manual_seed(0)
    settings = {"rate": 0.5, "boundary": "null", "max_tail": 5, "num_concepts": 16, **changes}
    config = CompressorConfig(base=str(base_folder), **settings)
    model = CompressorForCausalLM.from_base(config, attention=attention)
    move(model, torch.Generator().manual_seed(0))
    ids = text(4, 24)
    model.start_frame(ids)
    model.start_codes(ids)
    model.eval().save_pretrained(tmp_path / "m")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "m", attn_implementation=attention)
    concepts = model.compress(ids)
    assert again.compress(ids) == concepts
    assert again.decompress(concepts) == model.decompress(concepts)
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, model(ids).logits, atol=0, rtol=0)
    names = [n for n, _ in model.named_parameters() if ".compressor." in n]
    reads = set() if config.boundary == "fixed" else set(range(config.depth or 4))
    layers = {int(n.split(".layers.")[1].split(".")[0]) for n in names}
    assert layers == reads, "no adapter where the compressor does not read"
    with pytest.raises(CheckpointError, match="two adapters"):
        again.merged()
    slower = AutoModelForCausalLM.from_pretrained(tmp_path / "m", rate=0.25)
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
    run(values, tmp_path / "whole")
    with ctrl_c(5), pytest.raises(Interrupted):
        run(values, tmp_path / "cut")
    run(values, tmp_path / "cut")
    keys = ("step", "loss", "heldout_nll", "rate", "code_perplexity", "length_penalty")
    lines = (metrics(tmp_path / name) for name in ("whole", "cut"))
    whole, cut = ([{k: line.get(k) for k in keys} for line in x] for x in lines)
    assert whole == cut and len(whole) == 8
    last = metrics(tmp_path / "whole")[-1]
    assert {"delta_nll_shuffle", "heldout_nll", "grad_norm_codes"} <= set(last)
    if changes["boundary"] == "autoregressive":
        assert last["length_penalty"] != whole[0]["length_penalty"]
        assert abs(last["heldout_rate"] - 0.25) < 0.0125


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"depth": 9}, r"depth = 9: .* at most 4\."),
        ({"gradient_checkpointing": True}, "gradient_checkpointing"),
        ({"continuation_share": 1.5}, "continuation_share"),
        ({"rate": 0.1, "max_tail": 2}, "max_tail"),
        ({"max_tail": 40}, r"max_tail = 40: .* at most 31\."),
        ({"num_concepts": 8, "max_tail": 16}, r"max_tail = 16: .* at most 7\."),
        ({"content": "words"}, "content"),
        ({"pool": True}, "system = compressor cannot have pool"),
        ({"boundary": "autoregressive", "system": "online"}, "need system: compressor"),
    ],
)
def test_what_cannot_be_trained_is_one_sentence(recipe_values, tmp_path, changes, message):
    with pytest.raises(RecipeError, match=message):
        run(compressor_recipe(recipe_values, **changes), tmp_path / "run")


def test_commands_for_language_models_say_what_a_compressor_is(recipe_values, texts, tmp_path):
    folder = tmp_path / "run"
    run(compressor_recipe(recipe_values), folder)
    assert "is a compressor" in sememe("generate", folder, "--prompt", "the cat", code=1)
    assert "two adapters" in sememe("export", folder, "--out", tmp_path / "x", code=1)
    assert not (tmp_path / "x").exists()
    few = ("--data", texts[1], "--tokens", 128)
    printed = sememe("evaluate", folder, *few, "--rate", "0.25,0.5")
    assert "25 %" in printed and "delta_nll_shuffle" in printed
    assert "report.html" in sememe("report", folder)
    assert "shuffle" in sememe("ablate", folder, *few)
