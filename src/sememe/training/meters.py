"""What a run is watched by: concept ids, gradients and held-out blocks → the figures of
metrics.jsonl. Cheap and always on; what each figure means: docs/figures.md."""

import torch
from torch import Tensor

from sememe.concepts.ablation import ABLATIONS
from sememe.concepts.codebook import count_digits
from sememe.concepts.writer import NULL
from sememe.evaluation.quality import bucket_means, code_use, longest_tail, soft_hard, token_nll
from sememe.models.planner.model import EXECUTOR, PLANNER

SMALL_BATCH = 512  # held-out tokens that codes are ablated on; one forward each
USE = ("code_perplexity", "codes_used", "largest_code_share", "bits_per_concept")
"""What is logged of `code_use`."""


class ConceptMeter:
    """One training interval from what the forward pass returns anyway: realised rate, tails and
    code use. Counted first and divided once, over all ranks."""

    def __init__(self, num_concepts: int, codes_per_concept: int = 1):
        self.shape = (codes_per_concept, num_concepts)
        self.clear()

    def clear(self) -> None:
        self.counts_GK = torch.zeros(self.shape, dtype=torch.float64)
        # Concepts written, tokens, closed segments, tokens in the tails of those.
        self.sums_4 = torch.zeros(4, dtype=torch.float64)
        self.longest = torch.zeros(())

    def see(self, outputs, labels_BT: Tensor) -> None:
        """What a forward pass returned."""
        ids_BT = outputs.concept_ids.detach().cpu()
        written_BT = ids_BT != NULL
        tails_n = closed_tails(written_BT)
        counts = (written_BT.sum(), ids_BT.numel(), len(tails_n), tails_n.sum())
        self.sums_4 += torch.tensor(counts, dtype=torch.float64)
        self.longest = self.longest.clamp(min=longest_tail(written_BT))
        codes, size = self.shape
        self.counts_GK += count_digits(ids_BT[ids_BT >= 0], size, codes)

    def read(self) -> dict[str, float]:
        """Figures since the last read; sums over ranks where there are several."""
        ranks = [(self.sums_4, self.counts_GK, self.longest)]
        if torch.distributed.is_initialized():
            ranks *= torch.distributed.get_world_size()
            torch.distributed.all_gather_object(ranks, ranks[0])
        sums_R4, counts_RGK, longest_R = (torch.stack(x) for x in zip(*ranks, strict=True))
        written, tokens, segments, tail_tokens = sums_R4.sum(0).tolist()
        figures = {"rate": written / max(tokens, 1), "longest_tail": int(longest_R.max())}
        if segments:
            figures["tail_mean"] = tail_tokens / segments
        self.clear()
        use = code_use(counts_RGK.sum(0))
        return figures | ({key: use[key] for key in USE} if use["codes_used"] else {})


def closed_tails(written_BT: Tensor) -> Tensor:
    """(n,) tokens in the tail of every segment that a concept closed. A row's first concept closes
    none, and its last tail is cut off by the end of the row."""
    row_n, column_n = written_BT.nonzero(as_tuple=True)
    return (column_n.diff() - 1)[row_n.diff() == 0]


def gradient_norms(model) -> dict[str, float]:
    """The norm of the gradients as they are now: of all LoRA (`lora`; of a planner's two adapters
    apart, by their names), and of each new module that is trained."""
    squares: dict[str, Tensor] = {}
    for name, p in model.named_parameters():
        if p.requires_grad and p.grad is not None:
            part = name.removeprefix("writer.").removeprefix("readout.").split(".")[0]
            if "lora_" in name:
                part = next((of for of in (PLANNER, EXECUTOR) if f".{of}." in name), "lora")
            squares[part] = squares.get(part, 0.0) + p.grad.detach().float().square().sum()
    return {part: float(square.sqrt()) for part, square in squares.items()}


def heldout_figures(model, ids_NT: Tensor) -> dict[str, float | list]:
    """NLL of (N, T) held-out blocks. `model` is in eval mode."""
    return _nll_figures(token_nll(model, ids_NT)[0])


def concept_figures(model, ids_NT: Tensor) -> dict[str, float | list]:
    """The same, the gate running free, and its concepts. What ablating the codes costs, and what
    the head is like, is measured on the first few blocks, once codes are in use."""
    nll_NT, concepts_NT = token_nll(model, ids_NT)
    written_NT = concepts_NT != NULL
    tails_n = closed_tails(written_NT)
    figures = _nll_figures(nll_NT) | {"heldout_rate": float(written_NT.float().mean())}
    if len(tails_n):
        figures["heldout_tail_mean"] = float(tails_n.float().mean())
        figures["heldout_tail_histogram"] = torch.bincount(tails_n).tolist()
    if model.dial.quantise == 0:
        return figures
    length = min(ids_NT.shape[1], SMALL_BATCH)
    small_BT = ids_NT[: max(1, SMALL_BATCH // length), :length]
    plain = float(nll_NT[: len(small_BT), : length - 1].mean())
    for kind in ABLATIONS:
        nll_BT, _ = token_nll(model, small_BT, batch=len(small_BT), ablation=kind)
        figures[f"delta_nll_{kind}"] = float(nll_BT.mean()) - plain
    return figures | head_figures(model, small_BT)


def _nll_figures(nll_NT: Tensor) -> dict[str, float | list]:
    return {
        "heldout_nll": float(nll_NT.mean()),
        "heldout_nll_by_position": bucket_means(nll_NT),
    }


@torch.no_grad()
def head_figures(model, ids_BT: Tensor) -> dict[str, float]:
    """How sure the head is of its codes, and how far the soft mixture that gives them their
    gradient is from the code that the forward pass takes: means over the coded concepts of (B, T)
    text. Nothing where there are none."""
    x_nD = model.written_inputs(ids_BT)
    if len(x_nD) == 0:
        return {}
    codes = model.writer.quantise(x_nD, soft=True)
    cosine_n, distance_n = soft_hard(codes.soft_nD, codes.hard_nD)
    return {
        "code_entropy": float(codes.entropy),
        "code_max_prob": float(codes.max_prob),
        "soft_hard_cosine": float(cosine_n.mean()),
        "soft_hard_distance": float(distance_n.mean()),
    }
