"""Polite requests to arXiv: one connection, three seconds apart, bounded in time and size."""

import time
from dataclasses import dataclass

import httpx
import stamina

from sememe_digest import __version__
from sememe_digest.errors import Unreachable, Unreadable

PAUSE_SECONDS = 3.0  # arXiv's terms: one request per three seconds, over feeds, pages and PDFs
READ_SECONDS = 60.0  # for one whole answer, however slowly it drips
LONGEST_WAIT = 120.0  # of a Retry-After that is waited for; a longer one is for the next run
ATTEMPTS = 3
MAX_BYTES = 20 * 2**20
# 406 is what arXiv's edge answers to requests that it does not like, as often as 429.
BUSY = {406, 408, 429, 500, 502, 503, 504}

clock = time.monotonic
sleep = time.sleep
# What a retry means is said in the message at the end; a log line for each would only alarm.
stamina.instrumentation.set_on_retry_hooks([])


class Busy(Exception):
    """An answer that asks to come again, after so many seconds where it says so."""

    def __init__(self, status: int, retry_after: str | None):
        super().__init__(f"status {status}")
        self.seconds = float(retry_after) if (retry_after or "").strip().isdigit() else None


def backoff(error: Exception) -> bool | float:
    """Whether to try again, or after how many seconds."""
    if isinstance(error, Busy):
        if error.seconds is None:
            return True
        return error.seconds if error.seconds <= LONGEST_WAIT else False
    return isinstance(error, httpx.TransportError)


def retries() -> stamina._core._RetryContextIterator:
    """Attempts at one request, further apart each time."""
    return stamina.retry_context(
        on=backoff,
        attempts=ATTEMPTS,
        timeout=None,
        wait_initial=PAUSE_SECONDS,
        wait_max=30,
        wait_exp_base=3,
    )


@dataclass
class Answer:
    """A response that was read to its end. 304 has no body."""

    status: int
    body: bytes
    etag: str


class Client:
    """Requests to arXiv's machines, in single file."""

    def __init__(self, contact: str = ""):
        about = f"sememe-digest/{__version__}" + (f" ({contact})" if contact else "")
        # Without an Accept header arXiv's edge answers 406.
        headers = {"User-Agent": about, "Accept": "application/xml, text/html, */*;q=0.8"}
        self.http = httpx.Client(
            headers=headers,
            timeout=30,
            follow_redirects=True,
            limits=httpx.Limits(max_connections=1),
            event_hooks={"request": [self._wait]},
        )
        self.pause = PAUSE_SECONDS
        self.last: float | None = None

    def _wait(self, request: httpx.Request) -> None:
        """Holds a request, a redirect too, until it is polite to send it."""
        if self.last is not None and (wait := self.last + self.pause - clock()) > 0:
            sleep(wait)
        self.last = clock()

    def get(
        self,
        url: str,
        etag: str = "",
        pause: float | None = None,
        max_bytes: int = MAX_BYTES,
    ) -> Answer:
        """The answer to one request, of any status but those that ask to come again."""
        self.pause = PAUSE_SECONDS if pause is None else pause
        headers = {"If-None-Match": etag} if etag else {}
        try:
            for attempt in retries():
                with attempt:
                    return self._read(url, headers, max_bytes)
        except Busy as error:
            hint = f" and Retry-After: {error.seconds:g}" if error.seconds else ""
            message = f"{url} answered with {error}{hint}: need status 200. try: again later"
            raise Unreachable(message) from error
        except httpx.HTTPError as error:
            message = f"{url} was not reached ({error}): need an answer. try: again later"
            raise Unreachable(message) from error
        raise AssertionError  # a retry ends with an answer or with an exception

    def _read(self, url: str, headers: dict[str, str], max_bytes: int) -> Answer:
        with self.http.stream("GET", url, headers=headers) as response:
            if response.status_code in BUSY:
                raise Busy(response.status_code, response.headers.get("retry-after"))
            start = clock()
            body = bytearray()
            for chunk in response.iter_bytes():
                body += chunk
                if len(body) > max_bytes:
                    need = f"need at most {max_bytes / 2**20:g} MiB"
                    raise Unreadable(f"{url} is larger than that: {need}. try: the page itself")
                # httpx's own time limit is per read: a server that drips would hold us for ever.
                if clock() - start > READ_SECONDS:
                    need = f"need it within {READ_SECONDS:g} s"
                    raise Unreachable(f"{url} answers too slowly: {need}. try: again later")
            return Answer(response.status_code, bytes(body), response.headers.get("etag", ""))
