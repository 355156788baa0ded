"""Copies of remote shards on the node's disk, shared by all of its processes.

    <sha256>.tar    a whole shard; named by what is in it, so the same shard from two places is one file
    <sha256>.part   one being downloaded, already of its final size; flock'ed by whoever downloads it
    cache.lock      flock'ed while room is made

A lock dies with its holder, and a .part without one is what a killed download left: the next one that needs it, or
needs room, removes it. Files with other names are left alone.
"""

import errno
import fcntl
import hashlib
import os
import random
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vidcls.data.places import CacheSettings, PlaceError

LONGEST_PAUSE = 30.0
"""Seconds between two attempts to fetch a file, at most."""
TOUCH_EVERY = 60.0  # seconds; the time of last use need not be finer
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)

# A forked child shares its parent's locks. It closes them at once, or a parent that is killed would leave them held.
_held: set[int] = set()


def _close_inherited() -> None:
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_close_inherited)


class Part:
    """A shard while it is downloaded: counts and digests what is written, and never takes more than `size` bytes."""

    def __init__(self, descriptor: int, path: Path, size: int) -> None:
        self._descriptor, self._path, self.size = descriptor, path, size
        self.restart()

    def restart(self) -> None:
        """Forgets what was written so far; the space stays reserved."""
        self.written = 0
        self._digest = hashlib.sha256()

    @property
    def sha256(self) -> str:
        """Of what was written since `restart`."""
        return self._digest.hexdigest()

    def write(self, data: bytes) -> None:
        """PlaceError if it does not fit, or if the disk fails; nothing of `data` counts then."""
        if self.written + len(data) > self.size:
            raise PlaceError(f"more than the {self.size} bytes that the index gives")
        view, position = memoryview(data), self.written
        try:
            while view:
                count = os.pwrite(self._descriptor, view, position)
                view, position = view[count:], position + count
        except OSError as error:
            raise _disk_error(self._path.parent, error) from error
        self._digest.update(data)
        self.written = position


@dataclass(frozen=True)
class ShardCache:
    """Keeps at most settings.max_bytes of shards in settings.folder, and forgets the least recently used first.

    A forgotten shard that somebody still reads takes space until its descriptor is closed.
    """

    settings: CacheSettings

    def open(self, sha256: str, size: int, name: str, fill: Callable[[Part], None]) -> int:
        """A descriptor for reading the shard of that digest; whoever needs it first on this node downloads it.

        fill: writes the shard into a Part, checks its digest, or raises. name: of the shard, for messages. PlaceError
        if it is larger than the cache, if the disk fails, or if another process holds it up too long.
        """
        if not re.fullmatch(r"[0-9a-f]{64}", sha256):
            raise PlaceError(f"{name}: sha256 {sha256!r} is not 64 lower-case hexadecimal digits")
        if not 1 <= size <= self.settings.max_bytes:
            raise PlaceError(
                f"{name}: its {size} bytes must be at least 1 and at most the {self.settings.max_bytes} of the cache"
            )
        try:
            return self._open(sha256, size, name, fill)
        except OSError as error:
            raise _disk_error(self.settings.folder, error) from error

    def drop_damaged(self, sha256: str, size: int) -> bool:
        """Remove the shard of that digest if its bytes do not have it any more; whether it was removed."""
        path = self.settings.folder / f"{sha256}.tar"
        try:
            if (descriptor := _open_whole(path, size)) is None:
                return True
            with os.fdopen(descriptor, "rb") as stream:
                if hashlib.file_digest(stream, "sha256").hexdigest() == sha256:
                    return False
            path.unlink(missing_ok=True)
        except OSError as error:
            raise _disk_error(self.settings.folder, error) from error
        return True

    def _open(self, sha256: str, size: int, name: str, fill: Callable[[Part], None]) -> int:
        path, part = (self.settings.folder / f"{sha256}.{suffix}" for suffix in ("tar", "part"))
        # First without looking at the folder: this is the path that every read takes.
        if (found := _open_whole(path, size)) is not None:
            return found
        self._make_folder()
        patience = self._patience(f"{name}: another process that downloads it")
        while (lock := _try_lock(part)) is None:
            patience.wait(_last_change(part))
            if (found := _open_whole(path, size)) is not None:
                return found
        try:
            # Whoever held the lock before may have finished in between.
            if (found := _open_whole(path, size)) is not None:
                part.unlink()
                return found
            try:
                self._reserve(lock, part, size, name)
                fill(Part(lock, path, size))
                # Opened before it can be evicted. Nobody removes a .part whose lock is held.
                reader = os.open(part, os.O_RDONLY)
                part.rename(path)
                return reader
            except BaseException:
                part.unlink(missing_ok=True)
                raise
        finally:
            _unlock(lock)

    def _make_folder(self) -> None:
        folder = self.settings.folder
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        # Under /tmp anybody can make the folder first and fill it: what is in the cache is not digested again.
        if (owner := folder.stat().st_uid) not in (os.getuid(), 0):
            raise PlaceError(f"cache folder {folder}: belongs to user {owner}; set another cache_dir")

    def _reserve(self, descriptor: int, part: Path, size: int, name: str) -> None:
        """Gives the locked, still empty .part its size, once there is room for it."""
        os.ftruncate(descriptor, 0)
        patience = self._patience(f"{name}: the downloads that fill the cache of {self.settings.max_bytes} bytes")
        while True:
            with self._making_room(name):
                downloads = self._evict(size)
                if downloads is None:
                    # Real blocks, so that a full disk is found here and not in the middle.
                    os.posix_fallocate(descriptor, 0, size)
                    return
            os.utime(descriptor)  # whoever waits for this shard sees that somebody cares for it
            patience.wait(downloads)

    @contextmanager
    def _making_room(self, name: str) -> Iterator[None]:
        path = self.settings.folder / "cache.lock"
        patience = self._patience(f"{name}: another process that makes room in the cache")
        while (lock := _try_lock(path)) is None:
            patience.wait(None)
        try:
            yield
        finally:
            _unlock(lock)

    def _evict(self, size: int) -> Any:
        """Makes room for `size` bytes: None; or, if running downloads leave too little, their state."""
        whole: list[tuple[int, str, int]] = []
        downloads: list[tuple[int, str, int]] = []
        for entry in os.scandir(self.settings.folder):
            if not re.fullmatch(r"[0-9a-f]{64}\.(tar|part)", entry.name):
                continue
            try:
                if entry.name.endswith(".part") and _remove_dead(Path(entry.path)):
                    continue
                stat = entry.stat(follow_symlinks=False)
            except FileNotFoundError:
                # A download has just ended, perhaps as a .tar that this scan misses: its bytes are seen here instead.
                try:
                    stat = os.stat(entry.path.removesuffix(".part") + ".tar", follow_symlinks=False)
                except FileNotFoundError:
                    continue
            (whole if entry.name.endswith(".tar") else downloads).append((stat.st_mtime_ns, entry.path, stat.st_size))
        room = self.settings.max_bytes - size - sum(bytes_ for *_, bytes_ in [*whole, *downloads])
        for _, path, freed in sorted(whole):
            if room >= 0:
                break
            Path(path).unlink(missing_ok=True)
            room += freed
        return None if room >= 0 else [state for state in sorted(downloads) if state[2]]

    def _patience(self, whom: str) -> "_Patience":
        # The longest that a download which will still end well can go without writing a byte.
        return _Patience(whom, self.settings.attempts * (2 * self.settings.timeout_seconds + LONGEST_PAUSE))


