"""Held-out quality on running text: NLL, bits per byte, realised rate, code use, and what ablating
the codes costs."""

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import zip_longest

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import Categorical

from sememe.concepts.ablation import ABLATIONS
from sememe.concepts.codebook import count_digits
from sememe.concepts.segments import tail_lengths
from sememe.concepts.writer import NULL, PADDED
from sememe.data import TextBlocks
from sememe.detokenize import pieces
from sememe.errors import DataError
from sememe.evaluation.results import Figures
from sememe.evaluation.subject import Options, Subject
from sememe.models.losses import cross_entropy
from sememe.progress import bar
from sememe.rows import IGNORED
from sememe.workers import Tensors, weights_sha256, work_in_parts

BATCH = 4  # rows of a forward pass
TOKENS_AT_ONCE = 8192  # of fewer rows where they are long
BUCKET = 64  # positions per bucket of `nll_by_position`
SAMPLES = 2  # texts that are shown with their concepts


@torch.no_grad()
def batched(job: Callable[[Tensor], tuple], rows_N: Tensor, batch: int = BATCH) -> list[Tensor]:
    """The tensors that `job` returns for each batch of rows, put together on the host."""
    parts = [job(rows_B) for rows_B in rows_N.split(batch)]
    return [torch.cat([x.cpu() for x in column]) for column in zip(*parts, strict=True)]


