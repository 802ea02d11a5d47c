"""Saved models, measured by name: `evaluate`, `ablate`, `benchmark` and `reconstruct`. Figures are
kept beside the run that they are of (RUN/evaluate.json, …)."""

from collections.abc import Sequence

from sememe.errors import CheckpointError, SememeError
from sememe.evaluation.measures import REFUSED
from sememe.evaluation.results import CONTRACT, Figures, keep
from sememe.evaluation.subject import Options, Subject
from sememe.keys import Data
from sememe.options import checked
from sememe.paths import names_of
from sememe.systems import system_of

__all__ = ["Options", "ablate", "benchmark", "evaluate", "reconstruct"]

DEFAULTS = Options()


def evaluate(
    model: str,
    data: str | Sequence[str] | None = None,
    control: str | None = None,
    options: Options = DEFAULTS,
) -> Figures:
    """Held-out figures of a saved model, of a run on its own held-out texts by default; kept as
    RUN/evaluate.json. Several texts are measured one by one: the figures are those of the first,
    and `by_data` has a line for each.

    Raises:
        DataError: a text is missing, too short, or the one that the run was trained on.
        CheckpointError: `model` or `control` cannot be loaded, or they do not go together.
        RecipeError: a rate or budget that the model cannot hold.
        SememeError: an option that says nothing about this system."""
    subject = Subject.load(model, options)
    other = control and subject.load_other(control)
    if hasattr(other and other.model, "plans"):
        raise CheckpointError(
            f"{control} is a planner: need a control, which sees the source. try: its recipe with "
            "system=control"
        )
    names = names_of(data or _heldout(subject))
    heldout = {str(name): subject.heldout(name) for name in names}
    system = system_of(subject.model.config)
    about = {"system": system.name, "control": control, "tokens_asked": options.tokens}
    results = [
        dict.fromkeys(CONTRACT)
        | _measured("evaluate", subject, texts, other)
        | about
        | {"data": name}
        for name, texts in heldout.items()
    ]
    result = dict(results[0])
    if len(results) > 1:
        result["by_data"] = results
        for row in results:
            row.pop("samples", None)
    return _keep(subject, "evaluate", result)


def ablate(model: str, data: str | None = None, options: Options = DEFAULTS) -> Figures:
    """What the concepts of a saved model are worth; kept as RUN/ablate.json. Raises as
    `evaluate`."""
    subject = Subject.load(model, options)
    data = data or _heldout(subject)[0]
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


def reconstruct(model: str, data: str | None = None, options: Options = DEFAULTS) -> Figures:
    """How much of a text comes back from the ids of a saved compressor, and what they are worth as
    a context; kept as RUN/reconstruct.json. Raises as `evaluate`."""
    subject = Subject.load(model, options)
    data = data or _heldout(subject)[0]
    figures = _measured("reconstruct", subject, data)
    about = {"data": str(data), "tokens_asked": options.tokens}
    return _keep(subject, "reconstruct", about | figures)


def _measured(command: str, subject: Subject, *inputs) -> Figures:
    """Raises CheckpointError for a model whose system has no such measure."""
    measures = system_of(subject.model.config).measures
    if command not in measures:
        raise CheckpointError(f"{subject.name} {REFUSED[command]}")
    return measures[command](subject, *inputs)


def _heldout(subject: Subject) -> list[str]:
    """The held-out texts of a run. Raises SememeError for anything else than a run."""
    if not subject.recipe:
        raise SememeError(
            f"got no --data, and {subject.name} is no run with held-out text of its own: need a "
            "text. try: --data data/heldout.txt"
        )
    return names_of(checked(Data, subject.recipe["data"]).heldout)


def _keep(subject: Subject, command: str, figures: Figures) -> Figures:
    figures = {"model": str(subject.name)} | figures
    keep(subject.name, command, figures)
    return figures
