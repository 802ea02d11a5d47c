"""The page of `sememe serve`: what it is made of, and what it does in a real browser."""

import json
import re
import shutil
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from sememe.engine import Engine
from sememe.serving import page as assets
from served import chat_tokenizer, running, served_base, served_online, until

CHROMIUM_NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, CHROMIUM_NAMES)), None)
KEY = "a-key-of-many-letters"
HOSTILE = "<img src=x onerror=alert(1)> Köln 🙂 "
ENDLESS = {"logit_bias": {"2": -100}}


@pytest.fixture(scope="module")
def server():
    with running(served_online()) as pair:
        yield pair


# ---- without a browser ----


def content(name: str) -> str:
    return (assets.HERE / name).read_text(encoding="utf-8")


SCRIPTS = [name for name, _ in assets.FILES.values() if name.endswith(".js")]


def test_files_need_no_key_and_forbid_all_but_themselves():
    with running(load=False, key=KEY) as (_, client):
        for path, (name, kind) in assets.FILES.items():
            response = client.get(path)
            assert response.status_code == 200 and response.text == content(name)
            headers = response.headers
            assert headers["content-type"] == f"{kind}; charset=utf-8"
            policy = headers["content-security-policy"].split("; ")
            assert "default-src 'self'" in policy and "unsafe" not in str(policy)
            assert {"form-action 'none'", "frame-ancestors 'none'", "base-uri 'none'"} <= {*policy}
            assert headers["x-content-type-options"] == "nosniff"
            assert headers["cache-control"] == "no-store"
        assert client.post("/", json={}).status_code == 405
        for path in ("/v1/models", "/v1/sememe/stats", "/metrics", "/page.py", "/index.html"):
            assert client.get(path).status_code == 401


def test_files_make_no_markup_of_text_and_name_no_other_host():
    scripts = "\n".join(map(content, SCRIPTS))
    markup = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|setHTML|DOMParser|\beval\b"
    assert not re.search(rf"{markup}|Function\(|https?://|setAttribute\(.style", scripts)
    page = content("index.html")
    assert not re.search(r"<style|\sstyle=|\son\w+=|<script(?![^>]*\ssrc=)|https?://|//\w", page)
    assert not re.search(r"https?://|@import|url\(", content("page.css"))
    named = re.findall(r'(?:src|href)="([^"]+)"', page) + re.findall(r'from "\./(.+?)"', scripts)
    assert {f"/{name}" for name in named} == assets.FILES.keys() - {"/"}
    ids = re.findall(r'\bid="([\w-]+)"', page)
    assert len(ids) == len(set(ids))
    wanted = set(re.findall(r'\$\("#([\w-]+)', scripts)) | set(re.findall(r'for="(.+?)"', page))
    assert wanted and wanted <= set(ids)


def test_files_are_in_the_wheel(tmp_path):
    pytest.importorskip("hatchling", reason="pip install hatchling")
    import zipfile

    from hatchling.builders.wheel import WheelBuilder

    root = Path(__file__).parents[1]
    (wheel,) = WheelBuilder(str(root)).build(directory=str(tmp_path), versions=["standard"])
    names = zipfile.ZipFile(wheel).namelist()
    wanted = {f"sememe/serving/page/{name}" for name, _ in assets.FILES.values()}
    assert wanted <= set(names)


# ---- in a browser ----


@pytest.fixture(scope="module")
def browser():
    reason = "pip install playwright"
    driver = pytest.importorskip("playwright.sync_api", reason=reason).sync_playwright
    if CHROMIUM is None:
        pytest.skip("needs chromium: apt-get install chromium")
    with driver() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


