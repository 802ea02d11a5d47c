"""What stands in front of all routes, as pure ASGI: key, host, limits, JSON; and after all of them
an answer to whatever went wrong, the count of outcomes and one line of log."""

import asyncio
import contextlib
import hmac
import logging
import secrets
import time
import traceback
from collections.abc import Callable
from typing import Any

from sememe.serving import page
from sememe.serving.errors import ApiError, bad, internal, outcome_of
from sememe.serving.settings import LINGER, LOOPBACK, Settings
from sememe.serving.strict_json import parse

log = logging.getLogger("sememe.serving")

OPEN = ("/health", "/ready", *page.FILES)
"""Without a key: an orchestrator asks for the first two, and the page asks its reader for one."""


class Guard:
    """Wraps an application.

    `count`: is called with the outcome of each POST."""

    def __init__(self, app: Any, settings: Settings, count: Callable[[str], None]):
        self.app = app
        self.settings = settings
        self.count = count

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":  # a web socket: there are none
            await send({"type": "websocket.close", "code": 1008})
            return
        status, number, start = 0, secrets.token_hex(8), time.perf_counter()
        # Routes write here what came of a request whose status was sent already.
        scope["sememe"] = state = {}

        async def answer(message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = [(b"x-request-id", number.encode()), (b"cache-control", b"no-store")]
                headers += [(b"x-content-type-options", b"nosniff")]
                message = message | {"headers": [*message.get("headers", ()), *headers]}
            await send(message)

        try:
            await self._pass(scope, receive, answer)
        except ApiError as error:
            if not status:
                await refuse(error, scope, receive, answer)
        except Exception as error:  # whatever it is: the client is told, the server goes on
            self._log(error)
            state["outcome"] = "error"
            if not status:
                await internal().response()(scope, receive, answer)
        outcome = state.get("outcome") or outcome_of(status)
        if scope["method"] == "POST":
            self.count(outcome)
        took = time.perf_counter() - start
        log.info("%s %s %s %s %.3f", number, scope["method"], status, outcome, took)

    @staticmethod
    def _log(error: Exception) -> None:
        """Where it happened. Not its message, in which the client's text may stand."""
        frames = "".join(traceback.format_tb(error.__traceback__))
        log.error("%s in a request\n%s", type(error).__name__, frames)

    async def _pass(self, scope, receive, send) -> None:
        headers = self._headers(scope)
        self._check_host(headers)
        if self.settings.key is not None and scope["path"] not in OPEN:
            self._check_key(headers)
        if scope["method"] == "POST":
            self._check_type(headers)
            body = await self._body(headers, receive)
            parse(body, self.settings.json_depth)
            receive = replay(body, receive)
        await self.app(scope, receive, send)

    # ---- the checks, in their order ----

    def _headers(self, scope) -> dict[bytes, bytes]:
        pairs = scope["headers"]
        size = sum(len(name) + len(value) for name, value in pairs)
        if len(pairs) > self.settings.headers or size > self.settings.header_bytes:
            raise ApiError(
                431,
                "headers_too_large",
                f"got {len(pairs)} headers of {size} bytes: need at most {self.settings.headers} "
                f"of {self.settings.header_bytes}. try: fewer cookies",
            )
        return dict(pairs)

    def _check_host(self, headers: dict[bytes, bytes]) -> None:
        """A page of another site, whose name leads to this machine, sends its own name (DNS
        rebinding)."""
        host = headers.get(b"host", b"").decode("latin-1").lower()
        name = host[1:].split("]")[0] if host.startswith("[") else host.split(":")[0]
        if self.settings.loopback and name not in LOOPBACK:
            raise bad(
                None,
                "the Host header is not of this server: need localhost or 127.0.0.1. try: another "
                "address in the client, or --host",
                "host_not_allowed",
            )

    def _check_key(self, headers: dict[bytes, bytes]) -> None:
        scheme, _, sent = headers.get(b"authorization", b"").partition(b" ")
        wanted = self.settings.key.encode()
        # In constant time, or the key could be guessed letter by letter.
        same = hmac.compare_digest(sent.strip(), wanted)
        if scheme.lower() != b"bearer" or not same:
            raise ApiError(
                401,
                "invalid_api_key",
                "no key, or another one than the server's: need Authorization: Bearer KEY. try: "
                "api_key of the client",
            )

    @staticmethod
    def _check_type(headers: dict[bytes, bytes]) -> None:
        """A page of any site may post plain text without asking first; JSON it may not."""
        kind = headers.get(b"content-type", b"").split(b";")[0].strip().lower()
        if kind != b"application/json":
            raise ApiError(
                415,
                "unsupported_media_type",
                "the body is of another content type: need JSON. try: the client's json argument",
            )
        if headers.get(b"content-encoding", b"identity").lower() != b"identity":
            raise ApiError(
                415,
                "unsupported_encoding",
                "the body is compressed: need it as it is. try: without Content-Encoding",
            )

    async def _body(self, headers: dict[bytes, bytes], receive) -> bytes:
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length[:20]) > self.settings.body_bytes:
            raise self._too_large()
        parts: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(self.settings.body_timeout):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ApiError(408, "client_gone", "the client has gone. try: again")
                    part = message.get("body", b"")
                    parts.append(part)
                    size += len(part)
                    if size > self.settings.body_bytes:
                        raise self._too_large()
                    if not message.get("more_body"):
                        return b"".join(parts)
        except TimeoutError as error:
            raise ApiError(
                408,
                "body_timeout",
                f"the body did not arrive: need it within {self.settings.body_timeout:g} s. try: a "
                "shorter one, or again",
            ) from error

    def _too_large(self) -> ApiError:
        return ApiError(
            413,
            "body_too_large",
            f"the body is too large: need at most {self.settings.body_bytes} bytes. try: a shorter "
            "prompt, or several requests",
        )


def replay(body: bytes, receive) -> Callable:
    """A `receive` that gives the body that was read, and then what the real one does."""
    waiting = [{"type": "http.request", "body": body, "more_body": False}]

    async def again():
        return waiting.pop() if waiting else await receive()

    return again


async def refuse(error: ApiError, scope, receive, send) -> None:
    """A socket that is closed over what nobody has read is reset, and the client may never see the
    answer: what is left of a large body is read for a moment, and dropped."""

    async def lingering(message) -> None:
        if error.status == 413 and message["type"] == "http.response.body":
            await send(message | {"more_body": True})
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LINGER):
                    while (await receive()).get("more_body"):
                        pass
            message = {"type": "http.response.body", "body": b""}
        await send(message)

    await error.response()(scope, receive, lingering)
