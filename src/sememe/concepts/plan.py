"""Plans: (B, P) concept ids of I types in one tensor, and the tables that read and write them.

Type i has K_i ids and at most L_i concepts. It owns the slots offset_i … offset_i + L_i - 1, NULL
behind its end; no slot holds an `<EOS>`: a type that is shorter than L_i was ended by it, one of
length L_i by being full. As inputs of a model a separator stands ahead of each type. Suffixes: B
rows · I types · P slots · C = I + P columns, with the separators · K ids · D width."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sememe.errors import CheckpointError

NULL = -1


@dataclass(frozen=True)
class PlanShape:
    """How many ids each type has, and how many concepts at most."""

    sizes: tuple[int, ...]
    lengths: tuple[int, ...]

    @property
    def types(self) -> int:
        return len(self.sizes)

    @property
    def slots(self) -> int:
        return sum(self.lengths)

    def offset(self, i: int) -> int:
        """First slot of type i."""
        return sum(self.lengths[:i])

    def of_type(self, plan: Tensor, i: int) -> Tensor:
        """(…, L_i) slots of type i."""
        return plan[..., self.offset(i) : self.offset(i) + self.lengths[i]]

    def columns(self, i: int) -> slice:
        """Where the separator of type i and its slots stand among the C columns."""
        start = self.offset(i) + i
        return slice(start, start + self.lengths[i] + 1)

    def counts(self, plan_BP: Tensor) -> Tensor:
        """(B, I) concepts in each type."""
        return torch.stack(
            [(self.of_type(plan_BP, i) != NULL).sum(-1) for i in range(self.types)], -1
        )

    def id_counts(self, plan_NP: Tensor) -> list[Tensor]:
        """(K_i,) how often each id of each type occurs."""
        types = zip(range(self.types), self.sizes, strict=True)
        ids = ((self.of_type(plan_NP, i), size) for i, size in types)
        return [torch.bincount(x[x != NULL], minlength=size).double() for x, size in ids]

    def targets(self, plan_BP: Tensor, i: int) -> Tensor:
        """(B, L_i + 1) what is to be predicted at the separator and at each concept of type i: the
        next id, K_i for `<EOS>`, and
        -100 behind that or behind the last slot."""
        ids_BL = F.pad(self.of_type(plan_BP, i), (0, 1), value=NULL)
        place_L = torch.arange(ids_BL.shape[1], device=plan_BP.device)
        ends_BL = (place_L == (ids_BL != NULL).sum(1, keepdim=True)) & (place_L < self.lengths[i])
        return ids_BL.masked_fill(ids_BL == NULL, -100).masked_fill(ends_BL, self.sizes[i])

    def type_of_slot(self, device=None) -> Tensor:
        """(P,) the type that owns each slot."""
        return torch.arange(self.types, device=device).repeat_interleave(
            torch.tensor(self.lengths, device=device)
        )

    def layout(self, device=None) -> tuple[Tensor, Tensor, Tensor]:
        """Of the C columns: index among I separators followed by P slots, type, and place in the
        type (0 the separator's)."""
        index, kind, place = [], [], []
        for i, length in enumerate(self.lengths):
            index += [i, *range(self.types + self.offset(i), self.types + self.offset(i) + length)]
            kind += [i] * (length + 1)
            place += range(length + 1)
        return tuple(torch.tensor(x, device=device) for x in (index, kind, place))

    def check(self, plan: Tensor) -> Tensor:
        """The plan itself. Raises CheckpointError where it is none of this shape."""
        if plan.dim() != 2 or plan.shape[1] != self.slots or plan.is_floating_point():
            raise CheckpointError(
                f"a plan tensor of {plan.dtype} and shape {tuple(plan.shape)}: need integers "
                "(rows, "
                f"{self.slots}), one slot for each of {self.lengths} concepts. try: PlanShape.pack"
            )
        kind_P = self.type_of_slot(plan.device)
        size_P = torch.tensor(self.sizes, device=plan.device)[kind_P]
        outside = (plan < NULL) | (plan >= size_P)
        behind = F.pad(
            (plan[:, 1:] != NULL) & (plan[:, :-1] == NULL) & (kind_P[1:] == kind_P[:-1]), (1, 0)
        )
        if bool((outside | behind).any()):
            row, slot = (outside | behind).nonzero()[0].tolist()
            i, got = int(kind_P[slot]), int(plan[row, slot])
            if bool(outside[row, slot]):
                raise CheckpointError(
                    f"plan id {got} in type {i}: need ids from 0 to {self.sizes[i] - 1}, or {NULL} "
                    "behind the "
                    "last. try: plans of the model that reads them"
                )
            raise CheckpointError(
                f"plan id {got} behind the end of type {i}, in slot {slot - self.offset(i)}: need "
                "all ids of a "
                f"type ahead of its {NULL}s. try: PlanShape.pack"
            )
        return plan

    def pack(self, rows: list[list[list[int]]]) -> Tensor:
        """Plans as a list of ids for each type → (B, P). Raises CheckpointError for what does not
        fit."""
        for row in rows:
            if len(row) != self.types or any(
                len(ids) > most for ids, most in zip(row, self.lengths, strict=True)
            ):
                raise CheckpointError(
                    f"a plan of {[len(ids) for ids in row]} concepts: need {self.types} types of "
                    "at most "
                    f"{self.lengths}. try: cut it"
                )
        flat = [
            [
                x
                for ids, most in zip(row, self.lengths, strict=True)
                for x in [*ids, *[NULL] * (most - len(ids))]
            ]
            for row in rows
        ]
        plan_BP = self.check(torch.tensor(flat, dtype=torch.long).reshape(len(rows), self.slots))
        if any(NULL in ids for row in rows for ids in row):
            raise CheckpointError(
                f"plan id {NULL} in a list: need ids alone. try: PlanShape.unpack"
            )
        return plan_BP

    def unpack(self, plan_BP: Tensor) -> list[list[list[int]]]:
        """(B, P) → a list of ids for each type of each row."""
        parts = [self.of_type(plan_BP, i).tolist() for i in range(self.types)]
        return [[[x for x in ids if x != NULL] for ids in row] for row in zip(*parts, strict=True)]


class PlanEmbedding(nn.Module):
    """The vocabulary of one type, in normalised coordinates: a concept is read and written with one
    vector. `<EOS>` is only written."""

    def __init__(self, size: int, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size, width))
        self.eos = nn.Parameter(torch.zeros(1, width))
        self.bias = nn.Parameter(torch.zeros(size + 1))
        self.log_sharpness = nn.Parameter(torch.zeros(()))

    @torch.no_grad()
    def begin(self, x_nD: Tensor) -> None:
        """The first n ids become these, each at scale 1: an id is also what the planner's states,
        of scale 1, are multiplied with, and long ones would win."""
        self.weight[: len(x_nD)] = F.rms_norm(x_nD, x_nD.shape[-1:], eps=1e-6).to(self.weight)

    def logits(self, x: Tensor) -> Tensor:
        """(…, D) states of scale 1 → (…, K + 1), `<EOS>` last. At the start their deviation is
        1."""
        rows = torch.cat([self.weight, self.eos]).float() * (
            self.log_sharpness.float().exp() / x.shape[-1] ** 0.5
        )
        return F.linear(x.float(), rows, self.bias.float())


