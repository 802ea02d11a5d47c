"""The PDF of a paper to the text of its pages, without what no reader sees.

Run as a module it reads one file, in a process that can be stopped: some PDFs hang a parser."""

import json
import re
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from math import hypot
from pathlib import Path

from sememe_digest.client import Client
from sememe_digest.errors import DigestError, Unreachable, Unreadable
from sememe_digest.papers import Paper

PDF_PAUSE_SECONDS = 15.0  # the crawl delay of arxiv.org
MAX_PDF_BYTES = 50 * 2**20
MAX_MEMORY_BYTES = 2 * 2**30
EXTRACTION_SECONDS = 60
SMALLEST_POINTS = 3.0  # nothing smaller is meant to be read by people
REFERENCES = re.compile(r"^[\s\d.]*(references|bibliography)\s*$", re.I | re.M)
# Sentences that speak to a language model, and answers that obey them. Papers about such attacks
# lose a sentence too; it is reported.
INSTRUCTION = re.compile(
    r"\b(ignore|disregard|forget)\b.{0,60}\b(instructions?|prompts?|above|previous)\b"
    r"|\bas an? (ai|large|language)\b.{0,12}\bmodel\b"
    r"|\b(positive|favou?rable) review"
    r"|\b(must|should|recommend|strongly) (be )?accept(ed|ance)?\b"
    r"|\bdo not (mention|highlight|report|list) (any )?(negative|weakness|flaw|limitation)"
    r"|\b(ai|llm|language model)s?( reviewers?| assistants?)?[,:] ",
    re.I | re.S,
)


@dataclass
class FullText:
    """Text by page, and what was taken out of it before a language model saw it."""

    pages: list[str]
    removed: list[str] = field(default_factory=list)


def fetch_pdf(client: Client, paper: Paper, pages_url: str, folder: Path) -> Path:
    """The PDF of one version, from the cache or from arXiv; never published."""
    path = folder / f"{paper.versioned_id.replace('/', '_')}.pdf"
    if path.exists():
        return path
    # Without the suffix: arXiv's edge answers 406 to /pdf/ID.pdf.
    url = f"{pages_url}/pdf/{paper.versioned_id}"
    answer = client.get(url, pause=PDF_PAUSE_SECONDS, max_bytes=MAX_PDF_BYTES)
    if answer.status != 200:
        need = "need status 200. try: again later"
        raise Unreachable(f"{url} answered with status {answer.status}: {need}")
    if not answer.body.startswith(b"%PDF"):
        kind = "HTML" if b"<html" in answer.body[:1000].lower() else "something else"
        raise Unreadable(f"{url} is {kind}: need a PDF. try: again later")
    folder.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_bytes(answer.body)
    part.replace(path)
    return path


def read_pdf(path: Path) -> FullText:
    """The text of a PDF, read in a process of its own with limits on time and memory."""
    command = [sys.executable, "-m", "sememe_digest.fulltext", str(path)]
    need = "need a PDF with text. try: nothing, its abstract stands in the digest"
    try:
        done = subprocess.run(command, capture_output=True, timeout=EXTRACTION_SECONDS)
    except subprocess.TimeoutExpired as error:
        message = f"{path.stem} takes over {EXTRACTION_SECONDS} s to read: {need}"
        raise Unreadable(message) from error
    if done.returncode:
        lines = done.stderr.decode(errors="replace").strip().splitlines()
        raise Unreadable(f"{path.stem} cannot be read ({lines[-1] if lines else 'killed'}): {need}")
    return FullText(**json.loads(done.stdout))


def extract(path: Path) -> FullText:
    """Pages up to the references, without tiny text and without sentences to a language model."""
    from pypdf import PdfReader

    reader = PdfReader(path)
    if reader.is_encrypted and not reader.decrypt(""):
        raise DigestError("it is encrypted")
    result = FullText([])
    for number, page in enumerate(reader.pages, 1):
        visible: list[str] = []
        tiny: list[str] = []

        def visit(text, cm, tm, font, size, visible=visible, tiny=tiny):
            # The height of the font on the page: PDFs scale by either matrix.
            across = tm[2] * cm[0] + tm[3] * cm[2]
            up = tm[2] * cm[1] + tm[3] * cm[3]
            small = text.strip() and abs(size) * hypot(across, up) < SMALLEST_POINTS
            (tiny if small else visible).append(text)

        page.extract_text(visitor_text=visit)
        report(result.removed, number, f"text under {SMALLEST_POINTS:g} pt", "".join(tiny))
        result.pages.append(_without_instructions("".join(visible), number, result.removed))
    if not "".join(result.pages).strip():
        raise DigestError("it has no text")
    return _without_references(result)


def report(removed: list[str], page: int, kind: str, text: str) -> None:
    """Notes a removal by its first words alone: the rest would get the stage that it wants."""
    words = text.split()
    if len(words) >= 4:  # labels of a plot are no news
        removed.append(f"page {page}, {kind}: “{' '.join(words[:3])[:40]} …” ({len(words)} words)")


def _without_instructions(text: str, page: int, removed: list[str]) -> str:
    sentences = re.split(r"(?<=[.!?])(?=\s)", text)
    for sentence in filter(INSTRUCTION.search, sentences):
        report(removed, page, "words to a language model", sentence)
    return "".join(sentence for sentence in sentences if not INSTRUCTION.search(sentence))


def _without_references(result: FullText) -> FullText:
    for index in range(len(result.pages) - 1, 0, -1):
        if match := REFERENCES.search(result.pages[index]):
            result.pages[index:] = [result.pages[index][: match.start()]]
            break
    return result


if __name__ == "__main__":
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))
    except ImportError:  # Windows has no such limit
        pass
    print(json.dumps(asdict(extract(Path(sys.argv[1])))))
