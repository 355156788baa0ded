"""The examining side of the talk with a probe: one process per host, one JSON line per question and answer."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import re
import shlex
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Mapping
from typing import Any

from vidcls.doctor.probe import MARK
from vidcls.hosts import Answer, Fault, ssh_fault, ssh_words

_STARTING = {
    91: ("no such working directory", "make {directory} visible there (the launch changes into it on every host)"),
    92: ("no interpreter", "{python} must be there, as on this host: run `source launch/setup_env.sh` there"),
    93: ("no checkout", "{script} must be there: copy the checkout, or share it"),
}


class ProbeError(Exception):
    """A host that did not answer as it should. check: the column it belongs to."""

    def __init__(self, check: str | None, fault: Fault) -> None:
        super().__init__(str(fault))
        self.check, self.fault = check, fault


def remote_command(python: str, script: str, directory: str, variables: Mapping[str, str], seconds: float) -> str:
    """What ssh runs to start a probe: as pdsh launches do, with the same exports, folder and interpreter."""
    exports = "".join(f"export {name}={_as_deepspeed(value)}; " for name, value in variables.items())
    program = (
        f"{exports}cd {shlex.quote(directory)} || exit 91; [ -x {shlex.quote(python)} ] || exit 92; "
        f"[ -f {shlex.quote(script)} ] || exit 93; "
        f"exec {shlex.quote(python)} -u {shlex.quote(script)} --probe {seconds:.0f}"
    )
    return f"sh -c {shlex.quote(program)}"


def _as_deepspeed(value: str) -> str:
    """MultiNodeRunner.add_export: in double quotes where needed, so that $NAME is expanded on the other host."""
    return f'"{value}"' if re.search(r"[^\w@%+=:,./-]", value) else value


class Session:
    """A probe on one host. `ask` from one thread at a time; `end` always."""

    def __init__(
        self, host: str, command: str | list[str], told: Mapping[str, str], ssh_port: int | None = None
    ) -> None:
        """Start a probe: a command line to run on `host` over ssh, or the words of a command on this machine.

        told: python, script and directory, for messages.
        """
        self.host, self._told = host, told
        self._remote = isinstance(command, str)
        words = [*ssh_words(host, ssh_port), command] if isinstance(command, str) else command
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed by end()
        self._process = subprocess.Popen(
            words,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env={**os.environ, "LC_ALL": "C"},
            start_new_session=True,
        )
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        threading.Thread(target=self._read, name=f"answers of {host}", daemon=True).start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            # A shell's start files may print what they like; it is passed over.
            text = line.decode(errors="replace")
            if text.startswith(MARK):
                self._lines.put(text.removeprefix(MARK))
        self._lines.put(None)

    def ask(self, do: str, within: float, /, **arguments: Any) -> Any:
        """The probe's answer to one question.

        Raises:
            ProbeError: no answer `within` seconds, the probe or the connection ended, or the question failed there.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"do": do, **arguments}).encode() + b"\n")
            self._process.stdin.flush()
        except OSError:
            raise self._ended() from None
        return self.hear(do, within)

    def hear(self, what: str, seconds: float) -> Any:
        """The next answer. ProbeError as in `ask`."""
        try:
            line = self._lines.get(timeout=seconds)
        except queue.Empty:
            self._kill()
            if what == "start" and self._remote:
                raise ProbeError("ssh", _not_named(ssh_fault(self.host, Answer(None, "", "")))) from None
            fix = "the host hangs or is overloaded: look at its load and its mounts, or give --timeout more seconds"
            raise ProbeError(None, Fault(f"no answer to {what!r} within {seconds:.0f} s", fix)) from None
        if line is None:
            raise self._ended()
        answer = json.loads(line)
        if "error" in answer:
            raise ProbeError(None, Fault(f"{what}: {answer['error']}", f"run the doctor on {self.host} itself"))
        return answer["result"]

    def _ended(self) -> ProbeError:
        """Why the probe is gone."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(5)
        code = self._process.poll()
        self._errors.seek(0)
        errors = self._errors.read().decode(errors="replace")
        if self._remote and (fault := ssh_fault(self.host, Answer(code, "", errors))) is not None:
            return ProbeError("ssh", fault)
        if code in _STARTING:
            name, fix = _STARTING[code]
            return ProbeError("code", Fault(name, fix.format(**self._told)))
        said = [line for line in errors.splitlines() if line.strip()]
        return ProbeError(
            "code",
            Fault(
                f"the probe ended with exit code {code}: {said[-1] if said else 'no reason given'}",
                "install the environment there anew: source launch/setup_env.sh",
            ),
        )

    def end(self) -> None:
        """Let the probe go; killed if it will not."""
        with contextlib.suppress(OSError):
            if self._process.stdin is not None:
                self._process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(3)
        self._kill()
        self._errors.close()

    def _kill(self) -> None:
        if self._process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


def _not_named(fault: Fault | None) -> Fault:
    assert fault is not None  # no exit code is always a fault
    return fault


def clock_offset(samples: list[tuple[float, float, float]]) -> tuple[float, float]:
    """(seconds the other clock is ahead, how far that may be wrong), of (sent, other clock, received).

    The sample with the shortest round trip counts, as in NTP: its answer was written between sent and received, so
    the middle is off by half the round trip at most.
    """
    sent, there, received = min(samples, key=lambda sample: sample[2] - sample[0])
    return there - (sent + received) / 2, (received - sent) / 2


def ask_clock(session: Session, seconds: float, times: int = 7) -> tuple[float, float]:
    """`clock_offset` of a host. ProbeError as in `ask`."""
    samples = []
    for _ in range(times):
        sent = time.time()
        there = session.ask("clock", seconds)
        samples.append((sent, there, time.time()))
    return clock_offset(samples)
