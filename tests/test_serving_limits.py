"""`sememe serve` and clients that are wrong, hostile, too many or too slow."""

import contextlib
import json
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from sememe.errors import SememeError
from sememe.serving.app import build_app
from sememe.serving.run import Protocol
from sememe.serving.settings import check_exposure, read_key, served_name
from served import (
    CONTEXT,
    KEY,
    LONG,
    PROMPT,
    check_error,
    running,
    served_online,
    until,
)

WITHOUT_KEY = {"/health", "/ready", "/", "/page.js", "/server.js", "/text.js", "/page.css"}
WITHOUT_KEY |= {"/favicon.svg"}
JSON = {"content-type": "application/json"}


@pytest.fixture(scope="module")
def model():
    return served_online()


@pytest.fixture(scope="module")
def client(model):
    with running(model) as (_, client):
        yield client


# S3: what a sampler must not be given.
SAMPLING = [
    *({"temperature": value} for value in (-1, 1e9, "1", True, [1])),
    *({"top_p": value} for value in (0, 1.1, -1, "x")),
    *({"top_k": value} for value in (-2, 1.5, "3")),
    *({"max_tokens": value} for value in (0, -1, 10**12, 2**70, 1.5, "16")),
    *({"n": value} for value in (0, 9, 10**9, -1, 1.0, "2")),
    *({"stop": value} for value in ("", ["a"] * 1000, ["x" * 65], [1], [""], {"a": 1})),
    *({"logit_bias": value} for value in ({"abc": 1}, {"5": 101}, {"999": 1}, {"-1": 1}, [1])),
    {"logit_bias": {str(n): 1 for n in range(301)}},
    *({"seed": value} for value in (2**70, -(2**70), 1.5, "1")),
    *({"presence_penalty": value} for value in (9, -9, "1")),
    *({"frequency_penalty": value} for value in (9, -9)),
    *({"logprobs": value} for value in (-1, 6, True, "1")),
    *({"stream": value} for value in ("yes", 1)),
    *({"sememe": value} for value in ({"rate": 0}, {"rate": 2}, {"rate": 0.01}, {"plan": [[1]]})),
    *({"sememe": value} for value in (1, "x", {"rate": "0.5"}, {"concepts": 1})),
    *({"prompt": value} for value in ("", [], [[]], [""], None, 5, {"a": 1}, [1.5], [-1], [999])),
    *({"prompt": value} for value in ([True], [2**70], ["a", 1], [[1], "a"], ["a"] * 100)),
    *({"model": value} for value in (5, "x" * 300)),
    *({name: 3} for name in ("best_of", "suffix", "min_p", "repetition_penalty", "made_up")),
    *({name: [{"x": 1}]} for name in ("tools", "functions", "response_format")),
    {"stream_options": {"include_usage": 3}},
    {"stream_options": {"other": True}},
]


@pytest.mark.parametrize("fields", SAMPLING, ids=lambda fields: json.dumps(fields)[:50])
def test_what_cannot_be_sampled_is_refused(client, fields):
    body = {"prompt": PROMPT} | fields
    check_error(client.post("/v1/completions", json=body))


CHAT = [
    {"messages": []},
    {"messages": "hi"},
    {"messages": [{"role": "user"}]},
    {"messages": [{"role": "robot", "content": "x"}]},
    {"messages": [{"role": "tool", "content": "x"}]},
    {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]},
    {"messages": [{"role": "user", "content": None}]},
    {"tools": [{"type": "function"}]},
    {"response_format": {"type": "json_object"}},
    {"top_logprobs": 3},
    {"logprobs": True, "top_logprobs": 21},
    {"max_completion_tokens": 0},
    {"max_tokens": 0},
]


@pytest.mark.parametrize("fields", CHAT, ids=lambda fields: json.dumps(fields)[:50])
def test_chats_that_are_not_served_are_refused(client, fields):
    body = {"messages": [{"role": "user", "content": "Hi"}]} | fields
    error = check_error(client.post("/v1/chat/completions", json=body), 400)
    assert error["param"].split(".")[0] in fields


