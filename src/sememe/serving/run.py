"""The server's life: it listens at once, loads the model, serves, and when it is asked to stop lets
running requests end."""

import asyncio
import contextlib
import logging
import os
import signal
import socket
import threading
from collections.abc import Callable
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from sememe.errors import SememeError
from sememe.serving.app import build_app
from sememe.serving.errors import ApiError, bad
from sememe.serving.service import Service
from sememe.serving.settings import LINGER, Settings

log = logging.getLogger("sememe.serving")


class Protocol(H11Protocol):
    """HTTP/1.1 whose own refusals have the shape of all others, and which waits for the head of a
    request no longer than for its body."""

    head_timeout = 30.0
    max_connections = 800  # an open file each, of which a process has 1,024 as a rule

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.refused = False
        self.head_task = self.loop.call_later(self.head_timeout, self._close_if_silent)

    def connection_made(self, transport) -> None:
        super().connection_made(transport)
        if len(self.connections) > self.max_connections:
            message = "too many connections are open: need one less. try: again in a moment"
            self._refuse(ApiError(503, "too_many_connections", message, retry=1))

    def _close_if_silent(self) -> None:
        silent = self.cycle is None and self.transport is not None
        if silent and not self.transport.is_closing():
            self._refuse(ApiError(408, "head_timeout", "no request came: need one. try: again"))

    def connection_lost(self, exc) -> None:
        self.head_task.cancel()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        # h11 has no other sign of a head that is too large.
        too_large = self.conn.trailing_data[0] and len(self.conn.trailing_data[0]) > 60_000
        code = "headers_too_large" if too_large else "invalid_http"
        sentence = "the request is not HTTP: need HTTP 1.1. try: a common client"
        error = ApiError(431, code, sentence) if too_large else bad(None, sentence, code)
        self._refuse(error)

    def _refuse(self, error: ApiError) -> None:
        response = error.response()
        headers = [x for x in response.raw_headers if x[0] != b"connection"]
        headers.append((b"connection", b"close"))
        events = [
            h11.Response(status_code=error.status, headers=headers),
            h11.Data(data=response.body),
            h11.EndOfMessage(),
        ]
        with contextlib.suppress(h11.LocalProtocolError):
            for part in events:
                self.transport.write(self.conn.send(part))
        # Not at once: a socket that is closed over what nobody has read is reset, answer and all.
        self.refused = True
        self.transport.write_eof()
        self.loop.call_later(LINGER, self.transport.close)

    def data_received(self, data: bytes) -> None:
        if not self.refused:
            super().data_received(data)


class Server(uvicorn.Server):
    """uvicorn's own handling of signals closes the socket at once and cuts streams."""

    @contextlib.contextmanager
    def capture_signals(self):
        yield


def listen(settings: Settings) -> socket.socket:
    """Raises SememeError where the address cannot be had."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        return socket.create_server((settings.host, settings.port), family=family, backlog=256)
    except OSError as error:
        raise SememeError(
            f"port {settings.port} of {settings.host} cannot be listened at "
            f"({os.strerror(error.errno) if error.errno else error}): need one that is free. try: "
            f"--port {settings.port + 1}"
        ) from error


def serve(
    settings: Settings, name: str, load: Callable[[], Any], say: Callable[[str], None]
) -> dict[str, int]:
    """Serves until SIGTERM or SIGINT; returns how many requests came to what.

    Args:
        name: what clients call the model.
        load: returns the engine.
        say: for what the user is to see.

    Raises:
        SememeError: the model cannot be served, the port is taken, or the engine has stopped."""
    service = Service(settings, name)
    with listen(settings) as listening:
        try:
            asyncio.run(_serve(service, listening, load, say))
        finally:
            service.close()
    if service.engine is not None and not service.draining:
        raise SememeError(
            "the engine has stopped after several faults in a row: need a new start. try: the same "
            "command, and read what is printed above"
        )
    return service.metrics.outcomes()


async def _serve(service: Service, listening, load, say) -> None:
    settings, loop = service.settings, asyncio.get_running_loop()
    config = uvicorn.Config(
        build_app(service),
        http=Protocol,
        ws="none",
        lifespan="off",
        access_log=False,
        log_level="error",
        server_header=False,
        timeout_graceful_shutdown=5,
    )
    server = Server(config)
    stop = asyncio.Event()

    def on_signal() -> None:
        if service.draining:  # the second one
            abort(service)
        service.draining = True
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    serving = asyncio.create_task(server.serve(sockets=[listening]))
    try:
        await _load(service, load, stop)
        if not stop.is_set():
            host = f"[{settings.host}]" if ":" in settings.host else settings.host
            say(f"{service.name} at http://{host}:{listening.getsockname()[1]}/v1")
            await _until(stop, service)
        await drain(service)
    finally:
        server.should_exit = True
        await serving


async def _load(service: Service, load, stop: asyncio.Event) -> None:
    """Beside the event loop, which answers 503 meanwhile. Who is told to stop does not wait: the
    thread ends with the process."""
    loop = asyncio.get_running_loop()
    loaded = loop.create_future()

    def work() -> None:
        try:
            outcome = loaded.set_result, load()
        except BaseException as error:
            outcome = loaded.set_exception, error
        if not stop.is_set():
            loop.call_soon_threadsafe(*outcome)

    threading.Thread(target=work, name="load", daemon=True).start()
    stopped = asyncio.create_task(stop.wait())
    await asyncio.wait([loaded, stopped], return_when=asyncio.FIRST_COMPLETED)
    stopped.cancel()
    if not stop.is_set():
        service.start(loaded.result())


async def _until(stop: asyncio.Event, service: Service) -> None:
    """A signal, or the end of the engine."""
    while not stop.is_set() and service.engine.alive:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(stop.wait(), 0.5)


async def drain(service: Service) -> None:
    """Running requests may end, for a while; then they are ended."""
    loop = asyncio.get_running_loop()
    last = loop.time() + service.settings.drain
    while service.used and loop.time() < last:
        await asyncio.sleep(0.02)
    abort(service)
    last = loop.time() + 5
    while service.used and loop.time() < last:
        await asyncio.sleep(0.02)


def abort(service: Service) -> None:
    """Every request that still runs ends with an error that says why."""
    reason = ApiError(
        503, "shutting_down", "the server is shutting down: need another one. try: later", retry=5
    )
    for group in list(service.groups):
        group.cancel(reason)
