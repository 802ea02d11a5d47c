"""arXiv's feeds: RSS and Atom to papers, the union over classes, and whether a feed is stale."""

import re
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import date, datetime, timedelta
from email.utils import parsedate_to_datetime
from zoneinfo import ZoneInfo

from sememe_digest.config import Config
from sememe_digest.errors import Unread
from sememe_digest.papers import Paper

# Announce types from the strongest to none. A paper has the strongest over all feeds.
STRENGTH = {"new": 4, "cross": 3, "replace": 2, "replace-cross": 1, "": 0}
NEW_YORK = ZoneInfo("America/New_York")  # arXiv's days begin at its midnight
PREFIX = re.compile(r"arXiv:\S+\s+Announce Type:\s*(\S+)\s+Abstract:\s*")
IDENTIFIER = re.compile(r"(?:oai:arXiv\.org:|/abs/)([\w.-]+?(?:/\d+)?)(?:v(\d+))?$")


@dataclass
class Feed:
    """What one class announces: the day that the feed is of, and its papers in arXiv's order."""

    date: date
    papers: list[Paper] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    def new_ids(self) -> list[str]:
        return [paper.id for paper in self.papers if paper.type == "new"]


def read_feed(body: bytes, source: str) -> Feed:
    """The papers of an RSS or Atom feed.

    Read with expat, not with feedparser, which drops text behind a `<` in an abstract."""
    try:
        root = ElementTree.fromstring(body)
        channel = next(root.iter("channel"), root)  # in Atom the root itself
        head = _fields(channel)
        if head["title"].startswith("Feed error"):
            about = head.get("description") or head.get("subtitle") or head["title"]
            raise Unread(f"{source} got an error feed: {about:.300} try: another class")
        if "pubDate" in head:  # RSS: midnight in New York; Atom: the moment of its making
            day = parsedate_to_datetime(head["pubDate"]).date()
        else:
            day = datetime.fromisoformat(head["updated"]).astimezone(NEW_YORK).date()
    except (ElementTree.ParseError, KeyError, ValueError) as error:
        got = "HTML" if b"<html" in body[:1000].lower() else f"no whole feed ({error})"
        raise Unread(f"{source} got {got}: need RSS or Atom. try: again later") from error
    feed = Feed(day)
    for item in (*channel.iter("item"), *channel.iter("{http://www.w3.org/2005/Atom}entry")):
        _read_item(item, feed, source)
    untyped = sum(not paper.type for paper in feed.papers)
    feed.faults += [f"{source}: {untyped} without an announce type"] if untyped else []
    return feed


def _fields(element: ElementTree.Element) -> dict[str, str]:
    """The texts of child elements by name without namespace, the first of each."""
    texts = ((child.tag.rpartition("}")[2], child.text or "") for child in reversed(element))
    return {name: text.strip() for name, text in texts}


def _read_item(item: ElementTree.Element, feed: Feed, source: str) -> None:
    fields = _fields(item)
    name = fields.get("guid") or fields.get("id") or fields.get("link", "")
    match = IDENTIFIER.search(name)
    text = fields.get("description", fields.get("summary", ""))
    prefix = PREFIX.match(f"{text} ")
    announced = fields.get("announce_type") or (prefix[1] if prefix else "")
    classes = [child for child in item if child.tag.endswith("category")]
    if match is None:
        feed.faults.append(f"{source}: an item without an arXiv id ({name:.60})")
    elif announced != "absonly":
        paper = Paper(
            id=match[1],
            version=int(match[2] or 1),
            title=" ".join(fields.get("title", "").split()),
            abstract=tidy(text[prefix.end() :] if prefix else text),
            creator=fields.get("creator", ""),
            categories=[(child.get("term") or child.text or "").strip() for child in classes],
            type=announced if announced in STRENGTH else "",
        )
        feed.papers.append(paper)


def tidy(text: str) -> str:
    """An abstract without runs of blanks; each of its paragraphs keeps a line."""
    return "\n".join(filter(None, (" ".join(line.split()) for line in text.splitlines())))


def union(feeds: Iterable[Feed], day: date, config: Config) -> list[Paper]:
    """Each paper once, with the strongest type that any feed gives it.

    A first version of this or the last month from a monitored class is new, whichever feed shows
    it: its own may be stale, missing or capped."""
    papers: dict[str, Paper] = {}
    months = (f"{day:%y%m}.", f"{day.replace(day=1) - timedelta(days=1):%y%m}.")
    for paper in (paper for feed in feeds for paper in feed.papers):
        is_first = paper.version == 1 and paper.id.startswith(months)
        if is_first and paper.type in ("", "cross") and config.home(paper.primary) != "other":
            paper = paper.model_copy(update={"type": "new"})
        known = papers.get(paper.id)
        if known is None or STRENGTH[paper.type] > STRENGTH[known.type]:
            papers[paper.id] = paper
    return [paper for paper in papers.values() if paper.type in config.types]


def stale_since(feed: Feed, earlier: dict[str, str]) -> str | None:
    """The earlier day that a list is of, if at least half of its new papers were announced then:
    a stale feed's own date does not tell, since arXiv stamps it with the day of the request."""
    ids = feed.new_ids()
    days = Counter(earlier[identifier] for identifier in ids if identifier in earlier)
    return days.most_common(1)[0][0] if ids and 2 * days.total() >= len(ids) else None
