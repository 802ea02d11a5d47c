"""One run: read every class, union, drop what earlier days had, rank, summarise, archive."""

import sys
import zlib
from collections import Counter
from datetime import date, datetime
from fileinput import hook_compressed
from hashlib import sha256
from pathlib import Path

from sememe_digest import DigestError
from sememe_digest.client import Client
from sememe_digest.config import Config
from sememe_digest.feeds import NEW_YORK, Feed, read_feed, read_listing, stale_since, union
from sememe_digest.fulltext import authors, to_text
from sememe_digest.papers import Archive, Day, Paper
from sememe_digest.ranking import rank
from sememe_digest.summaries import Summariser

WRITTEN, NOTHING, INCOMPLETE, UNREAD = 0, 3, 4, 5  # exit codes
STAGES = ("announced", "new", "matching", "shown", "summarised")
NOT_RANKING = {"title", "url", "contact", "out", "summaries", "feeds_url", "pages_url"}


class Run:
    """One run of a digest; `folder` holds feeds as files, which are then read in place of arXiv."""

    def __init__(self, config: Config, archive: Archive, folder: Path | None):
        self.config, self.archive, self.folder = config, archive, folder
        self.client, self.summariser = Client(config.contact), Summariser(config, archive)
        self.settings = sha256(config.model_dump_json(exclude=NOT_RANKING).encode()).hexdigest()
        self.feeds: dict[str, Feed] = {}

    def run(self, now: datetime, with_summaries: bool) -> tuple[int, Day]:
        """The exit code, and the day that was written, was complete already, or has no papers."""
        day = self.archive.days.get(now.astimezone(NEW_YORK).date())
        # A complete day is not asked for again, unless other papers are wanted.
        if self.folder or not day or not day.is_complete() or day.settings != self.settings:
            day = self._read(f"{now:%Y-%m-%d %H:%M:%S} UTC")
            if not day.announced:
                return INCOMPLETE if day.faults else NOTHING, day
        if with_summaries and (missing := self.summariser.missing(day.entries)):
            self.archive.save(day)  # what is known is safe before the long part begins
            self.summariser.run(missing, self.client)
        self._count(day, "summarised", [entry for entry in day.entries if entry.summary])
        self.archive.save(day)
        self.archive.prune()
        failed = any(entry.failure for entry in day.entries)
        return INCOMPLETE if failed or not day.is_complete() else WRITTEN, day

    def _read(self, updated: str) -> Day:
        """The day that the feeds announce, without papers if none of them is new."""
        faults = []
        for category in self.config.categories:
            print(f"reading {category}", file=sys.stderr)
            try:
                self.feeds[category] = read_feed(self._fetch(category), category)
            except DigestError as error:
                faults.append(f"{error}")
        if not self.feeds:
            raise DigestError("; ".join(faults), "one feed at least", code=UNREAD)
        today = max(feed.date for feed in self.feeds.values())
        day = Day(date=today, updated=updated, settings=self.settings, faults=faults)
        old = self.archive.days.get(today, day)  # what an earlier run of the day wrote
        # Every paper of the other days, with its first day.
        others = sorted(self.archive.days.keys() - {today}, reverse=True)
        elsewhere = {name: other for other in others for name in self.archive.days[other].announced}
        for category in self.config.categories:
            state = self._check(category, day, elsewhere)
            day.feeds[category] = state or old.feeds.get(category, "failed")
        papers = {paper.id: paper for paper in union([*self.feeds.values()], today, self.config)}
        for entry in old.entries:
            papers.setdefault(entry.id, Paper(**dict(entry)))
        if fresh := [paper for paper in papers.values() if paper.id not in elsewhere]:
            self._assemble(day, old, fresh)
        return day

    def _fetch(self, category: str) -> bytes:
        if self.folder:
            path = next(self.folder.glob(f"{category}.xml.gz"), self.folder / f"{category}.xml")
            try:
                with hook_compressed(path, "rb") as file:
                    return file.read()
            except (OSError, EOFError, zlib.error) as error:
                got = f"--feeds got no whole {path.name}"
                raise DigestError(got, "a file for each class", "another folder") from error
        etag, body = self.archive.cached(f"feeds/{category}") or ("", "")
        answer = self.client.get(f"{self.config.feeds_url}/{category}", etag)
        if answer.status_code == 304:
            return body.encode()
        self.archive.keep(f"feeds/{category}", [answer.headers["ETag"], answer.text])
        return answer.content

    def _check(self, category: str, day: Day, announced: dict[str, date]) -> str:
        """The state of a feed; the listing page takes the place of one that cannot be used."""
        if feed := self.feeds.get(category):
            day.faults += feed.faults
            since = stale_since(feed, announced) or feed.date
            if since == day.date:
                return "read"
            day.faults.append(f"{category} is stale: its feed is the list of {since}")
        try:
            url = f"{self.config.pages_url}/list/{category}/new?skip=0&show=2000"
            listing = None if self.folder else read_listing(self.client.get(url).content, category)
            if listing and listing.date == day.date and not stale_since(listing, announced):
                self.feeds[category] = listing
                day.faults.append(f"{category} was filled from its listing page")
                return "listing"
        except DigestError as error:
            day.faults.append(f"{error}")
        return "stale" if feed else ""

    def _assemble(self, day: Day, old: Day, papers: list[Paper]) -> None:
        """Ranks, cuts at `min_score` and `limit`, and keeps summaries of an earlier run."""
        ranked, least = rank(papers, self.config), self.config.min_score
        matching = [entry for entry in ranked if not entry.excluded and entry.score >= least]
        kept = {entry.versioned_id: entry.summary for entry in old.entries}
        day.announced = dict(old.announced)
        day.entries, beyond = matching[: self.config.limit], matching[self.config.limit :]
        for number, entry in enumerate(day.entries, 1):
            entry.rank, entry.summary = number, kept.get(entry.versioned_id)
            entry.title_text = to_text(entry.title)
            entry.abstract_text = to_text(entry.abstract)
            entry.authors = authors(entry.creator)
        if day.entries:
            day.cut_score, worth = entry.score, (entry.score, entry.similarity)
            day.tied_out = sum(worth == (other.score, other.similarity) for other in beyond)
        for entry in ranked:
            verdict = {"category": entry.primary, "terms": [hit["term"] for hit in entry.hits]}
            day.announced[entry.id] = verdict | entry.model_dump(include={"score", "excluded"})
        # The first is arXiv's own count, whatever is new to us.
        announced = [paper for feed in self.feeds.values() for paper in feed.new()]
        for stage, found in zip(STAGES, (announced, ranked, matching, day.entries), strict=False):
            self._count(day, stage, found)

    def _count(self, day: Day, stage: str, papers: list) -> None:
        numbers = Counter(self.config.home(paper.primary) for paper in papers)
        for category in (*self.config.categories, *numbers):
            day.counts.setdefault(category, dict.fromkeys(STAGES, 0))[stage] = numbers[category]
