"""`sememe benchmark --serve`: what the clients count is what the server counts; percentiles of a
known schedule; failures by status; servers in turn."""

import asyncio
import json
import random
import re
import threading
from contextlib import contextmanager
from dataclasses import replace

import httpx
import pytest

from conftest import sememe
from sememe.errors import DataError, SememeError
from sememe.evaluation.serving import (
    Call,
    Load,
    Seen,
    benchmark_servers,
    calls_of,
    round_figures,
    round_of,
    served,
)
from served import chat_tokenizer, running, served_online, until

TEXT = " ".join(random.Random(0).choice(["cat", "sat", "mat", "dog"]) for _ in range(100))
SHORT = Load(requests=6, prompt_tokens=(8, 40), new_tokens=(2, 9), repeats=2)


@pytest.fixture(scope="module")
def model():
    model = served_online()
    model.generation_config.eos_token_id = None  # every answer has the tokens that are asked for
    return model


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return str(path)


@contextmanager
def scripted(*events, status: int = 200):
    """A server that streams this to everyone: texts, dicts, seconds to wait; None: it hangs up."""
    ready, state = threading.Event(), {}

    async def answer(reader, writer):
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0])
        state.setdefault("bodies", []).append(json.loads(await reader.readexactly(length)))
        writer.write(f"HTTP/1.1 {status} x\r\ncontent-type: text/event-stream\r\n".encode())
        writer.write(b"transfer-encoding: chunked\r\nretry-after: 7\r\n\r\n")
        for event in events:
            if isinstance(event, float):
                await asyncio.sleep(event)
                continue
            if event is None:
                break
            if isinstance(event, str):
                event = {"choices": [{"index": 0, "text": event}]}
            line = f"data: {json.dumps(event)}\r\n\r\n"
            writer.write(f"{len(line):x}\r\n{line}\r\n".encode())
            await writer.drain()
        else:
            writer.write(b"0\r\n\r\n")
        writer.close()

    async def live():
        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        state["port"] = server.sockets[0].getsockname()[1]
        state["loop"], state["end"] = asyncio.get_running_loop(), asyncio.Event()
        ready.set()
        async with server:
            await state["end"].wait()

    thread = threading.Thread(target=lambda: asyncio.run(live()), daemon=True)
    thread.start()
    assert ready.wait(20)
    try:
        yield f"http://127.0.0.1:{state['port']}", state
    finally:
        state["loop"].call_soon_threadsafe(state["end"].set)
        thread.join(20)


END = {"choices": [{"index": 0, "text": "", "finish_reason": "length"}]}


def test_figures_of_a_known_schedule():
    whole = Seen(1.0, "200", texts=[2.0, 2.1, 2.3, 2.6, 7.6], end=8.0, finished=True)
    later = Seen(2.0, "200", texts=[2.5, 2.9], end=3.0, usage={"completion_tokens": 6})
    lost = [Seen(0.5, "429", end=0.6), Seen(0.5, "cut", texts=[0.9, 99.0], end=99.5)]
    figures = round_figures([whole, later, *lost])
    assert figures["statuses"] == {"200": 2, "429": 1, "cut": 1}
    assert (figures["answered"], figures["failed"], figures["tokens_written"]) == (2, 2, 5 + 6)
    assert figures["round_seconds"] == 99.0, "from the first that is sent to the last that ends"
    assert figures["output_tokens_per_s"] == pytest.approx(11 / 99)
    assert figures["tokens_per_piece"] == 11 / 7 and figures["counted_by"] == "pieces of text"
    # Gaps 0.1, 0.2, 0.3, 0.4, 5; first tokens 1 and 0.5; ends 7 and 1 after they were sent.
    assert figures["gap_median"] == pytest.approx(0.3)
    assert figures["gap_p95"] == pytest.approx(0.4 + 0.8 * 4.6)
    assert figures["gap_p99"] == pytest.approx(0.4 + 0.96 * 4.6)
    assert figures["first_token_median"] == pytest.approx(0.75)
    assert figures["whole_median"] == pytest.approx(4) and figures["whole_p95"] < 7
    nothing = round_figures(lost)
    assert nothing["tokens_written"] == 0 and nothing["gap_p95"] is nothing["first_token_p95"]


