"""arXiv's feeds and listing pages to papers, their union, and whether a list is stale."""

import re
import xml.etree.ElementTree as ElementTree
from collections import Counter
from datetime import date, datetime, timedelta
from email.utils import parsedate_to_datetime
from html import unescape
from typing import NamedTuple
from zoneinfo import ZoneInfo

from sememe_digest import DigestError
from sememe_digest.config import Config
from sememe_digest.papers import Paper

STRENGTH = {"new": 4, "cross": 3, "replace": 2, "replace-cross": 1, "": 0, "absonly": -1}
NEW_YORK = ZoneInfo("America/New_York")  # arXiv's days begin at its midnight
PREFIX = re.compile(r"arXiv:\S+\s+Announce Type:\s*(\S+)\s+Abstract:\s*")
IDENTIFIER = re.compile(r"(?:oai:arXiv\.org:|/abs/)([\w.-]+?(?:/\d+)?)(?:v(\d+))?$")
# Of the page `/list/CLASS/new`: its date, the heads of its sections, a field of an item.
LISTED = re.compile(r"Showing new listings for \w+, (\d+ \w+ \d{4})")
SECTION = re.compile(r"<h3>\s*(\w+) submissions? \(showing .*?of (\d+) entries\)\s*</h3>")
FIELD = r"<{0}[^>]*class=['\"][^'\"]*{1}[^>]*>(?:<span class='descriptor'>.*?</span>)?(.*?)</{0}>"


class Feed(NamedTuple):
    """What one class announces: the day that the feed is of, and its papers in arXiv's order."""

    date: date
    papers: list[Paper]
    faults: list[str]

    def new(self) -> list[Paper]:
        return [paper for paper in self.papers if paper.type == "new"]


def read_feed(body: bytes, source: str) -> Feed:
    """The papers of an RSS or Atom feed, by expat: feedparser drops text behind a `<`."""
    try:
        root = ElementTree.fromstring(body)
        channel = next(root.iter("channel"), root)  # in Atom the root itself
        head = _fields(channel)
        if head["title"].startswith("Feed error"):
            got = f"an error feed ({head.get('description', head['title']):.300})"
            raise DigestError(f"{source} got {got}", "papers", "another class")
        is_rss = "pubDate" in head  # midnight in New York; in Atom the moment of its making
        parse = parsedate_to_datetime if is_rss else datetime.fromisoformat
        day = parse(head["pubDate" if is_rss else "updated"]).astimezone(NEW_YORK).date()
    except (ElementTree.ParseError, KeyError, ValueError) as error:
        got = "HTML" if b"<html" in body[:1000].lower() else "no whole feed"
        raise DigestError(f"{source} got {got}", "RSS or Atom") from error
    papers = [_announced(item) for item in channel.iter() if item.tag.endswith(("item", "}entry"))]
    lacking = sum(not (paper.id and paper.type) for paper in papers)
    faults = [f"{source}: {lacking} without an id or an announce type"] if lacking else []
    return Feed(day, [paper for paper in papers if paper.id], faults)


def _fields(element: ElementTree.Element) -> dict[str, str]:
    """The texts of child elements by name without namespace, the first of each."""
    texts = ((child.tag.rpartition("}")[2], child.text or "") for child in reversed(element))
    return {name: text.strip() for name, text in texts}


def _announced(item: ElementTree.Element) -> Paper:
    fields = _fields(item)
    match = IDENTIFIER.search(fields.get("guid") or fields.get("id") or fields.get("link", ""))
    text = fields.get("description", fields.get("summary", ""))
    prefix = PREFIX.match(f"{text} ")
    announced = fields.get("announce_type") or (prefix[1] if prefix else "")
    return Paper(
        id=match[1] if match else "",
        version=int(match[2] or 1) if match else 1,
        title=" ".join(fields.get("title", "").split()),
        abstract=_tidy(text[prefix.end() :] if prefix else text),
        creator=fields.get("creator", ""),
        categories=[(c.get("term") or c.text or "").strip() for c in item.findall("{*}category")],
        type=announced if announced in STRENGTH else "",
    )


def _tidy(text: str) -> str:
    """Text without runs of blanks; each of its paragraphs keeps a line."""
    return "\n".join(filter(None, (" ".join(line.split()) for line in text.splitlines())))


def read_listing(body: bytes, source: str) -> Feed:
    """The papers of a listing page. One that is cut, or whose markup has changed, is refused."""
    page = body.decode(errors="replace")
    day = LISTED.search(page)
    if day is None:
        raise DigestError(f"{source} got no listing page", "its date")
    feed = Feed(datetime.strptime(day[1], "%d %B %Y").date(), papers=[], faults=[])
    # Behind its head, a page is kind, count and text of one section after the other.
    _, *parts = SECTION.split(page)
    for kind, count, text in zip(parts[::3], parts[1::3], parts[2::3], strict=True):
        papers = [_listed(item, kind.lower()) for item in text.split("<dt>")[1:]]
        read = [paper for paper in papers if paper.id and paper.title and paper.categories]
        if len(read) != int(count):
            got = f"a listing of {len(read)} of {count} {kind.lower()} submissions"
            raise DigestError(f"{source} got {got}", "all")
        feed.papers.extend(read)
    return feed


def _listed(item: str, section: str) -> Paper:
    def text(tag: str, name: str) -> str:
        match = re.search(FIELD.format(tag, name), item, re.S)
        return _tidy(unescape(re.sub(r"<[^>]+>", "", match[1]))) if match else ""

    # The address of the abstract has no version, that of the page in HTML has.
    names = re.findall(r"/(?:abs|html)/([^\"']+?)(?:v(\d+))?[\"']", item)
    name, version = max(names, key=lambda name: name[1], default=("", ""))
    return Paper(
        id=name,
        version=int(version or 1),
        title=text("div", "list-title").replace("\n", " "),
        abstract=text("p", "mathjax"),
        creator=text("div", "list-authors").replace("\n", " "),
        categories=re.findall(r"\(([a-z-]+(?:\.[A-Za-z-]+)?)\)", text("div", "list-subjects")),
        type=section.removesuffix("ment"),
    )


def stale_since(feed: Feed, announced: dict[str, date]) -> date | None:
    """The earlier day that a list is of, if at least half of its new papers were announced then:
    a stale feed's own date does not tell, since arXiv stamps it with the day of the request."""
    days = [announced.get(paper.id, feed.date) for paper in feed.new()]
    earlier = Counter(day for day in days if day < feed.date)
    return earlier.most_common(1)[0][0] if days and 2 * earlier.total() >= len(days) else None


def union(feeds: list[Feed], day: date, config: Config) -> list[Paper]:
    """Each paper once, as its strongest type in any feed. A first version of this or the last month
    from a monitored class is new in whichever feed: its own may be stale, missing or capped."""
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
