"""The page itself: files → figures → template → RUN/report.html or SWEEP/sweep.html, written all or
nothing."""

import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path

import jinja2
from markupsafe import Markup

from sememe.errors import CheckpointError
from sememe.paths import usable
from sememe.report import comparison, meanings, meanings_plans, plans, plots
from sememe.report.files import Run, read_run
from sememe.report.instruments import instrument_plots
from sememe.report.pareto import pareto_plot
from sememe.report.reconstruction import ANSWERS, GIVEN, read_reconstruction
from sememe.report.samples import read_samples
from sememe.report.sweeps import Sweep, is_sweep, read_sweep
from sememe.report.tiles import tiles, verdict
from sememe.report.values import show
from sememe.storage import write

HERE = Path(__file__).parent
STYLE = Markup((HERE / "style.css").read_text(encoding="utf-8"))  # ours, so not escaped


def write_report(run: Path, control: Path | None = None, beside: Iterable[Path] = ()) -> Path:
    """Write RUN/report.html from the files of `run`, or SWEEP/sweep.html from those of a sweep;
    returns its path.

    `control`: the folder of the control run whose curves are drawn beside; None takes the sibling
    folder `<run>-control` where there is one. `beside`: further runs and sweeps, drawn on the same
    axes."""
    run = usable(run)
    others = [_read(usable(path)) for path in beside]
    if is_sweep(run):
        if control is not None:
            raise CheckpointError(
                f"got {run}, a sweep, and --control; need a run for that. try: it without --control"
            )
        html, page = render_sweep(read_sweep(run), others), run / "sweep.html"
    else:
        html, page = (
            render(read_run(run, Path(control) if control is not None else None), others),
            run / "report.html",
        )
    return _put(page, html)


def _put(page: Path, html: str) -> Path:
    try:
        write(page, html.encode("utf-8", "replace"))
    except OSError as error:
        raise CheckpointError(
            f"got {error.strerror} when writing {page}; need a folder with room that can be "
            "written to. "
            "try: free some space, or copy the run folder to where you may write"
        ) from error
    return page


def _read(path: Path) -> Run | Sweep:
    return read_sweep(path) if is_sweep(path) else read_run(path)


def render(run: Run, beside: Sequence[Run | Sweep] = ()) -> str:
    evaluate, benchmark = run.evaluate.figures, run.benchmark.figures
    latest = run.metrics.latest()
    points = comparison.points([run, *beside])
    again = read_reconstruction(run.reconstruct.figures)
    return _template("page.html").render(
        run=run,
        style=STYLE,
        name=run.path.resolve().name,
        folder=shlex.quote(str(run.path)),  # commands on the page can be copied
        facts=_facts(run, latest),
        tokens_plots=_drawn(comparison.over_tokens(run, beside)),
        pareto_plots=_drawn(pareto_plot(points)),
        points=comparison.rows(points),
        columns=comparison.COLUMNS,
        again=again,
        again_plots=_drawn(*(again.plots if again else ())),
        given_columns=[title for _, title in GIVEN.values()],
        answer_columns=[title for _, title in ANSWERS.values()],
        side_rows=_side_rows(benchmark),
        benchmark_rows=meanings.rows(benchmark, meanings.BENCHMARK, skip=meanings.BENCHMARK_APART),
        settings=_settings(benchmark),
        **(_of_plans if plans.is_planner(run) else _of_concepts)(run, evaluate, benchmark, latest),
    )


def _of_concepts(run: Run, evaluate: dict, benchmark: dict, latest: dict) -> dict:
    """What the page shows of online concepts, and of models without any."""
    return dict(
        plans=None,
        tiles=tiles(evaluate, benchmark, latest.get("target_rate")),
        verdict=verdict(evaluate),
        training_plots=_drawn(
            plots.loss_plot(run.metrics, run.control), plots.rate_plot(run.metrics)
        ),
        evaluate_plots=_drawn(plots.position_plot(evaluate), plots.code_plot(evaluate)),
        instruments=_drawn(*instrument_plots(run.metrics)),
        samples=read_samples(evaluate),
        latest_rows=meanings.rows(latest, meanings.METRICS, skip=meanings.METRICS_DRAWN),
        evaluate_rows=meanings.rows(evaluate, meanings.EVALUATE, skip=meanings.EVALUATE_DRAWN),
    )


