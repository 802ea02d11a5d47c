"""Texts → `Codes` → texts, window by window."""

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from sememe.compression.codes import Codes, Document, Window
from sememe.compression.opening import Opened, check_writer, opened
from sememe.compression.partial import Partial
from sememe.compression.windows import batches, cut_texts
from sememe.errors import CodesError
from sememe.models.loading import check_length


def compress(
    model,
    texts: str | Iterable[str],
    *,
    window: int | None = None,
    batch: int = 16,
    rate: float | None = None,
    base: str | None = None,
    tokenizer=None,
    progress: bool = False,
) -> Codes:
    """The concept ids of texts.

    Args:
        model: a run of `system: compressor`, its saved model, or such a model in memory.
        texts: documents of any length, or one.
        window: tokens that are compressed together; default: the run's `sequence_length`.
        batch: windows at a time.
        rate: the dial, concepts per token; default: as trained.
        base: take the base from here instead; of a model in folders.
        tokenizer: of a model in memory; default: that of the folder it was loaded from, or of its
            base.

    Raises:
        CheckpointError: `model` is no compressor.
        DataError: a text or a window that cannot be compressed.
        RecipeError: a rate that the model cannot hold."""
    with opened(model, tokenizer, base, rate) as use:
        return compress_texts(
            use, [texts] if isinstance(texts, str) else list(texts), window, batch, None, progress
        )[0]


def decompress(
    model,
    codes: Codes | str | Path,
    *,
    batch: int = 16,
    beams: int | None = None,
    base: str | None = None,
    tokenizer=None,
    progress: bool = False,
) -> list[str]:
    """The texts that `codes`, or a file of them, are read as. Arguments as in `compress`; `beams`:
    texts that are kept beside each other while one is written; default: as the model has it.

    Raises:
        CodesError: a file that is not whole, or codes of another model.
        CheckpointError: `model` is no compressor."""
    codes = codes.check() if isinstance(codes, Codes) else Codes.load(codes)
    with opened(model, tokenizer, base, check=lambda writer: check_writer(codes, writer)) as use:
        return decompress_codes(use, codes, batch, None, progress, beams)[0]


def compress_texts(
    use: Opened, texts: list[str], window: int | None, batch: int, out: Path | None, progress: bool
) -> tuple[Codes, dict[str, Any], Partial]:
    """Codes, figures, and what is kept of them beside `out`."""
    config, window = use.model.config, min(use.window, use.longest) if window is None else window
    check_length(use.longest, window, "--window ")
    documents = cut_texts(texts, use.tokenizer, window)
    rows = [cut.ids for cuts in documents for cut in cuts]
    whole = [[i for cut in cuts for i in cut.ids] for cuts in documents]
    job = {
        "command": "compress",
        "model": use.writer.weights_sha256,
        "rate": config.rate,
        "window": window,
        "text": hashlib.sha256(json.dumps(whole).encode()).hexdigest(),
    }
    partial = Partial(out, job)

    def work(numbers: list[int]) -> list[list[int]]:
        return use.model.compress(torch.tensor([rows[n] for n in numbers]))

    sizes = [len(row) for row in rows]
    seconds, new = run(
        work,
        partial,
        sizes,
        sizes,
        list(batches(sizes, left(partial, sizes), batch, equal=True)),
        "compress" if progress else None,
    )
    found = iter(range(len(rows)))
    codes = (
        Codes(
            model=use.writer,
            num_concepts=config.num_concepts,
            codes_per_concept=config.codes_per_concept,
            rate=float(config.rate),
            window=window,
            sha256="",
            documents=[
                Document(
                    characters=len(text),
                    windows=[
                        Window(
                            span=list(cut.span),
                            tokens=len(cut.ids),
                            concepts=partial.done[next(found)],
                        )
                        for cut in cuts
                    ],
                )
                for text, cuts in zip(texts, documents, strict=True)
            ],
        )
        .seal()
        .check()
    )
    tokens = sum(sizes[n] for n in new)
    return codes, figures(codes) | speed(tokens, seconds, partial), partial


