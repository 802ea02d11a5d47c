"""The dial: one trained model run at other rates than its own, and how well each is held."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from sememe.evaluation.partial import Partial
from sememe.evaluation.quality import measure
from sememe.models.loading import check_rate
from sememe.models.online import NULL, OnlineForCausalLM


def check_rates(model, rates: Sequence[float], name: str) -> None:
    """Raises CheckpointError or RecipeError where `model`, called `name`, cannot run at one of the
    rates."""
    for rate in rates:
        check_rate(model.config, rate, name)


def rate_error(realised: float | None, asked: float | None) -> float | None:
    """How far the realised rate is from the one asked for, in % of the latter."""
    return None if realised is None or asked is None else 100 * (realised - asked) / asked


def dial(
    model: OnlineForCausalLM,
    ids_NT: Tensor,
    rates: Sequence[float],
    control_nll: float | None = None,
    batch: int = 4,
    tick: Callable[[int], None] = lambda n: None,
    partial: Partial | None = None,
    prefix: str = "",
) -> list[dict[str, Any]]:
    """NLL and realised rate on (N, T) blocks at each of the rates. The model's own rate is put back
    afterwards."""
    rows = []
    for rate in rates:
        name = f"rate {rate}"
        with model.dial.at(rate=rate):
            nll_NT, concepts_NT = measure(
                {name: (model, None)}, ids_NT, batch, tick, partial or Partial(), prefix=prefix
            )[name]
        nll, realised = float(nll_NT.mean()), float((concepts_NT != NULL).float().mean())
        rows.append(
            {
                "target_rate": rate,
                "concept_rate": realised,
                "rate_error_percent": rate_error(realised, rate),
                "nll": nll,
                "delta_nll_control": None if control_nll is None else nll - control_nll,
            }
        )
    return rows
