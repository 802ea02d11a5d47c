"""`sememe serve` with compressors and planners: the routes say what the models say in process, and
what is wrong, hostile, gone or too late ends as in every other request."""

import json
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
import torch

import sememe as package
from conftest import byte_tokenizer
from families import compressor_over, move
from sememe.codes import Codes
from sememe.engine import Engine, Request, open_engine
from sememe.models import PlannerConfig, PlannerForCausalLM
from served import (
    chat_tokenizer,
    check_error,
    chunks,
    running,
    served_base,
    served_online,
    until,
)

EMOJI = "Ünïcode 👩‍👩‍👧 日本語\r\n\n  ends with space \U0001f600 "
TEXTS = ["a", "😀", EMOJI, "the cat sat on a mat and saw the dog. " * 3, " \n"]
SIZES, LENGTHS = (7, 5, 9), (3, 2, 4)
PROMPT = "The old detective 🙂"
PLANNED = {"prompt": PROMPT, "temperature": 0, "max_tokens": 12}


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


@pytest.fixture(scope="module")
@torch.no_grad()
def planner():
    base, generator = served_base(), torch.Generator().manual_seed(1)
    sizes = {"plan_sizes": SIZES, "plan_lengths": LENGTHS, "lora_rank": 4}
    config = PlannerConfig(text_config=base.config, base="tiny", **sizes)
    model = PlannerForCausalLM(config, base)
    move(model, generator)
    model.plans.bias.copy_(0.3 * torch.randn(model.plans.bias.shape, generator=generator))
    model.plans.bias[model.plans.row_IM[:, -1]] += 1.5  # plans of all lengths
    return model.eval()


@pytest.fixture(scope="module")
def writer(planner):
    with running(planner) as (_, client):
        yield client


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


JSON = {"content-type": "application/json"}
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
    check_error(coder.post("/v1/sememe/compress", json=sent))


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
            check_error(coder.post("/v1/sememe/decompress", content=sent, headers=JSON))
            count += 1
        part.clear()
        part.update(before)
    for sent in ({}, {"codes": codes}, {"text": "a"}):
        check_error(coder.post("/v1/sememe/decompress", json=sent))
    assert count > 50 and json.dumps(codes) == sound
    monkeypatch.undo()
    assert coder.post("/v1/sememe/decompress", json=codes).status_code == 200


def test_routes_of_other_systems_are_refused(coder, writer):
    messages = [{"role": "user", "content": "Hi"}]
    for path, sent in (
        ("/v1/completions", {"prompt": "a"}),
        ("/v1/sememe/inspect", {"text": "a"}),
    ):
        found = check_error(coder.post(path, json=sent))
        assert found["code"] == "wrong_system" and "compress" in found["message"]
    check_error(coder.post("/v1/chat/completions", json={"messages": messages}))
    check_error(coder.post("/v1/sememe/compress", json={"text": "a", "model": "other"}), 404)
    with running(served_online()) as (_, online):
        for client in (writer, online):
            for path in ("compress", "decompress"):
                found = check_error(client.post(f"/v1/sememe/{path}", json={"text": "a"}))
                assert found["code"] == "wrong_system" and "completions" in found["message"]
        for field in ("plan", "budget"):
            value = {"plan": [[1]], "budget": [1]}[field]
            sent = {"prompt": "a", "sememe": {field: value}}
            assert (
                check_error(online.post("/v1/completions", json=sent))["param"] == f"sememe.{field}"
            )
    assert (
        check_error(writer.post("/v1/sememe/inspect", json={"text": "a"}))["code"] == "wrong_system"
    )


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
        assert service.metrics.outcomes() == {"ok": 2, "invalid": 1}
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


# ---- a planner ----


