"""arXiv's feeds: RSS and Atom to papers, the union over classes, and whether a feed is stale."""

import re
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import date, datetime
from email.utils import parsedate_to_datetime
from zoneinfo import ZoneInfo

from sememe_digest.config import Config
from sememe_digest.errors import Unreadable
from sememe_digest.papers import STRENGTH, Paper

NEW_YORK = ZoneInfo("America/New_York")  # arXiv's days begin at its midnight
PREFIX = re.compile(r"arXiv:\S+\s+Announce Type:\s*(\S+)\s+Abstract:\s*")
IDENTIFIER = re.compile(r"(?:oai:arXiv\.org:|/abs/)([\w.-]+?(?:/\d+)?)(?:v(\d+))?$")


@dataclass
class Feed:
    """What one class announces: the day that the feed is of, and its papers in arXiv's order."""

    date: date
    papers: list[Paper] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def new_ids(self) -> list[str]:
        return [paper.id for paper in self.papers if paper.type == "new"]


def read_feed(body: bytes, source: str) -> Feed:
    """The papers of an RSS or Atom feed.

    Read with expat, not with feedparser, which drops text behind a `<` in an abstract."""
    try:
        root = ElementTree.fromstring(body)
    except ElementTree.ParseError as error:
        kind = "HTML" if b"<html" in body[:1000].lower() else f"cut or broken XML ({error})"
        raise Unreadable(f"{source} is {kind}: need a feed. try: again later") from error
    channel = root if _name(root) == "feed" else root.find("channel")
    if _name(root) not in ("rss", "feed") or channel is None:
        raise Unreadable(f"{source} is <{_name(root)}>: need a feed. try: again later")
    head = _fields(channel)
    if head.get("title", "").startswith("Feed error"):
        about = head.get("description") or head.get("subtitle") or head["title"]
        raise Unreadable(f"{source} is an error feed: {about.strip():.300} try: another class")
    feed = Feed(_date(head, source))
    for item in channel:
        if _name(item) in ("item", "entry"):
            _read_item(item, feed, source)
    untyped = sum(not paper.type for paper in feed.papers)
    if untyped:
        feed.notes.append(f"{source}: {untyped} without an announce type")
    return feed


def _name(element: ElementTree.Element) -> str:
    return element.tag.rpartition("}")[2]


def _fields(element: ElementTree.Element) -> dict[str, str]:
    """Child elements by name without namespace; the first of each."""
    fields: dict[str, str] = {}
    for child in element:
        fields.setdefault(_name(child), child.text or "")
    return fields


def _date(head: dict[str, str], source: str) -> date:
    """The day of a feed: midnight New York in RSS, the moment of its making in Atom."""
    try:
        if "pubDate" in head:
            return parsedate_to_datetime(head["pubDate"]).date()
        return datetime.fromisoformat(head["updated"]).astimezone(NEW_YORK).date()
    except (KeyError, ValueError) as error:
        raise Unreadable(f"{source} has no date: need a feed. try: again later") from error


def _read_item(item: ElementTree.Element, feed: Feed, source: str) -> None:
    fields = _fields(item)
    named = fields.get("guid") or fields.get("id") or fields.get("link", "")
    match = IDENTIFIER.search(named.strip())
    if match is None:
        feed.notes.append(f"{source}: an item without an arXiv id ({named.strip()[:60]!r})")
        return
    text = fields.get("description", fields.get("summary", ""))
    prefix = PREFIX.match(text)
    announced = fields.get("announce_type", "").strip() or (prefix.group(1) if prefix else "")
    classes = (child for child in item if _name(child) == "category")
    paper = Paper(
        id=match.group(1),
        version=int(match.group(2) or 1),
        title=" ".join(fields.get("title", "").split()),
        abstract=tidy(text[prefix.end() :] if prefix else text),
        creator=fields.get("creator", "").strip(),
        categories=[(child.get("term") or child.text or "").strip() for child in classes],
        type=announced if announced in STRENGTH else "",
        license=fields.get("rights", "").strip(),
        doi=fields.get("DOI", "").strip(),
        journal_reference=fields.get("journal_reference", "").strip(),
    )
    if announced != "absonly":
        feed.papers.append(paper)


def tidy(text: str) -> str:
    """An abstract without runs of blanks; its paragraphs keep a line each."""
    return "\n".join(filter(None, (" ".join(line.split()) for line in text.splitlines())))


def union(feeds: Iterable[Feed], day: date, config: Config) -> list[Paper]:
    """Each paper once, with the strongest type that any feed gives it.

    A first version from a monitored class that is of this or the last month is new, whichever feed
    shows it: its own may be stale, missing or capped."""
    papers: dict[str, Paper] = {}
    for paper in (paper for feed in feeds for paper in feed.papers):
        known = papers.get(paper.id)
        if known is None or STRENGTH[paper.type] > STRENGTH[known.type]:
            papers[paper.id] = paper
    months = {day.strftime("%y%m"), f"{(day.year - (day.month == 1)) % 100:02}{_before(day):02}"}
    for paper in papers.values():
        recent = paper.version == 1 and paper.id[:4] in months and paper.id[4:5] == "."
        if recent and config.monitors(paper.primary) and paper.type in ("", "cross"):
            paper.type = "new"
    return [paper for paper in papers.values() if paper.type in config.types]


def _before(day: date) -> int:
    return (day.month - 2) % 12 + 1


def stale_since(feed: Feed, announced: dict[str, str]) -> str | None:
    """The earlier day that a feed's list is of, if at least half of its new papers are; the feed's
    own date does not tell, since arXiv stamps it with the day of the request."""
    new = feed.new_ids()
    days = Counter(announced[identifier] for identifier in new if identifier in announced)
    return days.most_common(1)[0][0] if new and 2 * days.total() >= len(new) else None
