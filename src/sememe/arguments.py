"""Every argument and option of the command line, once: its type, its help and its limits."""

import contextlib
import inspect
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TextIO

import typer

from sememe import storage
from sememe.errors import SememeError


def argument(kind: Any, help: str, metavar: str | None = None) -> Any:
    return Annotated[kind, typer.Argument(help=help, metavar=metavar)]


def option(kind: Any, help: str, *names: str, **limits: Any) -> Any:
    return Annotated[kind, typer.Option(*names, help=help, **limits)]


def _json_target(context: typer.Context, path: Path | None) -> Path | TextIO | None:
    """Where JSON goes. A file that cannot be written is refused here, before all work; beside JSON
    on stdout everything else goes to stderr."""
    if path is None:
        return None
    # /dev/stdout by any name: opened anew it would be cut off where it leads to a file.
    with contextlib.suppress(OSError):
        if str(path) == "-" or os.path.samestat(os.stat(path), os.fstat(1)):
            stdout = sys.stdout
            context.with_resource(contextlib.redirect_stdout(sys.stderr))
            return stdout
    storage.check(path)
    return path


def _numbers(text: str | None) -> list[float]:
    """`0.25,0.5` → [0.25, 0.5]; nothing → []."""
    try:
        return [float(word) for word in text.split(",")] if text else []
    except ValueError as error:
        raise SememeError(
            f"--rate {text!r}: need numbers with commas between them. try: --rate 0.25,0.5"
        ) from error


def _lengths(context: typer.Context, option: typer.CallbackParam, text: str | None):
    """`256` → (256, 256), `64-256` → (64, 256)."""
    if text is None:
        return None
    name, match = option.opts[0], re.fullmatch(r"(\d{1,7})(?:-(\d{1,7}))?", text)
    low, high = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if not 2 <= low <= high:
        raise SememeError(
            f"{name} {text!r}: need a number from 2 on, or two with - between them. try: {name} 256"
        )
    return low, high


def expand(command: Callable, parameters: dict[str, tuple[Any, Any]]) -> None:
    """Gives a command that takes `**options` the signature which typer reads: each parameter by
    name, with its type and its default; `...` for none."""
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    command.__signature__ = inspect.Signature(
        [
            inspect.Parameter(name, kind, default=default, annotation=annotation)
            for name, (annotation, default) in parameters.items()
        ]
    )
    command.__annotations__ = {name: annotation for name, (annotation, _) in parameters.items()}


Model = argument(str, "A run folder, a saved model folder, a base, or smollm2-135m-online.")
BaseName = argument(str, "A known base; without it, all are listed.")
Recipe = argument(Path, "A recipe, see recipes/.")
Overrides = argument(list[str], "Dotted keys of the recipe.", "[KEY=VALUE]...")
Grid = argument(list[str], "Dotted keys; a value with commas stays whole in [].", "[KEY=A,B,C]...")
TextFile = argument(str, "A text, as for ablate --data.", "TEXT")
Sources = argument(
    list[str], "Texts: .txt, .jsonl[#field], .parquet[#field], in this order.", "TEXT..."
)
Codes = argument(Path, "What sememe compress wrote.", "CODES")
Run = argument(Path, "A run folder, finished or not.")
Runs = argument(
    list[Path],
    "A run folder or a sweep's; more of them are drawn beside the first.",
    "RUN_OR_SWEEP...",
)

Json = option(
    Path,
    "Write the same as JSON; -: to stdout, and all else to stderr.",
    "--json",
    metavar="FILE",
    callback=_json_target,
)
OutRun = option(Path, "Run folder: new, or an unfinished run to resume.", metavar="RUN")
Force = option(bool, "Resume although recipe, base or texts have changed.", "--force")
Sharded = option(
    bool, "Under torchrun: each process holds a part of the base's layers (FSDP2).", "--sharded"
)
OutSweep = option(Path, "Folder of the runs: new, or a sweep to resume.", metavar="FOLDER")
OutCodes = option(Path, "A new file, as codes.json.", metavar="CODES")
OutText = option(
    Path, "A new .jsonl, or text alone in any other. Default: the terminal.", metavar="TEXT"
)
OutShards = option(Path, "A new folder, or an unfinished one to go on with.", metavar="FOLDER")
OutModel = option(Path, "A new folder.", metavar="DIR")
WithBaselines = option(bool, "Train control, prune and window too, to compare with.", "--control")

