"""How an online model starts: everything new that a base's own states on a little text can already
tell.

Frame of the codes, threshold of the gate, codebook and head by k-means, bridge and entropy estimate
by least squares. All take (N, T) blocks of training text and one or two forwards over them, no
gradient."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from sememe.backbone.split import Spine
from sememe.concepts.codebook import start_from_states
from sememe.concepts.kmeans import ITERATIONS
from sememe.concepts.segments import packing

BRIDGE_TOKENS = 16384  # at most, that the bridge is fitted on


class Starting:
    """Mixin of the models that write concepts."""

    on_work: Callable[[float], None] = staticmethod(
        lambda macs: None
    )  # of what follows, as it is done; sums to `work`

    tells_work = False
    """Whether `work` is known: of an online model."""

    def work(self, ids_NT: Tensor, rate: float) -> tuple[float, float]:
        """About how many multiply-accumulates `start_frame` and `start_codes` of an online model
        take on (N, T) blocks."""
        config, layer, tokens = self.config, self._layer_macs, ids_NT.numel()
        shallow, middle, _ = config.split
        fitted = min(tokens, BRIDGE_TOKENS) if self.bridge is not None else 0
        states = tokens + self._vocabulary(ids_NT, 0).numel()
        return (
            layer * (shallow * tokens + (shallow + middle * (1 + rate)) * fitted),
            layer * shallow * (states + tokens)
            + (ITERATIONS + 1) * config.codes_per_concept * self._assign_macs(states),
        )

    def _assign_macs(self, states: int) -> float:
        return float(states * self.config.num_concepts * self.config.text_config.hidden_size)

    @property
    def _layer_macs(self) -> float:
        """Per token, of one layer."""
        return float(sum(p.numel() for p in self.backbone.get_decoder().layers[0].parameters()))

    @torch.no_grad()
    def start_frame(
        self, ids_NT: Tensor, rate: float | None = None, h_NTD: Tensor | None = None
    ) -> dict[str, float]:
        """Sets the frame of the codes, the gate's scores and threshold, and the bridge as it fits
        `rate`. `h_NTD`: the shallow states of that text, where they are known already."""
        h_NTD = self.shallow_states(ids_NT) if h_NTD is None else h_NTD
        self.codes.start_frame(_inner(h_NTD))
        found = self._start_boundary(ids_NT, h_NTD) if self.gate.boundary.fitted else {}
        self._calibrate(h_NTD)
        return found | (
            self._start_bridge(ids_NT, rate or self.dial.rate) if self.bridge is not None else {}
        )

    @torch.no_grad()
    def start_codes(self, ids_NT: Tensor, seed: int = 0) -> dict[str, float]:
        """Codebook and head by k-means of the shallow states of (N, T) blocks of text, in the frame
        as it is, and of the whole vocabulary in random order: rare words need codes too, and a
        little text has few of them (docs/log.md).

        To be called when quantisation begins: LoRA moves the states, and a codebook of the
        untouched base would not fit them any more (docs/log.md)."""
        found = {}
        read = [self._code_states(text_NT) for text_NT in self._texts_for_codes(ids_NT, seed)]
        h_ND, embed_ND = (torch.cat(x) for x in zip(*read, strict=True))
        if self.anchor is not None:
            found["anchor_explains"] = self.anchor.start(embed_ND, self.codes.normalise(h_ND))
            h_ND = h_ND - self.codes.scale.float() * self.anchor(embed_ND)
        macs = self._assign_macs(len(h_ND))
        found |= start_from_states(
            self.codes, self.head, h_ND, seed=seed, tick=lambda: self.on_work(macs)
        )
        self.calibrate_gate(ids_NT)
        return found

    @torch.no_grad()
    def calibrate_gate(self, ids_NT: Tensor) -> None:
        """Sets the gate's score distribution to that of (N, T) blocks of text."""
        if self.gate.boundary.scored:
            self._calibrate(self.shallow_states(ids_NT))

    @torch.no_grad()
    def written_inputs(self, ids_NT: Tensor) -> Tensor:
        """(n, D) what the codes say of the concepts that the gate writes on (N, T) blocks."""
        return self.unsaid(*self._written_states(ids_NT))[0]

    def opened(self, ids_NT: Tensor) -> Tensor:
        """Blocks of text as the model reads them."""
        return ids_NT

    def _texts_for_codes(self, ids_NT: Tensor, seed: int) -> list[Tensor]:
        """What the codebook is started from."""
        return [ids_NT, self._vocabulary(ids_NT, seed)]

    def _code_states(self, ids_NT: Tensor) -> tuple[Tensor, Tensor]:
        """(n, D) states that codes stand for, and the embeddings of their tokens. What a pool makes
        of a position is known where it writes only."""
        if self.pool is not None:
            return self._written_states(ids_NT)
        return _inner(self.shallow_states(ids_NT)), self.inner_embeddings(ids_NT)

    def _written_states(self, ids_NT: Tensor) -> tuple[Tensor, Tensor]:
        reads = [self._read(h_BTD, step) for step, h_BTD in self._shallow_batches(ids_NT)]
        return (
            torch.cat([read.h_BCD[read.coded_BC].float() for read in reads]),
            torch.cat([read.word_BCF[read.coded_BC] for read in reads]),
        )

    def _calibrate(self, h_NTD: Tensor) -> None:
        x_NTD = self.codes.normalise(h_NTD)
        score_NT = self.gate.boundary.score(self.head, x_NTD, self._previous(x_NTD, None))
        self.gate.calibrate(score_NT[:, 1:].flatten())

    def _start_bridge(
        self, ids_NT: Tensor, rate: float, tokens: int = BRIDGE_TOKENS
    ) -> dict[str, float]:
        """Least squares from the shallow states and last concepts of tail positions to the states
        that the base itself would enter the deep slice with. Concepts are continuous here; LoRA is
        still zero, so the base is the teacher."""
        config, spine = self.config, self.spine
        states, lasts, targets = [], [], []
        for step, h_BTD in self._shallow_batches(ids_NT[: max(1, tokens // ids_NT.shape[1])]):
            with self.dial.at(rate=rate):
                read = self._read(h_BTD, step)
            written_BT = read.written_BT
            last_BTD = read.pack.last(
                self._middle(spine, read.h_BCD, read.pack, written_BT, step), written_BT
            )
            everywhere = torch.ones_like(written_BT)
            target_BTD = self._middle(spine, h_BTD, packing(everywhere), everywhere, step)
            tail_BT = ~written_BT & (
                written_BT.cumsum(1) > 1
            )  # behind the sink alone there is no concept to read
            for kept, x in ((states, h_BTD), (lasts, last_BTD), (targets, target_BTD)):
                kept.append(x[tail_BT].float())
            self.on_work(
                self._layer_macs * config.split[1] * (1 + rate) * h_BTD.shape[0] * h_BTD.shape[1]
            )
        if sum(map(len, states)) == 0:
            return {}
        return {
            "bridge_explains": self.bridge.start(
                torch.cat(states), torch.cat(lasts), torch.cat(targets)
            )
        }

    def _start_boundary(
        self, ids_NT: Tensor, h_NTD: Tensor, tokens: int = 16384
    ) -> dict[str, float]:
        """Fits the boundary's estimate to what the base itself makes of the text (LoRA is still
        zero)."""
        kind, blocks = self.gate.boundary.fitted, max(1, tokens // ids_NT.shape[1])
        ids_NT, found = self.opened(ids_NT[:blocks].to(self.device)), []
        for ids_BT in ids_NT.split(4):
            log_p_BTV = F.log_softmax(
                self.backbone(input_ids=ids_BT, use_cache=False).logits.float(), -1
            )
            if kind == "entropy":
                found.append(-(log_p_BTV.exp() * log_p_BTV).sum(-1)[:, 1:])
            else:
                found.append(-log_p_BTV[:, :-1].gather(-1, ids_BT[:, 1:, None]).squeeze(-1))
        x_NTD = self.codes.normalise(h_NTD[:blocks])
        before_NTD, target_N = self._previous(x_NTD, None), torch.cat(found).flatten()
        return {
            f"{kind}_explains": self.gate.boundary.start(
                _inner(x_NTD), _inner(before_NTD), target_N
            )
        }

    def _vocabulary(self, ids_NT: Tensor, seed: int) -> Tensor:
        """(n, T) blocks that open as the texts do and go on with every token of the vocabulary
        once, in random order; of a vocabulary that is larger than 1.5 times the text, a part."""
        vocab, length = self.config.text_config.vocab_size, ids_NT.shape[1] - 1
        token_V = torch.randperm(vocab, generator=torch.Generator().manual_seed(seed))[
            : max(length, ids_NT.numel() * 3 // 2)
        ]
        token_nT = token_V.repeat(-(-length // len(token_V)))[
            : max(1, len(token_V) // length) * length
        ].view(-1, length)
        first_n = ids_NT[torch.arange(len(token_nT)) % len(ids_NT), 0].cpu()
        return torch.cat([first_n[:, None], token_nT], 1)

    def inner_embeddings(self, ids_NT: Tensor) -> Tensor:
        """(n, D) embeddings of all positions but the sinks, which are never quantised."""
        return _inner(Spine(self.backbone).embed(ids_NT.to(self.device)))

    def shallow_states(self, ids_NT: Tensor) -> Tensor:
        """(N, T, D) fp32 outputs of the shallow slice."""
        return torch.cat([h_BTD.float() for _, h_BTD in self._shallow_batches(ids_NT)])

    def _shallow_batches(self, ids_NT: Tensor, tokens: int = 1024):
        """(step, (B, T, D) outputs of the shallow slice), batch by batch, as in evaluation."""
        spine, was_training = Spine(self.backbone), self.training
        self.eval()
        for ids_BT in self.opened(ids_NT.to(self.device)).split(max(1, tokens // ids_NT.shape[1])):
            h_BTD = spine.embed(ids_BT)
            step = self._step(spine, h_BTD, None, None, None)
            step.ids_BT = ids_BT
            yield step, self._shallow(spine, h_BTD, step)
            if hasattr(self.config, "split"):
                self.on_work(self._layer_macs * self.config.split[0] * ids_BT.numel())
        self.train(was_training)


def _inner(x_NTD: Tensor) -> Tensor:
    """(n, D): all positions but the first of each row."""
    return x_NTD[:, 1:].flatten(0, 1)
