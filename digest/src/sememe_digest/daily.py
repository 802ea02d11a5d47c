"""One run: read every class, union, drop what earlier days had, rank, summarise, archive."""

import gzip
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date, datetime
from hashlib import sha256
from pathlib import Path

from sememe_digest import latex
from sememe_digest.archive import Archive
from sememe_digest.client import Client
from sememe_digest.config import Config
from sememe_digest.errors import DigestError, NothingRead, Unreadable, reason
from sememe_digest.feeds import NEW_YORK, Feed, read_feed, stale_since, union
from sememe_digest.listing import read_listing
from sememe_digest.papers import Counts, Day, Entry, FeedState, Paper, Verdict
from sememe_digest.ranking import Cut, Ranked, cut, rank
from sememe_digest.summaries import Summariser, summary_key

WRITTEN, NOTHING, INCOMPLETE = 0, 3, 4


@dataclass
class Run:
    """The inputs of a run beside its configuration."""

    config: Config
    archive: Archive
    now: datetime
    folder: Path | None = None  # feeds as files, instead of from arXiv
    summaries: bool = True
    progress: Callable[[str], None] = print


def run(task: Run) -> tuple[int, Day | None]:
    """The exit code and the day that was written, or that was complete already."""
    today = task.archive.days.get(task.now.astimezone(NEW_YORK).date().isoformat())
    client = Client(task.config.contact)
    if task.folder or today is None or not feeds_complete(today, task.config):
        day = read_day(task, client)
        if day is None:
            return NOTHING, None
        if not day.announced:
            return INCOMPLETE, day
    else:
        day = today.model_copy(deep=True)
    missing = missing_summaries(task, day)
    if missing:
        # What is known so far is safe before the long part begins.
        task.archive.save(day)
        Summariser(task.config, client, task.archive).run(missing, task.progress)
    for counts in day.counts.values():
        counts.summarised = 0
    for entry in day.entries:
        if entry.summary:
            day.counts[home(entry, task.config)].summarised += 1
    task.archive.save(day)
    task.archive.prune()
    failed = any(entry.failure for entry in day.entries)
    return (WRITTEN if day.feeds_complete and not failed else INCOMPLETE), day


def ranking_settings(config: Config) -> str:
    """What decides the papers of a day: another value asks for it anew."""
    keys = {"categories", "types", "terms", "match", "exclude", "exclude_in", "interests"}
    text = config.model_dump_json(include=keys | {"min_score", "limit"})
    return sha256(text.encode()).hexdigest()[:20]


def feeds_complete(day: Day, config: Config) -> bool:
    return day.feeds_complete and day.settings == ranking_settings(config)


def missing_summaries(task: Run, day: Day) -> list[Entry]:
    """The first entries that have no summary by this model and prompt, here or in the cache."""
    settings = task.config.summaries
    missing = []
    for index, entry in enumerate(day.entries):
        entry.failure = None
        if not (task.summaries and settings.model and index < settings.count):
            continue
        key = summary_key(entry, task.config)
        if entry.summary is None or entry.summary.key != key:
            entry.summary = task.archive.summary(key)
            missing += [entry] if entry.summary is None else []
    return missing


def read_day(task: Run, client: Client) -> Day | None:
    """The day that the feeds announce, without summaries that it had no time for; none where
    nothing is announced."""
    config, archive = task.config, task.archive
    feeds: dict[str, Feed] = {}
    states = {c: FeedState(category=c, state="failed") for c in config.categories}
    for category, state in states.items():
        try:
            task.progress(f"reading {category}")
            body = fetch(task, client, category, listing=False)
            feeds[category] = read_feed(body, category)
            state.state = "read" if feeds[category].papers else "empty"
        except DigestError as error:
            state.note = reason(error)
    if not feeds:
        faults = "; ".join(state.note for state in states.values())
        raise NothingRead(f"no feed could be read: {faults}")
    day = max(feed.date for feed in feeds.values())
    elsewhere = archive.announced_elsewhere(day.isoformat())
    earlier = {key: value for key, value in elsewhere.items() if value < day.isoformat()}
    for category, state in states.items():
        feed = feeds.get(category)
        since = feed and (stale_since(feed, earlier) or (feed.date < day and f"{feed.date}"))
        if since:
            state.state, state.note = "stale", f"{category} is stale: its list is of {since}"
        if since or (feed is None and "need a feed" in state.note):
            fill_from_listing(task, client, state, feeds, day, earlier)
        if category in feeds:
            state.announced = len(feeds[category].new_ids())
    old = archive.days.get(day.isoformat())
    papers = union(feeds.values(), day, config)
    known = {paper.id for paper in papers}
    if old:  # what an earlier run of the day saw and a feed that now fails does not show
        papers += [as_paper(entry) for entry in old.entries if entry.id not in known]
        for state in old.feeds:
            if state.category in states and states[state.category].state == "failed":
                states[state.category] = state
    fresh = [paper for paper in papers if paper.id not in elsewhere]
    if not fresh and all(state.state in ("read", "empty") for state in states.values()):
        return None
    ranked = rank(fresh, config)
    return assemble(task, day, list(states.values()), ranked, cut(ranked, config), feeds, old)


