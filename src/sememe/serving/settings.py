"""What a server is started with, every limit among it, and where its key comes from."""

import os
from dataclasses import dataclass
from pathlib import Path

from sememe.errors import SememeError

KEY_VARIABLE = "SEMEME_API_KEY"
LINGER = 2.0  # seconds that a connection is open for after a refusal
LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True)
class Settings:
    """Of one server. Times are in seconds."""

    host: str = "127.0.0.1"
    port: int = 8000
    key: str | None = None
    """What clients must send; None: nothing."""
    rows: int = 16
    """Requests that run at the same time."""
    queue: int = 64
    """Requests that wait beside them."""
    cache_bytes: int | None = None
    """Of all rows together; None: a quarter of the memory that is free."""
    queue_timeout: float = 30.0
    """A request that has waited for so long is refused."""
    deadline: float = 300.0
    """A request that is not through by then is ended."""
    drain: float = 30.0
    """What running requests have when the server is asked to stop."""
    body_timeout: float = 30.0
    """For a request to arrive in."""
    keepalive: float = 15.0
    """Between two comments in a stream that says nothing."""
    body_bytes: int = 1_000_000
    headers: int = 100
    header_bytes: int = 32_768
    json_depth: int = 32
    chat_tokens: int = 1024
    """What an answer of a chat may have where the client does not say."""

    @property
    def loopback(self) -> bool:
        """Whether only this machine can reach it."""
        return self.host in LOOPBACK

    @property
    def capacity(self) -> int:
        """Requests that run or wait at the same time."""
        return self.rows + self.queue


def read_key(file: Path | None) -> str | None:
    """The key from a file, else from the environment, else None. It is never an argument, which
    other users see in the list of processes.

    Raises:
        SememeError: a file that cannot be read, or a key that a header cannot carry."""
    key, source = os.environ.get(KEY_VARIABLE), KEY_VARIABLE
    if file is not None:
        try:
            key, source = file.read_text(encoding="utf-8"), str(file)
        except (OSError, UnicodeDecodeError) as error:
            raise SememeError(
                f"{file} cannot be read as a key ({type(error).__name__}): need a text file with "
                "one line. try: --key-file with another path"
            ) from error
    if key is None:
        return None
    key = key.strip()
    if len(key) < 8 or not key.isascii() or not key.isprintable() or " " in key:
        raise SememeError(
            f"{source} holds no usable key: need at least 8 characters, printable ASCII without "
            "spaces. try: openssl rand -hex 24"
        )
    return key


def check_exposure(host: str, key: str | None, no_key: bool) -> None:
    """Raises SememeError for a server that others can reach and anyone may use."""
    if host not in LOOPBACK and key is None and not no_key:
        raise SememeError(
            f"--host {host} can be reached from other machines and there is no key: need one in "
            f"{KEY_VARIABLE} or --key-file. try: a key, or --no-key where the network is your own"
        )


def cache_limit(gigabytes: float | None) -> int:
    """Bytes of `--cache-memory`; by default a quarter of the memory that is free."""
    if gigabytes is not None:
        return int(gigabytes * 1e9)
    import psutil

    return psutil.virtual_memory().available // 4


def served_name(name: str) -> str:
    """What clients call a model: the last part of a path, never the path."""
    path = Path(name)
    return path.resolve().name if path.exists() else path.name
