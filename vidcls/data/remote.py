"""Shards behind http(s):// or s3://: fetched through fsspec, kept in the node's cache.

Access is a matter of the environment (AWS_*, proxies, .netrc), never of the URL or of the run's settings.
"""

import logging
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar
from urllib.parse import urlsplit

from tenacity import Retrying, retry_if_exception_type, stop_after_attempt, wait_random_exponential

from vidcls.data.cache import LONGEST_PAUSE, Part, ShardCache
from vidcls.data.places import CacheSettings, PlaceError, check_file_name

FIRST_PAUSE = 1.0
"""Seconds before the second attempt, at most; doubled for each further one up to LONGEST_PAUSE."""
SLOWEST = 64 * 1024
"""Bytes a second; a server that keeps below it for a whole file counts as stalled."""
CHUNK = 2**24
RETRIED_STATUS = (408, 425, 429)  # and every 5xx
WRONG_DIGESTS = 2
"""A file with another digest may have been damaged on its way once; twice, and it is the file."""

logger = logging.getLogger(__name__)
Result = TypeVar("Result")


class _Transient(Exception):
    """A failure that another attempt may not meet."""


class RemoteFolder:
    """A ShardFolder at `url`, without a slash at its end; ImportError if a package for it is missing."""

    def __init__(self, url: str, settings: CacheSettings) -> None:
        self.name = url
        self._settings = settings
        self._cache = ShardCache(settings)
        self._process: _Process | None = None
        self._here()

    def __reduce__(self) -> tuple[Any, ...]:
        return RemoteFolder, (self.name, self._settings)

    def read(self, file: str, limit: int) -> bytes:
        url = self._url(file)
        return self._insist(url, lambda: b"".join(self._stream(url, limit)))

    def check(self, sizes: dict[str, int]) -> None:
        """Only the names: a request for each shard would not be cheap. `open` finds the rest."""
        for file in sizes:
            check_file_name(self.name, file)

    def open(self, file: str, size: int, sha256: str) -> int:
        url = self._url(file)
        return self._cache.open(sha256, size, url, lambda part: self._download(url, sha256, part))

    def mend(self, file: str, size: int, sha256: str) -> bool:
        return self._cache.drop_damaged(sha256, size)

    def prefetch(self, files: Iterable[tuple[str, int, str]]) -> None:
        process = self._here()
        with process.lock:
            process.waiting = deque(files)
            if process.waiting and (process.thread is None or not process.thread.is_alive()):
                process.thread = threading.Thread(target=self._fetch_waiting, args=(process,), daemon=True)
                process.thread.start()

    def _fetch_waiting(self, process: "_Process") -> None:
        while True:
            with process.lock:
                if not process.waiting:
                    process.thread = None
                    return
                file, size, sha256 = process.waiting.popleft()
            try:
                os.close(self.open(file, size, sha256))
            except PlaceError as error:
                logger.debug("prefetch: %s", error)

    def _download(self, url: str, sha256: str, part: Part) -> None:
        wrong = 0

        def attempt() -> None:
            nonlocal wrong
            part.restart()
            for data in self._stream(url, part.size):
                part.write(data)
            if part.written < part.size:
                raise _Transient(f"ended after {part.written} of {part.size} bytes")
            if part.sha256 != sha256:
                wrong += 1
                reason = f"its sha256 is {part.sha256}, but {sha256} in the index"
                raise _Transient(reason) if wrong < WRONG_DIGESTS else PlaceError(reason)

        self._insist(url, attempt)

    def _stream(self, url: str, most: int) -> Iterator[bytes]:
        """The file's bytes; PlaceError if it has more than `most`."""
        transport = self._here().transport
        ends, received = time.monotonic() + self._settings.timeout_seconds + most / SLOWEST, 0
        try:
            for data in transport.stream(transport.filesystem, url, most):
                received += len(data)
                if received > most:
                    raise PlaceError(f"has more than the {most} bytes that are expected at most")
                yield data
                if time.monotonic() > ends:
                    raise _Transient(f"sends less than {SLOWEST} bytes a second")
        except (_Transient, PlaceError):
            raise
        except Exception as error:
            raise _judged(error, transport.transient) from error

    def _insist(self, url: str, attempt: Callable[[], Result]) -> Result:
        retrying = Retrying(
            stop=stop_after_attempt(self._settings.attempts),
            wait=wait_random_exponential(multiplier=FIRST_PAUSE, max=LONGEST_PAUSE),
            retry=retry_if_exception_type(_Transient),
            reraise=True,
        )
        try:
            return retrying(attempt)
        except _Transient as error:
            raise PlaceError(f"{url}: gave up after {self._settings.attempts} attempts; the last: {error}") from error
        except PlaceError as error:
            raise PlaceError(f"{url}: {error}") from error

    def _url(self, file: str) -> str:
        check_file_name(self.name, file)
        return f"{self.name}/{file}"

    def _here(self) -> "_Process":
        """What belongs to this process alone, and is made anew after a fork."""
        process = self._process
        if process is None or process.pid != os.getpid():
            scheme = urlsplit(self.name).scheme
            transport = TRANSPORTS[scheme](self._settings)
            _filesystems[id(transport.filesystem)] = transport.filesystem
            self._process = process = _Process(transport)
        return process