@contextmanager
def opened(browser, client, refused: bool = False, card: dict | None = None, **context):
    """A page of the server, which at the end has asked no other and complained of nothing.

    Args:
        refused: whether the server may refuse something, of which the browser complains itself.
        card: what the model is to be instead."""
    context = browser.new_context(**context)
    page = context.new_page()
    page.set_default_timeout(90_000)
    complaints, addresses = [], []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("dialog", lambda dialog: complaints.append(dialog.message))
    page.on("request", lambda request: addresses.append(request.url))
    if card is not None:
        answer(page, "v1/models", {"data": [{"id": "tiny", "sememe": card}]})
    page.goto(f"{client.base_url}/")
    try:
        yield page
        if refused:
            complaints = [text for text in complaints if "Failed to load resource" not in text]
        assert not complaints
        assert all(address.startswith(f"{client.base_url}/") for address in addresses)
    finally:
        context.close()


def answer(page, route: str, fields: dict) -> list[dict]:
    """The route answers so; what it is sent."""
    sent = []

    def fulfil(route):
        sent.append(json.loads(route.request.post_data or "null"))
        route.fulfill(json=fields)

    page.route(f"**/{route}", fulfil)
    return sent


def bias(page, route: str) -> None:
    """No text ends before its limit."""

    def go_on(route):
        fields = route.request.post_data_json | ENDLESS
        route.continue_(post_data=json.dumps(fields))

    page.route(f"**/{route}", go_on)


def set_sampling(page, tokens: int, seed: int = 5, temperature: float = 1) -> None:
    page.get_by_label("Max tokens").fill(str(tokens))
    page.get_by_label("Seed").fill(str(seed))
    page.get_by_label("Temperature").fill(str(temperature))


def ask(client, route: str, fields: dict) -> dict:
    """What the API answers, over a connection of its own: the browser takes its time, and the
    server closes one that is idle."""
    address = f"{client.base_url}/{route}"
    return httpx.post(address, json=fields, timeout=60, trust_env=False).json()


def segments(page, panel: str = "complete") -> list[tuple[int | None, int]]:
    """(concept, tokens) of each that is shown; the open one has None."""
    values = page.locator(f"#{panel} article .segment").evaluate_all(
        "all => all.map(s => [s.dataset.id ?? null, s.children.length])"
    )
    return [(None if id is None else int(id), count) for id, count in values]


def cut(concept_ids: list[int], tokens: int) -> list[tuple[int | None, int]]:
    """What `segments` should be: each token with a concept closes one."""
    cuts, begin = [], 0
    for place, concept in enumerate(concept_ids, 1):
        if concept != -1:
            cuts.append((concept, place - begin))
            begin = place
    return [*cuts, (None, tokens - begin)]


def test_text_is_that_of_the_api(browser, server):
    _, client = server
    fields = {"prompt": HOSTILE, "max_tokens": 14, "seed": 5, "temperature": 1, "echo": True}
    fields |= {"logprobs": 0, "sememe": {"concepts": True}} | ENDLESS
    wanted = ask(client, "v1/completions", fields)
    (choice,) = wanted["choices"]
    tokens = choice["logprobs"]["tokens"]
    with opened(browser, client) as page:
        bias(page, "v1/completions")
        set_sampling(page, 14)
        page.get_by_role("textbox", name="Beginning").fill(HOSTILE)
        page.get_by_role("textbox", name="Beginning").press("Control+Enter")
        page.locator("#complete .stats").wait_for()
        assert page.locator("#complete .text").text_content() == choice["text"]
        assert HOSTILE in choice["text"] and page.locator("#panels img").count() == 0
        assert segments(page) == cut(choice["sememe"]["concept_ids"], len(tokens))
        nll = page.locator("#complete .token").evaluate_all("all => all.map(t => t.dataset.nll)")
        for shown, logprob in zip(nll, choice["logprobs"]["token_logprobs"], strict=True):
            assert (shown is None) is (logprob is None)
            assert logprob is None or abs(float(shown) + logprob) < 1e-3
        rate = wanted["sememe"]["rate"]
        stats = page.locator("#complete .stats").text_content()
        assert f"{1 / rate:.2f} tokens a concept (R)" in stats and stats.startswith("14 tokens")
        for words in ("tokens/s", "MB cache", "queue", "prefill", "decode", "5 seed"):
            assert words in stats


