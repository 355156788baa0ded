"""A page of memory that a rank and its guardian share: what the rank is doing, and until when it may take.

The rank writes a few hundred bytes at every phase; the guardian reads them, even when the rank is stopped or dead.
"""

from __future__ import annotations

import json
import mmap
import os
import struct
import time
from dataclasses import dataclass

SIZE = 65536  # JSON takes up to 12 bytes for a character of a name or message
_HEADER = struct.Struct("<QI")  # version (odd while it is written), bytes of JSON
_ORDER_AT = 32  # where the guardian writes the exit code that the rank shall leave with; 0: stay
_WATCHED_AT = 33  # 1 once the guardian looks
_BODY_AT = 64
# Made once, and without dataclasses.asdict: four times a step.
_to_json = json.JSONEncoder(separators=(",", ":")).encode
CLIPS_LENGTH = 2000  # characters kept of the clips' names
MESSAGE_LENGTH = 2000


@dataclass(frozen=True)
class Status:
    """What a rank does. deadline: in time.monotonic(), which all processes of a host share; None: no limit.

    clips: shard and keys of the clips concerned. stopping: it was asked to stop and will save first.
    code, message: of the error that it is leaving for, in case it does not come to writing its report; 0: none.
    leaving: it has said its last words; whatever ends it now needs no report.
    """

    rank: int
    world_size: int = 1
    launch: str = ""
    phase: str = "start"
    step: int | None = None
    clips: str = ""
    limit: float | None = None
    deadline: float | None = None
    stopping: bool = False
    code: int = 0
    message: str = ""
    leaving: bool = False


class Board:
    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self._memory = mmap.mmap(descriptor, SIZE)
        self._version = 0

    @classmethod
    def create(cls) -> Board:
        descriptor = os.memfd_create("vidcls-board")
        os.ftruncate(descriptor, SIZE)
        return cls(descriptor)

    def write(self, status: Status) -> None:
        body = _to_json(vars(status)).encode()
        assert len(body) <= SIZE - _BODY_AT, len(body)
        self._version |= 1  # odd; already so where a signal handler's write interrupts another
        _HEADER.pack_into(self._memory, 0, self._version, 0)
        self._memory[_BODY_AT : _BODY_AT + len(body)] = body
        self._version += 1
        _HEADER.pack_into(self._memory, 0, self._version, len(body))

    def read(self) -> Status | None:
        """The status; None before the first one, or when the rank was stopped in the middle of writing it."""
        for _ in range(50):
            version, length = _HEADER.unpack_from(self._memory, 0)
            body = self._memory[_BODY_AT : _BODY_AT + length]
            if version and version % 2 == 0 and _HEADER.unpack_from(self._memory, 0)[0] == version:
                return Status(**json.loads(body))
            time.sleep(0.001)
        return None

    def watch(self) -> None:
        self._memory[_WATCHED_AT] = 1

    def is_watched(self) -> bool:
        return bool(self._memory[_WATCHED_AT])

    def order_to_leave(self, code: int) -> None:
        self._memory[_ORDER_AT] = code

    def ordered(self) -> int:
        """The code that the guardian wants the rank to leave with; 0: it may stay."""
        return self._memory[_ORDER_AT]
