"""The text of papers: TeX as arXiv sends it, and PDFs without what no reader sees."""

import json
import re
import subprocess
import sys
from contextlib import suppress
from math import hypot
from pathlib import Path

from sememe_digest import DigestError
from sememe_digest.client import Client
from sememe_digest.papers import Paper, write

PDF_PAUSE_SECONDS = 15.0  # the crawl delay of arxiv.org
MAX_PDF_BYTES = 50 * 2**20
EXTRACTION_SECONDS = 60
SMALLEST_POINTS = 3.0  # nothing smaller is meant to be read by people
MARKUP = re.compile(r"[\\${}~^]|--|``|''")  # what makes a line of text TeX
REFERENCES = re.compile(r"^[\s\d.]*(references|bibliography)\s*$", re.I | re.M)
# Sentences to a language model, and answers that obey. A paper on such attacks loses some, too.
INSTRUCTION = re.compile(
    r"(?is)\b(ignore|disregard|forget)\b.{0,60}\b(instruction|prompt|above|previous)"
    r"|\bas an? (ai|large|language)\b.{0,12}\bmodel\b|\b(ai|llm|model)s? reviewers?[,:]"
    r"|\b(positive|favou?rable) review|\b(must|should|strongly|recommend) (be )?accept"
    r"|\bdo not (mention|highlight|report|list) (any )?(negative|weakness|flaw|limitation)"
)


def to_text(tex: str) -> str:
    """Text without TeX; what cannot be read stays as it is."""
    from pylatexenc.latex2text import LatexNodes2Text

    lines = tex.split("\n")
    for number, line in enumerate(lines):
        # To TeX a bare % starts a comment, and & is a tab; in a feed they are what they look like.
        escaped = re.sub(r"(?<!\\)[%&#]", r"\\\g<0>", line)
        # IndexError and more on unbalanced input: raw text is better than none.
        with suppress(Exception):
            if MARKUP.search(line):
                text = LatexNodes2Text(math_mode="text").latex_to_text(escaped)
                lines[number] = " ".join(text.split())
    return "\n".join(lines)


def authors(creator: str) -> list[dict[str, str]]:
    """Names and affiliations of a feed's one line, whose commas also stand inside parentheses."""
    people = []
    for part in re.findall(r"(?:\([^()]*(?:\([^()]*\)[^()]*)*\)|[^,])+", creator):
        name, _, affiliation = to_text(part).strip().removesuffix(")").partition(" (")
        # Collaborations come as `NVIDIA,  :, First Author`.
        if name.strip(" :"):
            people.append({"name": name, "affiliation": affiliation})
    return people


def fetch_pdf(client: Client, paper: Paper, pages_url: str, cache: Path) -> Path:
    """The PDF of one version, from the cache or from arXiv; it is never published."""
    path = cache / "pdf" / f"{paper.versioned_id.replace('/', '_')}.pdf"
    if not path.exists():
        # Without the suffix .pdf, to which arXiv's edge answers 406.
        url = f"{pages_url}/pdf/{paper.versioned_id}"
        answer = client.get(url, pause=PDF_PAUSE_SECONDS, limit=MAX_PDF_BYTES)
        if answer.status_code != 200 or not answer.content.startswith(b"%PDF"):
            raise DigestError(f"{url} got no PDF, status {answer.status_code}", "a PDF")
        write(path, answer.content)
    return path


def read_pdf(path: Path) -> tuple[list[str], list[str]]:
    """What `extract` finds, in a process with a time limit: some PDFs hang pypdf."""
    command = [sys.executable, "-m", "sememe_digest.fulltext", str(path)]
    try:
        done = subprocess.run(command, capture_output=True, timeout=EXTRACTION_SECONDS, check=True)
        pages, removed = json.loads(done.stdout)
        if "".join(pages).strip():
            return pages, removed
        got = "no text at all"
    except subprocess.TimeoutExpired:
        got = f"no text within {EXTRACTION_SECONDS} s"
    except subprocess.CalledProcessError:
        got = "a damaged or encrypted file"
    raise DigestError(f"{path.name} got {got}", "a PDF with text", "its abstract page")


def extract(path: Path) -> tuple[list[str], list[str]]:
    """Pages up to the references without what is not meant for readers, and reports of that."""
    from pypdf import PdfReader

    texts, reports = list[str](), list[str]()
    for number, page in enumerate(PdfReader(path).pages, 1):
        pieces: dict[bool, list[str]] = {True: [], False: []}

        def visit(text, cm, tm, font, size, pieces=pieces):
            # The height of the font on the page: PDFs scale by either matrix.
            x, y = tm[2] * cm[0] + tm[3] * cm[2], tm[2] * cm[1] + tm[3] * cm[3]
            is_tiny = bool(text.strip()) and abs(size) * hypot(x, y) < SMALLEST_POINTS
            pieces[is_tiny].append(text)

        page.extract_text(visitor_text=visit)
        sentences = re.split(r"(?<=[.!?])(?=\s)", "".join(pieces[False]))
        removed = [(f"text under {SMALLEST_POINTS:g} pt", "".join(pieces[True]))]
        spoken = [sentence for sentence in sentences if INSTRUCTION.search(sentence)]
        for kind, text in removed + [("words to a language model", text) for text in spoken]:
            # By its first words: more would be the stage that it wants. Labels are no news.
            if len(words := text.split()) > 3:
                start = f"“{' '.join(words[:3]):.40} …”, {len(words)} words"
                reports.append(f"{kind} on page {number} ({start})")
        texts.append("".join(sentence for sentence in sentences if sentence not in spoken))
    for index in range(len(texts) - 1, 0, -1):
        if match := REFERENCES.search(texts[index]):
            return [*texts[:index], texts[index][: match.start()]], reports
    return texts, reports


if __name__ == "__main__":
    print(json.dumps(extract(Path(sys.argv[1]))))
