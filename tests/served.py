"""A server over a tiny model, in this process: real sockets, the event loop in its own thread."""

import asyncio
import contextlib
import json
import re
import socket
import threading
import time

import httpx
import torch
import uvicorn

from conftest import byte_tokenizer
from families import ONLINE, move, started, tiny_base
from sememe.engine import Engine
from sememe.models import OnlineConfig, OnlineForCausalLM, PlannerConfig, PlannerForCausalLM
from sememe.serving.app import build_app
from sememe.serving.run import Protocol, Server
from sememe.serving.service import Service
from sememe.serving.settings import Settings

PROMPT = "The old detective"
LONG = {"prompt": PROMPT, "max_tokens": 480, "logit_bias": {"2": -100}}
KEY = "a-key-of-many-letters"
VOCABULARY = 261
PLAN_SIZES, PLAN_LENGTHS = (7, 5, 9), (3, 2, 4)
CONTEXT = 512
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def chat_tokenizer(template: str | None = TEMPLATE):
    """Bytes, and two control tokens."""
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = template
    return tokenizer


def served_base(**changes):
    sizes = {"vocab_size": VOCABULARY, "max_position_embeddings": CONTEXT}
    return tiny_base(**sizes | changes)


def served_online(base=None) -> OnlineForCausalLM:
    base = base or served_base()
    model = OnlineForCausalLM(OnlineConfig(text_config=base.config, base="tiny", **ONLINE), base)
    generator = torch.Generator().manual_seed(1)
    move(model, generator)
    return started(model, torch.randint(3, VOCABULARY, (16, 24), generator=generator))


@torch.no_grad()
def served_planner() -> PlannerForCausalLM:
    base, generator = served_base(), torch.Generator().manual_seed(1)
    sizes = {"plan_sizes": PLAN_SIZES, "plan_lengths": PLAN_LENGTHS, "lora_rank": 4}
    config = PlannerConfig(text_config=base.config, base="tiny", **sizes)
    model = PlannerForCausalLM(config, base)
    move(model, generator)
    model.plans.bias.copy_(0.3 * torch.randn(model.plans.bias.shape, generator=generator))
    model.plans.bias[model.plans.row_IM[:, -1]] += 1.5  # plans of all lengths
    return model.eval()


@contextlib.contextmanager
def running(model=None, tokenizer=None, name="tiny", load=True, **settings):
    """(service, a client of it)."""
    settings = Settings(port=0, **settings)
    service = Service(settings, name)
    ready, state = threading.Event(), {}

    async def live() -> None:
        listening = socket.create_server(("127.0.0.1", 0))
        config = uvicorn.Config(
            build_app(service), http=Protocol, ws="none", lifespan="off", log_level="error"
        )
        state["port"], state["server"] = listening.getsockname()[1], Server(config)
        ready.set()
        with listening:
            await state["server"].serve(sockets=[listening])

    if load:
        engine = Engine(
            model,
            tokenizer or chat_tokenizer(),
            max_rows=settings.rows,
            max_queue=settings.queue,
            cache_bytes=settings.cache_bytes,
            chunk=64,
        )
        service.start(engine)
    thread = threading.Thread(target=lambda: asyncio.run(live()), daemon=True)
    thread.start()
    assert ready.wait(20)
    try:
        address = f"http://127.0.0.1:{state['port']}"
        with httpx.Client(base_url=address, timeout=60, trust_env=False) as client:
            until(lambda: state["server"].started)
            yield service, client
    finally:
        state["server"].should_exit = True
        thread.join(20)
        service.close()


def until(true, seconds: float = 10.0) -> float:
    """Waits for it, and says for how long."""
    start = time.perf_counter()
    while not true():
        assert time.perf_counter() - start < seconds, "it did not come"
        time.sleep(0.01)
    return time.perf_counter() - start


def chunks(response: httpx.Response) -> list[dict]:
    """Of a stream that ends as it should."""
    lines = [line for line in response.text.split("\n\n") if line and not line.startswith(":")]
    assert all(line.startswith("data: ") for line in lines) and lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def check_error(response: httpx.Response, *statuses: int, code: str | None = None) -> dict:
    """In the one shape, and of nothing that is not the client's business."""
    assert response.status_code in (statuses or range(400, 500)), response.text
    body = response.json()
    assert set(body) == {"error"} and set(body["error"]) == {"message", "type", "param", "code"}
    text = response.text.replace("\\n", "\n")
    assert not re.search(r"/|File|0x|Traceback", text) and KEY not in text, text
    assert "try: " in body["error"]["message"]
    if code is not None:
        assert body["error"]["code"] == code
    return body["error"]
