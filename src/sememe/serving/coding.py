"""A compressor's routes: texts → the JSON of their codes (docs/formats.md) → texts."""

from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.responses import Response

from sememe.errors import SememeError
from sememe.serving.answers import running
from sememe.serving.errors import JSON, bad
from sememe.serving.group import Choice, Group, refusal
from sememe.serving.protocol import CompressRequest
from sememe.serving.service import Service

if TYPE_CHECKING:
    from sememe.codes import Codes

router = APIRouter()


@router.post("/v1/sememe/compress")
async def compress(sent: CompressRequest, http: Request):
    """The codes of one text, or of several."""
    from sememe.engine import Compress

    service: Service = http.app.state.service
    service.check(sent.model, "codes")
    engine, works = service.engine, service.engine.scheduler
    rate = works.rate if sent.rate is None else sent.rate

    def cut() -> Compress:
        return Compress.of(engine.tokenizer, sent.texts, works.window, rate)

    choice, _ = await done(service, http, cut)

    def written() -> str:
        # By the name that clients know, not by a path of this machine.
        writer = works.writer.model_copy(update={"name": service.name})
        codes = choice.request.uncoded.codes(engine.model.config, writer, rate)
        return codes.model_dump_json()

    return Response(await service.tokenise(written), media_type="application/json")


@router.post("/v1/sememe/decompress")
async def decompress(http: Request):
    """The text of codes that this model wrote, or the texts."""
    from sememe.codes import joined_texts
    from sememe.engine import Decompress

    service: Service = http.app.state.service
    service.check(None, "codes")
    body = await http.body()
    choice, group = await done(service, http, lambda: Decompress(read_codes(body)))
    codes, tokenizer = choice.request.codes, service.engine.tokenizer
    texts = await service.tokenise(joined_texts, tokenizer, codes, choice.result)
    fields: dict[str, Any] = {"object": "sememe.text", "model": service.name}
    fields["text"] = texts[0] if len(texts) == 1 else texts
    return JSON(fields | group.totals())


async def done(service: Service, http: Request, prepare) -> tuple[Choice, Group]:
    """A work, when it is through. `prepare` makes it, beside the event loop."""
    with service.reserve(1) as release:
        try:
            work = await service.tokenise(prepare)
        except SememeError as error:
            raise refusal(error) from error
        group = Group(service, [work], release)
    async with running(http, group):
        await group.finish()
    return group.choices[0], group


def read_codes(body: bytes) -> "Codes":
    """Raises RequestValidationError, or ApiError for codes of no text at all."""
    from sememe.codes import Codes

    try:
        codes = Codes.model_validate_json(body)
    except ValidationError as error:
        raise RequestValidationError(error.errors()) from error
    if not codes.documents:
        raise bad("documents", "the codes are of no text: need one at least. try: compress")
    return codes
