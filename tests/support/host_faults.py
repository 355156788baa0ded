"""What can happen to a run over several hosts, and to a launch: each fault is one function."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass

from tests.support.hosts import Hosts
from tests.support.launch import DEEPSPEED, PYTHON
from tests.support.many_hosts import Run, deepspeed_words
from vidcls.faults.exits import Exit

KILLED = 247  # what launch.py makes of -9
SIGKILLED = 137  # what a shell makes of it
SSH_FAILED = 255
BRIEFLY = 5.0


def kill_rank(run: Run) -> None:
    run.ranks()[1].kill()


def stop_rank(run: Run) -> None:
    run.ranks()[1].suspend()


def kill_launcher(run: Run) -> None:
    run.command().kill()


def power_off(run: Run) -> None:
    run.hosts.crash(run.hosts.count)


def cut_link(run: Run) -> None:
    run.hosts.link(run.hosts.count, up=False)


def cut_link_briefly(run: Run) -> None:
    cut_link(run)
    time.sleep(BRIEFLY)
    run.hosts.link(run.hosts.count, up=True)


@dataclass(frozen=True)
class Fault:
    """Of a run that trains. says: a part of what there is to read about it. codes: what the command may end with."""

    title: str
    act: Callable[[Run], None]
    says: str
    codes: tuple[int, ...]


@dataclass(frozen=True)
class LaunchFault:
    """Of a launch. around: makes the fault, and gives the words of the command that meets it."""

    title: str
    around: Callable[[Hosts], AbstractContextManager[list[object]]]
    says: str
    codes: tuple[int, ...]


@contextlib.contextmanager
def unreachable(hosts: Hosts) -> Iterator[list[object]]:
    hosts.link(2, up=False)
    try:
        yield deepspeed_words(hosts)
    finally:
        hosts.link(2, up=True)


@contextlib.contextmanager
def ssh_refused(hosts: Hosts) -> Iterator[list[object]]:
    with hosts.ssh_option(2, "Port 23"):  # where nobody listens
        yield deepspeed_words(hosts)


@contextlib.contextmanager
def host_key_changed(hosts: Hosts) -> Iterator[list[object]]:
    path = hosts.folder / "known_hosts"
    before = path.read_text()
    first, second, *others = before.splitlines()
    name, key = second.split()[0], first.split(maxsplit=1)[1]
    path.write_text("\n".join([first, f"{name} {key}", *others]) + "\n")
    try:
        yield deepspeed_words(hosts)
    finally:
        path.write_text(before)


LISTEN = "import socket, time; s = socket.create_server(('', 29500)); print('listening', flush=True); time.sleep(600)"


@contextlib.contextmanager
def port_taken(hosts: Hosts) -> Iterator[list[object]]:
    log = hosts.folder / "listener"
    listener = hosts.start(1, [PYTHON, "-c", LISTEN], log)
    try:
        until = time.monotonic() + 60
        while "listening" not in log.read_text():
            assert time.monotonic() < until, log.read_text()
            time.sleep(0.05)
        yield deepspeed_words(hosts)
    finally:
        hosts.clear(1)
        listener.wait(30)


@contextlib.contextmanager
def unknown_address(hosts: Hosts) -> Iterator[list[object]]:
    yield [*deepspeed_words(hosts), "--master_addr", "nosuch.host"]


@contextlib.contextmanager
def other_version(hosts: Hosts) -> Iterator[list[object]]:
    """Another peft on host 2, as far as its metadata says: /run is each host's own, PYTHONPATH is the same."""
    folder = "/run/other/peft-0.0.1.dist-info"
    lines = f"mkdir -p {folder} && printf 'Metadata-Version: 2.1\\nName: peft\\nVersion: 0.0.1\\n' >{folder}/METADATA"
    assert hosts.start(2, ["sh", "-c", lines], hosts.folder / "made").wait(30) == 0
    try:
        yield ["env", "PYTHONPATH=/run/other", *deepspeed_words(hosts)]
    finally:
        hosts.start(2, ["rm", "-r", "/run/other"], hosts.folder / "made").wait(30)


@contextlib.contextmanager
def wrong_hostfile(hosts: Hosts) -> Iterator[list[object]]:
    yield [DEEPSPEED, "--hostfile", hosts.folder / "nosuch"]


@contextlib.contextmanager
def malformed_hostfile(hosts: Hosts) -> Iterator[list[object]]:
    path = hosts.folder / "malformed"
    path.write_text(f"{hosts.name(1)} slots=1\n{hosts.name(2)} slots=two\n")
    yield [DEEPSPEED, "--hostfile", path]


FAULTS = {
    fault.act.__name__: fault
    for fault in (
        Fault("rank killed", kill_rank, "killed: the process vanished without a word", (KILLED,)),
        Fault("rank stopped (SIGSTOP)", stop_rank, "the process is stopped", (Exit.PEER_LOST, Exit.STUCK, KILLED)),
        Fault("deepspeed command killed", kill_launcher, "launcher_gone: the launcher, or the SSH", (SIGKILLED,)),
        Fault("host powered off", power_off, "peer_lost: ", (SSH_FAILED,)),
        Fault("link cut for good", cut_link, "peer_lost: ", (SSH_FAILED,)),
    )
}
LAUNCH_FAULTS = {
    fault.around.__name__: fault
    for fault in (
        LaunchFault("host unreachable at launch", unreachable, "the ranks could not meet", (SSH_FAILED,)),
        LaunchFault("ssh refused", ssh_refused, "Connection refused", (SSH_FAILED,)),
        LaunchFault("ssh host key changed", host_key_changed, "Host key verification failed", (SSH_FAILED,)),
        LaunchFault("port taken", port_taken, "another process has taken the port", (Exit.LAUNCH,)),
        LaunchFault("address unresolvable", unknown_address, "cannot resolve the address", (Exit.LAUNCH,)),
        LaunchFault("versions differ", other_version, "peft is 0.0.1 on ", (Exit.USER_ERROR,)),
        LaunchFault("no such hostfile", wrong_hostfile, "is not a file; DeepSpeed would train", (Exit.USER_ERROR,)),
        LaunchFault("hostfile malformed", malformed_hostfile, "Hostfile contains a bad entry", (Exit.FAILED,)),
    )
}
