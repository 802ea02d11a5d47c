"""Plans: (B, P) concept ids of I types in one tensor, and the vocabularies that read and write
them.

Type i has K_i ids and at most L_i concepts. It owns the slots offset_i … offset_i + L_i - 1, NULL
after its end; no slot holds an `<EOS>`: a type that is shorter than L_i was ended by it, one of
length L_i by being full. As inputs of a model, a separator precedes each type. Suffixes: B rows ·
I types · P slots · C = I + P inputs, with the separators · R rows of one type each · K ids · M the
largest K_i, and `<EOS>` · D width."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sememe.errors import CheckpointError

NULL = -1
IGNORED = -100  # targets of cross entropy that do not count


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

    @property
    def eos(self) -> int:
        """Where `<EOS>` stands among the logits of any type: past the largest vocabulary."""
        return max(self.sizes)

    def offset(self, i: int) -> int:
        """First slot of type i."""
        return sum(self.lengths[:i])

    def of_type(self, plan: Tensor, i: int) -> Tensor:
        """(…, L_i) slots of type i."""
        return plan[..., self.offset(i) : self.offset(i) + self.lengths[i]]

    def interleave(self, first_BI: Tensor, slots_BP: Tensor) -> Tensor:
        """(B, C, …) each type's own, and its slots after it."""
        pairs = zip(first_BI.split(1, 1), slots_BP.split(self.lengths, 1), strict=True)
        return torch.cat([x for pair in pairs for x in pair], 1)

    def layout(self, device=None) -> tuple[Tensor, Tensor, Tensor]:
        """Of the C inputs: type, position in it (0 the separator's), and whether the type is full
        there, so that nothing follows."""
        inputs_I = torch.tensor(self.lengths, device=device) + 1
        kind_C = torch.arange(self.types, device=device).repeat_interleave(inputs_I)
        position_C = torch.cat([torch.arange(n + 1, device=device) for n in self.lengths])
        return kind_C, position_C, position_C == inputs_I[kind_C] - 1

    def separators(self, device=None) -> Tensor:
        """(I,) which of the C inputs are separators."""
        return (self.layout(device)[1] == 0).nonzero().squeeze(1)

    def valid(self, plan_BP: Tensor) -> Tensor:
        """(B, C) bool: separators, and slots that hold a concept."""
        return self.interleave(torch.ones_like(plan_BP[:, : self.types]) > 0, plan_BP != NULL)

    def targets(self, plan_BP: Tensor) -> Tensor:
        """(B, C) what is to be predicted at each input: its type's next id, or `eos`; IGNORED after
        that and where the type is full."""
        own_BC = self.interleave(torch.full_like(plan_BP[:, : self.types], NULL), plan_BP)
        next_BC = own_BC.roll(-1, 1)
        next_BC = next_BC.masked_fill(next_BC == NULL, self.eos)
        *_, full_C = self.layout(plan_BP.device)
        return next_BC.masked_fill(full_C | ~self.valid(plan_BP), IGNORED)

    def counts(self, plan_BP: Tensor) -> Tensor:
        """(B, I) concepts in each type."""
        types = (plan_BP != NULL).split(self.lengths, 1)
        return torch.stack([there_BL.sum(1) for there_BL in types], 1)

    def id_counts(self, plan_NP: Tensor) -> list[Tensor]:
        """(K_i,) how often each id of each type occurs."""
        types = zip(plan_NP.split(self.lengths, 1), self.sizes, strict=True)
        return [torch.bincount(x[x != NULL], minlength=size).double() for x, size in types]

    def check(self, plan: Tensor) -> Tensor:
        """The plan itself. Raises CheckpointError where it is none of this shape."""
        if plan.dim() != 2 or plan.shape[1] != self.slots or plan.is_floating_point():
            raise CheckpointError(
                f"a plan tensor of {plan.dtype} and shape {tuple(plan.shape)}: need integers "
                f"(rows, {self.slots}), one slot for each of {self.lengths} concepts. "
                "try: PlanShape.pack"
            )
        for i, ids_BL in enumerate(plan.split(self.lengths, 1)):
            wrong_BL = (ids_BL < NULL) | (ids_BL >= self.sizes[i])
            wrong_BL[:, 1:] |= (ids_BL[:, 1:] != NULL) & (ids_BL[:, :-1] == NULL)
            if bool(wrong_BL.any()):
                row, slot = wrong_BL.nonzero()[0].tolist()
                raise CheckpointError(
                    f"plan id {int(ids_BL[row, slot])} in slot {slot} of type {i}: need ids from 0 "
                    f"to {self.sizes[i] - 1}, and {NULL} in all slots after the last one. "
                    "try: plans of the model that reads them"
                )
        return plan

    def pack(self, rows: list[list[list[int]]]) -> Tensor:
        """Plans as a list of ids for each type → (B, P). Raises CheckpointError for what does not
        fit."""
        plan_BP = torch.full((len(rows), self.slots), NULL)
        for plan_P, row in zip(plan_BP, rows, strict=True):
            counts = [len(ids) for ids in row]
            if len(row) != self.types or any(map(int.__gt__, counts, self.lengths)):
                raise CheckpointError(
                    f"a plan of {counts} concepts: need {self.types} types of at most "
                    f"{self.lengths}. try: cut it"
                )
            for i, ids in enumerate(row):
                self.of_type(plan_P, i)[: len(ids)] = torch.tensor(ids)
        return self.check(plan_BP)

    def unpack(self, plan_BP: Tensor) -> list[list[list[int]]]:
        """(B, P) → a list of ids for each type of each row."""
        types = [ids_BL.tolist() for ids_BL in plan_BP.split(self.lengths, 1)]
        return [[[x for x in ids if x != NULL] for ids in row] for row in zip(*types, strict=True)]


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
        sharpness = self.log_sharpness.float().exp() / x.shape[-1] ** 0.5
        with torch.autocast(x.device.type, enabled=False):
            rows = torch.cat([self.weight, self.eos]).float() * sharpness
            return F.linear(x.float(), rows, self.bias.float())


