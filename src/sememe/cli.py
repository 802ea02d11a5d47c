"""The command line. A command imports what it needs when it runs, so that `--help` is instant."""

import contextlib
import functools
import inspect
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

import sememe
from sememe import arguments
from sememe.cli_benchmark import benchmark
from sememe.cli_plan import plan
from sememe.cli_serve import serve
from sememe.cli_tokenize import tokenize
from sememe.errors import Interrupted, SememeError
from sememe.locks import LOCK, only_user
from sememe.storage import unusable
from sememe.terminal import (
    replace_unencodable,
    say,
    show_diagnosis,
    show_figures,
    show_records,
    table,
    write,
    write_json,
)

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
# OpenMP's threads wait for each other in a loop that takes a core from whoever shares it: on a busy
# machine half of all time.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)


def main() -> None:
    """Entry point: a fault of the input or of a path is one sentence and exit code 1."""
    replace_unencodable()
    try:
        app()
    except SememeError as error:
        label = "" if isinstance(error, Interrupted) else "error: "
        _fail(f"{label}{error}", error.exit_code)
    except OSError as error:
        if error.errno is None:  # not of the operating system: a fault of the program
            raise
        _fail(f"error: {unusable(error)}", 1)


def _fail(line: str, code: int) -> None:
    print(line, file=sys.stderr)
    sys.exit(code)


