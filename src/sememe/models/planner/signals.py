"""Signals: what a target text is like, read off it by rules, and how well a plan predicts it
(linear probes). Suffixes: N texts · F features of what stands for a plan · S classes or labels."""

import math
import re
import zlib
from collections import Counter

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LENGTHS = (8, 16, 32, 64, 128, 256)  # words; a text's bucket is how many of these it reaches
KINDS = ("prose", "list", "code", "question", "dialogue")
TERMS = 5  # key words of a text
HASHES = 64
SIZES = {"length": len(LENGTHS) + 1, "kind": len(KINDS), "entity": 1, "number": 1, "terms": HASHES}
"""Classes of each signal; `terms` is that many yes-or-no labels, `entity` and `number` are one
each."""
DECAY = 0.1  # of the weights of a probe that is fitted
COMMON = 0.2  # a word that more of the documents have is no key word

ITEM = re.compile(r"^\s*(?:[-*•+]|\(?\w{1,2}[.)])\s+\S")
SPEECH = re.compile(r"""^\s*(?:["“„«]|[—–-]\s?["“A-ZÀ-Þ]|[A-ZÀ-Þ][\w .]{0,20}:\s)""")
CODE = re.compile(
    r"""^\s*(?:def|class|import|from|return|for|while|if|elif|else|try|const|let|var|fn|func|public
    |private|static|void|int|SELECT|INSERT|CREATE)\b.*[:;{(]\s*$
    | ^\s*(?:import|from\s\S+\simport|return|using|package)\s[\w.{}* ,'"()]+;?$
    | [{}]\s*$ | [(=\[{].*;\s*$ | ^\s*\w+;\s*$
    | ^\s*(?:\#include|\#!|//|/\*|@\w+)
    | ^\s*[\w.\[\]]+\s*(?:[-+*/]?=|:=)\s*\S.*[\w)\]}"']$ | ^\s*[\w.]+\(.*\)$
    | ^\s*</?\w+[^>]*> """,
    re.VERBOSE,
)
# A capital that opens a word where no sentence, line or quotation begins; "I" and its short forms
# do not count. Made for languages that write only names so.
ENTITY = re.compile(r"(?:[\w,;)’']|\d\.\d)[ ]+(?!I\b)[A-ZÀ-Þ]\w*[a-zß-ÿ]")
QUOTED = re.compile(r"[\"“„«][^\"”“»]+[\"”“»]")
QUESTION = re.compile(r"\?[\"'”’)\s]*$")


def kind_of(text: str) -> str:
    """One of KINDS, by the marks that most of its lines bear; else whether its last sentence asks;
    else prose."""
    lines = [line for line in text.splitlines() if line.strip()]

    def majority(rule: re.Pattern, min_lines: int) -> bool:
        count = sum(bool(rule.search(line)) for line in lines)
        return count >= max(min_lines, 0.5 * len(lines))

    if "```" in text or majority(CODE, 1):
        return "code"
    if majority(ITEM, 2):
        return "list"
    quoted = sum(map(len, QUOTED.findall(text)))
    if (len(lines) > 1 and majority(SPEECH, 1)) or quoted >= max(1, 0.4 * len(text.strip())):
        return "dialogue"
    return "question" if QUESTION.search(text) else "prose"


def words_of(text: str) -> list[str]:
    """Lower-case words of three letters or more."""
    return re.findall(r"[^\W\d_]{3,}", text.lower())


def hashed(words: list[str]) -> Tensor:
    """(HASHES,) 0 or 1: a bag whose entries are hashes of the words, the same on every machine."""
    bag = torch.zeros(HASHES)
    bag[[zlib.crc32(word.encode()) % HASHES for word in words]] = 1
    return bag


