"""What `digest.yaml` holds: every key with its default, its meaning and its check."""

import re
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from sememe_digest.errors import ConfigError

CATEGORY = r"^[a-z]+(-[a-z]+)*(\.[A-Za-z-]+)?$"


class Term(BaseModel):
    """A word, `prefix*` or "several words", and what a hit is worth."""

    model_config = ConfigDict(extra="forbid")
    text: str
    weight: float = 1.0


def as_terms(value: Any) -> Any:
    """Terms as people write them: `- word`, or `- word: 2` for one that weighs 2."""
    if isinstance(value, dict):
        value = [{key: weight} for key, weight in value.items()]
    if not isinstance(value, list):
        return value
    terms = []
    for item in value:
        weighted = isinstance(item, dict) and len(item) == 1 and "text" not in item
        text, weight = next(iter(item.items())) if weighted else (item, 1.0)
        terms.append(item if isinstance(text, dict) else {"text": str(text), "weight": weight})
    for term in terms:
        if not re.search(r"\w", str(term.get("text", ""))):
            raise ValueError("a term needs a letter or a digit")
    return terms


Terms = Annotated[list[Term], BeforeValidator(as_terms)]


class Section(BaseModel):
    """Part of the configuration: a key that it does not know is refused."""

    model_config = ConfigDict(extra="forbid")


class Arxiv(Section):
    """Where feeds, listing pages and PDFs are fetched from; another value is for a mirror."""

    feeds: str = "https://rss.arxiv.org"
    pages: str = "https://arxiv.org"


class Summaries(Section):
    """A model behind any `/v1/chat/completions`; without `model` there are no summaries."""

    model: str = ""
    base_url: str = "https://api.openai.com/v1"
    api_key_env: str = "OPENAI_API_KEY"
    count: int = Field(15, ge=0)
    workers: int = Field(3, ge=1, le=8)
    language: str = "English"
    prompt: Path | None = None
    max_characters: int = Field(120_000, ge=2000)
    timeout: float = Field(300, gt=0)


class Config(Section):
    """One digest."""

    title: str = "arXiv digest"
    url: str = ""
    contact: str = ""
    categories: list[Annotated[str, Field(pattern=CATEGORY)]] = Field(min_length=1)
    types: set[Literal["new", "cross"]] = {"new"}
    terms: Terms = []
    match: Literal["word", "substring"] = "word"
    exclude: Terms = []
    exclude_in: Literal["title", "title+abstract"] = "title"
    interests: str = ""
    min_score: float | None = None
    limit: int = Field(30, ge=1, le=500)
    out: Path = Path("site")
    summaries: Summaries = Summaries()
    arxiv: Arxiv = Arxiv()

    @model_validator(mode="after")
    def check(self) -> "Config":
        if not self.terms and not self.interests.strip():
            raise ValueError("terms or interests are needed: nothing else says what to look for")
        if self.min_score is None:
            # With terms alone a paper without a hit is noise; with interests it may still be near.
            self.min_score = 0.0 if self.interests.strip() else 1.0
        return self

    @property
    def prompt_text(self) -> str:
        """The instructions for the language model, the user's own or those of the package."""
        own = self.summaries.prompt
        path = own if own else files("sememe_digest") / "templates" / "prompt.txt"
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            need = "need a text file. try: summaries.prompt without a value"
            raise ConfigError(f"prompt {own} cannot be read ({error}): {need}") from error
        return text.replace("{language}", self.summaries.language)

    def monitors(self, category: str) -> bool:
        """Whether a primary class is asked for, itself or its whole archive (`cs`)."""
        return category in self.categories or category.split(".")[0] in self.categories


def read_config(path: Path) -> Config:
    """The configuration in a YAML file; paths in it are relative to the working directory."""
    try:
        # The C loader is there in all wheels and ten times as fast.
        values = yaml.load(
            path.read_text(encoding="utf-8"), getattr(yaml, "CSafeLoader", yaml.SafeLoader)
        )
    except (OSError, UnicodeDecodeError) as error:
        need = "need a digest.yaml. try: sememe-digest init"
        raise ConfigError(f"{path} cannot be read ({error}): {need}") from error
    except yaml.YAMLError as error:
        where = " ".join(str(error).split())
        message = f"{path} is no YAML ({where:.200}): need keys and values. try: sememe-digest init"
        raise ConfigError(message) from error
    if not isinstance(values, dict):
        need = "need keys such as categories and terms. try: sememe-digest init"
        raise ConfigError(f"{path} holds no keys: {need}")
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"{path}: {_first(error)}") from error


def _first(error: ValidationError) -> str:
    """The first fault of a configuration in one sentence."""
    fault = error.errors()[0]
    key = ".".join(str(part) for part in fault["loc"]) or "the file"
    if fault["type"] == "extra_forbidden":
        owner = Config.model_fields.get(str(fault["loc"][0]))
        inner = owner.annotation if owner and len(fault["loc"]) > 1 else Config
        known = ", ".join(getattr(inner, "model_fields", Config.model_fields))
        return f"{key} is no key of a digest. try: one of {known}"
    got = "" if fault["type"] in ("missing", "value_error") else f", got {fault['input']!r:.80}"
    return f"{key}: {fault['msg']}{got}. try: see the comments that `sememe-digest init` writes"
