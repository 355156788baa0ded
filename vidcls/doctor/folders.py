"""Whether a folder is one and the same for all hosts, can be written and locked, and whether shards can be read."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import time
from pathlib import Path
from typing import Any

WRITTEN_BYTES = 2**20
SEEN_SECONDS = 5.0  # a network file system may take its time to show a new file
MAX_SHARDS = 64  # of a data set; spread over it


def nearest(path: str) -> dict[str, Any]:
    """The folder that `path` is or will be made in, and its free bytes."""
    folder = Path(path)
    while not folder.is_dir():
        if folder.exists() and not folder.is_dir():
            return {"folder": str(folder), "error": f"{folder} is a file"}
        folder = folder.parent
    usage = shutil.disk_usage(folder)
    return {"folder": str(folder), "exists": folder == Path(path), "free": usage.free, "total": usage.total}


class Files:
    """The files this probe has written, until it removes them; and the lock it holds."""

    def __init__(self) -> None:
        self._written: list[Path] = []
        self._locked: int | None = None

    def write(self, folder: str, name: str, token: str) -> str | None:
        """Write a file of a mebibyte that begins with `token`, to the disk. Why that fails, or None."""
        path = Path(folder) / name
        try:
            with path.open("xb") as stream:
                self._written.append(path)
                stream.write(token.encode().ljust(WRITTEN_BYTES, b"\0"))
                stream.flush()
                os.fsync(stream.fileno())
        except OSError as error:
            return _reason(error)
        return None

    def read(self, folder: str, names: list[str], size: int) -> dict[str, str | None]:
        """The first `size` characters of files that other hosts have written; None: not to be seen here."""
        end = time.monotonic() + SEEN_SECONDS
        found: dict[str, str | None] = dict.fromkeys(names)
        while None in found.values():
            for name in [name for name, text in found.items() if text is None]:
                with contextlib.suppress(OSError), (Path(folder) / name).open("rb") as stream:
                    found[name] = stream.read(size).decode(errors="replace")
            if time.monotonic() > end:
                break
            if None in found.values():
                time.sleep(0.2)
        return found

    def lock(self, folder: str, name: str) -> str | None:
        """Take a POSIX lock and hold it. Why that fails, or None."""
        self._locked = os.open(Path(folder) / name, os.O_RDWR)
        try:
            fcntl.lockf(self._locked, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            return _reason(error)
        return None

    def try_lock(self, folder: str, name: str) -> str:
        """ "held" when another host's lock is seen here, "free" when it is not, or why locks do not work."""
        descriptor = os.open(Path(folder) / name, os.O_RDWR)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            return "held" if error.errno in (errno.EAGAIN, errno.EACCES) else _reason(error)
        finally:
            os.close(descriptor)
        return "free"

    def remove(self) -> None:
        """Leave nothing behind; called again at the end of the probe."""
        if self._locked is not None:
            os.close(self._locked)
            self._locked = None
        while self._written:
            with contextlib.suppress(OSError):
                self._written.pop().unlink()


def _reason(error: OSError) -> str:
    return os.strerror(error.errno) if error.errno else str(error)


def read_shards(place: str, seconds: float) -> dict[str, Any]:
    """Open a data set's index and read the first and the last clip of its shards, for at most `seconds`.

    Returns {digest, clips, shards, tried} and {error} if something cannot be read. Of a remote data set only the index
    is read: a clip would bring its whole shard.
    """
    import numpy as np

    from vidcls.data.index import ShardError, ShardIndex
    from vidcls.data.places import LocalFolder
    from vidcls.data.shards import ShardReader

    end = time.monotonic() + seconds
    try:
        index = ShardIndex.open(place)
    except ShardError as error:
        return {"error": str(error)}
    told: dict[str, Any] = {"digest": index.digest, "clips": len(index), "shards": len(index.shards), "tried": 0}
    if not isinstance(index.folder, LocalFolder):
        return told
    reader = ShardReader(index)
    order = np.lexsort((index.offset, index.shard))
    ends = np.cumsum([shard.samples for shard in index.shards])
    for shard in np.unique(np.linspace(0, len(ends) - 1, min(len(ends), MAX_SHARDS)).astype(int)).tolist():
        for sample in {int(order[ends[shard] - index.shards[shard].samples]), int(order[ends[shard] - 1])}:
            try:
                reader.read(sample)
            except ShardError as error:
                return {**told, "error": str(error)}
        told["tried"] += 1
        if time.monotonic() > end:
            break
    return told
