"""`sememe serve` with a compressor: codes and texts are those in process, and what is wrong,
hostile, gone or too late ends as every other request does."""

import json
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
import torch

import sememe as package
from conftest import byte_tokenizer
from families import compressor_over
from sememe.codes import Codes
from sememe.engine import open_engine
from served import (
    check_error,
    running,
    served_online,
    served_planner,
    until,
)

EMOJI = "Ünïcode 👩‍👩‍👧 日本語\r\n\n  ends with space \U0001f600 "
TEXTS = ["a", "😀", EMOJI, "the cat sat on a mat and saw the dog. " * 3, " \n"]
JSON = {"content-type": "application/json"}


@pytest.fixture(scope="module")
def saved(base_folder, tmp_path_factory):
    """A finished run of windows of 16."""
    run = tmp_path_factory.mktemp("compressor") / "run"
    ids = torch.randint(3, 259, (16, 24), generator=torch.Generator().manual_seed(2))
    compressor_over(base_folder, ids, codes_per_concept=2, beams=4).save_pretrained(run / "model")
    (run / "recipe.yaml").write_text("system: compressor\nsequence_length: 16\n")
    return run


@pytest.fixture(scope="module")
def compressor(saved):
    engine = open_engine(str(saved))
    engine.close()
    return engine.model


@pytest.fixture(scope="module")
def coder(compressor):
    with running(compressor, byte_tokenizer()) as (_, client):
        yield client


def refused(response: httpx.Response, status: int = 400) -> dict:
    return check_error(response, status)


# ---- a compressor ----


def test_codes_and_texts_are_those_in_process(coder, compressor):
    for text in [*TEXTS, TEXTS]:
        for rate in (None, 1.0):
            sent = {"text": text} | ({"rate": rate} if rate else {})
            response = coder.post("/v1/sememe/compress", json=sent)
            assert response.status_code == 200, response.text
            got = Codes.model_validate_json(response.content)
            wanted = package.compress(compressor, text, rate=rate)
            assert got.model.name == "tiny" and got.written_by(wanted.model)
            changed = {"model": wanted.model, "sha256": None}
            assert Codes(**(dict(got) | changed)) == wanted
            texts = package.decompress(compressor, got)
            answer = coder.post("/v1/sememe/decompress", json=response.json()).json()
            assert answer["text"] == (texts if isinstance(text, list) else texts[0])
            assert answer["sememe"]["concepts"] == 0 < answer["usage"]["completion_tokens"]


def test_codes_of_a_route_are_a_file(coder, saved, tmp_path):
    response = coder.post("/v1/sememe/compress", json={"text": EMOJI, "model": "tiny"})
    (tmp_path / "codes.json").write_bytes(response.content)
    (text,) = package.decompress(saved, tmp_path / "codes.json")
    answer = coder.post("/v1/sememe/decompress", content=response.content, headers=JSON)
    assert answer.json()["text"] == text


UNFIT = [
    {},
    {"text": ""},
    {"text": []},
    {"text": ["a", ""]},
    {"text": 1},
    {"text": None},
    {"text": [["a"]]},
    {"text": "a", "rate": 0},
    {"text": "a", "rate": 0.01},
    {"text": "a", "rate": "1"},
    {"text": "a", "window": 5},
]


@pytest.mark.parametrize("sent", UNFIT, ids=str)
def test_what_cannot_be_compressed_is_refused(coder, sent):
    refused(coder.post("/v1/sememe/compress", json=sent))


def hostile(codes: dict, longest: int):
    """Changes of codes, each with or without a checksum of its own. `longest`: id of a code that
    stands for four tokens."""
    window = codes["documents"][0]["windows"][0]
    concept = window["concepts"][0]
    for ids in ([256], [-1], [10**30], [1.5], ["1"], [True], [None], concept, [[concept]], None):
        yield window, {"concepts": ids}
    yield window, {"concepts": [concept] * 100_000}
    yield window, {"concepts": [concept] * 100_000, "tokens": 100_000}
    yield window, {"concepts": [concept] * 17, "tokens": 16}
    # Codes of the longest segments: far more tokens than there are positions for.
    yield window, {"concepts": [longest] * 200, "tokens": 200}
    for tokens in (-1, 0, 10**12, "16"):
        yield window, {"tokens": tokens}
    for span in ([0], [0, 1, 2], "01", [0, "1"]):
        yield window, {"span": span}
    yield codes["documents"][0], {"windows": {}}
    yield codes["documents"][0], {"path": "/etc/passwd"}
    yield codes["model"], {"weights_sha256": "0" * 64}
    yield codes["model"], {"base_sha256": None}
    yield codes["model"], {"name": 3}
    for fields in ({"documents": []}, {"format": "x"}, {"version": 2}, {"more": 1}, {"rate": "1"}):
        yield codes, fields


def test_hostile_codes_are_refused_before_any_work(coder, compressor, monkeypatch):
    codes = coder.post("/v1/sememe/compress", json={"text": TEXTS[3]}).json()
    sound = json.dumps(codes)
    monkeypatch.setattr(compressor, "decompress", lambda rows: pytest.fail("it worked"))
    count = 0
    longest = next(n for n in range(256) if compressor.length([n]) == 4)
    for part, fields in hostile(codes, longest):
        before = dict(part)
        part.update(fields)
        for sha256 in (codes["sha256"], None):
            sent = json.dumps(codes | {"sha256": sha256})
            refused(coder.post("/v1/sememe/decompress", content=sent, headers=JSON))
            count += 1
        part.clear()
        part.update(before)
    for sent in ({}, {"codes": codes}, {"text": "a"}):
        refused(coder.post("/v1/sememe/decompress", json=sent))
    assert count > 50 and json.dumps(codes) == sound
    monkeypatch.undo()
    assert coder.post("/v1/sememe/decompress", json=codes).status_code == 200


