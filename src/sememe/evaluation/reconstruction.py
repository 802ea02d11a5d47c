"""Text → concept ids → text, free-running: how much comes back, for how many bits, and what other
coders need for the same text (RUN/reconstruct.json)."""

import itertools
import lzma
import math
import re
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from rapidfuzz.distance import Indel
from torch import Tensor

from sememe.concepts.codebook import count_digits
from sememe.data import TextBlocks
from sememe.evaluation.quality import code_use, rate_error, token_nll
from sememe.evaluation.results import Figures

Lists = list[list[int]]
SAMPLES = 3


def shuffled(concepts: Lists, seed: int = 0) -> Lists:
    """All ids permuted over all lists; each list stays as long as it was."""
    flat = torch.tensor([*itertools.chain(*concepts)])
    order = torch.randperm(len(flat), generator=torch.Generator().manual_seed(seed))
    return [part.tolist() for part in flat[order].split([*map(len, concepts)])]


def coding_cost(concepts: Lists, tokens: int, config) -> Figures:
    """What a model's lists of concepts cost for `tokens` tokens. A concept is `codes_per_concept`
    ids, and every one counts."""
    flat = torch.tensor([*itertools.chain(*concepts)], dtype=torch.long)
    use = code_use(count_digits(flat, config.num_concepts, config.codes_per_concept))
    ids = len(flat) * config.codes_per_concept
    return {
        "concept_rate": len(flat) / tokens,
        "ids_per_token": ids / tokens,
        "compression_ratio": tokens / max(1, ids),
        "bits_per_token": ids * math.log2(config.num_concepts) / tokens,
        "bits_per_token_used": len(flat) * (use["bits_per_concept"] or 0.0) / tokens,
        **{key: use[key] for key in ("bits_per_concept", "code_perplexity_by_stage")},
    }


def token_accuracy(texts: Lists, rebuilt: Lists) -> float:
    """Share of positions with the right token. A window has as many as the longer of the two: what
    is missing or too much at its end is wrong, and so is all after a token that was left out."""
    pairs = [*itertools.chain(*map(itertools.zip_longest, texts, rebuilt))]
    return sum(a == b for a, b in pairs) / max(1, len(pairs))


def rouge_l(text: str, rebuilt: str) -> float:
    """F1 of the longest common subsequence of words: runs of letters and digits in lower case. As
    the package rouge-score without stemming, but in any script."""
    words, back = (re.findall(r"[^\W_]+", part.lower()) for part in (text, rebuilt))
    # What Indel neither deletes nor inserts is the longest common subsequence.
    return Indel.normalized_similarity(words, back)


def decode(tokenizer, texts: Lists) -> list[str]:
    """Exactly what the tokens spell."""
    return tokenizer.batch_decode(texts, clean_up_tokenization_spaces=False)


def scores(texts: Lists, rebuilt: Lists, tokenizer) -> Figures:
    """Shares from 0 to 1, but for BLEU-4 (13a tokens) and chrF, of the whole, from 0 to 100 as
    sacrebleu has them."""
    import sacrebleu

    words, back = decode(tokenizer, texts), decode(tokenizer, rebuilt)
    return {
        "token_accuracy": token_accuracy(texts, rebuilt),
        "exact_match": sum(map(list.__eq__, texts, rebuilt)) / len(texts),
        "bleu": sacrebleu.corpus_bleu(back, [words], force=True).score,
        "chrf": sacrebleu.corpus_chrf(back, [words]).score,
        "rouge_l": sum(map(rouge_l, words, back)) / len(texts),
        "length_ratio": sum(map(len, rebuilt)) / sum(map(len, texts)),
    }


def reconstruct(model, tokenizer, ids_NT: Tensor) -> tuple[Figures, Lists, Lists]:
    """Figures of (N, T) windows at the model's rate, its concept ids, and the token ids that they
    were read as."""
    concepts = model.compress(ids_NT)
    rebuilt = model.decompress(concepts)
    nll = float(token_nll(model, ids_NT)[0].mean())
    cost = coding_cost(concepts, ids_NT.numel(), model.config)
    figures = {
        "target_rate": model.dial.rate,
        "rate_error_percent": rate_error(cost["concept_rate"], model.dial.rate),
        **scores(ids_NT.tolist(), rebuilt, tokenizer),
        "nll": nll,
        **cost,
        "bits_per_token_lossless": cost["bits_per_token"] + nll / math.log(2),
    }
    return figures, concepts, rebuilt


