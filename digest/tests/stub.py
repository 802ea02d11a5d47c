"""A server on this machine in place of arXiv and of a language model, and what tests share."""

import gzip
import json
import re
import subprocess
import sys
import threading
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from xml.sax.saxutils import escape

import yaml
from fpdf import FPDF

from sememe_digest import client

HERE = Path(__file__).parent
DATA = HERE / "data"
DAY = DATA / "2026-02-17"
PAGES = json.loads(gzip.decompress((DATA / "pages.json.gz").read_bytes()))
SEED = yaml.safe_load((HERE.parent / "examples" / "seed.yaml").read_text(encoding="utf-8"))
NOW = "2026-02-17T12:00:00"
CHROMIUM_NAMES = ("chromium", "chromium-browser", "google-chrome")


def feed_xml(items: list[dict], day: str = "Tue, 17 Feb 2026", category: str = "cs.LG") -> bytes:
    """A feed in arXiv's form. An item is an id, a version, a type, a title and an abstract."""
    parts = []
    for item in items:
        name = f"{item['id']}v{item.get('version', 1)}"
        kind = item.get("type", "new")
        classes = "".join(f"<category>{c}</category>" for c in item.get("classes", [category]))
        parts.append(
            f"<item><title>{escape(item.get('title', 'On training'))}</title>"
            f"<link>https://arxiv.org/abs/{item['id']}</link>"
            f"<description>arXiv:{name} Announce Type: {kind} \nAbstract: "
            f"{escape(item.get('abstract', 'We train a model.'))}</description>"
            f'<guid isPermaLink="false">oai:arXiv.org:{name}</guid>{classes}'
            f"<arxiv:announce_type>{kind}</arxiv:announce_type>"
            "<dc:creator>A. Bee</dc:creator></item>"
        )
    return (
        '<rss xmlns:arxiv="http://arxiv.org/schemas/atom" '
        'xmlns:dc="http://purl.org/dc/elements/1.1/" version="2.0"><channel>'
        f"<title>{category} updates on arXiv.org</title>"
        f"<pubDate>{day} 00:00:00 -0500</pubDate>{''.join(parts)}</channel></rss>"
    ).encode()


def pdf(pages: list[str], hidden: str = "", **options) -> bytes:
    """A PDF with these pages; `hidden` stands on the first in white, one point high."""
    document = FPDF()
    if options.get("password"):
        document.set_encryption(owner_password="owner", user_password=options["password"])
    for text in pages:
        document.add_page()
        document.set_font("Helvetica", size=11)
        document.multi_cell(0, 6, text, new_x="LMARGIN", new_y="NEXT")
        if hidden:
            document.set_font("Helvetica", size=1)
            document.set_text_color(255, 255, 255)
            document.multi_cell(0, 2, hidden, new_x="LMARGIN", new_y="NEXT")
            document.set_text_color(0, 0, 0)
            hidden = ""
    return bytes(document.output())


PAPER = ["Our method is 2.23 times faster and saves 49 % of memory.", "It fails on long inputs."]


def answer(claims: dict | None = None) -> str:
    """A language model's answer with claims that a paper of PAPER bears out."""
    quote = "Our method is 2.23 times faster"
    fields = {
        "sentence": [{"text": "A method that is 2.23× faster.", "page": 1, "quote": quote}],
        "key_results": [{"text": "It saves 49 % of memory.", "page": 1, "quote": "saves 49 %"}],
        "limits": [
            {"text": "It fails on long inputs.", "page": 2, "quote": "fails on long inputs"}
        ],
    }
    return json.dumps(fields | (claims or {}))


class Stub:
    """What the server answers, by kind, and the requests that it saw with their times."""

    def __init__(self) -> None:
        self.feeds: dict[str, object] = {}
        self.listing = b""
        self.pdf: object = pdf(PAPER)
        self.answer = lambda body: answer()
        self.seen: list[tuple[str, float]] = []
        self.bodies: list[dict] = []
        self.headers: list[dict] = []
        self.at_once = self.most_at_once = 0
        self.lock = threading.Lock()

    def count(self, kind: str) -> int:
        return sum(kind in path for path, _ in self.seen)


