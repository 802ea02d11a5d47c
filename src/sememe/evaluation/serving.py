"""Servers under load: what clients of OpenAI's `/v1/completions` see of one, or of several in
turn. Any server that streams: our own, `transformers serve`, llama.cpp's."""

import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any

import httpx
import numpy as np

from sememe.errors import DataError, SememeError
from sememe.evaluation.inputs import run_recipe
from sememe.evaluation.results import Figures, of_rounds
from sememe.paths import names_of
from sememe.progress import bar
from sememe.texts import read_texts

SAMPLE = 1000  # characters that tell how many of them a token has
SHARES = {"median": 0.5, "p95": 0.95, "p99": 0.99}
PATIENCE = 3600  # seconds
CLOCK = time.perf_counter


@dataclass(frozen=True)
class Load:
    """What clients ask for in a round. Lengths: from the first to the second, drawn for each
    request."""

    requests: int = 16
    prompt_tokens: tuple[int, int] = (256, 256)
    new_tokens: tuple[int, int] = (64, 64)
    arrivals: float | None = None
    """Requests per second, at random times (Poisson); None: all at once."""
    streams: int | None = None
    """Requests under way at the same time at most; None: no limit."""
    repeats: int = 3
    seed: int = 0
    key: str | None = None
    """What the servers ask for."""


@dataclass(frozen=True)
class Call:
    """A request that a client will send. `start`: seconds into the round."""

    prompt: str
    new_tokens: int
    start: float = 0.0


@dataclass
class Seen:
    """What came back of a call, and when, in seconds of `CLOCK`."""

    sent: float
    status: str = ""
    """That of HTTP; of a stream that broke off `cut`, or the code of its error; or why there was no
    answer."""
    retry_after: str | None = None
    texts: list[float] = field(default_factory=list)
    """When each piece of text came."""
    usage: dict[str, int] = field(default_factory=dict)
    sememe: dict[str, Any] = field(default_factory=dict)
    end: float = 0.0
    finished: bool = False

    @property
    def new_tokens(self) -> int:
        """As the server counts, which may send several tokens in a piece; else pieces."""
        return self.usage.get("completion_tokens", len(self.texts))

    @property
    def gaps(self) -> list[float]:
        return [later - earlier for earlier, later in pairwise(self.texts)]

    def take(self, line: str) -> None:
        """A line of the stream."""
        if not line.startswith("data:"):
            return
        data = line.removeprefix("data:").strip()
        if data == "[DONE]":
            self.finished = True
            return
        event = json.loads(data)
        self.usage |= event.get("usage") or {}
        self.sememe |= event.get("sememe") or {}
        if (error := event.get("error")) is not None:
            self.status = str(error.get("code") if isinstance(error, dict) else error)[:40]
        for choice in event.get("choices", ()):
            if choice.get("text"):
                self.texts.append(CLOCK())
            # Not every server ends with [DONE].
            self.finished |= choice.get("finish_reason") is not None


def client_of(load: Load) -> httpx.AsyncClient:
    """Of all calls of a round: as many connections as there are calls."""
    headers = {"authorization": f"Bearer {load.key}"} if load.key else {}
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    timeout = httpx.Timeout(PATIENCE, connect=60)
    return httpx.AsyncClient(headers=headers, limits=limits, timeout=timeout, trust_env=False)


async def ask(client: httpx.AsyncClient, url: str, call: Call) -> Seen:
    """Sends a call and reads its stream to the end."""
    seen = Seen(CLOCK())
    body = {"prompt": call.prompt, "max_tokens": call.new_tokens, "temperature": 0}
    body |= {"stream": True, "stream_options": {"include_usage": True}}
    try:
        async with client.stream("POST", f"{url}/v1/completions", json=body) as response:
            seen.status = str(response.status_code)
            seen.retry_after = response.headers.get("retry-after")
            if response.status_code == 200:
                async for line in response.aiter_lines():
                    seen.take(line)
                if seen.status == "200" and not seen.finished:
                    seen.status = "cut"
    except (httpx.HTTPError, ValueError) as error:
        seen.status = type(error).__name__
    seen.end = CLOCK()
    return seen


