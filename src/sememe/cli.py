"""The command line. Each sub-command imports what it needs when it runs, so that `--help` is
instant."""

import json
import os
import sys
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

import sememe
from sememe import cli_compressor
from sememe.cli_benchmark import benchmark
from sememe.console import out, replace_unknown, say
from sememe.errors import Interrupted, SememeError
from sememe.options import Budget, Json, Model, Rate, counts, numbers
from sememe.tables import (
    show_ablation,
    show_diagnosis,
    show_plans,
    show_quality,
    table,
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
    help="Concept-token language models: part of a pretrained LM works on discrete concepts that it writes for itself.",
)


def main() -> None:
    """Entry point: what is wrong with the input or with a path is one sentence and exit code 1,
    never a traceback."""
    replace_unknown()
    try:
        app()
    except SememeError as error:
        code = 130 if isinstance(error, Interrupted) else 1
        print(f"{'' if code == 130 else 'error: '}{error}", file=sys.stderr)
        sys.exit(code)
    except (
        OSError
    ) as error:  # the system's own: no permission, a full disk, a text where a path is due
        if error.errno is None:
            raise
        where = "a file" if error.filename is None else f"{error.filename!s:.200}"
        print(
            f"error: {where} cannot be used ({error.strerror}): need a path that can be read or "
            "written. try: another path, or "
            "other permissions",
            file=sys.stderr,
        )
        sys.exit(1)


