"""Arguments and options that several sub-commands share."""

import contextlib
import os
import sys
from pathlib import Path
from typing import Annotated, TextIO

import typer

from sememe import storage
from sememe.errors import SememeError


def _json_target(context: typer.Context, path: Path | None) -> Path | TextIO | None:
    """Where JSON goes. A file that cannot be written is refused here, ahead of all work; beside
    JSON on stdout everything else goes to stderr."""
    if path is None:
        return None
    if str(path) != "-" and not _is_stdout(path):
        try:
            storage.check(path)
        except OSError as error:
            raise storage.unwritable(path, error) from error
        return path
    stdout = sys.stdout
    context.with_resource(contextlib.redirect_stdout(sys.stderr))
    return stdout


def _is_stdout(path: Path) -> bool:
    """/dev/stdout by any name: opened anew it would be cut off where it leads to a file."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(1))
    except OSError:
        return False


Json = Annotated[
    Path | None,
    typer.Option(
        "--json",
        metavar="FILE",
        callback=_json_target,
        help="Write the same as JSON; -: to stdout, and all else to stderr.",
    ),
]
Model = Annotated[
    str, typer.Argument(help="A run folder, a saved model folder, a base, or smollm2-135m-online.")
]
Rate = Annotated[
    float | None,
    typer.Option("--rate", metavar="R", help="The dial: concepts per token; default: as trained."),
]
Budget = Annotated[
    str | None,
    typer.Option(
        "--budget",
        metavar="N,N,…",
        help="Of a planner: concepts of each type of a plan at "
        "most, or one number for all; default: as trained.",
    ),
]


def counts(text: str | None, option: str, example: str) -> list[int]:
    """`2,4` → [2, 4]; nothing → []."""
    try:
        return [int(word) for word in text.split(",")] if text is not None else []
    except ValueError as error:
        raise SememeError(
            f"{option} {text!r}: need whole numbers with commas between them. try: {option} "
            f"{example}"
        ) from error


def numbers(text: str | None, option: str, example: str) -> list[float]:
    """`0.25,0.5` → [0.25, 0.5]; nothing → []."""
    try:
        return [float(word) for word in text.split(",")] if text is not None else []
    except ValueError as error:
        raise SememeError(
            f"{option} {text!r}: need numbers with commas between them. try: {option} {example}"
        ) from error
