"""Papers, entries of a digest and its days: the JSON of the archive, and its files."""

import json
import os
import time
from datetime import date as Date
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from sememe_digest import DigestError

CACHE_SECONDS = 14 * 86_400  # PDFs are kept for own use, not stored
# The structure of a summary: four sections of three fields, each a list of claims.
SECTIONS = {
    "Contribution": ("problem", "method", "advantage"),
    "Experiments": ("data", "settings", "baselines"),
    "Results": ("key_results", "comparison", "ablation"),
    "Conclusions": ("findings", "limits", "future"),
}


class Paper(BaseModel):
    """One item of a feed; title, abstract and names are TeX, as arXiv sends them."""

    id: str
    version: int = 1
    title: str
    abstract: str
    creator: str = ""
    categories: list[str] = []  # the primary class first
    type: str = ""

    @property
    def primary(self) -> str:
        return self.categories[0] if self.categories else ""

    @property
    def versioned_id(self) -> str:
        return f"{self.id}v{self.version}"


class Claim(BaseModel):
    """One statement of a summary, with the page and the words that it rests on."""

    field: str  # one of SECTIONS, or "sentence"
    text: str
    page: int | None = None
    quote: str = ""
    quote_found: bool = False
    numbers: list[dict[str, Any]] = []  # text, state (found, elsewhere, missing), page that has it


class Summary(BaseModel):
    """A language model's summary after its check against the text of the paper."""

    key: str = ""
    model: str = ""
    claims: list[Claim] = []
    missing_headlines: list[str] = []
    removed: list[str] = []

    def numbers(self, state: str = "") -> list[str]:
        """The numbers of all claims, or those in one state."""
        return [n["text"] for c in self.claims for n in c.numbers if state in ("", n["state"])]


class Entry(Paper):
    """A ranked paper: what it is worth and why, and where it is shown, text without TeX."""

    rank: int = 0
    score: float
    similarity: float | None = None
    hits: list[dict[str, Any]]  # term, weight, in_title
    excluded: str | None
    title_text: str = ""
    abstract_text: str = ""
    authors: list[dict[str, str]] = []  # name and affiliation
    summary: Summary | None = None
    failure: str | None = None


class Day(BaseModel):
    """One digest: all that its pages are made of."""

    date: Date
    updated: str
    settings: str  # a hash of what decides the papers
    feeds: dict[str, str] = {}  # by class: read, listing, stale or failed
    faults: list[str] = []  # of feeds, in one sentence each
    counts: dict[str, dict[str, int]] = {}
    cut_score: float | None = None
    tied_out: int = 0  # papers that are worth as much as the last one and are not shown
    entries: list[Entry] = []
    announced: dict[str, dict] = {}  # every paper by id: class, score, terms, excluded

    def is_complete(self) -> bool:
        return not {"stale", "failed"} & {*self.feeds.values()}


def write(path: Path, content: bytes) -> None:
    """Writes a file whole or not at all; one that has this content already is not touched."""
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
        self.days: dict[Date, Day] = {}
        for path in sorted((site / "archive").glob("????-??-??.json")):
            try:
                day = Day.model_validate_json(path.read_bytes())
                self.days[day.date] = day
            except ValidationError as error:
                raise DigestError(f"{path} got damaged", "a whole day", "git checkout") from error

    def save(self, day: Day) -> None:
        """Keeps a day, with its old time where nothing else of it is new."""
        old = self.days.get(day.date)
        if old and old == day.model_copy(update={"updated": old.updated}):
            day.updated = old.updated
        self.days[day.date] = day
        text = day.model_dump_json(indent=1) + "\n"
        write(self.site / "archive" / f"{day.date}.json", text.encode())

    def cached(self, name: str) -> Any:
        """What was kept under a name, or nothing: no part of the cache is needed to go on."""
        path = self.cache / f"{name}.json"
        return json.loads(path.read_bytes()) if path.exists() else None

    def keep(self, name: str, value: Any) -> None:
        write(self.cache / f"{name}.json", json.dumps(value).encode())

    def prune(self) -> None:
        for path in self.cache.rglob("*.*"):
            if path.stat().st_mtime < time.time() - CACHE_SECONDS:
                path.unlink()
