"""Papers, entries of a digest and its days: the JSON schema of the archive."""

from typing import Literal

from pydantic import BaseModel, Field

STRENGTH = {"new": 4, "cross": 3, "replace": 2, "replace-cross": 1, "": 0}
"""Announce types from the strongest to none. A paper has the strongest over all feeds."""

SECTIONS = {
    "Contribution": ("problem", "method", "advantage"),
    "Experiments": ("data", "settings", "baselines"),
    "Results": ("key_results", "comparison", "ablation"),
    "Conclusions": ("findings", "limits", "future"),
}
"""The structure of a summary: four sections of three fields, each a list of claims."""


class Author(BaseModel):
    """A name and, where the feed has one, an affiliation."""

    name: str
    affiliation: str = ""


class Paper(BaseModel):
    """One item of a feed: title, abstract and names in TeX, as arXiv sends them."""

    id: str
    version: int = 1
    title: str
    abstract: str
    creator: str = ""
    categories: list[str] = []
    type: str = ""
    license: str = ""
    doi: str = ""
    journal_reference: str = ""

    @property
    def primary(self) -> str:
        """The primary class, which arXiv lists first."""
        return self.categories[0] if self.categories else ""

    @property
    def versioned_id(self) -> str:
        return f"{self.id}v{self.version}"

    @property
    def url(self) -> str:
        return f"https://arxiv.org/abs/{self.id}"


class Hit(BaseModel):
    """A term that a paper matches, and whether its title does."""

    term: str
    weight: float = 1.0
    in_title: bool = False


class NumberCheck(BaseModel):
    """A number of a claim: on the page that the claim names, on another one, or nowhere."""

    text: str
    state: Literal["found", "elsewhere", "missing"]
    page: int | None = None


class Claim(BaseModel):
    """One statement of a summary, with the page and the words that it rests on."""

    text: str
    page: int | None = None
    quote: str = ""
    quote_found: bool = False
    numbers: list[NumberCheck] = []


class Summary(BaseModel):
    """A language model's summary after its check against the text of the paper."""

    key: str
    model: str
    sentence: Claim
    sections: dict[str, dict[str, list[Claim]]]
    missing_headlines: list[str] = []
    removed: list[str] = []

    def claims(self) -> list[Claim]:
        fields = [field for section in self.sections.values() for field in section.values()]
        return [self.sentence, *(claim for field in fields for claim in field)]

    def count(self, *states: str) -> int:
        """Numbers in these states; all of them without one."""
        numbers = [number for claim in self.claims() for number in claim.numbers]
        return sum(number.state in states for number in numbers) if states else len(numbers)


class Entry(Paper):
    """A paper of a digest: its rank, why it is there, and text without TeX."""

    rank: int = 0
    score: float
    similarity: float | None = None
    hits: list[Hit] = []
    title_text: str = ""
    abstract_text: str = ""
    authors: list[Author] = []
    summary: Summary | None = None
    failure: str | None = None


class Verdict(BaseModel):
    """What became of an announced paper: for `why`, and so that no later day shows it again."""

    category: str
    score: float = 0
    terms: list[str] = []
    excluded: str | None = None


class FeedState(BaseModel):
    """How the reading of one class went: `announced` is arXiv's own count of its new papers."""

    category: str
    state: Literal["read", "empty", "stale", "listing", "failed"]
    note: str = ""
    announced: int = 0
    etag: str = ""


class Counts(BaseModel):
    """Papers of one primary class, from announced to summarised."""

    announced: int = 0
    new: int = 0
    matching: int = 0
    shown: int = 0
    summarised: int = 0


class Day(BaseModel):
    """One digest: all that its pages are made of."""

    date: str
    updated: str
    settings: str = ""
    feeds: list[FeedState] = []
    counts: dict[str, Counts] = {}
    notes: list[str] = []
    cut_score: float | None = None
    tied_out: int = 0
    entries: list[Entry] = []
    announced: dict[str, Verdict] = Field(default={}, repr=False)

    @property
    def feeds_complete(self) -> bool:
        return all(feed.state in ("read", "empty", "listing") for feed in self.feeds)
