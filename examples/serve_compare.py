"""Bars of the server, each in rounds that take turns: beside `transformers serve` and `generate` of
the base (B1, B2), beside `generate` of the same model (B3), waiting rows (B4), how busy the engine
is (B5), one long prompt among running streams (B6), cache (B7), memory over thousands of requests
(B8), too many requests at once (S6), counts (S14). From the repository's root, on a quiet machine:

python examples/serve_compare.py                 # all figures, about an hour on two cores
python examples/serve_compare.py --quick         # every step once, on a tiny model: no figures
python examples/serve_compare.py --bars B1 B2 --beside http://127.0.0.1:8080

Without --model it is an untrained one over the base, 4/22/4 layers, R = 4, its gate calibrated on
data/train.txt: what it writes makes no difference to its speed. `--beside` takes another server of
OpenAI's completions, llama.cpp's for one. OUT is written after every bar.
"""

import argparse
import asyncio
import gc
import json
import os
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from statistics import median
from typing import Any

import httpx
import psutil
import torch
from serve_setup import (
    Metrics,
    crowded,
    leave,
    long_among,
    tiny_base,
    transformers_server,
    untrained,
    watched,
)

from sememe.engine import Engine, Request
from sememe.errors import SememeError
from sememe.evaluation.serving import (
    PATIENCE,
    Call,
    Load,
    alternating,
    calls_of,
    characters_per_token,
    job_of,
    round_figures,
    round_of,
    served,
)
from sememe.measure import Options, benchmark
from sememe.models.loading import load_base, load_model, load_tokenizer, resolve
from sememe.texts import read_texts

Figures = dict[str, Any]
BARS = ("B1", "B2", "B3", "B4", "B5", "B6", "B7", "B8", "S6", "S14")
SHAPES = {"B1": (256, 64), "B2": (64, 64)}


