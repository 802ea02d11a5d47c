"""Plans that hard EM has found: (N, P) ids on disk, memory-mapped, whole after a kill at any point.

A folder of plain little-endian tables with a row for each example (`TABLES`), and `header.json`,
which says whose they are. A batch is written to `journal.bin` under a hash and synced, then
applied, then the journal is emptied. So whatever interrupts it, opening again finds either no whole
journal, and tables that were not touched, or a whole one, which is applied (again). One process
writes; others may read. Suffixes: N examples · n rows of a batch · P slots."""

import hashlib
import json
import os
import shutil
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sememe.concepts.plan import NULL, PlanShape
from sememe.errors import CheckpointError

HEADER, JOURNAL, FORMAT = "header.json", "journal.bin", 1
NEVER = -2  # in the slots of a row without a plan: -1 throughout is the empty plan
SCORES = (
    "score",
    "target",
    "plan",
    "margin",
)  # S(z*), log p(y | z*), log p(z* | u), S(z*) - S(best other plan)
MOVES = (
    "edits",
    "gain",
    "entropy",
    "candidates",
    "proposer",
)  # of the row's last search, see `em/step.py`
# name: (dtype, columns, what an example holds before anything is written). steps: -1 never written,
# 0 given, else which E-step.
TABLES = {
    "plans": ("<i4", None, NEVER),
    "scores": ("<f4", len(SCORES), np.nan),
    "moves": ("<f4", len(MOVES), np.nan),
    "steps": ("<i4", 1, -1),
}
MAGIC = b"sememe-j"


