"""Held-out quality: NLL, bits per byte, realised rate, code use, and what ablating the codes
costs."""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sememe.concepts.ablation import ABLATIONS
from sememe.concepts.boundary import BOUNDARIES
from sememe.concepts.codebook import count_digits
from sememe.concepts.segments import tail_lengths
from sememe.concepts.writer import NULL
from sememe.data import TextBlocks
from sememe.detokenize import pieces
from sememe.errors import DataError
from sememe.evaluation.partial import Partial
from sememe.models.configuration import (
    CompressorConfig,
    ConceptConfig,
    ControlConfig,
    OnlineConfig,
    PlannerConfig,
)

BUCKET = 64  # positions per bucket of `nll_by_position`
FLOOR = 2048  # tokens that are measured however little time there is


@torch.no_grad()
def token_nll(
    model,
    ids_NT: Tensor,
    batch: int = 4,
    ablation: str | None = None,
    tick: Callable[[int], None] = lambda n: None,
):
    """Per-token NLL in nats (N, T-1), on the host, and the concept ids (N, T) (None for a model
    without concepts)."""
    nll, ids = [], []
    extra = {"ablation": ablation} if ablation else {}
    for part_BT in ids_NT.split(batch):
        part_BT = part_BT.to(model.device)
        out = model(input_ids=part_BT, use_cache=False, **extra)
        loss = F.cross_entropy(
            out.logits[:, :-1].flatten(0, 1).float(), part_BT[:, 1:].flatten(), reduction="none"
        )
        nll.append(loss.view(len(part_BT), -1).cpu())
        if getattr(out, "concept_ids", None) is not None:
            ids.append(out.concept_ids.cpu())
        tick(part_BT.numel())
    return torch.cat(nll), torch.cat(ids) if ids else None


def partial_nll(*asked) -> Callable[[], list]:
    """`token_nll` as JSON, when it is called."""
    return lambda: [None if x is None else x.tolist() for x in token_nll(*asked)]


def measure(
    sides: dict[str, tuple[Any, str | None]],
    ids_NT: Tensor,
    batch: int,
    tick: Callable[[int], None],
    partial: Partial,
    seconds: float | None = None,
    prefix: str = "",
) -> dict[str, tuple[Tensor, Tensor | None]]:
    """`token_nll` of several sides (model, ablation) on (N, T) blocks: every side on a batch before
    any has the next.

    A batch that `partial` holds is not run again. Where `seconds` run out, all sides end with the
    same first blocks, of at least `FLOOR` tokens. Raises DataError for a non-finite NLL of the
    first side."""
    rows: dict[str, list] = {name: [] for name in sides}
    first, before = next(iter(sides)), partial.seconds
    for start in range(0, len(ids_NT), batch):
        due = seconds is not None and start * ids_NT.shape[1] >= FLOOR
        if due and (partial.seconds - before) * (1 + batch / start) > seconds:
            break
        ids_BT = ids_NT[start : start + batch]
        for name, (model, ablation) in sides.items():
            nll, ids = partial.part(
                f"{prefix}{name} {start}", partial_nll(model, ids_BT, batch, ablation)
            )
            rows[name].append((torch.tensor(nll), None if ids is None else torch.tensor(ids)))
            if name == first and not rows[name][-1][0].isfinite().all():
                raise DataError(
                    f"the NLL is {float(rows[name][-1][0].mean())}: need finite logits. try: "
                    "another checkpoint, or "
                    "float32"
                )
            tick(ids_BT.numel())
    columns = {name: zip(*parts, strict=True) for name, parts in rows.items()}
    return {
        name: (torch.cat(nll), None if ids[0] is None else torch.cat(ids))
        for name, (nll, ids) in columns.items()
    }


