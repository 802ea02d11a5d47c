"""Proposals: shallow states at t and t - 1 → distributions of the tokens t + 1 … t + k.

Multi-token prediction (arXiv 2404.19737) at the price of a few small matrices: heads of low rank
over the most frequent words of a text, with one class for all others, each of those as probable as
the next. They are distilled from the base once, before training, and never trained again.

W counts the classes, f the 2 D coordinates that a head reads, r their rank."""

import math

import torch
from torch import Tensor, nn

AHEAD = 3
WORDS = 1024
RANK = 64
STEPS, ROWS, LEARNING_RATE = 300, 8, 3e-3  # of the distillation


class Proposals(nn.Module):
    """`k` heads that read `width` coordinates at each of two places."""

    def __init__(self, width: int, vocabulary: int, k: int = AHEAD):
        super().__init__()
        words = min(WORDS, vocabulary)
        self.vocabulary = vocabulary
        # What a word of the last class costs beyond its class, in nats.
        self.spread = math.log(max(vocabulary - words, 1))
        self.register_buffer("words", torch.arange(words))
        self.register_buffer("down", torch.zeros(k, 2 * width, RANK))
        self.register_buffer("up", torch.zeros(RANK, words + 1))
        self.register_buffer("bias", torch.zeros(k, 1, words + 1))

    def forward(self, x_nf: Tensor, k: int | None = None) -> Tensor:
        """(k, n, W) log-probabilities that the first k heads give."""
        return log_probs(x_nf, self.down[:k], self.up, self.bias[:k])

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
        """Distils what the base expects behind each token, into the head that is as many tokens
        early: cross entropy, from the mean distribution on."""
        generator = torch.Generator().manual_seed(0)
        scale_f = x_NTf.flatten(0, 1).std(0).clamp(min=1e-6)  # Adam's steps know no units
        self.bias.copy_(p_NTW.mean((0, 1)).clamp(min=1e-6).log())
        for weight in (self.down, self.up):
            random = torch.randn(weight.shape, generator=generator)
            weight.copy_(random / weight.shape[-2] ** 0.5)
        self.up.mul_(0.1)
        weights = [x.clone().requires_grad_() for x in (self.down, self.up, self.bias)]
        optimizer = torch.optim.Adam(weights)
        for step in range(STEPS):
            row_n = torch.randint(len(x_NTf), (ROWS,), generator=generator)
            with torch.enable_grad():
                log_p = log_probs(x_NTf[row_n].flatten(0, 1) / scale_f, *weights)
                log_p = log_p.unflatten(1, (ROWS, -1))
                parts = [
                    -(p_NTW[row_n, j:] * log_p[j, :, : log_p.shape[2] - j]).sum(-1).mean()
                    for j in range(len(log_p))
                ]
                sum(parts).backward()
            optimizer.param_groups[0]["lr"] = LEARNING_RATE * (1 - step / STEPS)
            optimizer.step()
            optimizer.zero_grad()
        for weight, value in zip((self.down, self.up, self.bias), weights, strict=True):
            weight.copy_(value.detach())
        self.down.div_(scale_f.unsqueeze(1))


def log_probs(x_nf: Tensor, down_kfr: Tensor, up_rW: Tensor, bias_k1W: Tensor) -> Tensor:
    """(k, n, W), in fp32."""
    return (x_nf @ down_kfr.float() @ up_rW.float() + bias_k1W.float()).log_softmax(-1)
