"""The archive to pages and feeds: a pure function from days to files."""

import re
from base64 import b64encode
from datetime import date, datetime, timedelta
from email.utils import format_datetime
from functools import cache
from hashlib import sha256
from importlib.resources import files
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from sememe_digest.archive import Archive, write
from sememe_digest.config import Config
from sememe_digest.errors import DigestError
from sememe_digest.papers import SECTIONS, Day

FEED_DAYS, FEED_ITEMS = 30, 100


@cache
def claim_html(text: str) -> Markup:
    """A claim, which is not trusted: its Markdown, without images, and links to arXiv alone."""
    import nh3
    from markdown_it import MarkdownIt

    def only_arxiv(tag: str, attribute: str, value: str) -> str | None:
        return value if value.startswith("https://arxiv.org/") else None

    html = MarkdownIt("commonmark", {"html": False}).disable("image").renderInline(text)
    tags = {"em", "strong", "code", "a"}
    return Markup(nh3.clean(html, tags, attributes={"a": {"href"}}, attribute_filter=only_arxiv))


def inert(text: str) -> str:
    """Text of a feed for Markdown: as it is, but for what would be HTML, a link or an image."""
    text = re.sub(r"<(?=[A-Za-z/!?][^<]*>)", "&lt;", " ".join(text.split()))
    return re.sub(r"^(?=[#>+*=~-])|[\[\]](?=.*\]|.*\()|\](?=\()", r"\\\g<0>", text)


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("sememe_digest"),
        autoescape=lambda name: "html" in str(name) or "xml" in str(name),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    midnight = "T00:00:00+00:00"
    environment.filters |= {"claim": claim_html, "inert": inert}
    environment.filters["rfc822"] = lambda d: format_datetime(datetime.fromisoformat(d + midnight))
    environment.globals["sections"] = SECTIONS
    # The page's policy allows these two inline texts by their hashes, and nothing else.
    for kind, name in {"style": "style.css", "script": "script.js"}.items():
        text = (files("sememe_digest") / "templates" / name).read_text(encoding="utf-8")
        hashed = b64encode(sha256(text.encode()).digest()).decode()
        environment.globals |= {kind: Markup(text), f"{kind}_hash": f"'sha256-{hashed}'"}
    return environment


def template(name: str) -> Any:
    """A template, with escaping where its output is HTML or XML."""
    return _environment().get_template(name)


def publish(archive: Archive, config: Config, dates: set[str]) -> None:
    """Writes what is new of a site: of the pages of days those of these dates and of their
    neighbours, which link to them, and those that are missing."""
    order, pages = sorted(archive.days), archive.site / "archive"
    if not order:
        raise DigestError(f"{archive.site} has no day: need one. try: sememe-digest run")
    near = {day for i, day in enumerate(order) if dates & {*order[max(0, i - 1) : i + 2]}}
    missing = {day for day in order if not (pages / f"{day}.html").exists()}
    for name, text in render(archive.days, config, near | missing).items():
        write(archive.site / name, text)


def render(days: dict[str, Day], config: Config, dates: set[str]) -> dict[str, str]:
    """README, front page, feeds, and the pages of these dates, by path within the site."""
    order = sorted(days)
    latest = days[order[-1]]
    result = {"README.md": template("readme.md.j2").render(day=latest, config=config)}
    pages = {f"archive/{day}.html": (day, "../") for day in order if day in dates}
    for path, (day, root) in (pages | {"index.html": (latest.date, "")}).items():
        index = order.index(day)
        near = {"before": order[:index][-1:], "after": order[index + 1 :][:1], "days": order[::-1]}
        result[path] = template("page.html.j2").render(
            day=days[day], config=config, root=root, **near
        )
    oldest = f"{date.fromisoformat(latest.date) - timedelta(FEED_DAYS - 1)}"
    recent = [(days[day], e) for day in order[::-1] if day >= oldest for e in days[day].entries]
    for category in ("", *config.categories):
        name = f"feed-{category}.xml" if category else "feed.xml"
        items = [item for item in recent if category in ("", config.home(item[1].primary))]
        result[name] = template("feed.xml.j2").render(
            name=name, category=category, items=items[:FEED_ITEMS], config=config, day=latest
        )
    return result
