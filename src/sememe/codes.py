"""Texts ⇄ concept ids with a compressor, in memory and as files of JSON (docs/formats.md,
codes.json)."""

import contextlib
import hashlib
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from sememe import storage
from sememe.data import check_text, encoder, read_texts, token_windows
from sememe.errors import CheckpointError, CodesError
from sememe.models import CompressorForCausalLM
from sememe.models.compressor.encode import evaluating
from sememe.models.loading import (
    check_length,
    check_rate,
    load_model,
    load_tokenizer,
    longest_text,
    tokenizer_folder,
)
from sememe.paths import usable
from sememe.progress import bar

BATCH = 16  # windows
WINDOW = 512  # tokens, where no recipe says how long the texts were that the model was trained on


# ---- the file format ----


class Part(BaseModel):
    """A JSON object of a file of codes: no other keys, no conversions."""

    model_config = ConfigDict(extra="forbid", strict=True)


class Window(Part):
    """Tokens that were compressed together."""

    span: tuple[int, int]
    """The characters [from, to) of the document that it stands for."""
    tokens: int
    concepts: list[int]
    """Each below K^G; code g of an id is id // K^g % K."""


class Document(Part):
    """A text as windows that follow on each other."""

    characters: int
    windows: list[Window]


class Writer(Part):
    """The model that compressed, and the only one that can decompress."""

    name: str
    weights_sha256: str
    base: str | None
    base_sha256: str | None


class Codes(Part):
    """Compressed documents; `save` and `load` are to and from a file."""

    format: Literal["sememe-codes"] = "sememe-codes"
    version: Literal[1] = 1
    model: Writer
    num_concepts: int
    codes_per_concept: int
    rate: float
    window: int
    overlap: Literal[0] = 0
    documents: list[Document]
    sha256: str | None
    """Of all else, as JSON with sorted keys and no spaces; None where it is to be computed."""

    @model_validator(mode="after")
    def check_sha256(self) -> "Codes":
        """Everything is as it was written."""
        content = self.model_dump(exclude={"sha256"})
        text = json.dumps(content, sort_keys=True, separators=(",", ":"))
        sha256 = hashlib.sha256(text.encode()).hexdigest()
        if self.sha256 not in (None, sha256):
            raise ValueError("its checksum differs, it was changed since it was written")
        self.sha256 = sha256
        return self

    @property
    def windows(self) -> list[Window]:
        """Of all documents, in order."""
        return [window for document in self.documents for window in document.windows]

    def save(self, path: str | Path) -> None:
        """Writes the file, whole or not at all; a window a line, to be read and compared."""
        text = self.model_dump_json().replace('{"span"', '\n{"span"') + "\n"
        storage.write(Path(path), text.encode())

    @classmethod
    def load(cls, path: str | Path) -> "Codes":
        """Reads and checks a file. Raises CodesError where it is not one that `save` wrote."""
        try:
            return cls.model_validate_json(usable(path).read_bytes())
        except OSError as error:
            reason = error.strerror
        except ValidationError as error:
            fault = error.errors(include_url=False, include_input=False)[0]
            place = ".".join(map(str, fault["loc"]))
            reason = f"{place} {fault['msg'].removeprefix('Value error, ')}".strip()
        raise CodesError(
            f"{path} cannot be read ({reason}): need a file as sememe compress wrote it. try: "
            "copy it again, or sememe compress again"
        )


# ---- texts → codes → texts ----


