"""What being online costs: the same tokens, the same rate, one more line in reconstruct, and which
models do not go together."""

import json
import math
import re

import pytest
import torch
import torch.nn.functional as F
import yaml

from conftest import byte_tokenizer, sememe
from families import compressor_over, online_over, tiny_base
from sememe.concepts.writer import NULL
from sememe.data import token_blocks
from sememe.evaluation.baselines import base_nll
from sememe.evaluation.continuation import continuation
from sememe.evaluation.online_cost import online_cost, online_nll
from sememe.models.loading import load_base, load_model
from sememe.report import write_report

CONTEXT = 64


@pytest.fixture(scope="module")
def blocks(texts):
    return token_blocks([texts[0].read_text()], byte_tokenizer(), 32, limit=1024)


@pytest.fixture(scope="module")
def ids(texts):
    return token_blocks([texts[1].read_text()], byte_tokenizer(), CONTEXT + 16, limit=1000)


@pytest.fixture(scope="module")
def compressor(base_folder, blocks):
    return compressor_over(base_folder, blocks)


@pytest.fixture(scope="module")
def online(base_folder, blocks):
    return online_over(base_folder, blocks, codes_per_concept=2)


@pytest.fixture(scope="module")
def saved(tmp_path_factory, base_folder, blocks, compressor, online, texts):
    """Folders by name: both models as runs, and online models that do not go with the
    compressor."""
    folder = tmp_path_factory.mktemp("cost")
    other_base = folder / "other-base"
    torch.manual_seed(7)
    tiny_base(seed=7, vocab_size=259).save_pretrained(other_base)
    byte_tokenizer().save_pretrained(other_base)
    made = {
        "RUN": compressor,
        "SPARSE": compressor_over(base_folder, blocks, rate=0.3),
        "ONLINE": online,
        "OTHER": online_over(other_base, blocks),
        "DENSE": online_over(base_folder, blocks, max_tail=1, rate=0.6),
    }
    for name, model in made.items():
        model.save_pretrained(folder / name / "model")
        byte_tokenizer().save_pretrained(folder / name / "model")
        (folder / name / "metrics.jsonl").write_text('{"step": 1, "loss": 3.0}\n')
        (folder / name / "recipe.yaml").write_text(
            yaml.safe_dump(
                {"data": {"train": str(texts[0]), "heldout": str(texts[1])}, "sequence_length": 32}
            )
        )
    merged, _ = load_model(folder / "ONLINE")
    merged.save_pretrained(folder / "MERGED")
    words = byte_tokenizer()
    words.add_tokens(["cat"])
    words.save_pretrained(folder / "MERGED")
    online.save_pretrained(folder / "WORDS")
    words.save_pretrained(folder / "WORDS")
    return {name: folder / name for name in (*made, "MERGED", "WORDS")} | {
        "BASE": base_folder,
        "HELD": texts[1],
    }


def test_the_context_is_read_online_and_the_same_tokens_are_predicted(online, ids):
    """Against the cache: the context first, then token by token what follows it."""
    nll, wrote = online_nll(online, 1, ids[:3], CONTEXT, batch=2)
    assert nll.shape == (3, 16) and wrote.shape == (3, CONTEXT)
    for row, row_nll, row_wrote in zip(ids[:3], nll, wrote, strict=True):
        cache = online.new_cache(1)
        with torch.no_grad():
            made = online(input_ids=F.pad(row[None, :CONTEXT], (1, 0), value=1), cache=cache)
            assert (
                torch.equal(made.concept_ids[0, 1:] != NULL, row_wrote)
                and made.concept_ids[0, 0] < NULL
            )
            for token, want in zip(row[CONTEXT:], row_nll, strict=True):
                torch.testing.assert_close(
                    F.cross_entropy(made.logits[:, -1], token[None]), want, atol=1e-4, rtol=1e-4
                )
                made = online(input_ids=token[None, None], cache=cache)