class SignalReader:
    """Texts → labels. How common words are is counted in the training texts alone:
    `SignalReader(train)`, then call it on any texts."""

    def __init__(self, texts: list[str]):
        self.counts = Counter(word for text in texts for word in set(words_of(text)))
        self.documents = len(texts)

    def key_terms(self, text: str) -> list[str]:
        """The TERMS words of the highest tf-idf among those that are not COMMON; best first, ties
        by the alphabet."""
        scores = {
            word: count * math.log((1 + self.documents) / (1 + self.counts[word]))
            for word, count in Counter(words_of(text)).items()
            if self.counts[word] <= max(COMMON * self.documents, 1)
        }
        return sorted(scores, key=lambda word: (-scores[word], word))[:TERMS]

    def __call__(self, texts: list[str]) -> dict[str, Tensor]:
        """`length`, `kind` (N,) long; `entity`, `number` (N, 1) and `terms` (N, HASHES) of 0 and
        1."""
        words = torch.tensor([len(text.split()) for text in texts])
        return {
            "length": torch.bucketize(words, torch.tensor(LENGTHS), right=True),
            "kind": torch.tensor([KINDS.index(kind_of(text)) for text in texts]),
            "entity": torch.tensor([[float(bool(ENTITY.search(text)))] for text in texts]),
            "number": torch.tensor([[float(bool(re.search(r"\d", text)))] for text in texts]),
            "terms": torch.stack([hashed(self.key_terms(text)) for text in texts]),
        }


class SignalProbe(nn.Module):
    """A linear layer that reads all signals off what stands for a plan, (N, F): its bag of ids, or
    states. `forward` is differentiable in its input too: a term of a planner's loss. `fit` and
    `score` measure."""

    def __init__(self, features: int, sizes: dict[str, int] = SIZES) -> None:
        super().__init__()
        self.sizes = sizes
        self.linear = nn.Linear(features, sum(sizes.values()))
        for p in self.linear.parameters():
            nn.init.zeros_(p)

    def logits(self, x_NF: Tensor) -> dict[str, Tensor]:
        with torch.autocast(x_NF.device.type, enabled=False):
            logits_NS = self.linear(x_NF.float())
        return dict(zip(self.sizes, logits_NS.split([*self.sizes.values()], 1), strict=True))

    def forward(self, x_NF: Tensor, labels: dict[str, Tensor]) -> dict[str, Tensor]:
        """The mean loss of each signal, nats per label."""
        return {name: _loss(logits, labels[name]) for name, logits in self.logits(x_NF).items()}

    @torch.enable_grad()
    def fit(self, x_NF: Tensor, labels: dict[str, Tensor]) -> "SignalProbe":
        """From where it stands to the least regularised loss on all rows, by L-BFGS. Features are
        of scale 1."""
        optimiser = torch.optim.LBFGS(self.parameters(), max_iter=60, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            optimiser.zero_grad()
            penalty = DECAY * self.linear.weight.square().sum()
            loss = sum(self(x_NF, labels).values()) + penalty
            loss.backward()
            return loss

        optimiser.step(closure)
        return self

    @torch.no_grad()
    def score(
        self, x_NF: Tensor, labels: dict[str, Tensor], train: dict[str, Tensor]
    ) -> dict[str, dict[str, float]]:
        """Per signal on rows that were not fitted: `loss`; `accuracy`; and `base_loss`,
        `base_accuracy` of always giving the answer's frequency in `train`."""
        scores = {}
        for name, logits_NS in self.logits(x_NF).items():
            wanted, known = labels[name], train[name]
            # One is added to each count, so that no answer is impossible.
            base_S = ((known.sum(0) + 1) / (len(known) + 2)).logit()
            if known.dim() == 1:  # one class of many
                base_S = (torch.bincount(known, minlength=self.sizes[name]) + 1.0).log()
            base_NS = base_S.expand_as(logits_NS)
            scores[name] = {
                "loss": float(_loss(logits_NS, wanted)),
                "base_loss": float(_loss(base_NS, wanted)),
                "accuracy": _accuracy(logits_NS, wanted),
                "base_accuracy": _accuracy(base_NS, wanted),
            }
        return scores


def _loss(logits: Tensor, wanted: Tensor) -> Tensor:
    if wanted.dim() == 1:
        return F.cross_entropy(logits, wanted)
    return F.binary_cross_entropy_with_logits(logits, wanted.to(logits.dtype))


def _accuracy(logits: Tensor, wanted: Tensor) -> float:
    right = logits.argmax(1) == wanted if wanted.dim() == 1 else (logits > 0) == wanted.bool()
    return float(right.float().mean())