class Bars:
    def __init__(self, options: argparse.Namespace, stack: ExitStack):
        self.options, self.stack = options, stack
        self.folder = options.out.with_suffix("")
        self.folder.mkdir(parents=True, exist_ok=True)
        self.text = "\n\n".join(read_texts(options.data))
        self.training = options.train
        self.quick = options.quick
        self.repeats = 1 if options.quick else options.repeats

    # What is started once, and only if it is needed.

    @cache  # noqa: B019
    def tiny(self) -> str:
        base = tiny_base(self.folder / "tiny-base", self.options.base)
        return untrained(base, self.folder / "tiny", self.training)

    @cache  # noqa: B019
    def base(self) -> str:
        self.tiny()
        return str(self.folder / "tiny-base") if self.quick else self.options.base

    @cache  # noqa: B019
    def model(self) -> str:
        if self.quick:
            return self.tiny()
        named = self.options.model
        return named or untrained(self.options.base, self.folder / "model", self.training)

    @cache  # noqa: B019
    def ours(self) -> str:
        words = f"--rows 16 --deadline {PATIENCE} --queue-timeout {PATIENCE}".split()
        return self.stack.enter_context(served(self.model(), *words))

    @cache  # noqa: B019
    def theirs(self) -> str:
        log = self.folder / "transformers.log"
        return self.stack.enter_context(transformers_server(self.base(), log))

    @cache  # noqa: B019
    def characters(self, url: str) -> float:
        """Of a token; also the first request that a server gets."""
        return asyncio.run(characters_per_token(url, self.text, Load()))

    # Several beside each other.

    def generate(self, model, tokenizer, calls: list[Call], done: Callable[[], Any]) -> Figures:
        """All calls as one batch, padded on the left: no server."""
        tokenizer.padding_side, tokenizer.pad_token = "left", tokenizer.eos_token
        start = time.perf_counter()
        prompts = tokenizer([call.prompt for call in calls], return_tensors="pt", padding=True)
        new = calls[0].new_tokens
        options = {"min_new_tokens": new, "max_new_tokens": new, "do_sample": False}
        with torch.inference_mode():
            model.generate(**prompts, **options, pad_token_id=tokenizer.pad_token_id)
        seconds = time.perf_counter() - start
        for _ in calls:
            done()
        figures = {"round_seconds": seconds, "tokens_written": len(calls) * new}
        figures["output_tokens_per_s"] = len(calls) * new / seconds
        return figures | {"counted_by": "what generate was asked for", "statuses": {}}

    def busy(self, calls: list[Call], done: Callable[[], Any], load: Load) -> Figures:
        """A round of our server, and the share of it that its engine has worked for."""
        metrics = Metrics(self.ours())
        figures = job_of(self.ours(), load)(calls, done)
        names = [f"sememe_step_seconds_sum,{phase}" for phase in ("prefill", "decode")]
        return figures | {"engine_busy": metrics(*names) / figures["round_seconds"]}

    def streams(self, bar: str) -> tuple[Figures, dict[str, bool]]:
        prompt, new = SHAPES[bar]
        load = Load(16, (prompt, prompt), (new, new), repeats=self.repeats)
        if self.quick:
            load = replace(load, new_tokens=(8, 8))
        base = load_base(resolve(self.base())).eval()
        tokenizer = load_tokenizer(resolve(self.base()))
        jobs = {"transformers serve": job_of(self.theirs(), load)}
        jobs["sememe serve"] = partial(self.busy, load=load)
        jobs["generate of the base"] = partial(self.generate, base, tokenizer)
        jobs |= {url: job_of(url, load) for url in self.options.beside}
        for url in (self.theirs(), *self.options.beside):
            self.characters(url)
        figures = alternating(jobs, load, self.text, self.characters(self.ours()))
        theirs, ours, alone = figures["servers"][:3]

        def over(key: str, other: Figures = theirs) -> float:
            return ours[key]["median"] / other[key]["median"]

        speed, first = over("output_tokens_per_s"), over("first_token_p95")
        wanted, found = (1.6, 1.25)[bar == "B2"], {"first token p95 ≤ 1.1×": first <= 1.1}
        found[f"output ≥ {wanted}× transformers serve ({speed:.2f})"] = speed >= wanted
        if bar == "B1":
            beside = over("output_tokens_per_s", alone)
            found["first token ≤ 0.8×"] = over("first_token_median") <= 0.8
            found["gap p95 ≤ 0.8×"] = over("gap_p95") <= 0.8
            found[f"output ≥ 1.15× generate ({beside:.2f})"] = beside >= 1.15
        found["all answered"] = not any(x["failed"]["max"] for x in (theirs, ours))
        return figures, found

    def b3(self) -> tuple[Figures, dict[str, bool]]:
        """One stream beside `generate` of the same model."""
        load = Load(1, (64, 64), (64, 64), repeats=2 * self.repeats)
        jobs = {"generate": partial(self.generate, *load_model(self.model()))}
        jobs["sememe serve"] = job_of(self.ours(), load)
        figures = alternating(jobs, load, self.text, self.characters(self.ours()))
        share = figures["beside_the_first"][0]["output_tokens_per_s_ratio"]
        return figures, {f"one stream ≥ 95 % of generate ({share:.2f})": share >= 0.95}

    def b4(self) -> tuple[Figures, dict[str, bool]]:
        """Rows that wait for each other."""
        new = 8 if self.quick else 64
        options = Options(sweep=True, batch=16, new_tokens=new, repeats=2 * self.repeats)
        figures = benchmark(self.model(), 64, self.options.data, options)
        gain = figures["batches"][-1]["hold_gain"]
        return figures, {f"hold ≥ 1.10× at 16 rows ({gain:.2f})": gain >= 1.10}

    def b5(self) -> tuple[Figures, dict[str, bool]]:
        load = Load(16, (256, 256), (8, 8) if self.quick else (64, 64), repeats=self.repeats)
        jobs = {"sememe serve": partial(self.busy, load=load)}
        figures = alternating(jobs, load, self.text, self.characters(self.ours()))
        busy = figures["servers"][0]["engine_busy"]["median"]
        return figures, {f"engine busy ≥ 90 % ({busy:.0%})": busy >= 0.9}

    def b6(self) -> tuple[Figures, dict[str, bool]]:
        """One long prompt among 8 running streams."""
        url, size = self.ours(), self.characters(self.ours())
        streams = calls_of(Load(8, (64, 64), (128, 128)), self.text, size, 0)
        card = httpx.get(f"{url}/v1/models", trust_env=False).json()["data"][0]
        tokens = min(4000, round(0.9 * card["sememe"]["context"]) - 4)
        (long,) = calls_of(Load(1, (tokens, tokens), (4, 4)), self.text, size, 1)
        seen, metrics = asyncio.run(long_among(url, streams, long))
        prefill = [f"sememe_step_seconds_{part},prefill" for part in ("sum", "count")]
        chunk = metrics(prefill[0]) / metrics(prefill[1])
        *others, last = seen
        figures = round_figures(others)
        gaps = sorted(gap for x in others for gap in x.gaps)
        limit = 3 * figures["gap_median"] + chunk
        figures |= {"longest_gap": gaps[-1], "chunk_seconds": chunk, "limit": limit}
        figures["long_prompt_tokens"] = last.usage.get("prompt_tokens")
        good = gaps[-1] <= limit and {x.status for x in seen} == {"200"}
        return figures, {
            f"longest gap {gaps[-1]:.2f} s ≤ 3 × median + a chunk, {limit:.2f} s": good
        }

    def b7(self) -> tuple[Figures, dict[str, bool]]:
        """Keys and values of 16 rows of 1,024 tokens; prompts are read while others write, so what
        is written is long enough for all to be there at the same time."""
        url, load = self.ours(), Load(16, (880, 880), (144, 144))
        calls = calls_of(load, self.text, self.characters(url), 2)
        seen, sizes = asyncio.run(watched(url, calls, load))
        own, base = (
            sum(x.sememe.get(key, 0) for x in seen) for key in ("cache_bytes", "base_cache_bytes")
        )
        tokens = sum(x.usage.get("total_tokens", 0) for x in seen)
        figures = {"tokens": tokens, "base_cache_bytes": base, "cache_bytes": own}
        figures |= {"allocated_peak_bytes": max(sizes), "reduction_of_entries": base / own}
        figures["reduction"] = base / max(sizes)
        held = {f"cache ≥ 2.5× smaller, as allocated ({base / max(sizes):.2f})": base / max(sizes)}
        return figures, {name: value >= 2.5 for name, value in held.items()}

    # About the server, not the model: a tiny one.

    def b8(self) -> tuple[Figures, dict[str, bool]]:
        """Memory, files and slots over thousands of short requests."""
        count = 200 if self.quick else 10_000
        load = Load(count, (4, 32), (2, 16), streams=16)
        with served(self.tiny(), "--rows", "16") as url:
            size = asyncio.run(characters_per_token(url, self.text, load))
            server = max(psutil.Process().children(), key=lambda x: x.create_time())

            def state() -> tuple[int, int]:
                return server.memory_info().rss, server.num_fds()

            warm = replace(load, requests=max(100, count // 10))
            asyncio.run(round_of(url, calls_of(warm, self.text, size, 0), warm))
            before = state()
            seen = asyncio.run(round_of(url, calls_of(load, self.text, size, 1), load))
            time.sleep(1)
            after = state()
        growth, files = after[0] - before[0], after[1] - before[1]
        most, longest = self.slots(min(count, 1000), size)
        figures = round_figures(seen) | {"rss_growth_bytes": growth, "open_files_growth": files}
        figures |= {"shallow_slots": most, "longest_row": longest}
        return figures, {
            f"RSS growth {growth / 1e6:.1f} MB < 50 MB": growth < 50e6,
            f"open files +{files}": files <= 0,
            f"shallow slots {most} ≤ longest row {longest}": most <= longest,
            "all answered": figures["failed"] == 0,
        }

    def slots(self, count: int, size: float) -> tuple[int, int]:
        """The most slots that the shallow slice has used, and tokens of the longest row."""
        model, tokenizer = load_model(self.tiny())
        calls = calls_of(Load(count, (4, 32), (2, 16)), self.text, size, 2)
        requests = [Request(tokenizer(x.prompt).input_ids, x.new_tokens) for x in calls]
        with Engine(model, tokenizer) as engine:
            used: list[int] = []
            rows = engine.scheduler
            engine.observe(lambda _: used.append(rows.rows.cache.slices[0].used()))
            engine.generate(requests)
        return max(used), max(len(x.prompt) + x.max_tokens for x in requests)

    def s6(self) -> tuple[Figures, dict[str, bool]]:
        """Four times as many requests at once as there are places."""
        words = ["--rows", "2", "--queue", "6"] if self.quick else []
        with served(self.tiny(), *words) as url:
            places = httpx.get(f"{url}/v1/sememe/stats", trust_env=False).json()["places"]
            load = Load(4 * places, (8, 16), (64, 64))
            size = asyncio.run(characters_per_token(url, self.text, load))
            seen, times = asyncio.run(crowded(url, calls_of(load, self.text, size, 0), load))
        refused = [x for x in seen if x.status in ("429", "503")]
        slowest = max(times, default=float("inf"))
        figures = round_figures(seen) | {"places": places, "slowest_refusal": slowest}
        figures["refusal_median"] = median(times) if times else None
        answered = all(x.status == "200" or x in refused for x in seen)
        return figures, {
            "200, or 429 or 503 with Retry-After": answered and all(x.retry_after for x in refused),
            f"some are refused ({len(refused)})": bool(refused),
            f"refusals < 200 ms ({1000 * slowest:.0f})": slowest < 0.2,
        }

    def s14(self) -> tuple[Figures, dict[str, bool]]:
        """Counts of the server and of its clients: answered, invalid and cancelled requests."""
        count = 100 if self.quick else 1000
        load = Load(count, (4, 32), (2, 16), streams=16)
        with served(self.tiny()) as url:
            size = asyncio.run(characters_per_token(url, self.text, load))
            metrics = Metrics(url)
            calls = calls_of(load, self.text, size, 0)
            whole = [x if n % 9 else replace(x, new_tokens=0) for n, x in enumerate(calls)]
            gone = [replace(x, new_tokens=500) for x in whole[-count // 10 :]]
            seen = asyncio.run(round_of(url, whole[: -len(gone)], load))
            client = round_figures(seen)
            tokens = [f"sememe_{name}_tokens_total" for name in ("prompt", "generation")]
            server = [metrics(name) for name in tokens]
            asyncio.run(leave(url, gone))
            end = time.perf_counter() + 60
            names = {"ok": "200", "invalid": "400", "cancelled": None, "refused": "429"}
            while True:
                found = {x: metrics(f"sememe_requests_total,{x}") for x in names}
                idle = metrics.now()["sememe_requests_running"] == 0
                if (sum(found.values()) >= count and idle) or time.perf_counter() > end:
                    break
                time.sleep(0.1)
        statuses = client["statuses"]
        want = {x: statuses.get(status, 0) for x, status in names.items()}
        want["cancelled"] = len(gone)
        figures = {"clients": want, "server": found, "tokens": server}
        return figures, {
            f"requests by outcome {want}": want == found,
            "tokens": server == [client["tokens_read"], client["tokens_written"]],
            "no row is left": idle,
        }


def main(options: argparse.Namespace) -> dict[str, Any]:
    os.environ["OMP_NUM_THREADS"] = str(options.threads)  # of the servers
    torch.set_num_threads(options.threads)
    results: dict[str, Any] = {"quick": options.quick, "threads": options.threads}
    with ExitStack() as stack:
        bars = Bars(options, stack)
        for name in options.bars or BARS:
            measure = getattr(bars, name.lower(), None) or partial(bars.streams, name)
            figures, found = measure()
            gc.collect()  # models of this bar
            results[name] = {"bars": found} | figures
            options.out.write_text(json.dumps(results, indent=1), "utf-8")
            for sentence, good in found.items():
                print(f"{name}: {'yes' if good else 'NO'}: {sentence}", flush=True)
    return results


parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
)
parser.add_argument("--quick", action="store_true", help="on a tiny model, once: no figures")
parser.add_argument("--bars", nargs="+", choices=BARS, metavar="BAR", help="B1 to B8, S6, S14")
parser.add_argument("--model", help="an online model over --base; default: an untrained one")
parser.add_argument("--base", default="smollm2-135m")
parser.add_argument("--beside", nargs="+", default=[], metavar="URL", help="more servers")
parser.add_argument("--repeats", type=int, default=3, help="rounds; the median counts")
parser.add_argument("--threads", type=int, default=2, help="of every process")
parser.add_argument("--data", default="data/heldout.txt", help="text for the prompts")
parser.add_argument("--train", default="data/train.txt", help="text that codes start from")
parser.add_argument("--out", type=Path, default=Path("serve-compare.json"))
if __name__ == "__main__":
    try:
        main(parser.parse_args())
    except SememeError as error:
        sys.exit(f"error: {error}")