async def round_of(
    url: str, calls: Sequence[Call], load: Load, done: Callable[[], Any] = lambda: None
) -> list[Seen]:
    """What came of all calls. `done` is called after each."""
    begin, room = CLOCK(), asyncio.Semaphore(load.streams or len(calls))

    async def one(client: httpx.AsyncClient, call: Call) -> Seen:
        await asyncio.sleep(begin + call.start - CLOCK())
        async with room:
            seen = await ask(client, url, call)
        done()
        return seen

    async with client_of(load) as client:
        return await asyncio.gather(*(one(client, call) for call in calls))


def round_figures(seen: Sequence[Seen]) -> Figures:
    """Of a round: tokens per second of all calls together, and times of those that were answered
    whole."""
    answered = [x for x in seen if x.status == "200"]
    seconds = max(x.end for x in seen) - min(x.sent for x in seen)
    new, pieces = sum(x.new_tokens for x in answered), sum(len(x.texts) for x in answered)
    figures: Figures = {
        "output_tokens_per_s": new / max(seconds, 1e-9),
        "round_seconds": seconds,
        "answered": len(answered),
        "failed": len(seen) - len(answered),
        "tokens_written": new,
        "tokens_read": sum(x.usage.get("prompt_tokens", 0) for x in answered),
        "tokens_per_piece": new / pieces if pieces else None,
        "counted_by": "usage" if all(x.usage for x in answered) else "pieces of text",
    }
    times = {
        "first_token": [x.texts[0] - x.sent for x in answered if x.texts],
        "gap": [gap for x in answered for gap in x.gaps],
        "whole": [x.end - x.sent for x in answered],
    }
    for name, values in times.items():
        for share, at in SHARES.items():
            figures[f"{name}_{share}"] = float(np.quantile(values, at)) if values else None
    return figures | {"statuses": dict(Counter(x.status for x in seen))}


# ---- what is asked ----


