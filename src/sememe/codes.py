"""Texts ⇄ concept ids with a compressor, in memory and as files of JSON (docs/formats.md,
codes.json)."""

import hashlib
import json
import math
import time
from collections.abc import Iterable
from itertools import chain, groupby
from operator import attrgetter
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from sememe import storage
from sememe.concepts.dial import evaluating
from sememe.data import check_text, encoder, read_texts, token_windows
from sememe.errors import CheckpointError, CodesError
from sememe.models import CompressorForCausalLM
from sememe.models.compressor.model import ROWS_AT_ONCE
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
from sememe.workers import Tensors, work_in_parts

tokens_of = attrgetter("tokens")
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

    def save(self, path: Path) -> None:
        """Writes the file, whole or not at all; a window a line, to be read and compared."""
        text = self.model_dump_json().replace('{"span"', '\n{"span"') + "\n"
        storage.write(path, text.encode())

    @classmethod
    def load(cls, path: str | Path) -> "Codes":
        """Reads and checks a file. Raises CodesError where it is not one that `save` wrote."""
        try:
            return cls.model_validate_json(usable(path).read_bytes())
        except ValidationError as error:
            fault = error.errors()[0]
            raise CodesError(
                f"{path} cannot be read ({'.'.join(map(str, fault['loc']))} {fault['msg']}): need "
                "a file as sememe compress wrote it. try: copy it again, or sememe compress again"
            ) from error


# ---- texts → codes → texts ----


def loaded(model: str | Path | CompressorForCausalLM) -> CompressorForCausalLM:
    """The compressor of a folder, or one in memory. Raises CheckpointError for anything else."""
    if isinstance(model, str | Path):
        model, _ = load_model(model)
    if not hasattr(model, "decompress"):
        raise CheckpointError(
            f"{type(model).__name__} is no compressor: need a run of system: compressor, or its "
            "saved model. try: sememe train RECIPE system=compressor --out runs/compressor"
        )
    return model


def tokenizer_of(model: CompressorForCausalLM):
    return load_tokenizer(tokenizer_folder(Path(model.config.name_or_path), model.config))


def trained_window(config) -> int:
    """The `sequence_length` of the run that the model is in, else 512 or what fits."""
    recipe = Path(config.name_or_path).parent / "recipe.yaml"
    values = yaml.safe_load(recipe.read_text(encoding="utf-8")) if recipe.is_file() else {}
    return min(values.get("sequence_length", WINDOW), longest_text(config))


def writer_of(model: CompressorForCausalLM) -> Writer:
    """The model as it is now."""
    digest = hashlib.sha256()
    for key, value in sorted(model.own_state().items()):
        digest.update(key.encode() + value.float().cpu().numpy().tobytes())
    config = model.config
    return Writer(
        name=config.name_or_path or type(model).__name__,
        weights_sha256=digest.hexdigest(),
        base=config.base,
        base_sha256=config.base_sha256,
    )


class Compress:
    """Windows of one length → the concept ids of each, at a rate; what every process does."""

    def __init__(self, model: str | Path | CompressorForCausalLM, rate: float):
        self.model = loaded(model)
        self.rate = rate

    def __call__(self, part: Tensors) -> Tensors:
        """(B, T) `windows` → (n,) `concepts` of all rows, and (B,) `counts`, how many each has."""
        with self.model.dial.at(rate=self.rate), evaluating(self.model):
            rows = self.model.compress(part["windows"])
        counts_B = torch.tensor([len(row) for row in rows])
        concepts_n = torch.tensor([*chain.from_iterable(rows)], dtype=torch.int64)
        return {"concepts": concepts_n, "counts": counts_B}


def compress(
    model: str | Path | CompressorForCausalLM,
    texts: str | Iterable[str],
    *,
    window: int | None = None,
    rate: float | None = None,
    workers: int = 1,
) -> Codes:
    """The concept ids of texts, documents of any length. Only windows of one length go together:
    nothing is padded, and what a window becomes does not depend on its neighbours.

    Args:
        model: a run of `system: compressor`, its saved model, or such a model in memory.
        window: tokens that are compressed together; default: the run's `sequence_length`.
        rate: concepts per token; default: as trained.
        workers: processes, each with the model.

    Raises CheckpointError, DataError or RecipeError for a model that is no compressor, a text or
    window that does not fit, a rate that the model cannot hold."""
    name, model = model, loaded(model)
    config = model.config
    rate = model.dial.rate if rate is None else rate
    window = trained_window(config) if window is None else window
    check_rate(config, rate, config.name_or_path)
    check_length(longest_text(config), window, "window=")
    texts = [check_text(x, "a text") for x in ([texts] if isinstance(texts, str) else texts)]
    documents = []
    for text, encoding in zip(texts, encoder(tokenizer_of(model))(texts), strict=True):
        windows = [
            # Its token ids stand in for its concepts, until there are some.
            Window(span=span, tokens=len(ids), concepts=ids)
            for ids, span in token_windows(encoding, len(text), window)
        ]
        documents.append(Document(characters=len(text), windows=windows))
    writer = writer_of(model)
    together, parts = _batches([x for document in documents for x in document.windows])
    if workers > 1:
        results = work_in_parts(Compress, (name, rate), parts, workers, (writer, rate))
    else:
        results = map(Compress(model, rate), bar(iterable=parts, desc="compress", unit="batch"))
    for rows, result in zip(together, results, strict=True):
        for x, concepts_C in zip(rows, split_rows(result), strict=True):
            x.concepts = concepts_C.tolist()
    return Codes(
        model=writer,
        num_concepts=config.num_concepts,
        codes_per_concept=config.codes_per_concept,
        rate=float(rate),
        window=window,
        documents=documents,
        sha256=None,
    )


