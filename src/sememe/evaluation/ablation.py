"""What the codes are worth: NLL over the share of concepts dropped, and with all codes zeroed or
exchanged (RUN/ablate.json)."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from tqdm.auto import tqdm

from sememe.concepts.writer import NULL
from sememe.errors import CheckpointError, DataError, SememeError
from sememe.evaluation.figures import keep
from sememe.evaluation.heldout import heldout_blocks, heldout_texts
from sememe.evaluation.plan_files import ablate_pair_files, pair_form
from sememe.evaluation.quality import token_nll
from sememe.models.adapted import AdaptedModel
from sememe.models.configuration import ConceptConfig
from sememe.models.loading import load_model

SHARES = tuple(tenth / 10 for tenth in range(10))
DRAWN = {
    "zero": False,
    "shuffle": True,
    "random": True,
    "swap": False,
}  # whether a seed makes a difference


def passes(shares: Sequence[float], seeds: int) -> int:
    """Forward passes over the text that `ablation_curve` makes."""
    return (
        1
        + sum(seeds if drawn else 1 for drawn in DRAWN.values())
        + seeds * sum(0 < share < 1 for share in shares)
    )


def ablation_curve(
    model: AdaptedModel,
    ids_NT: Tensor,
    shares: Sequence[float] = SHARES,
    seeds: int = 3,
    batch: int = 4,
    tick: Callable[[int], None] = lambda n: None,
) -> dict[str, Any]:
    """ΔNLL to the unablated model on (N, T) blocks; the gate decides as before, so the same
    positions write.

    Each is {delta_nll, delta_nll_min, delta_nll_max}: mean, smallest and largest over the seeds. Of
    one seed, a larger share drops the same concepts and more. No batch is left with one row: `swap`
    takes the codes of the next one."""
    while len(ids_NT) % batch == 1:
        batch += 1
    nll_NT, concepts_NT = token_nll(model, ids_NT, batch, tick=tick)
    nll, coded = float(nll_NT.mean()), int((concepts_NT >= 0).sum())
    if not coded:
        raise CheckpointError(
            "this model writes no codes on this text: need some to ablate. try: a finished run, or "
            "more text"
        )

    def cost(spec: str, drawn: bool) -> dict[str, float]:
        deltas = [
            float(token_nll(model, ids_NT, batch, f"{spec}@{seed}", tick)[0].mean()) - nll
            for seed in range(seeds if drawn else 1)
        ]
        return {
            "delta_nll": sum(deltas) / len(deltas),
            "delta_nll_min": min(deltas),
            "delta_nll_max": max(deltas),
        }

    kinds = {kind: cost(kind, drawn) for kind, drawn in DRAWN.items()}
    ends = {
        0.0: dict.fromkeys(kinds["zero"], 0.0),
        1.0: kinds["zero"],
    }  # nothing dropped, and everything
    drop = [{"share": share} | (ends.get(share) or cost(f"drop:{share}", True)) for share in shares]
    return {
        "tokens": nll_NT.numel(),
        "sequence_length": ids_NT.shape[1],
        "batch": batch,
        "seeds": seeds,
        "nll": nll,
        "target_rate": model.dial.rate,
        "concept_rate": float((concepts_NT != NULL).double().mean()),
        "coded_concepts": coded,
        "drop": drop,
        **kinds,
    }


def ablate_files(
    model: str,
    data: str,
    tokens: int = 4096,
    shares: Sequence[float] = SHARES,
    seeds: int = 3,
    sequence_length: int | None = None,
    batch: int = 4,
    base: str | None = None,
    rate: float | None = None,
) -> dict[str, Any]:
    """`ablation_curve` of a saved model on a text; kept as RUN/ablate.json.

    Raises:
        SememeError: a share outside [0, 1].
        DataError: the text is missing, too short for two blocks, or the one that the run was
            trained on.
        CheckpointError: `model` cannot be loaded, or has no concepts."""
    for share in shares:
        if not 0 <= share <= 1:
            raise SememeError(
                f"share = {share:g}: need shares of the concepts from 0 to 1. try: 0,0.25,0.5,0.75"
            )
    if pair_form(model) is not None:
        return ablate_pair_files(
            model, data, tokens, shares, seeds, batch, base, sequence_length, rate
        )
    texts = heldout_texts(model, data)
    loaded, tokenizer = load_model(model, base=base, rate=rate)
    if not isinstance(loaded.config, ConceptConfig):
        raise CheckpointError(
            f"{model} has no concepts to ablate: need a run of system: online or compressor. try: "
            "runs/demo"
        )
    ids_NT = heldout_blocks(model, loaded, tokenizer, texts, tokens, sequence_length).ids_NT
    if len(ids_NT) < 2:
        length = ids_NT.shape[1]
        raise DataError(
            f"{data} and --tokens {tokens} make one block of {length} tokens: need at least two, "
            "to swap codes "
            f"between them. try: --tokens {2 * length}"
        )
    shares = sorted(set(shares))
    with tqdm(
        total=passes(shares, seeds) * ids_NT.numel(), desc="ablate", unit="token", mininterval=1
    ) as bar:
        result = {"model": str(model), "data": str(data)} | ablation_curve(
            loaded, ids_NT, shares, seeds, batch, bar.update
        )
    keep(model, "ablate.json", result)
    return result
