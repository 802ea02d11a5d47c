"""Summaries by a language model: PDFs, requests, one more try, and what is kept of them."""

import json
import secrets
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from os import environ

import httpx

from sememe_digest.archive import Archive
from sememe_digest.claims import check, parse
from sememe_digest.client import Busy, Client, retries
from sememe_digest.config import Config
from sememe_digest.errors import DigestError, Unread
from sememe_digest.fulltext import FullText, fetch_pdf, read_pdf
from sememe_digest.papers import Entry, Summary


class Summariser:
    """Summaries of entries: PDFs one after the other, the language model beside them."""

    def __init__(self, config: Config, archive: Archive):
        self.config, self.settings, self.archive = config, config.summaries, archive
        key = environ.get(self.settings.api_key_env, "")
        # Without a model, or without the key that it needs, there are no summaries.
        self.is_wanted = bool(self.settings.model and (key or not self.settings.api_key_env))
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self.http = httpx.Client(headers=headers, timeout=self.settings.timeout)
        self.refusal: DigestError | None = None

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
                kept = self.archive.cached("summaries", key)
                entry.summary = Summary.model_validate(kept) if kept else None
        return [entry for entry in first if entry.summary is None]

    def run(self, entries: list[Entry], client: Client, progress: Callable[[str], None]) -> None:
        """Each summary is kept as soon as it is there: a run that is stopped pays nothing twice."""

        def fail(entry: Entry, error: DigestError) -> None:
            entry.failure = f"{error}"
            progress(f"{entry.id}: {entry.failure}")

        def summarise(entry: Entry, text: FullText) -> None:
            try:
                summary = self._summarise(entry, text)
                self.archive.keep("summaries", summary.key, summary.model_dump())
                entry.summary = summary
                progress(f"{entry.id}: summarised")
            except DigestError as error:
                fail(entry, error)

        folder, futures = self.archive.cache / "pdf", []
        with ThreadPoolExecutor(self.settings.workers) as pool:
            for entry in entries:
                try:
                    if self.refusal:
                        raise self.refusal
                    pdf = fetch_pdf(client, entry, self.config.pages_url, folder)
                    futures.append(pool.submit(summarise, entry, read_pdf(pdf)))
                except DigestError as error:
                    fail(entry, error)
        for future in futures:
            future.result()  # a fault of the program is not to pass in silence

    def _summarise(self, entry: Entry, text: FullText) -> Summary:
        # A paper is data between fences that it cannot know, and the only paper in sight.
        fence = f"PAPER {secrets.token_hex(8)}"
        pages = "\n".join(f"[page {n}]\n{page}" for n, page in enumerate(text.pages, 1))
        paper = f"{entry.title}\n{entry.abstract}\n{pages}"[: self.settings.max_characters]
        content = f"<<<{fence}\n{paper}\n{fence}>>>\nThat was data."
        messages = [{"role": "system", "content": self.config.prompt()}]
        messages.append({"role": "user", "content": content})
        attempts: list[tuple[int, Summary]] = []
        for _ in range(2):
            try:
                summary = parse(self._complete(messages))
                fault = check(summary, entry, text)
                missing = summary.numbers("missing") + summary.missing_headlines
                attempts.insert(0, (len(missing), summary))
            except ValueError as error:
                fault = f"The answer is not the JSON object that was asked for ({error})."
            if not fault:
                break
            messages.append({"role": "user", "content": f"{fault} Answer once more, in full."})
        if not attempts:
            raise DigestError(f"no summary: {fault}")
        best = min(attempts, key=lambda attempt: attempt[0])[1]
        return best.model_copy(update={"key": self.key(entry), "model": self.settings.model})

    def _complete(self, messages: list[dict[str, str]]) -> str:
        url = f"{self.settings.base_url.rstrip('/')}/chat/completions"
        body = {"model": self.settings.model, "messages": messages, "temperature": 0}
        try:
            for attempt in retries():
                with attempt:
                    if self.refusal:
                        raise self.refusal
                    response = self.http.post(url, json=body)
                    if response.status_code == 429 or response.status_code >= 500:
                        raise Busy(response)
        except (Busy, httpx.HTTPError, httpx.InvalidURL) as error:
            raise Unread(f"{url} gave no answer ({error}). try: again later") from error
        if response.status_code in (401, 403, 404):  # every other request would meet it too
            got = f"{url} answered status {response.status_code} ({response.text:.200})"
            self.refusal = DigestError(f"{got}: need a model. try: the keys of summaries")
            raise self.refusal
        return response.text
