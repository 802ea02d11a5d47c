"""One model in several processes: the very same application in each, and Ray Serve before them."""

import logging
import signal
import tempfile
import threading
from collections.abc import Callable
from typing import Any

from starlette.middleware import Middleware
from uvicorn.config import HTTP_PROTOCOLS

from sememe.cluster import cluster
from sememe.errors import SememeError
from sememe.serving.app import build_app
from sememe.serving.errors import ApiError
from sememe.serving.metrics import FOLDER, outcomes_in
from sememe.serving.run import abort, drain, listen
from sememe.serving.service import Service
from sememe.serving.settings import Settings

OTHERS = 32  # requests that a process takes beside those to the model, which its engine counts


class Replica:
    """What each process has: an engine, and the application over it."""

    def __init__(self, settings: Settings, name: str, load: Callable[[], Any]):
        logging.basicConfig(format="%(asctime)s %(message)s", level=logging.WARNING)
        logging.getLogger("sememe.serving").setLevel(logging.INFO)
        self.service = Service(settings, name)
        # Requests come once this has returned.
        self.service.start(load())

    def __serve_build_asgi_app__(self):
        return build_app(self.service)

    def check_health(self) -> None:
        """Ray Serve starts another process in place of one that raises."""
        if not self.service.engine.alive:
            raise RuntimeError("the engine has stopped")

    async def drain(self) -> None:
        self.service.draining = True
        await drain(self.service)

    async def abort(self) -> None:
        abort(self.service)


class Front:
    """Around Ray Serve, in the process that listens: its own answers get the shape of all others,
    and its own routes are none."""

    def __init__(self, app: Any):
        self.app = app

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["path"].startswith("/-/"):
            error = ApiError(404, "not_found", "there is no such route: need another. try: /health")
            await error.response()(scope, receive, send)
            return
        replaced = False

        async def answer(message) -> None:
            nonlocal replaced
            if message["type"] == "http.response.start" and message["status"] >= 400:
                # Every answer of ours has it.
                replaced = b"x-content-type-options" not in dict(message["headers"])
                if replaced:
                    await refusal(message["status"]).response()(scope, receive, send)
            if message["type"] == "http.response.start":
                # Ray Serve adds a number of its own behind the one that is in the log.
                headers = dict(reversed(list(message["headers"])))
                message = message | {"headers": list(headers.items())}
            if not replaced:
                await send(message)

        await self.app(scope, receive, answer)


def refusal(status: int) -> ApiError:
    """What Ray Serve says with a status."""
    if status == 429:
        return ApiError(429, "queue_full", "all places are taken: need one. try: again", retry=1)
    sentence = "no process could take the request: need one. try: again in a moment"
    return ApiError(503, "unavailable", sentence, retry=1)


def front() -> list[Middleware]:
    """Called by Ray Serve in the process that listens, before it does."""
    # Else it would take the parser that limits no headers.
    HTTP_PROTOCOLS["auto"] = "sememe.serving.run:Protocol"
    return [Middleware(Front)]


def serve(
    settings: Settings, name: str, load: Callable[[], Any], say: Callable[[str], None], number: int
) -> dict[str, int]:
    """As `run.serve`, in so many processes."""
    with listen(settings) as listening:  # free, and a number where any is wanted
        port = listening.getsockname()[1]
    listener = {
        "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": f"{__name__}:front",
        # On a busy machine it takes longer to come up than the 5 s after which it is killed.
        "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "120",
        "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "30",
    }
    before = signal.getsignal(signal.SIGTERM)
    with (
        tempfile.TemporaryDirectory(prefix="sememe-") as folder,
        cluster(number, prints=True, **listener),
    ):
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # Ray's own would exit
        handle = None
        try:
            handle = _deploy(settings, (settings, name, load), port, number, folder)
            host = f"[{settings.host}]" if ":" in settings.host else settings.host
            say(f"{name} at http://{host}:{port}/v1, {number} processes")
            threading.Event().wait()
        except KeyboardInterrupt:
            _end(handle, settings)
        finally:
            signal.signal(signal.SIGTERM, before)
        return outcomes_in(folder)


def _deploy(settings: Settings, arguments: tuple, port: int, number: int, folder: str):
    """The handle of a deployment that serves. Raises SememeError where the model cannot be
    loaded."""
    from ray import serve as ray_serve
    from ray.exceptions import RayError

    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    quiet = {"log_level": "ERROR", "enable_access_log": False}
    requests = settings.capacity + OTHERS
    replica = ray_serve.deployment(
        ray_serve.ingress()(Replica),
        name=Replica.__name__,
        num_replicas=number,
        ray_actor_options={"num_cpus": 1, "runtime_env": {"env_vars": {FOLDER: folder}}},
        # The engine's own refusal comes first; Ray's knows nothing of rows.
        max_ongoing_requests=requests,
        max_queued_requests=requests,
        backpressure_config={"status_code": 429, "retry_after_s": 1},
        graceful_shutdown_wait_loop_s=0.1,
        graceful_shutdown_timeout_s=5,
        health_check_period_s=5,
        max_constructor_retry_count=1,
    )
    try:
        ray_serve.start(
            http_options={"host": settings.host, "port": port, "request_timeout_s": None},
            logging_config=quiet,
        )
        return ray_serve.run(replica.bind(*arguments), logging_config=quiet)
    except (RuntimeError, TimeoutError, RayError) as error:
        # What a process says comes as the text of its traceback.
        last = str(error).strip().splitlines()[-1]
        name, _, sentence = last.partition(": ")
        if name.startswith(SememeError.__module__):
            raise SememeError(sentence) from None
        raise SememeError(
            f"the processes do not start ({last:.200}): need memory for the model in each. try: "
            "fewer --replicas"
        ) from error


def _end(handle, settings: Settings) -> None:
    """Running requests may end, for a while; a second signal ends them at once."""
    if handle is not None:
        try:
            handle.broadcast("drain").results(timeout_s=settings.drain + 10)
        except KeyboardInterrupt:
            handle.broadcast("abort").results(timeout_s=10)
