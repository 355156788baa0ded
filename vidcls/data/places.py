"""Where a folder of shards can be: on a local disk, or behind http(s):// or s3:// with a cache on the node.

Nothing else is opened: no pipes, no chained URLs, no other protocols. remote.py and cache.py hold the remote kind.
"""

import os
import re
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol
from urllib.parse import urlsplit

from vidcls.options import DEFAULT_CACHE_GB

SCHEMES = ("http", "https", "s3")
LEGAL = "must be a local folder, or a URL that starts with http://, https:// or s3://"


class PlaceError(ValueError):
    """A folder that cannot be opened, or a file in it that cannot be had."""


class ShardFolder(Protocol):
    """A folder that holds one data set: an index, and shards that never change once they are written.

    File names are plain (letters, digits, - and _, then .tar, .json, .jsonl or .safetensors). All methods raise
    PlaceError, which names folder, file and reason. Works after a fork, in threads, and pickled.
    """

    @property
    def name(self) -> str:
        """Path or URL, for messages."""

    def read(self, file: str, limit: int) -> bytes:
        """A small file, whole. One of more than `limit` bytes is an error, and is not read."""

    def check(self, sizes: dict[str, int]) -> None:
        """Raises if it is cheap to see that a file (name -> bytes) is missing or has another size."""

    def open(self, file: str, size: int, sha256: str) -> int:
        """A descriptor for reading the shard `file`, of `size` bytes; the caller closes it.

        Blocks while the shard is fetched, if it has to be, and then its size and sha256 (lower-case hex) are checked.
        """

    def mend(self, file: str, size: int, sha256: str) -> bool:
        """Whether the local copy of the shard was damaged; it is dropped then, and `open` fetches another."""

    def prefetch(self, files: Iterable[tuple[str, int, str]]) -> None:
        """Starts to fetch these (file, size, sha256) in this order, and forgets what an earlier call still waits for.

        Returns at once. What fails here fails again, with its reason, in `open`.
        """


def check_file_name(folder: str, file: str) -> None:
    """PlaceError unless `file` is a plain name: an index is data, and must not lead out of its folder."""
    if not re.fullmatch(r"[A-Za-z0-9_-]+\.(tar|json|jsonl|safetensors)", file):
        raise PlaceError(f"{folder}: {file!r} is not the plain name of a .tar, .json, .jsonl or .safetensors file")


@dataclass(frozen=True)
class LocalFolder:
    """A ShardFolder on a disk; nothing is copied."""

    folder: Path

    @property
    def name(self) -> str:
        return str(self.folder)

    def read(self, file: str, limit: int) -> bytes:
        path = self._path(file)
        try:
            # Opening a FIFO would wait for a writer.
            if path.exists() and not path.is_file():
                raise PlaceError(f"{path}: is not a regular file")
            with path.open("rb") as stream:
                if (size := os.fstat(stream.fileno()).st_size) > limit:
                    raise PlaceError(f"{path}: has {size} bytes, more than the {limit} that are read at most")
                data = stream.read(limit + 1)
        except OSError as error:
            raise PlaceError(f"{path}: cannot be read ({error.strerror})") from error
        if len(data) > limit:
            raise PlaceError(f"{path}: has more than the {limit} bytes that are read at most")
        return data

    def check(self, sizes: dict[str, int]) -> None:
        wrong = []
        for file, size in sizes.items():
            try:
                found = self._path(file).stat().st_size
            except OSError as error:
                missing = isinstance(error, FileNotFoundError)
                wrong.append(f"{file} {'is missing' if missing else f'cannot be read ({error.strerror})'}")
                continue
            if found != size:
                wrong.append(f"{file} has {found} bytes instead of {size}")
        if wrong:
            more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
            raise PlaceError(
                f"{self.name}: {len(wrong)} of {len(sizes)} files cannot be used: {'; '.join(wrong[:5])}{more}"
            )

    def open(self, file: str, size: int, sha256: str) -> int:
        path = self._path(file)
        try:
            return os.open(path, os.O_RDONLY)
        except OSError as error:
            raise PlaceError(f"{path}: cannot be opened ({error.strerror})") from error

    def mend(self, file: str, size: int, sha256: str) -> bool:
        """There is no other copy."""
        return False

    def prefetch(self, files: Iterable[tuple[str, int, str]]) -> None:
        """The files are here already."""

    def _path(self, file: str) -> Path:
        check_file_name(self.name, file)
        return self.folder / file


