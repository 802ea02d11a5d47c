"""Lengths: (…, D) states → how many tokens a concept covers, 1 … N; and the penalty per concept
that holds the rate while they are learned.

A length is an action, so it learns from what its segment cost (policy gradient). A text that is
covered segment by segment is a semi-Markov process with an average reward: covering n tokens earns
what n average tokens cost, less what these did cost. Suffixes: B rows, N lengths, s segments of a
batch, M remembered ones."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sememe.concepts.quantise import gumbel_like

REMEMBERED = 128  # distributions that the tilt of another rate is computed from
POLICY, ENTROPY = 0.1, 0.02  # of the loss; of the advantage, whose spread is 1
MOMENTUM = 0.1  # of a batch in the running means
# Of the penalty, in average concepts' nats for a rate that is off by its own size.
STEP, DAMPING = 0.02, 1.0
FIRMNESS = 1.0  # twice the nats that one concept too early or too late costs, on the way


def bisect(increasing: Callable[[float], float], target: float) -> float:
    """Where a function of [-20, 20] reaches `target`."""
    middle = 0.0
    for step in range(50):
        middle += (10 if increasing(middle) < target else -10) / 2**step
    return middle


def covering(score: Tensor, rest: Tensor) -> Tensor:
    """(…, N) log-weights of lengths where (…,) tokens are left: all lengths that reach the end are
    one, the one that covers what is left; longer ones are -inf."""
    n_N = torch.arange(1, score.shape[-1] + 1, device=score.device)
    from_here_on = score.flip(-1).logcumsumexp(-1).flip(-1)
    rest = rest.unsqueeze(-1)
    return torch.where(n_N < rest, score, from_here_on).masked_fill(n_N > rest, -torch.inf)


class Lengths(nn.Module):
    """A categorical distribution of lengths, at first the same everywhere: a bell whose mean is 1 /
    rate."""

    def __init__(self, width: int, longest: int, rate: float):
        super().__init__()
        n_N = torch.arange(1, longest + 1)
        # A bell, since a tilt moves the top of one smoothly. With a geometric distribution it jumps
        # from end to end.
        bell_N = -0.5 * ((n_N - 1 / rate) / max(0.5, 0.5 / rate)).square()

        def mean_length(tilt: float) -> float:
            return float(torch.softmax(bell_N.double() + tilt * n_N, 0) @ n_N.double())

        self.weight = nn.Parameter(torch.zeros(longest, width))
        self.bias = nn.Parameter(F.log_softmax(bell_N + bisect(mean_length, 1 / rate) * n_N, 0))
        # Nats per concept; running means per token of nats and of concepts.
        for name in ("penalty", "nats", "density", "batches"):
            self.register_buffer(name, torch.zeros(()))
        self.register_buffer("remembered", self.bias.detach().repeat(REMEMBERED, 1))

    def forward(self, x: Tensor) -> Tensor:
        """(…, D) states of norm 1 → (…, N) fp32 log-probabilities."""
        return F.log_softmax(F.linear(x.float(), self.weight.float(), self.bias.float()), -1)

    # ---- in use ----

    @torch.no_grad()
    def remember(self, log_p_sN: Tensor) -> None:
        """A sample of the newest distributions replaces the oldest."""
        log_p_sN = log_p_sN[:: max(1, len(log_p_sN) // REMEMBERED)]
        self.remembered.copy_(torch.cat([log_p_sN.detach(), self.remembered])[:REMEMBERED])

    def tilt(self, rate: float) -> float:
        """Nats per token that make the likeliest lengths of the remembered distributions 1 / rate
        long in the mean; the middle of the range where several do."""
        log_p_MN = self.remembered.double().cpu()
        n_N = torch.arange(1, log_p_MN.shape[1] + 1, dtype=torch.float64)

        def mean_length(tilt: float) -> float:
            return float((log_p_MN + tilt * n_N).argmax(1).double().mean()) + 1

        return sum(bisect(mean_length, 1 / rate + edge) for edge in (-1e-6, 1e-6)) / 2

    def choose(
        self,
        log_p_BN: Tensor,
        rest_B: Tensor,
        total_B: Tensor,
        written: int,
        rate: float,
        tilt: float,
    ) -> Tensor:
        """(B,) the likeliest lengths, tilted, with which each text gets its round(rate · tokens)
        concepts, no more and no less. A row that spends them too early or too late is drawn back.

        Args:
            rest_B, total_B: tokens not yet covered, of all of the row's.
            written: concepts so far."""
        longest = log_p_BN.shape[-1]
        n_N = torch.arange(1, longest + 1, device=log_p_BN.device)
        total_B1 = total_B[:, None].clamp(min=1)
        # At least as many as cover the text when all are as long as can be.
        budget_B1 = (rate * total_B1).round().maximum((total_B1 / longest).ceil())
        concepts_left_B1 = budget_B1 - written - 1
        tokens_left_BN = rest_B[:, None] - n_N
        debt_BN = written + 1 - budget_B1 / total_B1 * (total_B1 - tokens_left_BN)
        score_BN = log_p_BN + tilt * n_N - 0.5 * FIRMNESS * debt_BN.square()
        # The concepts that are left must be able to cover the tokens that are left, with at least
        # one each.
        possible_BN = tokens_left_BN.clamp(concepts_left_B1, longest * concepts_left_B1)
        return score_BN.where(tokens_left_BN == possible_BN, -torch.inf).argmax(-1) + 1

    # ---- in training ----

    def draw(
        self, log_p_BN: Tensor, rest_B: Tensor, generator: torch.Generator | None = None
    ) -> Tensor:
        """(B,) samples."""
        return (covering(log_p_BN, rest_B) + gumbel_like(log_p_BN, generator)).argmax(-1) + 1

    def learn(
        self, log_p_sN: Tensor, rest_s: Tensor, n_s: Tensor, nats_s: Tensor, rate: float
    ) -> Tensor:
        """What the lengths (s,) that were drawn add to the loss. Moves the running means, and the
        penalty by one Lagrange step: it rises while there are too many concepts.

        Args:
            rest_s: tokens that were left where each segment began.
            nats_s: what the segments' tokens cost.
        """
        self.follow(nats_s, n_s)
        self.remember(log_p_sN)
        with torch.no_grad():
            # Nats of an average concept for a rate that is off by its own size.
            excess = self.nats / self.density.clamp(min=1e-6) * (self.density / rate - 1)
            penalty = self.penalty + DAMPING * excess
            gain_s = (self.nats + penalty * self.density) * n_s - nats_s - penalty
            gain_s = F.layer_norm(gain_s, gain_s.shape, eps=1e-12)
            self.penalty += STEP * excess
        surprise_s = F.nll_loss(covering(log_p_sN, rest_s), n_s - 1, reduction="none")
        entropy_s = torch.special.entr(log_p_sN.exp()).sum(-1)
        return POLICY * (gain_s * surprise_s - ENTROPY * entropy_s).mean()

    @torch.no_grad()
    def follow(self, nats_s: Tensor, n_s: Tensor) -> None:
        """Moves the running means, by the segments of all processes."""
        sums = torch.stack([nats_s, torch.ones_like(nats_s), n_s.to(nats_s)], 1).sum(0)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(sums)
        nats, density = sums[:2] / sums[2].clamp(min=1)
        self.batches += 1
        share = torch.clamp(1 / self.batches, min=MOMENTUM)
        self.nats.lerp_(nats, share)
        self.density.lerp_(density, share)
