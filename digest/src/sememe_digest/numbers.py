"""Numbers of a text, and whether a paper contains those that a summary states."""

import re
import unicodedata
from collections.abc import Iterator
from decimal import Decimal
from functools import lru_cache

from sememe_digest.papers import Claim, Summary

MAX_MISSING = 0.2  # of a summary's numbers, before it is asked for once more

# 1,234.5 · .46 · 1e-7, also behind a word as in Llama-3.1; the sign is apart.
NUMBER = re.compile(
    r"(?<![\w.])(?:[A-Za-z]+-?)?(?P<digits>\d{1,3}(?:,\d{3})+(?!\d)(?:\.\d+)?|\d*\.?\d+)"
    r"(?:[eE](?P<exponent>[-+]?\d{1,3})\b)?"
)
POWER = re.compile(r"\s?[×x·]\s?10\s?(?:\^\s?\{?|(?=-))(-?\d{1,2})\}?")
NEGATIVE = re.compile(r"(?:^|[\s(\[=,:~≈<>±])-\s?$")
# What stands before a number that names something, which says nothing to check.
NAMED = re.compile(
    r"(?i)\b(tab(le)?|fig(ure)?|sec(tion)?|eq(uation)?|appendix|theorem|lemma|algorithm|chapter|"
    r"page|step|arxiv)s?[.:]?\s*\(?$"
)
LIST_ITEM = re.compile(r"^\s*\(?\d{1,2}[.)]\s")
YEAR = re.compile(r"(?:19\d\d|20[0-3]\d)(?!\d|[.,]\d|\s?[%×x])")
HEADLINE = re.compile(r"(?<![\w.])(?<![A-Za-z]-)-?(\d[\d,]*(\.\d+)?\s?(%|[×x](?!\w))|\d+\.\d+)")


def plain(text: str) -> str:
    """Text with one form of minus and of powers of ten, without TeX's signs and cut words."""
    text = re.sub("[−–‐‑‒—]", "-", unicodedata.normalize("NFKC", text))
    text = text.replace("\\%", "%").replace("\\times", "×").replace("$", "")
    text = re.sub(r"\b10\^\{?(-?\d{1,2})\}?", r"1e\1", POWER.sub(r"e\1", text))
    return re.sub(r"(?<=[^\W\d_])-\s*\n\s*(?=[^\W\d_])", "", text)


def find_numbers(text: str) -> Iterator[tuple[int, str, Decimal]]:
    """Start, spelling and value of each number of a plain text; a hyphen or range is no minus."""
    for match in NUMBER.finditer(text):
        start = match.start("digits")
        value = Decimal(match["digits"].replace(",", "")).scaleb(int(match["exponent"] or 0))
        sign = "-" if NEGATIVE.search(text[max(0, start - 3) : start]) else ""
        yield start, sign + text[start : match.end()], (-value if sign else value).normalize()


@lru_cache(500)
def values(text: str) -> set[Decimal]:
    """Every value that a text can be read to have: `a - 5` is a difference or minus five, and a
    number at a line end may go on in the next line."""
    joined = re.sub(r"(?<=\d)([.,]?)\s*\n\s*([.,]?)(?=\d)", r"\1\2", text)
    found = {value for part in (text, joined) for *_, value in find_numbers(plain(part))}
    return found | {abs(value) for value in found}


def check(summary: Summary, abstract: str, pages: list[str]) -> str:
    """Compares a summary with its paper; what is wrong, in words for the model."""
    for claim in summary.claims:
        check_claim(claim, pages)
    summary.missing_headlines = missing_headlines(abstract, summary.claims)
    missing, fault = summary.numbers("missing"), ""
    if len(missing) > MAX_MISSING * len(summary.numbers()):
        fault = f"The paper does not contain these numbers: {', '.join(missing)}. "
    if summary.missing_headlines:
        fault += f"The abstract also states {', '.join(summary.missing_headlines)}."
    return fault


def check_claim(claim: Claim, pages: list[str]) -> None:
    """Fills in whether the quote and each number of a claim stand where it says."""
    stated = dict(enumerate(pages, 1)).get(claim.page or 0, "")
    quote, page = ("".join(re.findall(r"\w+", plain(t).lower())) for t in (claim.quote, stated))
    claim.quote_found = bool(claim.quote) and quote in page
    text, found = LIST_ITEM.sub("", plain(claim.text)), [values(page) for page in pages]
    for start, written, value in find_numbers(text):
        if YEAR.match(text, start) or NAMED.search(text[:start]):
            continue
        pages_with_it = [number for number, page in enumerate(found, 1) if value in page]
        page = claim.page if claim.page in pages_with_it else next(iter(pages_with_it), None)
        state = "missing" if page is None else "found" if page == claim.page else "elsewhere"
        claim.numbers.append({"text": written, "state": state, "page": page})


def missing_headlines(abstract: str, claims: list[Claim]) -> list[str]:
    """Figures that make an abstract's point (x %, x×, decimals) and that no claim states."""
    stated = {abs(value) for claim in claims for value in values(claim.text)}
    headlines = [match.group().strip() for match in HEADLINE.finditer(plain(abstract))]
    return [text for text in headlines if not {abs(value) for value in values(text)} <= stated]
