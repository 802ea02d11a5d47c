"""What each system is measured by: the function of each command, of a `Subject` and what else the
command takes, which returns its figures."""

from sememe.errors import CheckpointError
from sememe.evaluation.ablation import ablate_plans, ablate_text
from sememe.evaluation.batches import sweep_batches
from sememe.evaluation.compressor import evaluate_compressor
from sememe.evaluation.plans import evaluate_plans, evaluate_sources
from sememe.evaluation.quality import evaluate
from sememe.evaluation.results import Figures
from sememe.evaluation.speed import benchmark_compressor, benchmark_saved_online
from sememe.evaluation.subject import Subject

REFUSED = {
    "ablate": "has no concepts to ablate: need a run of system: online, compressor or planner. "
    "try: runs/demo",
    "benchmark": "cannot be timed: need a run of system: online or compressor, or of a baseline. "
    "try: runs/demo",
    "reconstruct": "cannot write a text again from codes: need a finished run of system: "
    "compressor. try: sememe evaluate, which takes any model",
}
"""What is said of a model whose system has no such measure."""


def _evaluate_control(subject: Subject, heldout, control: Subject | None) -> Figures:
    """A control is trained on running text, or on the pairs of a planner."""
    on_pairs = subject.pairs_form is not None
    return (evaluate_sources if on_pairs else evaluate)(subject, heldout, control)


def _benchmark_online(subject: Subject, length: int | None, data: str | None) -> Figures:
    """Of one batch, or of several by the engine's steps."""
    if not subject.options.sweep:
        return benchmark_saved_online(subject, length, data)
    if not subject.model.config.writes_concepts:
        raise CheckpointError(
            f"{subject.name} writes no concepts, so none of its rows is out of phase: need an "
            "online model. try: without --sweep"
        )
    return sweep_batches(subject, length, data)


TEXT = {"evaluate": evaluate}
CONTROL = {"evaluate": _evaluate_control, "benchmark": _benchmark_online}
ONLINE = {
    **TEXT,
    "ablate": ablate_text,
    "benchmark": _benchmark_online,
}
COMPRESSOR = {
    **ONLINE,
    "benchmark": benchmark_compressor,
    "reconstruct": evaluate_compressor,
}
PLANNER = {"evaluate": evaluate_plans, "ablate": ablate_plans}