class PlanCodes(nn.Module):
    """All types' vocabularies, the separators and the types' own vectors, with the frame (mean,
    scale) of the embeddings that they stand among: `state = mean + scale · x`, so that one learning
    rate fits every base."""

    def __init__(self, shape: PlanShape, width: int):
        super().__init__()
        self.shape = shape
        self.types = nn.ModuleList(PlanEmbedding(size, width) for size in shape.sizes)
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
        vocabularies = [p for table in self.types for p in (table.weight, table.eos)]
        for p in (self.separator, self.kind, *vocabularies):
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
        types = zip(plan_BP.clamp(min=0).split(self.shape.lengths, 1), self.types, strict=True)
        embeddings = [F.embedding(ids_BL, vocabulary.weight) for ids_BL, vocabulary in types]
        return self.to_states(torch.cat(embeddings, 1))

    def means(self, plan_BP: Tensor, e_BPD: Tensor) -> Tensor:
        """(B, I · D) fp32 mean of each type's concept states in this frame, 0 where it has none."""
        x_BPD = self.to_frame(e_BPD) * (plan_BP != NULL).unsqueeze(-1)
        sums_BID = torch.stack([x.sum(1) for x in x_BPD.split(self.shape.lengths, 1)], 1)
        return (sums_BID / self.shape.counts(plan_BP).clamp(min=1).unsqueeze(-1)).flatten(1)

    def soft(self, logits_BCM: Tensor, temperature: float = 1.0) -> Tensor:
        """(B, P, D) mixtures of each slot's concepts, given that it holds one. The vectors
        themselves get no gradient from here; they have that of the concept that was read."""
        *_, full_C = self.shape.layout(logits_BCM.device)
        with torch.autocast(logits_BCM.device.type, enabled=False):
            p_BPM = (logits_BCM[:, ~full_C, :-1].float() / temperature).softmax(-1)
            types = zip(p_BPM.split(self.shape.lengths, 1), self.shape.sizes, strict=True)
            mixtures = [
                p_BLM[..., :size] @ self.table(i).detach() for i, (p_BLM, size) in enumerate(types)
            ]
        return torch.cat(mixtures, 1)

    # ---- inputs of the base ----

    def of_type(self, x_D: Tensor, kind: Tensor) -> Tensor:
        """(…, D) states of what belongs to types: its own, and its type's vector on it."""
        return x_D + self.scale.float() * self.kind.float()[kind]

    def inputs(self, e_BPD: Tensor) -> Tensor:
        """(B, P, D) concept states → (B, C, D): separators among them."""
        separator_BID = self.to_states(self.separator[:-1]).expand(len(e_BPD), -1, -1)
        kind_C, *_ = self.shape.layout(e_BPD.device)
        return self.of_type(self.shape.interleave(separator_BID, e_BPD.float()), kind_C)

    def last_separator(self) -> Tensor:
        """(D,) the input that the text's first token is predicted from."""
        return self.to_states(self.separator[-1])

    # ---- logits ----

    def logits_of(self, x: Tensor, i: int) -> Tensor:
        """(…, M) of type i, from states of scale 1: -inf past its vocabulary, `<EOS>` last."""
        logits = self.types[i].logits(x)
        padding = (0, self.shape.eos - self.shape.sizes[i])
        ids = F.pad(logits[..., :-1], padding, value=-torch.inf)
        return torch.cat([ids, logits[..., -1:]], -1)

    def logits(self, x_BCD: Tensor) -> Tensor:
        """(B, C, M) from states of scale 1 at the C inputs."""
        types = x_BCD.split([length + 1 for length in self.shape.lengths], 1)
        return torch.cat([self.logits_of(x, i) for i, x in enumerate(types)], 1)


def straight_through(hard: Tensor, soft: Tensor) -> Tensor:
    """`hard`, exactly; backward the gradient of both."""
    return hard + (soft - soft.detach())