def split_rows(result: Tensors) -> tuple[torch.Tensor, ...]:
    """The concepts of each row that `Compress` was given."""
    return result["concepts"].split(result["counts"].tolist())


def _batches(windows: list[Window]) -> tuple[list[list[Window]], list[Tensors]]:
    """Windows of one length that go together, and their token ids. The same ones in any number of
    processes: else a tie might be broken another way."""
    groups = (list(group) for _, group in groupby(sorted(windows, key=tokens_of), tokens_of))
    together = [
        group[start : start + ROWS_AT_ONCE]
        for group in groups
        for start in range(0, len(group), ROWS_AT_ONCE)
    ]
    return together, [{"windows": torch.tensor([x.concepts for x in rows])} for rows in together]


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
    model = loaded(model)
    theirs, ours = codes.model, writer_of(model)
    if (theirs.weights_sha256, theirs.base_sha256) != (ours.weights_sha256, ours.base_sha256):
        raise CodesError(
            f"these codes are of {theirs.name} (sha256 {theirs.weights_sha256[:12]}…), but "
            f"{ours.name} has {ours.weights_sha256[:12]}…: need the model that wrote them. "
            f"try: {theirs.name} as it was then"
        )
    with evaluating(model):
        parts = iter(model.decompress([window.concepts for window in codes.windows], beams))
    # The windows of a document are decoded together: a character, or a space, may take tokens of
    # two of them.
    documents = [[i for _ in document.windows for i in next(parts)] for document in codes.documents]
    return tokenizer_of(model).batch_decode(documents, clean_up_tokenization_spaces=False)


# ---- files ----


def compress_file(
    model: str, source: str, out: Path, rate: float | None = None, workers: int = 1
) -> dict[str, Any]:
    """Compresses a text file into a new file of codes; returns its figures."""
    check_new(out)
    # Several processes load it by its name.
    compressor, texts = loaded(model) if workers == 1 else model, read_texts(source)
    start = time.perf_counter()
    codes = compress(compressor, texts, rate=rate, workers=workers)
    seconds = time.perf_counter() - start
    codes.save(out)
    paths = {"model": model, "data": source, "out": str(out), "bytes": out.stat().st_size}
    return paths | figures(codes, seconds)


def decompress_file(
    model: str, source: Path, out: Path | None = None, beams: int | None = None
) -> tuple[dict[str, Any], str]:
    """Decompresses a file of codes into a new .jsonl, or any other file of text alone, a line end
    between documents; returns its figures, and what the file holds. Without `out` nothing is
    written."""
    codes = Codes.load(source)
    if out is not None:
        check_new(out)
    compressor = loaded(model)
    start = time.perf_counter()
    texts = decompress(compressor, codes, beams=beams)
    seconds = time.perf_counter() - start
    content = "\n".join(texts)
    if out is not None:
        if out.suffix == ".jsonl":
            content = "".join(json.dumps({"text": x}, ensure_ascii=False) + "\n" for x in texts)
        storage.write(out, content.encode())
    paths = {"model": model, "codes": str(source), "out": out and str(out)}
    return paths | figures(codes, seconds), content


def check_new(out: Path) -> None:
    """Raises SememeError where something is there, or nothing can be written, before the work."""
    if usable(out).exists():
        raise CodesError(
            f"{out} is there: need a new file, nothing is written over. try: another --out"
        )
    storage.check(out)


def figures(codes: Codes, seconds: float) -> dict[str, Any]:
    """Sizes of what was compressed, a concept counting as the `codes_per_concept` ids that it is,
    and how fast the work was, without loading the model."""
    tokens = sum(window.tokens for window in codes.windows)
    concepts = sum(len(window.concepts) for window in codes.windows)
    ids = concepts * codes.codes_per_concept
    return {
        "documents": len(codes.documents),
        "windows": len(codes.windows),
        "window": codes.window,
        "characters": sum(document.characters for document in codes.documents),
        "tokens": tokens,
        "concepts": concepts,
        "ids": ids,
        "compression_ratio": tokens / ids if ids else None,
        "bits_per_token": ids * math.log2(codes.num_concepts) / tokens if tokens else None,
        "seconds": seconds,
        "tokens_per_s": tokens / seconds,
    }
