"""The sub-command `benchmark`: speed and cache of a model beside its base."""

from typing import Annotated

import typer

from sememe.errors import SememeError
from sememe.options import Json, Model, Rate
from sememe.tables import show_compressor_speed, show_speed, write_json


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
        typer.Option(min=1, help="Counted rounds; the median is reported. Default: 5."),
    ] = None,
    training: Annotated[bool, typer.Option(help="Time the training step too.")] = True,
    data: Annotated[
        str | None, typer.Option(help="Text for the prompts; default: the run's held-out text.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16, for both.")] = "float32",
    rate: Rate = None,
    base: Annotated[str | None, typer.Option(help="Take the base from here instead.")] = None,
    json_file: Json = None,
) -> None:
    """Speed and cache beside the unmodified base: one process, same dtype and kernel, alternating,
    medians.

    Example: `sememe benchmark runs/demo --prompt-tokens 512 --new-tokens 128`

    Of a compressor: compressing beside one forward of the base over the same text, decompressing
    beside the base's own writing.
    """
    from sememe.evaluation.files import benchmark_files
    from sememe.evaluation.speed_compressor import BATCH, benchmark_compressor_files, is_compressor

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
            option = f"--{name.replace('_', '-')}"
            raise SememeError(
                f"got {option}, which is not for {what}: need the options of that. try: {instead}"
            )