@dataclass
class Codec:
    """A compressor in eval mode, its tokenizer, and how files name it."""

    model: CompressorForCausalLM
    tokenizer: Any
    writer: Writer

    def compress(self, texts: list[str], window: int | None = None) -> Codes:
        """Only windows of one length are a batch: nothing is padded, and what a window becomes does
        not depend on its neighbours."""
        config = self.model.config
        window = trained_window(config) if window is None else window
        check_length(longest_text(config), window, "window=")
        encodings = encoder(self.tokenizer)([check_text(text, "a text") for text in texts])
        cuts = [
            list(token_windows(encoding, len(text), window))
            for text, encoding in zip(texts, encodings, strict=True)
        ]
        rows = [torch.tensor(ids) for windows in cuts for ids, _ in windows]
        concepts = in_batches(lambda part: self.model.compress(torch.stack(part)), rows, True)
        documents = []
        for text, cut in zip(texts, cuts, strict=True):
            windows = [
                Window(span=span, tokens=len(ids), concepts=next(concepts)) for ids, span in cut
            ]
            documents.append(Document(characters=len(text), windows=windows))
        return Codes(
            model=self.writer,
            num_concepts=config.num_concepts,
            codes_per_concept=config.codes_per_concept,
            rate=float(self.model.dial.rate),
            window=window,
            documents=documents,
            sha256=None,
        )

    def decompress(self, codes: Codes, beams: int | None) -> list[list[int]]:
        """The token ids of each document. Raises CodesError where another model wrote the codes."""
        theirs, ours = codes.model, self.writer
        if (theirs.weights_sha256, theirs.base_sha256) != (ours.weights_sha256, ours.base_sha256):
            raise CodesError(
                f"these codes are of {theirs.name} (sha256 {theirs.weights_sha256[:12]}…), but "
                f"{ours.name} has {ours.weights_sha256[:12]}…: need the model that wrote them. "
                f"try: {theirs.name} as it was then"
            )
        rows = [window.concepts for window in codes.windows]
        tokens = in_batches(lambda part: self.model.decompress(part, beams), rows, False)
        return [[i for _ in document.windows for i in next(tokens)] for document in codes.documents]

    def texts(self, documents: list[list[int]]) -> list[str]:
        """The windows of a document are decoded together: a character, or a space, may take tokens
        of two of them."""
        return self.tokenizer.batch_decode(documents, clean_up_tokenization_spaces=False)


def trained_window(config) -> int:
    """The `sequence_length` of the run that the model is in, else 512 or what fits."""
    recipe = Path(config.name_or_path).parent / "recipe.yaml"
    values = yaml.safe_load(recipe.read_text(encoding="utf-8")) if recipe.is_file() else {}
    return min(values.get("sequence_length", WINDOW), longest_text(config))


def in_batches(work: Callable[[list], list], rows: list, equal: bool) -> Iterator[list[int]]:
    """What `work` makes of each row, largest rows first. `equal`: a batch has rows of one length
    alone."""
    order = sorted(range(len(rows)), key=lambda n: len(rows[n]), reverse=True)
    groups = [list(group) for _, group in groupby(order, lambda n: equal and len(rows[n]))]
    batches = [group[i : i + BATCH] for group in groups for i in range(0, len(group), BATCH)]
    results = {}
    for numbers in bar(iterable=batches, unit="batch", leave=False):
        results |= zip(numbers, work([rows[n] for n in numbers]), strict=True)
    return (results[n] for n in range(len(rows)))


@contextlib.contextmanager
def ready(model, rate: float | None = None) -> Iterator[Codec]:
    """A compressor in eval mode, from a folder or from memory; one in memory is left as it was.

    Raises CheckpointError for anything else."""
    name = str(model)
    if isinstance(model, (str, Path)):
        model, _ = load_model(model)
    else:
        name = model.config.name_or_path or type(model).__name__
    if not isinstance(model, CompressorForCausalLM):
        raise CheckpointError(
            f"{name} is no compressor: need a run of system: compressor, or its saved model. "
            "try: sememe train RECIPE system=compressor --out runs/compressor"
        )
    config = model.config
    rate = model.dial.rate if rate is None else rate
    check_rate(config, rate, name)
    tokenizer = load_tokenizer(tokenizer_folder(Path(config.name_or_path), config))
    digest = hashlib.sha256()
    for key, value in sorted(model.own_state().items()):
        digest.update(key.encode() + value.float().cpu().numpy().tobytes())
    writer = Writer(
        name=name,
        weights_sha256=digest.hexdigest(),
        base=config.base,
        base_sha256=config.base_sha256,
    )
    with model.dial.at(rate=rate), evaluating(model):
        yield Codec(model, tokenizer, writer)


