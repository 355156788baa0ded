"""Exit codes of every command that works on ranks: what ended them, for supervisors and scripts.

Over pdsh the highest code of all hosts wins, so "lost a peer", which follows from any of the others, is the lowest.
"""

from __future__ import annotations

from enum import IntEnum


class Exit(IntEnum):
    DONE = 0
    FAILED = 1
    USER_ERROR = 2
    PEER_LOST = 71
    STUCK = 72
    STORAGE = 73
    DATA = 74
    STOPPED = 75
    DIVERGED = 76
    OUT_OF_MEMORY = 77
    LAUNCH = 78


MEANINGS = {
    Exit.DONE: "finished",
    Exit.FAILED: "an error with a traceback",
    Exit.USER_ERROR: "a user's mistake: recipe, data set, checkpoint of another run, output folder in use",
    Exit.PEER_LOST: "another rank, or the link to it, is gone",
    Exit.STUCK: "a phase passed its time limit",
    Exit.STORAGE: "output cannot be written: disk full, read-only, or not shared between hosts",
    Exit.DATA: "a clip, a shard or a loader worker failed",
    Exit.STOPPED: "stopped on request; a checkpoint is saved, and a resume goes on from it",
    Exit.DIVERGED: "loss or gradient was not finite for too many steps in a row",
    Exit.OUT_OF_MEMORY: "out of memory, of the host or of the accelerator",
    Exit.LAUNCH: "the ranks did not find each other: port taken, unknown address, time-out",
}
