"""Reconstruct: scores against hand-made pairs, every id counted, shuffling destroys, one line a
rate, errors are one sentence."""

import json
import math
import re
import sys

import pytest
import torch
import torch.nn.functional as F
import yaml

from conftest import byte_tokenizer, sememe
from families import move, online_over
from sememe.backbone.adapters import without_lora
from sememe.concepts.dial import Dial
from sememe.data import text_blocks, token_blocks
from sememe.errors import DataError
from sememe.evaluation import baselines, reconstruction
from sememe.evaluation.coding import price, shuffled, written_again
from sememe.evaluation.continuation import PASSES, continuation, model_nll
from sememe.evaluation.questions import answer, model_answer, overlap, read_questions
from sememe.evaluation.reconstruction import (
    continuation_blocks,
    curve,
    reconstruct,
    reconstruct_files,
)
from sememe.evaluation.scores import exact_match, rouge_l, scores, token_accuracy
from sememe.models import CompressorConfig, CompressorForCausalLM
from sememe.models.loading import load_base
from sememe.report import write_report

SETTINGS = {"rate": 0.5, "max_tail": 6, "num_concepts": 16, "codes_per_concept": 2, "lora_rank": 4}


def compressor_over(folder, ids_NT, **changes) -> CompressorForCausalLM:
    """A compressor over a saved base, with nothing that stays 0."""
    torch.manual_seed(0)
    model = CompressorForCausalLM.from_base(
        CompressorConfig(base=str(folder), **{**SETTINGS, **changes})
    )
    move(model, torch.Generator().manual_seed(0))
    model.start_frame(ids_NT)
    model.start_codes(ids_NT)
    return model.eval()


@pytest.fixture(scope="module")
def blocks(texts):
    return token_blocks([texts[0].read_text()], byte_tokenizer(), 32, limit=1024)


@pytest.fixture(scope="module")
def model(base_folder, blocks):
    return compressor_over(base_folder, blocks)


@pytest.fixture(scope="module")
def run(tmp_path_factory, model, texts):
    """A run folder as `train` leaves it, without the training."""
    folder = tmp_path_factory.mktemp("runs") / "r"
    model.save_pretrained(folder / "model")
    byte_tokenizer().save_pretrained(folder / "model")
    (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 3.0}\n')
    (folder / "recipe.yaml").write_text(
        yaml.safe_dump(
            {"data": {"train": str(texts[0]), "heldout": str(texts[1])}, "sequence_length": 32}
        )
    )
    return folder


class Perfect:
    """Stands for a model whose ids are the tokens themselves, and that reads them all."""

    device = torch.device("cpu")

    def __init__(self, lose: int = 0):
        self.config = CompressorConfig(num_concepts=512, rate=1.0)
        self.dial = Dial(rate=1.0)
        self.lose = lose

    def compress(self, ids_BT):
        return ids_BT.tolist()

    def decompress(self, concepts):
        return [ids[self.lose :] for ids in concepts]

    def __call__(self, input_ids, **kwargs):
        logits = 100.0 * F.one_hot(input_ids.roll(-1, 1), 512).float()
        return type("Out", (), {"logits": logits, "concept_ids": None})()


# ---- scores ----


def test_places_that_are_missing_or_too_many_are_wrong():
    assert token_accuracy([[1, 2, 3, 4]], [[1, 2, 9, 4]]) == 0.75
    assert token_accuracy([[1, 2, 3, 4]], [[1, 2]]) == 0.5, "missing ones"
    assert token_accuracy([[1, 2]], [[1, 2, 3, 4]]) == 0.5, "ones too many"
    assert token_accuracy([[1, 2, 3, 4]], [[2, 3, 4]]) == 0, "all behind one that was left out"
    assert token_accuracy([[1, 2], [3, 4, 5, 6]], [[1, 2], []]) == pytest.approx(2 / 6), (
        "over all places, not over windows"
    )
    assert token_accuracy([], []) == token_accuracy([[1]], [[]]) == 0
    assert exact_match([[1, 2], [3]], [(1, 2), [3, 4]]) == 0.5


def test_longest_common_subsequence():
    assert (
        rouge_l("police killed the gunman", "police kill the gunman") == 0.75
    )  # Lin 2004, section 2
    assert rouge_l("police killed the gunman", "The gunman kill police!") == 0.5
    assert rouge_l("one two three", "one") == 0.5, "2 · 1 / (3 + 1)"
    assert (
        rouge_l("", "") == 1
        and rouge_l("...", "word") == 0
        and rouge_l("снег идёт", "снег") == pytest.approx(2 / 3)
    )


