"""Text → concepts → text: what each adapter may see, cached = uncached, rows alone = rows together,
training and saving."""

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from conftest import ctrl_c, metrics, run, sememe
from families import FAMILIES, move, text, tiny_base
from sememe.backbone.split import Spine
from sememe.errors import CheckpointError, Interrupted, RecipeError
from sememe.models import CompressorConfig, CompressorForCausalLM
from sememe.models.writing import NULL

ONLINE = ("fixed", "null", "threshold", "entropy", "surprise")
BOUNDARIES = (*ONLINE, "autoregressive")


def tiny_compressor(
    family: str = "llama", attention: str = "sdpa", **changes
) -> CompressorForCausalLM:
    base = tiny_base(family, attention=attention)
    settings = {
        "rate": 0.5,
        "max_tail": 5,
        "num_concepts": 16,
        "head": "nearest",
        "base": "tiny",
        "lora_rank": 4,
        "content": "news",
        "beams": 1,
    }
    config = CompressorConfig(text_config=base.config, **{**settings, **changes})
    config._attn_implementation = attention
    model = CompressorForCausalLM(config, base)
    move(model, torch.Generator().manual_seed(1))
    blocks = text(16, 24, seed=2)
    model.start_frame(blocks)
    model.start_codes(blocks)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(3)
        model.reader.place.weight.copy_(
            0.1 * torch.randn(model.reader.place.weight.shape, generator=generator)
        )
        if model.segmenter is not None:
            lengths = model.segmenter.lengths
            for p, size in (
                (model.segmenter.before, 0.5),
                (model.segmenter.more, 0.5),
                (lengths.weight, 4.0),
            ):
                p.copy_(size * torch.randn(p.shape, generator=generator))
            model.calibrate_gate(blocks)
    return model.eval()


def uncached(model: CompressorForCausalLM, ids: list[int]) -> list[int]:
    """The specification of `decompress`, one row: everything again for every token."""
    e_CD, spine = model.codes(torch.tensor(ids)), Spine(model.backbone)
    words, ranks, places, rank, place = [model.bos], [], [], 0, 0
    while rank < len(ids):
        ranks.append(rank)
        places.append(place)
        x = spine.embed(torch.tensor([words])) + model.told(e_CD[ranks], torch.tensor(places))
        h = model._decompressor(spine, x, torch.arange(len(words))[None])[:, -1]
        words.append(int(model._voted(spine, h, e_CD[[rank]], torch.tensor([place])).argmax()))
        ends = place + 1 >= int(model.reader.length(model.codes.normalise(e_CD[rank])))
        rank, place = rank + ends, 0 if ends else place + 1
    return words[1:]


@pytest.mark.parametrize(
    "family, boundary",
    [*((family, "null") for family in FAMILIES), *(("llama", b) for b in BOUNDARIES)],
)
def test_decompressing_with_a_cache_is_decompressing_without(family, boundary):
    model = tiny_compressor(family, boundary=boundary, codes_per_concept=2)
    ids = model.compress(text(3, 20))
    lengths = model.reader.length(
        model.codes.normalise(model.codes(torch.tensor([i for row in ids for i in row])))
    )
    assert len(lengths.unique()) > 1 or boundary == "fixed", "segments of one length test nothing"
    assert model.decompress(ids) == [uncached(model, row) for row in ids]


@pytest.mark.parametrize("boundary", BOUNDARIES)
def test_a_row_is_what_it_is_alone(boundary):
    model = tiny_compressor(boundary=boundary)
    rows = [text(1, n, seed=n) for n in (1, 7, 20)]
    padded, mask = (
        torch.cat([F.pad(row, (0, 20 - row.shape[1]), value=value) for row in kind])
        for kind, value in ((rows, 0), ([torch.ones_like(row) for row in rows], 0))
    )
    together = model.compress(padded, mask)
    assert together == [model.compress(row)[0] for row in rows]
    assert model.decompress(together) == [model.decompress([ids])[0] for ids in together]
    assert model.decompress([[], together[1]]) == [[], model.decompress([together[1]])[0]]


@pytest.mark.parametrize("boundary", BOUNDARIES)
def test_every_token_is_in_a_segment_and_the_last_one_ends_one(boundary):
    model = tiny_compressor(boundary=boundary, rate=0.3)
    made = model.encode(text(4, 23))
    assert made.read.written_BT[:, -1].all()
    count_B1 = made.read.written_BT.sum(1, keepdim=True)
    assert ((made.rank_BT >= 1) & (made.rank_BT < count_B1)).all(), (
        "each token reads a concept that is there, never the BOS"
    )
    for written, rank, place in zip(made.read.written_BT, made.rank_BT, made.place_BT, strict=True):
        want, concept, at = [], 1, 0
        for wrote in written[1:].tolist():
            want.append((concept, at))
            concept, at = (concept + 1, 0) if wrote else (concept, at + 1)
        assert list(zip(rank.tolist(), place.tolist(), strict=True)) == want


