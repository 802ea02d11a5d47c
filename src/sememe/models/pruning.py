"""Layers that are left out of a base for every token, the map in each gap, and the scan that
chooses them: (N, T) blocks of text → layers."""

import math
from collections.abc import Callable, Collection, Iterable
from itertools import pairwise

import torch
from torch import Tensor, nn

from sememe.backbone.split import Spine
from sememe.concepts.fit import fit_residual, hidden_units, set_frame
from sememe.concepts.masks import Lane, Lanes
from sememe.errors import RecipeError
from sememe.models.losses import cross_entropy
from sememe.progress import bar

# Of a scan: what its maps are fitted on, and what is predicted.
FIT_TOKENS, LOSS_TOKENS = 4096, 1024

Gap = tuple[int, int]
"""[first, last) of consecutive layers that are left out."""


def runs(layers: Collection[int]) -> list[Gap]:
    """[1, 2, 5] → [(1, 3), (5, 6)]."""
    firsts = sorted(layer for layer in layers if layer - 1 not in layers)
    lasts = sorted(layer + 1 for layer in layers if layer + 1 not in layers)
    return list(zip(firsts, lasts, strict=True))


def removable(spine: Spine, layers: Collection[int] | int) -> list[int]:
    """The layers that may be left out: all but the first of each kind of attention, by whose cache
    transformers counts tokens and sizes its masks.

    Raises RecipeError unless `layers`, or so many of them, are among these."""
    free = [n for n, kind in enumerate(spine.kinds) if kind in spine.kinds[:n]]
    fits = 0 < layers <= len(free) if isinstance(layers, int) else {*free}.issuperset(layers)
    if not fits or not layers:
        raise RecipeError(
            f"leave_out = {layers}: need one or more of the layers "
            f"{show(free)}, each once, or how many of these {len(free)}. try: leave_out=1"
        )
    return free


def show(layers: Collection[int]) -> str:
    """[1, 2, 5] → `1–2, 5`."""
    return ", ".join(
        f"{first}–{last - 1}" if last - first > 1 else str(first) for first, last in runs(layers)
    )


