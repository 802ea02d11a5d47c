"""Fits that start new modules from a base's own states: (N, F) features, (N, M) targets →
weights."""

from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

LOOKS = 10  # of a descent at the rows held out
HIDDEN = 1  # hidden unit for each coordinate of a state (docs/log.md)
EPOCHS, ROWS, LEARNING_RATE = 8, 256, 2e-3  # of their start


def linear_fit(x_NF: Tensor, y_NM: Tensor, penalty: float = 0.01) -> tuple[Tensor, Tensor, Tensor]:
    """Ridge regression `y ≈ x W + b`. Returns W (F, M), b (M,) and what is left (N, M), all fp64.

    `penalty`: in units of the features' mean variance, so that N may be below F.
    """
    # In fp64 by promotion, without a copy in between: these are the largest tensors of a start.
    x_F, y_M = (x.mean(0, dtype=torch.float64) for x in (x_NF, y_NM))
    x_NF, y_NM = x_NF - x_F, y_NM - y_M
    gram_FF = x_NF.T @ x_NF
    gram_FF.diagonal().add_(penalty * gram_FF.diagonal().mean())
    weight_FM = torch.linalg.solve(gram_FF, x_NF.T @ y_NM)
    return weight_FM, y_M - x_F @ weight_FM, y_NM - x_NF @ weight_FM


def explained(left_NM: Tensor, y_NM: Tensor) -> float:
    """Share of the variance of `y` that is not left."""
    spread_NM = y_NM.double() - y_NM.double().mean(0)
    return float(1 - left_NM.square().sum() / spread_NM.square().sum().clamp(min=1e-12))


@torch.no_grad()
def fit(linear: nn.Linear, x_NF: Tensor, y_NM: Tensor) -> float:
    """Sets a linear map by `linear_fit`. Returns the share of the variance explained."""
    weight_FM, bias_M, left_NM = linear_fit(x_NF, y_NM)
    linear.weight.copy_(weight_FM.T)
    linear.bias.copy_(bias_M)
    return explained(left_NM, y_NM)


@torch.no_grad()
def set_frame(mean_D: Tensor, scale: Tensor, x_ND: Tensor) -> None:
    """Sets them to the mean of states and to their deviation from it, of all coordinates."""
    mean_D.copy_(x_ND.float().mean(0))
    scale.copy_((x_ND.float() - mean_D).square().mean().sqrt().clamp(min=1e-6))


def descend(
    weights: Iterable[Tensor],
    loss: Callable[[Tensor], Tensor],
    rows: int,
    batch: int,
    steps: int,
    rate: float,
    what: str,
) -> float:
    """Adam on `loss(row_n)`, at a rate that falls to zero. An eighth of the rows is held out, and
    the weights that do best on them stay, those at first among them: calibration text is small, and
    is soon known by heart (docs/log.md). Returns the share of the first loss that is gone then."""
    weights, generator = list(weights), torch.Generator().manual_seed(0)
    order_N = torch.randperm(rows, generator=generator)
    held_n, rows_n = order_N[: max(1, rows // 8)], order_N[rows // 8 :]
    optimizer, losses = torch.optim.Adam(weights, rate), []
    best = [w.detach().clone() for w in weights]
    # None: no bar where stderr is a pipe.
    for step in tqdm(range(steps + 1), what, disable=None, leave=False):
        if step % max(1, steps // LOOKS) == 0 or step == steps:
            with torch.no_grad():
                losses.append(float(loss(held_n)))
                if losses[-1] == min(losses):
                    best = [w.detach().clone() for w in weights]
        optimizer.param_groups[0]["lr"] = rate * (1 - step / max(1, steps))
        with torch.enable_grad():
            loss(rows_n[torch.randint(len(rows_n), (batch,), generator=generator)]).backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        for weight, value in zip(weights, best, strict=True):
            weight.copy_(value)
    return 1 - min(losses) / losses[0] if losses[0] else 0.0


class NoUnits(nn.Module):
    """A map that is linear."""

    def forward(self, *parts: Tensor) -> float:
        return 0.0

    def start(self, x_NF: Tensor, y_NM: Tensor, linear: Callable, weights: Iterable) -> float:
        return 0.0


class HiddenUnits(NoUnits):
    """`gelu(x U + a) Z` beside a linear map of x, given in parts: (…, inputs) → (…, width)."""

    def __init__(self, inputs: int, width: int, hidden: int):
        super().__init__()
        # No nn.Linear: it would draw numbers, and with them move every draw that follows.
        self.up = nn.Parameter(torch.zeros(hidden, inputs))
        self.bias = nn.Parameter(torch.zeros(hidden))
        self.down = nn.Parameter(torch.zeros(width, hidden))

    def forward(self, *parts: Tensor) -> Tensor:
        units = F.gelu(F.linear(torch.cat(parts, -1), self.up, self.bias))
        return F.linear(units, self.down)

    @torch.no_grad()
    def start(self, x_NF: Tensor, y_NM: Tensor, linear: Callable, weights: Iterable) -> float:
        """Descent from what the `linear` map of x leaves of y, together with its `weights`. Returns
        what share of those squares is gone, on states held out."""
        generator = torch.Generator().manual_seed(0)
        # The spread of nn.Linear's own draw. `down` is zero: all of it begins as the linear map.
        drawn = torch.rand(self.up.shape, generator=generator) * 2 - 1
        self.up.copy_(drawn * self.up.shape[1] ** -0.5)

        def loss(row_n: Tensor) -> Tensor:
            x_nF = x_NF[row_n]
            return F.mse_loss(linear(x_nF) + self(x_nF), y_NM[row_n])

        steps = EPOCHS * len(x_NF) // ROWS
        every = [*weights, *self.parameters()]
        return descend(every, loss, len(x_NF), ROWS, steps, LEARNING_RATE, "hidden units")


def hidden_units(inputs: int, width: int, hidden: int) -> NoUnits:
    """So many for each coordinate of a state; none for 0."""
    return HiddenUnits(inputs, width, hidden * width) if hidden else NoUnits()


@torch.no_grad()
def fit_residual(
    linears: Sequence[nn.Linear],
    units: NoUnits,
    x_NF: Tensor,
    h_NM: Tensor,
    target_NM: Tensor,
    scale: Tensor,
    penalty: float,
) -> float:
    """Sets `h + scale · (Σ linear(x) + units(x))` to the target: least squares with a ridge, then
    the units by descent. x comes in as many parts as there are linear maps. Returns the share
    explained of the variance of the target."""
    missing_NM = target_NM - h_NM
    set_frame(torch.zeros_like(h_NM[0]), scale, missing_NM)
    missing_NM = missing_NM / scale
    weight_FM, bias_M, left_NM = linear_fit(x_NF, missing_NM, penalty)
    for map_, part_FM in zip(linears, weight_FM.chunk(len(linears)), strict=True):
        map_.weight.copy_(part_FM.T)
    linears[0].bias.copy_(bias_M)

    def linear(x_nF: Tensor) -> Tensor:
        parts = x_nF.chunk(len(linears), -1)
        return sum(map_(part) for map_, part in zip(linears, parts, strict=True))

    weights = [weight for map_ in linears for weight in map_.parameters()]
    gone = units.start(x_NF, missing_NM, linear, weights)
    left = 1 - explained(left_NM * scale, target_NM)
    return 1 - left * (1 - gone)
