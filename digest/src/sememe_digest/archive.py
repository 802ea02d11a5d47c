"""The archive of days, which is the only state, and a cache of what was fetched or paid for."""

import json
import os
import time
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from sememe_digest.errors import DigestError
from sememe_digest.papers import Day

CACHE_SECONDS = 14 * 86_400  # PDFs are kept for own use, not stored


def write(path: Path, content: str | bytes) -> None:
    """Writes a file whole or not at all; one that has this content already is not touched."""
    content = content.encode() if isinstance(content, str) else content
    if not path.exists() or path.read_bytes() != content:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{path.name}.{os.getpid()}.part")
        part.write_bytes(content)
        part.replace(path)


class Archive:
    """Days in `SITE/archive/DATE.json`. The cache beside the site may be deleted at any time."""

    def __init__(self, site: Path):
        self.site, whole = site, site.resolve()
        self.cache = whole.parent / ".cache" / whole.name
        self.days: dict[str, Day] = {}
        for path in sorted((site / "archive").glob("????-??-??.json")):
            try:
                self.days[path.stem] = Day.model_validate_json(path.read_bytes())
            except ValidationError as error:
                need = "a day as this program writes it"
                raise DigestError(f"{path} got damaged", need, "git checkout of it") from error

    def announced(self, but: str) -> dict[str, str]:
        """The papers of all days but one, each with its first day."""
        dates = sorted(self.days.keys() - {but}, reverse=True)
        return {paper: date for date in dates for paper in self.days[date].announced}

    def save(self, day: Day) -> None:
        """Keeps a day, with its old time where nothing else of it is new."""
        old = self.days.get(day.date)
        if old and old == day.model_copy(update={"updated": old.updated}):
            day.updated = old.updated
        self.days[day.date] = day
        write(self.site / "archive" / f"{day.date}.json", day.model_dump_json(indent=1) + "\n")

    def cached(self, kind: str, key: str) -> Any:
        """What was kept under a key, or nothing: no part of the cache is needed to go on."""
        path = self.cache / kind / f"{key}.json"
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None

    def keep(self, kind: str, key: str, value: Any) -> None:
        write(self.cache / kind / f"{key}.json", json.dumps(value))

    def prune(self) -> None:
        for path in self.cache.rglob("*.*"):
            if path.stat().st_mtime < time.time() - CACHE_SECONDS:
                path.unlink()