class Assignments:
    """The plan of each example, its scores, and what the last search did to it.

    version: E-steps that were completed.
    """

    def __init__(self, folder: Path, shape: PlanShape, examples: int, digest: str, version: int):
        self.folder, self.shape, self.examples, self.digest, self.version = (
            folder,
            shape,
            examples,
            digest,
            version,
        )
        self._tables = {
            name: np.memmap(folder / f"{name}.bin", dtype, "r+", shape=(examples, columns))
            for name, dtype, columns, _ in _layout(shape)
        }

    @classmethod
    def open(cls, folder: Path, shape: PlanShape, examples: int, digest: str) -> "Assignments":
        """Opens or creates the store of these examples. A batch that was being written is finished,
        or dropped where its journal is not whole.

        Args:
            digest: names the data (`PairTensors.digest`) and whatever else the plans depend on.

        Raises:
            CheckpointError: the folder holds another's assignments or damaged ones, or cannot be
                written to."""
        folder = Path(folder)
        if examples < 1:
            raise CheckpointError(
                f"assignments of {examples} examples: need at least 1. try: data with pairs"
            )
        want = {
            "format": FORMAT,
            "sizes": list(shape.sizes),
            "lengths": list(shape.lengths),
            "examples": examples,
            "digest": digest,
        }
        try:
            if not (folder / HEADER).exists():  # written last: without it nothing was ever assigned
                _create(folder, shape, examples)
                _write_header(folder, want | {"version": 0})
            found = _read_header(folder)
            _compare(folder, found, want)
            for name, dtype, columns, _ in _layout(shape):
                need, path = examples * columns * np.dtype(dtype).itemsize, folder / f"{name}.bin"
                got = path.stat().st_size if path.exists() else None
                if got != need:
                    raise CheckpointError(
                        f"{path} has {'no file' if got is None else f'{got} bytes'}: need {need}. "
                        f"try: remove {folder}, and the assignments start anew"
                    )
            store = cls(folder, shape, examples, digest, found["version"])
            store._recover()
        except OSError as fault:
            raise CheckpointError(
                f"the assignments in {folder} cannot be written ({fault}): need free space and "
                "permission. "
                "try: another run folder"
            ) from fault
        return store

    # ---- reading ----

    def read(self, index_n: Tensor) -> Tensor:
        """(n, P) plans, all NULL where none was assigned. Raises CheckpointError where the file is
        damaged."""
        plan_nP = self._rows("plans", index_n).long()
        return self.shape.check(plan_nP.masked_fill((plan_nP == NEVER).all(1, keepdim=True), NULL))

    def assigned(self, index_n: Tensor) -> Tensor:
        """(n,) bool: has a plan."""
        return self._rows("steps", index_n)[:, 0] >= 0

    def searched(self, index_n: Tensor) -> Tensor:
        """(n,) bool: the E-step that is not finished yet has been here."""
        return self._rows("steps", index_n)[:, 0] == self.version + 1

    def scores(self, index_n: Tensor) -> Tensor:
        """(n, 4) `SCORES` in nats as of when they were written; nan where unknown."""
        return self._rows("scores", index_n)

    def moves(self, index_n: Tensor) -> Tensor:
        """(n, 5) `MOVES` of the rows' last search; nan where there was none."""
        return self._rows("moves", index_n)

    def _rows(self, name: str, index_n: Tensor) -> Tensor:
        return torch.from_numpy(self._tables[name][self._index(index_n)].copy())

    def _index(self, index_n: Tensor) -> np.ndarray:
        index = torch.as_tensor(index_n, dtype=torch.long).cpu()
        if len(index) and not 0 <= int(index.min()) <= int(index.max()) < self.examples:
            raise CheckpointError(
                f"example {int(index.min())} to {int(index.max())} of the assignments in "
                f"{self.folder}: need "
                f"0 to {self.examples - 1}. try: indexes of the pairs that they were opened for"
            )
        return index.numpy()

    # ---- writing ----

    def write(
        self,
        index_n: Tensor,
        plans: Tensor,
        scores: Tensor | None = None,
        moves: Tensor | None = None,
    ) -> None:
        """Gives these examples their plans, all of them or, if killed, perhaps none.

        Args:
            index_n, plans: (n,) different examples and their (n, P) plans.
            scores: (n, 4) `SCORES`; None where nobody has scored them.
            moves: (n, 5) `MOVES`, by the E-step, which marks the examples as searched; None for
                plans from elsewhere.

        Raises:
            CheckpointError: no plans of this shape or examples of this store; the disk is full."""
        index, count = self._index(index_n), len(index_n)
        nothing = {
            name: torch.full((count, columns), torch.nan)
            for name, _, columns, _ in _layout(self.shape)
        }
        step = torch.full((count, 1), 0 if moves is None else self.version + 1)
        given = {
            "plans": self.shape.check(plans),
            "steps": step,
            "scores": nothing["scores"] if scores is None else scores,
            "moves": nothing["moves"] if moves is None else moves,
        }
        rows = {
            name: np.ascontiguousarray(given[name].detach().cpu().numpy().astype(dtype))
            for name, dtype, _, _ in _layout(self.shape)
        }
        for name, _, columns, _ in _layout(self.shape):
            if rows[name].shape != (count, columns):
                raise CheckpointError(
                    f"{name} of shape {rows[name].shape} for {count} examples: need "
                    f"{(count, columns)}. "
                    "try: one row for each"
                )
        try:
            self._recover()  # an earlier write may have been interrupted by an exception
            body = index.astype("<i8").tobytes() + b"".join(rows[name].tobytes() for name in rows)
            with (self.folder / JOURNAL).open("wb") as file:
                file.write(self._seal(count, body) + body)
                file.flush()
                os.fsync(file.fileno())
            self._apply(index, rows)
        except OSError as fault:
            raise CheckpointError(
                f"could not write {count} assignments to {self.folder} ({fault}): need free space "
                "and "
                "permission. try: the same command again, it goes on from here"
            ) from fault

    def finish_step(self) -> None:
        """The E-step is complete: `version` grows, and no example counts as searched."""
        _write_header(self.folder, _read_header(self.folder) | {"version": self.version + 1})
        self.version += 1

    def copy_to(self, folder: Path) -> None:
        """The same in another folder, in the place of what it holds; a copy that was interrupted
        counts as nothing."""
        self._recover()
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / HEADER).unlink(missing_ok=True)
        (folder / JOURNAL).unlink(missing_ok=True)
        for name in self._tables:
            shutil.copyfile(self.folder / f"{name}.bin", folder / f"{name}.bin")
        _write_header(folder, _read_header(self.folder))

    def _seal(self, count: int, body: bytes) -> bytes:
        """What stands ahead of a journal's body: 48 bytes that fit no other body and no other
        store."""
        head = MAGIC + np.array([count], "<i8").tobytes()
        whose = json.dumps(
            [self.shape.sizes, self.shape.lengths, self.examples, self.digest]
        ).encode()
        return head + hashlib.sha256(head + hashlib.sha256(whose).digest() + body).digest()

    def _apply(self, index: np.ndarray, rows: dict[str, np.ndarray]) -> None:
        for name, values in rows.items():
            self._tables[name][index] = values
        for table in self._tables.values():
            table.flush()
        os.truncate(self.folder / JOURNAL, 0)  # if this is lost, the same is applied once more

    def _recover(self) -> None:
        """Applies a whole journal; one that was cut off never reached the tables and is dropped."""
        path = self.folder / JOURNAL
        if not path.exists() or not path.stat().st_size:
            return
        data = path.read_bytes()
        count = int(np.frombuffer(data[8:16], "<i8")[0]) if len(data) >= 48 else -1
        body, widths = (
            data[48:],
            {name: (np.dtype(dtype), columns) for name, dtype, columns, _ in _layout(self.shape)},
        )
        size = count * (8 + sum(dtype.itemsize * columns for dtype, columns in widths.values()))
        if count < 0 or len(body) != size or data[:48] != self._seal(count, body):
            os.truncate(path, 0)
            return
        index, at, rows = np.frombuffer(body, "<i8", count), 8 * count, {}
        for name, (dtype, columns) in widths.items():
            rows[name] = np.frombuffer(body, dtype, count * columns, at).reshape(count, columns)
            at += rows[name].nbytes
        self._apply(index, rows)


