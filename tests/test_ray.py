"""Several processes: one address before them (Ray Serve), and work shared by them (Ray Data)."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
import torch

from conftest import sememe
from families import compressor_over
from sememe.serving.ray import refusal
from served import chat_tokenizer, chunks, running, served_online, until

pytestmark = pytest.mark.ray

KEY = "a-key-of-many-letters"
LONG = {"prompt": "The old detective", "max_tokens": 480, "logit_bias": {"2": -100}}
BUSY = 600  # seconds in which Ray and a model in each process are up, on a machine that is busy


def need_ray() -> None:
    pytest.importorskip("ray")
    if os.environ.get("PYTEST_XDIST_WORKER"):
        pytest.skip("each test process would start Ray anew: make test-ray")


@contextlib.contextmanager
def command(*words, **variables: str):
    """`sememe` in a process of its own, which is killed at the end."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", **variables}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    words = [sys.executable, "-m", "sememe", *map(str, words)]
    process = subprocess.Popen(words, env=environment, **pipes)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def processes(folder_or_name: str, of: int) -> list[int]:
    """Those below process `of` that have this in their titles."""
    import psutil

    children = psutil.Process(of).children(recursive=True)
    found = []
    for child in children:
        with contextlib.suppress(psutil.Error):
            if folder_or_name in " ".join(child.cmdline()):
                found.append(child.pid)
    return found


# ---- one address before several processes ----


@pytest.fixture(scope="module")
def replicas(tmp_path_factory):
    """(the process, a client of it with the key, the same model in this process)."""
    need_ray()
    folder = tmp_path_factory.mktemp("replicas") / "tiny"
    model = served_online()
    model.merged()
    model.save_pretrained(folder)
    chat_tokenizer().save_pretrained(folder)
    limits = ("--rows", 4, "--queue", 4, "--drain", 120)
    words = ("serve", folder, "--port", 0, "--replicas", 2, *limits)
    with command(*words, SEMEME_API_KEY=KEY) as process:
        line = process.stdout.readline()
        assert "http://" in line, line + process.stderr.read()
        address = re.search(r"http://[^/]+", line)[0]
        headers = {"authorization": f"Bearer {KEY}"}
        with httpx.Client(
            base_url=address, headers=headers, timeout=BUSY, trust_env=False
        ) as client:
            yield process, client, model


def stats(client) -> dict:
    return client.get("/v1/sememe/stats").json()


def gauge(client, name: str) -> float:
    """Of all processes together."""
    text = client.get("/metrics").text
    return sum(float(x) for x in re.findall(rf"^sememe_{name}(?:{{.*}})? (\S+)$", text, re.M))


def test_two_processes_say_what_one_does(replicas):
    _, client, model = replicas
    bodies = [
        {"prompt": f"prompt {n}", "max_tokens": 12, "temperature": n % 2, "seed": n}
        for n in range(12)
    ]
    with running(model) as (_, one):
        wanted = [one.post("/v1/completions", json=body).json()["choices"] for body in bodies]
    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(lambda body: client.post("/v1/completions", json=body), bodies))
    assert [x.json()["choices"] for x in answers] == wanted
    streamed = [client.post("/v1/completions", json=x | {"stream": True}) for x in bodies[:3]]
    texts = ["".join(x["choices"][0]["text"] for x in chunks(each)) for each in streamed]
    assert texts == [choices[0]["text"] for choices in wanted[:3]]
    assert gauge(client, "requests_total") == 15, "the counts of both"


def test_key_guard_and_errors_are_those_of_one_process(replicas):
    _, client, _ = replicas
    for path in ("/v1/models", "/metrics", "/openapi.json", "/nothing"):
        refused = client.get(path, headers={"authorization": "Bearer wrong"})
        assert refused.status_code == 401, path
    statuses = {
        "/-/routes": client.get("/-/routes"),
        "/-/healthz": client.get("/-/healthz"),
        "host": client.get("/v1/models", headers={"host": "evil.example"}),
        "head": client.get("/health", headers={"x": "a" * 200_000}),
        "type": client.post("/v1/completions", content=b"{}"),
        "json": client.post(
            "/v1/completions", content=b'{"a":NaN}', headers={"content-type": "application/json"}
        ),
        "empty": client.post("/v1/completions", json={"prompt": ""}),
    }
    found = {name: answer.status_code for name, answer in statuses.items()}
    assert found == dict(zip(statuses, (404, 404, 400, 431, 415, 400, 400), strict=True))
    for answer in statuses.values():
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    numbers = client.get("/health").headers["x-request-id"]
    assert re.fullmatch(r"[0-9a-f]{16}", numbers), "the one that is in the log"


