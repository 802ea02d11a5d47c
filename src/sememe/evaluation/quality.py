"""Held-out quality on running text: NLL, bits per byte, realised rate, code use, and what ablating
the codes costs."""

import contextlib
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from sememe.concepts.codebook import count_digits
from sememe.concepts.segments import tail_lengths
from sememe.concepts.writer import NULL
from sememe.data import TextBlocks
from sememe.detokenize import pieces
from sememe.errors import DataError
from sememe.evaluation.results import Figures, Parts
from sememe.evaluation.subject import Subject
from sememe.models.losses import cross_entropy
from sememe.progress import bar

BUCKET = 64  # positions per bucket of `nll_by_position`
SAMPLES = 2  # texts that are shown with their concepts


@torch.no_grad()
def batched(job: Callable[[Tensor], tuple], rows_N: Tensor, batch: int) -> list[Tensor]:
    """The tensors that `job` returns for each batch of rows, put together on the host."""
    parts = [job(rows_B) for rows_B in rows_N.split(batch)]
    return [torch.cat([x.cpu() for x in column]) for column in zip(*parts, strict=True)]


def token_nll(
    model, ids_NT: Tensor, batch: int = 4, ablation: str | None = None
) -> tuple[Tensor, Tensor | None]:
    """Per-token NLL in nats (N, T-1), on the host, and the concept ids (N, T), None for a model
    without concepts."""
    options = {"ablation": ablation} if ablation else {}

    def nll(ids_BT: Tensor) -> tuple[Tensor, ...]:
        ids_BT = ids_BT.to(model.device)
        out = model(input_ids=ids_BT, use_cache=False, **options)
        nll_BT = cross_entropy(out.logits[:, :-1], ids_BT[:, 1:])
        concepts_BT = getattr(out, "concept_ids", None)
        return (nll_BT,) if concepts_BT is None else (nll_BT, concepts_BT)

    nll_NT, *concepts = batched(nll, ids_NT, batch)
    return nll_NT, concepts[0] if concepts else None


def rate_error(realised: float | None, target: float | None) -> float | None:
    """How far the realised rate is from the one that it was to be, in % of the latter."""
    return None if realised is None or target is None else 100 * (realised - target) / target


def layer_share(config, rate: float | None = None) -> float:
    """Layer applications per token over the base's, at the *realised* rate of a model with
    concepts."""
    share = getattr(config, "layer_share", None)
    return 1.0 if share is None else share(rate)


def rate_and_codes(ids_NT: Tensor, num_concepts: int, codes_per_concept: int = 1) -> Figures:
    """Realised rate and code use of (N, T) concept ids without padding."""
    written_NT = ids_NT != NULL
    counts_GK = count_digits(ids_NT[ids_NT >= 0], num_concepts, codes_per_concept)
    rate = float(written_NT.float().mean())
    return {
        "concept_rate": rate,
        "compression_ratio": 1 / rate,
        "longest_tail": longest_tail(written_NT),
        **code_use(counts_GK),
        "code_counts": sorted(counts_GK[0][counts_GK[0] > 0].int().tolist(), reverse=True),
        "num_concepts": num_concepts,
        "codes_per_concept": codes_per_concept,
    }


def code_use(counts_GK: Tensor) -> Figures:
    """Of the first digit: perplexity, codes that occur, share of the most frequent. Over all
    digits: perplexity by stage, and bits per concept, the sum of the digits' entropies: an upper
    bound of their joint entropy. All but the number of codes is None where none was counted."""
    counts_K = counts_GK[0]
    is_used = bool(counts_K.any())
    by_stage = [perplexity(counts_K) for counts_K in counts_GK] if is_used else None
    return {
        "code_perplexity": by_stage[0] if is_used else None,
        "code_perplexity_by_stage": by_stage,
        "bits_per_concept": sum(map(math.log2, by_stage)) if is_used else None,
        "codes_used": int((counts_K > 0).sum()),
        "largest_code_share": float(counts_K.max() / counts_K.sum()) if is_used else None,
    }


def perplexity(counts_K: Tensor) -> float | None:
    """exp of the entropy of the codes that were counted; None where none was."""
    share = counts_K[counts_K > 0] / counts_K.sum()
    return float(torch.exp(-(share * share.log()).sum())) if len(share) else None


def longest_tail(written_NT: Tensor) -> int:
    """Longest run of normal tokens in any row."""
    return int(tail_lengths(written_NT, torch.ones_like(written_NT)).max())


def by_position(
    nll_NT: Tensor, control_NT: Tensor | None = None, here_NT: Tensor | None = None
) -> list[dict[str, float | None]]:
    """Mean NLL in buckets of the predicted token's position. `here`: which tokens count, all by
    default."""
    here_NT = torch.ones_like(nll_NT, dtype=torch.bool) if here_NT is None else here_NT

    def mean(side_NT: Tensor | None, part: slice) -> float | None:
        return None if side_NT is None else float(side_NT[:, part][here_NT[:, part]].mean())

    width = nll_NT.shape[1]
    buckets = []
    for start in range(0, width, BUCKET):
        end = min(start + BUCKET, width)
        part = slice(start, end)
        nll, control_nll = mean(nll_NT, part), mean(control_NT, part)
        buckets.append({"from": start, "to": end, "nll": nll, "control_nll": control_nll})
    return buckets


