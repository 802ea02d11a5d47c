"""The command `sememe serve`."""

import functools
import logging
from collections.abc import Iterator
from typing import Any

from sememe import arguments
from sememe.errors import needs_extra
from sememe.serving.settings import Settings, cache_limit, check_exposure, read_key, served_name
from sememe.terminal import say

OPTIONS = {
    "model": (arguments.Model, ...),
    "host": (arguments.Host, Settings.host),
    "port": (arguments.Port, Settings.port),
    "key_file": (arguments.KeyFile, None),
    "no_key": (arguments.NoKey, False),
    "replicas": (arguments.Replicas, 1),
    "rows": (arguments.Rows, Settings.rows),
    "queue": (arguments.Queue, Settings.queue),
    "cache_memory": (arguments.CacheMemory, None),
    "deadline": (arguments.Deadline, Settings.deadline),
    "queue_timeout": (arguments.QueueTimeout, Settings.queue_timeout),
    "drain": (arguments.Drain, Settings.drain),
}


def serve(model: arguments.Model, **options: Any) -> Iterator[dict[str, Any]]:
    """Serve a model over HTTP in the shapes of OpenAI's API: completions, chats, streams; and for
    each token the concept that it wrote. Ctrl-C lets running requests end.

    Example: `sememe serve smollm2-135m-online --port 8000`

    Ask it: `curl http://127.0.0.1:8000/v1/completions --json '{"prompt": "The old detective",
    "max_tokens": 32, "sememe": {"concepts": true}}'`

    For other machines: `SEMEME_API_KEY=$(openssl rand -hex 24) sememe serve runs/demo --host
    0.0.0.0`"""
    key = read_key(options.pop("key_file"))
    check_exposure(options["host"], key, options.pop("no_key"))
    number = options.pop("replicas")
    memory = cache_limit(options.pop("cache_memory")) // number
    settings = Settings(key=key, cache_bytes=memory, **options)
    with needs_extra("serve"):
        if number == 1:
            from sememe.serving.run import serve as run
        else:
            from sememe.models.loading import model_folder
            from sememe.serving import ray

            # Looked at here too: Ray may not say why its processes do not start.
            model_folder(model)
            run = functools.partial(ray.serve, number=number)
    # Request by request a line without its text; what uvicorn says about itself is left out.
    logging.basicConfig(format="%(asctime)s %(message)s", level=logging.WARNING)
    logging.getLogger("sememe.serving").setLevel(logging.INFO)

    def load():
        from sememe.engine import open_engine

        limits = {"max_rows": settings.rows, "max_queue": settings.queue, "cache_bytes": memory}
        return open_engine(model, **limits)

    outcomes = run(settings, served_name(model), load, say)
    yield {"requests": outcomes}
    words = [f"{count} {outcome}" for outcome, count in sorted(outcomes.items())]
    say(f"served: {', '.join(words) or 'no request'}")


arguments.expand(serve, OPTIONS)
