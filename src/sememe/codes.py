"""Texts ⇄ concept ids with a compressor, in memory and as files (docs/formats.md, codes.json)."""

import hashlib
import json
import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain, groupby
from operator import attrgetter
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, FailFast, FiniteFloat, ValidationError, model_validator

from sememe import storage
from sememe.concepts.dial import evaluating
from sememe.errors import CheckpointError, CodesError
from sememe.models import CompressorForCausalLM
from sememe.models.compressor.model import ROWS_AT_ONCE, batches
from sememe.models.loading import (
    check_length,
    check_rate,
    load_model,
    load_tokenizer,
    longest_text,
    tokenizer_folder,
)
from sememe.options import read_recipe
from sememe.paths import usable
from sememe.reading import regular
from sememe.texts import check_text, encoder, read_texts, token_windows
from sememe.workers import Tensors, weights_sha256, work_in_parts

tokens_of = attrgetter("tokens")
CODES_BYTES = 1 << 30  # about 10^9 characters of text
WINDOW = 512  # tokens, where no recipe says how long the texts were that the model was trained on


class Part(BaseModel):
    """A JSON object of a file of codes: no other keys, no conversions."""

    model_config = ConfigDict(extra="forbid", strict=True)


class Window(Part):
    """Tokens that were compressed together."""

    span: tuple[int, int]
    """The characters [from, to) of the document that it stands for."""
    tokens: int
    concepts: Annotated[list[int], FailFast()]
    """Each below K^G; code g of an id is id // K^g % K."""


class Document(Part):
    """A text as windows that follow on each other."""

    characters: int
    windows: Annotated[list[Window], FailFast()]


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
    rate: FiniteFloat
    window: int
    overlap: Literal[0] = 0
    documents: Annotated[list[Document], FailFast()]
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

    def written_by(self, writer: Writer) -> bool:
        """Whether that model, wherever it lies, is the one that compressed."""
        hashes = attrgetter("weights_sha256", "base_sha256")
        return hashes(self.model) == hashes(writer)

    def check_windows(self, config) -> None:
        """Raises CodesError for ids that no code of the model stands for, or for windows longer
        than it has positions for. A concept stands for one token at least."""
        size = config.num_concepts, config.codes_per_concept
        count, longest = size[0] ** size[1], longest_text(config)
        fits = (self.num_concepts, self.codes_per_concept) == size
        if not (fits and all(0 <= i < count for x in self.windows for i in x.concepts)):
            raise CodesError(
                f"the codes have ids that no code stands for: need {size[1]} of {size[0]} codes in "
                "each. try: the codes as they were written"
            )
        if not all(len(x.concepts) <= x.tokens <= longest for x in self.windows):
            raise CodesError(
                f"a window has more concepts than tokens, or more than {longest} tokens: need "
                "those of one text that the model has read. try: the codes as they were written"
            )

    def save(self, path: Path) -> None:
        """Writes the file, whole or not at all; a window a line, to be read and compared."""
        text = self.model_dump_json().replace('{"span"', '\n{"span"') + "\n"
        storage.write(path, text.encode())

    @classmethod
    def load(cls, path: str | Path) -> "Codes":
        """Reads and checks a file. Raises CodesError where it is not one that `save` wrote."""
        try:
            return cls.model_validate_json(regular(usable(path), CODES_BYTES).read_bytes())
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
    length = read_recipe(recipe).get("sequence_length") if recipe.is_file() else None
    return min(length if isinstance(length, int) else WINDOW, longest_text(config))


def writer_of(model: CompressorForCausalLM) -> Writer:
    """The model as it is now."""
    config = model.config
    return Writer(
        name=config.name_or_path or type(model).__name__,
        weights_sha256=weights_sha256(model.own_state()),
        base=config.base,
        base_sha256=config.base_sha256,
    )