def calls_of(load: Load, text: str, characters: float, number: int) -> list[Call]:
    """The calls of a round, others in each: a server may remember prompts. `characters`: of a
    token."""
    draw = random.Random(f"{load.seed} {number}")
    calls, start = [], 0.0
    for _ in range(load.requests):
        size = round(draw.randint(*load.prompt_tokens) * characters)
        if len(text) < 2 * size:
            raise DataError(
                f"the text has {len(text)} characters: need {2 * size}, to cut prompts of {size} "
                "from it. try: more text, or a smaller --prompt-tokens"
            )
        place = draw.randrange(len(text) - size)
        place += text[place : place + size // 2].find(" ") + 1  # the next word
        calls.append(Call(text[place : place + size], draw.randint(*load.new_tokens), start))
        start += draw.expovariate(load.arrivals) if load.arrivals else 0.0
    return calls


async def characters_per_token(url: str, text: str, load: Load) -> float:
    """As the server counts in the middle of the text; its first answer, which nothing is timed of.
    Raises SememeError where there is none."""
    sample = text[len(text) // 2 :][:SAMPLE]
    async with client_of(load) as client:
        seen = await ask(client, url, Call(sample, 4))
    if seen.status != "200":
        raise SememeError(
            f"{url} gives no completion ({seen.status or 'no answer'}): need a server of OpenAI's "
            "/v1/completions. try: sememe serve, or the MODEL instead of a URL"
        )
    return len(sample) / seen.usage.get("prompt_tokens", len(sample) / 4)


def text_of(targets: Sequence[str], data: str | None) -> str:
    """What prompts are cut from: `data`, else the held-out texts of the first run."""
    runs = filter(None, map(run_recipe, filter(is_model, targets)))
    data = data or next((recipe["data"]["heldout"] for recipe in runs), None)
    if data is None:
        raise SememeError(
            "got no --data, and no run with held-out text of its own: need a text to cut prompts "
            "from. try: --data data/heldout.txt"
        )
    return "\n\n".join(text for name in names_of(data) for text in read_texts(name))


# ---- who is asked ----


def is_model(target: str) -> bool:
    return not target.startswith(("http://", "https://"))


@contextmanager
def served(target: str, *words: str) -> Iterator[str]:
    """The URL of a server, which of a model is started here and stopped again; `words`: its
    options. Raises SememeError where it does not start."""
    if not is_model(target):
        yield target.rstrip("/").removesuffix("/v1")
        return
    command = [sys.executable, "-m", "sememe", "serve", target, "--port", "0", *words]
    with tempfile.TemporaryFile("w+", encoding="utf-8") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
        try:
            line = process.stdout.readline()
            address = line.strip().partition(" at http://")[2]
            if not address:
                process.wait()
                log.seek(0)
                unknown = f"no server of {target} has started: need its log. try: sememe serve"
                *_, last = [unknown, *log.read().strip().splitlines()]
                raise SememeError(last.removeprefix("error: "))
            yield f"http://{address}".removesuffix("/v1")
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            process.stdout.close()


Job = Callable[[Sequence[Call], Callable[[], Any]], Figures]
"""Answers the calls of a round, and calls the second after each."""


def job_of(url: str, load: Load) -> Job:
    return lambda calls, done: round_figures(asyncio.run(round_of(url, calls, load, done)))


def benchmark_servers(targets: Sequence[str], load: Load, data: str | None = None) -> Figures:
    """Each target, a URL or a model, under the same load, in turn, round by round: medians over
    rounds, and their ratio to the first target.

    Raises:
        SememeError: a server that does not start or answer, or no text to cut prompts from.
        DataError: a text that cannot be read, or is too short."""
    text = text_of(targets, data)
    limits = ("--deadline", str(PATIENCE), "--queue-timeout", str(PATIENCE))
    with ExitStack() as stack:
        queue = ("--queue", str(load.requests))
        urls = [stack.enter_context(served(name, *limits, *queue)) for name in targets]
        sizes = [asyncio.run(characters_per_token(url, text, load)) for url in urls]
        jobs = {name: job_of(url, load) for name, url in zip(targets, urls, strict=True)}
        return alternating(jobs, load, text, sizes[0])


def alternating(jobs: Mapping[str, Job], load: Load, text: str, characters: float) -> Figures:
    """Figures of all jobs, which are given the same calls, over the rounds of the load."""
    rounds: dict[str, list[Figures]] = {name: [] for name in jobs}
    total = load.repeats * load.requests * len(jobs)
    with bar(total=total, desc="requests", unit="request") as progress:
        for number in range(load.repeats):
            calls = calls_of(load, text, characters, number)
            for name, job in jobs.items():
                rounds[name].append(job(calls, progress.update))
    values = {name: value for name, value in asdict(load).items() if name != "key"}
    settings = {name: [*x] if isinstance(x, tuple) else x for name, x in values.items()}
    return compared(rounds) | {"settings": settings | {"cores": os.cpu_count()}}


def compared(rounds: Mapping[str, Sequence[Figures]]) -> Figures:
    """Figures of all rounds by name, and beside them those of the first."""
    servers: list[Figures] = []
    for name, figures in rounds.items():
        server: Figures = {"server": name}
        for key, first in figures[0].items():
            values = [x[key] for x in figures]
            if isinstance(first, int | float) and None not in values:
                server[key] = of_rounds(values)
        server["counted_by"] = ", ".join(sorted({x["counted_by"] for x in figures}))
        servers.append(server | {"statuses": [x["statuses"] for x in figures]})
    beside = [ratios(server, servers[0]) for server in servers[1:]]
    return {"servers": servers} | ({"beside_the_first": beside} if beside else {})


RATIOS = ("output_tokens_per_s", "first_token_median", "first_token_p95", "gap_median", "gap_p95")


def ratios(server: Figures, first: Figures) -> Figures:
    """Of its medians to those of the first."""
    both = [key for key in RATIOS if key in server and key in first]
    values = {f"{key}_ratio": server[key]["median"] / first[key]["median"] for key in both}
    return {"server": server["server"], **values}
