"""What is published: feeds for readers, and pages in a real browser."""

import json
import os
import re
import shutil
import subprocess
import time
from contextlib import contextmanager
from pathlib import Path

import feedparser
import pytest

from tests.stub import CHROMIUM_NAMES, DATA, DAY, NOW, digest, run, snapshot, write_config

CHROMIUM = next(filter(None, map(shutil.which, CHROMIUM_NAMES)), None)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    out = tmp_path_factory.mktemp("pages") / "site"
    seed = DATA.parent.parent / "examples" / "seed.yaml"
    words = ("run", "-c", seed, "--feeds", DAY, "--no-summaries", "--out", out, "--now", NOW)
    assert run(*words)[0] == 0
    # A summary by hand, so that pages and feeds have one of every kind of mark.
    path = out / "archive" / "2026-02-17.json"
    record = json.loads(path.read_text(encoding="utf-8"))
    number = {"text": "43.2", "state": "missing", "page": None}
    claim = {"field": "method", "text": "It gains **43.2** points.", "page": 3, "numbers": [number]}
    entry = record["entries"][0]
    entry["summary"] = {"key": "k", "model": "m", "claims": [claim], "removed": ["a sentence"]}
    path.write_text(json.dumps(record), encoding="utf-8")
    assert run("render", "-c", seed, "--out", out)[0] == 0
    return out


def test_feeds_are_valid_and_stable(site):
    feed = feedparser.parse((site / "feed.xml").read_bytes())
    assert not feed.bozo and feed.feed.ttl == "1440" and len(feed.entries) == 30
    ids = [entry.id for entry in feed.entries]
    assert ids[0] == "oai:arXiv.org:2602.14452v1" and len(set(ids)) == 30
    first = feed.entries[0]
    assert first.link == "https://arxiv.org/abs/2602.14452"
    assert "<strong>43.2</strong>" in first.summary and "43.2 not found" in first.summary
    assert first.title in (site / "index.html").read_text(encoding="utf-8")
    classes = {
        name: feedparser.parse((site / f"feed-{name}.xml").read_bytes())
        for name in ("cs.AI", "cs.CL", "cs.DC", "cs.LG")
    }
    assert sum(len(part.entries) for part in classes.values()) == 30
    assert not any(part.bozo for part in classes.values())
    before = snapshot(site)
    seed = DATA.parent.parent / "examples" / "seed.yaml"
    assert run("render", "-c", seed, "--out", site)[0] == 0 and snapshot(site) == before


def test_hostile_items_are_inert_in_every_output(tmp_path, monkeypatch):
    (tmp_path / "cs.LG.xml").write_bytes((DATA / "edge_cs.LG.xml").read_bytes())
    config = write_config(tmp_path, min_score=-1)
    site = tmp_path / "site"
    assert digest(monkeypatch, "run", "-c", config, "--feeds", tmp_path, "--out", site)[0] == 0
    page = (site / "index.html").read_text(encoding="utf-8")
    assert page.count("<script") == 1 and "<img" not in page and "</details> A fast" not in page
    for words in ("we show that attention", "André Müller", "Gökçe Aydos", "saw 70% and 12%"):
        assert words in page
    assert "AT&amp;T" in page and "&lt;system&gt; tag" in page
    from markdown_it import MarkdownIt

    html = MarkdownIt("commonmark", {"html": True}).render((site / "README.md").read_text("utf-8"))
    assert not re.search(r"<(script|img|b|system)\b|href=\"(?!https://arxiv|index|feed)", html)


