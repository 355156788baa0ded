"""One run at a time in an output folder."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import time
from pathlib import Path
from typing import IO

LOCK_NAME = "run.lock"
WAIT_SECONDS = 10.0  # for a run that was killed a moment ago

_held: dict[Path, IO[str]] = {}


class InUseError(ValueError):
    """Another run writes into the folder."""


def lock_output(folder: Path, field: str = "output_dir") -> None:
    """Hold `folder` for this process until it ends; nothing happens when it holds it already. One rank calls it.

    A POSIX lock: a network file system knows it on all hosts, forked workers do not keep it, and the kernel takes it
    back from the dead.

    Args:
        field: of the recipe, that the folder is from.

    Raises:
        InUseError: another run holds it; names host and process.
    """
    path = (folder / LOCK_NAME).absolute()
    if path in _held:
        return
    file = path.open("a+", encoding="utf-8")
    until = time.monotonic() + WAIT_SECONDS
    while True:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except OSError as error:
            if error.errno in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                print(
                    f"vidcls: {folder} cannot be locked ({error.strerror}): nothing keeps another run out", flush=True
                )
                break
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                file.close()
                raise
            if time.monotonic() > until:
                file.seek(0)
                owner = file.read().strip() or "another process"
                file.close()
                raise InUseError(
                    f"{field}: {str(folder)!r} is in use by another run ({owner}); wait for it, stop it, or give "
                    "another folder"
                ) from None
            time.sleep(0.25)
    file.truncate(0)
    file.write(json.dumps({"host": socket.gethostname(), "pid": os.getpid()}) + "\n")
    file.flush()
    _held[path] = file
