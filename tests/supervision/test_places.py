"""Hosts that do not answer are left out, spare ones step in, and those that come back are noticed."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from vidcls.supervision.places import Places, Return, probe_all, write_hostfile

FOUR = {"a": 4, "b": 2, "c": 4, "d": 4}


class Network:
    """Hosts and what is wrong with them."""

    def __init__(self, **faults: str) -> None:
        self.faults = faults

    def probe(self, hosts: Sequence[str]) -> dict[str, str | None]:
        return {host: self.faults.get(host) for host in hosts}


def test_all_that_answer_take_part() -> None:
    places = Places(FOUR, Network(b="timed out").probe)
    assert places.look() == ({"a": 4, "c": 4, "d": 4}, {"b": "timed out"})
    assert places.full == FOUR


def test_spare_hosts_step_in_and_slots_can_be_the_same_everywhere() -> None:
    places = Places(FOUR, Network(a="connection refused").probe, wanted=2, slots=3)
    assert places.full == {"a": 3, "b": 3}
    assert places.look() == ({"b": 3, "c": 3}, {"a": "connection refused"})


def test_more_hosts_than_there_are(tmp_path: Path) -> None:
    path = write_hostfile(tmp_path / "hosts", {"a": 1})
    with pytest.raises(ValueError, match=r"--num_nodes=2 is more than the 1 hosts"):
        Places.read(path, wanted=2, slots=None, ssh_port=None)


def test_a_hostfile_is_written_as_it_is_read(tmp_path: Path) -> None:
    assert Places.read(write_hostfile(tmp_path / "hosts", FOUR), None, None, None).full == FOUR


def test_all_are_asked_at_once_by_ssh_with_its_port(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An ssh that takes half a second and fails for one host as the real one does."""
    ssh = tmp_path / "ssh"
    ssh.write_text(
        f'#!/bin/sh\necho "$@" >>{tmp_path}/calls\nsleep 0.5\n'
        'case "$*" in *" node2 true") echo "connect to host node2: Connection refused" >&2; exit 255;; esac\n'
    )
    ssh.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    hosts = [f"node{i}" for i in range(8)]
    began = time.monotonic()
    found = probe_all(hosts, 2222)
    assert time.monotonic() - began < 3  # one after the other: 4
    assert list(found) == hosts
    assert [host for host, fault in found.items() if fault] == ["node2"]
    assert (found["node2"] or "").startswith("connection refused: node2 is up but no sshd listens")
    calls = (tmp_path / "calls").read_text().splitlines()
    assert all("-p 2222" in call and "BatchMode=yes" in call and "ConnectTimeout=5" in call for call in calls)


def test_a_host_is_back_when_it_has_answered_twice_in_a_row() -> None:
    answers = iter([None, "timed out", None, None])  # on its way up a host may answer, and fall silent again
    asked: list[str] = []

    def probe(hosts: Sequence[str]) -> dict[str, str | None]:
        asked.extend(hosts)
        return dict.fromkeys(hosts, next(answers, None))

    back = Return(["b"], probe, every=0.05)
    deadline = time.monotonic() + 20
    while not back.back and time.monotonic() < deadline:
        time.sleep(0.005)
    back.close()
    assert back.back == ["b"]
    assert len(asked) == 4
