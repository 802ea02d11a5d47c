"""What a run is watched by: concept ids, gradients and held-out blocks → the figures of
metrics.jsonl. Cheap and always on; what each figure means: docs/figures.md."""

import re
from collections import defaultdict
from math import nan

import torch
import torch.nn.functional as F
from torch import Tensor

from sememe.backbone.processes import gathered
from sememe.concepts.ablation import ABLATIONS
from sememe.concepts.codebook import count_digits
from sememe.concepts.writer import PADDED
from sememe.data import TextBlocks
from sememe.evaluation.quality import (
    bucket_means,
    code_use,
    is_written,
    longest_tail,
    mean,
    soft_hard,
    token_nll,
)
from sememe.evaluation.results import Figures
from sememe.rows import IGNORED

SMALL_BATCH = 512  # held-out tokens that codes are ablated on; one forward each
USE = ("code_perplexity", "codes_used", "largest_code_share", "bits_per_concept")
"""What is logged of `code_use`."""
PART = re.compile(r".*lora_\w+\.(planner|executor)\.|.*(lora)_|(?:writer\.)?(?:readout\.)?([^.]+)")
"""Name of a weight → the part that its gradient counts with: all LoRA, of a planner's two adapters
each, or its new module."""


class ConceptMeter:
    """One training interval from what the forward pass returns anyway: realised rate, tails and
    code use. Counted first and divided once, over all ranks."""

    def __init__(self, num_concepts: int, codes_per_concept: int = 1):
        self.shape = (num_concepts, codes_per_concept)
        self.ids: list[Tensor] = []

    def see(self, outputs, labels_BT: Tensor) -> None:
        """What a forward pass returned."""
        self.ids.append(outputs.concept_ids.detach().cpu())

    def read(self) -> Figures:
        """Figures since the last read, of all ranks where there are several."""
        ids_NT = torch.cat(_as_wide(gathered([torch.cat(_as_wide(self.ids))])))
        self.ids = []
        figures = written_figures(ids_NT) | {"longest_tail": longest_tail(ids_NT)}
        use = code_use(count_digits(ids_NT[ids_NT >= 0], *self.shape))
        return figures | ({key: use[key] for key in USE} if use["codes_used"] else {})


def _as_wide(parts: list[Tensor]) -> list[Tensor]:
    """(N, T) ids of batches, filled up to the longest."""
    length = max(ids_NT.shape[1] for ids_NT in parts)
    return [F.pad(ids_NT, (0, length - ids_NT.shape[1]), value=PADDED) for ids_NT in parts]


def written_figures(ids_NT: Tensor) -> Figures:
    """Realised rate, and the mean tail of a segment that a concept closed, where there is one. A
    row's first concept closes none, and its last tail is cut off by the end of the row."""
    written_NT = is_written(ids_NT)
    row_n, column_n = written_NT.nonzero(as_tuple=True)
    tails_n = (column_n.diff() - 1)[row_n.diff() == 0].double()
    figures = {"rate": int(written_NT.sum()) / int((ids_NT != PADDED).sum())}
    return figures | ({"tail_mean": float(tails_n.mean())} if len(tails_n) else {})


def gradient_norms(model) -> Figures:
    """The norm of the gradients as they are now, by `PART`."""
    gradients = defaultdict(list)
    for name, p in model.named_parameters():
        if p.grad is not None:
            match = PART.match(name)
            gradients[match[match.lastindex]].append(p.grad)
    return {part: float(torch.nn.utils.get_total_norm(x)) for part, x in gradients.items()}


def heldout_figures(model, blocks: TextBlocks) -> Figures:
    """NLL of held-out blocks, or of the tokens in them that are counted, the gate running free, and
    the concepts of a model that writes some. Of several sources it is the mean over the tokens of
    all, and that of each stands beside it. What ablating the codes costs, and what the head is
    like, is measured on the first few blocks, once codes are in use. `model` is in eval mode."""
    ids_NT = blocks.ids_NT
    nll_NT, concepts_NT = token_nll(model, ids_NT, counted_NT=blocks.counted_NT)
    figures = {"heldout_nll": mean(nll_NT), "heldout_nll_by_position": bucket_means(nll_NT)}
    if counts := blocks.counts:
        means = map(mean, nll_NT.split([*counts.values()]))
        figures["heldout_nll_by_source"] = dict(zip(counts, means, strict=True))
    if concepts_NT is None:
        return figures
    written = written_figures(concepts_NT)
    figures |= {f"heldout_{key}": x for key, x in written.items()}
    if model.dial.quantise == 0:
        return figures
    length = min(ids_NT.shape[1], SMALL_BATCH)
    small_BT = ids_NT[: max(1, SMALL_BATCH // length), :length]
    plain_BT = nll_NT[: len(small_BT), : length - 1]
    for kind in ABLATIONS:
        nll_BT, _ = token_nll(model, small_BT, batch=len(small_BT), ablation=kind)
        figures[f"delta_nll_{kind}"] = mean(nll_BT.where(~plain_BT.isnan(), nan)) - mean(plain_BT)
    padded = (small_BT == IGNORED).any()
    return figures | head_figures(
        model, small_BT[small_BT != IGNORED][None] if padded else small_BT
    )


@torch.no_grad()
def head_figures(model, ids_BT: Tensor) -> Figures:
    """How sure the head is of its codes, and how far the soft mixture that gives them their
    gradient is from the code that the forward pass takes: means over the coded concepts of (B, T)
    text. Nothing where there are none."""
    x_nD = model.written_inputs(ids_BT)
    if len(x_nD) == 0:
        return {}
    codes = model.writer.quantise(x_nD, soft=True)
    cosine_n, distance_n = soft_hard(codes.soft_nD, codes.hard_nD)
    figures = {
        "code_entropy": codes.entropy,
        "code_max_prob": codes.max_prob,
        "soft_hard_cosine": cosine_n.mean(),
        "soft_hard_distance": distance_n.mean(),
    }
    return {key: float(x) for key, x in figures.items()}