def test_a_stream_is_timed_as_it_comes():
    events = ("a", 0.02, "b", 0.02, "c", 0.5, {"choices": []}, "d", 0.02, END)
    with scripted(0.25, *events) as (url, _):
        seen = asyncio.run(round_of(url, [Call("x", 4)] * 3, Load()))
    for one in seen:
        assert one.status == "200" and one.new_tokens == 4 and one.retry_after == "7"
        # Nothing comes before it is sent: bounds of order, whatever the machine does.
        assert one.texts[0] - one.sent >= 0.25 and one.end - one.sent >= 0.25 + 0.56
        assert max(one.gaps) == one.gaps[2] and len(one.gaps) == 3
        assert sum(one.gaps) >= 0.54 - 0.02


def test_tokens_are_counted_by_usage_and_what_breaks_off_is_a_failure(data):
    usage = {"choices": [], "usage": {"completion_tokens": 7, "prompt_tokens": 3}}
    end = usage | END
    cases = [
        (("ab", "cd", end), "200", 7),
        (("ab", "cd"), "cut", 2),
        (("ab", None), "RemoteProtocolError", 1),
        (("ab", {"error": {"code": "deadline", "message": "too long"}}), "deadline", 1),
        (("ab", {"error": "a bare string"}), "a bare string", 1),
    ]
    for events, status, tokens in cases:
        with scripted(*events) as (url, state):
            (seen,) = asyncio.run(round_of(url, [Call("x", 9)], Load(key="secret")))
        assert (seen.status, seen.new_tokens) == (status, tokens), events
        assert seen.texts and seen.end >= seen.texts[-1]
        want = {"prompt": "x", "max_tokens": 9, "temperature": 0, "stream": True}
        assert state["bodies"] == [want | {"stream_options": {"include_usage": True}}]
    with scripted(END, status=503) as (url, _), pytest.raises(SememeError, match=r"503.*try: "):
        benchmark_servers([url], SHORT, data)


