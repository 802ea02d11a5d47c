"""POST /v1/chat/completions: messages through the model's own template."""

import re
import secrets
from typing import Any

from fastapi import APIRouter, Request
from jinja2 import TemplateError

from sememe.serving.answers import Answer, respond
from sememe.serving.errors import bad
from sememe.serving.group import Choice, Group, Piece
from sememe.serving.protocol import ChatRequest, Message
from sememe.serving.service import Service
from sememe.serving.tokens import chat_logprobs

router = APIRouter()


class ChatForm:
    """Choices as this route writes them."""

    kind, chunk_kind = "chat.completion", "chat.completion.chunk"

    def __init__(self, sent: ChatRequest, tokenizer):
        self.sent = sent
        self.tokenizer = tokenizer

    def whole(self, choice: Choice) -> dict[str, Any]:
        message = {"role": "assistant", "content": choice.text, "refusal": None}
        logprobs = self._logprobs(choice.logprobs[: len(choice.tokens)])
        return {"message": message, "logprobs": logprobs, "finish_reason": choice.finish}

    def first_part(self, choice: Choice) -> dict[str, Any]:
        delta = {"role": "assistant", "content": ""}
        return {"delta": delta, "logprobs": None, "finish_reason": None}

    def part(self, piece: Piece) -> dict[str, Any]:
        delta = {"content": piece.text} if piece.text else {}
        # The token that ends the text is not one of its tokens.
        ended = len(piece.choice.logprobs) - len(piece.choice.tokens)
        logprobs = self._logprobs(piece.logprobs[: len(piece.logprobs) - max(0, ended)])
        return {"delta": delta, "logprobs": logprobs, "finish_reason": piece.finish}

    def _logprobs(self, logprobs: list) -> dict[str, Any] | None:
        return chat_logprobs(self.tokenizer, logprobs) if self.sent.logprobs else None


@router.post("/v1/chat/completions")
async def chat(sent: ChatRequest, http: Request):
    """The next message."""
    service: Service = http.app.state.service
    service.check(sent.model)
    tokenizer = service.engine.tokenizer
    if not getattr(tokenizer, "chat_template", None):
        raise bad(
            "messages",
            "this model has no chat template: need a model that was trained on chats. try: the "
            "completions route",
            "no_chat_template",
        )
    with service.reserve(sent.choices) as release:
        tokens = await service.tokenise(chat_tokens, tokenizer, sent.messages)
        group = Group(service, wanted(service, sent, tokens), release, sent.stop or ())
    group.per_prompt = sent.choices
    form = ChatForm(sent, tokenizer)
    return await respond(http, Answer(group, form, sent, f"chatcmpl-{secrets.token_hex(12)}"))


def wanted(service: Service, sent: ChatRequest, tokens: list[int]) -> list:
    """The engine's requests."""
    limit = sent.max_completion_tokens or sent.max_tokens
    if limit is None:
        # Not all of the context: the cache is reserved for what may come.
        limit = max(1, min(service.settings.chat_tokens, service.engine.longest - len(tokens)))
    top = (sent.top_logprobs or 0) if sent.logprobs else None
    return service.requests(sent, tokens, max_tokens=limit, logprobs=top)


def chat_tokens(tokenizer, messages: list[Message]) -> list[int]:
    """Token ids of the template around the messages. Each content is tokenised by itself, so that
    what looks like a control token in it stays text."""
    # Nobody can guess these, so nobody can write them into a message.
    marks = [secrets.token_hex(16) for _ in messages]
    fields = [
        {"role": message.role, "content": mark}
        for message, mark in zip(messages, marks, strict=True)
    ]
    try:
        text = tokenizer.apply_chat_template(fields, tokenize=False, add_generation_prompt=True)
    except (TemplateError, OverflowError) as error:  # of jinja's sandbox: 100,000 rounds at most
        raise bad(
            "messages",
            "the model's chat template refuses these messages: need roles in an order that it "
            "knows. try: one system message first, then user and assistant in turns",
            "template_refused",
        ) from error
    contents = dict(zip(marks, (message.text for message in messages), strict=True))
    ids: list[int] = []
    for part in re.split(f"({'|'.join(marks)})", text):
        if part in contents:
            ids += plain_tokens(tokenizer, contents[part])
        elif part:
            ids += tokenizer(part, add_special_tokens=False).input_ids
    return ids


def plain_tokens(tokenizer, text: str) -> list[int]:
    """Token ids of text in which nothing is a control token.

    Raises:
        ApiError: one came out all the same."""
    control = {
        added.content: number
        for number, added in tokenizer.added_tokens_decoder.items()
        # Others are words, but for those that only lack the flag, as <think> does.
        if added.special or re.fullmatch(r"<.+>|\[[A-Z_/]+\]", added.content)
    }
    names = sorted(filter(None, map(re.escape, control)), key=len, reverse=True)
    ids: list[int] = []
    # Cut behind the first character of each: neither part is the whole any more. What is left may
    # hold another one, so it is looked through again.
    while names and (match := re.search("|".join(names), text)):
        cut = match.start() + 1
        ids += tokenizer(text[:cut], add_special_tokens=False).input_ids
        text = text[cut:]
    ids += tokenizer(text, add_special_tokens=False).input_ids if text else []
    if set(ids) & set(control.values()):
        raise bad(
            "messages",
            "a message holds the text of a control token that cannot be taken apart: need another "
            "spelling. try: a space in it",
            "control_token",
        )
    return ids