def malformed() -> list[bytes]:
    """S1."""
    good = json.dumps({"prompt": "Once", "max_tokens": 2, "stop": ["a"], "n": 1}).encode()
    bodies = [good[:n] for n in range(len(good))]  # truncated
    bodies += [good + bytes([n]) for n in range(33, 127)]
    bodies += [good[:n] + b"\xff" + good[n:] for n in range(len(good))]  # not UTF-8
    bodies += [good[:n] + b"\0" + good[n:] for n in range(len(good))]
    bodies += [b"[" * n + b"]" * n for n in (33, 1000, 10_000, 400_000)]
    bodies += [b'{"a":' * n + b"1" + b"}" * n for n in (33, 10_000)]
    bodies += [
        b'{"prompt":' + value + b"}" for value in (b"NaN", b"-Infinity", b"1e999", b"[[[[1]]]]")
    ]
    bodies += [b'{"prompt":"a","temperature":%s}' % x for x in (b"NaN", b"Infinity", b"1e999")]
    bodies += [b'{"prompt":"a","seed":' + b"9" * 5000 + b"}"]
    bodies += [b'{"prompt":"a","prompt":"b"}', b'{"prompt":"a","x":{"y":1,"y":1}}']
    bodies += [b'{"prompt":"\\ud800"}', b'{"prompt":"a\\udfff"}', b'{"prompt":"\\u0000"}']
    bodies += [b"1", b'"a"', b"null", b"[]", b"true", b"", b" ", b"\xef\xbb\xbf{}", b"{}"]
    return bodies


def test_malformed_requests_are_4xx_and_the_next_is_served(client):
    bodies = malformed()
    assert len(bodies) > 250
    for body in bodies:
        check_error(client.post("/v1/completions", content=body, headers=JSON))
    for path in ("/v1/chat/completions", "/v1/sememe/inspect"):
        for body in bodies[::10]:
            check_error(client.post(path, content=body, headers=JSON))
    good = {"prompt": "the \\u0000 escape", "max_tokens": 2}
    assert client.post("/v1/completions", json=good).status_code == 200


def test_routes_and_methods_that_there_are_none_of(client):
    for path in ("/page", "/v1", "/v1/embeddings", "/v1/responses", "/docs", "/v1/models/a/b"):
        check_error(client.get(path), 404, code="not_found")
        check_error(client.post(path, json={}), 404, code="not_found")
    refused = client.get("/v1/completions")
    check_error(refused, 405, code="method_not_allowed")
    assert refused.headers["allow"] == "POST"
    check_error(client.options("/v1/completions"), 405)


def test_the_longest_prompt_is_served_and_one_token_more_is_not(client):
    def ask(tokens: int, new: int):
        body = {"prompt": [70] * tokens, "max_tokens": new, "temperature": 0}
        return client.post("/v1/completions", json=body)

    assert ask(CONTEXT - 1, 1).status_code == 200
    start = time.perf_counter()
    for tokens, new in ((CONTEXT, 1), (CONTEXT + 200, 1), (CONTEXT - 1, 2)):
        message = check_error(ask(tokens, new), 400)["message"]
        assert str(tokens) in message and str(CONTEXT) in message
    assert time.perf_counter() - start < 10  # refused, not read


def test_bodies_headers_and_types(client):
    huge = b'{"prompt":"' + b"a" * 1_000_001 + b'"}'
    for _ in range(20):  # none of them is reset before its answer is read
        check_error(client.post("/v1/completions", content=huge, headers=JSON), 413)
    pieces = (b"a" * 4000 for _ in range(600))  # of no length that is known before
    check_error(client.post("/v1/completions", content=pieces, headers=JSON), 413)
    for kind in ("text/plain", "application/x-www-form-urlencoded", "", "multipart/form-data"):
        refused = client.post("/v1/completions", content=b"{}", headers={"content-type": kind})
        check_error(refused, 415)
    zipped = JSON | {"content-encoding": "gzip"}
    check_error(client.post("/v1/completions", content=b"{}", headers=zipped), 415)
    many = {f"x-{n}": "1" for n in range(200)}
    check_error(client.get("/health", headers=many), 431)
    check_error(client.get("/health", headers={"x": "a" * 40_000}), 431)
    check_error(client.get("/health", headers={"x": "a" * 200_000}), 431)
    assert client.get("/health").status_code == 200


