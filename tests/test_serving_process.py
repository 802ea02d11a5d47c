"""`sememe serve` as a process: what it says and how it ends."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from served import LONG, chat_tokenizer, check_error, served_online, until


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served") / "tiny"
    model = served_online()
    model.merged()  # which needs no base
    model.save_pretrained(folder)
    chat_tokenizer().save_pretrained(folder)
    return folder


def start(folder, *words) -> subprocess.Popen:
    command = [sys.executable, "-m", "sememe", "serve", str(folder), "--port", "0", *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=environment, **pipes)


def test_sigterm_lets_streams_end_and_exits_0(saved):
    process = start(saved, "--drain", "120")
    try:
        line = process.stdout.readline()
        assert "http://" in line, line + process.stderr.read()
        address = re.search(r"http://\S+", line)[0]
        with httpx.Client(base_url=address, timeout=60, trust_env=False) as client:

            def stream(number: int) -> list[str]:
                body = LONG | {"stream": True, "max_tokens": 200, "prompt": f"secret {number}"}
                with client.stream("POST", "/completions", json=body) as response:
                    lines = response.iter_lines()
                    begun.append(next(lines))
                    return [line for line in lines if line]

            begun: list[str] = []
            with ThreadPoolExecutor(10) as pool:
                streams = [pool.submit(stream, number) for number in range(10)]
                until(lambda: len(begun) == 10, 60)
                process.send_signal(signal.SIGTERM)
                time.sleep(0.2)
                check_error(client.post("/completions", json=LONG), 503, code="shutting_down")
                assert {one.result()[-1] for one in streams} == {"data: [DONE]"}
        out, log = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 0, log
    assert "10 ok" in out and "1 unavailable" in out
    assert "secret" not in log and "detective" not in log and log.count(" POST 200 ok ") == 10


def test_what_still_runs_after_the_drain_ends_with_an_error(saved):
    process = start(saved, "--drain", "0.1")
    try:
        address = re.search(r"http://\S+", process.stdout.readline())[0]
        body = LONG | {"stream": True, "max_tokens": 450}
        with (
            httpx.Client(base_url=address, timeout=60, trust_env=False) as client,
            client.stream("POST", "/completions", json=body) as response,
        ):
            lines = response.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            last = [line for line in lines if line][-1]
        log = process.communicate(timeout=30)[1]
    finally:
        process.kill()
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "shutting_down"
    assert process.returncode == 0 and "Traceback" not in log, log


def test_sigterm_does_not_wait_for_a_model_that_is_being_loaded():
    code = """
import socket, sys, time
from sememe.serving.run import serve
from sememe.serving.settings import Settings
with socket.create_server(("127.0.0.1", 0)) as free:
    port = free.getsockname()[1]
def load():
    print(port, flush=True)
    time.sleep(100)
print(serve(Settings(port=port), "slow", load, print))
"""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", code], **pipes) as process:
        port = int(process.stdout.readline())
        try:
            health = f"http://127.0.0.1:{port}/health"
            until(lambda: httpx.get(health, trust_env=False).status_code == 200)
            process.send_signal(signal.SIGTERM)
            log = process.communicate(timeout=50)[1]
        finally:
            process.kill()
    assert process.returncode == 0 and "Traceback" not in log, log
