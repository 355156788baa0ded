"""The hosts of a launch: the hostfile as DeepSpeed means it, and ssh with its faults named.

Only the standard library is imported here: whoever watches over a run must not wait for torch.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

CONNECT_SECONDS = 5
_LINE = re.compile(r"(?P<host>\S+)\s+slots=(?P<slots>\d+)(\s+max[-_]slots=\d+)?(\s*#.*)?")
# pdsh would read commas, brackets and colons as lists, ranges and other transports; a leading dash is an option.
_HOST = re.compile(r"([A-Za-z0-9_][A-Za-z0-9_.-]*@)?[A-Za-z0-9][A-Za-z0-9_.-]*")


@dataclass(frozen=True)
class Fault:
    """What is wrong with the way to a host, and what to do about it."""

    name: str
    fix: str

    def __str__(self) -> str:
        return f"{self.name}: {self.fix}"


@dataclass(frozen=True)
class Answer:
    """What a command left behind. code: its exit code, None when it was killed for taking too long."""

    code: int | None
    output: str
    errors: str


def read_hostfile(path: str | Path) -> dict[str, int]:
    """host -> slots (ranks to start there), in the order of the file; the first host gets the rendezvous.

    Stricter than DeepSpeed, which passes over what it does not understand behind `slots=`.

    Raises:
        ValueError: names the file, the line and what is wrong with it; also when there is no such file, because
            DeepSpeed would then train on this host alone and exit with 0.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise ValueError(
            f"hostfile {str(path)!r}: {reason}; DeepSpeed would train on this host alone. "
            "An example is launch/hostfile.example"
        ) from error
    hosts: dict[str, int] = {}
    lines: dict[str, int] = {}
    for number, line in enumerate(map(str.strip, text.splitlines()), start=1):
        if not line or line.startswith("#"):
            continue
        where = f"hostfile {str(path)!r}, line {number}: {line!r}"
        match = _LINE.fullmatch(line)
        if match is None:
            raise ValueError(f"{where}: must be a host name and its ranks, such as 'node1 slots=8'")
        host, slots = match["host"], int(match["slots"])
        if not _HOST.fullmatch(host):
            raise ValueError(f"{where}: {host!r} must be one host name or user@name: no lists, ranges or IPv6")
        if slots < 1:
            raise ValueError(f"{where}: slots must be at least 1; leave the line out to leave the host out")
        if host in hosts:
            raise ValueError(f"{where}: {host} is on line {lines[host]} already; each host once, with all its slots")
        hosts[host], lines[host] = slots, number
    if not hosts:
        raise ValueError(f"hostfile {str(path)!r}: names no host; a line is 'node1 slots=8'")
    return hosts


def ssh_words(host: str, port: int | None = None) -> list[str]:
    """The words before a command for `host`: never asks anything, and gives up on a silent host.

    port: of its sshd, where ~/.ssh/config does not say it (deepspeed's --ssh_port).
    """
    options = {
        "BatchMode": "yes",
        "ConnectTimeout": CONNECT_SECONDS,
        "ServerAliveInterval": 5,
        "ServerAliveCountMax": 3,
        "LogLevel": "ERROR",  # a quieter setting of the user's would hide the reasons
    }
    words = ["ssh", "-T", *(word for name, value in options.items() for word in ("-o", f"{name}={value}"))]
    return [*words, *(["-p", str(port)] if port is not None else []), host]


def run_for(words: list[str], seconds: float) -> Answer:
    """Run a command for at most `seconds`, then kill it with all it started. FileNotFoundError without the command.

    Its output goes through files: a connection that ssh keeps open in the background would hold a pipe.
    """
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            words,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=errors,
            env={**os.environ, "LC_ALL": "C"},  # the reasons are read below
            start_new_session=True,
        )
        code: int | None
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        output.seek(0)
        errors.seek(0)
        return Answer(code, output.read().decode(errors="replace"), errors.read().decode(errors="replace"))


# What ssh says -> name and fix; the first that is found counts. {host} is filled in.
_SSH_FAULTS = (
    (
        r"REMOTE HOST IDENTIFICATION HAS CHANGED|Offending .* key",
        "host key changed",
        "if {host} was installed anew: ssh-keygen -R {bare}, then `ssh {host}` once; if not, find out who answers",
    ),
    (
        r"Host key verification failed|No .* host key is known",
        "host key unknown",
        "run `ssh {host}` once and accept its key, or put the keys of all hosts into ~/.ssh/known_hosts",
    ),
    (
        r"Too many authentication failures",
        "permission denied",
        "ssh offers {host} too many keys: set IdentityFile and IdentitiesOnly yes for it in ~/.ssh/config",
    ),
    (r"Permission denied", "permission denied", "ssh-copy-id {host}; the key must work without a password"),
    (
        r"Could not resolve|Name or service not known|Temporary failure in name resolution",
        "unknown host name",
        "{bare} does not resolve: check its spelling in the hostfile, /etc/hosts and DNS",
    ),
    (
        r"Connection refused",
        "connection refused",
        "{host} is up but no sshd listens: start it there (systemctl start ssh), or set Port in ~/.ssh/config",
    ),
    (
        r"No route to host|Network is unreachable",
        "no route to host",
        "{host} is off or its network is: power it on, check cable and routes",
    ),
    (
        r"timed out|Timeout, server",
        "timed out",
        "{host} does not answer: it is off, hangs, or a firewall drops port 22",
    ),
    (
        r"kex_exchange_identification|Connection closed|Connection reset|banner",
        "connection closed",
        "sshd on {host} turns connections away: look at MaxStartups, its log, fail2ban and the file system it is on",
    ),
)


def ssh_fault(host: str, answer: Answer) -> Fault | None:
    """Why ssh did not reach `host`, or None when it did (then code and output are the remote command's)."""
    if answer.code is None:
        return Fault("no answer in time", f"{host} accepts connections but does not go on: it hangs, reboot it")
    if answer.code != 255:  # ssh's own code; any other is the remote command's
        return None
    for pattern, name, fix in _SSH_FAULTS:
        if re.search(pattern, answer.errors):
            return Fault(name, fix.format(host=host, bare=host.rpartition("@")[2]))
    said = answer.errors.strip().splitlines()
    if not said:  # how ssh leaves when a host stops answering in the middle of a command
        return Fault("connection lost", f"{host} stopped answering: it is off, hangs, or its network is gone")
    return Fault("failed", f"try `ssh {host} true`; it said: {said[-1]}")


def probe(host: str, seconds: float, port: int | None = None) -> str | None:
    """Name and fix of the fault when `host` cannot be reached by ssh within `seconds`; None when it can."""
    try:
        answer = run_for([*ssh_words(host, port), "true"], seconds)
    except FileNotFoundError:
        return "no ssh command: install openssh-client on this host"
    fault = ssh_fault(host, answer)
    if fault is not None:
        return str(fault)
    return None if answer.code == 0 else f"`ssh {host} true` exits with {answer.code}: its shell's start files fail"
