"""Texts and what came back of them → how much did: by token, by window, by n-gram and by longest
common subsequence."""

import re
from collections.abc import Sequence
from typing import Any

from rapidfuzz.distance import Indel

Ids = Sequence[int]


def token_accuracy(texts: Sequence[Ids], rebuilt: Sequence[Ids]) -> float:
    """Share of places with the right token. A window has as many places as the longer of the two:
    what is missing or too much at its end is wrong, and so is all behind a token that was left
    out."""
    pairs = list(zip(texts, rebuilt, strict=True))
    right = sum(a == b for text, back in pairs for a, b in zip(text, back, strict=False))
    return right / max(1, sum(max(len(text), len(back)) for text, back in pairs))


def exact_match(texts: Sequence[Ids], rebuilt: Sequence[Ids]) -> float:
    """Share of windows with every token right."""
    return sum(list(a) == list(b) for a, b in zip(texts, rebuilt, strict=True)) / max(1, len(texts))


def rouge_l(text: str, rebuilt: str) -> float:
    """F1 of the longest common subsequence of words: runs of letters and digits in lower case. As
    the package rouge-score without stemming, but in any script."""
    words, back = (re.findall(r"[^\W_]+", part.lower()) for part in (text, rebuilt))
    # What Indel does not delete or insert is the longest common subsequence.
    return Indel.normalized_similarity(words, back)


def scores(texts: Sequence[Ids], rebuilt: Sequence[Ids], tokenizer) -> dict[str, Any]:
    """Shares from 0 to 1, but for BLEU-4 (13a tokens) and chrF, of the whole, from 0 to 100 as
    sacrebleu has them."""
    import sacrebleu

    words, back = (
        [tokenizer.decode(ids, clean_up_tokenization_spaces=False) for ids in many]
        for many in (texts, rebuilt)
    )
    return {
        "token_accuracy": token_accuracy(texts, rebuilt),
        "exact_match": exact_match(texts, rebuilt),
        "bleu": sacrebleu.corpus_bleu(back, [words], force=True).score,
        "chrf": sacrebleu.corpus_chrf(back, [words]).score,
        "rouge_l": sum(map(rouge_l, words, back)) / max(1, len(words)),
        "length_ratio": sum(map(len, rebuilt)) / max(1, sum(map(len, texts))),
    }
