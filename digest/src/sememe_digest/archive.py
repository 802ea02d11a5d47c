"""The archive of days, which is the only state, and a cache of what was paid for or fetched."""

import json
import os
import time
from pathlib import Path

from pydantic import ValidationError

from sememe_digest.errors import DigestError, reason
from sememe_digest.papers import Day, Summary

CACHE_DAYS = 14


def write(path: Path, text: str) -> bool:
    """Writes a file whole or not at all; one that has this text already is not touched."""
    data = text.encode()
    if path.exists() and path.read_bytes() == data:
        return False
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_bytes(data)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    return True


class Archive:
    """Days in `SITE/archive/DATE.json`. The cache beside the site may be deleted at any time."""

    def __init__(self, site: Path):
        self.site = site
        self.cache = site.resolve().parent / ".cache" / site.resolve().name
        self.days: dict[str, Day] = {}
        for path in sorted((site / "archive").glob("????-??-??.json")):
            try:
                self.days[path.stem] = Day.model_validate_json(path.read_bytes())
            except (ValidationError, ValueError) as error:
                need = "need a day as this program writes it. try: git checkout of that file"
                raise DigestError(f"{path} is damaged ({reason(error)}): {need}") from error

    def announced_elsewhere(self, day: str) -> dict[str, str]:
        """The papers of all other days, with the first day of each."""
        dates: dict[str, str] = {}
        for date in sorted(self.days):
            if date != day:
                for identifier in self.days[date].announced:
                    dates.setdefault(identifier, date)
        return dates

    def save(self, day: Day) -> None:
        """Keeps a day, with its old time where nothing else of it is new."""
        old = self.days.get(day.date)
        if old is not None and day.model_copy(update={"updated": old.updated}) == old:
            day.updated = old.updated
        self.days[day.date] = day
        write(self.site / "archive" / f"{day.date}.json", day.model_dump_json(indent=1) + "\n")

    def summary(self, key: str) -> Summary | None:
        """A finished summary by its key, from the cache of this machine."""
        path = self.cache / "summaries" / f"{key}.json"
        try:
            return Summary.model_validate_json(path.read_bytes())
        except (OSError, ValidationError):
            return None

    def keep_summary(self, summary: Summary) -> None:
        path = self.cache / "summaries" / f"{summary.key}.json"
        write(path, summary.model_dump_json(indent=1) + "\n")

    def feed(self, category: str) -> tuple[str, bytes]:
        """The ETag and the body of a class's last feed; empty where there is none."""
        path = self.cache / "feeds" / f"{category}.json"
        try:
            etag, body = json.loads(path.read_text(encoding="utf-8"))
            return etag, body.encode()
        except (OSError, ValueError):
            return "", b""

    def keep_feed(self, category: str, etag: str, body: bytes) -> None:
        text = json.dumps([etag, body.decode(errors="replace")])
        write(self.cache / "feeds" / f"{category}.json", text)

    def prune(self) -> None:
        """Deletes what has lain in the cache for two weeks: PDFs are kept for own use, not stored."""
        old = time.time() - CACHE_DAYS * 86_400
        for path in self.cache.rglob("*"):
            if path.is_file() and path.stat().st_mtime < old:
                path.unlink()
