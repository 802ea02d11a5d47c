"""Reconstruct: known scores, every id counted, the same tokens after each context, bad input."""

import json
import lzma
import math
import re
import sys

import pytest
import torch
import torch.nn.functional as F
import yaml
import zstandard
from tokenizers import Tokenizer

from conftest import byte_tokenizer, sememe
from families import compressor_over, online_over, stepwise, tiny_base
from sememe.concepts.writer import NULL
from sememe.data import TextBlocks, heldout_blocks
from sememe.evaluation import reconstruction
from sememe.evaluation.compressor import continuation_blocks
from sememe.evaluation.context import continuation, model_nll, online_gap, online_nll
from sememe.evaluation.reconstruction import base_nll, coding_cost, reconstruct, scores, shuffled
from sememe.evaluation.subject import Options, Subject
from sememe.measure import reconstruct as measure
from sememe.models import CompressorConfig
from sememe.models.loading import load_base, load_model
from sememe.report import write_report

TOKENIZER = byte_tokenizer()
SETTINGS = {"rate": 0.5, "max_tail": 6, "num_concepts": 16, "codes_per_concept": 2, "lora_rank": 4}
CONTEXT = 64


@pytest.fixture(scope="module")
def blocks(texts):
    return heldout_blocks(str(texts[0]), TOKENIZER, 32, 1024).ids_NT


@pytest.fixture(scope="module")
def ids(texts):
    return heldout_blocks(str(texts[1]), TOKENIZER, CONTEXT + 16, 1000).ids_NT


@pytest.fixture(scope="module")
def model(base_folder, blocks):
    return compressor_over(base_folder, blocks, **SETTINGS)


@pytest.fixture(scope="module")
def online(base_folder, blocks):
    return online_over(base_folder, blocks, codes_per_concept=2)


@pytest.fixture(scope="module")
def base(base_folder):
    return load_base(base_folder).eval()


@pytest.fixture(scope="module")
def saved(tmp_path_factory, base_folder, blocks, model, online, texts):
    """Folders by name: runs of both models, and online models that do not go with the
    compressor."""
    folder, words = tmp_path_factory.mktemp("runs"), byte_tokenizer()
    written = json.loads(words.backend_tokenizer.to_str())
    vocab = written["model"]["vocab"]
    vocab["A"], vocab["B"] = vocab["B"], vocab["A"]
    words._tokenizer = Tokenizer.from_str(json.dumps(written))
    other_base = folder / "other-base"
    tiny_base(seed=7, vocab_size=259).save_pretrained(other_base)
    TOKENIZER.save_pretrained(other_base)
    models = {
        "RUN": model,
        "SPARSE": compressor_over(base_folder, blocks, rate=0.3),
        "BINS": compressor_over(base_folder, blocks, content="bins"),
        "ONLINE": online,
        "OTHER": online_over(other_base, blocks),
        "DENSE": online_over(base_folder, blocks, max_tail=1, rate=0.6),
        "WORDS": online,
    }
    data = {"train": str(texts[0]), "heldout": str(texts[1])}
    recipe = yaml.safe_dump({"system": "compressor", "data": data, "sequence_length": 32})
    for name, one in models.items():
        one.save_pretrained(folder / name / "model")
        (words if name == "WORDS" else TOKENIZER).save_pretrained(folder / name / "model")
        (folder / name / "metrics.jsonl").write_text('{"step": 1, "loss": 3.0}\n')
        (folder / name / "recipe.yaml").write_text(recipe)
    load_model(folder / "ONLINE")[0].save_pretrained(folder / "MERGED")
    TOKENIZER.save_pretrained(folder / "MERGED")
    named = {name: folder / name for name in (*models, "MERGED")}
    return named | {"BASE": base_folder, "TRAIN": texts[0], "HELD": texts[1]}