def test_scores_of_known_strings():
    tokenizer = byte_tokenizer()
    ids = tokenizer(["the cat sat on the mat today", "a dog"], add_special_tokens=False)[
        "input_ids"
    ]
    whole = scores(ids, ids, tokenizer)
    assert (
        whole["token_accuracy"]
        == whole["exact_match"]
        == whole["rouge_l"]
        == whole["length_ratio"]
        == 1
    )
    assert whole["bleu"] == pytest.approx(100) and whole["chrf"] == pytest.approx(100)
    half = scores(
        ids, [ids[0][:22], ids[1]], tokenizer
    )  # "the cat sat on the mat": 8 words of 9, all n-grams right
    assert half["bleu"] == pytest.approx(100 * math.exp(1 - 9 / 8)) and half["exact_match"] == 0.5
    assert half["rouge_l"] == pytest.approx((12 / 13 + 1) / 2) and half["chrf"] < 100
    nothing = scores(ids, [[], []], tokenizer)
    assert not any(value for key, value in nothing.items() if key != "bleu") and nothing["bleu"] < 1


def test_every_id_counts():
    found = price([[0, 17], [5]], 12, 16, 2)  # 3 concepts of 2 digits of 4 bits: (0,0) (1,1) (5,0)
    assert (
        found["concept_rate"] == 0.25
        and found["ids_per_token"] == 0.5
        and found["compression_ratio"] == 2
    )
    assert (
        found["bits_per_token"] == 2
        and price([[0, 17], [5]], 12, 512, 1)["bits_per_token"] == 3 * 9 / 12
    )
    used = math.log2(3) + (math.log2(3) - 2 / 3)  # digits 0 1 5, and 0 1 0
    assert found["bits_per_concept"] == pytest.approx(used) and found[
        "bits_per_token_used"
    ] == pytest.approx(3 * used / 12)
    assert price([[], []], 12, 16, 2)["bits_per_token_used"] == 0


def test_shuffling_keeps_ids_and_lengths():
    lists = [[1, 2, 3], [], [4], [5, 6, 7, 8]]
    mixed = shuffled(lists)
    assert [len(x) for x in mixed] == [3, 0, 1, 4] and mixed != lists and mixed == shuffled(lists)
    assert (
        sorted(i for ids in mixed for i in ids) == [*range(1, 9)]
        and shuffled(lists, seed=1) != mixed
    )


# ---- models ----


def test_a_perfect_model_gives_everything_back_and_shuffling_destroys_it(blocks):
    ticks: list[int] = []
    found, concepts, rebuilt = reconstruct(
        Perfect(), byte_tokenizer(), blocks[:6], batch=4, tick=ticks.append
    )
    assert found["token_accuracy"] == found["exact_match"] == 1 and found["bleu"] == pytest.approx(
        100
    )
    assert (
        found["nll"] == pytest.approx(0, abs=1e-6)
        and found["compression_ratio"] == 1
        and found["bits_per_token"] == 9
    )
    assert rebuilt == blocks[:6].tolist() and sum(ticks) == 2 * blocks[:6].numel()
    mixed = scores(blocks[:6].tolist(), Perfect().decompress(shuffled(concepts)), byte_tokenizer())
    assert mixed["token_accuracy"] < 0.3 and mixed["exact_match"] == 0 and mixed["bleu"] < 20
    late = reconstruct(Perfect(lose=1), byte_tokenizer(), blocks[:6])[0]
    assert late["token_accuracy"] < 0.3 < 0.9 < late["rouge_l"] and late["length_ratio"] == 31 / 32


def test_figures_are_those_of_the_models_own_calls(model, blocks):
    ids = blocks[:3, :16]
    found, concepts, rebuilt = reconstruct(model, byte_tokenizer(), ids, batch=2)
    assert concepts == model.compress(ids) and rebuilt == model.decompress(concepts), (
        "batches change nothing"
    )
    nll = F.cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert found["nll"] == pytest.approx(float(nll), rel=1e-5)
    count = sum(map(len, concepts))
    assert (
        found["compression_ratio"] == ids.numel() / (2 * count)
        and found["bits_per_token"] == 8 * count / ids.numel()
    )
    assert found["bits_per_token_lossless"] == pytest.approx(
        found["bits_per_token"] + float(nll) / math.log(2), rel=1e-5
    )
    assert found["bits_per_token_used"] < found["bits_per_token"]


