"""What several processes bring on this machine: one server of two threads beside two of one thread,
and `sememe compress` in one process beside two. Rounds alternate, medians of the ratios.

python examples/ray_compare.py MODEL [COMPRESSOR TEXT] [--streams 16] [--rounds 3]

The bars: two processes of one thread at least 0.9 of one with two threads at 16 streams; compress
in two processes at least 1.6 times one. Run it on a machine that does nothing else."""

import argparse
import contextlib
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx

PROMPT = "The old detective looked at the letter for a long time. " * 6


def sememe(*words: object, threads: int) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-m", "sememe", *map(str, words)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


@contextlib.contextmanager
def server(model: str, rows: int, replicas: int, threads: int) -> Iterator[httpx.Client]:
    """With places for all streams in either: those of several processes are in each."""
    limits = ("--rows", rows, "--replicas", replicas)
    process = sememe("serve", model, "--port", 0, *limits, threads=threads)
    try:
        address = re.search(r"http://[^/]+", process.stdout.readline())
        if address is None:
            sys.exit("the server did not start")
        with httpx.Client(base_url=address[0], timeout=600, trust_env=False) as client:
            yield client
    finally:
        process.terminate()
        process.wait()


def tokens_per_second(client: httpx.Client, streams: int, new: int) -> float:
    """All streams together."""

    def stream(number: int) -> int:
        body = {"prompt": f"{number} {PROMPT}", "max_tokens": new, "temperature": 0}
        answer = client.post("/v1/completions", json=body)
        answer.raise_for_status()
        return answer.json()["usage"]["completion_tokens"]

    start = time.perf_counter()
    with ThreadPoolExecutor(streams) as pool:
        count = sum(pool.map(stream, range(streams)))
    return count / (time.perf_counter() - start)


def compare_servers(model: str, streams: int, new: int, rounds: int) -> None:
    ratios = []
    with (
        server(model, streams, replicas=1, threads=2) as one,
        server(model, streams, replicas=2, threads=1) as two,
    ):
        for client in (one, two):  # warm, both processes of the second
            tokens_per_second(client, streams, 4)
        for number in range(rounds):
            speeds = [tokens_per_second(client, streams, new) for client in (one, two)]
            ratios.append(speeds[1] / speeds[0])
            print(f"round {number}: {speeds[0]:.1f} and {speeds[1]:.1f} tokens/s, {ratios[-1]:.2f}")
    print(
        f"2 processes x 1 thread / 1 process x 2 threads: {statistics.median(ratios):.2f} (>= 0.9)"
    )


def seconds_of_compress(model: str, text: str, workers: int) -> float:
    """Of the whole command, start and all."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        words = ("compress", model, text, "--out", Path(folder) / "codes.json")
        process = sememe(*words, "--workers", workers, threads=1)
        process.communicate()
        if process.returncode:
            sys.exit("sememe compress has failed")
        return time.perf_counter() - start


def compare_compress(model: str, text: str, rounds: int) -> None:
    ratios = []
    for number in range(rounds):
        one, two = (seconds_of_compress(model, text, workers) for workers in (1, 2))
        ratios.append(one / two)
        print(f"round {number}: {one:.1f} s and {two:.1f} s, {ratios[-1]:.2f}")
    print(f"compress, 1 process / 2 processes: {statistics.median(ratios):.2f} (>= 1.6)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("compressor", nargs="?")
    parser.add_argument("text", nargs="?")
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    compare_servers(args.model, args.streams, args.new_tokens, args.rounds)
    if args.text:
        compare_compress(args.compressor, args.text, args.rounds)


if __name__ == "__main__":
    main()
