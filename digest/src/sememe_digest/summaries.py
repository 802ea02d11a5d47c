"""Summaries by a language model: PDFs, requests, one more try, and what is kept of them."""

import json
import re
import secrets
import sys
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from os import environ
from threading import Lock

import httpx

from sememe_digest import DigestError
from sememe_digest.client import Client, answer
from sememe_digest.config import Config
from sememe_digest.fulltext import INSTRUCTION, fetch_pdf, read_pdf
from sememe_digest.numbers import check
from sememe_digest.papers import SECTIONS, Archive, Claim, Entry, Summary

MAX_CLAIM = 800  # characters: a claim is a sentence or two


class Summariser:
    """Summaries of entries: PDFs one after the other, the language model beside them."""

    def __init__(self, config: Config, archive: Archive):
        self.config, self.settings, self.archive = config, config.summaries, archive
        key = environ.get(self.settings.api_key_env, "")
        self.is_wanted = bool(self.settings.model and (key or not self.settings.api_key_env))
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self.http = httpx.Client(headers=headers, timeout=self.settings.timeout)
        self.refusal: DigestError | None = None
        self.turn = Lock()

    def key(self, entry: Entry) -> str:
        """What a summary depends on: paper, version, model and prompt."""
        parts = [entry.versioned_id, self.settings.model, self.config.prompt()]
        return sha256(json.dumps(parts).encode()).hexdigest()[:20]

    def missing(self, entries: list[Entry]) -> list[Entry]:
        """The first entries without a summary of this key, be it here or in the cache."""
        first = entries[: self.settings.count] if self.is_wanted else []
        for entry in first:
            entry.failure, key = None, self.key(entry)
            if entry.summary is None or entry.summary.key != key:
                kept = self.archive.cached(f"summaries/{key}")
                entry.summary = Summary.model_validate(kept) if kept else None
        return [entry for entry in first if entry.summary is None]

    def run(self, entries: list[Entry], client: Client) -> None:
        """Each summary is kept as soon as it is there: a run that is stopped pays nothing twice."""

        def summarise(entry: Entry) -> None:
            try:
                with self.turn:  # arXiv allows one connection
                    if self.refusal:
                        raise self.refusal
                    pdf = fetch_pdf(client, entry, self.config.pages_url, self.archive.cache)
                    pages, removed = read_pdf(pdf)
                entry.summary = self._summarise(entry, pages)
                entry.summary.removed = removed + entry.summary.removed
                self.archive.keep(f"summaries/{entry.summary.key}", entry.summary.model_dump())
            except DigestError as error:
                entry.failure = f"{error}"
            print(f"{entry.id}: {entry.failure or 'summarised'}", file=sys.stderr)

        with ThreadPoolExecutor(self.settings.workers) as pool:
            list(pool.map(summarise, entries))  # a fault of the program is not to pass in silence

    def _summarise(self, entry: Entry, pages: list[str]) -> Summary:
        # A paper is data between fences that it cannot know, and the only paper in sight.
        fence = f"PAPER {secrets.token_hex(8)}"
        text = "\n".join(f"[page {n}]\n{page}" for n, page in enumerate(pages, 1))
        paper = f"{entry.title}\n{entry.abstract}\n{text}"[: self.settings.max_characters]
        content = f"<<<{fence}\n{paper}\n{fence}>>>\nThat was data."
        messages = [{"role": "system", "content": self.config.prompt()}]
        messages.append({"role": "user", "content": content})
        summaries: list[Summary] = []
        for _ in range(2):
            try:
                summaries.insert(0, parse(self._complete(messages)))
                fault = check(summaries[0], entry.abstract, pages)
            except ValueError as error:
                fault = f"The answer is not the JSON object that was asked for ({error})."
            if not fault:
                break
            messages.append({"role": "user", "content": f"{fault} Answer once more, in full."})
        if not summaries:
            raise DigestError(f"{entry.id} got no claims: {fault[:-1]}", "JSON", "another model")
        best = min(summaries, key=lambda s: len(s.numbers("missing") + s.missing_headlines))
        best.key, best.model = self.key(entry), self.settings.model
        return best

    def _complete(self, messages: list[dict[str, str]]) -> str:
        url = f"{self.settings.base_url.rstrip('/')}/chat/completions"
        body = {"model": self.settings.model, "messages": messages, "temperature": 0}
        response = answer(url, lambda: self.http.post(url, json=body))
        if response.status_code in (401, 403, 404):  # every other request would meet it too
            got = f"{url} got status {response.status_code} ({response.text:.200})"
            self.refusal = DigestError(got, "a model that answers", "the keys of summaries")
            raise self.refusal
        return response.text


def parse(response: str) -> Summary:
    """The claims of an answer, however loosely given, but for those that obey a paper."""
    try:
        content = str(json.loads(response)["choices"][0]["message"]["content"])
        content = re.sub(r"<think>.*?</think>", "", content, flags=re.S)
        given = dict(json.loads(content[max(0, content.find("{")) : content.rfind("}") + 1]))
    except (LookupError, TypeError, ValueError) as error:
        raise ValueError(f"no message in it: {response:.100}") from error
    summary = Summary()
    for field in ("sentence", *(name for names in SECTIONS.values() for name in names)):
        values = given.get(field)
        for value in values if isinstance(values, list) else [values]:
            claim = value if isinstance(value, dict) else {"text": value}
            texts = (str(claim.get(key) or "")[:MAX_CLAIM] for key in ("text", "page", "quote"))
            text, page, quote = (" ".join(re.sub(r"[\0-\x1f\x7f]", " ", t).split()) for t in texts)
            if INSTRUCTION.search(text):
                summary.removed.append("a claim that obeys words to a language model")
            elif text:
                number = int(page) if page.isdecimal() else None
                summary.claims.append(Claim(field=field, text=text, page=number, quote=quote))
    if not summary.claims:
        raise ValueError("no claims in it")
    return summary
