"""POST /v1/completions: a text goes on, or is only read (`echo`)."""

import secrets
from typing import Any

from fastapi import APIRouter, Request

from sememe.detokenize import decode
from sememe.serving.answers import Answer, respond
from sememe.serving.group import Choice, Group, Piece
from sememe.serving.protocol import CompletionRequest
from sememe.serving.service import Service
from sememe.serving.tokens import TokenTable

router = APIRouter()


class CompletionForm:
    """Choices as this route writes them.

    Args:
        prompts: with `echo` the text of each choice's prompt, which its own begins with."""

    kind = chunk_kind = "text_completion"

    def __init__(self, sent: CompletionRequest, tokenizer, prompts: list[str] | None):
        self.sent = sent
        self.tokenizer = tokenizer
        self.prompts = prompts
        self.tables: dict[int, TokenTable] = {}

    def _table(self, choice: Choice) -> TokenTable:
        if choice.index not in self.tables:
            prompt = choice.request.prompt if self.sent.echo else ()
            self.tables[choice.index] = TokenTable(self.tokenizer, prompt)
        return self.tables[choice.index]

    def whole(self, choice: Choice) -> dict[str, Any]:
        text = (self.prompts[choice.index] if self.prompts else "") + choice.text
        return self._fields(choice, text, choice.logprobs, choice.finish)

    def first_part(self, choice: Choice) -> dict[str, Any] | None:
        """The prompt; the logprobs of its tokens come with the pieces."""
        if not self.prompts:
            return None
        return {"text": self.prompts[choice.index], "logprobs": None, "finish_reason": None}

    def part(self, piece: Piece) -> dict[str, Any]:
        return self._fields(piece.choice, piece.text, piece.logprobs, piece.finish)

    def _fields(self, choice: Choice, text: str, logprobs: list, finish: str | None):
        table = None
        if self.sent.logprobs is not None and logprobs:
            table = self._table(choice)(logprobs)
        return {"text": text, "logprobs": table, "finish_reason": finish}


@router.post("/v1/completions")
async def completions(sent: CompletionRequest, http: Request):
    """A text that goes on from each prompt."""
    service: Service = http.app.state.service
    service.check(sent.model)
    prompts = sent.prompts
    with service.reserve(len(prompts) * sent.choices) as release:
        group, texts = await prepared(service, sent, prompts, release)
    form = CompletionForm(sent, service.engine.tokenizer, texts if sent.echo else None)
    return await respond(http, Answer(group, form, sent, f"cmpl-{secrets.token_hex(12)}"))


async def prepared(
    service: Service, sent: CompletionRequest, prompts: list, release
) -> tuple[Group, list[str]]:
    """The engine's requests, and the prompt's text of each choice."""
    own = {"max_tokens": 16 if sent.max_tokens is None else sent.max_tokens}
    own |= {"logprobs": sent.logprobs, "echo": bool(sent.echo)}
    requests, texts = [], []
    for prompt in prompts:
        tokens = prompt
        if isinstance(prompt, str):
            tokens = await service.tokenise(service.tokens, prompt)
        new = service.requests(sent, tokens, **own)
        requests += new
        if sent.echo:
            text = prompt if isinstance(prompt, str) else decode(service.engine.tokenizer, tokens)
            texts += [text] * len(new)
    group = Group(service, requests, release, sent.stop or ())
    group.per_prompt = sent.choices
    return group, texts