def respond(handler: BaseHTTPRequestHandler, value: object) -> None:
    """Sends bytes, a status, a status with headers, or whatever a function does itself."""
    if callable(value):
        value = value(handler)
        if value is None:
            return
    status, headers, body = value if isinstance(value, tuple) else (200, {}, value)
    if isinstance(body, int):
        status, body = body, b""
    handler.send_response(status)
    for key, text in headers.items():
        handler.send_header(key, text)
    handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    with suppress(ConnectionError):  # whoever asked has seen enough
        handler.wfile.write(body)


@contextmanager
def serve():
    """A stub and its address, `http://127.0.0.1:PORT`."""
    stub = Stub()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *arguments):
            pass

        def do_GET(self):
            stub.seen.append((self.path, client.clock()))
            stub.headers.append(dict(self.headers))
            name = self.path.rpartition("/")[2]
            if self.path.startswith("/rss/"):
                respond(self, stub.feeds.get(name, (404, {}, b"")))
            elif self.path.startswith("/list/"):
                respond(self, stub.listing or (404, {}, b""))
            else:
                respond(self, stub.pdf)

        def do_POST(self):
            with stub.lock:
                stub.at_once += 1
                stub.most_at_once = max(stub.most_at_once, stub.at_once)
                stub.seen.append((self.path, client.clock()))
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            stub.bodies.append(body)
            value = stub.answer(body)
            if isinstance(value, str):
                message = {"choices": [{"message": {"content": value}}]}
                value = json.dumps(message).encode()
            with stub.lock:
                stub.at_once -= 1
            respond(self, value)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    stub.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield stub
    finally:
        server.shutdown()
        server.server_close()


class FakeClock:
    """Time that passes only where someone sleeps."""

    def __init__(self, monkeypatch) -> None:
        self.now = 1000.0
        self.slept: list[float] = []
        monkeypatch.setattr(client, "clock", lambda: self.now)
        monkeypatch.setattr(client, "sleep", self.sleep)

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


def write_config(folder: Path, **keys) -> Path:
    path = folder / "digest.yaml"
    values = {"categories": ["cs.LG"], "terms": ["training", "train"]} | keys
    path.write_text(yaml.safe_dump(values, allow_unicode=True), encoding="utf-8")
    return path


def with_stub(stub: Stub, **keys) -> dict:
    """Configuration keys that send every request to a stub."""
    summaries = {"model": "m1", "base_url": f"{stub.url}/v1", "api_key_env": ""}
    urls = {"feeds_url": f"{stub.url}/rss", "pages_url": stub.url}
    return urls | {"summaries": summaries | keys.pop("summaries", {})} | keys


def run(*words: object, cwd: Path | None = None) -> tuple[int, str]:
    """The program as a user starts it: exit code, and what it printed on both streams."""
    command = [sys.executable, "-c", "from sememe_digest.cli import main; main()"]
    done = subprocess.run(
        [*command, *map(str, words)], capture_output=True, text=True, timeout=120, cwd=cwd
    )
    return done.returncode, done.stderr + done.stdout


def digest(monkeypatch, *words: object) -> tuple[int, str]:
    """The same within this process, so that its clock can be another."""
    import contextlib
    import io

    from sememe_digest import cli

    output = io.StringIO()
    monkeypatch.setattr(sys, "argv", ["sememe-digest", *map(str, words)])
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        try:
            cli.main()
        except SystemExit as stop:
            return int(stop.code or 0), output.getvalue()
    raise AssertionError("main ends with an exit code")


def day(site: Path, date: str = "2026-02-17") -> dict:
    return json.loads((site / "archive" / f"{date}.json").read_text(encoding="utf-8"))


def snapshot(folder: Path) -> dict[str, bytes]:
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def outputs(site: Path) -> dict[str, str]:
    """The four kinds of output that show a summary."""
    names = ("README.md", "index.html", "archive/2026-02-17.json", "feed.xml")
    return {name: (site / name).read_text(encoding="utf-8") for name in names}


def blocks(markdown: str) -> dict[str, str]:
    """The paper blocks of a README by id, without rank and summary."""
    body = markdown.split("## 📚 Recent Papers")[1].split("## 🔧 Configuration")[0]
    found = {}
    for block in re.split(r"(?m)^(?=### \d+\. \[)", body)[1:]:
        block = re.sub(r"<details>.*?</details>\n\n", "", block, flags=re.S)
        identifier = re.search(r"ArXiv ID\*\*: (\S+)", block)[1]
        found[identifier] = re.sub(r"^### \d+\.", "### N.", block)
    return found