def test_the_curve_has_one_line_a_rate_and_the_dial_is_put_back(model, blocks):
    own = reconstruct(model, byte_tokenizer(), blocks[:3, :16])[0]
    rows = curve(model, byte_tokenizer(), blocks[:3, :16], own, [1.0, 0.25, 0.5, 0.25])
    assert (
        [row["target_rate"] for row in rows] == [0.25, 0.5, 1.0]
        and rows[1] is own
        and model.dial.rate == 0.5
    )
    costs = [row["bits_per_token"] for row in rows]
    assert costs == sorted(costs) and costs[-1] == 8 and rows[0]["compression_ratio"] > 1.5


# ---- baselines ----


def test_the_base_costs_its_nll_of_every_token(model, base_folder, blocks, texts):
    base = load_base(base_folder).eval()
    found = baselines.base_nll(base, model.bos, blocks[:5], batch=2)
    opened = F.pad(blocks[:5], (1, 0), value=model.bos)
    want = F.cross_entropy(
        base(opened).logits[:, :-1].flatten(0, 1), blocks[:5].flatten(), reduction="none"
    ).view(5, 32)
    torch.testing.assert_close(found, want.detach(), atol=1e-5, rtol=1e-5)
    last = baselines.base_nll(base, model.bos, blocks[:5], last=7)
    torch.testing.assert_close(last, want[:, -7:].detach(), atol=1e-5, rtol=1e-5)
    with without_lora(model.backbone):
        torch.testing.assert_close(
            baselines.base_nll(model.backbone, model.bos, blocks[:5]), found, atol=1e-5, rtol=1e-5
        )
    first = baselines.lossless(
        base, model.bos, text_blocks([texts[0].read_text()], byte_tokenizer(), 32, limit=160)
    )[0]
    assert first["name"] == "base" and first["bits_per_token"] == pytest.approx(
        float(want.mean()) / math.log(2), rel=1e-5
    )


def test_zstd_and_xz_have_no_container():
    import lzma

    import zstandard

    data = b"the cat sat on the mat and saw the dog. " * 50
    assert baselines.xz(data) < len(lzma.compress(data)) - 40
    assert baselines.zstd(data) < len(zstandard.ZstdCompressor(level=22).compress(data))
    lines = baselines.classical(b"ab" * 100, [b"ab" * 50] * 2, 100)
    each = ("whole text", "each window")
    assert [(one["name"], one["of"]) for one in lines] == [
        (name, of) for name in ("zstd", "xz") for of in each
    ]
    assert lines[0]["bits_per_token"] == 8 * baselines.zstd(b"ab" * 100) / 100
    assert lines[3]["bits_per_token"] == 16 * baselines.xz(b"ab" * 50) / 100
    assert all(one["bits_per_token"] > 0 and one["fault"] is None for one in lines)


def test_without_zstandard_the_line_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "zstandard", None)
    lines = baselines.classical(b"abc", [b"abc"], 3)
    assert [one["bits_per_token"] is None for one in lines] == [True, True, False, False]
    assert "pip install" in lines[0]["fault"]


# ---- continuation ----


def test_a_text_is_written_again_window_by_window(model, texts):
    ids = token_blocks([texts[1].read_text()], byte_tokenizer(), 24, limit=72)
    want = [
        [x for part in row.split(10) for x in model.decompress(model.compress(part[None]))[0]]
        for row in ids
    ]
    assert written_again(model, ids, 10, batch=2) == want != written_again(model, ids)
    assert (
        written_again(model, ids, 100)
        == written_again(model, ids)
        == model.decompress(model.compress(ids))
    )