def token_nll(
    model, ids_NT: Tensor, batch: int = BATCH, counted_NT: Tensor | None = None, **options
) -> tuple[Tensor, Tensor | None]:
    """Per-token NLL in nats (N, T-1), on the host, nan where there is no token or none that is
    counted, and the concept ids (N, T), None for a model without concepts.

    Args:
        ids_NT: with -100 behind rows that are shorter.
        options: of the forward, as `ablation`, which may be one across its rows."""
    if not options:  # then rows are on their own: long ones take memory for all of their logits
        batch = min(batch, max(1, TOKENS_AT_ONCE // ids_NT.shape[1]))

    def nll(ids_BT: Tensor) -> tuple[Tensor, ...]:
        ids_BT = ids_BT.to(model.device)
        real_BT = ids_BT != IGNORED
        mask = {} if real_BT.all() else {"attention_mask": real_BT.long()}
        out = model(input_ids=ids_BT.clamp(min=0), use_cache=False, **mask, **options)
        nll_BT = cross_entropy(out.logits[:, :-1], ids_BT[:, 1:])
        # What is no number of the model's stays infinite.
        nll_BT = nll_BT.where(~nll_BT.isnan(), math.inf).where(real_BT[:, 1:], math.nan)
        concepts_BT = getattr(out, "concept_ids", None)
        return (nll_BT,) if concepts_BT is None else (nll_BT, concepts_BT.where(real_BT, PADDED))

    nll_NT, *concepts = batched(nll, ids_NT, batch)
    if counted_NT is not None:
        nll_NT = nll_NT.masked_fill(~counted_NT[:, 1:], math.nan)
    return nll_NT, concepts[0] if concepts else None


def mean(nll_NT: Tensor) -> float:
    """Of what is a number."""
    return float(nll_NT[~nll_NT.isnan()].mean())


def is_written(ids: Tensor) -> Tensor:
    """Whether there is a concept, with a code or the sink's."""
    return (ids != NULL) & (ids != PADDED)


@dataclass(frozen=True)
class Reading:
    """Of the blocks of a text: in which way."""

    by_control: bool = False
    rate: float | None = None
    ablation: str | None = None


class Reader:
    """What every process has that reads blocks, be it one of several."""

    def __init__(self, subject: Subject, control: Subject | None, readings: list[Reading]):
        self.subject = subject
        self.control = control
        self.readings = readings

    @classmethod
    def load(
        cls, name: str, options: Options, control: str | None, readings: list[Reading]
    ) -> "Reader":
        subject = Subject.load(name, options)
        return cls(subject, control and subject.load_other(control), readings)

    def __call__(self, part: Tensors) -> Tensors:
        """(B, T) `ids` and () `reading`, its number → (B, T-1) `nll`, and (B, T) `concepts` of a
        model that writes them."""
        reading = self.readings[int(part["reading"])]
        model = (self.control if reading.by_control else self.subject).model
        options = {} if reading.ablation is None else {"ablation": reading.ablation}
        with contextlib.ExitStack() as stack:
            if reading.rate is not None:
                stack.enter_context(model.dial.at(rate=reading.rate))
            nll_BT, concepts_BT = token_nll(model, part["ids"], **options)
        return {"nll": nll_BT} | ({} if concepts_BT is None else {"concepts": concepts_BT})


def read_all(reader: Reader, ids_NT: Tensor) -> list[tuple[Tensor, Tensor | None]]:
    """What `token_nll` gives of (N, T) blocks, for each reading."""
    subject, control, readings = reader.subject, reader.control, reader.readings
    batches = [
        {"ids": ids_BT, "reading": torch.tensor(number)}
        for number in range(len(readings))
        for ids_BT in ids_NT.split(BATCH)
    ]
    workers = subject.options.workers
    if workers > 1:
        arguments = (subject.name, subject.options, control and control.name, readings)
        weights = [x and weights_sha256(x.model.state_dict()) for x in (subject, control)]
        identity = (weights, replace(subject.options, workers=0), readings)
        results = work_in_parts(Reader.load, arguments, batches, workers, identity)
    else:
        results = [*map(reader, bar(iterable=batches, desc="evaluate", unit="batch"))]
    each = len(results) // len(readings)
    by_reading = (results[start : start + each] for start in range(0, len(results), each))
    joined = [{key: torch.cat([x[key] for x in xs]) for key in xs[0]} for xs in by_reading]
    return [(x["nll"], x.get("concepts")) for x in joined]


def soft_hard(soft_nD: Tensor, hard_nD: Tensor) -> tuple[Tensor, Tensor]:
    """(n,) cosine of the soft mixture, which gives the gradient, with the code that is read, and
    their distance over the length of the latter."""
    distance_n = (soft_nD - hard_nD).norm(dim=-1) / hard_nD.norm(dim=-1).clamp(min=1e-6)
    return F.cosine_similarity(soft_nD, hard_nD, dim=-1), distance_n


def rate_error(realised: float, target: float) -> float:
    """How far the realised rate is from the one that it was to be, in % of the latter."""
    return 100 * (realised - target) / target


def realised_rate(concepts_NT: Tensor, target: float) -> Figures:
    rate = float(is_written(concepts_NT[concepts_NT != PADDED]).float().mean())
    error = rate_error(rate, target)
    return {"target_rate": target, "concept_rate": rate, "rate_error_percent": error}


def code_use(counts_GK: Tensor) -> Figures:
    """Of the first digit: perplexity, codes that occur, share of the most frequent. Over all
    digits: perplexity by stage, and bits per concept, the sum of the digits' entropies: an upper
    bound of their joint entropy. All but the number of codes is None where none was counted."""
    counts_K = counts_GK[0]
    by_stage = [perplexity(counts_K) for counts_K in counts_GK] if counts_K.any() else None
    return {
        "code_perplexity": by_stage and by_stage[0],
        "code_perplexity_by_stage": by_stage,
        "bits_per_concept": by_stage and sum(map(math.log2, by_stage)),
        "codes_used": int((counts_K > 0).sum()),
        "largest_code_share": by_stage and float(counts_K.max() / counts_K.sum()),
    }


def perplexity(counts_K: Tensor) -> float | None:
    """exp of the entropy of the codes that were counted; None where none was."""
    return float(Categorical(counts_K.double()).perplexity()) if counts_K.any() else None


def longest_tail(ids_NT: Tensor) -> int:
    """Longest run of normal tokens in any row of concept ids."""
    return int(tail_lengths(is_written(ids_NT), ids_NT != PADDED).max())


def bucket_means(nll_NT: Tensor) -> list[float]:
    """Mean NLL in buckets of the predicted token's position; nan is no token."""
    return [float(nll_Nw.nanmean()) for nll_Nw in nll_NT.split(BUCKET, 1)]


def by_position(nll_NT: Tensor, control_NT: Tensor | None = None) -> list[dict]:
    """`bucket_means` with the positions of each bucket, and those of a control."""
    control = () if control_NT is None else bucket_means(control_NT)
    means = zip_longest(bucket_means(nll_NT), control)
    length = nll_NT.shape[1]
    return [
        {"from": start, "to": min(start + BUCKET, length), "nll": x, "control_nll": y}
        for start, (x, y) in zip(range(0, length, BUCKET), means, strict=True)
    ]


def finite(nll: float) -> float:
    """`nll` itself. Raises DataError where it is no number."""
    if not math.isfinite(nll):
        raise DataError(
            f"the NLL is {nll}: need finite logits. try: another checkpoint, or float32"
        )
    return nll


def evaluate(subject: Subject, blocks: TextBlocks, control: Subject | None = None) -> Figures:
    """All quality figures of a model on (N, T) held-out blocks, the gate running free; with
    concepts also what ablating them costs.

    Bits per byte are of the source's own bytes, those of the predicted tokens (all but each row's
    first). Deltas are to the model's own NLL (ablations: positive = the codes matter) or to the
    control's (positive = worse than the control). Raises DataError for a non-finite NLL."""
    subject.refuse("answers signals", "a model of pairs of a source and a target")
    model, ids_NT, rates = subject.model, blocks.ids_NT, subject.rates
    ablations = ABLATIONS if getattr(model.config, "writes_concepts", False) else ()
    jobs = {"own": Reading()} | {kind: Reading(ablation=kind) for kind in ablations}
    jobs |= {rate: Reading(rate=rate) for rate in rates}
    if control is not None:
        jobs["control"] = Reading(by_control=True)
    read = read_all(Reader(subject, control, [*jobs.values()]), ids_NT)
    if (counted_NT := blocks.counted_NT) is not None:
        read = [(nll_NT.where(counted_NT[:, 1:], math.nan), ids_NT) for nll_NT, ids_NT in read]
    readings = dict(zip(jobs, read, strict=True))
    own_NT, concepts_NT = readings["own"]
    known_NT = ~own_NT.isnan()
    nats, text_bytes = own_NT[known_NT].double().sum(), blocks.bytes_NT[:, 1:][known_NT].sum()
    nll = {name: mean(nll_NT) for name, (nll_NT, _) in readings.items()}
    written = {} if concepts_NT is None else concept_figures(subject, blocks, own_NT, concepts_NT)
    figures = {
        "tokens": int(known_NT.sum()),
        "nll": finite(nll["own"]),
        "bits_per_byte": float(nats / text_bytes) / math.log(2),
        "boundary": getattr(model.config, "boundary", None),
        "nll_by_position": by_position(own_NT, readings.get("control", [None])[0]),
        "sequence_length": ids_NT.shape[1],
        **shares(model.config, ids_NT.shape[1], written.get("concept_rate")),
        **{f"delta_nll_{kind}": nll[kind] - nll["own"] for kind in ablations},
        **written,
    }
    dial = [realised_rate(readings[rate][1], rate) | {"nll": nll[rate]} for rate in rates]
    if dial:
        figures["dial"] = dial
    if control is not None:
        figures["control_nll"] = nll["control"]
        for line in (figures, *dial):
            line["delta_nll_control"] = line["nll"] - nll["control"]
    return figures


def proposal_nll(model, ids_NT: Tensor) -> list[float] | None:
    """NLL, over the whole vocabulary, of the token 1, 2, … places on under what a gate proposes
    for it, at the same places; None for a gate that proposes nothing, and for rows of documents."""
    proposals = getattr(model.writer.gate.boundary, "proposals", None)
    if proposals is None or (ids_NT == IGNORED).any():
        return None

    def nll(ids_BT: Tensor) -> tuple[Tensor]:
        ids_BT = ids_BT.to(model.device)
        x_BTD = model.writer.codes.normalise(model.shallow_states(ids_BT))
        x_BTf = torch.cat([x_BTD[:, 1:], x_BTD[:, :-1]], -1)
        log_p_kBTW = proposals(x_BTf.flatten(0, 1)).unflatten(1, x_BTf.shape[:2])
        count, heads = ids_BT.shape[1] - 1 - len(log_p_kBTW), enumerate(log_p_kBTW, start=2)
        parts = [
            proposals.nll(log_p_BTW[:, :count], ids_BT[:, first : first + count])
            for first, log_p_BTW in heads
        ]
        return (torch.stack(parts, -1),)

    return batched(nll, ids_NT)[0].flatten(0, 1).mean(0).tolist()


def shares(config, length: int, rate: float | None) -> Figures:
    """Of the base's compute and cache, at a realised rate and at the end of so many tokens."""
    if not hasattr(config, "layer_share"):
        return {"layer_share": 1.0, "cache_share": 1.0}
    cache = config.cache_share(length, rate) if hasattr(config, "slices") else None
    return {"layer_share": config.layer_share(rate), "cache_share": cache}


def concept_figures(
    subject: Subject, blocks: TextBlocks, nll_NT: Tensor, concepts_NT: Tensor
) -> Figures:
    """Realised rate and use of the (N, T) concept ids of blocks, NLL where a concept was just
    written and in the tails, and the first texts in their segments."""
    model = subject.model
    just_NT = is_written(concepts_NT)[:, :-1]
    sizes = {key: getattr(model.config, key) for key in ("num_concepts", "codes_per_concept")}
    rate = realised_rate(concepts_NT, model.dial.rate)
    texts = zip(blocks.ids_NT[:SAMPLES], concepts_NT, strict=False)
    return {
        **rate,
        "compression_ratio": 1 / rate["concept_rate"],
        "longest_tail": longest_tail(concepts_NT),
        **code_use(count_digits(concepts_NT[concepts_NT >= 0], **sizes)),
        **sizes,
        "proposal_nll": proposal_nll(model, blocks.ids_NT),
        "nll_at_concepts": mean(nll_NT[just_NT]),
        "nll_in_tail": None if just_NT.all() else mean(nll_NT[~just_NT]),
        "samples": [sample(*text, subject.tokenizer) for text in texts],
    }


def sample(ids_T: Tensor, concepts_T: Tensor, tokenizer) -> Figures:
    """One text as pieces (one per token, see `detokenize.pieces`) with the concept that each token
    wrote, if any."""
    real_T = ids_T != IGNORED
    concepts = concepts_T[real_T].tolist()
    tokens = zip(pieces(tokenizer, ids_T[real_T].tolist()), concepts, strict=True)
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