@dataclass(frozen=True)
class _Transport:
    """filesystem: of fsspec. transient: its errors that may pass.

    stream(filesystem, url, most): the file's bytes, or if it has more than `most`, at least one of those too.
    """

    filesystem: Any
    stream: Callable[[Any, str, int], Iterator[bytes]]
    transient: tuple[type[Exception], ...]


@dataclass(eq=False)
class _Process:
    """lock guards waiting and thread."""

    transport: _Transport
    pid: int = field(default_factory=os.getpid)
    lock: threading.Lock = field(default_factory=threading.Lock)
    waiting: deque[tuple[str, int, str]] = field(default_factory=deque)
    thread: threading.Thread | None = None


# A forked child must not even drop its parent's file systems. fsspec would close their connections: it asks an event
# loop that does not run in the child, waits a second, and then takes the sockets out of the epoll set that the child
# shares with its parent, which would wait for them in vain. By id, since those with equal options compare equal.
_filesystems: "weakref.WeakValueDictionary[int, Any]" = weakref.WeakValueDictionary()
_inherited: list[Any] = []
os.register_at_fork(after_in_child=lambda: _inherited.extend(_filesystems.values()))


def _http(settings: CacheSettings) -> _Transport:
    import aiohttp
    from fsspec.implementations.http import HTTPFileSystem

    timeout = settings.timeout_seconds
    filesystem = HTTPFileSystem(
        skip_instance_cache=True,
        client_kwargs={
            # Without total=None fsspec would end every download after five minutes.
            "timeout": aiohttp.ClientTimeout(total=None, connect=timeout, sock_connect=timeout, sock_read=timeout),
            "headers": {"Accept-Encoding": "identity"},
            "trust_env": True,
            "read_bufsize": 2**20,
        },
    )
    return _Transport(filesystem, _stream_http, (aiohttp.ClientError, OSError))


def _stream_http(filesystem: Any, url: str, most: int) -> Iterator[bytes]:
    # block_size=0: one plain request. size: without it fsspec would first ask for it.
    with filesystem.open(url, block_size=0, size=1) as stream:
        length = stream.r.headers.get("Content-Length", "0")
        if length.isdecimal() and int(length) > most:
            raise PlaceError(f"has {length} bytes, more than the {most} that are expected at most")
        while data := stream.read(CHUNK):
            yield data


def _s3(settings: CacheSettings) -> _Transport:
    import aiohttp
    import botocore.exceptions as botocore
    import s3fs

    filesystem = s3fs.S3FileSystem(
        skip_instance_cache=True,
        use_listings_cache=False,
        config_kwargs={
            "connect_timeout": settings.timeout_seconds,
            "read_timeout": settings.timeout_seconds,
            "retries": {"max_attempts": 0},
        },
    )
    filesystem.retries = 1  # one owner of retries
    passing = (botocore.HTTPClientError, botocore.ConnectionError, botocore.CredentialRetrievalError)
    return _Transport(filesystem, _stream_s3, (*passing, aiohttp.ClientError, OSError))


def _stream_s3(filesystem: Any, url: str, most: int) -> Iterator[bytes]:
    position, size = 0, CHUNK
    while size == CHUNK:
        # The last range asks for one byte too many, to see that there is none: one that starts at the end is an error.
        end = position + CHUNK if position + CHUNK < most else most + 1
        try:
            data = filesystem.cat_file(url, start=position, end=end)
        except Exception as error:
            if position and _status(error) == 416:
                return
            raise
        yield data
        position, size = position + len(data), len(data)


TRANSPORTS = {"http": _http, "https": _http, "s3": _s3}


def _status(error: BaseException | None) -> int | None:
    """The HTTP status behind an error of aiohttp or s3fs, if there is one."""
    while error is not None:
        if type(status := getattr(error, "status", None)) is int:
            return status
        if isinstance(response := getattr(error, "response", None), dict):
            return response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        error = error.__cause__
    return None


def _judged(error: Exception, transient: tuple[type[Exception], ...]) -> _Transient | PlaceError:
    status = _status(error)
    reason = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    if status is not None:
        reason = f"HTTP status {status} ({reason})"
    if isinstance(error, FileNotFoundError):
        return PlaceError(f"does not exist ({reason})")
    if status is not None:
        return _Transient(reason) if status in RETRIED_STATUS or status >= 500 else PlaceError(reason)
    # ValueError: a certificate that does not hold, or a redirect that leads nowhere.
    lasting = isinstance(error, PermissionError | ValueError) or not isinstance(error, transient)
    return PlaceError(reason) if lasting else _Transient(reason)