class GapMap(nn.Module):
    """In the place of a gap: `h + scale · (x W + b + gelu(x U + a) Z)` with x the normalised state,
    and `hidden` units for each of its coordinates. The first token of a text, an attention sink,
    stays as it is."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.shallow = nn.Linear(width, width)
        for p in self.parameters():
            nn.init.zeros_(p)
        self.hidden = hidden_units(width, width, hidden)
        self.register_buffer("shallow_mean", torch.zeros(width))
        for name in ("shallow_scale", "scale"):
            self.register_buffer(name, torch.ones(()))

    def forward(self, h_BTD: Tensor, position_BT: Tensor) -> Tensor:
        x_BTD = ((h_BTD.float() - self.shallow_mean) / self.shallow_scale).to(h_BTD.dtype)
        missing_BTD = self.shallow(x_BTD) + self.hidden(x_BTD)
        mapped_BTD = h_BTD + missing_BTD * self.scale.to(h_BTD.dtype)
        return mapped_BTD.where((position_BT != 0).unsqueeze(-1), h_BTD)

    @torch.no_grad()
    def start(self, h_ND: Tensor, target_ND: Tensor, penalty: float = 0.005) -> float:
        """By `fit_residual`, from (N, D) states to what the layers made of them. Returns the share
        explained of the variance of `target`."""
        set_frame(self.shallow_mean, self.shallow_scale, h_ND)
        x_ND = (h_ND.float() - self.shallow_mean) / self.shallow_scale
        linears = [self.shallow]
        return fit_residual(linears, self.hidden, x_ND, h_ND, target_ND, self.scale, penalty)


class Text:
    """(B, T) ids on their way through the layers of a base: `run(first, last, h)` takes (B, T, D)
    states from the entry of a layer to that of another."""

    def __init__(self, backbone: nn.Module, ids_BT: Tensor):
        self.spine = Spine(backbone)
        self.embed_BTD = self.spine.embed(ids_BT)
        self.position_1T = torch.arange(ids_BT.shape[1], device=ids_BT.device)[None]
        lane = Lane.causal(self.position_1T, self.position_1T >= 0)
        kernel = backbone.config._attn_implementation
        self.masks = Lanes(lane, lane, plain=True).masks(kernel, self.embed_BTD.dtype)
        self.rope = self.spine.rope(self.embed_BTD, self.position_1T)

    def run(self, first: int, last: int, h_BTD: Tensor) -> Tensor:
        return self.spine.run(first, last, h_BTD, self.position_1T, self.rope, self.masks)

    def states(self, layers: Iterable[int]) -> dict[int, Tensor]:
        """(B, T, D) states that enter each of these layers; the number of layers stands for what
        leaves the last."""
        states, h_BTD, before = {}, self.embed_BTD, 0
        for layer in sorted(layers):
            h_BTD = states[layer] = self.run(before, layer, h_BTD)
            before = layer
        return states


@torch.no_grad()
def entering(backbone: nn.Module, ids_NT: Tensor, layers: Collection[int]) -> dict[int, Tensor]:
    """(n, D) fp32 states that enter each of these layers, those of the sinks left out."""
    parts = [Text(backbone, ids_BT).states(layers) for ids_BT in ids_NT.split(4)]
    return {
        layer: torch.cat([part[layer][:, 1:].flatten(0, 1).float() for part in parts])
        for layer in layers
    }


class Scan:
    """The loss of a base without some of its layers, on a few of the (N, T) blocks of training
    text; maps are fitted on others. Each starts from the base's own states, which are computed
    once: a map is fitted to them, and a trial begins at the first layer that it leaves out."""

    @torch.no_grad()
    def __init__(self, backbone: nn.Module, ids_NT: Tensor):
        blocks, length = ids_NT.shape
        rows = min(max(1, LOSS_TOKENS // length), max(1, blocks // 2))
        self.ids_BT, rest_NT = ids_NT[:rows], ids_NT[rows:] if blocks > 1 else ids_NT
        self.text = Text(backbone, self.ids_BT)
        edges = range(len(self.text.spine) + 1)
        self.states = self.text.states(edges)
        self.fitted = entering(backbone, rest_NT[: max(1, FIT_TOKENS // length)], edges)
        self.maps: dict[Gap, GapMap] = {}

    def map_over(self, gap: Gap) -> GapMap:
        if gap not in self.maps:
            self.maps[gap] = GapMap(self.text.embed_BTD.shape[-1], 0).to(self.ids_BT.device)
            self.maps[gap].start(*map(self.fitted.get, gap))
        return self.maps[gap]

    @torch.no_grad()
    def loss(self, layers: Collection[int]) -> float:
        """Nats per token of the base without these layers."""
        spine, gaps = self.text.spine, runs(layers)
        (first, _), *_ = ends = [*gaps, (len(spine), len(spine))]
        h_BTD = self.states[first]
        for gap, (following, _) in pairwise(ends):
            h_BTD = self.map_over(gap)(h_BTD, self.text.position_1T)
            h_BTD = self.text.run(gap[1], following, h_BTD)
        rows = zip(h_BTD[:, :-1].split(1), self.ids_BT[:, 1:].split(1), strict=True)
        nll = [cross_entropy(spine.logits(h_1TD), ids_1T) for h_1TD, ids_1T in rows]
        return float(torch.cat(nll).mean())

    def choose(self, count: int, say: Callable[[str], None], progress: bool) -> list[int]:
        """So many layers, one after another: each time the one whose loss hurts least. A layer
        costs more the more others are gone, nearly always: what cost more before than the best of
        a round costs now is not tried in it (lazy greedy, Minoux 1978)."""
        cost = dict.fromkeys(removable(self.text.spine, count), -math.inf)
        chosen, loss = [], self.loss([])
        trials = bar(desc="scan", unit="trial", disable=not progress)
        for _ in range(count):
            best = math.inf, -1
            for layer in sorted(cost, key=cost.get):
                if cost[layer] >= best[0]:
                    break
                cost[layer] = self.loss([*chosen, layer]) - loss
                best = min(best, (cost[layer], layer))
                trials.update()
            chosen.append(best[1])
            loss += cost.pop(best[1])
            trials.set_postfix(left_out=f"{len(chosen)} of {count}")
            say(f"scan: without layer {chosen[-1]} too the loss is {loss:.3f} ({best[0]:+.3f})")
        trials.close()
        return sorted(chosen)