class PlanCodes(nn.Module):
    """All types' vocabularies, the separators and the types' own vectors, with the frame (mean,
    scale) of the embeddings that they stand among: `state = mean + scale · x`, so that one learning
    rate fits every base."""

    def __init__(self, shape: PlanShape, width: int):
        super().__init__()
        self.shape = shape
        self.types = nn.ModuleList(PlanEmbedding(size, width) for size in shape.sizes)
        self.separator = nn.Parameter(
            torch.zeros(shape.types + 1, width)
        )  # the last one stands ahead of the text
        self.kind = nn.Parameter(torch.zeros(shape.types, width))
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("scale", torch.ones(width))

    @torch.no_grad()
    def start(self, embed_ND: Tensor, seed: int = 0) -> None:
        """Everything as if drawn from the (N, D) embeddings of the base."""
        self.mean.copy_(embed_ND.float().mean(0))
        self.scale.copy_(embed_ND.float().std(0).clamp(min=1e-6))
        generator = torch.Generator().manual_seed(seed)
        for p in (
            self.separator,
            self.kind,
            *(p for one in self.types for p in (one.weight, one.eos)),
        ):
            p.copy_(torch.randn(p.shape, generator=generator))

    def to_states(self, x: Tensor) -> Tensor:
        """(…, D) normalised coordinates → (…, D) fp32 inputs of the base."""
        return self.mean.float() + self.scale.float() * x.float()

    def to_frame(self, state: Tensor) -> Tensor:
        """(…, D) inputs of the base → (…, D) fp32 normalised coordinates."""
        return (state.float() - self.mean) / self.scale

    def table(self, i: int) -> Tensor:
        """(K_i, D) fp32 states of the ids of type i."""
        return self.to_states(self.types[i].weight)

    def forward(self, plan_BP: Tensor) -> Tensor:
        """(B, P, D) fp32 states of the concepts; some state where there is none."""
        of_type, clamped = self.shape.of_type, plan_BP.clamp(min=0)
        return torch.cat(
            [
                self.to_states(F.embedding(of_type(clamped, i), one.weight))
                for i, one in enumerate(self.types)
            ],
            1,
        )

    def means(self, plan_BP: Tensor, e_BPD: Tensor) -> Tensor:
        """(B, I · D) fp32 mean of each type's concept states in this frame, 0 where it has none."""
        there_B1P = (plan_BP != NULL).unsqueeze(1)
        x_BDP, of_type = self.to_frame(e_BPD).mT * there_B1P, self.shape.of_type
        return torch.cat(
            [
                of_type(x_BDP, i).sum(-1) / of_type(there_B1P, i).sum(-1).clamp(min=1)
                for i in range(self.shape.types)
            ],
            1,
        )

    def soft(self, logits: list[Tensor], temperature: float = 1.0) -> Tensor:
        """(B, P, D) mixtures of each slot's concepts, from (B, L_i + 1, K_i + 1) logits, given that
        it holds one. The vectors themselves get no gradient from here; they have that of the
        concept that was read."""
        p = [(x[:, :-1, :-1].float() / temperature).softmax(-1) for x in logits]
        return torch.cat([p_BLK @ self.table(i).detach() for i, p_BLK in enumerate(p)], 1)

    def columns(self, e_BPD: Tensor) -> Tensor:
        """(B, P, D) concept states → (B, C, D) inputs: separators among them, and on each its
        type's vector."""
        index_C, kind_C, _ = self.shape.layout(e_BPD.device)
        separator_BID = self.to_states(self.separator[:-1]).expand(len(e_BPD), -1, -1)
        x_BCD = torch.cat([separator_BID, e_BPD.float()], 1)[:, index_C]
        return x_BCD + (self.scale.float() * self.kind.float())[kind_C]

    def last_separator(self) -> Tensor:
        """(D,) the input that the text's first token is predicted from."""
        return self.to_states(self.separator[-1])


def straight_through(hard: Tensor, soft: Tensor) -> Tensor:
    """`hard`, exactly; backward the gradient of both."""
    return hard + (soft - soft.detach())
