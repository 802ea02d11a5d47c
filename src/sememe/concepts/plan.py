"""Plans: (B, P) concept ids of I types in one tensor, and the vocabularies that read and write
them.

Type i has K_i ids and at most L_i concepts. It owns L_i slots, NULL after its end; no slot holds an
`<EOS>`: a type that is shorter than L_i was ended by it, one of length L_i by being full. As inputs
of a model there are the I separators and then the P slots; where each stands in the sequence, the
separator of a type before its concepts, its position says. Suffixes: B rows · I types · P slots ·
C = I + P inputs · M ids of the largest type, and `<EOS>` last · V rows of all vocabularies · D
width."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sememe.errors import CheckpointError

NULL = -1
IGNORED = -100  # targets of cross entropy that do not count


@dataclass
class PlanShape:
    """How many ids each type has, and how many concepts at most.

    eos: where `<EOS>` stands among the logits of any type: past the largest vocabulary.
    first_I: the first slot of each type.
    kind_P, kind_C: the type of each slot, of each input.
    order_C: number of each input in the sequence. position_C: in its type; 0 is the separator's.
    input_P: the input before each slot, which it is predicted from."""

    sizes: tuple[int, ...]
    lengths: tuple[int, ...]

    def __post_init__(self):
        self.types = len(self.sizes)
        self.slots = sum(self.lengths)
        self.eos = max(self.sizes)
        type_I, slot_P = torch.arange(self.types), torch.arange(self.slots)
        length_I = torch.tensor(self.lengths)
        self.first_I = length_I.cumsum(0) - length_I
        self.kind_P = type_I.repeat_interleave(length_I)
        self.kind_C = torch.cat([type_I, self.kind_P])
        self.order_C = torch.cat([self.first_I + type_I, slot_P + self.kind_P + 1])
        self.position_C = self.order_C - self.order_C[self.kind_C]
        self.input_P = self.types + slot_P - 1
        self.input_P[self.first_I] = type_I

    def _goes_on(self, plan_BP: Tensor) -> Tensor:
        """(B, P) bool: whether the type had not ended before this slot."""
        goes_on_BP = plan_BP.roll(1, 1) != NULL
        goes_on_BP[:, self.first_I] = True
        return goes_on_BP

    def targets(self, plan_BP: Tensor) -> Tensor:
        """(B, P) what is to be predicted at each slot: its id, `eos` where its type ends; IGNORED
        after that."""
        id_BP = plan_BP.masked_fill(plan_BP == NULL, self.eos)
        return id_BP.masked_fill(~self._goes_on(plan_BP), IGNORED)

    def sums(self, x_BP: Tensor) -> Tensor:
        """(B, P, …) → (B, I, …) over the slots of each type."""
        zero = torch.zeros_like(x_BP[:, : self.types])
        return zero.index_add(1, self.kind_P.to(x_BP.device), x_BP)

    def counts(self, plan_BP: Tensor) -> Tensor:
        """(B, I) concepts in each type."""
        return self.sums((plan_BP != NULL).long())

    def id_counts(self, plan_NP: Tensor) -> list[Tensor]:
        """(K_i,) how often each id of each type occurs."""
        types = zip(plan_NP.split(self.lengths, 1), self.sizes, strict=True)
        return [torch.bincount(x[x != NULL], minlength=size).double() for x, size in types]

    def check(self, plan_BP: Tensor) -> Tensor:
        """The plan itself. Raises CheckpointError where it is none of this shape."""
        if plan_BP.shape[1:] != (self.slots,):
            raise CheckpointError(
                f"a plan tensor of shape {tuple(plan_BP.shape)}: need (rows, {self.slots}), one "
                f"slot for each of {self.lengths} concepts. try: PlanShape.pack"
            )
        size_P = torch.tensor(self.sizes, device=plan_BP.device)[self.kind_P]
        late_BP = (plan_BP != NULL) & ~self._goes_on(plan_BP)
        wrong_BP = (plan_BP < NULL) | (plan_BP >= size_P) | late_BP
        if bool(wrong_BP.any()):
            row, slot = wrong_BP.nonzero()[0].tolist()
            raise CheckpointError(
                f"plan id {int(plan_BP[row, slot])} in slot {slot}: need ids from 0 to "
                f"{int(size_P[slot]) - 1}, and {NULL} in all slots after a type's last one. "
                "try: plans of the model that reads them"
            )
        return plan_BP

    def pack(self, rows: list[list[list[int]]]) -> Tensor:
        """Plans as a list of ids for each type → (B, P). Raises CheckpointError for what does not
        fit."""
        plans = []
        for row in rows:
            types = zip(row, self.lengths, strict=True)
            plans.append([x for ids, n in types for x in ids + [NULL] * (n - len(ids))])
            if len(plans[-1]) != self.slots:
                raise CheckpointError(
                    f"the plan {row}: need {self.types} types of at most {self.lengths} concepts. "
                    "try: cut it"
                )
        return self.check(torch.tensor(plans, dtype=torch.long).view(-1, self.slots))

    def unpack(self, plan_BP: Tensor) -> list[list[list[int]]]:
        """(B, P) → a list of ids for each type of each row."""
        types = [ids_BL.tolist() for ids_BL in plan_BP.split(self.lengths, 1)]
        return [[[x for x in ids if x != NULL] for ids in row] for row in zip(*types, strict=True)]


class PlanCodes(nn.Module):
    """The vocabularies of all types in one table, the separators and the types' own vectors, with
    the frame (mean, scale) of the embeddings that they stand among: `state = mean + scale · x`, so
    that one learning rate fits every base. A concept is read and written with one vector; `<EOS>`,
    the last row of each type, is only written."""

    def __init__(self, shape: PlanShape, width: int):
        super().__init__()
        self.shape = shape
        size_I1, id_M = torch.tensor(shape.sizes)[:, None], torch.arange(shape.eos + 1)
        row_I1 = (size_I1 + 1).cumsum(0) - size_I1 - 1
        rows = int(size_I1.sum()) + shape.types
        # The row of each id of each type; past all rows for ids that a smaller type has not.
        row_IM = torch.where(id_M < size_I1, row_I1 + id_M, rows)
        row_IM[:, -1:] = row_I1 + size_I1
        self.register_buffer("row_IM", row_IM, persistent=False)
        self.weight = nn.Parameter(torch.zeros(rows, width))
        self.bias = nn.Parameter(torch.zeros(rows))
        self.log_sharpness = nn.Parameter(torch.zeros(shape.types))
        # The last separator stands before the text.
        self.separator = nn.Parameter(torch.zeros(shape.types + 1, width))
        self.kind = nn.Parameter(torch.zeros(shape.types, width))
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("scale", torch.ones(width))

    @torch.no_grad()
    def start(self, embed_ND: Tensor, seed: int = 0) -> None:
        """Everything as if drawn from the (N, D) embeddings of the base."""
        self.mean.copy_(embed_ND.float().mean(0))
        self.scale.copy_(embed_ND.float().std(0).clamp(min=1e-6))
        generator = torch.Generator().manual_seed(seed)
        for p in (self.separator, self.kind, self.weight):
            p.copy_(torch.randn(p.shape, generator=generator))

    @torch.no_grad()
    def begin(self, i: int, x_nD: Tensor) -> None:
        """The first n ids of type i become these, each at scale 1: an id is also what the planner's
        states, of scale 1, are multiplied with, and long ones would win."""
        x_nD = F.rms_norm(x_nD, x_nD.shape[-1:], eps=1e-6)
        self.weight[self.row_IM[i, : len(x_nD)]] = x_nD

    def to_states(self, x: Tensor) -> Tensor:
        """(…, D) normalised coordinates → (…, D) fp32 inputs of the base."""
        return self.mean + self.scale * x

    def to_frame(self, state: Tensor) -> Tensor:
        """(…, D) inputs of the base → (…, D) fp32 normalised coordinates."""
        return (state - self.mean) / self.scale

    def typed(self, x_D: Tensor, kind: Tensor) -> Tensor:
        """(…, D) states of what belongs to types: its own, and its type's vector on it."""
        return x_D + self.scale * self.kind[kind]

    def forward(self, plan_BP: Tensor) -> Tensor:
        """(B, P, D) fp32 states of the concepts; some state where there is none. Raises
        CheckpointError for ids that there is no concept for."""
        id_BP = self.shape.check(plan_BP).clamp(min=0)
        return self.to_states(F.embedding(self.row_IM[self.shape.kind_P, id_BP], self.weight))

    def inputs(self, e_BPD: Tensor) -> Tensor:
        """(B, P, D) concept states → (B, C, D): the separators, and then the concepts."""
        separator_BID = self.to_states(self.separator[:-1]).expand(len(e_BPD), -1, -1)
        return self.typed(torch.cat([separator_BID, e_BPD], 1), self.shape.kind_C)

    def means(self, plan_BP: Tensor, e_BPD: Tensor) -> Tensor:
        """(B, I · D) fp32 mean of each type's concept states in this frame, 0 where it has none."""
        x_BPD = self.to_frame(e_BPD) * (plan_BP != NULL).unsqueeze(-1)
        count_BI1 = self.shape.counts(plan_BP).clamp(min=1).unsqueeze(-1)
        return (self.shape.sums(x_BPD) / count_BI1).flatten(1)

    def logits(self, x: Tensor, kind: Tensor) -> Tensor:
        """(…, D) states of scale 1 → (…, M) of what a type has next; `kind`: (…), the types. At the
        start their deviation is 1."""
        sharpness = self.log_sharpness.exp()[kind].unsqueeze(-1) / x.shape[-1] ** 0.5
        with torch.autocast(x.device.type, enabled=False):
            return self.of_type(F.linear(x.float() * sharpness, self.weight, self.bias), kind)

    def of_type(self, x_V: Tensor, kind: Tensor) -> Tensor:
        """(…, V) values of all rows → (…, M) of the types' own; -inf for ids that a type has
        not."""
        row_M = self.row_IM[kind].expand(*x_V.shape[:-1], -1)
        return F.pad(x_V, (0, 1), value=-torch.inf).gather(-1, row_M)

    def soft(self, logits_BPM: Tensor, temperature: float = 1.0) -> Tensor:
        """(B, P, D) mixtures of each slot's concepts, given that it holds one. The vectors
        themselves get no gradient from here; they have that of the concept that was read."""
        with torch.autocast(logits_BPM.device.type, enabled=False):
            p_BPM = (logits_BPM[..., :-1].float() / temperature).softmax(-1)
            row_BPM = self.row_IM[self.shape.kind_P, :-1].expand_as(p_BPM)
            p_BPV = p_BPM.new_zeros(*p_BPM.shape[:2], len(self.weight) + 1)
            p_BPV = p_BPV.scatter_add(-1, row_BPM, p_BPM)[..., :-1]
            return p_BPV @ self.to_states(self.weight.detach())