def test_streams_come_chunk_by_chunk_and_cut_ones_free_their_rows(replicas):
    _, client, _ = replicas

    def cut(_) -> float:
        with client.stream("POST", "/v1/completions", json=LONG | {"stream": True}) as response:
            assert response.status_code == 200
            lines = (line for line in response.iter_lines() if line)
            next(lines), next(lines)
            return gauge(client, "requests_running")

    with ThreadPoolExecutor(6) as pool:
        running_then = list(pool.map(cut, range(6)))
    assert max(running_then) >= 1, "the first chunks came while the answers were being written"
    until(lambda: gauge(client, "requests_running") == 0, 60)


def test_too_many_are_429_of_one_shape(replicas):
    _, client, _ = replicas
    body = LONG | {"max_tokens": 30}
    with ThreadPoolExecutor(40) as pool:
        answers = list(pool.map(lambda _: client.post("/v1/completions", json=body), range(40)))
    statuses = [answer.status_code for answer in answers]
    assert set(statuses) == {200, 429} and statuses.count(200) >= 8
    for answer in answers:
        if answer.status_code == 429:
            assert answer.json()["error"]["code"] == "queue_full"
            assert int(answer.headers["retry-after"]) >= 1


def test_a_process_that_is_killed_costs_no_later_request(replicas):
    server, client, _ = replicas
    first, *others = processes("ServeReplica", server.pid)
    assert len(others) == 1
    os.kill(first, signal.SIGKILL)
    time.sleep(1)
    body = {"prompt": "after", "max_tokens": 2}
    statuses = [client.post("/v1/completions", json=body).status_code for _ in range(30)]
    assert statuses == [200] * 30
    assert gauge(client, "requests_running") == 0, "nothing of the dead one"
    until(lambda: len(set(processes("ServeReplica", server.pid)) - {first}) == 2, BUSY)


def test_other_machines_reach_nothing_without_the_token(replicas):
    """Ray Serve has each process listen at all addresses for others of its own."""
    import grpc
    import psutil

    server, *_ = replicas
    family = [psutil.Process(server.pid), *psutil.Process(server.pid).children(recursive=True)]
    listening = [(x.pid, y) for x in family for y in x.net_connections() if y.status == "LISTEN"]
    own = ("127.0.0.1", "::1")
    open_to_all = [x for x in listening if x[1].laddr.ip.removeprefix("::ffff:") not in own]
    assert len(listening) > len(open_to_all)
    assert {pid for pid, _ in open_to_all} <= set(processes("ServeReplica", server.pid))
    for _, connection in open_to_all:
        with grpc.insecure_channel(f"127.0.0.1:{connection.laddr.port}") as channel:
            call = channel.unary_unary("/ray.serve.ASGIService/HandleRequest")
            with pytest.raises(grpc.RpcError) as fault:
                call(b"", timeout=60)
        assert fault.value.code() is grpc.StatusCode.UNAUTHENTICATED, fault.value


def test_sigterm_lets_streams_end_and_exits_0(replicas):
    """The last one of this server."""
    server, client, _ = replicas
    begun: list[str] = []

    def stream(_) -> str:
        body = LONG | {"stream": True, "max_tokens": 60}
        with client.stream("POST", "/v1/completions", json=body) as response:
            lines = (line for line in response.iter_lines() if line)
            begun.append(next(lines))
            return [*lines][-1]

    with ThreadPoolExecutor(4) as pool:
        streams = [pool.submit(stream, number) for number in range(4)]
        until(lambda: len(begun) == 4, 60)
        server.send_signal(signal.SIGTERM)
        time.sleep(0.5)
        late = client.post("/v1/completions", json=LONG)
        assert {one.result() for one in streams} == {"data: [DONE]"}
    assert late.status_code == 503 and late.json()["error"]["code"] == "shutting_down"
    out, log = server.communicate(timeout=60)
    assert server.returncode == 0, log
    assert "served: " in out and "unavailable" in out
    assert "detective" not in log


