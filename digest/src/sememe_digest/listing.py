"""The page `/list/CLASS/new`, read where a feed is stale: papers, and arXiv's own counts."""

import re
from datetime import datetime
from html import unescape

from sememe_digest.errors import Unread
from sememe_digest.feeds import Feed, tidy
from sememe_digest.papers import Paper

TYPES = {"New": "new", "Cross": "cross", "Replacement": "replace"}
DATE = re.compile(r"Showing new listings for \w+, (\d+ \w+ \d{4})")
SECTION = re.compile(r"<h3>\s*(\w+) submissions? \(showing .*?of (\d+) entries\)\s*</h3>")
FIELD = r"<{0}[^>]*class=['\"][^'\"]*{1}[^>]*>(?:<span class='descriptor'>.*?</span>)?(.*?)</{0}>"


def read_listing(body: bytes, source: str) -> Feed:
    """The papers of a listing page. One that is cut, or whose markup has changed, is refused."""
    page = body.decode("utf-8", errors="replace")
    day = DATE.search(page)
    if day is None:
        raise Unread(f"{source} got no listing page: need its date. try: again later")
    feed = Feed(datetime.strptime(day[1], "%d %B %Y").date())
    # Behind its head, a page is kind, count and text of one section after the other.
    _, *parts = SECTION.split(page)
    for kind, count, text in zip(parts[::3], parts[1::3], parts[2::3], strict=True):
        papers = [_paper(item, TYPES.get(kind, "")) for item in re.split(r"<dt>", text)[1:]]
        read = [paper for paper in papers if paper.id and paper.title and paper.categories]
        if len(read) != int(count):
            got = f"{len(read)} of {count} {kind.lower()} submissions"
            raise Unread(f"{source} got a listing of {got}: need all. try: again later")
        feed.papers += read
    return feed


def _paper(item: str, announced: str) -> Paper:
    def text(tag: str, name: str) -> str:
        match = re.search(FIELD.format(tag, name), item, re.S)
        return unescape(re.sub(r"<[^>]+>", "", match[1])) if match else ""

    identifier = re.search(r"href ?=\s*[\"']/abs/([^\"']+)", item)
    version = re.search(r"/html/[^\"']+v(\d+)[\"']", item)
    return Paper(
        id=identifier[1] if identifier else "",
        version=int(version[1]) if version else 1,
        title=" ".join(text("div", "list-title").split()),
        abstract=tidy(text("p", "mathjax")),
        creator=" ".join(text("div", "list-authors").split()),
        categories=re.findall(r"\(([a-z-]+(?:\.[A-Za-z-]+)?)\)", text("div", "list-subjects")),
        type=announced,
    )