def fetch(task: Run, client: Client, category: str, listing: bool) -> bytes:
    """A feed, or the listing page beside it, from a folder or from arXiv."""
    if task.folder:
        return from_folder(task.folder, f"{category}.{'html' if listing else 'xml'}")
    if listing:
        page = f"{task.config.arxiv.pages}/list/{category}/new?skip=0&show=2000"
        return client.get(page).body
    etag, body = task.archive.feed(category)
    answer = client.get(f"{task.config.arxiv.feeds}/rss/{category}", etag)
    if answer.status == 304:
        return body
    if answer.status == 200:
        task.archive.keep_feed(category, answer.etag, answer.body)
    return answer.body


def from_folder(folder: Path, name: str) -> bytes:
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            data = path.read_bytes()
            return gzip.decompress(data) if path.suffix == ".gz" else data
    raise Unreadable(f"{folder / name} is missing: need a file for each class. try: --feeds FOLDER")


def fill_from_listing(task, client, state, feeds, day: date, earlier: dict[str, str]) -> None:
    """Takes the papers of a stale class from its listing page, if that is of the day."""
    try:
        page = read_listing(fetch(task, client, state.category, listing=True), state.category)
    except DigestError as error:
        state.note += f"; its listing page did not help ({reason(error)})"
        return
    if page.date == day and not stale_since(page, earlier):
        feeds[state.category] = page
        state.state = "listing"
        state.note += ", filled from the listing page"


def as_paper(entry: Entry) -> Paper:
    return Paper(**entry.model_dump(include=set(Paper.model_fields)))


def home(paper: Paper, config: Config) -> str:
    """The monitored class or archive that a paper counts for; "cross" where it is in none."""
    names = (paper.primary, paper.primary.split(".")[0])
    return next((name for name in names if name in config.categories), "cross")


def assemble(task, day: date, states, ranked: list[Ranked], cut: Cut, feeds, old) -> Day:
    config = task.config
    counts = {state.category: Counts(announced=state.announced) for state in states}
    for name, papers in (("new", ranked), ("matching", cut.matching), ("shown", cut.shown)):
        for category, number in Counter(home(item.paper, config) for item in papers).items():
            setattr(counts.setdefault(category, Counts()), name, number)
    summaries = {entry.id: (entry.version, entry.summary) for entry in old.entries} if old else {}
    entries = []
    for number, item in enumerate(cut.shown, 1):
        paper = item.paper
        version, summary = summaries.get(paper.id, (0, None))
        entries.append(
            Entry(
                **paper.model_dump(),
                rank=number,
                score=item.score,
                similarity=item.similarity,
                hits=item.hits,
                title_text=latex.to_text(paper.title),
                abstract_text=latex.to_text(paper.abstract),
                authors=latex.authors(paper.creator),
                summary=summary if version == paper.version else None,
            )
        )
    verdicts = dict(old.announced) if old else {}
    for item in ranked:
        verdicts[item.paper.id] = Verdict(
            category=item.paper.primary,
            score=item.score,
            terms=[hit.term for hit in item.hits],
            excluded=item.excluded,
        )
    return Day(
        date=day.isoformat(),
        updated=task.now.strftime("%Y-%m-%d %H:%M:%S UTC"),
        settings=ranking_settings(config),
        feeds=states,
        counts=counts,
        notes=[note for feed in feeds.values() for note in feed.notes],
        cut_score=cut.score,
        tied_out=cut.tied_out,
        entries=entries,
        announced=verdicts,
    )
