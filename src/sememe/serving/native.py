"""Routes that OpenAI does not have: a text inspected without writing, figures of the moment, health
and metrics; and the list of the one model."""

from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from sememe.detokenize import pieces
from sememe.serving.answers import running
from sememe.serving.errors import JSON, ApiError
from sememe.serving.group import Group
from sememe.serving.protocol import InspectRequest
from sememe.serving.service import Service

router = APIRouter()


def service_of(http: Request) -> Service:
    return http.app.state.service


@router.post("/v1/sememe/inspect")
async def inspect(sent: InspectRequest, http: Request):
    """A text as the model reads it: tokens, the concept that each has written, NLL in nats."""
    from sememe.engine import Request as EngineRequest

    service = service_of(http)
    service.check(sent.model, "nll")
    with service.reserve(1) as release:
        tokens = await service.tokenise(service.tokens, sent.text)
        request = EngineRequest(tokens, max_tokens=0, logprobs=0, echo=True, rate=sent.rate)
        group = Group(service, [request], release)
    async with running(http, group):
        await group.finish()
    (choice,) = group.choices
    fields: dict[str, Any] = {"object": "sememe.inspection", "model": service.name}
    fields["tokens"] = pieces(service.engine.tokenizer, tokens)
    fields |= {"token_ids": tokens, "concept_ids": choice.concept_ids}
    fields["nll"] = [None if known is None else -known.logprob for known in choice.logprobs]
    return JSON(fields | group.totals())


@router.get("/v1/sememe/stats")
async def stats(http: Request):
    """Figures of the moment, for a page that shows them."""
    service = service_of(http)
    metrics, last = service.metrics, service.metrics.last_iteration
    fields: dict[str, Any] = {"model": service.name, "places": service.settings.capacity}
    fields["used_places"] = service.used
    fields["rows"] = last.rows if last else 0
    fields["waiting"] = last.waiting if last else 0
    fields["cache_bytes"] = last.cache_bytes if last else {}
    fields["middle_rows"] = last.middle_rows if last else 0
    fields["step_seconds"] = last.seconds if last else {}
    for name in ("prompt_tokens", "generation_tokens", "read_tokens", "concepts"):
        fields[name] = int(metrics.value(f"sememe_{name}_total"))
    fields["concept_rate"] = metrics.value("sememe_concept_rate")
    return JSON(fields | {"requests": metrics.outcomes()})


@router.get("/v1/models")
async def models(http: Request):
    """The one model."""
    return JSON({"object": "list", "data": [card(service_of(http))]})


@router.get("/v1/models/{name}")
async def model(name: str, http: Request):
    """The same."""
    service = service_of(http)
    service.check_name(name)
    return JSON(card(service))


def card(service: Service) -> dict[str, Any]:
    fields = {"id": service.name, "object": "model", "created": int(service.created)}
    return fields | {"owned_by": "sememe", "sememe": service.facts}


@router.get("/health")
async def health():
    """The process is there."""
    return JSON({"status": "ok"})


@router.get("/ready")
async def ready(http: Request):
    """Whether a request would be served."""
    fault = service_of(http).fault
    if fault is not None:
        raise ApiError(503, *fault, retry=5)
    return JSON({"status": "ready"})


@router.get("/metrics")
async def metrics(http: Request):
    """For Prometheus."""
    return Response(service_of(http).metrics.text(), media_type="text/plain; version=0.0.4")
