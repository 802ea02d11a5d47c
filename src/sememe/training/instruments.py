"""What a run is watched by: concept ids, gradients and held-out blocks → the figures of
metrics.jsonl.

Cheap and always on. What each figure is like in a healthy run: docs/figures.md.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from sememe.concepts.ablation import ABLATIONS
from sememe.concepts.codebook import count_digits
from sememe.evaluation.quality import by_position, code_use, longest_tail, token_nll
from sememe.models.online import NULL, OnlineForCausalLM
from sememe.models.planner.model import EXECUTOR, PLANNER

SMALL_BATCH = 512  # held-out tokens that codes are ablated on; one forward each
USE = (
    "code_perplexity",
    "codes_used",
    "largest_code_share",
    "bits_per_concept",
)  # what is logged of `code_use`


class ConceptMeter:
    """One training interval from what the forward pass returns anyway: realised rate, tails and
    code use.

    Counted first and divided once, over all ranks."""

    def __init__(self, num_concepts: int, codes_per_concept: int = 1):
        self.num_concepts, self.codes_per_concept = num_concepts, codes_per_concept
        self.clear()

    def clear(self) -> None:
        self.written = self.tokens = self.longest = self.segments = self.tail_tokens = 0
        self.counts_GK = torch.zeros(self.codes_per_concept, self.num_concepts, dtype=torch.float64)

    def see(self, outputs, labels_BT: Tensor) -> None:
        """What a forward pass returned."""
        self.add(outputs.concept_ids)

    def add(self, concept_ids_BT: Tensor) -> None:
        ids_BT = concept_ids_BT.detach().cpu()
        written_BT = ids_BT != NULL
        tails_n = closed_tails(written_BT)
        self.written += int(written_BT.sum())
        self.tokens += ids_BT.numel()
        self.longest = max(self.longest, longest_tail(written_BT))
        self.segments += len(tails_n)
        self.tail_tokens += int(tails_n.sum())
        self.counts_GK += count_digits(
            ids_BT[ids_BT >= 0], self.num_concepts, self.codes_per_concept
        )

    def read(self) -> dict[str, float]:
        """Figures since the last read; sums over ranks where there are several."""
        sums = torch.tensor(
            [self.written, self.tokens, self.segments, self.tail_tokens], dtype=torch.float64
        )
        totals, longest = torch.cat([sums, self.counts_GK.flatten()]), self.longest
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            device = "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"
            totals, most = totals.to(device), torch.tensor(float(longest), device=device)
            torch.distributed.all_reduce(totals)
            torch.distributed.all_reduce(most, op=torch.distributed.ReduceOp.MAX)
            totals, longest = totals.cpu(), int(most)
        written, tokens, segments, tail_tokens = totals[:4].tolist()
        figures = {"rate": written / max(tokens, 1), "longest_tail": longest}
        if segments:
            figures["tail_mean"] = tail_tokens / segments
        self.clear()
        use = code_use(totals[4:].view(self.codes_per_concept, -1))
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
    """All figures of (N, T) held-out blocks, the gate running free. `model` is in eval mode.

    What ablating the codes costs, and what the head is like, is measured on the first few blocks,
    once codes are in use."""
    nll_NT, concepts_NT = token_nll(model, ids_NT)
    figures = {
        "heldout_nll": float(nll_NT.mean()),
        "heldout_nll_by_position": [b["nll"] for b in by_position(nll_NT, None)],
    }
    if concepts_NT is None:
        return figures
    written_NT = concepts_NT != NULL
    figures["heldout_rate"] = float(written_NT.float().mean())
    tails_n = closed_tails(written_NT)
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


@torch.no_grad()
def head_figures(model: OnlineForCausalLM, ids_BT: Tensor) -> dict[str, float]:
    """How sure the head is of its codes, and how far the soft mixture that gives them their
    gradient is from the code that the forward pass takes: means over the coded concepts of (B, T)
    text. Nothing where there are none."""
    x_nD = model.written_inputs(ids_BT)
    if len(x_nD) == 0:
        return {}
    found = model.writer.quantise(x_nD, soft=True)
    distance_n = (found.soft_nD - found.hard_nD).norm(dim=-1) / found.hard_nD.norm(dim=-1).clamp(
        min=1e-6
    )
    return {
        "code_entropy": float(found.entropy),
        "code_max_prob": float(found.max_prob),
        "soft_hard_cosine": float(F.cosine_similarity(found.soft_nD, found.hard_nD, dim=-1).mean()),
        "soft_hard_distance": float(distance_n.mean()),
    }
