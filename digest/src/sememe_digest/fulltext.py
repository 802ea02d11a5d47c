"""The PDF of a paper to the text of its pages, without what no reader sees.

As a module it reads one file, in a process that can be stopped: some PDFs hang a parser."""

import json
import re
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from math import hypot
from pathlib import Path

from sememe_digest.client import Client
from sememe_digest.errors import DigestError, Unread
from sememe_digest.papers import Paper

PDF_PAUSE_SECONDS = 15.0  # the crawl delay of arxiv.org
MAX_PDF_BYTES = 50 * 2**20
MAX_MEMORY_BYTES = 2 * 2**30
EXTRACTION_SECONDS = 60
SMALLEST_POINTS = 3.0  # nothing smaller is meant to be read by people
REFERENCES = re.compile(r"^[\s\d.]*(references|bibliography)\s*$", re.I | re.M)
# Sentences that speak to a language model, and answers that obey them. A paper about such attacks
# loses a sentence too; it is reported.
INSTRUCTION = re.compile(
    r"\b(ignore|disregard|forget)\b.{0,60}\b(instruction|prompt|above|previous)"
    r"|\bas an? (ai|large|language)\b.{0,12}\bmodel\b|\b(ai|llm|model)s? reviewers?[,:]"
    r"|\b(positive|favou?rable) review|\b(must|should|strongly|recommend) (be )?accept"
    r"|\bdo not (mention|highlight|report|list) (any )?(negative|weakness|flaw|limitation)",
    re.I | re.S,
)


@dataclass
class FullText:
    """Text by page, and what was taken out of it before a language model saw it."""

    pages: list[str] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)

    def remove(self, kind: str, text: str) -> None:
        """Reports a removal by its first words: more would be the stage that it wants."""
        words = text.split()
        if len(words) > 3:  # labels in a plot are no news
            start = f"“{' '.join(words[:3]):.40} …”, {len(words)} words"
            self.removed.append(f"{kind} on page {len(self.pages) + 1} ({start})")


def fetch_pdf(client: Client, paper: Paper, pages_url: str, folder: Path) -> Path:
    """The PDF of one version, from the cache or from arXiv; it is never published."""
    path = folder / f"{paper.versioned_id.replace('/', '_')}.pdf"
    if not path.exists():
        # Without the suffix .pdf, to which arXiv's edge answers 406.
        url = f"{pages_url}/pdf/{paper.versioned_id}"
        answer = client.get(url, pause=PDF_PAUSE_SECONDS, limit=MAX_PDF_BYTES)
        if answer.status_code != 200 or not answer.content.startswith(b"%PDF"):
            kind = "HTML" if b"<html" in answer.content[:1000].lower() else "no PDF"
            raise Unread(f"{url} got {kind}, status {answer.status_code}: need a PDF. try: later")
        folder.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".part").write_bytes(answer.content)
        path.with_suffix(".part").replace(path)
    return path


def read_pdf(path: Path) -> FullText:
    """The text of a PDF, read in a process of its own with limits on time and memory."""
    command = [sys.executable, "-m", "sememe_digest.fulltext", str(path)]
    try:
        done = subprocess.run(command, capture_output=True, timeout=EXTRACTION_SECONDS, check=True)
        return FullText(**json.loads(done.stdout))
    except subprocess.TimeoutExpired:
        got = f"no text within {EXTRACTION_SECONDS} s"
    except subprocess.CalledProcessError as error:
        got = (error.stderr.decode(errors="replace").strip().splitlines() or ["a crash"])[-1]
    raise Unread(f"{path.name} got {got:.200}: need a PDF with text. try: its abstract page")


def extract(path: Path) -> FullText:
    """Pages up to the references, without tiny text and without sentences to a language model."""
    from pypdf import PdfReader

    reader = PdfReader(path)
    if reader.is_encrypted and not reader.decrypt(""):
        raise DigestError("encrypted")
    result = FullText()
    for page in reader.pages:
        pieces: dict[bool, list[str]] = {True: [], False: []}

        def visit(text, cm, tm, font, size, pieces=pieces):
            # The height of the font on the page: PDFs scale by either matrix.
            x, y = tm[2] * cm[0] + tm[3] * cm[2], tm[2] * cm[1] + tm[3] * cm[3]
            is_tiny = bool(text.strip()) and abs(size) * hypot(x, y) < SMALLEST_POINTS
            pieces[is_tiny].append(text)

        page.extract_text(visitor_text=visit)
        result.remove(f"text under {SMALLEST_POINTS:g} pt", "".join(pieces[True]))
        sentences = re.split(r"(?<=[.!?])(?=\s)", "".join(pieces[False]))
        for sentence in filter(INSTRUCTION.search, sentences):
            result.remove("words to a language model", sentence)
        result.pages.append("".join(s for s in sentences if not INSTRUCTION.search(s)))
    for index in range(len(result.pages) - 1, 0, -1):
        if match := REFERENCES.search(result.pages[index]):
            result.pages[index:] = [result.pages[index][: match.start()]]
            break
    if not "".join(result.pages).strip():
        raise DigestError("no text at all")
    return result


if __name__ == "__main__":
    if sys.platform != "win32":
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))
    print(json.dumps(asdict(extract(Path(sys.argv[1])))))
