"""One run: read every class, union, drop what earlier days had, rank, summarise, archive."""

import gzip
from collections import Counter
from collections.abc import Callable
from datetime import date, datetime
from hashlib import sha256
from pathlib import Path

from sememe_digest import latex
from sememe_digest.archive import Archive
from sememe_digest.client import Client
from sememe_digest.config import Config
from sememe_digest.errors import DigestError, Unread
from sememe_digest.feeds import NEW_YORK, Feed, read_feed, stale_since, union
from sememe_digest.listing import read_listing
from sememe_digest.papers import Day, Entry, Paper
from sememe_digest.ranking import rank
from sememe_digest.summaries import Summariser

WRITTEN, NOTHING, INCOMPLETE = 0, 3, 4
STAGES = ("announced", "new", "matching", "shown", "summarised")
Progress = Callable[[str], None]
NOT_RANKING = {"title", "url", "contact", "out", "summaries", "feeds_url", "pages_url"}


class Run:
    """One run of a digest; `folder` holds feeds as files, which are then read in place of arXiv."""

    def __init__(self, config: Config, archive: Archive, folder: Path | None, progress: Progress):
        self.config, self.archive, self.folder = config, archive, folder
        self.progress, self.client = progress, Client(config.contact)
        self.settings = sha256(config.model_dump_json(exclude=NOT_RANKING).encode()).hexdigest()
        self.feeds: dict[str, Feed] = {}
        self.states, self.faults = dict[str, str](), list[str]()

    def run(self, now: datetime, with_summaries: bool) -> tuple[int, Day | None]:
        """The exit code, and the day that was written or was complete already."""
        day = self.archive.days.get(f"{now.astimezone(NEW_YORK):%Y-%m-%d}")
        # A complete day is not asked for again, unless other papers are wanted.
        if self.folder or not day or not day.is_complete() or day.settings != self.settings:
            day = self._read_day(f"{now:%Y-%m-%d %H:%M:%S} UTC")
            if day is None:
                return INCOMPLETE if self.faults else NOTHING, None
        summariser = Summariser(self.config, self.archive)
        if with_summaries and (missing := summariser.missing(day.entries)):
            self.archive.save(day)  # what is known is safe before the long part begins
            summariser.run(missing, self.client, self.progress)
        self._count(day, "summarised", [entry for entry in day.entries if entry.summary])
        self.archive.save(day)
        self.archive.prune()
        failed = any(entry.failure for entry in day.entries)
        return INCOMPLETE if failed or not day.is_complete() else WRITTEN, day

    def _read_day(self, updated: str) -> Day | None:
        """The day that the feeds announce, or none if they announce nothing new."""
        for category in self.config.categories:
            self.progress(f"reading {category}")
            self.states[category] = "failed"
            try:
                self.feeds[category] = read_feed(self._fetch(category), category)
                self.states[category] = "read"
            except DigestError as error:
                self.faults.append(f"{error}")
        if not self.feeds:
            raise Unread(f"no feed could be read: {'; '.join(self.faults)}")
        today = max(feed.date for feed in self.feeds.values())
        old = self.archive.days.get(f"{today}")
        elsewhere = self.archive.announced(but=f"{today}")
        for category in self.config.categories:
            self._check(category, today, {p: d for p, d in elsewhere.items() if d < f"{today}"})
            if old and self.states[category] == "failed":  # an earlier run of the day read it
                self.states[category] = old.feeds.get(category, "failed")
        papers = union(self.feeds.values(), today, self.config)
        known = {paper.id for paper in papers} | elsewhere.keys()
        fresh = [paper for paper in papers if paper.id not in elsewhere]
        fresh += [Paper(**dict(e)) for e in (old.entries if old else []) if e.id not in known]
        return self._assemble(f"{today}", updated, fresh, old) if fresh else None

    def _fetch(self, category: str) -> bytes:
        if self.folder:
            path = self.folder / f"{category}.xml"
            if (packed := path.with_name(f"{path.name}.gz")).is_file():
                return gzip.decompress(packed.read_bytes())
            if path.is_file():
                return path.read_bytes()
            raise Unread(f"--feeds has no {path.name}: need a file for each class. try: another")
        etag, body = self.archive.cached("feeds", category) or ("", "")
        answer = self.client.get(f"{self.config.feeds_url}/{category}", etag)
        if answer.status_code == 200:
            self.archive.keep("feeds", category, [answer.headers["ETag"], answer.text])
        return body.encode() if answer.status_code == 304 else answer.content

    def _check(self, category: str, today: date, earlier: dict[str, str]) -> None:
        """Notes a stale feed, and takes the listing page in place of one that cannot be used."""
        if feed := self.feeds.get(category):
            self.faults += feed.faults
            since = stale_since(feed, earlier) or (feed.date < today and f"{feed.date}")
            if not since:
                return
            self.states[category] = "stale"
            self.faults.append(f"{category} is stale: its feed is the list of {since}")
        if self.folder:
            return
        try:
            url = f"{self.config.pages_url}/list/{category}/new?skip=0&show=2000"
            listing = read_listing(self.client.get(url).content, category)
            if listing.date == today and not stale_since(listing, earlier):
                self.feeds[category], self.states[category] = listing, "listing"
                self.faults.append(f"{category} was filled from its listing page")
        except DigestError as error:
            self.faults.append(f"{error}")

    def _assemble(self, today: str, updated: str, papers: list[Paper], old: Day | None) -> Day:
        """Ranks, cuts at `min_score` and `limit`, and keeps summaries of an earlier run."""
        ranked = rank(papers, self.config)
        least = self.config.min_score
        matching = [(w, e) for w, e in ranked if not e.excluded and e.score >= least]
        shown, beyond = matching[: self.config.limit], matching[self.config.limit :]
        kept = {entry.versioned_id: entry.summary for entry in old.entries} if old else {}
        for number, (_, entry) in enumerate(shown, 1):
            entry.rank, entry.summary = number, kept.get(entry.versioned_id)
            entry.title_text = latex.to_text(entry.title)
            entry.abstract_text = latex.to_text(entry.abstract)
            entry.authors = latex.authors(entry.creator)
        announced = dict(old.announced) if old else {}
        for _, entry in ranked:
            verdict = {"category": entry.primary, "terms": [hit["term"] for hit in entry.hits]}
            announced[entry.id] = verdict | entry.model_dump(include={"score", "excluded"})
        day = Day(
            date=today,
            updated=updated,
            settings=self.settings,
            feeds=self.states,
            faults=self.faults,
            cut_score=shown[-1][1].score if shown else None,
            tied_out=sum(worth == shown[-1][0] for worth, _ in beyond),
            entries=[entry for _, entry in shown],
            announced=announced,
        )
        for stage, pairs in {"new": ranked, "matching": matching, "shown": shown}.items():
            self._count(day, stage, [entry for _, entry in pairs])
        for category, feed in self.feeds.items():  # arXiv's own count, whatever is new to us
            day.counts[category]["announced"] = len(feed.new_ids())
        return day

    def _count(self, day: Day, stage: str, papers: list[Entry]) -> None:
        numbers = Counter(self.config.home(paper.primary) for paper in papers)
        for category in (*self.config.categories, *numbers):
            day.counts.setdefault(category, dict.fromkeys(STAGES, 0))[stage] = numbers[category]
