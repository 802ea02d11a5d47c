"""Every argument and option of the command line, once: its type, its limits and its help."""

import contextlib
import os
import sys
from pathlib import Path
from typing import Annotated, TextIO

import typer
from typer import Argument, Option

from sememe import storage
from sememe.errors import SememeError


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
        return [float(word) for word in text.split(",")] if text is not None else []
    except ValueError as error:
        raise SememeError(
            f"--rate {text!r}: need numbers with commas between them. try: --rate 0.25,0.5"
        ) from error


Model = Annotated[
    str, Argument(help="A run folder, a saved model folder, a base, or smollm2-135m-online.")
]
BaseName = Annotated[str | None, Argument(help="A known base; without it, all are listed.")]
Recipe = Annotated[Path, Argument(help="A recipe, see recipes/.")]
Overrides = Annotated[
    list[str] | None, Argument(metavar="[KEY=VALUE]...", help="Dotted keys of the recipe.")
]
Grid = Annotated[
    list[str] | None,
    Argument(metavar="[KEY=A,B,C]...", help="Dotted keys; a value with commas stays whole in []."),
]
TextFile = Annotated[str, Argument(metavar="TEXT", help="A text, as for ablate --data.")]
Codes = Annotated[Path, Argument(metavar="CODES", help="What sememe compress wrote.")]
Run = Annotated[Path, Argument(help="A run folder, finished or not.")]
Runs = Annotated[
    list[Path],
    Argument(
        metavar="RUN_OR_SWEEP...",
        help="A run folder or a sweep's; more of them are drawn beside the first.",
    ),
]

Json = Annotated[
    Path | None,
    Option(
        "--json",
        metavar="FILE",
        callback=_json_target,
        help="Write the same as JSON; -: to stdout, and all else to stderr.",
    ),
]
OutRun = Annotated[
    Path, Option(metavar="RUN", help="Run folder: new, or an unfinished run to resume.")
]
OutSweep = Annotated[
    Path, Option(metavar="FOLDER", help="Folder of the runs: new, or a sweep to resume.")
]
OutCodes = Annotated[Path, Option(metavar="CODES", help="A new file, as codes.json.")]
OutText = Annotated[
    Path | None,
    Option(metavar="TEXT", help="A new .jsonl, or text alone in any other. Default: the terminal."),
]
OutModel = Annotated[Path, Option(metavar="DIR", help="A new folder.")]
WithBaselines = Annotated[
    bool, Option("--control", help="Train control, skip and window too, to compare with.")
]

Data = Annotated[
    str | None,
    Option(
        metavar="TEXT",
        help="Held-out text: .txt, .jsonl[#field], .parquet[#field] or a datasets id. Default: "
        "that of the run.",
    ),
]
SeveralData = Annotated[
    list[str] | None, Option(metavar="TEXT", help="As for ablate; several times: text by text.")
]
Tokens = Annotated[int, Option(min=16, help="Tokens to measure on.")]
Control = Annotated[str | None, Option(metavar="MODEL2", help="Same LoRA without concepts.")]
Rate = Annotated[
    str | None,
    Option(
        metavar="R",
        callback=_numbers,
        help="Concepts per token at inference; of a planner N,N: concepts of each type at most. "
        "Default: as trained.",
    ),
]
Rates = Annotated[
    str | None,
    Option(
        "--rate",
        metavar="R[,R…]",
        callback=_numbers,
        help="As for generate; several: a table over these rates, beside the rate as trained.",
    ),
]
Search = Annotated[
    int,
    Option(
        min=0,
        help="Of a planner: rounds of search for the best plans z*; 0 leaves them out, which is "
        "much faster.",
    ),
]
Answers = Annotated[
    bool,
    Option(
        "--answers",
        help="Of pairs: write each target too, and count exact matches of the final sentence.",
    ),
]
Signals = Annotated[
    int,
    Option(
        min=0,
        metavar="N",
        help="Of a planner: what plans tell of length, kind, names, numbers and key words, by "
        "linear probes fitted on N training pairs.",
    ),
]
Online = Annotated[
    str | None,
    Option(
        metavar="MODEL2",
        help="An online model over the same base: the online vs offline gap, at equal rate.",
    ),
]
Beams = Annotated[
    int | None,
    Option(min=1, help="Hypotheses of the beam search; 1 is the fastest. Default: 16."),
]

PromptTokens = Annotated[
    int | None, Option(min=2, help="Default: 512; of a compressor those of a window.")
]
TimedTokens = Annotated[
    int, Option(min=2, help="Tokens to write; a compressor writes the text again.")
]
Batch = Annotated[int | None, Option(min=1, help="Default: 1; of a compressor 16 windows.")]
Repeats = Annotated[int, Option(min=1, help="Counted rounds; the median is reported.")]
Dtype = Annotated[str, Option(help="float32 or bfloat16, for both.")]

Prompt = Annotated[str, Option(help="Text to go on from.")]
MaxNewTokens = Annotated[int, Option(min=1)]
Temperature = Annotated[float, Option(min=0.0, help="0 is greedy.")]
Seed = Annotated[int, Option(min=0)]
ShowConcepts = Annotated[
    bool,
    Option("--show-concepts", help="Mark each segment and its concept; of a planner its plan."),
]
Edits = Annotated[
    list[str] | None,
    Option(
        metavar="TYPE:SLOT=ID",
        help="Change a concept of the plan and print both texts; may be given several times.",
    ),
]
