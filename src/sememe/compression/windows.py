"""Documents → windows of at most N tokens, and windows → batches."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import NamedTuple

from sememe.data import check_text, encoder
from sememe.errors import DataError


class Cut(NamedTuple):
    """A window of a document: its token ids, and the characters [from, to) that it stands for."""

    ids: list[int]
    span: tuple[int, int]


def cut_texts(texts: Iterable[str], tokenizer, window: int) -> list[list[Cut]]:
    """The windows of each document, one behind the other: put together, their token ids are those
    of the whole document, and their spans are all of it. A text without tokens has none.

    Raises:
        DataError: a text that no file can hold, or a tokenizer that does not tell which characters
            its tokens are."""
    if not getattr(tokenizer, "is_fast", False):
        raise DataError(
            f"{type(tokenizer).__name__} does not tell which characters its tokens stand for: need "
            "a tokenizer of "
            "the tokenizers library. try: another base"
        )
    encode = encoder(tokenizer)
    return [_cut(text, number, encode, window) for number, text in enumerate(texts)]


def _cut(text: str, number: int, encode, window: int) -> list[Cut]:
    if not isinstance(text, str):
        raise DataError(
            f"document {number} is a {type(text).__name__}: need text. try: str(…) of it"
        )
    (found,) = encode([check_text(text, f"document {number}")])
    ids, places = found.ids, found.offsets
    cuts, at, here = [], 0, 0
    while at < len(ids):
        to = min(at + window, len(ids))
        whole = to
        while (
            at < whole < len(ids) and places[whole][0] < places[whole - 1][1]
        ):  # between the tokens of one character
            whole -= 1
        to = (
            whole if whole > at else to
        )  # a window too short for the character cuts it all the same
        end = len(text) if to == len(ids) else max(here, places[to - 1][1])
        cuts.append(Cut(ids[at:to], (here, end)))
        at, here = to, end
    return cuts


def batches(
    sizes: Sequence[int], numbers: Iterable[int], batch: int, equal: bool
) -> Iterator[list[int]]:
    """The numbers of the windows in batches, largest first. `equal`: those of one size alone, so
    that nothing is padded and what a window becomes does not hang on its neighbours."""
    falling = sorted(numbers, key=lambda n: -sizes[n])
    groups = (
        [list(group) for _, group in groupby(falling, key=lambda n: sizes[n])]
        if equal
        else [falling]
    )
    for group in groups:
        for at in range(0, len(group), batch):
            yield group[at : at + batch]
