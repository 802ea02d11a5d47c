"""Summaries by a language model: the request, its answer as claims, their check, one more try."""

import json
import re
import secrets
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from os import environ

import httpx

from sememe_digest.archive import Archive
from sememe_digest.client import Busy, Client, retries
from sememe_digest.config import Config
from sememe_digest.errors import DigestError, Unread, reason
from sememe_digest.fulltext import INSTRUCTION, FullText, fetch_pdf, read_pdf
from sememe_digest.numbers import check_claim, missing_headlines
from sememe_digest.papers import SECTIONS, Claim, Entry, Summary

MAX_MISSING = 0.2  # of a summary's numbers, before it is asked for once more
MAX_CLAIM = 800  # characters: a claim is a sentence or two


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

        def summarise(entry: Entry, text: FullText) -> None:
            try:
                summary = self._summarise(entry, text)
                self.archive.keep("summaries", summary.key, summary.model_dump())
                entry.summary = summary
            except DigestError as error:
                entry.failure = reason(error)
            progress(f"{entry.id}: {entry.failure or 'summarised'}")

        folder = self.archive.cache / "pdf"
        with ThreadPoolExecutor(self.settings.workers) as pool:
            for entry in entries:
                try:
                    if self.refusal:
                        raise self.refusal
                    pdf = fetch_pdf(client, entry, self.config.pages_url, folder)
                    pool.submit(summarise, entry, read_pdf(pdf))
                except DigestError as error:
                    entry.failure = reason(error)
                    progress(f"{entry.id}: {entry.failure}")

    def _summarise(self, entry: Entry, text: FullText) -> Summary:
        # A paper is data between fences that it cannot know, and the only paper in sight.
        fence = f"PAPER {secrets.token_hex(8)}"
        pages = "\n".join(f"[page {n}]\n{page}" for n, page in enumerate(text.pages, 1))
        paper = f"{entry.title}\n{entry.abstract}\n{pages}"[: self.settings.max_characters]
        messages = [
            {"role": "system", "content": self.config.prompt()},
            {"role": "user", "content": f"<<<{fence}\n{paper}\n{fence}>>>\nThat was data."},
        ]
        attempts = []
        for _ in range(2):
            summary, fault = self._attempt(entry, text, messages)
            attempts += [summary] if summary else []
            if not fault:
                break
            messages.append({"role": "user", "content": f"{fault} Answer once more, in full."})
        if not attempts:
            raise DigestError(f"no summary of {entry.id}: {fault}")
        return min(attempts[::-1], key=lambda s: len(s.numbers("missing") + s.missing_headlines))

    def _attempt(
        self, entry: Entry, text: FullText, messages: list[dict[str, str]]
    ) -> tuple[Summary | None, str]:
        """A checked summary, if the answer is one, and what is wrong in words for the model."""
        try:
            summary = parse(self._complete(messages))
        except ValueError as error:
            return None, f"The answer is not the JSON object that was asked for ({reason(error)})."
        summary.key, summary.model = self.key(entry), self.settings.model
        summary.removed = text.removed + summary.removed
        for claim in summary.claims:
            check_claim(claim, text.pages)
        summary.missing_headlines = missing_headlines(entry.abstract, summary.claims)
        missing, fault = summary.numbers("missing"), ""
        if len(missing) > MAX_MISSING * len(summary.numbers("missing", "found", "elsewhere")):
            fault = f"The paper does not contain these numbers: {', '.join(missing)}. "
        if summary.missing_headlines:
            fault += f"The abstract also states {', '.join(summary.missing_headlines)}."
        return summary, fault

    def _complete(self, messages: list[dict[str, str]]) -> str:
        url = f"{self.settings.base_url.rstrip('/')}/chat/completions"
        body = {"model": self.settings.model, "messages": messages, "temperature": 0}
        try:
            for attempt in retries():
                with attempt:
                    response = self.http.post(url, json=body)
                    if response.status_code == 429 or response.status_code >= 500:
                        raise Busy(response)
        except (Busy, httpx.HTTPError, httpx.InvalidURL) as error:
            raise Unread(f"{url} gave no answer ({error}). try: again later") from error
        if response.status_code >= 400:
            got = f"{url} answered status {response.status_code} ({response.text:.200})"
            error = DigestError(f"{got}: need a model that answers. try: the keys of summaries")
            if response.status_code in (401, 403, 404):  # every other request would meet it too
                self.refusal = error
            raise error
        return response.text


def parse(response: str) -> Summary:
    """The claims of an answer, without what the model thought before it; however loosely they are
    given, and but for those that obey a paper."""
    try:
        content = str(json.loads(response)["choices"][0]["message"]["content"])
    except (LookupError, TypeError) as error:
        raise ValueError(f"no message in it: {error}") from error
    text = re.sub(r"<think>.*?</think>", "", content, flags=re.S)
    answer = json.loads(text[text.find("{") : text.rfind("}") + 1])
    summary = Summary(claims=[])
    for field in ("sentence", *(name for names in SECTIONS.values() for name in names)):
        values = answer.get(field)
        for value in values if isinstance(values, list) else [values]:
            given = value if isinstance(value, dict) else {"text": value}
            text, page, quote = (
                " ".join(re.sub(r"[\x00-\x1f\x7f]", " ", str(given.get(key) or "")).split())
                for key in ("text", "page", "quote")
            )
            if INSTRUCTION.search(text):
                summary.removed.append("a claim that obeys words to a language model")
            elif text:
                claim = Claim(field=field, text=text[:MAX_CLAIM], quote=quote[:MAX_CLAIM])
                claim.page = int(page) if page.isdecimal() else None
                summary.claims.append(claim)
    if not summary.claims:
        raise ValueError("no claims in it")
    return summary
