"""What a compressor makes of texts, and the file that holds it: codes.json (docs/formats.md)."""

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sememe import storage
from sememe.errors import CodesError
from sememe.paths import usable

FORMAT, VERSION = "sememe-codes", 1
START = f'{{\n"format": "{FORMAT}"'


class Part(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Window(Part):
    span: Annotated[list[int], Field(min_length=2, max_length=2)]
    """The characters [from, to) of the document that it stands for."""
    tokens: Annotated[int, Field(ge=1)]
    concepts: list[int]
    """Each below K^G; digit g of an id is id // K^g % K."""


class Document(Part):
    characters: int
    windows: list[Window]


class Writer(Part):
    """The model that compressed, and the only one that can decompress."""

    name: str
    weights_sha256: str
    base: str | None
    base_sha256: str | None


class Codes(Part):
    """Compressed documents. `save` and `load` are to and from codes.json."""

    format: Literal["sememe-codes"] = FORMAT
    version: Literal[1] = VERSION
    model: Writer
    num_concepts: int
    codes_per_concept: int
    rate: float
    window: int
    overlap: Literal[0] = 0
    documents: list[Document]
    sha256: str

    @property
    def windows(self) -> list[Window]:
        return [window for document in self.documents for window in document.windows]

    def seal(self) -> "Codes":
        """With the checksum of what it holds now."""
        self.sha256 = checksum(self.model_dump())
        return self

    def check(self, where: str = "these codes") -> "Codes":
        """Raises CodesError where they are not what a compressor wrote."""
        fault = self._fault()
        if fault is None and self.sha256 != checksum(self.model_dump()):
            fault = "was changed since it was written, its checksum differs"
        if fault is not None:
            raise CodesError(
                f"{where} {fault}: need it as it was written. try: copy it again, or sememe "
                "compress again"
            )
        return self

    def _fault(self) -> str | None:
        if not (
            2 <= self.num_concepts <= 2**48
            and 1 <= self.codes_per_concept <= 48
            and 0 < self.rate <= 1
        ):
            return "has a num_concepts, codes_per_concept or rate that no model has"
        most = self.num_concepts**self.codes_per_concept
        for number, document in enumerate(self.documents):
            at = 0
            for window in document.windows:
                where = f"has in document {number}"
                wrong = [i for i in window.concepts if not 0 <= i < most]
                if wrong:
                    return f"{where} the concept id {wrong[0]}, but ids are from 0 to {most - 1}"
                if window.tokens > self.window:
                    return f"{where} a window of {window.tokens} tokens, but windows have at most {self.window}"
                if window.span[0] != at or window.span[1] < at:
                    return f"{where} a window of the characters {window.span} behind the one that ends at {at}"
                at = window.span[1]
            if document.windows and at != document.characters:
                return f"has windows up to character {at} of document {number}, which has {document.characters}"
        return None

    def save(self, path: str | Path) -> None:
        """Writes the file, whole or not at all."""
        write_whole(Path(path), self.as_json())

    def as_json(self) -> str:
        """One line a window, so that it can be read, searched and compared."""
        value = self.model_dump()
        lines = {key: json.dumps(one, ensure_ascii=False) for key, one in value.items()}
        lines["documents"] = (
            "[" + ",\n".join(_lines(document) for document in value["documents"]) + "]"
        )
        return "{\n" + ",\n".join(f'"{key}": {line}' for key, line in lines.items()) + "\n}\n"

    @classmethod
    def load(cls, path: str | Path) -> "Codes":
        """Reads and checks the file. Raises CodesError where it is not one that `save` wrote."""
        path = usable(path)
        try:
            value = json.loads(path.read_bytes().decode("utf-8"))
        except OSError as error:
            raise CodesError(
                f"{path} cannot be read ({error.strerror}): need a file that sememe compress "
                "wrote. "
                "try: check the path, it counts from the current folder"
            ) from error
        except (ValueError, RecursionError) as error:
            said = str(error).splitlines()[0] if isinstance(error, ValueError) else "too deep"
            raise CodesError(
                f"{path} is not JSON ({said}): need a whole file that sememe compress wrote. "
                "try: copy it again, or sememe compress again"
            ) from error
        if not isinstance(value, dict) or value.get("format") != FORMAT:
            raise CodesError(
                f'{path} has no "format": "{FORMAT}": need a file that sememe compress wrote. '
                "try: sememe compress MODEL FILE --out codes.json"
            )
        if value.get("version") != VERSION:
            raise CodesError(
                f"{path} is of version {value.get('version')!r:.20} of the format: need version "
                f"{VERSION}. "
                "try: the sememe that wrote it, or sememe compress again"
            )
        try:
            codes = cls.model_validate(value)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            raise CodesError(
                f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg'].lower()}: need it as "
                "it was written. "
                "try: copy it again, or sememe compress again"
            ) from error
        return codes.check(str(path))


def _lines(document: dict[str, Any]) -> str:
    head = f'{{"characters": {document["characters"]}, "windows": ['
    return (
        head
        + "".join(f"\n {json.dumps(window)}," for window in document["windows"]).removesuffix(",")
        + "]}"
    )


def checksum(value: dict[str, Any]) -> str:
    """sha256 of all that a file holds but its `sha256`, as JSON with sorted keys and without
    spaces."""
    content = {key: one for key, one in value.items() if key != "sha256"}
    return hashlib.sha256(
        json.dumps(content, sort_keys=True, separators=(",", ":")).encode()
    ).hexdigest()


def is_codes(path: Path) -> bool:
    """Whether a file begins as ours do: it may be written over."""
    with path.open("rb") as file:
        return file.read(len(START)) == START.encode()


def write_whole(path: Path, content: str) -> None:
    """A file, whole or not at all. Raises CodesError where it cannot be written."""
    try:
        storage.write(path, content.encode("utf-8"))
    except OSError as error:
        raise unwritable(path, error) from error


def unwritable(path: Path, error: OSError) -> CodesError:
    return CodesError(
        f"could not write {path} ({error.strerror}): need free space in a folder that can be "
        "written to. "
        "try: another --out"
    )
