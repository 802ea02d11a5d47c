"""The archive to pages and feeds: a pure function from days to files."""

import re
from base64 import b64encode
from datetime import datetime, timedelta
from email.utils import format_datetime
from functools import cache
from hashlib import sha256
from importlib.resources import files
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from sememe_digest.config import Config
from sememe_digest.papers import SECTIONS, Day

FEED_DAYS, FEED_ITEMS = 30, 100
PREFIX_CHARACTERS = 300  # of an abstract in the README, as on the pages that it is modelled on


@cache
def _markdown() -> Any:
    from markdown_it import MarkdownIt

    return MarkdownIt("commonmark", {"html": False}).disable(["image", "autolink"])


def claim_html(text: str) -> Markup:
    """A claim, which is not trusted: its Markdown, without images, and links to arXiv alone."""
    import nh3

    def only_arxiv(tag: str, attribute: str, value: str) -> str | None:
        return value if value.startswith("https://arxiv.org/") else None

    tags = {"em", "strong", "code", "sub", "sup", "a"}
    html = _markdown().renderInline(text)
    return Markup(nh3.clean(html, tags, attributes={"a": {"href"}}, attribute_filter=only_arxiv))


def inert(text: str) -> str:
    """Text of a feed for Markdown: as it is, but for what would be HTML, a link or an image."""
    text = re.sub(r"<(?=[A-Za-z/!?])", "&lt;", " ".join(text.split()))
    return re.sub(r"^(?=[#>+*=~-])|[\[\]](?=.*\]|.*\()|\](?=\()", r"\\\g<0>", text)


def prefix(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= PREFIX_CHARACTERS else f"{line[:PREFIX_CHARACTERS]}..."


def rfc822(day: str) -> str:
    return format_datetime(datetime.fromisoformat(f"{day}T00:00:00+00:00"))


@cache
def _templates() -> Environment:
    environment = Environment(
        loader=PackageLoader("sememe_digest"),
        autoescape=lambda name: name is not None and not name.startswith("readme"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    folder = files("sememe_digest") / "templates"
    parts = {name: (folder / name).read_text("utf-8") for name in ("style.css", "script.js")}
    # The page's policy allows these two inline texts by their hashes, and nothing else.
    hashes = (b64encode(sha256(part.encode()).digest()).decode() for part in parts.values())
    style, script = (f"'sha256-{value}'" for value in hashes)
    environment.globals |= {
        "sections": SECTIONS,
        "style": Markup(parts["style.css"]),
        "script": Markup(parts["script.js"]),
        "policy": f"default-src 'none'; style-src {style}; script-src {script}",
    }
    environment.filters |= {"claim": claim_html, "inert": inert, "prefix": prefix, "rfc822": rfc822}
    return environment


def render(days: dict[str, Day], config: Config, dates: set[str]) -> dict[str, str]:
    """README, front page, feeds, and the pages of these dates, by path within the site."""
    get, order = _templates().get_template, sorted(days)
    latest = days[order[-1]]
    page = get("page.html.j2")
    pages = {f"archive/{date}.html": (date, "../") for date in order if date in dates}
    pages["index.html"] = (latest.date, "")
    rendered = {"README.md": get("readme.md.j2").render(day=latest, config=config)}
    for path, (date, root) in pages.items():
        index = order.index(date)
        before, after = order[:index][-1:], order[index + 1 : index + 2]
        rendered[path] = page.render(
            day=days[date], config=config, root=root, dates=order[::-1], before=before, after=after
        )
    return rendered | _feeds(days, config)


def _feeds(days: dict[str, Day], config: Config) -> dict[str, str]:
    """One feed of everything and one for each class: the last 30 days, at most 100 papers."""
    template, latest = _templates().get_template("feed.xml.j2"), days[max(days)]
    oldest = (datetime.fromisoformat(latest.date) - timedelta(FEED_DAYS - 1)).date().isoformat()
    recent = [days[date] for date in sorted(days, reverse=True) if date >= oldest]
    items = [(day, entry) for day in recent for entry in day.entries]
    feeds = {}
    for category in ("", *config.categories):
        name = f"feed-{category}.xml" if category else "feed.xml"
        own = [item for item in items if f"{item[1].primary}.".startswith(f"{category}.")]
        feeds[name] = template.render(
            name=name,
            category=category,
            items=(own if category else items)[:FEED_ITEMS],
            config=config,
            day=latest,
        )
    return feeds