@pytest.mark.parametrize("boundary", ONLINE)
def test_concepts_are_written_online(boundary):
    model, ids = tiny_compressor(boundary=boundary), text(1, 20)
    changed = ids.clone()
    changed[0, 12] = (ids[0, 12] + 1) % 97
    with torch.no_grad():
        a, b = model(ids).concept_ids, model(changed).concept_ids
    assert torch.equal(a[:, :12], b[:, :12])


def test_the_decompressor_sees_the_text_through_the_concepts_alone():
    model, ids = tiny_compressor(boundary="fixed", rate=0.25, num_concepts=64), text(8, 24)
    changed = ids.clone()
    changed[:, 14] = (ids[:, 14] + 1) % 97  # in the segment 12 … 15
    with torch.no_grad():
        plain, other = (model(x, ablation="zero").logits for x in (ids, changed))
        told, differently = model(ids), model(changed)
    assert torch.equal(plain[:, :14], other[:, :14]), "without codes it is a causal language model"
    assert not torch.equal(plain[:, 14], other[:, 14])
    wrote = told.concept_ids[:, 15] != differently.concept_ids[:, 15]
    assert wrote.any(), "the change must reach the code"
    assert not torch.equal(told.logits[wrote, 11], differently.logits[wrote, 11]), (
        "its segment's concept tells token 12"
    )
    assert torch.equal(told.logits[:, :11], differently.logits[:, :11]), (
        "and nothing ahead of that segment is"
    )


def test_each_adapter_is_its_own_and_both_learn():
    model, ids = tiny_compressor(boundary="null"), text(2, 16)
    model.train()
    model(ids, labels=ids).loss.backward()
    for name in ("compressor", "decompressor"):
        assert any(
            p.grad is not None and p.grad.abs().sum() > 0
            for n, p in model.named_parameters()
            if f".{name}." in n
        ), name
    for module in (model.head, model.codes, model.foretold, model.reader):
        assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in module.parameters())
    model.eval()
    concepts, words = model.compress(ids), model.decompress(model.compress(ids))
    with torch.no_grad():
        for n, p in model.named_parameters():
            if ".decompressor." in n:
                p.mul_(3)
    assert model.compress(ids) == concepts and model.decompress(concepts) != words


def test_texts_come_back_from_their_concepts_and_not_from_others():
    """A tiny model learns a few texts by their concepts alone, and writes another where it reads
    another's."""
    torch.manual_seed(0)
    model, ids = (
        tiny_compressor(boundary="fixed", rate=0.5, num_concepts=256, lora_rank=8),
        text(8, 12),
    )
    model.train()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-2)
    for _ in range(60):
        loss = model(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    back = model.decompress(model.compress(ids))
    right = sum(
        a == b
        for got, want in zip(back, ids.tolist(), strict=True)
        for a, b in zip(got, want, strict=False)
    )
    assert right / ids.numel() > 0.9
    swapped = model.decompress(model.compress(ids)[::-1])
    wrong = sum(
        a == b
        for got, want in zip(swapped, ids.tolist(), strict=True)
        for a, b in zip(got, want, strict=False)
    )
    assert wrong / ids.numel() < 0.5, "other concepts, another text"


def test_continuation_reads_concepts_and_the_words_before():
    model, ids = tiny_compressor(boundary="null", codes_per_concept=2), text(3, 16)
    with torch.no_grad():
        made = model.encode(ids[:, :8])
        logits = model.continuation_logits(made, ids[:, 8:])
        assert logits.shape == (3, 8, 97)
        changed = ids.clone()
        changed[:, 12] = (ids[:, 12] + 1) % 97
        other = model.continuation_logits(made, changed[:, 8:])
        assert torch.equal(logits[:, :5], other[:, :5]) and not torch.equal(
            logits[:, 5], other[:, 5]
        )
        alone = torch.cat(
            [
                model.continuation_logits(model.encode(ids[i : i + 1, :8]), ids[i : i + 1, 8:])
                for i in range(3)
            ]
        )
        # 1e-5 seen 2e-6: rows with fewer concepts are padded, and sums go another way
        torch.testing.assert_close(logits, alone, atol=1e-5, rtol=1e-5)
        assert not torch.allclose(logits, model.continuation_logits(None, ids[:, 8:])), (
            "the concepts are read"
        )


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_saved_and_loaded_it_is_the_same(base_folder, tmp_path, attention):
    torch.manual_seed(0)
    model = CompressorForCausalLM.from_base(
        CompressorConfig(
            base=str(base_folder),
            num_concepts=16,
            head="nearest",
            rate=0.5,
            boundary="null",
            depth=2,
            max_tail=5,
        ),
        attention=attention,
    )
    move(model, torch.Generator().manual_seed(0))
    ids = text(4, 24)
    model.start_frame(ids)
    model.start_codes(ids)
    model.eval().save_pretrained(tmp_path / "m")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "m", attn_implementation=attention)
    assert isinstance(again, CompressorForCausalLM) and again.compress(ids) == model.compress(ids)
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, model(ids).logits, atol=0, rtol=0)
    layers = {
        int(n.split(".layers.")[1].split(".")[0])
        for n, _ in model.named_parameters()
        if ".compressor." in n
    }
    assert layers == {0, 1}, "no adapter where the compressor does not read"
    with pytest.raises(CheckpointError, match="two adapters"):
        again.merged()


