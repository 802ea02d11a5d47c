"""Folders of token shards: texts → FOLDER/{000000.safetensors, …, manifest.json}, each shard the
tokens of one part of one text (docs/formats.md). Written by several processes, which import no
torch, and read block by block, so that the corpus is never in memory."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor, as_completed
from functools import partial
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors.numpy
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer

from sememe import storage
from sememe.errors import DataError, SememeError, reason
from sememe.paths import locate, shown, source_sha256, usable
from sememe.progress import bar
from sememe.reading import FAULTS as READ_FAULTS
from sememe.reading import read_object
from sememe.texts import (
    Part,
    documents_of,
    encoder,
    part_documents,
    parts_of,
    plain_encoder,
    tokenise,
)

TEXT_BYTES = 16 << 20  # of a shard: what a process has in memory, and what a kill costs
NAME = "{:06d}.safetensors"
FAULTS = (OSError, SafetensorError, ValueError, LookupError, TypeError)
ABOUT = "about"  # the one entry of a shard's metadata: several have no fixed order


class Job(NamedTuple):
    """A shard that is to be there."""

    path: Path
    source: str
    part: Part
    identity: str
    """Hash of all that its content depends on."""


def tokenizer_sha256(tokenizer) -> str:
    """What tells the ids of a tokenizer from those of others: its words, and which ends a text."""
    words = sorted(tokenizer.get_vocab().items())
    return _sha256([words, tokenizer.eos_token_id])


def _sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def tokenize(
    sources: list[str],
    tokenizer,
    folder: Path,
    workers: int = 1,
    documents: bool = False,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Writes the shards of all sources and, last, their manifest, which it returns. Shards that are
    there already are checked and kept, so that the same call goes on where one was killed; what is
    written depends neither on that nor on `workers`.

    Args:
        documents: whether it is to be read document by document, a row each.

    Raises:
        DataError: a source is no file of text, or all of them are empty.
        SememeError: `folder` holds other shards, cannot be written, or a process fails."""
    encoder(tokenizer)  # one that it cannot work with is refused before all work
    folder = usable(folder)
    folder.mkdir(parents=True, exist_ok=True)
    arguments = tokenizer.backend_tokenizer.to_str(), tokenizer.eos_token_id
    run, model = partial(_in_processes, workers, arguments), _sha256(arguments)
    plans = run(partial(_plan, TEXT_BYTES), sources, "text")
    jobs: list[Job] = []
    for source, (sha256, parts) in zip(sources, plans, strict=True):
        for part in parts:
            path = folder / NAME.format(len(jobs))
            jobs.append(Job(path, source, part, _sha256([sha256, part, model])))
    _refuse_others(folder, jobs)
    storage.remove_temporaries(folder)
    shards = run(_write, jobs, "shard")
    if not any(shard["tokens"] for shard in shards):
        raise DataError(
            f"{', '.join(sources)}: no character other than white space, need some text. try: "
            "another file or another field"
        )
    if before := sum(shard.pop("there") for shard in shards):
        say(f"{before} of {len(shards)} shards were there, as they were written")
    manifest = {
        "files": {
            job.path.name: shard.pop("sha256") for job, shard in zip(jobs, shards, strict=True)
        },
        "shards": shards,
        "sources": {source: sha256 for source, (sha256, _) in zip(sources, plans, strict=True)},
        "tokenizer": tokenizer_sha256(tokenizer),
        "eos": tokenizer.eos_token_id is not None,
        "documents": documents,
    }
    storage.write(folder / storage.MANIFEST, json.dumps(manifest, indent=1).encode())
    return manifest


def _refuse_others(folder: Path, jobs: list[Job]) -> None:
    """Raises SememeError where something is there that the jobs would not write."""
    identities = {job.path.name: job.identity for job in jobs}
    for path in sorted(folder.glob("[!.]*")):
        known = path.name in identities
        about = _about(path).get("part") if known else None
        finished = path.name == storage.MANIFEST and any(job.path.is_file() for job in jobs)
        # A damaged shard says nothing of itself: it is written again.
        if not finished and (not known or about not in (None, identities[path.name])):
            raise SememeError(
                f"{path} is not of these texts and this tokenizer: need a new folder, or the "
                "command that wrote it. try: another --out"
            )


