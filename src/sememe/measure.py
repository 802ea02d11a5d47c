"""Saved models, measured by name: `evaluate`, `ablate`, `benchmark` and `reconstruct`. Figures are
kept beside the run that they are of (RUN/evaluate.json, …)."""

from collections.abc import Sequence

from sememe.errors import CheckpointError, SememeError
from sememe.evaluation.inputs import run_recipe
from sememe.evaluation.results import CONTRACT, Figures, finish, keep
from sememe.evaluation.subject import SHARES, Options, Subject
from sememe.systems import system_of

__all__ = ["SHARES", "Options", "ablate", "benchmark", "evaluate", "heldout_of", "reconstruct"]


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
    if other and not system_of(other.model.config).measures.is_control:
        raise CheckpointError(
            f"{control} is a planner: need a control, which sees the source. try: its recipe with "
            "system=control"
        )
    system = system_of(subject.model.config)
    names = [data] if isinstance(data, str) else data
    heldout = [subject.heldout(name) for name in names]
    results = []
    for name, texts in zip(names, heldout, strict=True):
        figures = system.measures.evaluate(subject, texts, other)
        about = {"system": system.name, "model": str(model), "data": str(name), "control": control}
        results.append(dict.fromkeys(CONTRACT) | figures | about | {"tokens_asked": options.tokens})
    result = results[0]
    if len(results) > 1:
        result["by_data"] = [
            {key: value for key, value in figures.items() if key != "samples"}
            for figures in results
        ]
    return _keep(subject, "evaluate", result)


def ablate(model: str, data: str, options: Options = DEFAULTS) -> Figures:
    """What the concepts of a saved model are worth; kept as RUN/ablate.json. Raises as
    `evaluate`."""
    for share in options.shares:
        if not 0 <= share <= 1:
            raise SememeError(
                f"share = {share:g}: need shares of the concepts from 0 to 1. try: "
                "0,0.25,0.5,0.75"
            )
    subject = Subject.load(model, options)
    figures = system_of(subject.model.config).measures.ablate(subject, data)
    return _keep(subject, "ablate", {"model": str(model), "data": str(data)} | figures)


def benchmark(
    model: str,
    prompt_tokens: int | None = None,
    data: str | None = None,
    options: Options = DEFAULTS,
) -> Figures:
    """Speed, cache and memory of a saved model beside its base; kept as RUN/benchmark.json.
    `prompt_tokens`: of a compressor the tokens of a window. Raises as `evaluate`."""
    subject = Subject.load(model, options, merge=False)
    figures = system_of(subject.model.config).measures.benchmark(subject, prompt_tokens, data)
    return _keep(subject, "benchmark", figures | {"model": str(model)})


def reconstruct(model: str, data: str, options: Options = DEFAULTS) -> Figures:
    """How much of a text comes back from the ids of a saved compressor, and what they are worth as
    a context; kept as RUN/reconstruct.json. Raises as `evaluate`."""
    subject = Subject.load(model, options)
    figures = system_of(subject.model.config).measures.reconstruct(subject, data)
    about = {"model": str(model), "data": str(data), "tokens_asked": options.tokens}
    return _keep(subject, "reconstruct", about | figures)


def _keep(subject: Subject, command: str, figures: Figures) -> Figures:
    keep(subject.name, f"{command}.json", figures)
    finish(subject.name, command)
    return figures
