"""Polite requests to arXiv: one connection, three seconds apart, bounded in time and size."""

import re
import time
from collections.abc import Callable

import httpx
import stamina

from sememe_digest import __version__
from sememe_digest.errors import DigestError

PAUSE_SECONDS = 3.0  # arXiv's terms: one request per three seconds, over feeds, pages and PDFs
READ_SECONDS = 60.0  # for one whole answer, however slowly it drips
LONGEST_WAIT_SECONDS = 120.0  # of a Retry-After that is waited for; after that, the next run
MAX_BYTES = 20 * 2**20
clock, sleep = time.monotonic, time.sleep
# What failed is said at the end of the attempts; a log line for each would only alarm.
stamina.instrumentation.set_on_retry_hooks([])


class Busy(Exception):
    """An answer that asks to come again, after so many seconds where it says so."""

    def __init__(self, response: httpx.Response):
        wait = response.headers.get("retry-after", "")
        super().__init__(f"status {response.status_code}{wait and f', Retry-After {wait}'}")
        self.seconds = float(wait) if wait.isdecimal() else None


def raise_if_busy(response: httpx.Response) -> None:
    """What a client of httpx does with each answer, so that `answer` may try again."""
    # 406 is what arXiv's edge answers to requests that it does not like, as often as 429.
    if response.status_code in (406, 408, 429) or response.status_code >= 500:
        raise Busy(response)


def answer(url: str, request: Callable[[], httpx.Response]) -> httpx.Response:
    """What `request` returns, in up to three attempts: further apart each time, or as far as the
    answer says."""

    def backoff(error: Exception) -> bool | float:
        if isinstance(error, Busy) and error.seconds is not None:
            return error.seconds if error.seconds <= LONGEST_WAIT_SECONDS else False
        return isinstance(error, Busy | httpx.TransportError)

    pauses = {"wait_initial": 3, "wait_max": 30, "wait_exp_base": 3}
    try:
        return stamina.RetryingCaller(attempts=3, timeout=None, **pauses)(backoff, request)
    except (Busy, httpx.HTTPError, httpx.InvalidURL) as error:
        # ConnectError and its like say it by their names; their texts are the system's.
        name = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", type(error).__name__).lower()
        got = f"{error}" if isinstance(error, Busy) else name
        raise DigestError(f"{url} got no answer ({got})", "one") from error


class Client:
    """Requests to arXiv's machines, in single file."""

    def __init__(self, contact: str):
        agent = f"sememe-digest/{__version__} ({contact or 'no contact given'})"
        # Without an Accept header arXiv's edge answers 406.
        headers = {"User-Agent": agent, "Accept": "application/xml, text/html, */*;q=0.8"}
        self.http = httpx.Client(headers=headers, timeout=30, follow_redirects=True)
        # Redirects and further attempts wait for their turn as well.
        self.http.event_hooks = {"request": [self._wait], "response": [raise_if_busy]}
        self.pause, self.last = PAUSE_SECONDS, -PAUSE_SECONDS

    def _wait(self, request: httpx.Request) -> None:
        sleep(max(0, self.last + self.pause - clock()))
        self.last = clock()

    def get(
        self, url: str, etag: str = "", pause: float = PAUSE_SECONDS, limit: int = MAX_BYTES
    ) -> httpx.Response:
        """The answer to one request, at most `limit` bytes, `pause` seconds after the last one."""
        self.pause = pause
        return answer(url, lambda: self._read(url, {"If-None-Match": etag} if etag else {}, limit))

    def _read(self, url: str, headers: dict[str, str], limit: int) -> httpx.Response:
        with self.http.stream("GET", url, headers=headers) as response:
            body, end = bytearray(), clock() + READ_SECONDS
            for chunk in response.iter_bytes():
                body += chunk
                # httpx's own limit is for each read: a server that drips would hold us for ever.
                if len(body) > limit or clock() > end:
                    got = f"{url} got an answer too {'large' if len(body) > limit else 'slow'}"
                    raise DigestError(got, f"{limit >> 20} MiB or less in {READ_SECONDS:g} s")
        etag = {"ETag": response.headers.get("etag", "")}
        return httpx.Response(response.status_code, headers=etag, content=bytes(body))