def _about(path: Path) -> dict[str, str]:
    """What a shard says of itself; nothing where it is damaged."""
    try:
        with safe_open(path, "np") as file:
            return json.loads(file.metadata()[ABOUT])
    except FAULTS:
        return {}


# Read


class TokenShards:
    """The shards of a folder as one stream of tokens, without the eos that is last.

    A file is opened for each read: what stays mapped would count as memory, page by page, until all
    of the corpus does. Sizes are checked at once, and the hash of a shard before its first token is
    read, in each process (docs/formats.md)."""

    def __init__(self, folder: Path, tokenizer):
        """Raises DataError: no finished folder of shards, damage, or another tokenizer's."""
        self.folder, self.checked = folder, set()
        try:
            manifest = read_object(folder / storage.MANIFEST)
            self.hashes = list(manifest["files"].items())
            self.sizes = np.array([int(x["tokens"]) for x in manifest["shards"]])
            sizes = [int(x["size"]) for x in manifest["shards"]]
            self.eos, self.documents = bool(manifest["eos"]), bool(manifest["documents"])
            model = manifest["tokenizer"]
        except (*READ_FAULTS, LookupError, TypeError, AttributeError) as fault:
            raise DataError(
                f"{folder} is no finished folder of token shards ({reason(fault)}): need a text, "
                "or what sememe tokenize wrote. try: the same sememe tokenize again, which goes on"
            ) from fault
        if model != tokenizer_sha256(tokenizer):
            raise DataError(
                f"{folder} has the tokens of another tokenizer than the base's: need the same "
                "words. try: sememe tokenize with --base as in the recipe, into a new folder"
            )
        for (name, _), size in zip(self.hashes, sizes, strict=True):
            path = folder / name
            if not path.is_file() or path.stat().st_size != size:
                raise self._damaged(path, f"missing, or not of {size} bytes")
        self.ends = self.sizes.cumsum()

    def _damaged(self, path: Path, fault: str) -> DataError:
        return DataError(
            f"{path} is damaged ({fault}): need it as it was written. try: the same sememe "
            "tokenize again, which writes it anew"
        )

    def __len__(self) -> int:
        return int(self.ends[-1]) - self.eos

    def read(self, name: str, start: int, count: int) -> np.ndarray:
        """`tokens` or `bytes` from a place in the stream on."""
        parts = []
        while count > 0:
            number = int(self.ends.searchsorted(start, "right"))  # past shards without a token
            size = int(self.sizes[number])
            first = start - int(self.ends[number]) + size
            parts.append(self.part(number, name, first, min(first + count, size)))
            start, count = start + len(parts[-1]), count - len(parts[-1])
        return np.concatenate(parts).astype(np.int64)

    def part(self, number: int, name: str, start: int = 0, end: int | None = None) -> np.ndarray:
        """A part of an array of one shard."""
        file, wanted = self.hashes[number]
        path = self.folder / file
        if number not in self.checked:
            if fault := storage.difference(path, wanted):
                raise self._damaged(path, fault)
            self.checked.add(number)
        with safe_open(path, "np") as shard:
            return shard.get_tensor(name) if end is None else shard.get_slice(name)[start:end]


