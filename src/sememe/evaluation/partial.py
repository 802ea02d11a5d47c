"""What a measurement has found so far: a line for each part in a file of the run folder, so that a
stop costs one part alone.

The same command reads them and goes on; a file that is about anything else (other weights, text,
settings) is begun anew."""

import contextlib
import hashlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from sememe.evaluation.figures import run_recipe
from sememe.models.loading import model_folder
from sememe.storage import MANIFEST


class Partial:
    """Parts of one measurement by key, each a JSON value with the seconds that it took.

    Args:
        path: where they are written as they come; None, or a folder that cannot be written to: in
            memory alone.
        about: all that the parts depend on, as JSON."""

    def __init__(self, path: Path | None = None, about: dict[str, Any] | None = None):
        self.path, self.seconds, self.reused = path, 0.0, False
        self._held: dict[str, dict] = {}
        self._head = json.dumps(about, sort_keys=True)
        lines = (
            path.read_text(encoding="utf-8").splitlines()
            if path is not None and path.is_file()
            else []
        )
        if lines and lines[0] == self._head:
            for line in lines[1:]:
                with contextlib.suppress(ValueError):  # one that a crash cut off
                    part = json.loads(line)
                    self._held[part["key"]] = part
        self._begun = bool(self._held)

    def part(self, key: str, measure: Callable[[], Any]) -> Any:
        """The value of `key`: held from an earlier run (then `reused` is true), or that of
        `measure`, which is written.

        `seconds` is what all parts asked for so far took, whenever that was."""
        self.reused = key in self._held
        if not self.reused:
            began = time.perf_counter()
            value = measure()
            self._held[key] = {"key": key, "seconds": time.perf_counter() - began, "value": value}
            self._write(self._held[key])
        self.seconds += self._held[key]["seconds"]
        return self._held[key]["value"]

    def holds(self, key: str) -> bool:
        return key in self._held

    def _write(self, part: dict[str, Any]) -> None:
        if self.path is None:
            return
        try:
            with self.path.open("a" if self._begun else "w", encoding="utf-8") as file:
                # The line ahead of it may have been cut off: an empty line costs nothing.
                file.write(("\n" if self._begun else self._head + "\n") + json.dumps(part) + "\n")
            self._begun = True
        except OSError:
            self.path = None

    def finish(self) -> None:
        """To be called when the figures are where they belong: the parts are of no use any more."""
        if self.path is not None:
            with contextlib.suppress(OSError):
                self.path.unlink(missing_ok=True)


def partial_of(
    model: str, name: str, *others: str | None, texts: list[Tensor], **settings: Any
) -> Partial:
    """The parts of RUN/`name`: of its weights, those of `others`, these token ids and settings.
    Kept where `model` is a run."""
    about = {
        "texts": [hashlib.sha256(ids.cpu().numpy().tobytes()).hexdigest() for ids in texts],
        "weights": [_weights(one) for one in (model, *others)],
        **settings,
    }
    return Partial(
        Path(model) / f"{Path(name).stem}.partial.jsonl" if run_recipe(model) else None, about
    )


def _weights(model: str | None) -> str | None:
    """What a saved model's manifest says of it; of anything else its name."""
    folder = model_folder(model) if model is not None else None
    path = None if folder is None else folder / MANIFEST
    return path.read_text(encoding="utf-8") if path is not None and path.is_file() else model