def test_scores_of_known_strings():
    accuracy, rouge_l = reconstruction.token_accuracy, reconstruction.rouge_l
    assert accuracy([[1, 2, 3, 4]], [[1, 2, 9, 4]]) == 0.75
    assert accuracy([[1, 2, 3, 4]], [[1, 2]]) == accuracy([[1, 2]], [[1, 2, 3, 4]]) == 0.5
    assert accuracy([[1, 2, 3, 4]], [[2, 3, 4]]) == 0, "all after one that was left out"
    assert accuracy([[1, 2], [3, 4, 5, 6]], [[1, 2], []]) == pytest.approx(2 / 6)
    # Lin 2004, section 2.
    assert rouge_l("police killed the gunman", "police kill the gunman") == 0.75
    assert rouge_l("police killed the gunman", "The gunman kill police!") == 0.5
    assert rouge_l("", "") == 1 and rouge_l("...", "word") == 0
    assert rouge_l("снег идёт", "снег") == pytest.approx(2 / 3)
    ids = TOKENIZER(["the cat sat on the mat today", "a dog"]).input_ids
    best = {"token_accuracy": 1, "exact_match": 1, "bleu": 100, "chrf": 100, "rouge_l": 1}
    assert scores(ids, ids, TOKENIZER) == pytest.approx(best | {"length_ratio": 1})
    # "the cat sat on the mat": 8 words of 9, all n-grams right.
    half = scores(ids, [ids[0][:22], ids[1]], TOKENIZER)
    assert half["bleu"] == pytest.approx(100 * math.exp(1 - 9 / 8)) and half["exact_match"] == 0.5
    assert half["rouge_l"] == pytest.approx((12 / 13 + 1) / 2) and half["chrf"] < 100
    assert half["length_ratio"] == 27 / 33


def test_every_id_counts_and_shuffling_keeps_ids_and_lengths():
    # 3 concepts of 2 digits of 4 bits: (0, 0) (1, 1) (5, 0).
    config = CompressorConfig(num_concepts=16, codes_per_concept=2)
    cost = coding_cost([[0, 17], [5]], 12, config)
    assert cost["concept_rate"] == 3 / 12 and cost["ids_per_token"] == 6 / 12
    assert cost["compression_ratio"] == 2 and cost["bits_per_token"] == 6 * 4 / 12
    used = [math.log2(3), math.log2(3) - 2 / 3]  # digits 0 1 5, and 0 1 0
    assert cost["code_perplexity_by_stage"] == pytest.approx([2**bits for bits in used])
    assert cost["bits_per_token_used"] == pytest.approx(3 * sum(used) / 12)
    assert coding_cost([[], []], 12, config)["bits_per_token_used"] == 0
    lists = [[1, 2, 3], [], [4], [5, 6, 7, 8]]
    mixed = shuffled(lists)
    assert [len(x) for x in mixed] == [3, 0, 1, 4] and mixed != lists and mixed == shuffled(lists)
    assert sorted(i for ids in mixed for i in ids) == [*range(1, 9)]


def test_figures_are_those_of_the_models_own_calls(model, blocks):
    ids = blocks[:3, :16]
    figures, concepts, rebuilt = reconstruct(model, TOKENIZER, ids)
    assert concepts == model.compress(ids) and rebuilt == model.decompress(concepts)
    nll = float(F.cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()))
    bits = 8 * sum(map(len, concepts)) / ids.numel()
    own = {"nll": nll, "bits_per_token": bits, "bits_per_token_lossless": bits + nll / math.log(2)}
    own |= scores(ids.tolist(), rebuilt, TOKENIZER) | coding_cost(concepts, 48, model.config)
    for key, want in own.items():
        assert figures[key] == pytest.approx(want, rel=1e-5), key
    mixed = scores(ids.tolist(), model.decompress(shuffled(concepts)), TOKENIZER)
    whole = reconstruction.reconstruction_figures(model, TOKENIZER, ids)
    assert whole["shuffled"].items() >= mixed.items()


def test_lossless_costs(model, base, blocks, monkeypatch):
    ids, text = blocks[:5], b"the cat sat on the mat and saw the dog. " * 50
    nll = base_nll(base, model.bos, ids)
    logits = base(F.pad(ids, (1, 0), value=model.bos)).logits[:, :-1]
    want = F.cross_entropy(logits.flatten(0, 1), ids.flatten(), reduction="none").view(5, 32)
    torch.testing.assert_close(nll, want.detach(), atol=1e-5, rtol=1e-5)
    assert reconstruction.xz(text) < len(lzma.compress(text)) - 40
    assert reconstruction.zstd(text) < len(zstandard.ZstdCompressor(level=22).compress(text))
    some = TextBlocks(ids, torch.ones_like(ids), b"ab" * 80)
    lines = reconstruction.lossless(base, model.bos, some)
    assert [line["name"] for line in lines] == ["base", "zstd", "zstd", "xz", "xz"]
    assert lines[0]["bits_per_token"] == pytest.approx(float(nll.mean()) / math.log(2))
    assert lines[1]["bits_per_token"] == 8 * reconstruction.zstd(b"ab" * 80) / ids.numel()
    monkeypatch.setitem(sys.modules, "zstandard", None)
    assert {line["token_accuracy"] for line in lines} == {1.0}
    line = reconstruction.lossless(base, model.bos, some)[1]
    assert line["bits_per_token"] is None and "pip install" in line["fault"]


