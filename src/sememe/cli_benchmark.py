"""The sub-command `benchmark`: speed and cache of one model, of a compressor, or over a grid."""

from pathlib import Path
from typing import Annotated

import typer

from sememe.console import say
from sememe.errors import SememeError
from sememe.options import Json, Model, Rate
from sememe.tables import show_compressor_speed, show_speed, show_speed_sweep, write_json


def benchmark(
    context: typer.Context,
    model: Model,
    prompt_tokens: Annotated[
        int | None,
        typer.Option(
            min=2,
            help="Default: 512; of a compressor the tokens of a window, as compress has them.",
        ),
    ] = None,
    new_tokens: Annotated[
        int, typer.Option(min=2, help="A compressor writes what its ids say instead.")
    ] = 64,
    batch: Annotated[
        int | None, typer.Option(min=1, help="Default: 1; of a compressor 16 windows.")
    ] = None,
    repeats: Annotated[
        int | None,
        typer.Option(
            min=1, help="Counted rounds; the median is reported. Default: 5, with --sweep 3."
        ),
    ] = None,
    training: Annotated[bool, typer.Option(help="Time the training step too.")] = True,
    data: Annotated[
        str | None, typer.Option(help="Text for the prompts; default: the run's held-out text.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16, for both.")] = "float32",
    rate: Rate = None,
    base: Annotated[str | None, typer.Option(help="Take the base from here instead.")] = None,
    sweep: Annotated[
        bool,
        typer.Option("--sweep", help="Time a grid of the four options below; MODEL may be a base."),
    ] = False,
    prompt_lengths: Annotated[
        str, typer.Option(metavar="T,T,…", help="Default: 128,512,2048.")
    ] = "",
    batches: Annotated[str, typer.Option(metavar="B,B,…", help="Default: 1.")] = "",
    rates: Annotated[str, typer.Option(metavar="R,R,…", help="Default: 0.5,0.25,0.125.")] = "",
    splits: Annotated[
        str,
        typer.Option(
            metavar="S/M/D,…",
            help="Of untrained models over the base; default: MODEL's own, "
            "of a base 2/15 at each edge.",
        ),
    ] = "",
    folder: Annotated[
        Path | None,
        typer.Option(
            "--out",
            metavar="FOLDER",
            help="Where sweep.json and speed.html go; default: the run, or benchmark-sweep.",
        ),
    ] = None,
    json_file: Json = None,
) -> None:
    """Speed and cache beside the unmodified base: one process, same dtype and kernel, alternating,
    medians.

    Example: `sememe benchmark runs/demo --prompt-tokens 512 --new-tokens 128`

    Of a compressor: compressing beside one forward of the base over the same text, decompressing
    beside the base's own writing.

    A grid, with llama.cpp beside where it is installed; the same command goes on after Ctrl-C:
    `sememe benchmark smollm2-135m --sweep --rates 0.5,0.25 --splits 4/22/4,8/14/8`
    """
    from sememe.evaluation.files import benchmark_files
    from sememe.evaluation.speed_compressor import BATCH, benchmark_compressor_files, is_compressor

    of_one = {
        "prompt_tokens": "--prompt-lengths",
        "batch": "--batches",
        "rate": "--rates",
        "training": "without it",
    }
    of_sweep = dict.fromkeys(("prompt_lengths", "batches", "rates", "splits", "folder"), "--sweep")
    _refuse(context, of_one if sweep else of_sweep, "a grid" if sweep else "one measurement")
    if sweep:
        _benchmark_sweep(
            model,
            folder,
            (prompt_lengths, batches, rates, splits),
            new_tokens,
            repeats or 3,
            dtype,
            data,
            base,
            json_file,
        )
        return
    show = show_speed
    if is_compressor(model):
        _refuse(context, {"new_tokens": "without it", "training": "without it"}, "a compressor")
        result = benchmark_compressor_files(
            model, prompt_tokens, batch or BATCH, repeats or 5, data, dtype, base, rate
        )
        show = show_compressor_speed
    else:
        result = benchmark_files(
            model,
            prompt_tokens or 512,
            new_tokens,
            batch or 1,
            repeats or 5,
            training,
            data,
            dtype,
            base,
            rate,
        )
    write_json(json_file, result, lambda: show(result))


def _refuse(context: typer.Context, options: dict[str, str], what: str) -> None:
    """Raises SememeError for an option of the command line that says nothing about `what`;
    `options`: what to try instead."""
    for name, instead in options.items():
        if context.get_parameter_source(name).name == "COMMANDLINE":
            option = "--out" if name == "folder" else f"--{name.replace('_', '-')}"
            raise SememeError(
                f"got {option}, which is not for {what}: need the options of that. try: {instead}"
            )


def _benchmark_sweep(
    model: str,
    folder: Path | None,
    grid: tuple[str, str, str, str],
    new_tokens: int,
    repeats: int,
    dtype: str,
    data: str | None,
    base: str | None,
    json_file: Path | None,
) -> None:
    from sememe.evaluation.speed_sweep import parse_grid, place_for, sweep_speed
    from sememe.report import write_speed

    folder = folder or place_for(model)
    found = sweep_speed(
        model, folder, parse_grid(*grid), new_tokens, repeats, dtype, data, base, say=say
    )
    write_json(json_file, found, lambda: show_speed_sweep(found))
    say(f"figures: {folder / 'sweep.json'}\nplot: {write_speed(folder)}")