def _of_plans(run: Run, evaluate: dict, benchmark: dict, latest: dict) -> dict:
    """What it shows of a planner. Keys that are of online concepts alone, and null here, are left
    out."""
    shown = {
        key: value
        for key, value in evaluate.items()
        if value is not None or key in meanings_plans.EVALUATE
    }
    drawn = instrument_plots(
        plans.by_type(run.metrics), meanings_plans.instruments(plans.types_of(run.metrics))
    )
    return dict(
        plans=dict(
            given_columns=plans.given_columns(evaluate),
            given=plans.given_rows(evaluate),
            type_columns=plans.TYPE_COLUMNS,
            types=plans.type_rows(evaluate, latest),
            written=plans.written(evaluate),
            signal_columns=plans.SIGNAL_COLUMNS,
            signals=plans.signal_rows(evaluate),
        ),
        tiles=plans.plan_tiles(evaluate, latest),
        verdict=plans.plan_verdict(evaluate),
        training_plots=_drawn(plots.loss_plot(run.metrics, run.control, planner=True)),
        evaluate_plots=_drawn(
            plans.given_plot(evaluate),
            plots.position_plot(evaluate, "plan"),
            plans.slot_plot(run.metrics),
        ),
        instruments=_drawn(*drawn),
        samples=None,
        latest_rows=meanings.rows(
            plans.readable(latest), meanings_plans.METRICS, skip=meanings_plans.METRICS_DRAWN
        ),
        evaluate_rows=meanings.rows(
            plans.readable(shown), meanings_plans.EVALUATE, skip=meanings_plans.EVALUATE_DRAWN
        ),
    )


def render_sweep(sweep: Sweep, beside: Sequence[Run | Sweep] = ()) -> str:
    points = comparison.points([sweep, *beside])
    trained = [
        show(tokens, "count") for tokens in sorted({p.tokens for p in sweep.points if p.tokens})
    ]
    facts = [sweep.recipe, f"{len(sweep.points)} points"]
    facts += (
        [f"{' to '.join(dict.fromkeys((trained[0], trained[-1])))} training tokens"]
        if trained
        else []
    )
    facts += [f"{len(sweep.faults)} runs failed"] if sweep.faults else []
    return _template("sweep.html").render(
        style=STYLE,
        name=sweep.path.resolve().name,
        facts=facts,
        pareto_plots=_drawn(pareto_plot(points)),
        points=comparison.rows(points),
        columns=comparison.COLUMNS,
        tokens_plots=_drawn(comparison.over_tokens(sweep, beside)),
        faults=sweep.faults,
        grid=[
            (key, show(" · ".join(map(str, v)) if isinstance(v, list) else v))
            for key, v in sweep.grid.items()
        ],
    )


def _template(name: str) -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name)


def _drawn(*found: plots.Plot | None) -> list[dict]:
    # The SVG is ours and matplotlib has escaped its text.
    return [
        {"title": p.title, "svg": Markup(p.svg), "caption": p.caption}
        for p in found
        if p is not None
    ]


def _facts(run: Run, latest: dict) -> list[str]:
    facts = [f"{show(latest['step'], 'count')} steps"]
    if "tokens" in latest:
        facts.append(f"{show(latest['tokens'], 'count')} tokens")
    if "seconds" in latest:
        facts.append(show(latest["seconds"], "time"))
    control = run.control_path.resolve().name if run.control_path else "none beside"
    facts.append(f"control: {control}")
    if run.metrics.damaged:
        facts.append(f"{run.metrics.damaged} unreadable lines of metrics.jsonl skipped")
    return facts


def _side_rows(benchmark: dict) -> list[tuple[str, str, str, str]]:
    """(key, concept model, base, meaning), for the keys that either side has."""
    sides = (benchmark.get("concept"), benchmark.get("base"))
    concept, base = (side if isinstance(side, dict) else {} for side in sides)
    known = meanings.BENCHMARK_SIDES
    keys = [key for key in known if key in concept or key in base]
    keys += [key for key in {**concept, **base} if key not in known]
    found = []
    for key in keys:
        kind, meaning = known.get(key, ("", meanings.UNDESCRIBED))
        found.append((key, show(concept.get(key), kind), show(base.get(key), kind), meaning))
    return found


def _settings(benchmark: dict) -> list[tuple[str, str]]:
    settings = benchmark.get("settings")
    return [(str(k), show(v)) for k, v in settings.items()] if isinstance(settings, dict) else []
