"""Signals: what a target text is like, read off it by rules, and how well a plan tells it (linear
probes)."""

import math
import re
import zlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sememe.errors import DataError

LENGTHS = (8, 16, 32, 64, 128, 256)  # words; the bucket of a text is how many of these it reaches
KINDS = ("prose", "list", "code", "question", "dialogue")
TERMS, HASHES = 5, 64
SIZES = {"length": len(LENGTHS) + 1, "kind": len(KINDS), "entity": 1, "number": 1, "terms": HASHES}
"""Classes of each signal; `terms` is that many yes-or-no labels, `entity` and `number` are one
each."""
COMMON = 0.2  # a word that more of the documents have is no term

ITEM = re.compile(r"\s*(?:[-*•+]|\(?\w{1,2}[.)])\s+\S")
SPEECH = re.compile(r"""\s*(?:["“„«]|[—–-]\s?["“A-ZÀ-Þ]|[A-ZÀ-Þ][\w .]{0,20}:\s)""")
CODE = re.compile(
    r"""^\s*(?:def|class|import|from|return|for|while|if|elif|else|try|const|let|var|fn|func|public|private|static
    |void|int|SELECT|INSERT|CREATE)\b.*[:;{(]\s*$ | ^\s*(?:import|from\s\S+\simport|return|using|package)\s[\w.{}* ,'"()]+;?$
    | [{}]\s*$ | [(=\[{].*;\s*$ | ^\s*\w+;\s*$
    | ^\s*(?:\#include|\#!|//|/\*|@\w+) | ^\s*[\w.\[\]]+\s*(?:[-+*/]?=|:=)\s*\S.*[\w)\]}"']$ | ^\s*[\w.]+\(.*\)$
    | ^\s*</?\w+[^>]*> """,
    re.VERBOSE,
)


def length_bucket(text: str) -> int:
    """0 … len(LENGTHS), by the number of words."""
    words = len(text.split())
    return sum(words >= edge for edge in LENGTHS)


def has_number(text: str) -> bool:
    """Whether it has a digit."""
    return bool(re.search(r"\d", text))


def has_entity(text: str) -> bool:
    """Whether a capital opens a word where no sentence, line or quotation begins; "I" and its short
    forms do not count.

    Made for languages that write only names so."""
    return bool(re.search(r"(?:[\w,;)’']|\d\.\d)[ ]+(?!I\b)[A-ZÀ-Þ]\w*[a-zß-ÿ]", text))


def kind_of(text: str) -> str:
    """One of KINDS, by the marks that most of its lines bear; else whether its last sentence asks;
    else prose."""
    lines = [line for line in text.splitlines() if line.strip()]
    if not lines:
        return "prose"

    def share(rule: re.Pattern) -> float:
        return sum(
            bool(rule.search(line) if rule is CODE else rule.match(line)) for line in lines
        ) / len(lines)

    if "```" in text or share(CODE) >= 0.5:
        return "code"
    if len(lines) > 1 and share(ITEM) >= 0.5 and sum(bool(ITEM.match(line)) for line in lines) > 1:
        return "list"
    quoted = sum(len(said) for said in re.findall(r"[\"“„«][^\"”“»]+[\"”“»]", text))
    if (len(lines) > 1 and share(SPEECH) >= 0.5) or quoted >= 0.4 * len(text.strip()):
        return "dialogue"
    return "question" if re.search(r"\?[\"'”’)\s]*$", text) else "prose"


def words_of(text: str) -> list[str]:
    """Lower-case words of three letters or more."""
    return re.findall(r"[^\W\d_]{3,}", text.lower())


def document_counts(texts: Iterable[str]) -> Counter[str]:
    """In how many of the texts each word is."""
    return Counter(word for text in texts for word in set(words_of(text)))


def key_terms(text: str, counts: Counter[str], documents: int, top: int = TERMS) -> list[str]:
    """The `top` words of the highest tf-idf among those that are not COMMON; best first, ties by
    the alphabet."""
    found = Counter(words_of(text))
    scores = {
        word: number * math.log((1 + documents) / (1 + counts[word]))
        for word, number in found.items()
        if counts[word] <= max(COMMON * documents, 1)
    }
    return sorted(scores, key=lambda word: (-scores[word], word))[:top]


def hashed(words: Iterable[str], size: int = HASHES) -> Tensor:
    """(size,) 0 or 1: a bag whose places are hashes of the words, the same on every machine."""
    bag = torch.zeros(size)
    for word in words:
        bag[zlib.crc32(word.encode()) % size] = 1
    return bag


@dataclass(frozen=True)
class SignalReader:
    """Texts → labels. `counts` come from the training texts alone: `SignalReader.fit(train)`, then
    call it on any texts."""

    counts: Counter[str] = field(repr=False)
    documents: int

    @classmethod
    def fit(cls, texts: list[str]) -> "SignalReader":
        return cls(document_counts(texts), len(texts))

    def __call__(self, texts: list[str]) -> dict[str, Tensor]:
        """`length`, `kind` (N,) long; `entity`, `number` (N, 1) and `terms` (N, HASHES) of 0 and 1.

        Raises:
            DataError: no text.
        """
        if not texts:
            raise DataError(
                "there is no text to read signals off: need at least one. try: another file"
            )
        bags = [hashed(key_terms(text, self.counts, self.documents)) for text in texts]
        return {
            "length": torch.tensor([length_bucket(text) for text in texts]),
            "kind": torch.tensor([KINDS.index(kind_of(text)) for text in texts]),
            "entity": torch.tensor([[float(has_entity(text))] for text in texts]),
            "number": torch.tensor([[float(has_number(text))] for text in texts]),
            "terms": torch.stack(bags),
        }


