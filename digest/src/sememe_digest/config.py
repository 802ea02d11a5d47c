"""What `digest.yaml` holds: every key with its default, its meaning and its check."""

import re
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, Field, ValidationError, model_validator

from sememe_digest import DigestError


def _as_terms(value: Any) -> Any:
    """Terms as people write them, `- word` or `- word: 2`, with what a hit of each is worth."""
    terms: dict[str, Any] = {}
    for item in value if isinstance(value, list) else [value]:
        for term, weight in item.items() if isinstance(item, dict) else [(item, 1.0)]:
            if not re.search(r"[^\W_]", f"{term}"):
                raise ValueError(f"a letter or a digit in {term!r}")
            terms[f"{term}"] = weight
    return terms


Terms = Annotated[dict[str, float], BeforeValidator(_as_terms)]
Category = Annotated[str, Field(pattern=r"^[a-z]+(-[a-z]+)*(\.[A-Za-z-]+)?$")]


class Summaries(BaseModel, extra="forbid"):
    """A model behind any `/v1/chat/completions`; without `model` there are no summaries."""

    model: str = ""
    base_url: str = "https://api.openai.com/v1"
    api_key_env: str = "OPENAI_API_KEY"
    count: int = Field(15, ge=0)
    workers: int = Field(3, ge=1, le=16)
    language: str = "English"
    prompt: Path | None = None
    max_characters: int = Field(120_000, ge=2000)
    timeout: float = Field(300, ge=1)


class Config(BaseModel, extra="forbid"):
    """One digest."""

    title: str = "arXiv digest"
    url: str = ""
    contact: str = ""
    categories: list[Category] = []
    types: list[Literal["new", "cross"]] = ["new"]
    terms: Terms = {}
    match: Literal["word", "substring"] = "word"
    exclude: Terms = {}
    exclude_in: Literal["title", "title+abstract"] = "title"
    interests: str = ""
    # With terms alone a paper without a hit is noise; with interests it may still be near.
    min_score: float = Field(default_factory=lambda data: 0.0 if data.get("interests") else 1.0)
    limit: int = Field(30, ge=1, le=500)
    out: Path = Path("site")
    summaries: Summaries = Summaries()
    feeds_url: str = "https://rss.arxiv.org/rss"  # another one is a mirror
    pages_url: str = "https://arxiv.org"

    @model_validator(mode="after")
    def _has_a_subject(self) -> "Config":
        if not self.categories or not (self.terms or self.interests.strip()):
            raise ValueError("categories, and terms or interests to look for in them")
        return self

    def prompt(self) -> str:
        """The instructions for the language model, the user's own or those of the package."""
        path = self.summaries.prompt or files("sememe_digest") / "templates" / "prompt.txt"
        text = path.read_bytes().decode(errors="replace")
        return text.replace("{language}", self.summaries.language)

    def home(self, category: str) -> str:
        """The monitored class, or the archive (`cs`), of a primary class; else "other"."""
        names = (category, category.split(".")[0])
        return next((name for name in names if name in self.categories), "other")


def read_config(path: Path, out: Path | None = None) -> Config:
    """The configuration in a YAML file; paths in it are relative to the working directory."""
    try:
        config = Config.model_validate(yaml.safe_load(path.read_bytes()))
        config.out = out or config.out
        return config
    except ValidationError as error:
        fault = error.errors()[0]
        got = f"{fault['input']!r:.60} for {'.'.join(map(str, fault['loc'])) or 'its keys'}"
        need = fault.get("ctx", {}).get("error", "a known key and a value that suits it")
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        got, need = f"no YAML{f' in line {mark.line + 1}' if mark else ''}", "keys and their values"
    raise DigestError(f"{path} got {got}", f"{need}", "the file that `sememe-digest init` writes")
