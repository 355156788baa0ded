"""The hosts of a supervised run: who answers, who takes part, and who has come back."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from vidcls.hosts import CONNECT_SECONDS, probe, read_hostfile

PROBE_SECONDS = 3.0 * CONNECT_SECONDS
ANSWERS_TO_REJOIN = 2  # in a row: a host that restarts over and over answers now and then
Probe = Callable[[Sequence[str]], dict[str, str | None]]


class Places:
    """The hosts of a hostfile.

    Args:
        wanted: how many take part, the first that answer (DeepSpeed's --num_nodes); None for all.
        slots: ranks on each host (DeepSpeed's --num_gpus); None for those of the hostfile.
        probe: hosts -> what is wrong with each, None for nothing.
    """

    def __init__(self, hosts: Mapping[str, int], probe: Probe, wanted: int | None = None, slots: int | None = None):
        self.hosts = {host: slots or own for host, own in hosts.items()}
        self.probe = probe
        self.wanted = len(hosts) if wanted is None else wanted
        if self.wanted > len(hosts):
            raise ValueError(f"command: --num_nodes={wanted} is more than the {len(hosts)} hosts of the hostfile")

    @classmethod
    def read(cls, hostfile: Path, wanted: int | None, slots: int | None, ssh_port: int | None) -> Places:
        """Raises ValueError: the hostfile cannot be read, or names fewer hosts than are wanted."""
        return cls(read_hostfile(hostfile), lambda hosts: probe_all(hosts, ssh_port), wanted, slots)

    @property
    def full(self) -> dict[str, int]:
        """Those that take part when all answer."""
        return dict(list(self.hosts.items())[: self.wanted])

    def look(self) -> tuple[dict[str, int], dict[str, str]]:
        """Those that answer now and take part, and what is wrong with those that do not answer."""
        found = self.probe(list(self.hosts))
        faults = {host: fault for host, fault in found.items() if fault is not None}
        answering = [host for host in self.hosts if host not in faults]
        return {host: self.hosts[host] for host in answering[: self.wanted]}, faults


def probe_all(hosts: Sequence[str], ssh_port: int | None = None) -> dict[str, str | None]:
    """What is wrong with the way to each host, all asked at once."""
    if not hosts:
        return {}
    with ThreadPoolExecutor(min(len(hosts), 64)) as pool:
        return dict(zip(hosts, pool.map(lambda host: probe(host, PROBE_SECONDS, ssh_port), hosts), strict=True))


def write_hostfile(path: Path, hosts: Mapping[str, int]) -> Path:
    path.write_text("".join(f"{host} slots={slots}\n" for host, slots in hosts.items()), encoding="utf-8")
    return path


class Return:
    """A thread that asks hosts which were left out again and again, until `close`."""

    def __init__(self, hosts: Sequence[str], probe: Probe, every: float) -> None:
        self.back: list[str] = []  # those that answered twice in a row
        self._probe = probe
        self._closed = threading.Event()
        self._answers = dict.fromkeys(hosts, 0)
        self._thread = threading.Thread(target=self._ask, args=(every,), name="return", daemon=True)
        if hosts:
            self._thread.start()

    def close(self) -> None:
        self._closed.set()

    def _ask(self, every: float) -> None:
        while not self._closed.wait(every):
            for host, fault in self._probe(list(self._answers)).items():
                self._answers[host] = 0 if fault else self._answers[host] + 1
            self.back = [host for host, count in self._answers.items() if count >= ANSWERS_TO_REJOIN]
