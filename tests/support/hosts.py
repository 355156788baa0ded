"""Several real hosts on this machine (hosts.sh), and commands that run on them."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import string
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from tests.support.launch import ROOT

SCRIPT = Path(__file__).with_name("hosts.sh")
COMMAND_SECONDS = 120.0  # of hosts.sh, on a busy machine


class NoHostsError(Exception):
    """This machine cannot make hosts; the message says why."""


class Hosts:
    """`count` hosts of one rank each. Their numbers begin with 1, where commands are typed."""

    def __init__(self, count: int) -> None:
        self.count = count
        # Other suites on this machine have hosts of their own; only namespaces are named, addresses are seen by nobody.
        self.prefix = "h" + "".join(random.SystemRandom().choices(string.ascii_lowercase, k=6))
        temporary = tempfile.gettempdir()
        self.folder = Path(temporary) / f"vidcls-hosts-{self.prefix}"
        self._environment = {**os.environ, "HOSTS_PREFIX": self.prefix, "TMPDIR": temporary}
        self._reaper = subprocess.Popen(
            ["bash", SCRIPT, "reap", str(os.getpid())],
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            self._do("up", count)
        except BaseException:
            self.close()
            raise
        # One thread a rank; what no DeepSpeed exports must be in this file.
        (self.folder / "deepspeed_env").write_text("OMP_NUM_THREADS=1\nTOKENIZERS_PARALLELISM=false\n")

    def _do(self, *words: object) -> str:
        """Raises NoHostsError: with what hosts.sh said."""
        try:
            done = subprocess.run(
                ["bash", SCRIPT, *map(str, words)],
                env=self._environment,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=COMMAND_SECONDS,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise NoHostsError(str(error)) from error
        if done.returncode != 0:
            raise NoHostsError(f"hosts.sh {' '.join(map(str, words))}: {done.stderr.strip() or done.returncode}")
        return done.stdout

    def close(self) -> None:
        os.killpg(self._reaper.pid, signal.SIGKILL)
        self._reaper.wait()
        with contextlib.suppress(NoHostsError):  # it cannot be done without the programs that make hosts, and need not
            self._do("down")

    def name(self, number: int) -> str:
        return f"{self.prefix}{number}"

    @property
    def hostfile(self) -> Path:
        return self.folder / "hostfile"

    def numbers(self) -> range:
        return range(1, self.count + 1)

    def start(self, number: int, words: list[object], log: Path, **variables: str) -> subprocess.Popen:
        """Start a command on a host, in the repository's root."""
        own = {
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "DS_ENV_FILE": str(self.folder / "deepspeed_env"),
        }
        with log.open("w") as output:
            return subprocess.Popen(
                ["bash", str(SCRIPT), "run", str(number), *map(str, words)],
                cwd=ROOT,
                env={**self._environment, **own, **variables},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def processes(self, number: int) -> list[psutil.Process]:
        """What runs on a host beside its sshd, process 1."""
        found = []
        for pid in map(int, self._do("pids", number).split()):
            with contextlib.suppress(psutil.Error, OSError):
                process = psutil.Process(pid)
                if process.status() != psutil.STATUS_ZOMBIE and _own_number(pid) > 1:
                    found.append(process)
        return found

    def link(self, number: int, *, up: bool) -> None:
        self._do("link", number, "up" if up else "down")

    def crash(self, number: int) -> None:
        self._do("crash", number)

    def boot(self, number: int) -> None:
        """Also for a host that is on: its cable is plugged in, and everything but its sshd ends."""
        self.link(number, up=True)
        self._do("boot", number)
        self.clear(number)

    def clear(self, number: int) -> None:
        """Kill everything on a host but its sshd."""
        until = time.monotonic() + COMMAND_SECONDS
        while left := self.processes(number):
            assert time.monotonic() < until, left
            for process in left:
                with contextlib.suppress(psutil.Error):
                    process.kill()
            time.sleep(0.05)

    @contextlib.contextmanager
    def ssh_option(self, host: int, option: str) -> Iterator[None]:
        """Inside, ssh on host 1 has this option for another host."""
        path = Path("/etc/netns") / self.name(1) / "ssh" / "ssh_config"
        before = path.read_text()
        path.write_text(f"Host {self.name(host)}\n  {option}\n{before}")
        try:
            yield
        finally:
            path.write_text(before)


def _own_number(pid: int) -> int:
    """The id that a process has on its own host; 0 for one that is on its way there."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("NSpid:"):
            numbers = line.split()[1:]
            return int(numbers[-1]) if len(numbers) > 1 else 0
    return 0