def test_other_hosts_are_refused(client):
    port = client.base_url.port
    for host in ("evil.example", f"evil.example:{port}", "127.0.0.1.evil.example", "0.0.0.0", ""):
        for path in ("/v1/models", "/health"):
            check_error(client.get(path, headers={"host": host}), 400)
    for host in ("localhost", f"localhost:{port}", "127.0.0.1:9", "[::1]:80", "LOCALHOST"):
        assert client.get("/v1/models", headers={"host": host}).status_code == 200


def raw(client, data: bytes, seconds: float = 10) -> bytes:
    """What comes back for bytes on a socket of their own."""
    address = client.base_url.host, client.base_url.port
    with socket.create_connection(address, timeout=seconds) as connection:
        connection.sendall(data)
        parts = []
        while part := connection.recv(65536):
            parts.append(part)
    return b"".join(parts)


def test_what_is_not_http_has_the_same_shape(client):
    for data in (b"hello\r\n\r\n", b"GET / HTTP/1.1\r\n\r\n", b"POST / HTTP/9\r\n\r\n"):
        head, _, body = raw(client, data).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 400") and json.loads(body)["error"]["code"]


def test_a_body_that_does_not_come_is_408(model):
    with running(model, body_timeout=0.3) as (_, client):
        head = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 50\r\n"
        answer = raw(client, head + b"content-type: application/json\r\n\r\n{")
        assert answer.startswith(b"HTTP/1.1 408") and b"body_timeout" in answer
        assert client.get("/health").status_code == 200


def test_more_connections_than_there_are_files_for_are_refused(model, monkeypatch):
    monkeypatch.setattr(Protocol, "max_connections", 3)
    with running(model) as (_, client), contextlib.ExitStack() as opened:
        assert client.get("/health").status_code == 200
        address = client.base_url.host, client.base_url.port
        for _ in range(3):
            last = opened.enter_context(socket.create_connection(address, 10))
        answer = b"".join(iter(lambda: last.recv(65536), b""))
        assert answer.startswith(b"HTTP/1.1 503") and b"too_many_connections" in answer
        assert client.get("/health").status_code == 200


# ---- the key ----


def test_every_route_needs_the_key(model):
    with running(model, key=KEY) as (service, client):
        routes = [
            (method, route.path.replace("{name}", "tiny"))
            for part in build_app(service).app.routes
            for route in getattr(getattr(part, "original_router", part), "routes", [part])
            for method in route.methods
        ]
        assert len(routes) >= 10
        for method, path in [*routes, ("GET", "/openapi.json"), ("GET", "/nothing")]:
            if path in WITHOUT_KEY:
                assert client.request(method, path).status_code in (200, 405)
                continue
            for sent in ({}, {"authorization": "Bearer wrong"}, {"authorization": KEY}):
                refused = client.request(method, path, headers=sent)
                assert refused.status_code == 401, (method, path)
                if method != "HEAD":
                    check_error(refused, 401, code="invalid_api_key")
        good = {"authorization": f"Bearer {KEY}"}
        assert client.get("/v1/models", headers=good).status_code == 200
        assert client.get("/metrics", headers=good).status_code == 200


def test_where_a_key_comes_from(tmp_path, monkeypatch):
    monkeypatch.delenv("SEMEME_API_KEY", raising=False)
    assert read_key(None) is None
    check_exposure("127.0.0.1", None, False)
    check_exposure("0.0.0.0", None, True)
    check_exposure("0.0.0.0", KEY, False)
    with pytest.raises(SememeError, match="try: a key"):
        check_exposure("0.0.0.0", None, False)
    monkeypatch.setenv("SEMEME_API_KEY", KEY)
    assert read_key(None) == KEY
    file = tmp_path / "key"
    file.write_text("another-long-key\n")
    assert read_key(file) == "another-long-key"
    for bad in ("short", "with blank in it", "ключключключ"):
        file.write_text(bad, encoding="utf-8")
        with pytest.raises(SememeError, match="usable"):
            read_key(file)
    with pytest.raises(SememeError, match="cannot be read"):
        read_key(tmp_path / "none")
    assert served_name(str(tmp_path / "demo")) == "demo"