def layer_share(config, rate: float | None = None) -> float:
    """Layer applications per token over the base's: (S + M · rate + D) / (S + M + D), at the
    *realised* rate of an online model. Skipping the middle is rate 0;
    the control and a plain base run every layer: 1."""
    if isinstance(config, OnlineConfig):
        shallow, middle, deep = config.split
        return (shallow + middle * rate + deep) / sum(config.split)
    if isinstance(config, CompressorConfig):  # read once by one adapter, written once by the other
        layers = config.text_config.num_hidden_layers
        rate = config.rate if rate is None else rate
        slots = rate if BOUNDARIES[config.boundary].offline else 0.0  # one more for each concept
        return 1 + (1 + slots) * (config.depth or layers) / layers
    first, last = getattr(config, "skipped", None) or (0, 0)
    return 1 - (last - first) / config.get_text_config().num_hidden_layers


def system_of(config) -> str:
    """`online`, `compressor`, `planner` or a baseline, as in a recipe; `base` for a model that is
    none of ours."""
    if isinstance(config, PlannerConfig):
        return "planner"
    if isinstance(config, ConceptConfig):
        return "online" if isinstance(config, OnlineConfig) else "compressor"
    if not isinstance(config, ControlConfig):
        return "base"
    return "skip" if config.skipped else "window" if config.window is not None else "control"


def rate_and_codes(ids_NT: Tensor, num_concepts: int, codes_per_concept: int = 1) -> dict[str, Any]:
    """Realised rate and code use of (N, T) concept ids. Padding-free rows; every row's first token
    is the sink."""
    written = ids_NT != NULL
    counts_GK = count_digits(ids_NT[ids_NT >= 0], num_concepts, codes_per_concept)
    rate = float(written.float().mean())
    return {
        "concept_rate": rate,
        "compression_ratio": 1 / rate,
        "longest_tail": longest_tail(written),
        **code_use(counts_GK),
        "code_counts": sorted(counts_GK[0][counts_GK[0] > 0].int().tolist(), reverse=True),
        "num_concepts": num_concepts,
        "codes_per_concept": codes_per_concept,
    }


def code_use(counts_GK: Tensor) -> dict[str, Any]:
    """Of the first digit: perplexity, codes that occur, share of the most frequent. Over all
    digits: perplexity by stage, and bits per concept, the sum of the digits' entropies.

    That is an upper bound of their joint entropy (equal where they are independent), and of what
    was counted, which sees fewer codes than there are. All but the number of codes is None where
    none was counted."""
    counts_K, used = counts_GK[0], bool(counts_GK[0].any())
    by_stage = [perplexity(counts_K) for counts_K in counts_GK] if used else None
    return {
        "code_perplexity": by_stage[0] if used else None,
        "code_perplexity_by_stage": by_stage,
        "bits_per_concept": sum(map(math.log2, by_stage)) if used else None,
        "codes_used": int((counts_K > 0).sum()),
        "largest_code_share": float(counts_K.max() / counts_K.sum()) if used else None,
    }


def perplexity(counts_K: Tensor) -> float:
    """exp of the entropy of the codes that were counted; at least one must have been."""
    share = counts_K[counts_K > 0] / counts_K.sum()
    return float(torch.exp(-(share * share.log()).sum()))


def longest_tail(written_NT: Tensor) -> int:
    """Longest run of normal tokens in any row."""
    return int(tail_lengths(written_NT, torch.ones_like(written_NT)).max())


def by_position(nll_NT: Tensor, control_NT: Tensor | None) -> list[dict[str, float | None]]:
    """Mean NLL in buckets of the predicted token's position."""
    buckets = []
    for start in range(0, nll_NT.shape[1], BUCKET):
        part = slice(start, start + BUCKET)
        buckets.append(
            {
                "from": start,
                "to": min(start + BUCKET, nll_NT.shape[1]),
                "nll": float(nll_NT[:, part].mean()),
                "control_nll": None if control_NT is None else float(control_NT[:, part].mean()),
            }
        )
    return buckets