def test_continuation_predicts_the_same_tokens_from_each_context(model, base, ids, monkeypatch):
    ids = ids[:5, :24]
    read, following = ids[:, :16], ids[:, 16:]
    monkeypatch.setattr(model.dial, "rate", 0.25)  # of the 16 tokens about half as many ids
    figures = continuation(model, base, ids, 16)
    given = {(line["reader"], line["given"]): line for line in figures["given"]}
    assert figures["predicted"] == 8 * len(ids) and len(given) == 8
    concepts = model.compress(read)
    logits = model.continuation_logits(model.encode(read), following)
    rows = [torch.tensor(row[-16:]) for row in model.decompress(concepts)]
    rows = [torch.cat(pair)[None] for pair in zip(rows, following, strict=True)]
    rewritten = [base_nll(base, model.bos, row)[:, -8:] for row in rows]
    nll = {
        ("base", "whole context"): base_nll(base, model.bos, ids)[:, 16:],
        ("base", "the decompressed text"): torch.cat(rewritten),
        ("model", "its codes"): F.cross_entropy(logits.flatten(0, 1), following.flatten()),
        ("model", "nothing"): model_nll(model, following, 0, "nothing")[0],
    }
    for key, want in nll.items():
        assert given[key]["nll"] == pytest.approx(float(want.mean()), rel=1e-5), key
    assert len({line["nll"] for line in figures["given"]}) == 8
    assert given["base", "whole context"]["percent_over_whole"] == 0
    counts = torch.tensor([2.0 * len(row) for row in concepts])
    ids_read = float(counts.clamp(max=16).mean())
    assert given["base", "its last tokens"]["length"] == pytest.approx(ids_read) and ids_read < 14
    assert given["model", "its codes"]["length"] == pytest.approx(float(counts.mean()))


@pytest.mark.parametrize("letters, want", [(1000, (7, 128)), (100, (1, 64)), (3, (1, 2))])
def test_the_longest_context_that_fits(saved, tmp_path, letters, want):
    """128 + 128 tokens are more than its positions."""
    (tmp_path / "a.txt").write_text("a" * letters)
    subject = Subject.load(str(saved["RUN"]), Options(tokens=1000))
    ids, context = continuation_blocks(subject, str(tmp_path / "a.txt"))
    assert ids.shape == want and context == want[1] // 2


@torch.no_grad()
def test_the_context_is_read_online_and_the_same_tokens_are_predicted(online, ids):
    """Against the cache: the context first, then token by token what follows it."""
    nll, wrote = online_nll(online, 1, ids[:3], CONTEXT, online.dial.rate)
    assert nll.shape == (3, 16) and wrote.shape == (3, CONTEXT)
    with_bos = F.pad(ids[:3], (1, 0), value=1)
    logits, written, _ = stepwise(online, with_bos, [CONTEXT + 1, *range(CONTEXT + 2, 81)])
    assert torch.equal(written[:, 1 : CONTEXT + 1] != NULL, wrote)
    want = F.cross_entropy(logits[:, CONTEXT:].mT, ids[:3, CONTEXT:], reduction="none")
    torch.testing.assert_close(nll, want, atol=1e-4, rtol=1e-4)


