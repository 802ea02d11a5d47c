"""A corpus → FOLDER/train.jsonl and FOLDER/heldout.jsonl, no more of it than a run needs:

python examples/corpus.py SOURCE FOLDER --tokens 50000000

SOURCE: a .jsonl or .parquet, or ID[:CONFIGURATION] of a data set on the Hub, which is streamed; and
#FIELD behind it where the text is not in the field `text`. The first documents are held out."""

import argparse
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from sememe.errors import DataError, SememeError, reason
from sememe.paths import locate
from sememe.progress import bar
from sememe.storage import replacing
from sememe.texts import check_text, read_rows

HELDOUT_BYTES = 2_000_000
BYTES_PER_TOKEN = 5
"""English has 4.5 or less with vocabularies of 50,000 and more."""


def documents(source: str) -> Iterator[str]:
    """Its texts, in order. Raises DataError for what cannot be read."""
    path, name, field = locate(source)
    if path is not None or name.endswith((".txt", ".jsonl", ".parquet")):
        yield from (text for _, (text,) in read_rows(name, (field,)))
        return
    import datasets

    repository, _, configuration = name.partition(":")
    try:
        rows = datasets.load_dataset(
            repository, configuration or None, split="train", streaming=True
        )
        for row in rows:
            yield check_text(row[field], name)
    except SememeError:
        raise
    except Exception as fault:
        raise DataError(
            f"{source} could not be read from the Hub ({reason(fault)}): need a network, and an id "
            "whose rows have that field. try: DATA=folder with train.jsonl and heldout.jsonl"
        ) from fault


def write(path: Path, texts: Iterable[str], size: int) -> None:
    """Rows of `size` bytes of text, whole or not at all."""
    done = 0
    with (
        replacing(path) as temporary,
        Path(temporary).open("w", encoding="utf-8") as file,
        bar(total=size, desc=path.name, unit="B", unit_scale=True) as shown,
    ):
        for text in texts:
            file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
            count = len(text.encode())
            shown.update(count)
            done += count
            if done >= size:
                break


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tokens", type=int, required=True, help="that a run trains on")
    given = parser.parse_args()
    train, heldout = (given.folder / f"{name}.jsonl" for name in ("train", "heldout"))
    if train.exists() and heldout.exists():
        return
    given.folder.mkdir(parents=True, exist_ok=True)
    try:
        texts = documents(given.source)
        write(heldout, texts, HELDOUT_BYTES)
        write(train, texts, given.tokens * BYTES_PER_TOKEN)
    except (SememeError, OSError) as error:
        sys.exit(f"error: {error}")
    if not train.stat().st_size:
        train.unlink()
        sys.exit(
            f"error: {given.source} has no more than the {HELDOUT_BYTES:,} bytes that are held "
            "out: need text to train on. try: DATA=folder with train.jsonl and heldout.jsonl"
        )


if __name__ == "__main__":
    main()
