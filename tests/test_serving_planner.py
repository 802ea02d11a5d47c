"""`sememe serve` with a planner: plans and texts are those that it writes in process, and what it
does nothing with is refused by name."""

import httpx
import pytest
import torch

from conftest import byte_tokenizer
from sememe.engine import Engine, Request
from served import (
    PLAN_LENGTHS,
    PLAN_SIZES,
    chat_tokenizer,
    check_error,
    chunks,
    running,
    served_online,
    served_planner,
)

PROMPT = "The old detective 🙂"
PLANNED = {"prompt": PROMPT, "temperature": 0, "max_tokens": 12}


@pytest.fixture(scope="module")
def planner():
    return served_planner()


@pytest.fixture(scope="module")
def writer(planner):
    with running(planner) as (_, client):
        yield client


def refused(response: httpx.Response) -> dict:
    return check_error(response, 400)


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
    found = refused(writer.post("/v1/completions", json=PLANNED | fields))
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
        refused(writer.post("/v1/completions", json=PLANNED | fields))
    refused(writer.post("/v1/completions", json=PLANNED | {"max_tokens": 600}))


def test_planners_without_http(planner):
    with Engine(planner, chat_tokenizer()) as engine:
        ids = byte_tokenizer()(PROMPT).input_ids
        (answer,) = engine.generate([Request(ids, max_tokens=12, ends=engine.ends)])
    assert (answer.plan, answer.text.rstrip("�")) == in_process(planner)


def test_a_card_says_what_there_is(writer, planner):
    context = planner.config.text_config.max_position_embeddings - sum(PLAN_LENGTHS) - 3 - 1
    assert writer.get("/v1/models/tiny").json()["sememe"] == {
        **{"system": "planner", "context": context, "sizes": list(PLAN_SIZES)},
        **{"budget": list(PLAN_LENGTHS), "source": None, "chat": True},
    }


def test_only_a_planner_plans_and_it_inspects_nothing(writer):
    found = refused(writer.post("/v1/sememe/inspect", json={"text": "a"}))
    assert found["code"] == "wrong_system"
    with running(served_online()) as (_, client):
        for name, value in (("plan", [[1]]), ("budget", [1])):
            sent = {"prompt": "a", "sememe": {name: value}}
            found = refused(client.post("/v1/completions", json=sent))
            assert found["param"] == f"sememe.{name}"
