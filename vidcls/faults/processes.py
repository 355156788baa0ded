"""Processes of this host as /proc shows them: also those that are stopped, and those that are not ours."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

PR_SET_PDEATHSIG = 1  # <linux/prctl.h>
# Looked up here: nothing should be loaded between a fork and what follows it.
_PRCTL = getattr(ctypes.CDLL(None), "prctl", None)


def die_with_parent() -> None:
    """Have the kernel kill this process when the one that made it dies. Does nothing where there is no Linux."""
    if _PRCTL is not None:
        _PRCTL(PR_SET_PDEATHSIG, signal.SIGKILL)


def rank_from_environment() -> int:
    """This process's rank before the process group exists (0 when there is no launcher)."""
    for name in ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK"):
        if name in os.environ:
            return int(os.environ[name])
    return 0


def hosts_of_launch() -> int | None:
    """How many hosts the deepspeed launcher started ranks on; None when it did not start this process."""
    # Set by deepspeed.launcher.launch, and by nothing else.
    return int(os.environ["CROSS_SIZE"]) if "CROSS_SIZE" in os.environ else None


def state_of(pid: int) -> str:
    """The kernel's word for what a process does: "T" stopped, "D" waiting for a disk, ...; "" when it is gone."""
    return _stat(pid)[0]


def start_of(pid: int) -> int | None:
    """When a process started, in the kernel's ticks; with its id it names a process for good. None: it is gone."""
    fields = _stat(pid)
    return None if fields[0] in ("", "Z", "X") else int(fields[19])


def parent_of(pid: int) -> int:
    """0 when the process is gone."""
    fields = _stat(pid)
    return int(fields[1]) if fields[0] else 0


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat from the third on: the second, a name, may hold blanks and brackets."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rsplit(")", 1)[1].split()
    except (OSError, IndexError):
        return [""]


def words_of(pid: int) -> list[str]:
    """Its command line; [] when the process is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").rstrip("\0").split("\0")
    except OSError:
        return []


def folder_of(pid: int) -> Path:
    """The working folder of a process."""
    return Path(os.readlink(f"/proc/{pid}/cwd"))


def is_deepspeed(words: list[str]) -> bool:
    """Whether a command line is one of DeepSpeed's launcher: the `deepspeed` command, or what it starts on a host."""
    return any(Path(word).name == "deepspeed" or word.startswith("deepspeed.launcher") for word in words[:5])


def launchers() -> list[int] | None:
    """The processes without which this one must not go on, nearest first; None: they are gone already.

    They are DeepSpeed's above it on this host. On a host that was reached over SSH the `deepspeed` command is not among
    them: the SSH session stands for it, which ends with pdsh or the link, and on the command's own host pdsh and the
    command itself. The ranks of other hosts follow those of this one.
    """
    above = list(ancestors(os.getpid()))
    ours = [pid for pid in above if is_deepspeed(words_of(pid))]
    if not ours:
        return [] if hosts_of_launch() is None else None
    if any(Path(word).name == "deepspeed" for pid in ours for word in words_of(pid)[:5]):
        return ours
    beyond = above[above.index(ours[-1]) + 1 :]
    for place, pid in enumerate(beyond):
        if Path((words_of(pid) or [""])[0].split(":")[0]).name.startswith("sshd"):
            senders = _senders(words_of(ours[-1]))
            return None if senders is None else ours + beyond[: place + 1] + senders
    # What `deepspeed` started and process 1 now has, has lost it; but a container may start launch.py itself.
    session = os.getsid(ours[-1])
    return None if not beyond and session != ours[-1] and start_of(session) is None else ours


def _senders(launch: list[str]) -> list[int] | None:
    """pdsh and the `deepspeed` command that sent this launch.py to its host, if they are here; None: it is gone.

    A pdsh whose command was killed goes on, and so would the ranks.
    """
    marks = [word for word in launch if word.startswith(("--world_info=", "--master_port=", "--master_addr="))]
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        words = words_of(int(folder.name))
        if words and Path(words[0]).name == "pdsh" and all(mark in words for mark in marks):
            command = parent_of(int(folder.name))
            return [int(folder.name), command] if is_deepspeed(words_of(command)) else None
    return []


def forks_of(pid: int, words: list[str], descriptor: int) -> list[int]:
    """Processes forked from `pid` that have become nothing else since, also when it is gone: they show its command line
    and hold the same open file as our `descriptor`, which nobody else has."""
    own = os.fstat(descriptor)
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and int(folder.name) != pid and words_of(int(folder.name)) == words:
            with contextlib.suppress(OSError):
                if any(os.path.samestat(each.stat(), own) for each in (folder / "fd").iterdir() if each.exists()):
                    found.append(int(folder.name))
    return found


def ancestors(pid: int) -> Iterator[int]:
    while (pid := parent_of(pid)) > 1:
        yield pid


def exit_now(code: int) -> None:
    """Leave without unwinding: threads of a broken process group would hold the interpreter."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, MemoryError):
            stream.flush()
    os._exit(code)