def test_continuation_predicts_the_same_tokens_from_each_context(
    model, base_folder, texts, monkeypatch
):
    monkeypatch.setattr(model.dial, "rate", 0.25)  # of the 16 tokens about half as many ids
    base = load_base(base_folder).eval()
    ids, ticks = token_blocks([texts[1].read_text()], byte_tokenizer(), 24, limit=120), []
    found = continuation(model, base, ids, 16, batch=2, tick=ticks.append)
    assert (
        sum(ticks) == PASSES * ids.numel()
        and found["predicted"] == 8 * len(ids) == 8 * found["blocks"]
    )
    given = {(one["reader"], one["given"]): one for one in found["given"]}
    assert len(given) == len(found["given"]) == 8 and all(
        one["perplexity"] == pytest.approx(math.exp(one["nll"])) for one in found["given"]
    )
    whole, truncated = given["base", "whole context"], given["base", "its last tokens"]
    assert whole["percent_over_whole"] == 0 and whole["length"] == 16
    assert whole["nll"] == pytest.approx(
        float(baselines.base_nll(base, model.bos, ids, 8).mean()), rel=1e-5
    )
    counts = [len(row) for row in model.compress(ids[:, :16])]
    ids_read = sum(min(16, 2 * n) for n in counts) / len(counts)
    assert truncated["length"] == pytest.approx(ids_read) and ids_read < 14
    assert given["model", "its codes"]["length"] == 2 * sum(counts) / len(counts)
    assert found["compression_ratio"] == pytest.approx(16 / given["model", "its codes"]["length"])
    row, kept = ids[:1], min(16, 2 * counts[0])
    alone = baselines.base_nll(base, model.bos, row[:, 16 - kept :], 8)
    assert continuation(model, base, row, 16)["given"][1]["nll"] == pytest.approx(
        float(alone.mean()), rel=1e-5
    )
    made = model.continuation_logits(model.encode(ids[:, :16]), ids[:, 16:])
    want = F.cross_entropy(made.flatten(0, 1), ids[:, 16:].flatten())
    assert given["model", "its codes"]["nll"] == pytest.approx(float(want), rel=1e-5)
    back = [torch.tensor(row[-16:]) for row in model.decompress(model.compress(ids[:, :16]))]
    read = [
        baselines.base_nll(base, model.bos, torch.cat([text, row[16:]])[None], 8)
        for text, row in zip(back, ids, strict=True)
    ]
    assert given["base", "the decompressed text"]["nll"] == pytest.approx(
        float(torch.cat(read).mean()), rel=1e-5
    )
    assert (
        given["model", "codes shuffled"]["nll"]
        != given["model", "its codes"]["nll"]
        != given["model", "nothing"]["nll"]
    )
    none = model_nll(model, ids[:, 16:], 0, "nothing")[0]
    assert float(none.mean()) == pytest.approx(given["model", "nothing"]["nll"], rel=1e-5)


def test_the_longest_context_that_fits(texts):
    tokenizer, held = byte_tokenizer(), [texts[1].read_text()]
    ids, context = continuation_blocks(held, tokenizer, 1000, None, 2048)
    assert context == 512 and ids.shape == (1, 640)
    assert continuation_blocks(held, tokenizer, 2000, None, 200)[1] == 64, (
        "128 + 128 are more than its places"
    )
    assert continuation_blocks(["a" * 100], tokenizer, 2000, None, 2048)[0].shape == (1, 64)
    assert continuation_blocks(held, tokenizer, 64, 20, 2048)[0].shape == (1, 40)
    assert (
        continuation_blocks(held, tokenizer, 64, 0, 2048)
        is continuation_blocks(["abc"], tokenizer, 64, None, 2048)
        is None
    )
    for text, longest in ((["a" * 100], 2048), (held, 200)):
        with pytest.raises(
            DataError, match="context = 300 and the 128 tokens behind it do not fit"
        ):
            continuation_blocks(text, tokenizer, 64, 300, longest)


# ---- the command ----


def test_reconstruct_prints_keeps_and_is_drawn(run, texts, tmp_path):
    printed = sememe(
        "reconstruct",
        run,
        "--data",
        texts[1],
        "--tokens",
        128,
        "--rate",
        "0.25,0.5",
        "--json",
        tmp_path / "r.json",
    )
    found = json.loads((tmp_path / "r.json").read_text())
    assert json.loads((run / "reconstruct.json").read_text()) == found
    assert (
        found["windows"] == 4
        and found["window"] == 32
        and [one["target_rate"] for one in found["curve"]] == [0.25, 0.5]
    )
    assert {key: found[key] for key in found["curve"][1]} == found["curve"][1]
    assert found["shuffled"]["nll"] != found["nll"] and set(found["shuffled"]) < set(found)
    assert (
        found["continuation"]["context"] == 64 and found["continuation"]["trained_context"] is None
    )
    assert (
        len(found["samples"]) == 3
        and found["samples"][0]["text"]
        and found["samples"][0]["concept_ids"]
    )
    for word in (
        "token_accuracy",
        "shuffled",
        "curve",
        "zstd",
        "its last tokens",
    ):
        assert word in printed, word
    page = write_report(run).read_text()
    assert (
        "What comes back" in page
        and "never trained to go on" in page
        and "lossless bound: the base" in page
    )
    plain = reconstruct_files(str(run / "model"), str(texts[1]), tokens=32, window=8, context=0)
    assert (
        plain["windows"] == 4
        and plain["window"] == 8
        and plain["curve"] == []
        and plain["continuation"] is None
    )
    assert json.loads((run / "reconstruct.json").read_text()) == found, (
        "only the run folder itself keeps figures"
    )


