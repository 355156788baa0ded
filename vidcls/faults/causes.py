"""From an exception to the exit code that names its kind."""

from __future__ import annotations

import errno

from vidcls.faults.exits import Exit
from vidcls.manifest import StorageError

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
# Of torch, of whom this module must not import anything; of gloo and NCCL, which have no classes at all.
COMMUNICATION_CLASSES = {"DistBackendError", "DistNetworkError", "DistStoreError"}
COMMUNICATION_TEXTS = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "Timed out waiting",
    "Socket Timeout",
    "Socket closed",
    "Wait timeout",
    "Connect timeout",
    "Connection refused",
    "NCCL",
    "/gloo/",
)
MEMORY_TEXTS = (
    "can't allocate memory",
    "not enough memory",
    "out of memory",
    "Cannot allocate memory",
    "std::bad_alloc",
)
# Those that are met after the start; before it the commands answer every ValueError as a user's mistake.
USER_CLASSES = {"CheckpointError", "InUseError"}
DATA_CLASSES = {"ShardError", "FrameError", "PlaceError", "LoaderError"}


class RankFailedError(RuntimeError):
    """Another rank failed; the message says which and why."""


class DivergedError(RuntimeError):
    """Loss or gradient is not finite."""


class StuckError(RuntimeError):
    """Something took longer than its limit; the message names both."""


class RendezvousError(RuntimeError):
    """The ranks could not find each other; the message says where they looked."""


def exit_of(error: BaseException) -> Exit:
    """The kind of an error that ends a rank."""
    names = {cls.__name__ for cls in type(error).__mro__}
    text = str(error)
    if isinstance(error, RankFailedError):
        return Exit.PEER_LOST
    if isinstance(error, DivergedError):
        return Exit.DIVERGED
    if isinstance(error, StuckError):
        return Exit.STUCK
    if isinstance(error, RendezvousError):
        return Exit.LAUNCH
    if isinstance(error, StorageError) or (isinstance(error, OSError) and error.errno in DISK_ERRORS):
        return Exit.STORAGE
    if isinstance(error, MemoryError) or "OutOfMemoryError" in names:
        return Exit.OUT_OF_MEMORY
    if isinstance(error, RuntimeError | OSError) and any(part in text for part in MEMORY_TEXTS):
        return Exit.OUT_OF_MEMORY
    if names & DATA_CLASSES:
        return Exit.DATA
    if names & USER_CLASSES:
        return Exit.USER_ERROR
    if isinstance(error, ConnectionError) or names & COMMUNICATION_CLASSES:
        return Exit.PEER_LOST
    if isinstance(error, RuntimeError) and any(part in text for part in COMMUNICATION_TEXTS):
        return Exit.PEER_LOST
    return Exit.FAILED
