"""The archive to pages and feeds."""

import re
from base64 import b64encode
from datetime import date, timedelta
from functools import cache
from hashlib import sha256

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from sememe_digest import DigestError
from sememe_digest.config import Config
from sememe_digest.papers import SECTIONS, Archive, write

FEED_DAYS, FEED_ITEMS = 30, 100
ARXIV = "https://arxiv.org/"


@cache
def claim_html(text: str) -> Markup:
    """A claim, which is not trusted: its Markdown, without images, and links to arXiv alone."""
    import nh3
    from markdown_it import MarkdownIt

    html = MarkdownIt("commonmark", {"html": False}).disable("image").renderInline(text)
    only = {"tags": {"em", "strong", "code", "a"}, "attributes": {"a": {"href"}}}
    only["attribute_filter"] = lambda tag, name, url: url if url.startswith(ARXIV) else None
    return Markup(nh3.clean(html, **only))


def inert(text: str) -> str:
    """Text of a feed for Markdown: as it is, but for what would be HTML, a link or an image."""
    text = re.sub(r"<(?=[A-Za-z/!?][^<]*>)", "&lt;", " ".join(text.split()))
    return re.sub(r"^(?=[#>+*=~-])|[\[\]](?=.*\]|.*\()|\](?=\()", r"\\\g<0>", text)


TEMPLATES = Environment(
    loader=PackageLoader("sememe_digest"),
    autoescape=lambda name: "html" in str(name) or "xml" in str(name),
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)
TEMPLATES.globals["sections"] = SECTIONS
TEMPLATES.filters |= {"claim": claim_html, "inert": inert}
# The page's policy allows its style and its script by their hashes, and nothing else.
TEMPLATES.filters["hash"] = lambda t: f"'sha256-{b64encode(sha256(t.encode()).digest()).decode()}'"


def publish(archive: Archive, config: Config, dates: set[date]) -> None:
    """Writes README, feeds, front page and the pages of `dates`, their neighbours, and missing."""
    days, order, pages = archive.days, sorted(archive.days), {}
    if not order:
        raise DigestError(f"{archive.site} got no day", "one", "sememe-digest run")
    page, feed = map(TEMPLATES.get_template, ("page.html.j2", "feed.xml.j2"))
    for index, name in enumerate(order):
        before, after = order[:index][-1:], order[index + 1 :][:1]
        facts = {"before": before, "after": after, "days": order[::-1], "config": config}
        facts["day"] = latest = days[name]
        path = f"archive/{name}.html"
        if dates & {*before, name, *after} or not (archive.site / path).exists():
            pages[path] = page.render(facts, root="../")
    pages["index.html"] = page.render(facts, root="")
    pages["README.md"] = TEMPLATES.get_template("readme.md.j2").render(facts)
    oldest = latest.date - timedelta(FEED_DAYS - 1)
    recent = [(days[day], e) for day in order[::-1] if day >= oldest for e in days[day].entries]
    for category in ("", *config.categories):
        name = f"feed-{category}.xml" if category else "feed.xml"
        items = [item for item in recent if category in ("", config.home(item[1].primary))]
        pages[name] = feed.render(facts, name=name, category=category, items=items[:FEED_ITEMS])
    for path, text in pages.items():
        write(archive.site / path, text.encode())
