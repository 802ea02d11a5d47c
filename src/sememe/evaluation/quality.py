"""Held-out quality on running text: NLL, bits per byte, realised rate, code use, and what ablating
the codes costs."""

import contextlib
import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sememe.concepts.codebook import count_digits
from sememe.concepts.segments import tail_lengths
from sememe.concepts.writer import NULL
from sememe.data import TextBlocks
from sememe.detokenize import pieces
from sememe.errors import DataError
from sememe.evaluation.results import Figures, go_on
from sememe.evaluation.subject import Subject
from sememe.models.losses import cross_entropy

BATCH = 4  # rows of a forward pass
BUCKET = 64  # positions per bucket of `nll_by_position`
SAMPLES = 2  # texts that are shown with their concepts


@torch.no_grad()
def batched(job: Callable[[Tensor], tuple], rows_N: Tensor, batch: int = BATCH) -> list[Tensor]:
    """The tensors that `job` returns for each batch of rows, put together on the host."""
    parts = [job(rows_B) for rows_B in rows_N.split(batch)]
    return [torch.cat([x.cpu() for x in column]) for column in zip(*parts, strict=True)]


def token_nll(
    model,
    ids_NT: Tensor,
    batch: int = BATCH,
    ablation: str | None = None,
    rate: float | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Per-token NLL in nats (N, T-1), on the host, and the concept ids (N, T), None for a model
    without concepts. `rate`: another than its own."""
    options = {"ablation": ablation} if ablation else {}

    def nll(ids_BT: Tensor) -> tuple[Tensor, ...]:
        ids_BT = ids_BT.to(model.device)
        out = model(input_ids=ids_BT, use_cache=False, **options)
        nll_BT = cross_entropy(out.logits[:, :-1], ids_BT[:, 1:])
        concepts_BT = getattr(out, "concept_ids", None)
        return (nll_BT,) if concepts_BT is None else (nll_BT, concepts_BT)

    with contextlib.nullcontext() if rate is None else model.dial.at(rate=rate):
        nll_NT, *concepts = batched(nll, ids_NT, batch)
    return nll_NT, concepts[0] if concepts else None


def soft_hard(soft_nD: Tensor, hard_nD: Tensor) -> tuple[Tensor, Tensor]:
    """(n,) cosine of the soft mixture, which gives the gradient, with the code that is read, and
    their distance over the length of the latter."""
    distance_n = (soft_nD - hard_nD).norm(dim=-1) / hard_nD.norm(dim=-1).clamp(min=1e-6)
    return F.cosine_similarity(soft_nD, hard_nD, dim=-1), distance_n


def rate_error(realised: float, target: float) -> float:
    """How far the realised rate is from the one that it was to be, in % of the latter."""
    return 100 * (realised - target) / target


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
        "code_perplexity": by_stage and by_stage[0],
        "code_perplexity_by_stage": by_stage,
        "bits_per_concept": by_stage and sum(map(math.log2, by_stage)),
        "codes_used": int((counts_K > 0).sum()),
        "largest_code_share": float(counts_K.max() / counts_K.sum()) if is_used else None,
    }


def perplexity(counts_K: Tensor) -> float | None:
    """exp of the entropy of the codes that were counted; None where none was."""
    if not counts_K.any():
        return None
    return float(torch.distributions.Categorical(counts_K.double()).perplexity())


def longest_tail(written_NT: Tensor) -> int:
    """Longest run of normal tokens in any row."""
    return int(tail_lengths(written_NT, torch.ones_like(written_NT)).max())


def bucket_means(nll_NT: Tensor) -> list[float]:
    """Mean NLL in buckets of the predicted token's position; nan is no token."""
    return [float(nll_Nw.nanmean()) for nll_Nw in nll_NT.split(BUCKET, 1)]


def by_position(nll_NT: Tensor, control_NT: Tensor | None = None) -> list[dict]:
    """`bucket_means` with the positions of each bucket, and those of a control."""
    means = bucket_means(nll_NT)
    control = [None] * len(means) if control_NT is None else bucket_means(control_NT)
    return [
        {"from": start, "to": min(start + BUCKET, nll_NT.shape[1]), "nll": x, "control_nll": y}
        for start, x, y in zip(range(0, nll_NT.shape[1], BUCKET), means, control, strict=True)
    ]


def finite(nll: float) -> float:
    """`nll` itself. Raises DataError where it is no number."""
    if not math.isfinite(nll):
        raise DataError(
            f"the NLL is {nll}: need finite logits. try: another checkpoint, or float32"
        )
    return nll


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
    sides = _sides(subject, ids_NT, control, ablations)
    means = {name: float(nll_NT.mean()) for name, (nll_NT, *_) in sides.items()}
    (own_NT, *concepts), own = sides["own"], finite(means["own"])
    num_bytes = int(blocks.bytes_NT[:, 1:].sum())
    share = getattr(model.config, "layer_share", lambda rate=None: 1.0)
    figures = {
        "tokens": own_NT.numel(),
        "nll": own,
        "bits_per_byte": float(own_NT.double().sum()) / math.log(2) / max(1, num_bytes),
        "boundary": getattr(model.config, "boundary", None),
        "nll_by_position": by_position(own_NT, *sides.get("control", ())[:1]),
        "sequence_length": ids_NT.shape[1],
        "layer_share": share(),
        **{f"delta_nll_{kind}": means[kind] - own for kind in ablations},
    }
    if control is not None:
        figures["control_nll"] = means["control"]
        figures["delta_nll_control"] = own - means["control"]
    if concepts:
        figures |= _concept_figures(model, own_NT, *concepts)
        figures["layer_share"] = share(figures["concept_rate"])
        texts = zip(ids_NT[:SAMPLES], *concepts, strict=False)
        figures["samples"] = [sample(*text, subject.tokenizer) for text in texts]
    if rates:
        figures["dial"] = [_realised(sides[rate][1], rate) | {"nll": means[rate]} for rate in rates]
    if rates and control is not None:
        for line in figures["dial"]:
            line["delta_nll_control"] = line["nll"] - means["control"]
    return figures


def _realised(concepts_NT: Tensor, target: float) -> Figures:
    rate = float((concepts_NT != NULL).float().mean())
    error = rate_error(rate, target)
    return {"target_rate": target, "concept_rate": rate, "rate_error_percent": error}


def _sides(
    subject: Subject, ids_NT: Tensor, control: Subject | None, ablations: Sequence[str]
) -> dict[Any, list[Tensor]]:
    """NLL of (N, T) blocks, and concept ids where there are some: of the model itself, of
    `control`, with each ablation and at each rate. A batch at a time: a stop costs no more."""
    own = partial(token_nll, subject.model, batch=BATCH)
    sides: dict[Any, Callable[..., tuple]] = {"own": own}
    if control is not None:
        sides["control"] = partial(token_nll, control.model, batch=BATCH)
    sides |= {kind: partial(own, ablation=kind) for kind in ablations}
    sides |= {rate: partial(own, rate=rate) for rate in subject.rates}

    def measure(ids_BT: Tensor) -> list[list]:
        """As JSON has them."""
        outputs = [side(ids_NT=ids_BT) for side in sides.values()]
        return [[x_BT.tolist() for x_BT in output if x_BT is not None] for output in outputs]

    jobs = [partial(measure, ids_BT) for ids_BT in ids_NT.split(BATCH)]
    batches = go_on(subject.partial_file("evaluate", ids_NT, control), jobs)
    return {
        name: [torch.tensor([*chain.from_iterable(x)]) for x in zip(*outputs, strict=True)]
        for name, outputs in zip(sides, zip(*batches, strict=True), strict=True)
    }


def _concept_figures(model, nll_NT: Tensor, concepts_NT: Tensor) -> Figures:
    """Realised rate and code use, and NLL where a concept was just written and in the tails."""
    config = model.config
    wrote_NT = concepts_NT[:, :-1] != NULL
    figures = rate_and_codes(concepts_NT, config.num_concepts, config.codes_per_concept)
    return figures | {
        **_realised(concepts_NT, model.dial.rate),
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