def test_stop_in_mid_stream(browser, server):
    service, client = server
    with opened(browser, client) as page:
        bias(page, "v1/completions")
        set_sampling(page, 400)
        for number, stop in enumerate(("Stop", "Escape")):
            page.get_by_role("button", name="Write").click()
            shown = page.locator("#complete article").nth(number)
            shown.locator(".token").nth(36).wait_for(state="attached")
            assert page.get_by_role("button", name="Write").is_disabled()
            if stop == "Stop":
                page.get_by_role("button", name="Stop").click()
            else:
                page.keyboard.press("Escape")
            stats = shown.locator(".stats").text_content()
            assert re.match(r"\d+ tokens written, not at its end", stats)
            assert 0 < int(stats.split()[0]) < 400 and shown.locator(".fault").count() == 0
            until(lambda: service.used == 0)
        assert page.get_by_role("button", name="Stop").count() == 0


def test_dial_hover_and_arrow_keys(browser, server):
    _, client = server
    text = "the sea and the sea and the sea"
    with opened(browser, client) as page:
        bias(page, "v1/completions")
        set_sampling(page, 12)
        page.get_by_label("Concept rate").press("End")
        assert page.locator("#rate-shown").text_content() == "1.00"
        page.get_by_role("textbox", name="Beginning").fill(text)
        page.get_by_role("button", name="Write").click()
        page.locator("#complete .stats").wait_for()
        shown = segments(page)
        # Every token but the last, which is never read.
        assert [count for _, count in shown] == [1] * (len(text) + 12)
        assert all(concept is not None for concept, _ in shown[:-1]) and shown[-1][0] is None
        ids = [concept for concept, _ in shown if concept is not None and concept >= 0]
        often = max(ids, key=ids.count)
        assert ids.count(often) > 1
        places = page.locator(f'#complete .segment[data-id="{often}"]')
        places.first.locator(".token").hover()
        assert page.locator(".segment.same").count() == ids.count(often)
        marked = places.evaluate_all("all => all.every(s => s.classList.contains('same'))")
        lines = page.locator("#complete .segment[data-id]").evaluate_all(
            "all => [...new Set(all.map(s => getComputedStyle(s).textDecorationStyle))]"
        )
        assert marked and len(lines) > 1  # not by hue alone
        tip = page.get_by_role("tooltip").text_content()
        assert (
            tip.startswith(f"Concept {often}{ids.count(often)} places") and "a rate of 1.00" in tip
        )
        page.mouse.move(2, 2)
        assert page.locator(".segment.same").count() == 0
        # The same by keyboard, and aloud.
        page.locator("#complete .text").focus()
        first = next(n for n, (concept, _) in enumerate(shown) if concept == often)
        for _ in range(first + 1):
            page.keyboard.press("ArrowRight")
        assert page.locator(".token.here").get_attribute("data-place") == str(first)
        assert page.locator("#announcement").text_content().startswith(f"Concept {often}. ")
        page.keyboard.press("ArrowDown")
        second = next(n for n, x in enumerate(shown) if x[0] == often and n > first)
        assert page.locator(".token.here").get_attribute("data-place") == str(second)
        page.keyboard.press("Escape")
        assert page.get_by_role("tooltip").count() == 0


def test_chat_goes_on(browser, server):
    _, client = server
    route = "v1/chat/completions"
    fields = {"max_completion_tokens": 10, "seed": 5, "temperature": 1, "logprobs": True}
    fields |= {"sememe": {"concepts": True}} | ENDLESS
    messages = []
    with opened(browser, client) as page:
        bias(page, route)
        set_sampling(page, 10)
        page.get_by_role("tab", name="Complete").press("ArrowRight")
        for number, question in enumerate(("Hi 🙂", "And?")):
            messages.append({"role": "user", "content": question})
            wanted = ask(client, route, fields | {"messages": messages})
            (choice,) = wanted["choices"]
            messages.append({"role": "assistant", "content": choice["message"]["content"]})
            page.get_by_role("textbox", name="Message").fill(question)
            page.get_by_role("button", name="Send").click()
            shown = page.locator("#chat article:not(.from-reader)").nth(number)
            shown.locator(".stats").wait_for()
            assert shown.locator(".text").text_content() == messages[-1]["content"]
            if number == 0:
                before = wanted["usage"]["prompt_tokens"]
                ids = choice["sememe"]["concept_ids"][before:]
                assert segments(page, "chat") == cut(ids, 10)