def compressor_recipe(values: dict, **changes) -> dict:
    return {
        **values,
        "system": "compressor",
        "boundary": "fixed",
        "schedule": {"quantise": [0.0, 0.3]},
        **changes,
    }


def test_training_resumes_where_it_stopped(recipe_values, tmp_path):
    values = compressor_recipe(recipe_values, continuation_share=0.25, boundary="null")
    whole = run(values, tmp_path / "whole")
    with ctrl_c(5), pytest.raises(Interrupted):
        run(values, tmp_path / "cut")
    run(values, tmp_path / "cut")
    keys = ("step", "loss", "heldout_nll", "rate", "code_perplexity")
    lines = [
        [{k: line.get(k) for k in keys} for line in metrics(tmp_path / name)]
        for name in ("whole", "cut")
    ]
    assert lines[0] == lines[1] and len(whole) == 8
    assert {"delta_nll_shuffle", "heldout_nll", "grad_norm_reader", "grad_norm_codes"} <= set(
        whole[-1]
    )


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"depth": 9}, "depth = 9, but this base has 4 layers"),
        ({"gradient_checkpointing": True}, "gradient_checkpointing"),
        ({"continuation_share": 1.5}, "continuation_share"),
        ({"rate": 0.1, "max_tail": 2}, "max_tail"),
        ({"max_tail": 40}, "max_tail = 40: of a compressor's"),
        ({"pool": True}, "pool = true is for system: online"),
    ],
)
def test_what_cannot_be_trained_is_one_sentence(recipe_values, tmp_path, changes, said):
    with pytest.raises(RecipeError, match=said):
        run(compressor_recipe(recipe_values, **changes), tmp_path / "run")


def test_ids_that_no_code_stands_for_are_refused():
    model = tiny_compressor()
    with pytest.raises(CheckpointError, match="concept id 16: need ids from 0 to 15"):
        model.decompress([[3, 16]])
    assert model.decompress([]) == [] and model.decompress([[]]) == [[]]


def test_padding_writes_nothing():
    model = tiny_compressor(boundary="null")
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[1, 5:] = 0
    with torch.no_grad():
        out = model(text(2, 12), attention_mask=mask, labels=text(2, 12))
    assert (
        (out.concept_ids[1, 5:] == NULL).all()
        and out.concept_ids[1, 4] != NULL
        and torch.isfinite(out.loss)
    )


def test_a_padded_row_with_the_most_concepts_is_what_it_is_alone():
    model, ids = tiny_compressor(boundary="fixed"), text(1, 12)
    mask = torch.ones_like(ids)
    mask[:, 8:] = 0
    with torch.no_grad():
        padded, alone = (
            model(ids, attention_mask=mask, labels=ids),
            model(ids[:, :8], labels=ids[:, :8]),
        )
    # 1e-5: seen 1e-6, the padded row goes through a masked kernel
    torch.testing.assert_close(padded.logits[:, :7], alone.logits[:, :7], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(padded.loss, alone.loss, atol=1e-5, rtol=1e-5)


def test_commands_for_language_models_say_what_a_compressor_is(recipe_values, texts, tmp_path):
    run(compressor_recipe(recipe_values), tmp_path / "run")
    assert "is a compressor" in sememe("generate", tmp_path / "run", "--prompt", "the cat", code=1)
    assert (
        "two adapters" in sememe("export", tmp_path / "run", "--to", tmp_path / "x", code=1)
        and not (tmp_path / "x").exists()
    )
    said = sememe(
        "evaluate", tmp_path / "run", "--data", texts[1], "--tokens", 128, "--rates", "0.25,0.5"
    )
    assert "0.25" in said and "delta_nll_shuffle" in said
    assert "report.html" in sememe("report", tmp_path / "run")
    few = ("--tokens", 128, "--shares", "0,0.5", "--seeds", 1)
    assert "shuffle" in sememe("ablate", tmp_path / "run", "--data", texts[1], *few)