@dataclass
class Uncoded:
    """Texts cut into windows, with token ids in the place of concepts until `code` was there."""

    documents: list[Document]
    window: int

    @classmethod
    def cut(cls, tokenizer, texts: Sequence[str], window: int) -> "Uncoded":
        """Raises DataError for what is no text."""
        texts = [check_text(x, "a text") for x in texts]
        documents = []
        for text, encoding in zip(texts, encoder(tokenizer)(texts), strict=True):
            windows = [
                Window(span=span, tokens=len(ids), concepts=ids)
                for ids, span in token_windows(encoding, len(text), window)
            ]
            documents.append(Document(characters=len(text), windows=windows))
        return cls(documents, window)

    @property
    def windows(self) -> list[Window]:
        """Of all documents, in order."""
        return [window for document in self.documents for window in document.windows]

    @property
    def batches(self) -> list[list[Window]]:
        """Windows of one length, as many as are compressed together; the same ones in any number of
        processes: else a tie might be broken another way."""
        groups = [list(x) for _, x in groupby(sorted(self.windows, key=tokens_of), tokens_of)]
        starts = [(x, n) for x in groups for n in range(0, len(x), ROWS_AT_ONCE)]
        return [group[n : n + ROWS_AT_ONCE] for group, n in starts]

    def codes(self, config, writer: Writer, rate: float) -> Codes:
        """When all are coded."""
        return Codes(
            model=writer,
            num_concepts=config.num_concepts,
            codes_per_concept=config.codes_per_concept,
            rate=float(rate),
            window=self.window,
            documents=self.documents,
            sha256=None,
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
        counts_B = torch.tensor([*map(len, rows)])
        concepts_n = torch.tensor([*chain.from_iterable(rows)], dtype=torch.int64)
        return {"concepts": concepts_n, "counts": counts_B}


def code(model: CompressorForCausalLM, windows: list[Window], rate: float) -> None:
    """Puts concepts in the place of the token ids of windows of one length."""
    fill(windows, Compress(model, rate)(part_of(windows)))


def part_of(windows: list[Window]) -> Tensors:
    """What `Compress` takes."""
    return {"windows": torch.tensor([x.concepts for x in windows])}


def fill(windows: list[Window], result: Tensors) -> None:
    """Puts what `Compress` gives in the place of their token ids."""
    rows = result["concepts"].split(result["counts"].tolist())
    for window, concepts_C in zip(windows, rows, strict=True):
        window.concepts = concepts_C.tolist()


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
    texts = [texts] if isinstance(texts, str) else list(texts)
    uncoded, writer = Uncoded.cut(tokenizer_of(model), texts, window), writer_of(model)
    together = uncoded.batches
    parts = [part_of(windows) for windows in together]
    if workers > 1:
        results = work_in_parts(Compress, (name, rate), parts, workers, (writer, rate))
    else:
        results = map(Compress(model, rate), batches("compress", parts))
    for windows, result in zip(together, results, strict=True):
        fill(windows, result)
    return uncoded.codes(config, writer, rate)


def decompress(
    model: str | Path | CompressorForCausalLM,
    codes: Codes | str | Path,
    *,
    beams: int | None = None,
) -> list[str]:
    """The texts of `codes`, or of a file of them. Arguments as in `compress`; `beams`: hypotheses
    of the search that writes a text; default: as the model has it. Raises CodesError for a file
    that is not whole, or codes of another model."""
    codes = codes if isinstance(codes, Codes) else Codes.load(codes)
    model = loaded(model)
    theirs, ours = codes.model, writer_of(model)
    if not codes.written_by(ours):
        raise CodesError(
            f"these codes are of {theirs.name} (sha256 {theirs.weights_sha256[:12]}…), but "
            f"{ours.name} has {ours.weights_sha256[:12]}…: need the model that wrote them. "
            f"try: {theirs.name} as it was then"
        )
    codes.check_windows(model.config)
    concepts = [window.concepts for window in codes.windows]
    model.lengths(concepts)
    with evaluating(model):
        rows = model.decompress(concepts, beams)
    return joined_texts(tokenizer_of(model), codes, rows)


def joined_texts(tokenizer, codes: Codes, rows: Iterable[list[int]]) -> list[str]:
    """Texts of the documents from the token ids of their windows, which are decoded together: a
    character, or a space, may take tokens of two of them."""
    parts = iter(rows)
    documents = [[i for _ in document.windows for i in next(parts)] for document in codes.documents]
    return tokenizer.batch_decode(documents, clean_up_tokenization_spaces=False)


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