def in_process(planner, prompt: str = PROMPT, plan=None, seed: int | None = None):
    """(plan, text)."""

    def options() -> dict:
        draws = {"do_sample": True, "temperature": 0.8}
        return {} if seed is None else draws | {"generator": torch.Generator().manual_seed(seed)}

    ids, shape = byte_tokenizer()(prompt, return_tensors="pt").input_ids, planner.config.plan_shape
    plan_1P = planner.plan(ids, **options())[0][:, 0] if plan is None else shape.pack([plan])
    (new,) = planner.write(plan_1P, 12, **options())
    text = chat_tokenizer().decode(new, skip_special_tokens=True).rstrip("�")
    return shape.unpack(plan_1P)[0], text


def test_plans_and_texts_are_those_in_process(writer, planner):
    for seed in (None, 3, 11):
        sampling = {} if seed is None else {"seed": seed, "temperature": 0.8}
        plan, text = in_process(planner, seed=seed)
        sent = PLANNED | sampling | {"n": 2}
        got = writer.post("/v1/completions", json=sent).json()
        first, second = got["choices"]
        assert first["sememe"] == {"plan": plan} and first["text"] == text
        assert (second["text"] == text) == (seed is None)
        assert got["usage"]["prompt_tokens"] == len(PROMPT.encode())
        assert got["sememe"]["concepts"] == sum(
            len(ids) for choice in got["choices"] for ids in choice["sememe"]["plan"]
        )
        streamed = chunks(writer.post("/v1/completions", json=sent | {"stream": True}))
        for choice in got["choices"]:
            mine = [
                c for part in streamed for c in part["choices"] if c["index"] == choice["index"]
            ]
            assert mine[0]["sememe"] == choice["sememe"]
            assert "".join(part["text"] for part in mine) == choice["text"]
            assert mine[-1]["finish_reason"] == choice["finish_reason"]


@pytest.mark.parametrize("plan", [[[1, 2], [], [8, 0, 0, 3]], [[], [], []], [[6], [4, 4], [1]]])
def test_a_plan_that_is_given_is_the_plan_that_is_written(writer, planner, plan):
    fields = {"seed": 5, "temperature": 0.8, "sememe": {"plan": plan}}
    (choice,) = writer.post("/v1/completions", json=PLANNED | fields).json()["choices"]
    assert (choice["sememe"]["plan"], choice["text"]) == in_process(planner, plan=plan, seed=5)


def test_a_plan_of_an_answer_gives_its_text_again(writer):
    fields = {"seed": 2, "temperature": 1}
    (first,) = writer.post("/v1/completions", json=PLANNED | fields).json()["choices"]
    fields["sememe"] = {"plan": first["sememe"]["plan"]}
    (again,) = writer.post("/v1/completions", json=PLANNED | fields).json()["choices"]
    assert first == again


def test_a_budget_is_kept(writer):
    plans = {}
    for budget in ([1], [0, 2, 1], [0], [3, 2, 4]):
        sent = PLANNED | {"seed": 1, "temperature": 2, "n": 8, "sememe": {"budget": budget}}
        got = writer.post("/v1/completions", json=sent).json()
        limits = budget * (3 if len(budget) == 1 else 1)
        plans[str(budget)] = [choice["sememe"]["plan"] for choice in got["choices"]]
        for plan in plans[str(budget)]:
            assert all(len(ids) <= limit for ids, limit in zip(plan, limits, strict=True))
    assert plans["[0]"] == [[[], [], []]] * 8
    free = writer.post("/v1/completions", json=sent | {"sememe": {}}).json()
    assert [choice["sememe"]["plan"] for choice in free["choices"]] == plans["[3, 2, 4]"]


def test_a_chat_is_planned(writer):
    sent = {"messages": [{"role": "user", "content": "Hi 🙂"}], "temperature": 0}
    got = writer.post("/v1/chat/completions", json=sent | {"max_tokens": 9}).json()
    (choice,) = got["choices"]
    text = chat_tokenizer().apply_chat_template(
        sent["messages"], tokenize=False, add_generation_prompt=True
    )
    assert got["usage"]["prompt_tokens"] == len(chat_tokenizer()(text).input_ids)
    streamed = writer.post("/v1/chat/completions", json=sent | {"max_tokens": 9, "stream": True})
    deltas = [part["choices"][0]["delta"].get("content", "") for part in chunks(streamed)]
    assert "".join(deltas) == choice["message"]["content"] and choice["sememe"]["plan"]
    assert writer.post("/v1/chat/completions", json=sent).status_code == 200