Data = option(
    str,
    "Held-out text: .txt, .jsonl[#field], .parquet[#field] or a datasets id. Default: that of the "
    "run.",
    metavar="TEXT",
)
SeveralData = option(list[str], "As for ablate; several times: text by text.", metavar="TEXT")
Tokens = option(int, "Tokens to measure on.", min=16)
Control = option(str, "Same LoRA without concepts.", metavar="MODEL2")
Rate = option(
    str,
    "Concepts per token at inference; of a planner N,N: concepts of each type at most. Default: as "
    "trained.",
    metavar="R",
    callback=_numbers,
)
Rates = option(
    str,
    "As for generate; several: a table over these rates, beside the rate as trained.",
    "--rate",
    metavar="R[,R…]",
    callback=_numbers,
)
Search = option(
    int,
    "Of a planner: rounds of search for the best plans z*; 0 leaves them out, which is much "
    "faster.",
    min=0,
)
Answers = option(
    bool,
    "Of pairs: write each target too, and count exact matches of the final sentence.",
    "--answers",
)
Signals = option(
    int,
    "Of a planner: what plans tell of length, kind, names, numbers and key words, by linear probes "
    "fitted on N training pairs.",
    min=0,
    metavar="N",
)
Online = option(
    str,
    "An online model over the same base: the online vs offline gap, at equal rate.",
    metavar="MODEL2",
)
Bins = option(
    str,
    "A compressor with content: bins over the same base, for the table of other coders.",
    metavar="MODEL2",
)
Beams = option(int, "Hypotheses of the beam search; 1 is the fastest. Default: 16.", min=1)

PromptTokens = option(
    str,
    "Default: 512, of a server 256; of a compressor those of a window. N-M: from N to M, of "
    "servers.",
    metavar="N",
    callback=_lengths,
)
TimedTokens = option(
    str,
    "Tokens to write; a compressor writes the text again. N-M: as above. Default: 64.",
    metavar="N",
    callback=_lengths,
)
Batch = option(
    int, "Default: 1; of a compressor 16 windows, of a server 16 requests a round.", min=1
)
Repeats = option(int, "Counted rounds; the median is reported.", min=1)
Dtype = option(str, "float32 or bfloat16, for both.")
Sweep = option(
    bool,
    "Of an online model: batches of 1, 4, 16 (or up to --batch) rows, in phase and out of it.",
    "--sweep",
)
Servers = option(
    list[str],
    "Time a server of OpenAI's completions; of a model one is started. Several times: in turn.",
    "--serve",
    metavar="URL|MODEL",
)
Arrivals = option(
    float, "Requests per second, at random times. Default: all at once.", min=0.001, metavar="R"
)

Workers = option(
    int,
    "Processes that share the work, each with the model; more than 1 need Ray. The same command "
    "goes on where it was killed.",
    min=1,
    max=64,
)

LocalWorkers = option(int, "Processes that share the work.", min=1, max=256)
Documents = option(
    bool,
    "Train on it document by document, a row each and padded: attention, segments and the gate "
    "restart with each. Else documents share rows.",
    "--documents",
)
TokenizerOf = option(str, "A known base, a local folder, or a Hub id: whose tokenizer.")

Prompt = option(str, "Text to go on from.")
MaxNewTokens = option(int, "Tokens to write at most.", min=1)
Temperature = option(float, "0 is greedy.", min=0.0)
Seed = option(int, "Of what is drawn.", min=0)
ShowConcepts = option(
    bool, "Mark each segment and its concept; of a planner its plan.", "--show-concepts"
)
Edits = option(
    list[str],
    "Change a concept of the plan and print both texts; may be given several times.",
    metavar="TYPE:SLOT=ID",
)
CacheFile = option(
    Path,
    "Of an online model: go on from the text in this file, if it is there, and put this one's into "
    "it.",
    metavar="FILE",
)

Host = option(str, "Address to listen at; any but this machine's own needs a key.")
Port = option(int, "0: one that is free.", min=0, max=65535)
KeyFile = option(
    Path,
    "A file with the key that clients send. Default: that in SEMEME_API_KEY, or none.",
    metavar="FILE",
)
NoKey = option(bool, "Serve other machines without a key.", "--no-key")
Replicas = option(
    int, "Processes that serve, each with the model; more than 1 need Ray.", min=1, max=64
)
Rows = option(int, "Requests that run at the same time, in each process.", min=1)
Queue = option(int, "Requests that wait beside them; more are refused.", min=0)
CacheMemory = option(
    float,
    "Keys and values of all rows and processes, in GB at most. Default: a quarter of the memory "
    "that is free.",
    min=0.001,
    metavar="GB",
)
Deadline = option(float, "Seconds that an answer may take.", min=0.1)
QueueTimeout = option(float, "Seconds that a request may wait for a row.", min=0.1)
Drain = option(float, "Seconds that running requests have after Ctrl-C or SIGTERM.", min=0)

Gpu = option(str, "h100, h200, a100, rtx4090, or cpu: this machine, which is measured.")
Gpus = option(int, "How many.", min=1)
PlannedTokens = option(float, "Tokens to train on.", "--tokens", min=1)
Hourly = option(float, "Price of a GPU for an hour. Default: no cost.", min=0)
Context = option(int, "Tokens of a text that is served.", min=16)