def evaluate(
    subject: Subject,
    blocks: TextBlocks,
    control: Subject | None = None,
    ablations: Sequence[str] = (),
) -> Figures:
    """All quality figures of a model on (N, T) held-out blocks, the gate running free.

    Bits per byte are of the source's own bytes, those of the predicted tokens (all but each row's
    first). Deltas are to the model's own NLL (ablations: positive = the codes matter) or to the
    control's (positive = worse than the control). Raises DataError for a non-finite NLL."""
    subject.refuse("answers signals", "a model of pairs of a source and a target")
    model, ids_NT, rates = subject.model, blocks.ids_NT, subject.rates
    others = [] if control is None else [control]
    sides: dict[str, tuple] = {"own": (model, None, None)}
    if control is not None:
        sides["control"] = (control.model, None, None)
    sides |= {kind: (model, kind, None) for kind in ablations}
    sides |= {f"rate {rate}": (model, None, rate) for rate in rates}
    parts = subject.parts("evaluate", ids_NT, *others)
    nll, concepts = _sides_nll(sides, ids_NT, subject.options.batch or 4, parts)
    means = {name: float(nll_NT.mean()) for name, nll_NT in nll.items()}
    num_bytes = int(blocks.bytes_NT[:, 1:].sum())
    bits = float(nll["own"].double().sum()) / math.log(2)
    figures = {
        "tokens": nll["own"].numel(),
        "nll": means["own"],
        "bits_per_byte": bits / num_bytes if num_bytes else None,
        "boundary": getattr(model.config, "boundary", None),
        "nll_by_position": by_position(nll["own"], nll.get("control")),
        "sequence_length": ids_NT.shape[1],
        "layer_share": layer_share(model.config),
        **{f"delta_nll_{kind}": means[kind] - means["own"] for kind in ablations},
    }
    if control is not None:
        figures["control_nll"] = means["control"]
        figures["delta_nll_control"] = means["own"] - means["control"]
    if "own" in concepts:
        figures |= _concept_figures(model, nll["own"], concepts["own"])
        texts = zip(ids_NT[:SAMPLES], concepts["own"], strict=False)
        figures["samples"] = [sample(*text, subject.tokenizer) for text in texts]
    if rates:
        figures["dial"] = [
            {"nll": means[name], "delta_nll_control": _minus(means[name], means.get("control"))}
            | _realised(concepts[name], rate)
            for rate, name in ((rate, f"rate {rate}") for rate in rates)
        ]
    return figures


def _minus(nll: float, control_nll: float | None) -> float | None:
    return None if control_nll is None else nll - control_nll


def _realised(concepts_NT: Tensor, target: float) -> Figures:
    rate = float((concepts_NT != NULL).float().mean())
    error = rate_error(rate, target)
    return {"target_rate": target, "concept_rate": rate, "rate_error_percent": error}


def _sides_nll(
    sides: dict[str, tuple], ids_NT: Tensor, batch: int, parts: Parts
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """`token_nll` of several sides (model, ablation, rate) on (N, T) blocks, batch by batch: NLL of
    each, and concept ids of those that have some."""
    nll: dict[str, list[Tensor]] = {name: [] for name in sides}
    concepts: dict[str, list[Tensor]] = {}
    for start in bar(iterable=range(0, len(ids_NT), batch), desc="evaluate", unit="batch"):
        ids_BT = ids_NT[start : start + batch]
        for name, side in sides.items():
            nll_lists, ids_lists = parts.part(
                f"{name} {start}", lambda side=side, ids_BT=ids_BT: _side_nll(*side, ids_BT)
            )
            nll[name].append(torch.tensor(nll_lists))
            if ids_lists is not None:
                concepts.setdefault(name, []).append(torch.tensor(ids_lists))
        if not nll["own"][-1].isfinite().all():
            raise DataError(
                f"the NLL is {float(nll['own'][-1].mean())}: need finite logits. try: another "
                "checkpoint, or float32"
            )
    return tuple({name: torch.cat(x) for name, x in side.items()} for side in (nll, concepts))


def _side_nll(model, ablation: str | None, rate: float | None, ids_BT: Tensor) -> list:
    """NLL and concept ids of one batch as JSON has them."""
    with contextlib.nullcontext() if rate is None else model.dial.at(rate=rate):
        nll_BT, concepts_BT = token_nll(model, ids_BT, len(ids_BT), ablation)
    return [nll_BT.tolist(), None if concepts_BT is None else concepts_BT.tolist()]


def _concept_figures(model, nll_NT: Tensor, concepts_NT: Tensor) -> Figures:
    """Realised rate and code use, and NLL where a concept was just written and in the tails."""
    config = model.config
    wrote_NT = concepts_NT[:, :-1] != NULL
    figures = rate_and_codes(concepts_NT, config.num_concepts, config.codes_per_concept)
    return figures | {
        **_realised(concepts_NT, model.dial.rate),
        "layer_share": layer_share(config, figures["concept_rate"]),
        "nll_at_concepts": float(nll_NT[wrote_NT].mean()),
        "nll_in_tail": float(nll_NT[~wrote_NT].mean()) if (~wrote_NT).any() else None,
    }


def sample(ids_T: Tensor, concepts_T: Tensor, tokenizer) -> Figures:
    """One text as pieces (one per token, see `detokenize.pieces`) with the concept that each token
    wrote, if any."""
    tokens = zip(pieces(tokenizer, ids_T.tolist()), concepts_T.tolist(), strict=True)
    return {
        "pieces": [
            {
                "text": text,
                "concept": concept if concept >= 0 else None,
                "sink": i == 0 and concept < NULL,
            }
            for i, (text, concept) in enumerate(tokens)
        ]
    }
