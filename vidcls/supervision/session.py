"""A command in a session of its own: its output passed on and kept, and its end by the ids of its processes."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from vidcls.faults.processes import die_with_parent, state_of

LOG_BYTES = 8_000_000  # then the log goes on in a new file, and one older is kept
LEAVE_SECONDS = 10.0  # for what the command left running to leave by itself


class Session:
    """The command, started. When this process dies the kernel kills the command, and its ranks leave after it."""

    def __init__(self, words: Sequence[str], environment: Mapping[str, str], log: Path) -> None:
        self.last_output = time.monotonic()
        self._process = subprocess.Popen(
            words,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=die_with_parent,
        )
        self.id = self._process.pid
        assert self._process.stdout is not None
        self._pump = threading.Thread(
            target=self._pass_on, args=(self._process.stdout.fileno(), log), name="output", daemon=True
        )
        self._pump.start()

    def code(self) -> int | None:
        """None while the command runs; 128 + n when signal n killed it, as a shell has it."""
        code = self._process.poll()
        return code if code is None or code >= 0 else 128 - code

    def end(self, leave_seconds: float = LEAVE_SECONDS) -> int:
        """Wait for what the command left running, then kill it; the command's code."""
        deadline = time.monotonic() + leave_seconds
        while session_members(self.id) and time.monotonic() < deadline:
            time.sleep(0.1)
        return self.kill()

    def kill(self) -> int:
        """SIGKILL every process of the session, one by one; the command's code.

        Nothing milder: a multi-host deepspeed answers SIGTERM with a `pkill -f` on every host.
        """
        deadline = time.monotonic() + LEAVE_SECONDS
        while (members := session_members(self.id)) and time.monotonic() < deadline:
            for pid in members:
                self._kill(pid)
            self._process.poll()
            time.sleep(0.05)
        self._pump.join(1.0)  # a rank in another session may hold the pipe for longer
        code = self.code()
        return 128 + signal.SIGKILL if code is None else code  # None: it waits for a disk that is gone

    def _kill(self, pid: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            descriptor = os.pidfd_open(pid)
            try:
                if os.getsid(pid) == self.id:  # not a new process with an old id
                    signal.pidfd_send_signal(descriptor, signal.SIGKILL)
            finally:
                os.close(descriptor)

    def _pass_on(self, source: int, log: Path) -> None:
        """Neither a full disk nor a closed terminal may stop the ranks."""
        kept = 0
        while chunk := os.read(source, 65536):
            self.last_output = time.monotonic()
            with contextlib.suppress(OSError, ValueError):
                sys.stdout.buffer.write(chunk)
                sys.stdout.buffer.flush()
            with contextlib.suppress(OSError):
                if kept > LOG_BYTES:
                    log.replace(log.with_suffix(".old"))
                    kept = 0
                with log.open("ab") as file:
                    file.write(chunk)
            kept += len(chunk)


def session_members(session: int) -> list[int]:
    """The living processes of a session."""
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(ProcessLookupError):
                if os.getsid(int(name)) == session and state_of(int(name)) not in ("", "Z", "X"):
                    found.append(int(name))
    return found