def default_cache_folder() -> Path:
    """$VIDCLS_CACHE, or else a folder of this user among the temporary files."""
    chosen = os.environ.get("VIDCLS_CACHE")
    return Path(chosen or Path(tempfile.gettempdir()) / f"vidcls-cache-{os.getuid()}")


@dataclass(frozen=True)
class CacheSettings:
    """How remote shards are fetched and kept; ValueError names the field that makes no sense.

    folder: on a local disk of the node; all its processes share it. max_bytes: of all shards in it together, those
    being downloaded included. attempts: to fetch a file, before it is an error. timeout_seconds: how long a server
    may take to accept a connection, and to send the next bytes.
    """

    folder: Path = field(default_factory=default_cache_folder)
    max_bytes: int = DEFAULT_CACHE_GB * 10**9
    attempts: int = 5
    timeout_seconds: float = 60.0

    def __post_init__(self) -> None:
        if not isinstance(self.folder, Path) or not self.folder.is_absolute():
            raise ValueError(f"folder = {str(self.folder)!r}: must be the absolute path of a folder")
        for name, low, high in (("max_bytes", 1, 2**60), ("attempts", 1, 100)):
            value = getattr(self, name)
            if type(value) is not int or not low <= value <= high:
                raise ValueError(f"{name} = {value!r}: must be a whole number from {low} to {high}")
        if type(self.timeout_seconds) not in (int, float) or not 0 < self.timeout_seconds <= 3600:
            raise ValueError(f"timeout_seconds = {self.timeout_seconds!r}: must be above 0 and at most 3600")


def open_folder(place: str | Path, cache: CacheSettings | None = None) -> ShardFolder:
    """The folder at `place`; nothing is read yet. cache: of remote folders only; None: the default settings.

    A local folder with a colon in its name is given as a Path or as ./name:here. PlaceError for anything that is
    neither a local folder nor one of the three kinds of URL.
    """
    text = str(place)
    if isinstance(place, Path):
        # Path("s3://a/b") is "s3:/a/b": it must not end as a local folder that "does not exist".
        if place.parts and place.parts[0] in [f"{scheme}:" for scheme in SCHEMES]:
            raise PlaceError(f"{text}: a URL must be given as text, since a Path folds // into /")
        return LocalFolder(place)
    if not text or "\0" in text:
        raise PlaceError(f"{text!r}: {LEGAL}")
    if not re.match(r"[A-Za-z][A-Za-z0-9+.-]*:", text):
        return LocalFolder(Path(text))
    _check_url(text)
    try:
        # Here, since it needs packages that local folders do without.
        from vidcls.data.remote import RemoteFolder

        return RemoteFolder(text.rstrip("/"), CacheSettings() if cache is None else cache)
    except ImportError as error:
        raise PlaceError(f"{text}: a package is missing ({error}): pip install 'vidcls[remote]'") from error


def _check_url(url: str) -> None:
    """PlaceError unless `url` is a plain http(s) or s3 folder."""
    shown = re.sub(r"//[^/]*@", "//...@", url)  # messages end in logs
    chained = "::" in re.sub(r"//\[[0-9A-Fa-f:.]+\]", "//", url)  # but http://[::1]/ has an address of IPv6
    if not re.match(rf"({'|'.join(SCHEMES)})://", url) or chained:
        raise PlaceError(f"{shown!r}: {LEGAL} (a local folder with a colon in its name: ./name:here)")
    if re.search(r"[\s\x00-\x1f\x7f?#\\]", url):
        raise PlaceError(f"{shown!r}: must not have spaces, \\, ? or #: file names are appended to it")
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError as error:
        raise PlaceError(f"{shown!r}: is not a URL: {error}") from error
    if "@" in parts.netloc:
        raise PlaceError(f"{shown!r}: must not hold a user or a password; give them through the environment")
    if not host:
        raise PlaceError(f"{shown!r}: {'the bucket' if parts.scheme == 's3' else 'the host'} is missing")
