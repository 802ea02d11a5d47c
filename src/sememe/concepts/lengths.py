"""Lengths: (…, D) states → how many tokens a concept covers, 1 … N; and the price that holds the
rate while they are learned.

A length is an action, so it learns from what its segment cost (policy gradient). A text that is
covered segment by segment is a semi-Markov process with an average reward: covering n tokens earns
what n average tokens cost, less what these did cost. Suffixes: B rows, N lengths, s segments of a
batch, M remembered ones."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

REMEMBERED = 128  # distributions that the dial is read off
POLICY, ENTROPY = 0.1, 0.02  # of the loss; of the advantage, whose spread is 1
MOMENTUM = 0.1  # of a batch in the running means
STEP, DAMPING = (
    0.02,
    1.0,
)  # of the price, in average concepts' nats for a rate that is off by its own size
FIRMNESS = 1.0  # twice the nats that one concept too early or too late costs, on the way


def tilted(score: Tensor, mean: float) -> float:
    """By how much per token the softmax of (N,) scores must be tilted for lengths of that mean."""
    n_N = torch.arange(1, len(score) + 1, dtype=torch.float64)
    low, high = -20.0, 20.0
    for _ in range(50):
        tilt = (low + high) / 2
        low, high = (
            (tilt, high)
            if float(torch.softmax(score.double() + tilt * n_N, 0) @ n_N) < mean
            else (low, tilt)
        )
    return (low + high) / 2


def covering(score: Tensor, rest: Tensor) -> Tensor:
    """(…, N) log-weights of lengths, where (…,) tokens are left: all lengths that reach the end are
    one, the way that covers what is left; -inf behind it."""
    n_N = torch.arange(1, score.shape[-1] + 1, device=score.device)
    reach = score.flip(-1).logcumsumexp(-1).flip(-1)
    return torch.where(n_N < rest.unsqueeze(-1), score, reach).masked_fill(
        n_N > rest.unsqueeze(-1), -torch.inf
    )


class Lengths(nn.Module):
    """A categorical distribution of lengths, at first the same everywhere: a bell whose mean is 1 /
    rate."""

    def __init__(self, width: int, longest: int, rate: float):
        super().__init__()
        # A bell, since a tilt moves the top of one smoothly. With a geometric distribution it jumps
        # from end to end.
        n_N = torch.arange(1, longest + 1)
        bell_N = -0.5 * ((n_N - 1 / rate) / max(0.5, 0.5 / rate)).square()
        self.weight = nn.Parameter(torch.zeros(longest, width))
        self.bias = nn.Parameter(F.log_softmax(bell_N + tilted(bell_N, 1 / rate) * n_N, 0))
        for name in (
            "price",
            "nats",
            "density",
            "batches",
        ):  # nats a concept; running means of nats and concepts a token
            self.register_buffer(name, torch.zeros(()))
        self.register_buffer("remembered", self.bias.detach().repeat(REMEMBERED, 1))

    def forward(self, x: Tensor) -> Tensor:
        """(…, D) states of norm 1 → (…, N) fp32 log-probabilities."""
        return F.log_softmax(F.linear(x.float(), self.weight.float(), self.bias.float()), -1)

    # ---- in use ----

    @torch.no_grad()
    def remember(self, log_p_sN: Tensor) -> None:
        """Lets the newest distributions, every so many of them, take the places of the oldest."""
        log_p_sN = log_p_sN[:: max(1, len(log_p_sN) // REMEMBERED)]
        self.remembered.copy_(torch.cat([log_p_sN.detach(), self.remembered])[:REMEMBERED])

    def tilt(self, rate: float) -> float:
        """Nats per token that make the likeliest lengths of the remembered distributions 1 / rate
        long in the mean; in the middle, where a range of them does."""
        log_p_MN = self.remembered.double().cpu()
        n_N = torch.arange(1, log_p_MN.shape[1] + 1, dtype=torch.float64)
        edges = []
        for least in (1 / rate - 1e-6, 1 / rate + 1e-6):
            low, high = -20.0, 20.0
            for _ in range(40):
                tilt = (low + high) / 2
                mean = float((log_p_MN + tilt * n_N).argmax(1).double().mean()) + 1
                low, high = (tilt, high) if mean < least else (low, tilt)
            edges.append((low + high) / 2)
        return sum(edges) / 2

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
        longest, rest_B1, total_B1 = (
            log_p_BN.shape[-1],
            rest_B[:, None],
            total_B[:, None].clamp(min=1),
        )
        n_N = torch.arange(1, longest + 1, device=log_p_BN.device)
        budget_B1 = torch.maximum((rate * total_B1).round(), (total_B1 / longest).ceil()).clamp(
            min=1
        )
        left_B1, behind_BN = budget_B1 - written - 1, rest_B1 - n_N
        debt_BN = written + 1 - budget_B1 / total_B1 * (total_B1 - behind_BN)
        score_BN = log_p_BN + tilt * n_N - 0.5 * FIRMNESS * debt_BN.square()
        # The concepts that are left must be able to cover what is behind, with a token each at
        # least.
        return (
            score_BN.masked_fill(
                (behind_BN < left_B1) | (behind_BN > longest * left_B1), -torch.inf
            ).argmax(-1)
            + 1
        )

    # ---- in training ----

    def draw(
        self, log_p_BN: Tensor, rest_B: Tensor, generator: torch.Generator | None = None
    ) -> Tensor:
        """(B,) samples."""
        noise_BN = -torch.empty_like(log_p_BN).exponential_(generator=generator).log()
        return (covering(log_p_BN, rest_B) + noise_BN).argmax(-1) + 1

    def learn(
        self, log_p_sN: Tensor, rest_s: Tensor, n_s: Tensor, nats_s: Tensor, rate: float
    ) -> Tensor:
        """What the lengths (s,) that were drawn add to the loss. Moves the running means.

        Args:
            rest_s: tokens that were left where each segment began.
            nats_s: what the segments' tokens cost.
        """
        self._follow(nats_s, n_s)
        self.remember(log_p_sN)
        with torch.no_grad():
            price = self.price + DAMPING * self._unit * (self.density / rate - 1)
            average = self.nats + price * self.density
            gain_s = average * n_s - (nats_s + price)
            gain_s = (gain_s - gain_s.mean()) / gain_s.std(unbiased=False).clamp(min=1e-6)
        log_p_s = covering(log_p_sN, rest_s).gather(-1, n_s.unsqueeze(-1) - 1).squeeze(-1)
        entropy_s = -(log_p_sN.exp() * log_p_sN).sum(-1)
        return -POLICY * (gain_s * log_p_s + ENTROPY * entropy_s).mean()

    @torch.no_grad()
    def hold(self, rate: float) -> None:
        """One Lagrange step: the price of a concept rises while there are too many of them."""
        self.price += STEP * self._unit * (self.density / rate - 1)

    @property
    def _unit(self) -> Tensor:
        """Nats that the tokens of an average concept cost."""
        return self.nats / self.density.clamp(min=1e-6)

    @torch.no_grad()
    def _follow(self, nats_s: Tensor, n_s: Tensor) -> None:
        sums = torch.stack([nats_s.sum(), nats_s.new_tensor(len(n_s)), n_s.sum().to(nats_s)])
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(sums)
        self.batches += 1
        share = torch.clamp(1 / self.batches, min=MOMENTUM)
        for mean, new in ((self.nats, sums[0]), (self.density, sums[1])):
            mean.lerp_((new / sums[2].clamp(min=1)).to(mean), share)
