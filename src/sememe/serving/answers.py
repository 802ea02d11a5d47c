"""From a group of the engine's requests to one answer, whole or as a stream of events."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any, Protocol

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from sememe.serving.errors import JSON, ApiError, dumps
from sememe.serving.group import Choice, Group, Piece, gone
from sememe.serving.protocol import Sampled


class Form(Protocol):
    """How a route writes its choices."""

    kind: str
    chunk_kind: str

    def whole(self, choice: Choice) -> dict[str, Any]:
        """A choice that is through."""

    def part(self, piece: Piece) -> dict[str, Any]:
        """What is new of one."""

    def first_part(self, choice: Choice) -> dict[str, Any] | None:
        """What a stream begins with for each choice, if anything."""


@dataclass
class Answer:
    """To one request."""

    group: Group
    form: Form
    sent: Sampled
    number: str

    def head(self, kind: str) -> dict[str, Any]:
        service = self.group.service
        fields = {"id": self.number, "object": kind}
        return fields | {"created": int(service.created), "model": service.name}

    async def whole(self) -> Response:
        await self.group.finish()
        choices = []
        for choice in self.group.choices:
            fields = {"index": choice.index} | self.form.whole(choice)
            own = {"concept_ids": choice.concept_ids} if self.wants_concepts else {}
            own |= {} if choice.result is None else {"plan": choice.result}
            if own:
                fields["sememe"] = own
            choices.append(fields)
        return JSON(self.head(self.form.kind) | {"choices": choices} | self.group.totals())

    @property
    def wants_concepts(self) -> bool:
        return self.sent.sememe is not None and self.sent.sememe.concepts

    # ---- as events ----

    async def events(self, first: Piece | None, rest: AsyncIterator) -> AsyncIterator[str]:
        """Server-sent events. After a fault there is no [DONE], so that nobody takes the text for
        whole."""
        begun: set[int] = set()
        try:
            async with aclosing(rest):
                for line in self._lines(first, begun):
                    yield line
                async for piece in rest:
                    for line in self._lines(piece, begun):
                        yield line
        except ApiError as error:
            yield event(error.body)
            raise
        options = self.sent.stream_options
        if (options and options.include_usage) or self.sent.sememe is not None:
            yield event(self.head(self.form.chunk_kind) | {"choices": []} | self.group.totals())
        yield "data: [DONE]\n\n"

    def _lines(self, piece: Piece | None, begun: set[int]) -> list[str]:
        if piece is None:
            return [": still here\n\n"]
        lines, index = [], piece.choice.index
        begins = index not in begun
        if begins:
            begun.add(index)
            if (first := self.form.first_part(piece.choice)) is not None:
                lines.append(self._chunk(index, first))
        part = self.form.part(piece)
        numbered = enumerate(piece.concept_ids, piece.place)
        concepts = [[place, concept] for place, concept in numbered if concept != -1]
        own = {"concepts": concepts} if self.wants_concepts and (concepts or begins) else {}
        if own and begins:  # places count from the prompt's first token
            own["prompt_tokens"] = len(piece.choice.request.prompt)
        own |= {} if piece.result is None else {"plan": piece.result}
        if own:
            part["sememe"] = own
        elif not (piece.text or piece.logprobs or piece.finish):
            return lines  # half a character, or what may be the beginning of a stop string
        return [*lines, self._chunk(index, part)]

    def _chunk(self, index: int, part: dict[str, Any]) -> str:
        return event(self.head(self.form.chunk_kind) | {"choices": [{"index": index} | part]})


def event(fields: dict[str, Any]) -> str:
    return f"data: {dumps(fields)}\n\n"


class Stream(StreamingResponse):
    """Ends the group however the stream ends: a generator that was never begun has no `finally`."""

    def __init__(self, answer: Answer, lines: AsyncIterator[str], state: dict[str, Any]):
        super().__init__(lines, media_type="text/event-stream", headers={"x-accel-buffering": "no"})
        self.group = answer.group
        self.state = state

    async def __call__(self, scope, receive, send) -> None:
        self.state["outcome"] = "cancelled"
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.group.close()

    async def stream_response(self, send) -> None:
        try:
            await super().stream_response(send)
            self.state["outcome"] = "ok"
        except ApiError as error:  # the client has its sentence already
            self.state["outcome"] = error.outcome
            await send({"type": "http.response.body", "body": b"", "more_body": False})


@asynccontextmanager
async def running(http: Request, group: Group):
    """Hands the group to the engine, and ends it when the client goes or something fails."""

    async def watch() -> None:
        while (await http.receive())["type"] != "http.disconnect":
            pass
        group.cancel(gone())

    group.submit()
    task = asyncio.create_task(watch())
    try:
        yield
    except BaseException:
        group.close()
        raise
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


async def respond(http: Request, answer: Answer) -> Response:
    """The answer, whole, or a stream that begins with its first piece: until then a fault still has
    a status of its own."""
    async with running(http, answer.group):
        if not answer.sent.stream:
            return await answer.whole()
        pieces = answer.group.events()
        # Or None, where it is long in coming: then the stream begins with a comment. Not while the
        # request waits for a row: if it never gets one, the client is to see that by the status.
        while (first := await anext(pieces)) is None and not answer.group.started:
            pass
    return Stream(answer, answer.events(first, pieces), http.scope["sememe"])