def _version(wanted: bool) -> None:
    if wanted:
        say(f"sememe {sememe.__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    """Concept-token language models: part of a pretrained LM works on discrete concepts that it
    writes for itself."""


def command(function: Callable[..., Iterator[Any]]) -> Callable[..., None]:
    """Adds a command: a generator that yields its result once and then prints it.

    `--json` is written in between: neither a terminal that cannot show something nor a full disk
    costs both."""

    def run(json_file: arguments.Json = None, **options: Any) -> None:
        steps = function(**options)
        result = next(steps)
        try:
            if json_file is not None:
                write_json(json_file, result)
        except (OSError, SememeError):
            with contextlib.suppress(typer.Exit):  # what `doctor` finds is no other fault
                next(steps, None)
            raise
        next(steps, None)

    own = inspect.signature(run).parameters["json_file"]
    functools.update_wrapper(run, function)
    signature = inspect.signature(function)
    parameters = [*signature.parameters.values(), own]
    if "shared" in signature.parameters:  # work that several processes can share
        parameters.remove(signature.parameters["shared"])
        parameters.append(own.replace(name="workers", default=1, annotation=arguments.Workers))
    run.__signature__ = signature.replace(parameters=parameters)
    run.__annotations__ = {x.name: x.annotation for x in parameters}
    return app.command()(run)


@command
def pull(
    name: arguments.BaseName = None,
):
    """Get a base model and keep it: verified, dequantised to safetensors once. For a concept model
    that comes with Sememe, its base.

    Example: `sememe pull smollm2-135m-online`"""
    from sememe.backbone import bases
    from sememe.models.loading import shipped
    from sememe.report.files import read_json

    listed = {key: vars(base) for key, base in bases.KNOWN.items()}
    for key, folder in shipped().items():
        config = read_json(folder / "config.json")
        about = f"{config['base']} with concepts, rate {config['rate']:g}"
        listed[key] = listed[config["base"]] | {"description": about}
    if name is None:
        rows = [base | {"name": key} for key, base in listed.items()]
        yield rows
        title = "known bases (elsewhere a base is a Hub id or a local folder)"
        show_records(rows, title, ("name", "layers", "licence", "description"))
        return
    base = listed[name]["name"] if name in listed else name
    folder = bases.pull(base)
    yield {"name": base, "folder": str(folder), "sha256": bases.fingerprint(folder)}
    say(f"{base} is at {folder}")


command(tokenize)


@command
def train(
    recipe: arguments.Recipe,
    overrides: arguments.Overrides = None,
    out: arguments.OutRun = Path("runs/last"),
    force: arguments.Force = False,
    sharded: arguments.Sharded = False,
):
    """Train a recipe into a run folder. The same command resumes after Ctrl-C.

    Example: `sememe train recipes/demo.yaml steps=200 --out runs/r2`

    Its control, on the same batches: `sememe train recipes/demo.yaml steps=200 system=control --out
    runs/r2-control`
    """
    from sememe.options import load_recipe
    from sememe.report.files import last_values, read_metrics

    loaded = load_recipe(recipe, overrides or [])
    say(loaded.yaml(whole=False), "dim")
    with only_user(out):  # known before torch is imported, which takes seconds
        from sememe.training.run import train as run_training

        model = run_training(loaded, out, say=say, force=force, sharded=sharded)
    if os.environ.get("RANK", "0") != "0":  # the first of several processes writes and prints
        raise typer.Exit
    last = last_values(read_metrics(out))
    yield {"run": str(out), "model": str(model), **last}
    show_figures(last, str(out))
    say(f"model: {model}")


@command
def sweep(
    recipe: arguments.Recipe,
    grid: arguments.Grid = None,
    out: arguments.OutSweep = Path("runs/sweep"),
    control: arguments.WithBaselines = False,
    tokens: arguments.Tokens = 8192,
):
    """Train and measure a grid over recipe keys; one run folder a point, one table and one page.
    Over seeds: `seed=0,1,2`. The same command resumes after Ctrl-C.

    Example: `sememe sweep recipes/demo.yaml rate=0.5,0.25 steps=40 --control --out runs/rates`"""
    with only_user(out):
        from sememe import sweep as sweeps
        from sememe.report import write_report

        result = sweeps.sweep(recipe, grid or [], out, control, tokens, say=say)
    yield result
    table(*sweeps.as_table(result))
    say(f"figures: {out / 'sweep.json'}\nplot: {write_report(out)}")
    sweeps.check_faults(result)


@command
def evaluate(
    model: arguments.Model,
    data: arguments.SeveralData = None,
    tokens: arguments.Tokens = 8192,
    control: arguments.Control = None,
    rate: arguments.Rates = None,
    search: arguments.Search = 3,
    answers: arguments.Answers = False,
    signals: arguments.Signals = 0,
    **shared: int,
):
    """Held-out quality, the gate running free: NLL, realised rate, code use, and what ablating the
    codes costs. Of a planner: NLL with its own plans, the best plans, shuffled, random and empty
    ones, and of --control, which sees the source.

    Example: `sememe evaluate runs/demo --data data/heldout.txt --control runs/demo-control`

    Over several rates: `sememe evaluate runs/demo --data data/heldout.txt --rate 0.25,0.33,0.5,1`

    Exact matches of a planner: `sememe evaluate runs/prosqa --answers --search 0`"""
    from sememe import measure

    values = {"tokens": tokens, "rate": rate, "search": search, "answers": answers}
    workers = shared["workers"] if shared["workers"] > 1 else 0
    options = measure.Options(**values, signals=signals, workers=workers)
    result = measure.evaluate(model, data, control, options)
    yield result
    show_figures(result, model)


@command
def ablate(
    model: arguments.Model,
    data: arguments.Data = None,
    tokens: arguments.Tokens = 4096,
    rate: arguments.Rate = None,
):
    """What the codes are worth: NLL over the share of concepts dropped, and with all zeroed,
    shuffled, random or swapped. Of a planner the same of its plans, and texts written from
    another's plan. Reads the text about 36 times.

    Example: `sememe ablate runs/demo --data data/heldout.txt`"""
    from sememe import measure

    options = measure.Options(tokens=tokens, rate=rate)
    result = measure.ablate(model, data, options)
    yield result
    show_figures(result, model)


def generate(model: arguments.Model, **options: Any):
    """Stream a continuation of a prompt; of a planner what it writes.

    Example: `sememe generate runs/demo --prompt "The old detective" --show-concepts`

    A conversation that goes on at the next call: `sememe generate runs/demo --prompt "The old
    detective" --cache talk.safetensors`

    A planner's text with another concept: `sememe generate runs/planner --prompt "The old
    detective" --edit 0:0=5`"""
    from sememe.generate import Request, generate_text

    edits, rates = options.pop("edit") or (), options.pop("rate")
    yield generate_text(model, Request(edits=edits, rates=rates, **options))


arguments.expand(
    generate,
    {
        "model": (arguments.Model, ...),
        "prompt": (arguments.Prompt, ...),
        "max_new_tokens": (arguments.MaxNewTokens, 64),
        "temperature": (arguments.Temperature, 0.0),
        "seed": (arguments.Seed, 0),
        "show_concepts": (arguments.ShowConcepts, False),
        "edit": (arguments.Edits, None),
        "rate": (arguments.Rate, None),
        "cache": (arguments.CacheFile, None),
    },
)
generate = command(generate)


@command
def compress(
    model: arguments.Model,
    file: arguments.TextFile,
    out: arguments.OutCodes,
    rate: arguments.Rate = None,
    **shared: int,
):
    """Turn text into concept ids: a JSON file with the ids and the characters of every window.

    Example: `sememe compress runs/compressor data/heldout.txt --out codes.json`

    Documents are cut into windows of the run's sequence_length without overlap, at token ends that
    are character ends: put together, the windows are the document."""
    with only_user(out, out.parent / f".{out.name}{LOCK}"):
        from sememe.codes import compress_file

        result = compress_file(model, file, out, rate[0] if rate else None, **shared)
    yield result
    show_figures(result, model)
    say(f"codes: {out}")


@command
def decompress(
    model: arguments.Model,
    codes: arguments.Codes,
    out: arguments.OutText = None,
    beams: arguments.Beams = None,
):
    """Turn concept ids back into text, with the very model that wrote them.

    Example: `sememe decompress runs/compressor codes.json --out back.txt`"""
    from sememe.codes import decompress_file

    result, text = decompress_file(model, codes, out, beams=beams)
    yield result
    if out is None:  # the text alone on stdout, for pipes
        write(text)
    else:
        show_figures(result, model)
        say(f"text: {out}")


@command
def reconstruct(
    model: arguments.Model,
    data: arguments.Data = None,
    tokens: arguments.Tokens = 4096,
    rate: arguments.Rates = None,
    online: arguments.Online = None,
    bins: arguments.Bins = None,
    beams: arguments.Beams = None,
):
    """How much of a text comes back from its concept ids alone, and for how many bits.

    Example: `sememe reconstruct runs/compressor --data data/heldout.txt --rate 0.25,0.33,0.5`"""
    from sememe import measure

    options = measure.Options(tokens=tokens, rate=rate, online=online, bins=bins, beams=beams)
    result = measure.reconstruct(model, data, options)
    yield result
    show_figures(result, model)


command(benchmark)
command(plan)


@command
def report(runs: arguments.Runs):
    """Draw a run as one self-contained HTML page: curves, what is wrong with it, coloured samples,
    all figures; or a sweep: quality against compute.

    Example: `sememe report runs/demo`

    Two runs and a sweep on the same axes: `sememe report runs/r2 runs/r4 runs/rates`"""
    from sememe.report import write_report

    page = write_report(*runs)
    yield {"report": str(page)}
    say(f"report: {page}")


@command
def doctor(run: arguments.Run):
    """Say what is wrong with a run, by which figures, and what to change. Exit code 1 where
    something is.

    Example: `sememe doctor runs/demo`"""
    from sememe.report.doctor import examine
    from sememe.report.files import read_run

    diagnosis = examine(read_run(run))
    yield diagnosis
    show_diagnosis(diagnosis)
    if not diagnosis["healthy"]:
        raise typer.Exit(1)


@command
def export(model: arguments.Model, out: arguments.OutModel):
    """Write a merged, self-contained model: LoRA folded into the weights, no base needed.

    Example: `sememe export runs/demo --out exported`"""
    from sememe.models.loading import export_model

    folder, size = export_model(model, out)
    yield {"folder": str(folder), "bytes": size}
    say(f"merged model: {folder} ({size / 1e6:.0f} MB)")


command(serve)