def _layout(shape: PlanShape) -> list[tuple[str, str, int, float]]:
    return [
        (name, dtype, columns or shape.slots, empty)
        for name, (dtype, columns, empty) in TABLES.items()
    ]


def _create(folder: Path, shape: PlanShape, examples: int) -> None:
    """Empty tables, every byte of them: a write to a mapped hole on a full disk would be a bus
    error, not an exception."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / JOURNAL).unlink(missing_ok=True)
    for name, dtype, columns, empty in _layout(shape):
        with (folder / f"{name}.bin").open("wb") as file:
            for start in range(0, examples, 2**16):
                file.write(np.full((min(2**16, examples - start), columns), empty, dtype).tobytes())
            file.flush()
            os.fsync(file.fileno())


def _write_header(folder: Path, header: dict) -> None:
    temporary = folder / (HEADER + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(json.dumps(header, indent=2))
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, folder / HEADER)


def _read_header(folder: Path) -> dict:
    try:
        found = json.loads((folder / HEADER).read_text(encoding="utf-8"))
        if not isinstance(found["version"], int) or found["version"] < 0:
            raise ValueError(f"version {found['version']!r}")
    except (ValueError, KeyError, TypeError) as fault:
        raise CheckpointError(
            f"{folder / HEADER} cannot be read ({fault}): need the header that was written with "
            "them. "
            f"try: remove {folder}, and they start anew"
        ) from fault
    return found


def _compare(folder: Path, found: dict, want: dict) -> None:
    for key, value in want.items():
        if found.get(key) != value:
            got, need = (
                f"{x[:12]}…" if isinstance(x, str) and len(x) > 12 else x
                for x in (found.get(key), value)
            )
            raise CheckpointError(
                f"the assignments in {folder} are of {key} = {got}: need {need}. try: the data and "
                "the plan "
                "they were made with, or another run folder"
            )
