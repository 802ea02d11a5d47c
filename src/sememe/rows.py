"""Texts, folders of token shards and mixtures of them → the rows of training, in their order: each
row by its number alone, so that no process holds more than it reads."""

import hashlib
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

import numpy as np

from sememe.chats import chat_rows
from sememe.errors import DataError
from sememe.paths import locate
from sememe.shards import TextShard, TokenShards
from sememe.texts import has_conversations, read_texts

IGNORED = -100  # no token, or none that is learned
ROUNDS = 6  # of the Feistel network; 4 are enough (Luby and Rackoff 1988), of large halves


class Row(NamedTuple):
    """Consecutive tokens."""

    ids: np.ndarray
    bytes: np.ndarray
    """UTF-8 bytes of text that each token stands for."""
    counted: np.ndarray | None = None
    """Which tokens are learned and measured; None: all."""

    def padded(self, length: int) -> "Row":
        """With -100 behind its ids, up to so many."""
        counted = np.ones(len(self.ids), bool) if self.counted is None else self.counted
        width = (0, length - len(self.ids))
        ids = np.pad(self.ids, width, constant_values=IGNORED)
        return Row(ids, np.pad(self.bytes, width), np.pad(counted, width))


class BlockRows:
    """The stream cut into blocks of equal length, whatever documents they are of."""

    ragged = False

    def __init__(self, shards: TokenShards, length: int):
        self.shards = shards
        self.length = length
        self.in_memory = isinstance(shards, TextShard)

    def __len__(self) -> int:
        return len(self.shards) // self.length

    def __getitem__(self, n: int) -> Row:
        start = n * self.length
        return Row(*(self.shards.read(x, start, self.length) for x in ("tokens", "bytes")))


class DocumentRows:
    """Documents one by one, long ones in several rows; what has a single token is left out. A model
    that reads a row reads nothing of another document."""

    ragged = True

    def __init__(self, shards: TokenShards, length: int):
        self.shards = shards
        self.length = length
        counts = [self._counts(number).sum() for number in range(len(shards.sizes))]
        self.ends = np.cumsum(counts, dtype=np.int64)

    def _starts(self, number: int) -> np.ndarray:
        """Where the documents of a shard begin, and the end of the last."""
        starts = self.shards.part(number, "starts").astype(np.int64)
        return np.append(starts, self.shards.sizes[number])

    def _counts(self, number: int) -> np.ndarray:
        """How many rows each document of a shard gives: none for a rest of one token."""
        return (np.diff(self._starts(number)) + self.length - 2) // self.length

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, n: int) -> Row:
        number = int(self.ends.searchsorted(n, "right"))
        counts, starts = self._counts(number), self._starts(number)
        ends = counts.cumsum() + (self.ends[number - 1] if number else 0)
        document = int(ends.searchsorted(n, "right"))
        before = int(ends[document] - counts[document])
        start = int(starts[document]) + (n - before) * self.length
        end = min(start + self.length, int(starts[document + 1]))
        parts = (self.shards.part(number, name, start, end) for name in ("tokens", "bytes"))
        return Row(*(part.astype(np.int64) for part in parts))


class ChatRows:
    """Conversations, a row each."""

    ragged = True

    def __init__(self, source: str, tokenizer, length: int, limit: int):
        self.rows = [Row(*row) for row in chat_rows(source, tokenizer, length, limit)]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, n: int) -> Row:
        return self.rows[n]


Rows = BlockRows | DocumentRows | ChatRows


def rows_of(source: str, tokenizer, length: int, limit: int) -> Rows:
    """Rows of at most `length` tokens of a text, a folder of token shards or conversations; at most
    `limit` tokens are had of what is no folder. Raises DataError where there is no row."""
    path = locate(source)[0]
    if path is not None and path.is_dir():
        shards = TokenShards(path, tokenizer)
    elif has_conversations(source):
        return ChatRows(source, tokenizer, length, limit)
    else:
        shards = TextShard(read_texts(source), tokenizer, limit)
    rows = (DocumentRows if shards.documents else BlockRows)(shards, length)
    if not len(rows):
        raise DataError(
            f"{source} has {len(shards)} tokens: need at least {length}, one block. "
            "try: more text or shorter blocks"
        )
    return rows


class Ordered:
    """Rows of one source in a given order."""

    def __init__(self, rows: Rows, order_n: Sequence[int]):
        self.rows = rows
        self.ragged = rows.ragged
        self.order_n = order_n

    def __getitem__(self, i: int) -> Row:
        return self.rows[int(self.order_n[i])]


class Mixture:
    """Rows of several sources by weight, each in a random order that is new in every epoch of it.

    Row i is worked out from i alone. Sources come in turns as if each had one row in 1 / weight
    units of time: of the first n rows each has its share but for one or two (stride scheduling,
    Waldspurger and Weihl 1995)."""

    def __init__(self, sources: Sequence[Rows], weights: Sequence[float], seed: int):
        self.sources = sources
        self.ragged = any(rows.ragged for rows in sources)
        shares = [Fraction(weight) for weight in weights]
        self.shares = [share / sum(shares) for share in shares]
        self.seed = seed
        # When each has its first row, as a share of the time between two of them.
        draws = (_hash(seed, number, 1 << 30) for number in range(len(sources)))
        self.offsets = [Fraction(draw, 1 << 30) for draw in draws]

    def __getitem__(self, i: int) -> Row:
        number, k = self.choice(i)
        rows = self.sources[number]
        return rows[shuffled(k, len(rows), self.seed + number)]

    def choice(self, i: int) -> tuple[int, int]:
        """Of which source row i is, and how many of that were before it."""
        pairs = list(zip(self.shares, self.offsets, strict=True))
        # Soon before row i, whatever the offsets: the rest is counted row by row.
        time = max(0, i - len(pairs))
        counts = [max(0, -((offset - time * share) // 1)) for share, offset in pairs]
        while True:
            next_times = [
                (count + offset) / share
                for count, (share, offset) in zip(counts, pairs, strict=True)
            ]
            number = next_times.index(min(next_times))
            if sum(counts) == i:
                return number, counts[number]
            counts[number] += 1


def shuffled(i: int, count: int, seed: int) -> int:
    """Entry i of endless shuffles of `count` rows, one after another. A permutation is a Feistel
    network over the next power of 4, walked until it is below `count`: nothing is kept, be there
    10¹⁰ rows."""
    epoch, value = divmod(i, count)
    half = max(1, -(-(count - 1).bit_length() // 2))
    while True:
        left, right = divmod(value, 1 << half)
        for number in range(ROUNDS):
            left, right = right, left ^ _hash(seed, epoch, number, right, 1 << half)
        value = left << half | right
        if value < count:
            return value


def _hash(*numbers: int) -> int:
    """Below the last of the numbers, and random for the others."""
    *key, limit = numbers
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") % limit