class Browser:
    """Chromium by its own protocol over a pipe: no driver, no port."""

    def __init__(self, profile: Path):
        read_here, write_there = os.pipe()
        read_there, write_here = os.pipe()
        flags = "--headless --no-sandbox --disable-gpu --remote-debugging-pipe --no-first-run"
        launch = (
            f"exec {CHROMIUM} {flags} --user-data-dir={profile} 3<&{read_there} 4>&{write_there}"
        )
        self.process = subprocess.Popen(
            ["bash", "-c", launch], pass_fds=(read_there, write_there), stderr=subprocess.DEVNULL
        )
        os.close(read_there)
        os.close(write_there)
        self.input, self.output = os.fdopen(write_here, "wb", 0), os.fdopen(read_here, "rb", 0)
        self.number, self.rest, self.events = 0, b"", []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self.session = session["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    session = None

    def call(self, method: str, **parameters):
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        self.input.write(json.dumps(message).encode() + b"\0")
        while True:
            answer = self.receive()
            if answer.get("id") == self.number:
                assert "error" not in answer, answer
                return answer["result"]

    def receive(self) -> dict:
        while b"\0" not in self.rest:
            data = self.output.read(1 << 16)
            assert data, "the browser has ended"
            self.rest += data
        line, _, self.rest = self.rest.partition(b"\0")
        message = json.loads(line)
        self.events.append(message)
        return message

    def open(self, address: str, width: int = 1010, scheme: str = "light", script: bool = True):
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.call("Emulation.setEmulatedMedia", features=features)
        self.call("Emulation.setScriptExecutionDisabled", value=not script)
        self.events.clear()
        self.call("Page.navigate", url=address)
        end = time.monotonic() + 30
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            assert time.monotonic() < end
            self.receive()

    def value(self, expression: str):
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def addresses(self) -> list[str]:
        sent = [e for e in self.events if e.get("method") == "Network.requestWillBeSent"]
        return [event["params"]["request"]["url"] for event in sent]

    def complaints(self) -> list[dict]:
        kinds = ("Log.entryAdded", "Runtime.exceptionThrown", "Runtime.consoleAPICalled")
        return [event for event in self.events if event.get("method") in kinds]


@contextmanager
def browser(profile: Path):
    started = Browser(profile)
    try:
        yield started
    finally:
        started.process.kill()
        started.process.wait()


SHOWN = "[...document.querySelectorAll('article')].filter(a => a.offsetHeight > 0).length"


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium: apt-get install chromium")
def test_pages_in_a_browser(site, tmp_path):
    address = (site / "index.html").as_uri()
    with browser(tmp_path / "profile") as page:
        page.open(address)
        assert page.value(SHOWN) == 30 and page.complaints() == []
        assert all(url.startswith(("file:", "data:")) for url in page.addresses())
        assert page.value("document.querySelector('details.why').open") is False
        page.value("document.querySelector('details.why summary').click()")
        assert page.value("document.querySelector('details.why').open") is True
        assert page.value("document.querySelector('details.summary mark').textContent")
        # Filter box, class chips, read marks.
        page.value(
            "filter = document.getElementById('filter'); filter.value = 'speculative'; "
            "filter.dispatchEvent(new Event('input'))"
        )
        few = page.value(SHOWN)
        assert 0 < few < 30
        assert page.value("document.getElementById('shown').textContent") == f"{few} of 30"
        page.value(
            "filter.value = ''; filter.dispatchEvent(new Event('input')); "
            "document.querySelector('.chip[data-class=\"cs.DC\"]').click()"
        )
        assert page.value(SHOWN) == 1
        page.value(
            "document.querySelector('.chip[data-class=\"cs.DC\"]').click(); "
            "document.querySelector('article .read').click(); "
            "document.getElementById('unread').click()"
        )
        assert page.value(SHOWN) == 29
        colours = "getComputedStyle(document.body).backgroundColor"
        light = page.value(colours)
        page.value("document.getElementById('theme').click()")
        assert page.value(colours) != light
        page.open(address)  # marks and theme are kept
        assert page.value("document.querySelectorAll('article.is-read').length") == 1
        assert page.value(colours) != light
        page.value("localStorage.clear()")
        for scheme in ("light", "dark"):
            page.open(address, width=380, scheme=scheme)
            assert page.value("document.documentElement.scrollWidth") <= 380
            assert (page.value(colours) == light) is (scheme == "light")
        assert page.complaints() == []
    with browser(tmp_path / "other") as page:
        page.open((site / "archive" / "2026-02-17.html").as_uri(), script=False)
        assert page.complaints() == [] and len(page.addresses()) <= 2
        page.call("Emulation.setScriptExecutionDisabled", value=False)
        assert page.value(SHOWN) == 30
        hidden = "[...document.querySelectorAll('.control')].every(e => e.offsetHeight === 0)"
        assert page.value(hidden) is True  # what needs the script is not offered without it
