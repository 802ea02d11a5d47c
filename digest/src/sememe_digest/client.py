"""Polite requests to arXiv: one connection, three seconds apart, bounded in time and size."""

import time
from typing import Any

import httpx
import stamina

from sememe_digest import __version__
from sememe_digest.errors import Unread

PAUSE_SECONDS = 3.0  # arXiv's terms: one request per three seconds, over feeds, pages and PDFs
READ_SECONDS = 60.0  # for one whole answer, however slowly it drips
LONGEST_WAIT_SECONDS = 120.0  # of a Retry-After that is waited for; after that, the next run
MAX_BYTES = 20 * 2**20
# 406 is what arXiv's edge answers to requests that it does not like, as often as 429.
BUSY = {406, 408, 429, 500, 502, 503, 504}
clock, sleep = time.monotonic, time.sleep
# What failed is said at the end of the attempts; a log line for each would only alarm.
stamina.instrumentation.set_on_retry_hooks([])


class Busy(Exception):
    """An answer that asks to come again, after so many seconds where it says so."""

    def __init__(self, response: httpx.Response):
        wait = response.headers.get("retry-after", "")
        super().__init__(f"status {response.status_code}{wait and f', Retry-After {wait}'}")
        self.seconds = float(wait) if wait.isdecimal() else None


def retries() -> Any:
    """Up to three attempts at one request, further apart each time or as far as the answer says."""

    def backoff(error: Exception) -> bool | float:
        if isinstance(error, Busy) and error.seconds is not None:
            return error.seconds if error.seconds <= LONGEST_WAIT_SECONDS else False
        return isinstance(error, Busy | httpx.TransportError)

    pauses = {"wait_initial": 3, "wait_max": 30, "wait_exp_base": 3}
    return stamina.retry_context(backoff, attempts=3, timeout=None, **pauses)


class Client:
    """Requests to arXiv's machines, in single file."""

    def __init__(self, contact: str):
        agent = f"sememe-digest/{__version__} ({contact or 'no contact given'})"
        # Without an Accept header arXiv's edge answers 406.
        headers = {"User-Agent": agent, "Accept": "application/xml, text/html, */*;q=0.8"}
        self.http = httpx.Client(headers=headers, timeout=30, follow_redirects=True)
        # Redirects and further attempts wait for their turn as well.
        self.http.event_hooks = {"request": [self._wait]}
        self.pause, self.last = PAUSE_SECONDS, -PAUSE_SECONDS

    def _wait(self, request: httpx.Request) -> None:
        sleep(max(0, self.last + self.pause - clock()))
        self.last = clock()

    def get(self, url: str, etag: str = "", pause: float = 0, limit: int = 0) -> httpx.Response:
        """The answer to one request, of any status but those that ask to come again."""
        self.pause = max(pause, PAUSE_SECONDS)
        headers = {"If-None-Match": etag} if etag else {}
        try:
            for attempt in retries():
                with attempt, self.http.stream("GET", url, headers=headers) as response:
                    return self._read(response, limit or MAX_BYTES)
        except (Busy, httpx.HTTPError, httpx.InvalidURL) as error:
            raise Unread(f"{url} gave no answer ({error}). try: again later") from error
        raise AssertionError("attempts end with an answer or an exception")

    def _read(self, response: httpx.Response, limit: int) -> httpx.Response:
        if response.status_code in BUSY:
            raise Busy(response)
        body, end = bytearray(), clock() + READ_SECONDS
        for chunk in response.iter_bytes():
            body += chunk
            if len(body) > limit:
                raise Unread(f"{response.url} is too large: need {limit >> 20} MiB or less")
            # httpx's own limit is for each read: a server that drips would hold us for ever.
            if clock() > end:
                need = f"need it within {READ_SECONDS:g} s. try: again later"
                raise Unread(f"{response.url} answers too slowly: {need}")
        etag = {"ETag": response.headers.get("etag", "")}
        return httpx.Response(response.status_code, headers=etag, content=bytes(body))