class _Patience:
    """Waits for another process as long as something changes at least every `seconds`."""

    def __init__(self, whom: str, seconds: float) -> None:
        self.whom, self.seconds = whom, seconds
        self._state: Any = None
        self._since = time.monotonic()

    def wait(self, state: Any) -> None:
        """A short pause; PlaceError if `state` has been the same for too long."""
        if state != self._state:
            self._state, self._since = state, time.monotonic()
        if time.monotonic() - self._since > self.seconds:
            raise PlaceError(f"{self.whom} made no progress for {self.seconds:.0f} s; process {os.getpid()} waited")
        time.sleep(random.uniform(0.02, 0.08))


def _open_whole(path: Path, size: int) -> int | None:
    """A descriptor, with the time of last use noted; None if the file is not there or was cut short."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    stat = os.fstat(descriptor)
    if stat.st_size != size:
        os.close(descriptor)
        path.unlink(missing_ok=True)
        return None
    if time.time() - stat.st_mtime > TOUCH_EVERY:
        os.utime(descriptor)
    return descriptor


def _last_change(path: Path) -> int | None:
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return None


def _try_lock(path: Path, create: int = os.O_CREAT) -> int | None:
    """A descriptor that holds the lock of the file at `path`, or None; FileNotFoundError without O_CREAT."""
    descriptor = os.open(path, os.O_RDWR | create, 0o600)
    _held.add(descriptor)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # It may have been removed or renamed since it was opened, and then this lock excludes nobody.
        locked, there = os.fstat(descriptor), os.stat(path)
        if (locked.st_dev, locked.st_ino) == (there.st_dev, there.st_ino):
            return descriptor
    except (BlockingIOError, FileNotFoundError):
        pass
    except BaseException:
        _unlock(descriptor)
        raise
    _unlock(descriptor)
    return None


def _unlock(descriptor: int) -> None:
    # Closing is not enough if a child was forked between open and _held.add; unlocking is.
    fcntl.flock(descriptor, fcntl.LOCK_UN)
    _held.discard(descriptor)
    os.close(descriptor)


def _remove_dead(part: Path) -> bool:
    """Removes a .part that nobody downloads; whether it did."""
    lock = _try_lock(part, create=0)
    if lock is None:
        return False
    try:
        part.unlink()
    finally:
        _unlock(lock)
    return True


def _disk_error(folder: Path, error: OSError) -> PlaceError:
    if error.errno in DISK_FULL:
        return PlaceError(f"cache folder {folder}: its disk is full; lower cache_gb, or set another cache_dir")
    return PlaceError(f"cache folder {folder}: {error}")
