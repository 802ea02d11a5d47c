"""Speed over a grid of prompt lengths, batches, rates and splits: each point beside the unmodified
base, and llama.cpp beside both where its Python package is installed. From the repository's root:

python examples/speed_grid.py runs/demo --prompt-lengths 128 512 --rates 0.5 0.25
python examples/speed_grid.py smollm2-135m --splits 4/22/4 8/14/8 --gguf smollm2-135m.gguf

A run is timed as it was trained. A base, or any model with --splits, stands for untrained models
over that base, with a concept every 1 / rate tokens: what they write makes no difference to their
speed. OUT is written after every point, and the same command goes on from there.
"""

import argparse
import itertools
import json
import sys
from collections import deque
from collections.abc import Callable
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from transformers import BatchEncoding

from sememe.backbone.bases import read_config
from sememe.errors import SememeError
from sememe.evaluation.speed import alternate, benchmark_online
from sememe.evaluation.subject import Options, Subject
from sememe.keys import split_layers
from sememe.models.configuration import OnlineConfig
from sememe.models.loading import (
    base_of,
    load_base,
    load_model,
    load_tokenizer,
    model_folder,
    resolve,
)
from sememe.models.online import OnlineForCausalLM

COLUMNS = ("prefill_speedup", "decode_speedup", "ceiling_decode_speedup", "cache_reduction")


def untrained(base, split: str | None, rate: float) -> OnlineForCausalLM:
    """An online model around `base` itself, which stays as it is: no LoRA, random codes."""
    layers = base.config.get_text_config().num_hidden_layers
    config = OnlineConfig(
        text_config=base.config.to_dict(),
        split=[int(part) for part in split.split("/")]
        if split
        else list(split_layers(None, layers)),
        rate=rate,
        boundary="fixed",
        # The stride is shorter: it never forces a concept.
        max_tail=max(16, round(1 / rate)),
        head="nearest",
        codes_per_concept=2,
        bridge=True,
        lora_rank=0,
    )
    config.check()
    config._attn_implementation = base.config._attn_implementation
    torch.manual_seed(0)
    model = OnlineForCausalLM(config, base).to(base.device).eval()
    model.bridge.to(base.dtype)
    ids_BT = torch.arange(1, 65, device=base.device).view(2, 32) % config.text_config.vocab_size
    with torch.no_grad():  # codes of the size of the states that they replace
        model.writer.codes.start_frame(model.shallow_states(ids_BT).flatten(0, 1))
    return model


class Grid:
    """What is timed: the base, and a concept model for each split and rate."""

    def __init__(self, options: argparse.Namespace):
        self.options, self.dtype = options, getattr(torch, options.dtype)
        folder = model_folder(options.model)
        named = getattr(read_config(folder), "base", None) if folder is not None else None
        self.trained = named is not None and not options.splits
        source = base_of(named) if named else resolve(options.model)
        self.tokenizer = load_tokenizer(source)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.base = load_base(source, dtype=self.dtype).to(device).eval()

    def model(self, split: str | None, rate: float) -> OnlineForCausalLM:
        if not self.trained:
            return untrained(self.base, split, rate)
        model, _ = load_model(self.options.model, dtype=self.dtype)
        model.dial.rate = rate
        return model

    def prompts(self, length: int, batch: int) -> BatchEncoding:
        subject = Subject("", self.base, self.tokenizer, {}, Options())
        return subject.prompts(self.options.data, length, batch)

    def point(self, split: str | None, rate: float, length: int, batch: int) -> dict[str, Any]:
        """Figures of one point, or the fault that it ran into."""
        try:
            prompts = self.prompts(length, batch)
            return benchmark_online(self.model(split, rate), self.base, prompts, self.options)
        except (SememeError, torch.OutOfMemoryError) as error:
            return {"fault": str(error).splitlines()[0]}

    def llama(self, length: int) -> dict[str, Any]:
        """llama.cpp on the GGUF file, batch 1, with torch's number of threads."""
        import llama_cpp

        new, threads = self.options.new_tokens, torch.get_num_threads()
        model = llama_cpp.Llama(
            model_path=str(self.options.gguf),
            n_ctx=length + new,
            n_threads=threads,
            n_threads_batch=threads,
            n_gpu_layers=-1 if torch.cuda.is_available() else 0,
            verbose=False,
        )
        ids = self.prompts(length, 1)["input_ids"][0].tolist()

        def write(count: int) -> None:
            model.reset()  # else it remembers the prompt and reads only what is new
            deque(islice(model.generate(ids, temp=0.0), count), maxlen=0)

        fill, whole = alternate([partial(write, 1), partial(write, new)], self.options.repeats)
        decoding = max(whole["median"] - fill["median"], 1e-9)
        return {
            "prefill_tokens_per_s": length / fill["median"],
            "decode_tokens_per_s": (new - 1) / decoding,
            "prefill_seconds": fill,
            "generate_seconds": whole,
        }


def main(options: argparse.Namespace) -> dict[str, Any]:
    results = json.loads(options.out.read_text("utf-8")) if options.out.is_file() else {}
    grid: Grid | None = None

    def measure(name: str, job: Callable[[Grid], dict[str, Any]]) -> None:
        nonlocal grid
        if name not in results or "fault" in results[name]:
            grid = grid or Grid(options)
            results[name] = job(grid)
            options.out.write_text(json.dumps(results, indent=1), "utf-8")
        figures = results[name]
        cells = (f"{key} {figures[key]:.2f}" for key in COLUMNS if key in figures)
        print(f"{name}: {figures.get('fault') or ', '.join(cells)}")

    shape = (options.rates, options.prompt_lengths, options.batches)
    for split, *values in itertools.product(options.splits or [None], *shape):
        rate, length, batch = values
        name = f"split {split or 'its own'}, rate {rate:g}, prompt {length}, batch {batch}"
        measure(name, lambda grid, at=(split, *values): grid.point(*at))
    for length in options.prompt_lengths if options.gguf else ():
        measure(f"llama.cpp, prompt {length}", lambda grid, length=length: grid.llama(length))
        speed = results[f"llama.cpp, prompt {length}"]["decode_tokens_per_s"]
        print(f"  {speed:.1f} tokens/s decoding")
    return results


parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
)
parser.add_argument("model", help="a run, a saved model or a base")
parser.add_argument("--prompt-lengths", type=int, nargs="+", default=[128, 512, 2048])
parser.add_argument("--batches", type=int, nargs="+", default=[1])
parser.add_argument("--rates", type=float, nargs="+", default=[0.5, 0.25, 0.125])
parser.add_argument("--splits", nargs="+", metavar="S/M/D", help="of untrained models")
parser.add_argument("--new-tokens", type=int, default=64)
parser.add_argument("--repeats", type=int, default=3, help="rounds; the median counts")
parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
parser.add_argument("--data", help="text for the prompts; default: random tokens")
parser.add_argument("--gguf", type=Path, help="time llama.cpp on this file too")
parser.add_argument("--out", type=Path, default=Path("speed-grid.json"))
if __name__ == "__main__":
    try:
        main(parser.parse_args())
    except SememeError as error:
        sys.exit(f"error: {error}")
