"""Text → concept ids → text, free-running: how much comes back, for how many bits, and what
lossless coders need for the same text (RUN/reconstruct.json)."""

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
from sememe.evaluation.quality import batched, code_use, rate_error, token_nll
from sememe.evaluation.results import Figures
from sememe.models.losses import cross_entropy
from sememe.progress import bar

Lists = list[list[int]]
SAMPLES = 3
WINDOWS = 16  # that are compressed or decompressed together


def decompress(model, concepts: Lists) -> Lists:
    """The token ids that each list of concept ids is read as."""
    starts = range(0, len(concepts), WINDOWS)
    rebuilt = []
    for start in bar(iterable=starts, desc="decompress", unit="batch", leave=False):
        rebuilt += model.decompress(concepts[start : start + WINDOWS])
    return rebuilt


def compress(model, ids_NT: Tensor) -> Lists:
    """The concept ids of each row of (N, T) windows."""
    return [ids for ids_BT in ids_NT.split(WINDOWS) for ids in model.compress(ids_BT)]


def written_again(model, ids_NT: Tensor, window: int | None = None) -> Lists:
    """The (N, T) texts as the model writes them from their concepts, `window` tokens at a time
    (None: all at once)."""
    windows = ids_NT.split(window or ids_NT.shape[1], 1)
    parts = [decompress(model, compress(model, ids_Nw)) for ids_Nw in windows]
    return [list(itertools.chain.from_iterable(row)) for row in zip(*parts, strict=True)]


def shuffled(concepts: Lists, seed: int = 0) -> Lists:
    """All ids permuted over all lists; each list stays as long as it was."""
    flat = torch.tensor([i for ids in concepts for i in ids])
    order = torch.randperm(len(flat), generator=torch.Generator().manual_seed(seed))
    return [part.tolist() for part in flat[order].split([len(ids) for ids in concepts])]


def coding_cost(concepts: Lists, tokens: int, num_concepts: int, codes_per_concept: int) -> Figures:
    """What lists of concepts cost for `tokens` tokens. A concept is `codes_per_concept` ids, and
    every one counts."""
    flat = torch.tensor([i for ids in concepts for i in ids], dtype=torch.long)
    use = code_use(count_digits(flat, num_concepts, codes_per_concept))
    ids = len(flat) * codes_per_concept
    return {
        "concept_rate": len(flat) / tokens,
        "ids_per_token": ids / tokens,
        "compression_ratio": tokens / max(1, ids),
        "bits_per_token": ids * math.log2(num_concepts) / tokens,
        "bits_per_token_used": len(flat) * (use["bits_per_concept"] or 0.0) / tokens,
        "bits_per_concept": use["bits_per_concept"],
        "code_perplexity_by_stage": use["code_perplexity_by_stage"],
    }


def token_accuracy(texts: Lists, rebuilt: Lists) -> float:
    """Share of positions with the right token. A window has as many as the longer of the two: what
    is missing or too much at its end is wrong, and so is all after a token that was left out."""
    pairs = list(zip(texts, rebuilt, strict=True))
    right = sum(a == b for pair in pairs for a, b in zip(*pair, strict=False))
    return right / max(1, sum(max(map(len, pair)) for pair in pairs))


def rouge_l(text: str, rebuilt: str) -> float:
    """F1 of the longest common subsequence of words: runs of letters and digits in lower case. As
    the package rouge-score without stemming, but in any script."""
    words, back = (re.findall(r"[^\W_]+", part.lower()) for part in (text, rebuilt))
    # What Indel neither deletes nor inserts is the longest common subsequence.
    return Indel.normalized_similarity(words, back)