def test_stop_strings_and_ends(writer):
    fields = {"seed": 9, "temperature": 1, "max_tokens": 40}
    (whole,) = writer.post("/v1/completions", json=PLANNED | fields).json()["choices"]
    stop = whole["text"][3:6]
    (cut,) = writer.post("/v1/completions", json=PLANNED | fields | {"stop": stop}).json()[
        "choices"
    ]
    assert cut["text"] == whole["text"][: whole["text"].index(stop)]
    assert cut["finish_reason"] == "stop"


BIAS = {"logit_bias": {"5": 1}}
UNPLANNED = [
    *(BIAS, {"top_p": 0.9}, {"top_k": 3}, {"presence_penalty": 1}, {"frequency_penalty": -1}),
    *({"logprobs": 0}, {"logprobs": 2}, {"echo": True}, {"echo": True, "max_tokens": 0}),
    {"sememe": {"rate": 0.5}},
    *({"sememe": {"plan": plan}} for plan in ([], [[]], [[1], [2]], [[], [], [], []])),
    *({"sememe": {"plan": [ids, [], []]}} for ids in ([7], [1, 1, 1, 1], [-1], [1.0], ["1"], 1)),
    {"sememe": {"plan": [[2**40], [], []]}},
    *({"sememe": {"budget": sent}} for sent in ([], [1, 2], [9, 9, 9], [-1], 2, [1.5], [4])),
    {"sememe": {"plan": [[1], [], []], "budget": [1]}},
]


@pytest.mark.parametrize("fields", UNPLANNED, ids=str)
def test_what_a_planner_does_nothing_with_is_named(writer, fields):
    found = check_error(writer.post("/v1/completions", json=PLANNED | fields))
    (name, value), *_ = reversed(fields.items())
    wanted = {f"sememe.{key}" for key in value} if name == "sememe" else set(fields)
    assert found["param"].split(".0")[0] in wanted, found


NEUTRAL = {"top_p": 1, "top_k": -1, "logit_bias": {}, "presence_penalty": 0, "echo": False}


def test_fields_that_change_nothing_are_served(writer):
    one, other = (
        writer.post("/v1/completions", json=PLANNED | fields).json()["choices"]
        for fields in ({}, NEUTRAL | {"sememe": {"rate": None, "plan": None}})
    )
    assert one == other


def test_prompts_that_a_planner_cannot_read(writer):
    for fields in ({"prompt": ""}, {"prompt": []}, {"prompt": [10**6]}, {"prompt": "a" * 600}):
        check_error(writer.post("/v1/completions", json=PLANNED | fields))
    check_error(writer.post("/v1/completions", json=PLANNED | {"max_tokens": 600}))


def test_cards_say_what_there_is(coder, writer, planner, compressor):
    facts = coder.get("/v1/models").json()["data"][0]["sememe"]
    assert facts == {
        **{"system": "compressor", "context": 255, "rate": 0.5, "rates": [0.25, 1.0]},
        **{"num_concepts": 16, "codes_per_concept": 2, "window": 16, "beams": 4},
    }
    facts = writer.get("/v1/models/tiny").json()["sememe"]
    context = planner.config.text_config.max_position_embeddings - sum(LENGTHS) - 3 - 1
    assert facts == {
        **{"system": "planner", "context": context, "sizes": list(SIZES)},
        **{"budget": list(LENGTHS), "source": None},
    }


def test_planners_without_http(planner):
    with Engine(planner, chat_tokenizer()) as engine:
        ids = byte_tokenizer()(PROMPT).input_ids
        (answer,) = engine.generate([Request(ids, max_tokens=12, ends=engine.ends)])
    assert (answer.plan, answer.text.rstrip("�")) == in_process(planner)
