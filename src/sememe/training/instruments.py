"""Cheap measures of one training interval, from what the forward pass returns anyway."""

import torch
from torch import Tensor

from sememe.evaluation.quality import longest_tail, perplexity
from sememe.models.online import NULL


class ConceptMeter:
    """Realised rate (concepts and tokens are counted first and divided once, over all ranks) and code use."""

    def __init__(self, num_concepts: int):
        self.num_concepts = num_concepts
        self.clear()

    def clear(self) -> None:
        self.written = self.tokens = self.longest = 0
        self.counts = torch.zeros(self.num_concepts)

    def add(self, concept_ids_BT: Tensor) -> None:
        ids = concept_ids_BT.detach().cpu()
        written = ids != NULL
        self.written += int(written.sum())
        self.tokens += ids.numel()
        self.longest = max(self.longest, longest_tail(written))
        self.counts += torch.bincount(ids[ids >= 0], minlength=self.num_concepts).float()

    def read(self) -> dict[str, float]:
        """Figures since the last read; sums over ranks where there are several."""
        totals = torch.cat([torch.tensor([self.written, self.tokens], dtype=torch.float32), self.counts])
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            device = "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"
            totals, longest = totals.to(device), torch.tensor(float(self.longest), device=device)
            torch.distributed.all_reduce(totals)
            torch.distributed.all_reduce(longest, op=torch.distributed.ReduceOp.MAX)
            totals, self.longest = totals.cpu(), int(longest)
        written, tokens, counts = totals[0], totals[1], totals[2:]
        figures = {"rate": float(written / tokens.clamp(min=1)), "longest_tail": self.longest}
        if counts.sum() > 0:
            figures["code_perplexity"] = perplexity(counts)
            figures["codes_used"] = int((counts > 0).sum())
        self.clear()
        return figures
