"""The page `/list/CLASS/new`, read when a feed is stale: papers, and arXiv's own counts."""

import re
from datetime import datetime
from html.parser import HTMLParser

from sememe_digest.errors import Unreadable
from sememe_digest.feeds import Feed, tidy
from sememe_digest.papers import Paper

TYPES = {"New": "new", "Cross": "cross", "Replacement": "replace"}
DATE = re.compile(r"Showing new listings for \w+, (\d+ \w+ \d{4})")
SECTION = re.compile(r"(\w+) submissions? \(showing (?:first )?(\d+) of (\d+) entries\)")
FIELDS = {"list-title": "title", "list-authors": "authors", "list-subjects": "subjects"}


class ListingParser(HTMLParser):
    """Headings, and for each paper the text of its fields."""

    def __init__(self) -> None:
        super().__init__()
        self.headings: list[str] = []
        self.items: list[dict[str, str]] = []
        self.current: dict[str, str] = {}
        self.field = ""

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        values = {key: value or "" for key, value in attributes}
        if tag == "h3":
            self.headings.append("")
            self.field = "heading"
        elif tag == "dt":
            self.current = {"section": str(len(self.headings) - 1)}
            self.items.append(self.current)
            self.field = ""
        elif tag == "a" and (match := re.match(r"/abs/(.+)", values.get("href", ""))):
            self.current.setdefault("id", match.group(1))
        elif tag == "a" and (match := re.search(r"/html/.+v(\d+)$", values.get("href", ""))):
            self.current["version"] = match.group(1)
        elif tag in ("div", "p"):
            names = values.get("class", "").split()
            fields = [FIELDS[name] for name in names if name in FIELDS]
            self.field = fields[0] if fields else "abstract" * (tag == "p")

    def handle_endtag(self, tag: str) -> None:
        if tag in ("h3", "div", "p", "dd"):
            self.field = ""

    def handle_data(self, data: str) -> None:
        if self.field == "heading":
            self.headings[-1] += data
        elif self.field:
            self.current[self.field] = self.current.get(self.field, "") + data


def read_listing(body: bytes, source: str) -> Feed:
    """The papers of a listing page. One that is cut, or whose markup has changed, is refused."""
    parser = ListingParser()
    parser.feed(body.decode("utf-8", errors="replace"))
    day = next(filter(None, map(DATE.search, parser.headings)), None)
    if day is None:
        raise Unreadable(f"{source} is no listing page: need its date. try: again later")
    feed = Feed(datetime.strptime(day.group(1), "%d %B %Y").date())
    for index, heading in enumerate(parser.headings):
        if match := SECTION.search(heading):
            items = [item for item in parser.items if item["section"] == str(index)]
            if len(items) != int(match.group(3)):
                got = f"{len(items)} of {match.group(3)} {match.group(1).lower()} submissions"
                raise Unreadable(f"{source} shows {got}: need all. try: again later")
            feed.papers += [_paper(item, TYPES.get(match.group(1), "")) for item in items]
    return feed


def _paper(item: dict[str, str], announced: str) -> Paper:
    title = item.get("title", "").replace("Title:", "", 1)
    return Paper(
        id=item.get("id", ""),
        version=int(item.get("version", 1)),
        title=" ".join(title.split()),
        abstract=tidy(item.get("abstract", "")),
        creator=" ".join(item.get("authors", "").split()),
        categories=re.findall(r"\(([a-z-]+(?:\.[A-Za-z-]+)?)\)", item.get("subjects", "")),
        type=announced,
    )
