"""Arguments and options that several sub-commands share."""

from pathlib import Path
from typing import Annotated

import typer

from sememe.errors import SememeError

Json = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the same as JSON.")]
Model = Annotated[str, typer.Argument(help="A run folder, a saved model folder, a base, or smollm2-135m-online.")]
Rate = Annotated[float | None, typer.Option("--rate", metavar="R", help="The dial: concepts per token; default: as trained.")]
Budget = Annotated[str | None, typer.Option("--budget", metavar="N,N,…", help="Of a planner: concepts of each type of a plan at "
                                            "most, or one number for all; default: as trained.")]


def counts(text: str | None, option: str, example: str) -> list[int]:
    """`2,4` → [2, 4]; nothing → []."""
    try:
        return [int(word) for word in text.split(",")] if text is not None else []
    except ValueError as error:
        raise SememeError(f"{option} {text!r}: need whole numbers with commas between them. try: {option} {example}") from error


def numbers(text: str | None, option: str, example: str) -> list[float]:
    """`0.25,0.5` → [0.25, 0.5]; nothing → []."""
    try:
        return [float(word) for word in text.split(",")] if text is not None else []
    except ValueError as error:
        raise SememeError(f"{option} {text!r}: need numbers with commas between them. try: {option} {example}") from error