def test_a_model_trained_to_go_on_says_with_what(model, run, texts, monkeypatch):
    real = reconstruction.load_model

    def load(*args, **kwargs):
        loaded, tokenizer = real(*args, **kwargs)
        loaded.config.continuation_share = 0.5
        return loaded, tokenizer

    monkeypatch.setattr(reconstruction, "load_model", load)
    monkeypatch.setattr(reconstruction, "keep", lambda *x: None)
    found = reconstruct_files(str(run), str(texts[1]), tokens=16, window=8, context=16)[
        "continuation"
    ]
    assert found["continuation_share"] == 0.5 and found["trained_context"] == 16 == found["context"]


@pytest.mark.parametrize("junk", [None, "text", {}, math.nan, [None, {}], 10**400, 0, -1])
def test_unexpected_values_leave_a_page(tmp_path, junk):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 3.0}\n')
    keys = (
        "curve",
        "shuffled",
        "lossless",
        "continuation",
        "online",
        "questions",
        "samples",
        "bits_per_token",
        "nll",
    )
    (tmp_path / "reconstruct.json").write_text(
        json.dumps({"token_accuracy": 0.5} | dict.fromkeys(keys, junk))
    )
    assert "What comes back" in write_report(tmp_path).read_text()
    one = dict.fromkeys(
        ("target_rate", "bits_per_token", "bits_per_token_used", "token_accuracy", "name", "of"),
        junk,
    )
    good = {"target_rate": 0.5, "bits_per_token": 3.0, "token_accuracy": 0.5}
    (tmp_path / "reconstruct.json").write_text(
        json.dumps(
            good
            | {
                "curve": [one, good],
                "lossless": [one],
                "samples": [one],
                "shuffled": one,
                "continuation": {"given": [one]},
                "questions": {"given": [one]},
            }
        )
    )
    assert "What comes back" in write_report(tmp_path).read_text()
    (tmp_path / "reconstruct.json").write_text(json.dumps({"token_accuracy": None}))
    assert "What comes back" not in write_report(tmp_path).read_text()


@pytest.mark.parametrize(
    "words, said",
    [
        (("BASE", "--data", "HELD"), "cannot write a text again from codes"),
        (("ONLINE", "--data", "HELD"), "need a finished run of system: compressor"),
        (("RUN", "--data", "TRAIN"), "is what .* was trained on"),
        (("RUN", "--data", "EMPTY"), "is empty"),
        (("RUN", "--data", "MISSING"), "does not exist"),
        (("RUN", "--data", "SHORT"), "has 14 tokens: need at least 32"),
        (("RUN", "--data", "ONE"), "make one window of 32 tokens: need at least two"),
        (("RUN", "--data", "HELD", "--rate", "0.5,half"), "need numbers with commas"),
        (("RUN", "--data", "HELD", "--rate", "0.5,0.1"), "max_tail = 6"),
        (("RUN", "--data", "HELD", "--rate", "nan"), "rate = nan"),
    ],
)
def test_bad_input_is_one_sentence(run, base_folder, blocks, texts, tmp_path, words, said):
    for name, written in (
        ("EMPTY", " \n"),
        ("SHORT", "the cat sat on"),
        ("ONE", "the cat sat on a mat " * 2),
    ):
        (tmp_path / f"{name}.txt").write_text(written)
    known = {
        "RUN": run,
        "BASE": base_folder,
        "TRAIN": texts[0],
        "HELD": texts[1],
        "ONLINE": tmp_path / "online",
    }
    known |= {name: tmp_path / f"{name}.txt" for name in ("EMPTY", "SHORT", "ONE", "MISSING")}
    if "ONLINE" in words:
        online_over(base_folder, blocks).save_pretrained(tmp_path / "online")
        byte_tokenizer().save_pretrained(tmp_path / "online")
    kept = {path: path.read_text() for path in run.glob("*.json")}
    message = sememe("reconstruct", *(known.get(word, word) for word in words), code=1)
    assert re.search(said, message), message
    assert "try: " in message and "\n" not in message
    assert {path: path.read_text() for path in run.glob("*.json")} == kept