def test_both_are_at_one_rate_after_the_same_contexts(model, online, base, ids):
    own = online.dial.rate
    continued = continuation(model, base, ids, CONTEXT)
    gap = online_gap(online, model.bos, ids, continued)
    assert online.dial.rate == own, "the own rate is put back"
    count = sum(map(len, model.compress(ids[:, :CONTEXT]))) / len(ids)
    assert gap["target_rate"] == pytest.approx(count / CONTEXT)
    assert gap["concept_rate"] == pytest.approx(gap["target_rate"], abs=0.06)
    whole, codes, line, nothing = gap["given"]
    assert all(row in continued["given"] for row in (whole, codes, nothing))
    assert line["reader"] == "online" and gap["predicted"] == continued["predicted"]
    assert gap["compression_ratio"] == pytest.approx(CONTEXT / line["length"])
    assert gap["delta_nll"] == pytest.approx(line["nll"] - codes["nll"])
    _, wrote = online_nll(online, model.bos, ids, CONTEXT, gap["target_rate"])
    tails = [CONTEXT - 1 - max(row.nonzero()[:, 0].tolist()) for row in wrote]
    assert gap["open_tail"] == pytest.approx(sum(tails) / len(tails))


def test_reconstruct_prints_keeps_and_is_drawn(saved, tmp_path):
    run, to = saved["RUN"], tmp_path / "r.json"
    words = ("--tokens", 160, "--rate", "0.25,0.5", "--json", to, "--online", saved["ONLINE"])
    words += ("--bins", saved["BINS"])
    printed = sememe("reconstruct", run, "--data", saved["HELD"], *words)
    figures = json.loads(to.read_text())
    assert json.loads((run / "reconstruct.json").read_text()) == figures
    assert figures["windows"] == 5 and figures["window"] == 32
    assert [row["target_rate"] for row in figures["curve"]] == [0.25, 0.5]
    assert figures.items() >= figures["curve"][1].items()
    assert figures["shuffled"]["nll"] != figures["nll"]
    assert figures["continuation"]["context"] == 64 == figures["online"]["context"]
    assert figures["continuation"]["trained_context"] is None
    assert len(figures["samples"]) == 3 and figures["samples"][0]["concept_ids"]
    for word in ("token_accuracy", "curve", "zstd", "its concepts"):
        assert word in printed, word
    assert "Online against offline" in write_report(run).read_text()
    row = figures["coders"][-1]
    ids = heldout_blocks(str(saved["HELD"]), TOKENIZER, 32, 160).ids_NT
    bins, _ = load_model(saved["BINS"])
    assert row["name"] == "bins" and row["bits_per_token"] == pytest.approx(4, abs=0.3)
    back = bins.decompress(bins.compress(ids))
    assert row["token_accuracy"] == reconstruction.token_accuracy(ids.tolist(), back)
    plain = measure(str(run / "model"), str(saved["HELD"]), Options(tokens=64))
    assert plain["windows"] == 2 and plain["curve"] == [] and plain["online"] is None
    assert json.loads((run / "reconstruct.json").read_text()) == figures, "only a run keeps figures"


@pytest.mark.parametrize(
    "words, message",
    [
        ("BASE --data HELD", "cannot write a text again from codes"),
        ("ONLINE --data HELD", "need a finished run of system: compressor"),
        ("RUN --data TRAIN", "is what .* was trained on"),
        ("RUN --data MISSING", "does not exist"),
        ("RUN --data ONE", "make a single block or pair: need at least two"),
        ("RUN --data HELD --rate 0.5,half", "need numbers with commas"),
        ("RUN --data HELD --rate 0.5,0.1", "max_tail = 6"),
        ("RUN --data HELD --online OTHER", "need the same base for both"),
        ("RUN --data HELD --online MERGED", "need the same base for both"),
        ("RUN --data HELD --online WORDS", "has another tokenizer than"),
        ("RUN --data HELD --online RUN", "is no online model that writes codes"),
        ("RUN --data HELD --bins SPARSE", "has no codes of bins"),
        ("SPARSE --data HELD --online DENSE", "rate = 0.3: need from 0.5 to 1"),
    ],
)
def test_bad_input_is_one_sentence(saved, tmp_path, words, message):
    (tmp_path / "ONE.txt").write_text("the cat sat on a mat " * 2)
    known = saved | {name: tmp_path / f"{name}.txt" for name in ("ONE", "MISSING")}
    before = {path: path.read_text() for path in saved["RUN"].glob("*.json")}
    printed = sememe("reconstruct", *(known.get(word, word) for word in words.split()), code=1)
    assert re.search(message, printed), printed
    assert "try: " in printed and "\n" not in printed
    assert {path: path.read_text() for path in saved["RUN"].glob("*.json")} == before