def test_both_stand_at_one_rate_behind_the_same_contexts(
    compressor, online, base_folder, ids, monkeypatch
):
    base, own = load_base(base_folder).eval(), online.dial.rate
    for rate in (0.3, 0.75):
        monkeypatch.setattr(compressor.dial, "rate", rate)
        continued = continuation(compressor, base, ids, CONTEXT)
        ticks: list[int] = []
        found = online_cost(online, compressor.bos, ids, continued, tick=ticks.append)
        assert online.dial.rate == own, "the dial is put back"
        assert sum(ticks) == ids.numel() and found["predicted"] == continued[
            "predicted"
        ] == 16 * len(ids)
        counts = [len(row) for row in compressor.compress(ids[:, :CONTEXT])]
        assert found["target_rate"] == pytest.approx(sum(counts) / len(counts) / CONTEXT) != rate, (
            "what it realised"
        )
        assert found["concept_rate"] == pytest.approx(found["target_rate"], abs=0.06)
        given = {(one["reader"], one["given"]): one for one in found["given"]}
        assert [*given] == [
            ("base", "whole context"),
            ("model", "its codes"),
            ("online", "its concepts"),
            ("base", "nothing"),
        ]
        assert all(one in continued["given"] for key, one in given.items() if key[0] != "online")
        monkeypatch.setattr(online.dial, "rate", found["target_rate"])
        nll, wrote = online_nll(online, compressor.bos, ids, CONTEXT)
        monkeypatch.setattr(online.dial, "rate", own)
        line = given["online", "its concepts"]
        assert line["nll"] == pytest.approx(float(nll.mean()), rel=1e-5) and line[
            "perplexity"
        ] == math.exp(line["nll"])
        assert line["length"] == pytest.approx(2 * float(wrote.sum(1).double().mean())), (
            "two ids a concept, both counted"
        )
        assert found["compression_ratio"] == pytest.approx(CONTEXT / line["length"])
        assert found["delta_nll"] == pytest.approx(line["nll"] - given["model", "its codes"]["nll"])
        whole = float(base_nll(base, compressor.bos, ids, 16).mean())
        assert line["percent_over_whole"] == pytest.approx(
            100 * (math.exp(line["nll"] - whole) - 1), rel=1e-4
        )
        tails = [CONTEXT - 1 - max(row.nonzero().flatten().tolist()) for row in wrote]
        assert found["open_tail"] == pytest.approx(sum(tails) / len(tails))


def test_reconstruct_prints_keeps_and_draws_it(saved, tmp_path):
    words = (
        "reconstruct",
        saved["RUN"],
        "--data",
        saved["HELD"],
        "--tokens",
        160,
        "--json",
        tmp_path / "r.json",
    )
    sememe(*words)
    assert json.loads((tmp_path / "r.json").read_text())["online"] is None
    assert "Online against offline" not in write_report(saved["RUN"]).read_text()
    printed = sememe(*words, "--online", saved["ONLINE"])
    found = json.loads((tmp_path / "r.json").read_text())
    assert json.loads((saved["RUN"] / "reconstruct.json").read_text()) == found
    cost = found["online"]
    assert cost["model"] == str(saved["ONLINE"]) and cost["target_rate"] == pytest.approx(
        found["continuation"]["concept_rate"]
    )
    assert cost["context"] == found["continuation"]["context"] and len(cost["given"]) == 4
    assert "its concepts" in printed
    page = write_report(saved["RUN"]).read_text()
    assert "Online against offline" in page and "its concepts" in page


@pytest.mark.parametrize(
    "words, said",
    [
        (("RUN", "OTHER"), "the base of --online .* has sha256 .*need the same base"),
        (("RUN", "MERGED"), "the base of --online .* names none"),
        (("RUN", "WORDS"), "has another tokenizer than"),
        (("RUN", "RUN"), "is no online model that writes codes"),
        (("RUN", "BASE"), "is no online model that writes codes"),
        (("RUN", "nowhere"), "is no online model that writes codes"),
        (
            ("SPARSE", "DENSE"),
            r"writes 0.3 concepts per token, .* at least 0.5 \(max_tail = 1\): need both at one "
            r"rate",
        ),
    ],
)
def test_models_that_do_not_go_together_are_one_sentence(saved, words, said):
    model, online, *more = (saved.get(word, word) for word in words)
    message = sememe(
        "reconstruct", model, "--data", saved["HELD"], "--online", online, *more, code=1
    )
    assert re.search(said, message), message
    assert "try: " in message and "\n" not in message