def reconstruction_figures(
    model, tokenizer, ids_NT: Tensor, rates: Sequence[float] = ()
) -> Figures:
    """`reconstruct`, the same with the ids shuffled over the windows, and the curve of rate and
    distortion over `rates`."""
    figures, concepts, rebuilt = reconstruct(model, tokenizer, ids_NT)
    mixed = scores(ids_NT.tolist(), model.decompress(shuffled(concepts)), tokenizer)
    mixed["nll"] = float(token_nll(model, ids_NT, ablation="shuffle")[0].mean())
    curve = []
    for rate in sorted(set(rates)):
        with model.dial.at(rate=rate):
            is_own = rate == figures["target_rate"]
            curve.append(figures if is_own else reconstruct(model, tokenizer, ids_NT)[0])
    texts, back = (decode(tokenizer, rows[:SAMPLES]) for rows in (ids_NT, rebuilt))
    return {
        "tokens": ids_NT.numel(),
        "windows": len(ids_NT),
        "window": ids_NT.shape[1],
        **{k: getattr(model.config, k) for k in ("num_concepts", "codes_per_concept", "beams")},
        **figures,
        "shuffled": mixed,
        "curve": curve,
        "samples": [
            {"text": text, "rebuilt": again, "concept_ids": ids}
            for text, again, ids in zip(texts, back, concepts, strict=False)
        ],
    }


def xz(data: bytes) -> int:
    """Bytes of raw LZMA2 at its best for text. The file format around it would add 60 bytes and
    more to every window."""
    text = {"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "lc": 4, "lp": 0, "pb": 0}
    return len(lzma.compress(data, lzma.FORMAT_RAW, filters=[text]))


def zstd(data: bytes) -> int:
    """Bytes at level 22 without size, checksum and the 4 of the magic number. Raises ImportError
    without the package zstandard."""
    import zstandard

    return len(zstandard.ZstdCompressor(level=22, write_content_size=False).compress(data)) - 4


def base_nll(base, bos: int, ids_NT: Tensor) -> Tensor:
    """(N, T) NLL in nats, on the host, of (N, T) tokens with `bos` before them."""
    return token_nll(base, F.pad(ids_NT, (1, 0), value=bos))[0]


def lossless(base, bos: int, blocks: TextBlocks) -> list[Figures]:
    """Lossless coding cost of (N, T) windows in bits per token: the base with an arithmetic coder,
    which reads each window alone, zstd and xz."""
    bits = float(base_nll(base, bos, blocks.ids_NT).mean()) / math.log(2)
    lines = [coder_line("base", "each window", bits)]
    parts = {"whole text": [blocks.text], "each window": blocks.windows()}
    for coder, of in itertools.product((zstd, xz), parts):
        bits = fault = None
        try:
            bits = 8 * sum(map(coder, parts[of])) / blocks.ids_NT.numel()
        except ImportError:
            fault = "zstandard is not installed. try: pip install 'sememe[zstd]'"
        lines.append(coder_line(coder.__name__, of, bits, fault))
    return lines


def coder_line(name: str, of: str, bits, fault=None, accuracy: float = 1.0) -> Figures:
    """A line of the table of other coders. `of`: what was coded; `bits`: per token; `accuracy`:
    share of the tokens that come back."""
    figures = {"name": name, "of": of, "bits_per_token": bits, "token_accuracy": accuracy}
    return figures | {"fault": fault}


def bins_line(model, ids_NT: Tensor) -> Figures:
    """Of a compressor whose codes are bins of words, on the same (N, T) windows."""
    concepts = model.compress(ids_NT)
    bits = coding_cost(concepts, ids_NT.numel(), model.config)["bits_per_token"]
    accuracy = token_accuracy(ids_NT.tolist(), model.decompress(concepts))
    return coder_line("bins", "each window", bits, accuracy=accuracy)
