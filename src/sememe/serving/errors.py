"""Every error of the server has one shape: {"error": {message, type, param, code}}."""

import json
from typing import Any

from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
CODES = {404: "not_found", 405: "method_not_allowed"}
OUTCOMES = {401: "unauthorized", 429: "refused", 503: "unavailable", 504: "deadline"}
"""What the metrics count, by status; by code where that says more."""
OUTCOMES_OF_CODES = {"client_gone": "cancelled", "queue_timeout": "queue_timeout"}
SENTENCES = {
    404: "no such route: need one of those in the documentation. try: GET of v1 models",
    405: "this route takes another method: need the one in Allow. try: POST for completions",
}


class ApiError(Exception):
    """A request that is refused, or ended.

    Args:
        status: of HTTP.
        code: what a program looks at.
        message: one sentence that says got, need, try; of the client's text it repeats nothing.
        param: the field that is meant.
        retry: seconds after which the same may be served."""

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        param: str | None = None,
        retry: int | None = None,
    ):
        super().__init__(message)
        self.status = status
        self.code = code
        self.param = param
        self.retry = retry

    @property
    def body(self) -> dict[str, Any]:
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        kind = TYPES.get(self.status, kind)
        fields = {"message": str(self), "type": kind, "param": self.param, "code": self.code}
        return {"error": fields}

    @property
    def outcome(self) -> str:
        return OUTCOMES_OF_CODES.get(self.code) or outcome_of(self.status)

    @property
    def headers(self) -> dict[str, str]:
        headers = {} if self.retry is None else {"retry-after": str(self.retry)}
        if self.status == 401:
            headers["www-authenticate"] = "Bearer"
        # What was not read of a body must not be taken for the next request.
        if self.status in (408, 413, 431):
            headers["connection"] = "close"
        return headers

    def response(self) -> Response:
        return JSON(self.body, self.status, self.headers)


def outcome_of(status: int) -> str:
    if status in OUTCOMES:
        return OUTCOMES[status]
    if status == 0 or status >= 500:
        return "error"
    return "invalid" if status >= 400 else "ok"


class JSON(Response):
    """Compact UTF-8; what is not finite is a fault."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return dumps(content).encode()


def dumps(content: Any) -> str:
    return json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def bad(param: str | None, message: str, code: str = "invalid_value") -> ApiError:
    """A 400."""
    return ApiError(400, code, message, param)


def internal() -> ApiError:
    return ApiError(
        500,
        "internal_error",
        "the server has failed at this request: need its log to say why. try: the same again",
    )


async def on_invalid(request: Request, error: RequestValidationError) -> Response:
    """What pydantic refuses. Its own text of the first fault, without the value."""
    first = error.errors()[0]
    path = [str(part) for part in first["loc"] if part != "body"]
    # Members of unions, such as `list[int]`, are no part of the field's name.
    param = ".".join(part for part in path if part.isidentifier() or part.isdigit())[:100] or None
    message = first["msg"].removeprefix("Value error, ")
    named = f"{param}: " if param else ""
    if "try: " not in message:
        message += ". try: the fields and limits of the documentation"
    return bad(param, f"{named}{message}").response()


async def on_http(request: Request, error: HTTPException) -> Response:
    """Routes and methods that there are none of."""
    sentence = SENTENCES.get(error.status_code, "the request cannot be served. try: another")
    code = CODES.get(error.status_code, "invalid_request")
    response = ApiError(error.status_code, code, sentence).response()
    for name, value in (error.headers or {}).items():
        response.headers[name] = value
    return response


async def on_api(request: Request, error: ApiError) -> Response:
    request.scope["sememe"]["outcome"] = error.outcome
    return error.response()
