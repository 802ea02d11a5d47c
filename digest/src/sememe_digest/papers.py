"""Papers, entries of a digest and its days: the JSON schema of the archive."""

from typing import Any

from pydantic import BaseModel

# The structure of a summary: four sections of three fields, each a list of claims.
SECTIONS = {
    "Contribution": ("problem", "method", "advantage"),
    "Experiments": ("data", "settings", "baselines"),
    "Results": ("key_results", "comparison", "ablation"),
    "Conclusions": ("findings", "limits", "future"),
}


class Paper(BaseModel):
    """One item of a feed; title, abstract and names are TeX, as arXiv sends them."""

    id: str
    version: int = 1
    title: str
    abstract: str
    creator: str = ""
    categories: list[str] = []  # the primary class first
    type: str = ""

    @property
    def primary(self) -> str:
        return self.categories[0] if self.categories else ""

    @property
    def versioned_id(self) -> str:
        return f"{self.id}v{self.version}"


class Claim(BaseModel):
    """One statement of a summary, with the page and the words that it rests on."""

    field: str  # one of SECTIONS, or "sentence"
    text: str
    page: int | None = None
    quote: str = ""
    quote_found: bool = False
    # Of each number its text, its state (found, elsewhere, missing) and a page that has it.
    numbers: list[dict[str, Any]] = []


class Summary(BaseModel):
    """A language model's summary after its check against the text of the paper."""

    key: str = ""
    model: str = ""
    claims: list[Claim] = []
    missing_headlines: list[str] = []
    removed: list[str] = []

    def numbers(self, state: str = "") -> list[str]:
        """The numbers of all claims, or those in one state."""
        numbers = (number for claim in self.claims for number in claim.numbers)
        return [number["text"] for number in numbers if state in ("", number["state"])]


class Entry(Paper):
    """A ranked paper: what it is worth and why, and where it is shown, text without TeX."""

    rank: int = 0
    score: float
    similarity: float | None = None
    hits: list[dict[str, Any]]  # term, weight, in_title
    excluded: str | None
    title_text: str = ""
    abstract_text: str = ""
    authors: list[dict[str, str]] = []  # name and affiliation
    summary: Summary | None = None
    failure: str | None = None


class Day(BaseModel):
    """One digest: all that its pages are made of."""

    date: str = ""
    updated: str
    settings: str  # a hash of what decides the papers
    feeds: dict[str, str] = {}  # by class: read, listing, stale or failed
    faults: list[str] = []  # of feeds, in one sentence each
    counts: dict[str, dict[str, int]] = {}
    cut_score: float | None = None
    tied_out: int = 0  # papers that are worth as much as the last one and are not shown
    entries: list[Entry] = []
    announced: dict[str, dict] = {}  # every paper by id: class, score, terms, excluded

    def is_complete(self) -> bool:
        return not {"stale", "failed"} & {*self.feeds.values()}