def compress(
    model: str | Path | CompressorForCausalLM,
    texts: str | Iterable[str],
    *,
    window: int | None = None,
    rate: float | None = None,
) -> Codes:
    """The concept ids of texts, documents of any length.

    Args:
        model: a run of `system: compressor`, its saved model, or such a model in memory.
        window: tokens that are compressed together; default: the run's `sequence_length`.
        rate: concepts per token; default: as trained.

    Raises CheckpointError, DataError or RecipeError for a model that is no compressor, a text or
    window that does not fit, a rate that the model cannot hold."""
    with ready(model, rate) as codec:
        return codec.compress([texts] if isinstance(texts, str) else list(texts), window)


def decompress(
    model: str | Path | CompressorForCausalLM,
    codes: Codes | str | Path,
    *,
    beams: int | None = None,
) -> list[str]:
    """The texts of `codes`, or of a file of them. Arguments as in `compress`; `beams`: hypotheses
    of the beam search that writes a text; default: as the model has it. Raises CodesError for a
    file that is not whole, or codes of another model."""
    codes = codes if isinstance(codes, Codes) else Codes.load(codes)
    with ready(model) as codec:
        return codec.texts(codec.decompress(codes, beams))


# ---- files ----


def compress_file(model: str, source: str, out: Path, rate: float | None = None) -> dict[str, Any]:
    """Compresses a text file into a new file of codes; returns its figures."""
    check_new(out)
    with ready(model, rate) as codec:
        texts = read_texts(source)
        start = time.perf_counter()
        codes = codec.compress(texts)
        seconds = time.perf_counter() - start
    codes.save(out)
    paths = {"model": str(model), "data": str(source), "out": str(out)}
    sizes = figures(codes)
    return paths | {"bytes": out.stat().st_size} | sizes | speed(sizes["tokens"], seconds)


def decompress_file(
    model: str, source: Path, out: Path | None = None, beams: int | None = None
) -> tuple[dict[str, Any], str]:
    """Decompresses a file of codes into a new .jsonl, or any other file of text alone, a line end
    between documents; returns its figures, and what the file holds. Without `out` nothing is
    written."""
    codes = Codes.load(source)
    if out is not None:
        check_new(out)
    with ready(model) as codec:
        start = time.perf_counter()
        documents = codec.decompress(codes, beams)
        seconds = time.perf_counter() - start
        texts = codec.texts(documents)
    content = "\n".join(texts)
    if out is not None and out.suffix == ".jsonl":
        lines = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
        content = "".join(line + "\n" for line in lines)
    if out is not None:
        storage.write(out, content.encode())
    paths = {"model": str(model), "codes": str(source), "out": None if out is None else str(out)}
    tokens = sum(map(len, documents))
    sizes = {"tokens_written": tokens, "characters_written": sum(map(len, texts))}
    return paths | figures(codes) | sizes | speed(tokens, seconds), content


def speed(tokens: int, seconds: float) -> dict[str, float]:
    """Of the work alone, without loading the model."""
    return {"seconds": seconds, "tokens_per_s": tokens / seconds}


def check_new(out: Path) -> None:
    """Raises SememeError where something is there, or nothing can be written, before the work."""
    if usable(out).exists():
        raise CodesError(
            f"{out} is there: need a new file, nothing is written over. try: another --out"
        )
    storage.check(out)


def figures(codes: Codes) -> dict[str, Any]:
    """Sizes of what was compressed. A concept counts as the `codes_per_concept` ids that it is."""
    windows = codes.windows
    tokens = sum(window.tokens for window in windows)
    concepts = sum(len(window.concepts) for window in windows)
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
