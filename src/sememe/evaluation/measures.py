"""What each system is measured by, as one table of functions that take a `Subject`."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NoReturn

from sememe.concepts.ablation import ABLATIONS
from sememe.errors import CheckpointError
from sememe.evaluation.ablation import ablate_plans, ablate_text
from sememe.evaluation.compressor import evaluate_compressor
from sememe.evaluation.plans import evaluate_plans, evaluate_sources
from sememe.evaluation.quality import evaluate
from sememe.evaluation.results import Figures
from sememe.evaluation.speed import benchmark_saved_compressor, benchmark_saved_online
from sememe.evaluation.subject import Subject


def refused(message: str) -> Callable[..., NoReturn]:
    """Stands for what a system has not."""

    def refuse(subject: Subject, *rest) -> NoReturn:
        raise CheckpointError(f"{subject.name} {message}")

    return refuse


no_ablation = refused(
    "has no concepts to ablate: need a run of system: online, compressor or planner. try: runs/demo"
)
no_benchmark = refused(
    "has no concepts to decode with: need a run of system: online or compressor. try: runs/demo"
)
no_reconstruction = refused(
    "cannot write a text again from codes: need a finished run of system: compressor. try: sememe "
    "evaluate, which takes any model"
)


@dataclass(frozen=True)
class Measures:
    """The measurements of one system."""

    evaluate: Callable[..., Figures] = evaluate
    """(subject, held-out set, control or None) → figures."""
    ablate: Callable[..., Figures] = no_ablation
    """(subject, data) → what its concepts are worth."""
    benchmark: Callable[..., Figures] = no_benchmark
    """(subject, tokens of a prompt or None, data or None) → speed beside the base."""
    reconstruct: Callable[..., Figures] = no_reconstruction
    """(subject, data) → how much of a text comes back from its concept ids."""


def _evaluate_control(subject: Subject, heldout, control: Subject | None) -> Figures:
    """A control is trained on running text, or on the pairs of a planner."""
    on_pairs = subject.pairs_form is not None
    return (evaluate_sources if on_pairs else evaluate)(subject, heldout, control)


TEXT = Measures()
CONTROL = Measures(evaluate=_evaluate_control)
ONLINE = Measures(
    evaluate=partial(evaluate, ablations=ABLATIONS),
    ablate=ablate_text,
    benchmark=benchmark_saved_online,
)
COMPRESSOR = Measures(
    evaluate=partial(evaluate, ablations=ABLATIONS),
    ablate=ablate_text,
    benchmark=benchmark_saved_compressor,
    reconstruct=evaluate_compressor,
)
PLANNER = Measures(evaluate=evaluate_plans, ablate=ablate_plans)
