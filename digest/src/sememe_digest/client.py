"""Polite requests to arXiv: one connection, three seconds apart, bounded in time and size."""

import time
from collections.abc import Callable

import httpx

from sememe_digest import DigestError, __version__, kind

PAUSE_SECONDS = 3.0  # arXiv's terms: one request per three seconds, over feeds, pages and PDFs
READ_SECONDS = 60.0  # for one whole answer, however slowly it drips
LONGEST_WAIT_SECONDS = 120.0  # of a Retry-After that is waited for; after that, the next run
MAX_BYTES = 20 * 2**20
clock, sleep = time.monotonic, time.sleep


def answer(url: str, request: Callable[[], httpx.Response]) -> httpx.Response:
    """What `request` returns, in up to three attempts, as far apart as the answers say."""
    for attempt, pause in enumerate((3.0, 9.0, 0.0), 1):
        try:
            response = request()
            # 406 is what arXiv's edge answers to requests that it does not like, as often as 429.
            if response.status_code not in (406, 408, 429) and response.status_code < 500:
                return response
            wait = response.headers.get("retry-after", "")
            got = f"status {response.status_code}{wait and f', Retry-After {wait}'}"
            pause = float(wait) if wait.isdecimal() else pause
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            got = kind(error)
        if attempt == 3 or pause > LONGEST_WAIT_SECONDS:
            break
        sleep(pause)
    raise DigestError(f"{url} got no answer ({got})", "one")


class Client:
    """Requests to arXiv's machines, in single file."""

    def __init__(self, contact: str):
        agent = f"sememe-digest/{__version__} ({contact or 'no contact given'})"
        # Without an Accept header arXiv's edge answers 406.
        headers = {"User-Agent": agent, "Accept": "application/xml, text/html, */*;q=0.8"}
        self.http = httpx.Client(headers=headers, timeout=30, follow_redirects=True)
        self.http.event_hooks = {"request": [self._wait]}  # redirects and retries wait as well
        self.pause, self.last = PAUSE_SECONDS, -PAUSE_SECONDS

    def _wait(self, request: httpx.Request) -> None:
        sleep(max(0, self.last + self.pause - clock()))
        self.last = clock()

    def get(
        self, url: str, etag: str = "", pause: float = PAUSE_SECONDS, limit: int = MAX_BYTES
    ) -> httpx.Response:
        """The answer to one request, at most `limit` bytes, `pause` seconds after the last one."""
        self.pause, headers = pause, {"If-None-Match": etag} if etag else {}

        def request() -> httpx.Response:
            with self.http.stream("GET", url, headers=headers) as response:
                body, end = bytearray(), clock() + READ_SECONDS
                for chunk in response.iter_bytes():
                    body += chunk
                    # httpx's limit is for each read: a server that drips would hold us for ever.
                    if len(body) > limit or clock() > end:
                        got = f"{url} got an answer too {'large' if len(body) > limit else 'slow'}"
                        raise DigestError(got, f"{limit >> 20} MiB or less in {READ_SECONDS:g} s")
            kept = {key: response.headers.get(key, "") for key in ("etag", "retry-after")}
            return httpx.Response(response.status_code, headers=kept, content=bytes(body))

        return answer(url, request)