def evaluate(
    model,
    tokenizer,
    blocks: TextBlocks,
    control=None,
    batch: int = 4,
    samples: int = 2,
    tick: Callable[[int], None] = lambda n: None,
    partial: Partial | None = None,
    seconds: float | None = None,
    prefix: str = "",
) -> dict[str, Any]:
    """All quality figures of a model on (N, T) held-out blocks, the gate running free.

    Bits per byte are of the source's own bytes, those of the predicted tokens (all but each row's
    first). Deltas are to the model's own NLL (ablations: positive = the codes matter) or to the
    control's (`delta_nll_control`, positive = worse than the control). `partial`, `seconds`,
    `prefix`: see `measure`. Raises DataError for ids outside the vocabulary or a non-finite NLL.
    """
    ids_NT, vocab = blocks.ids_NT, model.config.get_text_config().vocab_size
    if int(ids_NT.max()) >= vocab or int(ids_NT.min()) < 0:
        raise DataError(
            f"token id {int(ids_NT.max())} is outside this model's vocabulary of {vocab}: need its "
            "own "
            "tokenizer. try: the tokenizer saved beside the model"
        )
    sides = {"own": (model, None)} | ({"control": (control, None)} if control is not None else {})
    if isinstance(model.config, ConceptConfig):
        sides |= {kind: (model, kind) for kind in ABLATIONS}
    found = measure(sides, ids_NT, batch, tick, partial or Partial(), seconds, prefix)
    nll_NT, concepts_NT = found["own"]
    ids_NT = ids_NT[: len(nll_NT)]
    nll = float(nll_NT.mean())
    control_NT = found["control"][0] if control is not None else None
    num_bytes = int(blocks.bytes_NT[: len(nll_NT), 1:].sum())
    result: dict[str, Any] = {
        "tokens": nll_NT.numel(),
        "nll": nll,
        "bits_per_byte": float(nll_NT.double().sum()) / math.log(2) / num_bytes
        if num_bytes
        else None,
        **dict.fromkeys(
            (
                "concept_rate",
                "compression_ratio",
                "nll_at_concepts",
                "nll_in_tail",
                "longest_tail",
                "delta_nll_control",
                "delta_nll_zero",
                "delta_nll_shuffle",
                "delta_nll_random",
                "code_perplexity",
                "codes_used",
                "largest_code_share",
                "code_perplexity_by_stage",
                "bits_per_concept",
            )
        ),
        "system": system_of(model.config),
        "boundary": getattr(model.config, "boundary", None),
        "nll_by_position": by_position(nll_NT, control_NT),
        "sequence_length": ids_NT.shape[1],
    }
    if control_NT is not None:
        result["control_nll"] = float(control_NT.mean())
        result["delta_nll_control"] = nll - result["control_nll"]
    if not isinstance(model.config, ConceptConfig):
        return result | {"layer_share": layer_share(model.config)}
    result |= rate_and_codes(concepts_NT, model.config.num_concepts, model.config.codes_per_concept)
    result["layer_share"] = layer_share(model.config, result["concept_rate"])
    wrote = concepts_NT[:, :-1] != NULL
    result["nll_at_concepts"] = float(nll_NT[wrote].mean())
    result["nll_in_tail"] = float(nll_NT[~wrote].mean()) if (~wrote).any() else None
    for kind in ABLATIONS:
        result[f"delta_nll_{kind}"] = float(found[kind][0].mean()) - nll
    result["samples"] = [
        sample(ids, concepts, tokenizer)
        for ids, concepts in zip(ids_NT[:samples], concepts_NT, strict=False)
    ]
    return result


def sample(ids_T: Tensor, concepts_T: Tensor, tokenizer) -> dict[str, Any]:
    """One text as pieces (one per token, see `detokenize.pieces`) with the concept that each token
    wrote, if any."""
    columns = zip(pieces(tokenizer, ids_T.tolist()), concepts_T.tolist(), strict=True)
    return {
        "pieces": [
            {
                "text": text,
                "concept": concept if concept >= 0 else None,
                "sink": i == 0 and concept < NULL,
            }
            for i, (text, concept) in enumerate(columns)
        ]
    }
