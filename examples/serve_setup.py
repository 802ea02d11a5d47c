"""What `serve_compare.py` compares: models that are made for it, servers, and clients that do more
than to ask."""

import asyncio
import os
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path

import httpx
import torch
from prometheus_client.parser import text_string_to_metric_families
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from sememe.data import heldout_blocks
from sememe.errors import SememeError
from sememe.evaluation.serving import Call, Load, Seen, ask, client_of, round_of
from sememe.keys import split_layers
from sememe.models import OnlineConfig, OnlineForCausalLM
from sememe.models.loading import load_tokenizer, resolve

# ---- models ----


def untrained(base: str, folder: Path, source: str) -> str:
    """An online model over a base, its codes and gate started on text: R = 4, of 30 layers 4/22/4,
    else as its recipes split it."""
    tokenizer = load_tokenizer(resolve(base))
    layers = AutoConfig.from_pretrained(resolve(base)).num_hidden_layers
    split = (4, layers - 8, 4) if layers > 11 else split_layers(None, layers)
    config = OnlineConfig(
        base=base, split=split, rate=0.25, boundary="null", max_tail=16, lora_rank=0
    )
    model = OnlineForCausalLM.from_base(config)
    ids_NT = heldout_blocks(source, tokenizer, 256, 16 * 256).ids_NT
    model.start_frame(ids_NT)
    model.start_codes(ids_NT)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def tiny_base(folder: Path, like: str) -> str:
    """Random weights under the tokenizer of another base."""
    tokenizer = load_tokenizer(resolve(like))
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


# ---- servers ----


@contextmanager
def transformers_server(base: str, log: Path):
    """`transformers serve` of a base with continuous batching, in float32 on the CPU. Its cache is
    limited: by default it takes nine tenths of the memory."""
    port = 18000 + os.getpid() % 1000
    program = "from transformers.cli.transformers import main; main()"
    words = f"serve {resolve(base)} --continuous-batching --dtype float32 --device cpu"
    words += f" --cb-max-memory-percent 0.2 --host 127.0.0.1 --port {port}"
    with log.open("w") as file:
        command = [sys.executable, "-c", program, *words.split()]
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
        try:
            url = f"http://127.0.0.1:{port}"
            wait_for(url, process, log)
            yield url
        finally:
            process.terminate()
            process.wait(60)


def wait_for(url: str, process: subprocess.Popen, log: Path) -> None:
    while process.poll() is None:
        try:
            if httpx.get(f"{url}/health", trust_env=False).status_code == 200:
                return
        except httpx.HTTPError:
            time.sleep(0.5)
    raise SememeError(f"transformers serve has ended: need one that runs. try: read {log}")


class Metrics:
    """What a server of ours says at /metrics, since this was made."""

    def __init__(self, url: str):
        self.url = url
        self.before = self.now()

    def now(self) -> dict[str, float]:
        text = httpx.get(f"{self.url}/metrics", trust_env=False, timeout=60).text
        families = text_string_to_metric_families(text)
        samples = [sample for family in families for sample in family.samples]
        return {",".join([x.name, *x.labels.values()]): x.value for x in samples}

    def __call__(self, *names: str) -> float:
        """The growth of these series, `name,label`, together."""
        after = self.now()
        return sum(after.get(name, 0) - self.before.get(name, 0) for name in names)


# ---- clients ----


async def long_among(url: str, streams: list[Call], long: Call) -> tuple[list[Seen], Metrics]:
    """All streams, and last the long one, sent when the others write; and metrics from then on."""
    begun = Metrics(url)
    async with client_of(Load()) as client:
        tasks = [asyncio.create_task(ask(client, url, call)) for call in streams]
        written, running = "sememe_generation_tokens_total", "sememe_requests_running"
        while begun(written) < 4 * len(streams) or begun.now()[running] < len(streams):
            if any(task.done() for task in tasks):
                break  # too short an answer, or none: the figures will say so
            await asyncio.sleep(0.1)
        metrics = Metrics(url)
        return await asyncio.gather(*tasks, ask(client, url, long)), metrics


async def watched(url: str, calls: list[Call], load: Load) -> tuple[list[Seen], list[float]]:
    """A round, and bytes of all keys and values while it lasts."""
    sizes: list[float] = []

    async def watch() -> None:
        async with client_of(load) as client:
            while True:
                stats = (await client.get(f"{url}/v1/sememe/stats")).json()
                sizes.append(sum(stats["cache_bytes"].values()))
                await asyncio.sleep(0.1)

    task = asyncio.create_task(watch())
    seen = await round_of(url, calls, load)
    task.cancel()
    return seen, sizes


async def crowded(url: str, calls: list[Call], load: Load) -> tuple[list[Seen], list[float]]:
    """A round, and seconds of refusals that another process gets meanwhile, one after another: of
    the round itself they wait for this one, which has all connections to make."""
    loop, times = asyncio.get_running_loop(), []
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        await loop.run_in_executor(pool, time.perf_counter)  # it has started
        task = asyncio.create_task(round_of(url, calls, load))
        while not task.done():
            status, seconds = await loop.run_in_executor(pool, probe, url, calls[0].prompt)
            times += [seconds] * (status == 429)
            await asyncio.sleep(0.05)
    return await task, times


def probe(url: str, prompt: str) -> tuple[int, float]:
    """Status and seconds of one request."""
    with httpx.Client(trust_env=False, timeout=60) as client:
        start = time.perf_counter()
        body = {"prompt": prompt, "max_tokens": 1}
        status = client.post(f"{url}/v1/completions", json=body).status_code
        return status, time.perf_counter() - start


async def leave(url: str, calls: list[Call]) -> None:
    """Clients that go after the first line of their answer."""
    async with client_of(Load()) as client:
        for call in calls:
            body = {"prompt": call.prompt, "max_tokens": call.new_tokens, "stream": True}
            async with client.stream("POST", f"{url}/v1/completions", json=body) as response:
                await anext(response.aiter_lines())