def test_a_model_that_cannot_be_served_is_one_sentence(tmp_path):
    need_ray()
    with command("serve", tmp_path, "--port", 0, "--replicas", 2) as process:
        _, log = process.communicate(timeout=BUSY)
    assert process.returncode == 1 and "Traceback" not in log
    assert "holds no model" in log and "try: " in log


# ---- work that several processes share ----


@pytest.fixture(scope="module")
def work(base_folder, tmp_path_factory):
    """(RUN of a compressor, a text of about a hundred batches)."""
    folder = tmp_path_factory.mktemp("work")
    ids = torch.randint(3, 259, (16, 24), generator=torch.Generator().manual_seed(2))
    compressor_over(base_folder, ids).save_pretrained(folder / "run" / "model")
    (folder / "run" / "recipe.yaml").write_text(
        "system: compressor\nsequence_length: 16\ndata: {train: none.txt, heldout: none.txt}\n"
    )
    words = [f"word {number * number}" for number in range(2500)]
    (folder / "text.txt").write_text(" ".join(words))
    return folder / "run", folder / "text.txt"


def parts(home: Path) -> dict[str, int]:
    return {str(x): x.stat().st_mtime_ns for x in home.glob("parts/*/*.part")}


def test_a_wrong_number_of_processes_is_one_sentence(work, tmp_path):
    for number in ("0", "-1", "x"):
        for words in (("compress", *work, "--out", tmp_path / "c"), ("evaluate", work[0])):
            assert "--workers" in sememe(*words, "--workers", number, code=2)
        assert "--replicas" in sememe("serve", work[0], "--replicas", number, code=2)


def test_without_ray_several_processes_are_one_sentence(work, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    words = ("compress", *work, "--out", tmp_path / "codes", "--workers", 2)
    assert "try: pip install 'sememe[ray]'" in sememe(*words, code=1)


def test_compressed_by_two_it_is_the_same_file_and_goes_on_where_it_was_killed(work, tmp_path):
    need_ray()
    one, two, home = tmp_path / "one.json", tmp_path / "two.json", tmp_path / "home"
    sememe("compress", *work, "--out", one)
    words = ("compress", *work, "--out", two, "--workers", 2)
    with command(*words, SEMEME_HOME=str(home)) as process:
        until(lambda: len(parts(home)) >= 3 or process.poll() is not None, BUSY)
        assert process.poll() is None, process.communicate()
        os.kill(processes("MapWorker", process.pid)[0], signal.SIGKILL)  # one of the two
        before = len(parts(home))
        until(lambda: len(parts(home)) >= before + 3 or process.poll() is not None, BUSY)
        process.kill()
        process.wait()
        assert not two.exists()
    there = parts(home)
    with command(*words, SEMEME_HOME=str(home)) as process:
        _, log = process.communicate(timeout=BUSY)
    assert process.returncode == 0, log
    going_on = re.search(r"going on: (\d+) of (\d+) parts are there", log)
    # What was written is not done again; a process that was still there may have added its last.
    assert len(there) <= int(going_on[1]) <= len(there) + 2 < int(going_on[2])
    assert two.read_bytes() == one.read_bytes()
    assert not parts(home)


def test_evaluated_by_two_it_is_the_same_result(work, tmp_path):
    need_ray()
    results = []
    for number in ("1", "2"):
        words = ("evaluate", work[0] / "model", "--data", work[1], "--tokens", 2048)
        words += ("--workers", number, "--rate", "0.3,0.5", "--json", tmp_path / number)
        with command(*words, SEMEME_HOME=str(tmp_path / "home")) as process:
            _, log = process.communicate(timeout=BUSY)
        assert process.returncode == 0, log
        results.append((tmp_path / number).read_bytes())
    assert results[0] == results[1] and json.loads(results[0])["nll"] > 0


def test_what_ray_serve_itself_refuses_has_the_one_shape():
    for status in (404, 408, 429, 500, 503):
        answer = refusal(status).response()
        assert answer.status_code in (429, 503) and int(answer.headers["retry-after"]) >= 1