def scores(texts: Lists, rebuilt: Lists, tokenizer) -> Figures:
    """Shares from 0 to 1, but for BLEU-4 (13a tokens) and chrF, of the whole, from 0 to 100 as
    sacrebleu has them."""
    import sacrebleu

    exact = {"clean_up_tokenization_spaces": False}
    words, back = (tokenizer.batch_decode(lists, **exact) for lists in (texts, rebuilt))
    count = max(1, len(texts))
    return {
        "token_accuracy": token_accuracy(texts, rebuilt),
        "exact_match": sum(map(list.__eq__, texts, rebuilt)) / count,
        "bleu": sacrebleu.corpus_bleu(back, [words], force=True).score,
        "chrf": sacrebleu.corpus_chrf(back, [words]).score,
        "rouge_l": sum(map(rouge_l, words, back)) / count,
        "length_ratio": sum(map(len, rebuilt)) / max(1, sum(map(len, texts))),
    }


def reconstruct(model, tokenizer, ids_NT: Tensor) -> tuple[Figures, Lists, Lists]:
    """Figures of (N, T) windows at the model's rate, its concept ids, and the token ids that they
    were read as."""
    concepts = compress(model, ids_NT)
    rebuilt = decompress(model, concepts)
    nll = float(token_nll(model, ids_NT)[0].mean())
    config = model.config
    cost = coding_cost(concepts, ids_NT.numel(), config.num_concepts, config.codes_per_concept)
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
    mixed = decompress(model, shuffled(concepts))
    exact = {"clean_up_tokenization_spaces": False}
    texts, back = (tokenizer.batch_decode(x[:SAMPLES], **exact) for x in (ids_NT, rebuilt))
    curve = []
    for rate in sorted(set(rates)):
        with model.dial.at(rate=rate):
            is_own = rate == figures["target_rate"]
            curve.append(figures if is_own else reconstruct(model, tokenizer, ids_NT)[0])
    return {
        "tokens": ids_NT.numel(),
        "windows": len(ids_NT),
        "window": ids_NT.shape[1],
        "num_concepts": model.config.num_concepts,
        "codes_per_concept": model.config.codes_per_concept,
        "beams": model.config.beams,
        **figures,
        "shuffled": scores(ids_NT.tolist(), mixed, tokenizer)
        | {"nll": float(token_nll(model, ids_NT, ablation="shuffle")[0].mean())},
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
    """Bytes at level 22 without magic number, size and checksum. Raises ImportError without the
    package zstandard."""
    import zstandard

    settings = zstandard.ZstdCompressionParameters.from_level(
        22,
        source_size=len(data),
        format=zstandard.FORMAT_ZSTD1_MAGICLESS,
        write_content_size=False,
        write_checksum=False,
        write_dict_id=False,
    )
    return len(zstandard.ZstdCompressor(compression_params=settings).compress(data))


def base_nll(base, bos: int, ids_NT: Tensor, last: int | None = None) -> Tensor:
    """(N, n) NLL in nats, on the host, of the last n of (N, T) tokens, all of them by default, with
    `bos` before them."""
    last = last or ids_NT.shape[1]

    def nll(ids_BT: Tensor) -> tuple[Tensor]:
        ids_BS = F.pad(ids_BT.to(base.device), (1, 0), value=bos)
        out = base(input_ids=ids_BS, use_cache=False, logits_to_keep=last + 1)
        # Some models return all logits whatever they are told to keep.
        return (cross_entropy(out.logits[:, -last - 1 : -1], ids_BS[:, -last:]),)

    return batched(nll, ids_NT)[0]


def lossless(base, bos: int, blocks: TextBlocks) -> list[Figures]:
    """Lossless coding cost of (N, T) windows in bits per token, as {name, of, bits_per_token,
    fault}: the base with an arithmetic coder, which reads each window alone, zstd and xz."""
    bits = float(base_nll(base, bos, blocks.ids_NT).mean()) / math.log(2)
    lines = [{"name": "base", "of": "each window", "bits_per_token": bits, "fault": None}]
    parts = {"whole text": [blocks.text], "each window": blocks.windows()}
    for coder, of in itertools.product((zstd, xz), parts):
        bits = fault = None
        try:
            bits = 8 * sum(map(coder, parts[of])) / blocks.ids_NT.numel()
        except ImportError:
            fault = "zstandard is not installed. try: pip install 'sememe[zstd]'"
        lines.append({"name": coder.__name__, "of": of, "bits_per_token": bits, "fault": fault})
    return lines
