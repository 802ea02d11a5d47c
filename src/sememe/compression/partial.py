"""Finished windows beside the file that they will be in: work that was stopped goes on from
them."""

import json
from pathlib import Path
from typing import Any

from sememe.compression.codes import unwritable
from sememe.errors import CodesError


class Partial:
    """`done`: window → its ids, each also a line of OUT.partial. Without `out` they are kept in
    memory alone.

    Args:
        job: what the work depends on, by the names that a user knows. Lines of another job are
            refused."""

    def __init__(self, out: Path | None, job: dict[str, Any]):
        self.path = None if out is None else out.with_name(out.name + ".partial")
        self.done: dict[int, list[int]] = {}
        self.resumed, self.file = 0, None
        if self.path is None:
            return
        try:
            lines = self.path.read_bytes().split(b"\n") if self.path.is_file() else []
            begun = self._read(lines, job)
            self.file = self.path.open("ab" if begun else "wb")
            self.file.write(
                b"\n" if begun and lines[-1] else b"" if begun else json.dumps(job).encode() + b"\n"
            )
            self.file.flush()
        except OSError as error:
            raise unwritable(self.path, error) from error
        self.resumed = len(self.done)

    def _read(self, lines: list[bytes], job: dict[str, Any]) -> bool:
        """Whether `lines` are those of a job that was begun. A kill may have cut any line off that
        is the last."""
        found = _json(lines[0]) if lines else None
        if not isinstance(found, dict):
            return False
        other = [key for key, value in job.items() if found.get(key) != value]
        if other:
            raise CodesError(
                f"{self.path} is what another command left unfinished ({', '.join(other)} "
                "differs): need the same "
                f"command to go on with it. try: another --out, or rm {self.path} to begin anew"
            )
        for line in lines[1:]:
            match _json(line):
                case [int(window), [*ids]] if all(isinstance(i, int) for i in ids):
                    self.done[window] = ids
        return True

    def add(self, windows: list[int], rows: list[list[int]]) -> None:
        self.done.update(zip(windows, rows, strict=True))
        if self.file is not None:
            try:
                self.file.write(
                    "".join(
                        f"[{n}, {row}]\n" for n, row in zip(windows, rows, strict=True)
                    ).encode()
                )
                self.file.flush()
            except OSError as error:
                raise unwritable(self.path, error) from error

    def close(self, finished: bool = False) -> None:
        """`finished`: all of it is elsewhere now."""
        if self.file is not None:
            self.file.close()
            if finished:
                self.path.unlink(missing_ok=True)


def _json(line: bytes) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return None
