"""Numbers of a text, and whether a paper contains those that a summary states."""

import re
import unicodedata
from decimal import Decimal

from sememe_digest.papers import Claim, NumberCheck

# 1,234.5 · .46 · 1e-7 · 3 × 10^-4; the sign is looked at apart.
NUMBER = re.compile(
    r"(?<![\w.])(?:[A-Za-z]+-?)?"
    r"(?P<digits>\d{1,3}(?:[,  ]\d{3})+(?![\d])(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)"
    r"(?:[eE](?P<exponent>[-+]?\d+)\b|\s?[×x·]\s?10\s?\^?\s?\{?(?P<power>[-+]?\d+)\}?)?"
)
NAMED = re.compile(
    r"\b(?:tables?|tab\.|figures?|figs?\.|sections?|sec\.|equations?|eqs?\.|appendix|theorems?|"
    r"lemmas?|algorithms?|chapters?|pages?|p\.|steps?|arxiv:)\s*\(?$",
    re.I,
)
YEAR = re.compile(r"(?:19|20[0-3])\d\d")
HEADLINE = re.compile(r"(?<![\w.])[-+]?\d[\d,]*(?:\.\d+)?\s?(?:\\?%|[×x](?!\w)|\\times)|\d+\.\d+")
MINUS = str.maketrans("−–‐‑‒—", "------")


def plain(text: str) -> str:
    """Text with one form of minus, ligatures apart, and words that a line end cut joined again."""
    text = unicodedata.normalize("NFKC", text.translate(MINUS)).translate(MINUS)
    text = text.replace("\\%", "%").replace("\\times", "×").replace("$", "")
    text = re.sub(r"(?<=[^\W\d_])-\s*\n\s*(?=[^\W\d_])", "", text)
    return re.sub(r"(?<=\d[.,])\s*\n\s*(?=\d)", "", text)


def find_numbers(text: str) -> list[tuple[str, Decimal]]:
    """Numbers as written and as values; a minus counts where it is not a hyphen or a range."""
    text = plain(text)
    found = []
    for match in NUMBER.finditer(text):
        value = Decimal(re.sub(r"[^\d.]", "", match["digits"]))
        exponent = match["exponent"] or match["power"]
        if exponent and len(exponent) < 5:
            value = value.scaleb(int(exponent))
        start = match.start("digits")
        negative = bool(re.search(r"(?:^|[\s(\[=,:~≈<>])-\s?$", text[max(0, start - 3) : start]))
        written = text[start : match.end()].strip()
        found.append((f"-{written}" if negative else written, -value if negative else value))
    return found


def values(text: str) -> set[Decimal]:
    """Every value that stands in a text, `a - 5` read both as a difference and as minus five."""
    numbers = {value.normalize() for _, value in find_numbers(text)}
    return numbers | {abs(number) for number in numbers}


def _exempt(text: str, written: str, start: int) -> bool:
    """Years, and numbers of tables, sections and list items, which say nothing to check."""
    before, after = text[:start], text[start + len(written) :]
    if YEAR.fullmatch(written) and not re.match(r"\s?(%|[×x]\b|\.\d)", after):
        return True
    return bool(NAMED.search(before)) or (not before.strip(" (") and after[:1] in (")", "."))


def stated_numbers(text: str) -> list[tuple[str, Decimal]]:
    """The numbers of a claim that a paper must contain."""
    text, position, stated = plain(text), 0, []
    for written, value in find_numbers(text):
        start = text.find(written.lstrip("-"), position)
        position = start + 1
        if not _exempt(text, written, start):
            stated.append((written, value.normalize()))
    return stated


def _squeeze(text: str) -> str:
    return "".join(re.findall(r"\w+", plain(text).lower()))


def check_claim(claim: Claim, pages: list[str]) -> None:
    """Fills in whether the quote and each number of a claim stand where it says."""
    by_page = [values(page) for page in pages]
    stated = pages[claim.page - 1] if claim.page and 0 < claim.page <= len(pages) else ""
    quote = _squeeze(claim.quote)
    claim.quote_found = bool(quote) and quote in _squeeze(stated)
    claim.numbers = []
    for written, value in stated_numbers(claim.text):
        on = [number for number, found in enumerate(by_page, 1) if value in found]
        if claim.page in on:
            check = NumberCheck(text=written, state="found", page=claim.page)
        elif on:
            check = NumberCheck(text=written, state="elsewhere", page=on[0])
        else:
            check = NumberCheck(text=written, state="missing")
        claim.numbers.append(check)


def missing_headlines(abstract: str, stated: set[Decimal]) -> list[str]:
    """Figures that an abstract makes its point with (x %, x×, decimals) and a summary leaves out."""
    headlines = [match.group() for match in HEADLINE.finditer(plain(abstract))]
    return [text.strip() for text in headlines if not values(text) <= stated | {-v for v in stated}]
