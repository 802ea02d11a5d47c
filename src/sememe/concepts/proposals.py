"""Proposals: shallow states at t and t - 1 → distributions of the tokens t + 1 … t + k.

Multi-token prediction (arXiv 2404.19737) at the price of a few small matrices: heads of low rank
over the most frequent words of a text, with one class for all others, each of those as probable as
the next. They are distilled from the base once, before training, and never trained again.

W counts the classes, f the 2 D coordinates that a head reads, r their rank."""

import math

import torch
from torch import Tensor, nn

from sememe.concepts.fit import descend

OFFSETS = 3
WORDS = 1024
RANK = 64
STEPS, ROWS, LEARNING_RATE = 300, 8, 2e-3  # of the distillation


class Proposals(nn.Module):
    """`k` heads that read `width` coordinates at each of two places."""

    def __init__(self, width: int, vocabulary: int, k: int = OFFSETS):
        super().__init__()
        words = min(WORDS, vocabulary)
        self.vocabulary = vocabulary
        # What a word of the last class costs beyond its class, in nats.
        self.spread = math.log(max(vocabulary - words, 1))
        self.register_buffer("words", torch.arange(words))
        self.register_buffer("down", torch.zeros(k, 2 * width, RANK))
        self.register_buffer("up", torch.zeros(RANK, words + 1))
        self.register_buffer("bias", torch.zeros(k, 1, words + 1))

    def forward(self, x_nf: Tensor) -> Tensor:
        """(k, n, W) log-probabilities that each head gives."""
        return log_probs(x_nf, self.down, self.up, self.bias)

    def entropy(self, log_p: Tensor) -> Tensor:
        """(…, W) → (…,) nats, over the whole vocabulary."""
        return torch.special.entr(log_p.exp()).sum(-1) + log_p[..., -1].exp() * self.spread

    def nll(self, log_p: Tensor, ids: Tensor) -> Tensor:
        """(…, W), (…,) token ids → (…,) nats, over the whole vocabulary."""
        classes = torch.full((self.vocabulary,), len(self.words), device=ids.device)
        classes[self.words] = torch.arange(len(self.words), device=ids.device)
        label = classes[ids]
        nll = -log_p.gather(-1, label.unsqueeze(-1)).squeeze(-1)
        return nll + self.spread * (label == len(self.words))

    # ---- start ----

    def set_words(self, ids_NT: Tensor) -> None:
        """Takes the most frequent tokens of a text."""
        counts = torch.bincount(ids_NT.flatten(), minlength=self.vocabulary)
        self.words.copy_(counts.argsort(descending=True, stable=True)[: len(self.words)])

    def classes(self, log_p: Tensor) -> Tensor:
        """(…, V) log-probabilities of the base → (…, W) probabilities."""
        p = log_p[..., self.words].exp()
        return torch.cat([p, (1 - p.sum(-1, keepdim=True)).clamp(min=0)], -1)

    def start(self, x_NTf: Tensor, p_NTW: Tensor) -> None:
        """Distils what the base expects after each token, into the head that is as many tokens
        early: cross entropy, from the mean distribution on."""
        generator = torch.Generator().manual_seed(0)
        scale_f = x_NTf.flatten(0, 1).std(0).clamp(min=1e-6)  # Adam's steps know no units
        buffers = self.down, self.up, self.bias
        weights = [torch.randn(w.shape, generator=generator).to(w) for w in buffers[:2]]
        weights = [w * w.shape[-2] ** -0.5 for w in weights]
        weights[1] *= 0.1
        unigram_W = p_NTW.mean((0, 1)).clamp(min=1e-6).log()
        weights.append(unigram_W.expand_as(self.bias).clone())
        weights = [w.requires_grad_() for w in weights]

        def loss(row_n: Tensor) -> Tensor:
            log_p = log_probs(x_NTf[row_n].flatten(0, 1) / scale_f, *weights)
            log_p = log_p.unflatten(1, (len(row_n), -1))
            offsets = enumerate(log_p)
            return sum(
                -(p_NTW[row_n, j:] * log_p_nTW[:, : log_p.shape[2] - j]).sum(-1).mean()
                for j, log_p_nTW in offsets
            )

        descend(weights, loss, len(x_NTf), ROWS, STEPS, LEARNING_RATE, "proposals")
        for buffer, weight in zip(buffers, weights, strict=True):
            buffer.copy_(weight.detach())
        self.down.div_(scale_f.unsqueeze(1))


def log_probs(x_nf: Tensor, down_kfr: Tensor, up_rW: Tensor, bias_k1W: Tensor) -> Tensor:
    """(k, n, W), in fp32."""
    return (x_nf @ down_kfr.float() @ up_rW.float() + bias_k1W.float()).log_softmax(-1)