# ---- questions ----


def test_answers_are_compared_as_squad_does():
    assert overlap("The Eiffel Tower!", ["eiffel tower"]) == (1, 1) and overlap(
        "tower", ["a", "the tower"]
    ) == (1, 1)
    assert overlap("the big red dog", ["red dog", "cat"]) == (0, pytest.approx(0.8)), (
        "2 of 3 and 2 of 2"
    )
    assert overlap("dog dog", ["dog"]) == (0, pytest.approx(2 / 3)) and overlap("", ["dog"]) == (
        0,
        0,
    )


def ask(
    context="the cat sat on a mat and saw the dog", question="who sat?", answers=("the cat",)
) -> str:
    return json.dumps({"context": context, "question": question, "answers": list(answers)})


def test_questions_are_asked_of_each_context(model, base_folder, run, texts, tmp_path, monkeypatch):
    monkeypatch.setattr(model.dial, "rate", 0.25)
    (tmp_path / "q.jsonl").write_text(
        f"{ask()}\n\n{ask('the cat ' * 40)}\n{ask(answers=['a dog', 'the cat'])}\n"
    )
    asked = read_questions(tmp_path / "q.jsonl")
    assert len(asked) == 3 and asked[2].answers == ("a dog", "the cat")
    base, tokenizer = load_base(base_folder).eval(), byte_tokenizer()
    found = answer(model, base, tokenizer, asked)
    assert found["questions"] == 2 and found["skipped"] == 1, "320 bytes do not fit 256 places"
    given = {(one["reader"], one["given"]): one for one in found["given"]}
    context = tokenizer(asked[0].context, add_special_tokens=False)["input_ids"]
    ids = 2 * len(model.compress(torch.tensor([context]))[0])
    assert given["base", "whole context"]["length"] == len(context) == 36
    assert (
        given["model", "its codes"]["length"]
        == ids
        == given["base", "its last tokens"]["length"]
        < 36
    )
    words, gold = (
        tokenizer(x, add_special_tokens=False)["input_ids"]
        for x in ("\nQuestion: who sat?\nAnswer:", " the cat")
    )
    alone = answer(model, base, tokenizer, asked[:1])["given"][0]["answer_nll"]
    want = base(torch.tensor([[model.bos, *context, *words, *gold]])).logits[0, -len(gold) - 1 : -1]
    assert alone == pytest.approx(float(F.cross_entropy(want, torch.tensor(gold))), rel=1e-5)
    assert len({one["answer_nll"] for one in found["given"]}) == 6
    with pytest.raises(DataError, match="no context of 1 questions fits the 256 places"):
        answer(model, base, tokenizer, asked[1:2])
    printed = sememe(
        "reconstruct",
        run / "model",
        "--data",
        texts[1],
        "--tokens",
        510,
        "--questions",
        tmp_path / "q.jsonl",
    )
    assert "skipped" in printed and "answer_nll" in printed


def test_a_model_that_knows_the_answer_is_right(model, monkeypatch):
    tokenizer = byte_tokenizer()
    said = tokenizer(" The cat.\nand more", add_special_tokens=False)["input_ids"]
    words = [5, 6, 7]

    def knows(made, ids_BT):
        return F.one_hot(torch.tensor([[*words, *said, 0, 0]])[:, : ids_BT.shape[1]], 259).float()

    monkeypatch.setattr(model, "continuation_logits", knows)
    assert model_answer(model, tokenizer, None, words) == "The cat."
    assert overlap("The cat.", ["cat"]) == (1, 1)


@pytest.mark.parametrize(
    "line",
    [
        "",
        "{",
        "7",
        '{"context": "a"}',
        ask(answers=[]),
        ask(context=""),
        ask(answers=[7]),
        ask()[:-1],
        '{"context": "a", "question": "b", "answers": "c"}',
    ],
)
def test_what_is_no_question_is_one_sentence(run, texts, tmp_path, line):
    (tmp_path / "q.jsonl").write_text(f"{ask()}\n{line}\n" if line else "\n")
    message = sememe(
        "reconstruct", run, "--data", texts[1], "--questions", tmp_path / "q.jsonl", code=1
    )
    assert (
        ("line 2 is no question" if line else "is empty") in message
        and "try: " in message
        and "\n" not in message
    )
    assert "cannot be read" in sememe(
        "reconstruct", run, "--data", texts[1], "--questions", tmp_path / "none.jsonl", code=1
    )