def test_inspect_writes_nothing(browser, server):
    _, client = server
    wanted = ask(client, "v1/sememe/inspect", {"text": HOSTILE})
    with opened(browser, client) as page:
        page.get_by_role("tab", name="Inspect").click()
        page.get_by_role("textbox", name="Text").fill(HOSTILE)
        page.get_by_role("button", name="Read").click()
        page.locator("#inspect .stats").wait_for()
        assert page.locator("#inspect .text").text_content() == HOSTILE
        count = len(wanted["tokens"])
        assert segments(page, "inspect") == cut(wanted["concept_ids"], count)
        token = page.locator("#inspect .token").nth(3)
        colour = "t => getComputedStyle(t).backgroundColor"
        plain = token.evaluate(colour)
        page.get_by_label("Surprise").check()
        assert token.evaluate(colour) != plain
        assert abs(float(token.get_attribute("data-nll")) - wanted["nll"][3]) < 1e-3


def test_a_base_has_no_dial_and_no_chat(browser):
    with (
        running(served_base(), chat_tokenizer(None)) as (_, client),
        opened(browser, client) as page,
    ):
        set_sampling(page, 5)
        page.get_by_role("button", name="Write").click()
        page.locator("#complete .stats").wait_for()
        assert page.get_by_label("Concept rate").count() == 1
        assert page.get_by_label("Concept rate").is_hidden()
        assert [concept for concept, _ in segments(page)] == [None]
        page.get_by_role("tab", name="Chat").click()
        assert "no chat template" in page.locator("#chat .empty").text_content()
        assert page.get_by_label("Message").is_hidden()


def test_asks_for_the_key_and_waits_for_the_model(browser):
    from playwright.sync_api import expect

    with (
        running(load=False, key=KEY) as (service, client),
        opened(browser, client, refused=True) as page,
    ):
        dialog = page.get_by_role("dialog")
        for key, fault in (("another-key", ""), (KEY, "The server does not take this key.")):
            expect(page.locator("#key-fault")).to_have_text(fault)
            dialog.get_by_label("Key", exact=True).fill(key)
            dialog.get_by_role("button").click()
        expect(page.locator("#state")).to_contain_text("being loaded")
        service.start(Engine(served_online(), chat_tokenizer(), max_rows=2, max_queue=2, chunk=64))
        expect(page.get_by_role("tab", name="Complete")).to_be_visible()
        assert dialog.count() == 0
        assert page.evaluate("sessionStorage.getItem('sememe-key')") == KEY
        assert page.evaluate("JSON.stringify(localStorage) + document.cookie") == "{}"


def test_errors_are_sentences(browser, server):
    _, client = server
    with opened(browser, client, refused=True) as page:
        set_sampling(page, 100_000)
        page.get_by_role("button", name="Write").click()
        fault = page.locator("#complete article").get_by_role("alert").text_content()
        assert "need" in fault and "try:" in fault
        page.route("**/v1/completions", lambda route: route.abort())
        set_sampling(page, 10)
        page.get_by_role("button", name="Write").click()
        fault = page.locator("#complete article").nth(1).get_by_role("alert").text_content()
        assert fault == "The server cannot be reached."
        broken = 'data: {"choices":[{"index":0,"text":"abc","finish_reason":null}]}\n\n'
        page.unroute("**/v1/completions")
        page.route("**/v1/completions", lambda route: route.fulfill(body=broken))
        page.get_by_role("button", name="Write").click()
        last = page.locator("#complete article").nth(2)
        assert last.get_by_role("alert").text_content() == "The stream broke off before its end."
        assert last.locator(".text").text_content() == "abc"