class SignalProbe(nn.Module):
    """One linear layer per signal on what stands for a plan, (B, F): its bag of ids, or states.

    `forward` is differentiable in its input too: a term of a planner's loss. `fit` and `score`
    measure."""

    def __init__(self, features: int, sizes: dict[str, int] = SIZES) -> None:
        super().__init__()
        self.heads = nn.ModuleDict(
            {name: nn.Linear(features, size) for name, size in sizes.items()}
        )
        for head in self.heads.values():
            nn.init.zeros_(head.weight)
            nn.init.zeros_(head.bias)
        self.register_buffer("mean_F", torch.zeros(features))
        self.register_buffer("scale_F", torch.ones(features))

    def logits(self, x_BF: Tensor) -> dict[str, Tensor]:
        x_BF = (x_BF.float() - self.mean_F) * self.scale_F
        return {name: head(x_BF) for name, head in self.heads.items()}

    def forward(self, x_BF: Tensor, labels: dict[str, Tensor]) -> dict[str, Tensor]:
        """The mean loss of each signal, nats per label."""
        return {name: _loss(logits, labels[name]) for name, logits in self.logits(x_BF).items()}

    @torch.enable_grad()
    def fit(
        self,
        x_NF: Tensor,
        labels: dict[str, Tensor],
        weight_decay: float = 1e-3,
        iterations: int = 60,
    ) -> "SignalProbe":
        """From where it stands to the least regularised loss on all rows (L-BFGS), features
        standardised."""
        x_NF = x_NF.detach().float()
        self.mean_F.copy_(x_NF.mean(0))
        self.scale_F.copy_(1 / x_NF.std(0, unbiased=False).clamp_min(1e-4))
        weights = [head.weight for head in self.heads.values()]
        optimiser = torch.optim.LBFGS(
            self.parameters(), max_iter=iterations, line_search_fn="strong_wolfe"
        )

        def closure() -> Tensor:
            optimiser.zero_grad()
            loss = sum(self(x_NF, labels).values()) + weight_decay * sum(
                weight.square().sum() for weight in weights
            )
            loss.backward()
            return loss

        optimiser.step(closure)
        return self

    @torch.no_grad()
    def score(
        self, x_NF: Tensor, labels: dict[str, Tensor], train: dict[str, Tensor]
    ) -> dict[str, dict[str, float]]:
        """Per signal on rows that were not fitted: `loss`; `accuracy`; `auroc`, mean over labels
        that have both answers; and `base_loss`, `base_accuracy` of always giving the answer's
        frequency in `train`."""
        scores = {}
        for name, logits in self.logits(x_NF).items():
            wanted, many = labels[name], labels[name].dim() == 1
            base = _base(train[name], logits.shape[1]).expand_as(logits)
            hot = F.one_hot(wanted, logits.shape[1]) if many else wanted
            scores[name] = {
                "loss": _loss(logits, wanted).item(),
                "base_loss": _loss(base, wanted).item(),
                "accuracy": _accuracy(logits, wanted),
                "base_accuracy": _accuracy(base, wanted),
                "auroc": auroc(logits.softmax(1) if many else logits, hot),
            }
        return scores


def _loss(logits: Tensor, wanted: Tensor) -> Tensor:
    if wanted.dim() == 1:
        return F.cross_entropy(logits, wanted)
    return F.binary_cross_entropy_with_logits(logits, wanted.to(logits.dtype))


def _accuracy(logits: Tensor, wanted: Tensor) -> float:
    right = logits.argmax(1) == wanted if wanted.dim() == 1 else (logits > 0) == wanted.bool()
    return right.float().mean().item()


def _base(train: Tensor, size: int) -> Tensor:
    """(size,) logits of each answer's frequency, one added to each so that none is impossible."""
    if train.dim() == 1:
        return (torch.bincount(train, minlength=size) + 1.0).log()
    return ((train.sum(0) + 1) / (len(train) + 2)).logit()


def auroc(scores_NC: Tensor, wanted_NC: Tensor) -> float:
    """Area under the ROC curve, ties count one half, mean over columns that have both answers; NaN
    if none has."""
    areas = []
    for scores, wanted in zip(scores_NC.double().T, wanted_NC.bool().T, strict=True):
        positive = int(wanted.sum())
        if 0 < positive < len(wanted):
            _, place, count = scores.unique(return_inverse=True, return_counts=True)
            ranks = (count.cumsum(0) - (count - 1) / 2)[place]
            areas.append(
                (ranks[wanted].sum().item() - positive * (positive + 1) / 2)
                / (positive * (len(wanted) - positive))
            )
    return sum(areas) / len(areas) if areas else math.nan