def test_routes_of_other_systems_are_refused(coder):
    messages = [{"role": "user", "content": "Hi"}]
    for path, sent in (("completions", {"prompt": "a"}), ("sememe/inspect", {"text": "a"})):
        found = refused(coder.post(f"/v1/{path}", json=sent))
        assert found["code"] == "wrong_system" and "compress" in found["message"]
    refused(coder.post("/v1/chat/completions", json={"messages": messages}))
    refused(coder.post("/v1/sememe/compress", json={"text": "a", "model": "other"}), 404)
    for model in (served_online(), served_planner()):
        with running(model) as (_, client):
            for path in ("compress", "decompress"):
                found = refused(client.post(f"/v1/sememe/{path}", json={"text": "a"}))
                assert found["code"] == "wrong_system" and "completions" in found["message"]


@pytest.fixture
def endless(compressor, monkeypatch):
    """A window that takes for ever, pass after pass of the model."""

    def forever(ids):
        while True:
            compressor.encode(ids)

    monkeypatch.setattr(compressor, "compress", forever)


def test_a_work_ends_within_a_pass_when_nobody_waits_for_it(compressor, endless):
    sent = {"json": {"text": "a" * 16}}
    with running(compressor, byte_tokenizer(), rows=1, queue=5) as (service, client):
        with ThreadPoolExecutor(1) as pool:
            first = pool.submit(client.post, "/v1/sememe/compress", timeout=4, **sent)
            until(lambda: service.engine.scheduler.running)
            for _ in range(3):
                with pytest.raises(httpx.ReadTimeout):
                    client.post("/v1/sememe/compress", timeout=0.3, **sent)
            # Those that waited are gone at once.
            until(lambda: service.used == service.engine.pending == 1)
            assert not first.done()
            assert isinstance(first.exception(), httpx.ReadTimeout)
        until(lambda: service.used == service.engine.pending == 0)
        until(lambda: service.metrics.outcomes() == {"cancelled": 4})
        until(lambda: client.get("/v1/sememe/stats").json()["rows"] == 0)


def test_deadline_queue_and_drain_of_works(compressor, endless, monkeypatch):
    limits = {"rows": 1, "queue": 1, "deadline": 3, "queue_timeout": 1}
    with running(compressor, byte_tokenizer(), **limits) as (service, client):

        def ask(_) -> tuple[int, str]:
            response = client.post("/v1/sememe/compress", json={"text": "a" * 16})
            return response.status_code, response.json()["error"]["code"]

        with ThreadPoolExecutor(3) as pool:
            answers = []
            for number in range(3):
                answers.append(pool.submit(ask, number))
                until(lambda seen=number: service.used == min(2, seen + 1))
                time.sleep(0.1)
            codes = [answer.result() for answer in answers]
        assert codes == [(504, "deadline"), (503, "queue_timeout"), (429, "queue_full")]
        until(lambda: service.used == 0)
        monkeypatch.undo()
        assert client.post("/v1/sememe/compress", json={"text": "a"}).status_code == 200


def test_metrics_are_what_was_done(compressor):
    with running(compressor, byte_tokenizer()) as (service, client):
        codes = client.post("/v1/sememe/compress", json={"text": TEXTS[3]}).json()
        client.post("/v1/sememe/compress", json={"text": ""})
        client.post("/v1/sememe/decompress", json=codes)
        value = service.metrics.value
        until(lambda: service.metrics.outcomes() == {"ok": 2, "invalid": 1})
        windows = [window for x in codes["documents"] for window in x["windows"]]
        assert len(windows) > 5
        assert value("sememe_prompt_tokens_total") == sum(x["tokens"] for x in windows)
        assert value("sememe_read_tokens_total") == sum(x["tokens"] for x in windows)
        assert value("sememe_concepts_total") == sum(len(x["concepts"]) for x in windows)
        assert value("sememe_generation_tokens_total") > 0
        assert value("sememe_requests_running") == service.used == 0
        assert value("sememe_step_seconds_count", phase="work") > 2


def test_a_fault_of_the_model_ends_one_work(compressor, monkeypatch):
    with running(compressor, byte_tokenizer()) as (service, client):
        for fault in (MemoryError("a secret"), RuntimeError("a secret")):

            def faulty(ids, fault=fault):
                raise fault

            monkeypatch.setattr(compressor, "compress", faulty)
            response = client.post("/v1/sememe/compress", json={"text": "a"})
            assert response.status_code == 500 and "secret" not in response.text
        monkeypatch.undo()
        assert client.post("/v1/sememe/compress", json={"text": "a"}).status_code == 200
        assert service.used == 0


def test_a_card_says_what_there_is(coder):
    assert coder.get("/v1/models").json()["data"][0]["sememe"] == {
        **{"system": "compressor", "context": 255, "rate": 0.5, "rates": [0.25, 1.0]},
        **{"num_concepts": 16, "codes_per_concept": 2, "window": 16, "beams": 4, "chat": False},
    }