def test_narrow_dark_and_light(browser, server):
    _, client = server
    colours = "getComputedStyle(document.body).backgroundColor"
    seen = {}
    for scheme in ("light", "dark"):
        size = {"width": 380, "height": 740}
        with opened(browser, client, viewport=size, color_scheme=scheme) as page:
            page.locator("#settings > summary").click()
            set_sampling(page, 8)
            page.get_by_role("button", name="Write").click()
            page.locator("#complete .stats").wait_for()
            for name in ("complete", "chat", "inspect"):
                page.locator(f"#tab-{name}").click()
                assert page.evaluate("document.documentElement.scrollWidth") <= 380
            seen[scheme] = page.evaluate(colours)
            page.get_by_role("button", name="light and dark").click()
            seen[f"{scheme} switched"] = page.evaluate(colours)
            page.reload()
            page.locator("#work").wait_for()
            assert page.evaluate(colours) == seen[f"{scheme} switched"]
    assert seen["light"] == seen["dark switched"] != seen["dark"] == seen["light switched"]


def test_a_compressor_s_round_trip(browser, server):
    _, client = server
    window = {"span": [0, 12], "tokens": 12, "concepts": [7, 9, 7]}
    codes = {"format": "sememe-codes", "documents": [{"characters": 12, "windows": [window]}]}
    card = {"system": "compressor", "context": 64, "chat": False}
    with opened(browser, client, card=card) as page:
        sent = answer(page, "v1/sememe/compress", codes)
        back = answer(page, "v1/sememe/decompress", {"text": "<b>the sea</b>"})
        page.locator("#work").wait_for()
        assert [tab.text_content() for tab in page.get_by_role("tab").all()] == ["Compress"]
        page.get_by_role("textbox", name="Text").fill("the cold sea")
        page.get_by_role("button", name="Compress and back").click()
        page.locator("#compress .stats").wait_for()
        assert page.locator("#compress .chip").all_text_contents() == ["7", "9", "7"]
        words = page.locator("#compress .pair .text").all_text_contents()
        assert words == ["the cold sea", "<b>the sea</b>"]
        assert sent[0]["text"] == "the cold sea" and back[0] == codes
        assert "4.00 tokens a concept" in page.locator("#compress .stats").text_content()


def test_a_planner_s_plan_is_changed(browser, server):
    _, client = server
    card = {"system": "planner", "context": 64, "chat": True, "sizes": [32, 16, 8]}
    choice = {"index": 0, "text": "cold", "sememe": {"plan": [[3, 17], [], [5]]}}
    seconds = {"queue_s": 0.1, "prefill_s": 0.2, "decode_s": 2}
    fields = {"choices": [choice], "usage": {"completion_tokens": 5}, "sememe": seconds}
    with opened(browser, client, card=card) as page:
        sent = answer(page, "v1/completions", fields)
        page.get_by_role("textbox", name="Source").fill("The sea is")
        page.get_by_label("Concepts of each type").fill("2, 1, 1")
        page.get_by_role("button", name="Plan and write").click()
        page.locator("#plan .stats").wait_for()
        assert sent[0]["sememe"] == {"budget": [2, 1, 1]}
        assert page.locator("#plan .text").text_content() == "cold"
        assert "2.5 tokens/s" in page.locator("#plan .stats").text_content()
        again = page.get_by_role("button", name="Write again with this plan")
        field = page.get_by_label("Type 0, concept 2 of 2")
        field.fill("32")  # there are ids from 0 to 31
        again.click()
        assert len(sent) == 1
        field.fill("21")
        again.click()
        page.locator("#plan .stats").nth(1).wait_for()
        assert sent[1]["sememe"] == {"plan": [[3, 21], [], [5]]}
        assert sent[1]["prompt"] == "The sea is"
