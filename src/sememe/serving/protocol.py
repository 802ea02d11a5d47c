"""What clients may send, in OpenAI's shapes. What changes nothing is ignored; what would change the
answer and is not served is refused by name."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from sememe.serving.errors import bad

INT64 = 2**63
MAX_BIAS = 300

# Fields of OpenAI's API that change nothing here.
IGNORED = {"user", "metadata", "store", "service_tier", "safety_identifier"}
IGNORED |= {"prompt_cache_key", "prompt_cache_retention", "parallel_tool_calls"}
# Fields that may be there with these values alone.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "suffix": ("",),
    "tools": ([],),
    "functions": ([],),
    "tool_choice": ("none", "auto"),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
}


class Strict(BaseModel):
    """No "1" for 1, nothing infinite."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class StreamOptions(Strict):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None


ConceptIds = list[Annotated[int, Field(ge=0, lt=INT64)]]


class Concepts(Strict):
    """The extension field `sememe`."""

    rate: Annotated[float, Field(gt=0, le=1)] | None = None
    """Concepts per token; None: as the model was trained."""
    concepts: bool = False
    """Whether the answer has the concept id of each token that was read."""
    plan: list[ConceptIds] | None = None
    """Of a planner: ids of each type that the text is written from."""
    budget: Annotated[ConceptIds, Field(min_length=1)] | None = None
    """Of a planner: concepts of each type at most, or one number for all."""


class Sampled(Strict):
    """What both routes know."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)

    model: Annotated[str, Field(max_length=200)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=INT64)] | None = None
    seed: Annotated[int, Field(ge=-INT64, lt=INT64)] | None = None
    n: Annotated[int, Field(ge=1, le=8)] | None = None
    stop: str | list[str] | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    sememe: Concepts | None = None

    @field_validator("stop")
    @classmethod
    def _check_stop(cls, stop: str | list[str] | None) -> list[str]:
        stops = [stop] if isinstance(stop, str) else stop or []
        if len(stops) > 4 or not all(1 <= len(text) <= 64 for text in stops):
            raise ValueError("need at most 4 stop strings of 1 to 64 characters. try: fewer")
        return stops

    @field_validator("logit_bias")
    @classmethod
    def _check_bias(cls, bias: dict[str, float] | None) -> dict[str, float] | None:
        if len(bias or ()) > MAX_BIAS:
            raise ValueError(f"need at most {MAX_BIAS} tokens. try: fewer")
        if not all(key.isascii() and key.isdigit() and len(key) < 10 for key in bias or ()):
            raise ValueError("need token ids as keys. try: the ids that inspect gives")
        return bias

    @model_validator(mode="after")
    def _check_others(self):
        for name, value in (self.model_extra or {}).items():
            # A number of choices from as many is all of them.
            same = name == "best_of" and value == self.n
            if value is None or name in IGNORED or value in NEUTRAL.get(name, ()) or same:
                continue
            shown = name if name.isidentifier() and len(name) <= 40 else "a field"
            raise bad(
                shown,
                f"{shown} is not served here, and would change the answer: need a request without "
                "it. try: leave it out",
                "unsupported_field",
            )
        return self

    @property
    def choices(self) -> int:
        return self.n or 1


TokenIds = ConceptIds


class CompletionRequest(Sampled):
    """POST /v1/completions."""

    prompt: str | TokenIds | list[str] | list[TokenIds]
    max_tokens: Annotated[int, Field(ge=0, lt=INT64)] | None = None
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    echo: bool | None = None

    @model_validator(mode="after")
    def _check_echo(self):
        if self.max_tokens == 0 and not self.echo:
            raise bad(
                "max_tokens",
                "max_tokens is 0 and echo is off, so there is nothing to answer: need at least 1. "
                "try: echo with logprobs, for those of the prompt",
            )
        return self

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """One or more, all text or all tokens."""
        prompt = self.prompt
        return prompt if prompt and isinstance(prompt, list) and prompt_list(prompt) else [prompt]


def prompt_list(prompt: list) -> bool:
    """Whether it is a list of prompts, not one of token ids."""
    return not isinstance(prompt[0], int)


class TextPart(Strict):
    type: Literal["text"]
    text: str


class Message(BaseModel):
    """Of a chat. A name changes nothing in the templates."""

    model_config = ConfigDict(strict=True, extra="forbid")

    role: Literal["system", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(min_length=1, max_length=100)]
    name: Annotated[str, Field(max_length=64)] | None = None

    @property
    def text(self) -> str:
        content = self.content
        return content if isinstance(content, str) else "".join(part.text for part in content)


class ChatRequest(Sampled):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=1000)]
    max_tokens: Annotated[int, Field(ge=1, lt=INT64)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, lt=INT64)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    @model_validator(mode="after")
    def _check_logprobs(self):
        if self.top_logprobs and not self.logprobs:
            raise bad("top_logprobs", "top_logprobs without logprobs: need both. try: logprobs")
        return self


class InspectRequest(Strict):
    """POST /v1/sememe/inspect."""

    text: str
    rate: Annotated[float, Field(gt=0, le=1)] | None = None
    model: Annotated[str, Field(max_length=200)] | None = None


Text = Annotated[str, Field(min_length=1)]


class CompressRequest(Strict):
    """POST /v1/sememe/compress."""

    text: Text | Annotated[list[Text], Field(min_length=1, max_length=1000)]
    """One, or several; none is empty."""
    rate: Annotated[float, Field(gt=0, le=1)] | None = None
    model: Annotated[str, Field(max_length=200)] | None = None

    @property
    def texts(self) -> list[str]:
        return [self.text] if isinstance(self.text, str) else self.text
