"""Sub-commands of the compressor: text ⇄ files of concept ids, and how much comes back."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from sememe.console import say, write
from sememe.options import Json, Rate, numbers
from sememe.tables import figure, show_reconstruction, table, write_json

Compressor = Annotated[
    str, typer.Argument(metavar="MODEL", help="A run of system: compressor, or its saved model.")
]
Batch = Annotated[int, typer.Option(min=1, help="Windows at a time.")]
Beams = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Hypotheses of the beam search; 1 is the fastest. Default: as the model has it, 16.",
    ),
]
Base = Annotated[str | None, typer.Option(help="Take the base from here instead.")]


def compress(
    model: Compressor,
    file: Annotated[
        str,
        typer.Argument(
            metavar="FILE", help="Text: .txt, .jsonl[#field], .parquet[#field] or a datasets id."
        ),
    ],
    to: Annotated[Path, typer.Option("--out", metavar="CODES", help="A new file, as codes.json.")],
    window: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Tokens compressed together, at most; default: the run's sequence_length.",
        ),
    ] = None,
    batch: Batch = 16,
    rate: Rate = None,
    base: Base = None,
    json_file: Json = None,
) -> None:
    """Turn text into concept ids: a JSON file with the ids and the characters of every window.

    Example: `sememe compress runs/compressor data/heldout.txt --out codes.json`

    Documents are cut into windows without overlap, at token ends that are character ends: put
    together, the windows are the document."""
    from sememe.codes import compress_file

    found = compress_file(model, file, to, window, batch, rate, base)
    write_json(json_file, found)
    table(
        [(key, value) for key, value in found.items() if key not in ("model", "data", "out")],
        f"{model} on {file}",
        ("measure", "value"),
    )
    say(f"codes: {to}")


def decompress(
    model: Compressor,
    codes: Annotated[Path, typer.Argument(metavar="CODES", help="What sememe compress wrote.")],
    to: Annotated[
        Path | None,
        typer.Option(
            "--out",
            metavar="TEXT",
            help="A new .jsonl, or .txt for a single document; default: the terminal.",
        ),
    ] = None,
    batch: Batch = 16,
    beams: Beams = None,
    base: Base = None,
    json_file: Json = None,
) -> None:
    """Turn concept ids back into text, with the very model that wrote them.

    Example: `sememe decompress runs/compressor codes.json --out back.txt`"""
    from sememe.codes import decompress_file

    found, text = decompress_file(model, codes, to, batch, base, beams)
    write_json(json_file, found)
    if to is None:  # the text alone on stdout, for pipes
        write(text)
        print(
            "\n"
            + ", ".join(
                f"{key} {figure(value)}"
                for key, value in found.items()
                if isinstance(value, (int, float))
            ),
            file=sys.stderr,
        )
    else:
        table(
            [(key, value) for key, value in found.items() if key not in ("model", "codes", "out")],
            f"{model} on {codes}",
            ("measure", "value"),
        )
        say(f"text: {to}")


def reconstruct(
    model: Compressor,
    data: Annotated[str, typer.Option(help="Held-out text, as for evaluate.")],
    tokens: Annotated[int, typer.Option(min=16, help="Tokens to measure on.")] = 4096,
    window: Annotated[
        int | None,
        typer.Option(min=8, help="Tokens of a window; default: that of the run, or 512."),
    ] = None,
    rates: Annotated[
        str | None,
        typer.Option(metavar="R,R,…", help="Rate and distortion at these settings of the dial."),
    ] = None,
    context: Annotated[
        int | None,
        typer.Option(min=0, help="To go on from; default: 512 or what fits, 0 for none."),
    ] = None,
    questions: Annotated[
        str | None, typer.Option(metavar="FILE.jsonl", help="Lines of context, question, answers.")
    ] = None,
    online: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL2",
            help="An online model over the same base: what being online costs, at the same rate.",
        ),
    ] = None,
    batch: Batch = 16,
    beams: Beams = None,
    base: Base = None,
    json_file: Json = None,
) -> None:
    """How much of a text comes back from its concept ids alone, and for how many bits.

    Example: `sememe reconstruct runs/compressor --data data/heldout.txt --rates 0.25,0.33,0.5`

    Beside an online model: `sememe reconstruct runs/compressor --data data/heldout.txt --online
    runs/r2`"""
    from sememe.evaluation.reconstruction import reconstruct_files

    dial = numbers(rates, "--rates", "0.25,0.33,0.5")
    result = reconstruct_files(
        model, data, tokens, window, dial, context, batch, base, questions, online, beams
    )
    write_json(json_file, result, lambda: show_reconstruction(result))
