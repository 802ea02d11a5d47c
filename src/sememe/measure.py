"""Saved models, measured by name: `evaluate`, `ablate`, `benchmark` and `reconstruct`. Figures are
kept beside the run that they are of (RUN/evaluate.json, …)."""

from collections.abc import Sequence

from sememe.errors import CheckpointError, SememeError
from sememe.evaluation.inputs import run_recipe
from sememe.evaluation.measures import REFUSED
from sememe.evaluation.results import CONTRACT, Figures, keep
from sememe.evaluation.subject import Options, Subject
from sememe.systems import system_of

__all__ = ["Options", "ablate", "benchmark", "evaluate", "heldout_of", "reconstruct"]


DEFAULTS = Options()


def heldout_of(model: str) -> str:
    """The held-out text of a run. Raises SememeError for anything else than a run."""
    recipe = run_recipe(model)
    if not recipe:
        raise SememeError(
            f"got no --data, and {model} is no run with held-out text of its own: need a text. "
            "try: --data data/heldout.txt"
        )
    return recipe["data"]["heldout"]


def evaluate(
    model: str,
    data: str | Sequence[str],
    control: str | None = None,
    options: Options = DEFAULTS,
) -> Figures:
    """Held-out figures of a saved model; kept as RUN/evaluate.json. Several texts are measured one
    by one: the figures are those of the first, and `by_data` has a line for each.

    Raises:
        DataError: a text is missing, too short, or the one that the run was trained on.
        CheckpointError: `model` or `control` cannot be loaded, or they do not go together.
        RecipeError: a rate or budget that the model cannot hold.
        SememeError: an option that says nothing about this system."""
    subject = Subject.load(model, options)
    other = None if control is None else subject.load_other(control)
    if other and hasattr(other.model, "plans"):
        raise CheckpointError(
            f"{control} is a planner: need a control, which sees the source. try: its recipe with "
            "system=control"
        )
    system = system_of(subject.model.config)
    names = [data] if isinstance(data, str) else data
    heldout = {str(name): subject.heldout(name) for name in names}
    about = {"system": system.name, "model": str(model), "control": control}
    about["tokens_asked"] = options.tokens
    results = [
        dict.fromkeys(CONTRACT)
        | _measured("evaluate", subject, texts, other)
        | about
        | {"data": name}
        for name, texts in heldout.items()
    ]
    result = results[0]
    if len(results) > 1:
        shown = [key for key in result if key != "samples"]
        result["by_data"] = [{key: row[key] for key in shown} for row in results]
    keep(model, "evaluate", result)
    return result


def ablate(model: str, data: str, options: Options = DEFAULTS) -> Figures:
    """What the concepts of a saved model are worth; kept as RUN/ablate.json. Raises as
    `evaluate`."""
    subject = Subject.load(model, options)
    figures = _measured("ablate", subject, data)
    return _keep(subject, "ablate", {"data": str(data)} | figures)


def benchmark(
    model: str,
    prompt_tokens: int | None = None,
    data: str | None = None,
    options: Options = DEFAULTS,
) -> Figures:
    """Speed, cache and memory of a saved model beside its base; kept as RUN/benchmark.json.
    `prompt_tokens`: of a compressor the tokens of a window. Raises as `evaluate`."""
    subject = Subject.load(model, options, merge=False)
    figures = _measured("benchmark", subject, prompt_tokens, data)
    return _keep(subject, "benchmark", figures)


def reconstruct(model: str, data: str, options: Options = DEFAULTS) -> Figures:
    """How much of a text comes back from the ids of a saved compressor, and what they are worth as
    a context; kept as RUN/reconstruct.json. Raises as `evaluate`."""
    subject = Subject.load(model, options)
    figures = _measured("reconstruct", subject, data)
    about = {"data": str(data), "tokens_asked": options.tokens}
    return _keep(subject, "reconstruct", about | figures)


def _measured(command: str, subject: Subject, *given) -> Figures:
    """Raises CheckpointError for a model whose system has no such measure."""
    measures = system_of(subject.model.config).measures
    if command not in measures:
        raise CheckpointError(f"{subject.name} {REFUSED[command]}")
    return measures[command](subject, *given)


def _keep(subject: Subject, command: str, figures: Figures) -> Figures:
    figures = {"model": str(subject.name)} | figures
    keep(subject.name, command, figures)
    return figures