def test_clients_count_what_the_server_counts(model, data):
    with running(model) as (service, client):
        figures = benchmark_servers([f"{client.base_url}/v1/"], SHORT, data)
        metrics = service.metrics
        # An outcome is counted once its answer is sent: the last may come after the client's.
        until(lambda: metrics.outcomes() == {"ok": 1 + 2 * 6})
        value = {
            name: metrics.value(f"sememe_{name}_tokens_total") for name in ("generation", "prompt")
        }
    (server,) = figures["servers"]
    assert server["statuses"] == [{"200": 6}] * 2
    assert sum(server["tokens_written"]["rounds"]) == value["generation"] - 4
    assert sum(server["tokens_read"]["rounds"]) == value["prompt"] - len(TEXT[len(TEXT) // 2 :])
    asked = [calls_of(SHORT, TEXT, 1.0, number) for number in range(2)]
    sums = [sum(call.new_tokens for call in calls) for calls in asked]
    assert server["tokens_written"]["rounds"] == sums and server["counted_by"] == "usage"
    assert server["tokens_per_piece"]["median"] >= 1
    assert {"beside_the_first"}.isdisjoint(figures)


def test_refusals_are_counted_by_status(model, data):
    load = replace(SHORT, requests=12, new_tokens=(40, 40))
    with running(model, rows=1, queue=1) as (service, client):
        url = str(client.base_url)
        calls = calls_of(load, TEXT, 1.0, 0)
        seen = asyncio.run(round_of(url, calls, load))
        limited = asyncio.run(round_of(url, calls, replace(load, streams=2)))
        until(lambda: sum(service.metrics.outcomes().values()) == 24)
        outcomes = service.metrics.outcomes()
    figures = round_figures(seen)
    statuses = figures["statuses"]
    assert statuses.keys() == {"200", "429"} and statuses["200"] >= 2
    assert outcomes["refused"] == statuses["429"] == figures["failed"]
    assert all((x.retry_after == "1") == (x.status == "429") for x in seen)
    assert {x.status for x in limited} == {"200"}, "no more at the same time than there is room for"


def test_calls_are_others_in_each_round_and_the_same_again():
    load = Load(requests=50, prompt_tokens=(4, 12), new_tokens=(3, 5), arrivals=100.0)
    calls = calls_of(load, TEXT, 2.0, 0)
    assert calls == calls_of(load, TEXT, 2.0, 0) and calls != calls_of(load, TEXT, 2.0, 1)
    assert calls != calls_of(replace(load, seed=1), TEXT, 2.0, 0)
    assert all(f" {call.prompt}" in f" {TEXT}" for call in calls), "from the first letter of a word"
    assert {len(call.prompt) for call in calls} == {*range(8, 25, 2)}
    assert {call.new_tokens for call in calls} == {3, 4, 5}
    starts = [call.start for call in calls]
    assert starts == sorted(starts) and starts[0] == 0 and 0.2 < starts[-1] < 1.0
    assert {call.start for call in calls_of(replace(load, arrivals=None), TEXT, 2.0, 0)} == {0.0}
    with pytest.raises(DataError, match="need 1600, to cut prompts of 800"):
        calls_of(replace(load, prompt_tokens=(400, 400)), TEXT, 2.0, 0)


def test_a_model_is_served_beside_a_url_and_stopped(model, data, tmp_path):
    folder = tmp_path / "tiny"
    saved = served_online()
    saved.merged()
    saved.save_pretrained(folder)
    chat_tokenizer().save_pretrained(folder)
    words = ("--batch", 3, "--prompt-tokens", "8-20", "--new-tokens", 5, "--repeats", 2)
    with running(model) as (_, client):
        words = (*words, "--serve", str(client.base_url), "--data", data)
        printed = sememe("benchmark", folder, *words, "--json", tmp_path / "l.json")
    figures = json.loads((tmp_path / "l.json").read_text())
    first, second = figures["servers"]
    assert first["server"] == str(folder) and second["failed"]["max"] == first["failed"]["max"] == 0
    assert first["tokens_read"] == second["tokens_read"], "both are asked the same"
    (beside,) = figures["beside_the_first"]
    both = [x["output_tokens_per_s"]["median"] for x in (second, first)]
    assert beside["output_tokens_per_s_ratio"] == both[0] / both[1]
    assert figures["settings"]["prompt_tokens"] == [8, 20] and "first token, p95" in printed
    with served(str(folder)) as url:
        assert httpx.get(f"{url}/ready", trust_env=False).status_code == 200
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{url}/ready", trust_env=False)


@pytest.mark.parametrize(
    "words, message",
    [
        ("--serve http://127.0.0.1:9 --data DATA", "gives no completion .ConnectError"),
        ("--serve http://127.0.0.1:9", "got no --data"),
        ("--serve http://127.0.0.1:9 --data DATA --rate 0.5", "got --rate"),
        ("--serve http://127.0.0.1:9 --data DATA --sweep", "got --sweep"),
        ("--serve http://127.0.0.1:9 --prompt-tokens 9-3", "two with - between"),
        ("--serve no/where/there --data DATA", "no/where/there.* is neither a known base"),
        ("NOWHERE --prompt-tokens 3-9", "got lengths from 3 to 9"),
        ("NOWHERE --arrivals 3", "got --arrivals"),
        ("--sweep", "got no model"),
    ],
)
def test_bad_input_is_one_sentence(data, words, message):
    printed = sememe("benchmark", *words.replace("DATA", data).split(), code=1)
    assert re.search(message, printed) and "try: " in printed and "\n" not in printed, printed