def decompress_codes(
    use: Opened,
    codes: Codes,
    batch: int,
    out: Path | None,
    progress: bool,
    beams: int | None = None,
) -> tuple[list[str], dict[str, Any], Partial]:
    """Texts, figures, and what is kept of them beside `out`."""
    windows, config = codes.windows, use.model.config
    if (codes.num_concepts, codes.codes_per_concept) != (
        config.num_concepts,
        config.codes_per_concept,
    ):
        raise CodesError(
            f"{codes.codes_per_concept} codes of {codes.num_concepts} a concept, but "
            f"{use.writer.name} has "
            f"{config.codes_per_concept} of {config.num_concepts}: need them as it wrote them. "
            "try: sememe compress "
            "again"
        )
    beams = beams or config.beams
    partial = Partial(
        out,
        {
            "command": "decompress",
            "model": use.writer.weights_sha256,
            "codes": codes.sha256,
            "beams": beams,
        },
    )

    def work(numbers: list[int]) -> list[list[int]]:
        return use.model.decompress([windows[n].concepts for n in numbers], beams)

    sizes = [len(window.concepts) for window in windows]
    seconds, new = run(
        work,
        partial,
        [window.tokens for window in windows],
        sizes,
        list(batches(sizes, left(partial, sizes), batch, equal=False)),
        "decompress" if progress else None,
    )
    texts, at = [], 0
    for document in (
        codes.documents
    ):  # decoded at once: a character, or a space, may take tokens of two windows
        ids = [i for n in range(at, at + len(document.windows)) for i in partial.done[n]]
        texts.append(
            use.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        )
        at += len(document.windows)
    written = {
        "tokens_written": sum(len(partial.done[n]) for n in range(at)),
        "characters_written": sum(map(len, texts)),
    }
    tokens = sum(len(partial.done[n]) for n in new)
    return texts, figures(codes) | written | speed(tokens, seconds, partial), partial


def run(
    work: Callable[[list[int]], list[list[int]]],
    partial: Partial,
    tokens: list[int],
    sizes: list[int],
    parts: list[list[int]],
    name: str | None,
) -> tuple[float, list[int]]:
    """Does what is left to do, batch by batch; returns the seconds in the model, and the windows
    that were done in them."""
    seconds, new = 0.0, [n for part in parts for n in part]
    bar = tqdm(
        total=sum(tokens),
        initial=sum(tokens) - sum(tokens[n] for n in new),
        desc=name,
        unit="token",
        mininterval=1,
        disable=name is None,
    )
    try:
        with bar:
            for part in parts:
                start = time.perf_counter()
                rows = work(part)
                seconds += time.perf_counter() - start
                partial.add(part, rows)
                bar.update(sum(tokens[n] for n in part))
    except BaseException:
        partial.close()
        raise
    return seconds, new


def left(partial: Partial, sizes: list[int]) -> list[int]:
    """The windows that are still to do."""
    return [n for n in range(len(sizes)) if n not in partial.done]


def figures(codes: Codes) -> dict[str, Any]:
    """Sizes of what was compressed. An id counts as the `codes_per_concept` digits that it is."""
    windows = codes.windows
    tokens, concepts = (
        sum(window.tokens for window in windows),
        sum(len(window.concepts) for window in windows),
    )
    ids = concepts * codes.codes_per_concept
    return {
        "documents": len(codes.documents),
        "windows": len(windows),
        "window": codes.window,
        "characters": sum(document.characters for document in codes.documents),
        "tokens": tokens,
        "concepts": concepts,
        "ids": ids,
        "compression_ratio": tokens / ids if ids else None,
        "bits_per_token": ids * math.log2(codes.num_concepts) / tokens if tokens else None,
    }


def speed(tokens: int, seconds: float, partial: Partial) -> dict[str, Any]:
    return {
        "resumed_windows": partial.resumed,
        "seconds": seconds,
        "tokens_per_s": tokens / seconds if seconds else None,
    }