def _print_version(asked: bool) -> None:
    if asked:
        say(f"sememe {sememe.__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    """Options ahead of a command."""


@app.command()
def pull(
    name: Annotated[
        str | None, typer.Argument(help="A known base; without it, all are listed.")
    ] = None,
    to: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder to put it in, instead of the cache.")
    ] = None,
    json_file: Json = None,
) -> None:
    """Get a base model and keep it: verified, dequantised to safetensors once. For a concept model
    that comes with Sememe, its base.

    Example: `sememe pull smollm2-135m-online`"""
    from sememe.backbone import bases
    from sememe.models.loading import shipped

    ours = {
        n: json.loads((folder / "config.json").read_text(encoding="utf-8"))
        for n, folder in shipped().items()
    }
    if name is None:
        rows = [(n, b.layers, b.licence, b.description) for n, b in bases.KNOWN.items()]
        rows += [
            (
                n,
                c["text_config"]["num_hidden_layers"],
                "Apache-2.0",
                f"{c['base']} with concepts, R = {1 / c['rate']:g}",
            )
            for n, c in ours.items()
        ]
        write_json(
            json_file,
            [
                dict(zip(("name", "layers", "licence", "description"), row, strict=True))
                for row in rows
            ],
        )
        table(
            rows,
            "known bases (elsewhere a base is a Hub id or a local folder)",
            ("name", "layers", "licence", "what"),
        )
        return
    if name in ours:
        name = ours[name]["base"]
    folder = bases.pull(name, to=to, say=say)
    write_json(
        json_file, {"name": name, "folder": str(folder), "sha256": bases.fingerprint(folder)}
    )
    say(f"{name} is at {folder}")


@app.command()
def train(
    recipe: Annotated[Path, typer.Argument(help="A recipe, see recipes/.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Dotted overrides.")
    ] = None,
    run: Annotated[
        Path,
        typer.Option(
            "--out", metavar="RUN", help="Run folder: new, or an unfinished run to resume."
        ),
    ] = Path("runs/last"),
    json_file: Json = None,
) -> None:
    """Train a recipe into a run folder. The same command resumes after Ctrl-C.

    Example: `sememe train recipes/smollm2-135m-online-r4.yaml steps=200 --out runs/r4`

    Its control, on the same batches: `sememe train recipes/smollm2-135m-online-r4.yaml steps=200
    system=control
    --out runs/r4-control`
    """
    from sememe.training.callbacks import read_metrics
    from sememe.training.recipe import load_recipe
    from sememe.training.resume import same_run
    from sememe.training.run import train as run_training

    loaded = load_recipe(recipe, overrides or [])
    first = int(os.environ.get("RANK", "0")) == 0
    if first and not same_run(loaded, run):
        say(loaded.yaml(whole=False), "dim")
    model = run_training(loaded, run, say=say if first else lambda line: None)
    if first:
        last = {k: v for line in read_metrics(run / "metrics.jsonl") for k, v in line.items()}
        write_json(json_file, {"run": str(run), "model": str(model), **last})
        table(
            [(k, v) for k, v in last.items() if not isinstance(v, list)],
            f"{run}",
            ("measure", "last"),
        )
        say(f"model: {model}")


@app.command()
def sweep(
    recipe: Annotated[Path, typer.Argument(help="A recipe, see recipes/.")],
    grid: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=A,B,C]...", help="Dotted keys; a value with commas stays whole in []."
        ),
    ] = None,
    folder: Annotated[
        Path,
        typer.Option(
            "--out", metavar="FOLDER", help="Folder of the runs: new, or a sweep to go on with."
        ),
    ] = Path("runs/sweep"),
    control: Annotated[
        bool, typer.Option("--control", help="Train control, skip and window too, to compare with.")
    ] = False,
    tokens: Annotated[int, typer.Option(min=16, help="Held-out tokens to measure on.")] = 8192,
    data: Annotated[
        str | None, typer.Option(metavar="FILE", help="Text to measure on; default: data.heldout.")
    ] = None,
    seeds: Annotated[
        str, typer.Option(metavar="0,1,2", help="Train every point once for each seed.")
    ] = "",
    json_file: Json = None,
) -> None:
    """Train and measure a grid over recipe keys; one run folder a point, one table and one page.

    Example: `sememe sweep recipes/demo.yaml rate=0.5,0.25 boundary=null,fixed steps=40 --control
    --out runs/rates`

    The same command goes on after Ctrl-C; what is finished is read, not repeated."""
    from sememe.report import write_report
    from sememe.training import sweep as sweeps

    found = sweeps.sweep(
        recipe, grid or [], folder, control, tokens, data, sweeps.parse_seeds(seeds), say=say
    )
    write_json(json_file, found, lambda: table(*sweeps.as_table(found)))
    say(f"figures: {folder / 'sweep.json'}\nplot: {write_report(folder)}")
    sweeps.check_faults(found)


@app.command()
def evaluate(
    model: Model,
    data: Annotated[
        list[str] | None,
        typer.Option(
            help="Held-out text: .txt, .jsonl[#field], .parquet[#field] or a datasets id; default: that of the run. May be given "
            "several times: each is measured on its own."
        ),
    ] = None,
    tokens: Annotated[int, typer.Option(min=16, help="Tokens to measure on.")] = 8192,
    control: Annotated[
        str | None, typer.Option(metavar="MODEL2", help="Same LoRA without concepts.")
    ] = None,
    sequence_length: Annotated[
        int | None, typer.Option(min=8, help="Default: that of the run, or 512.")
    ] = None,
    batch: Annotated[int, typer.Option(min=1)] = 4,
    rate: Rate = None,
    rates: Annotated[
        str | None,
        typer.Option(metavar="R,R,…", help="Table of these settings of the dial as well."),
    ] = None,
    answers: Annotated[
        bool,
        typer.Option(
            "--answers",
            help="Of pairs: write each target too, and count those whose last sentence is right.",
        ),
    ] = False,
    rounds: Annotated[
        int,
        typer.Option(
            "--search",
            min=0,
            help="Of a planner: rounds of search for the best plans z*; 0 leaves "
            "them out, which is much faster.",
        ),
    ] = 3,
    signals: Annotated[
        int,
        typer.Option(
            min=0,
            metavar="N",
            help="Of a planner: what plans tell of length, kind, names, numbers "
            "and key words, by linear probes fitted on N training pairs.",
        ),
    ] = 0,
    budget: Budget = None,
    base: Annotated[str | None, typer.Option(help="Take the base from here instead.")] = None,
    json_file: Json = None,
) -> None:
    """Held-out quality, the gate running free: NLL, realised rate, code use, and what ablating the
    codes costs. Of a planner: NLL with its own plans, the best plans, shuffled, random and empty
    ones, and of --control, which sees the source.

    Example: `sememe evaluate runs/demo --data data/heldout.txt --control runs/demo-control`

    Over the dial: `sememe evaluate runs/demo --data data/heldout.txt --rates 0.25,0.33,0.5,1`

    Right answers of a planner: `sememe evaluate runs/prosqa --data prosqa/heldout.jsonl --answers
    --search 0`"""
    from sememe.evaluation.files import evaluate_files
    from sememe.models.planner.em import best_plans

    dial = numbers(rates, "--rates", "0.25,0.33,0.5,1")
    texts = data or [_heldout(model)]
    search = partial(best_plans, rounds=rounds) if rounds else None
    result = evaluate_files(
        model,
        texts,
        tokens,
        control,
        sequence_length,
        batch,
        base,
        rate,
        dial,
        search,
        answers,
        signals,
        counts(budget, "--budget", "2,4"),
    )
    write_json(
        json_file, result, lambda: (show_plans if "given" in result else show_quality)(result)
    )


def _heldout(model: str) -> str:
    """The held-out text of a run. Raises SememeError for anything else than a run."""
    from sememe.evaluation.figures import run_recipe

    recipe = run_recipe(model)
    if not recipe:
        raise SememeError(
            f"got no --data, and {model} is no run with held-out text of its own: need a text. "
            "try: --data data/heldout.txt"
        )
    return recipe["data"]["heldout"]


@app.command()
def ablate(
    model: Model,
    data: Annotated[str | None, typer.Option(help="Held-out text, as for evaluate.")] = None,
    tokens: Annotated[
        int, typer.Option(min=16, help="Tokens to measure on, about 36 times.")
    ] = 4096,
    shares: Annotated[
        str | None,
        typer.Option(metavar="P,P,…", help="Of the concepts to drop; default: 0,0.1,…,0.9."),
    ] = None,
    seeds: Annotated[
        int, typer.Option(min=1, help="Draws of whatever is random; the mean is reported.")
    ] = 3,
    sequence_length: Annotated[
        int | None, typer.Option(min=8, help="Default: that of the run, or 512.")
    ] = None,
    batch: Annotated[
        int, typer.Option(min=2, help="Texts that shuffle and swap exchange codes among.")
    ] = 4,
    rate: Rate = None,
    base: Annotated[str | None, typer.Option(help="Take the base from here instead.")] = None,
    json_file: Json = None,
) -> None:
    """What the codes are worth: NLL over the share of concepts dropped, and with all zeroed,
    shuffled, random or swapped. Of a planner the same of its plans, and whose words a swapped plan
    brings.

    Example: `sememe ablate runs/demo --data data/heldout.txt`"""
    from sememe.evaluation.ablation import SHARES, ablate_files

    dropped = numbers(shares, "--shares", "0,0.25,0.5,0.75")
    result = ablate_files(
        model,
        data or _heldout(model),
        tokens,
        dropped or SHARES,
        seeds,
        sequence_length,
        batch,
        base,
        rate,
    )
    write_json(json_file, result, lambda: show_ablation(result))


@app.command()
def generate(
    model: Model,
    prompt: Annotated[str, typer.Option(help="Text to go on from.")],
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 64,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0.01, max=1.0)] = 1.0,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    show_concepts: Annotated[
        bool, typer.Option("--show-concepts", help="Mark each segment and its concept id.")
    ] = False,
    show_plan: Annotated[
        bool, typer.Option("--show-plan", help="Print a planner's plan ahead of its text.")
    ] = False,
    edit: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TYPE:SLOT=ID",
            help="Change an id of the plan and print both texts; may be given several times.",
        ),
    ] = None,
    rate: Rate = None,
    budget: Budget = None,
    base: Annotated[str | None, typer.Option(help="Take the base from here instead.")] = None,
    json_file: Json = None,
) -> None:
    """Stream a continuation of a prompt; of a planner what it writes, with its plan.

    Example: `sememe generate runs/demo --prompt "The old detective" --show-concepts`

    A planner, and what its text becomes with another id: `sememe generate runs/planner --prompt
    "The old detective" --show-plan
    --edit 0:0=5`
    """
    from sememe.show import generate_text

    made = generate_text(
        model,
        prompt,
        max_new_tokens,
        temperature,
        top_p,
        seed,
        show_concepts,
        out,
        base,
        rate,
        show_plan,
        edit,
        counts(budget, "--budget", "2,4"),
    )
    write_json(json_file, made)


for command in (
    cli_compressor.compress,
    cli_compressor.decompress,
    cli_compressor.reconstruct,
    benchmark,
):
    app.command()(command)


@app.command()
def report(
    runs: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN_OR_SWEEP...",
            help="A run folder or a sweep's; more of them are drawn beside the first.",
        ),
    ],
    control: Annotated[
        Path | None, typer.Option(metavar="RUN2", help="Default: RUN-control, where it is there.")
    ] = None,
    json_file: Json = None,
) -> None:
    """Draw a run as one self-contained HTML page: curves, instruments, code use, coloured samples,
    all figures; or a sweep: quality against compute and training tokens.

    Example: `sememe report runs/demo`

    Two runs and a sweep on the same axes: `sememe report runs/r2 runs/r4 runs/rates`"""
    from sememe.report import write_report

    page = write_report(runs[0], control, runs[1:])
    write_json(json_file, {"report": str(page)})
    say(f"report: {page}")


@app.command()
def doctor(
    run: Annotated[Path, typer.Argument(help="A run folder, finished or not.")],
    json_file: Json = None,
) -> None:
    """Say what is wrong with a run, by which figures, and what to change. Exit code 1 where
    something is.

    Example: `sememe doctor runs/demo`"""
    from sememe.report.doctor import examine

    found = examine(run)
    write_json(json_file, found)
    show_diagnosis(found)
    if not found["healthy"]:
        raise typer.Exit(1)


@app.command()
def export(
    model: Model,
    to: Annotated[
        Path, typer.Option("--to", metavar="DIR", help="New folder for the merged model.")
    ],
    base: Annotated[str | None, typer.Option(help="Take the base from here instead.")] = None,
    json_file: Json = None,
) -> None:
    """Write a merged, self-contained model: LoRA folded into the weights, no base needed.

    Example: `sememe export runs/demo --to exported`
    """
    from sememe.models.loading import export_model

    folder, size = export_model(model, to, base)
    write_json(json_file, {"folder": str(folder), "bytes": size})
    say(f"merged model: {folder} ({size / 1e6:.0f} MB)")