class TextShard(TokenShards):
    """At most `limit` tokens of texts, in memory, as those of a folder of one shard."""

    documents = False

    def __init__(self, texts: list[str], tokenizer, limit: int = sys.maxsize):
        stream, eos = documents_of(texts), tokenizer.eos_token_id
        self.texts: list[str] = []
        encode, add = encoder(tokenizer), self.texts.append
        self.tokens = tokenise(stream, encode, eos, limit, encoded=add)
        self.sizes = self.ends = np.array([min(len(self.tokens.tokens), limit)])
        # The last eos of all stands between no texts.
        self.whole = len(self.tokens.tokens) <= limit and next(stream, None) is None
        self.eos = self.whole and eos is not None

    @property
    def text(self) -> bytes:
        """What the tokens stand for, and perhaps a little more."""
        return "".join(self.texts).encode()

    def part(self, number: int, name: str, start: int = 0, end: int | None = None) -> np.ndarray:
        return getattr(self.tokens, name)[start:end]


# In each process


def _plan(size: int, source: str) -> tuple[str, list[Part]]:
    """The hash of a source, and its parts."""
    path, name, field = locate(source)
    if path is None:
        raise DataError(
            f"{shown(name)} does not exist: need a .txt, .jsonl or .parquet. try: a path from the "
            "current folder; of a dataset on the Hub, its files"
        )
    return source_sha256(source), parts_of(path, field, size)


def _write(job: Job) -> dict[str, Any]:
    """A shard's entry in the manifest, and whether it was there."""
    path, source, part, identity = job
    if entry := _entry(path, identity):
        return entry | {"there": True}
    encode, eos = _tokenizer
    tokens = tokenise(part_documents(source, part), encode, eos)
    arrays = {
        "tokens": _narrow(tokens.tokens, 256),
        "bytes": _narrow(tokens.bytes),
        "starts": tokens.starts,
    }
    about = {"part": identity, "content": _content(arrays)}
    with storage.replacing(path) as temporary:
        safetensors.numpy.save_file(arrays, temporary, {ABOUT: json.dumps(about)})
    return _entry(path, identity) | {"there": False}


def _narrow(array: np.ndarray, limit: int = 0) -> np.ndarray:
    """In the smallest unsigned type that holds it, and `limit`."""
    return array.astype(np.min_scalar_type(int(array.max(initial=limit))))


def _content(arrays: dict[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for _, array in sorted(arrays.items()):
        digest.update(array.tobytes())
    return digest.hexdigest()


def _entry(path: Path, identity: str) -> dict[str, Any] | None:
    """What the manifest says of a shard; None where it is not there as it was written."""
    try:
        arrays = safetensors.numpy.load_file(path)
        if _about(path) != {"part": identity, "content": _content(arrays)}:
            return None
        return {
            "tokens": len(arrays["tokens"]),
            "bytes": int(arrays["bytes"].sum(dtype=np.int64)),
            "size": path.stat().st_size,
            "sha256": storage.sha256(path),
        }
    except FAULTS:
        return None


# Several processes


def _in_processes(
    workers: int, tokenizer: tuple, function: Callable, jobs: Iterable, unit: str
) -> list:
    """What the function returns for each job, in their order, worked out in so many processes, or
    in this one."""
    if workers < 2:
        _start(*tokenizer)
        return [function(job) for job in bar(iterable=jobs, desc="tokenize", unit=unit)]
    # Not forked: threads of the libraries that are loaded by now would be lost.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, _start_process, tokenizer) as pool:
        waiting = [pool.submit(function, job) for job in jobs]
        try:
            for job in bar(
                iterable=as_completed(waiting), total=len(waiting), desc="tokenize", unit=unit
            ):
                job.result()  # the first fault ends it
        except BrokenExecutor as error:
            raise SememeError(
                f"a process has failed ({reason(error)}): need memory for each. try: the same "
                "command, which goes on, with fewer --workers"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)
        return [job.result() for job in waiting]


_tokenizer: tuple = ()
"""`encode` and eos, of a process."""


def _start(serialised: str, eos: int | None) -> None:
    global _tokenizer
    _tokenizer = plain_encoder(Tokenizer.from_str(serialised)), eos


def _start_process(*tokenizer) -> None:
    _start(*tokenizer)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends it, after the shard in progress
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A process whose parent was killed would wait for work for ever."""
    wait([multiprocessing.parent_process().sentinel])
    os._exit(1)