# ---- too many, too slow, too early, too late ----


def test_more_than_there_is_room_for_is_429_at_once(model):
    with running(model, rows=2, queue=2) as (service, client):
        taken = [0.0]

        def ask(number: int) -> int:
            start = time.perf_counter()
            response = client.post("/v1/completions", json=LONG | {"max_tokens": 40})
            if response.status_code == 429:
                taken.append(time.perf_counter() - start)
                check_error(response, 429, code="queue_full")
                assert int(response.headers["retry-after"]) >= 1
            assert service.used <= 4
            return response.status_code

        with ThreadPoolExecutor(16) as pool:
            statuses = list(pool.map(ask, range(16)))
        assert statuses.count(200) >= 4 and set(statuses) == {200, 429}
        assert max(taken) < 10  # the others of the 16 take longer; 0.2 s on a quiet machine
        until(lambda: service.metrics.outcomes().get("refused") == statuses.count(429))
        for sent in ({"n": 5}, {"prompt": ["a"] * 5}):
            check_error(client.post("/v1/completions", json=LONG | sent), 400)
        assert service.used == 0


def test_the_refused_are_not_tokenised(model, monkeypatch):
    with running(model, rows=1, queue=0) as (service, client):
        monkeypatch.setattr(service, "tokens", lambda text: pytest.fail("tokenised"))
        with service.reserve(1):
            check_error(client.post("/v1/completions", json=LONG), 429)
        assert service.used == 1  # a group that was made inside gives them back itself


def test_a_deadline_ends_answers(model):
    with running(model, deadline=0.3) as (service, client):
        check_error(client.post("/v1/completions", json=LONG), 504, code="deadline")
        with client.stream("POST", "/v1/completions", json=LONG | {"stream": True}) as stream:
            lines = [line for line in stream.iter_lines() if line]
        error = json.loads(lines[-1].removeprefix("data: "))["error"]
        assert error["code"] == "deadline" and len(lines) > 1
        assert until(lambda: service.used == 0) < 10
        until(lambda: service.metrics.outcomes().get("deadline") == 2)


def test_waiting_too_long_for_a_row_is_503(model):
    with running(model, rows=1, queue_timeout=0.2, keepalive=0.05) as (service, client):
        with client.stream("POST", "/v1/completions", json=LONG | {"stream": True}) as stream:
            lines = stream.iter_lines()
            next(lines)
            for streamed in (False, True):
                refused = client.post("/v1/completions", json=LONG | {"stream": streamed})
                check_error(refused, 503, code="queue_timeout")
                assert "retry-after" in refused.headers
        until(lambda: service.used == 0)
        until(lambda: service.metrics.outcomes().get("queue_timeout") == 2)


def test_loading_and_draining_are_503(model):
    with running(load=False) as (service, client):
        for path in ("/ready", "/v1/completions"):
            body = {"json": {"prompt": "x"}} if path != "/ready" else {}
            refused = client.request("POST" if body else "GET", path, **body)
            check_error(refused, 503, code="loading")
            assert "retry-after" in refused.headers
        assert client.get("/health").status_code == 200
    with running(model) as (service, client):
        service.draining = True
        check_error(client.get("/ready"), 503, code="shutting_down")
        check_error(client.post("/v1/completions", json=LONG), 503, code="shutting_down")
        assert client.get("/health").status_code == 200


def test_a_silent_stream_has_comments(model, monkeypatch):
    with running(model, keepalive=0.05) as (service, client):
        scheduler = service.engine.scheduler
        iterate = scheduler.iterate
        monkeypatch.setattr(scheduler, "iterate", lambda: (time.sleep(0.5), iterate()))
        with client.stream("POST", "/v1/completions", json=LONG | {"stream": True}) as answer:
            assert any(line.startswith(":") for line in answer.iter_lines())
