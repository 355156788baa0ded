"""Facts of hosts become findings: one host is made wrong at a time, and nothing else may be found."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from vidcls.doctor import judge
from vidcls.doctor.findings import FAIL, WARN, Finding

GB = 10**9
HEALTHY: dict[str, Any] = {
    "hostname": "a",
    "boot": "1",
    "python": "3.11.7",
    "packages": {"torch": "2.13.0", "deepspeed": "0.19.8"},
    "vidcls": {"folder": "/w", "digest": "0123456789abcdef"},
    "addresses": ["10.0.0.1"],
    "own_address": "10.0.0.1",
    "cpus": 8,
    "memory": {"total": 64 * GB, "available": 60 * GB},
    "shm": {"total": 32 * GB, "free": 32 * GB, "left": {}},
    "limits": {
        "open files": 1024,
        "processes": None,
        "address space": None,
        "file size": None,
        "processor time": None,
        "locked memory": 65536,
    },
    "tasks_left": None,
    "infiniband": False,
    "build": {"ninja": None, "nvcc": "not found", "c++": None},
    "accelerators": 0,
}


def changed(**changes: Any) -> dict[str, Any]:
    """HEALTHY with values at "key" or "key__key"."""
    told = copy.deepcopy(HEALTHY)
    for name, value in changes.items():
        *path, last = name.split("__")
        place = told
        for part in path:
            place = place[part]
        place[last] = value
    return told


def three(**changes: Any) -> dict[str, dict[str, Any]]:
    """Three hosts, of which the last one is changed."""
    facts = {name: changed(hostname=name) for name in "ab"}
    return {**facts, "c": changed(**{"hostname": "c", **changes})}


def told(findings: Any) -> list[tuple[str, str]]:
    return [(finding.host, finding.level) for finding in findings]


@pytest.mark.parametrize(
    ("changes", "expected", "words"),
    [
        ({}, [], ""),
        ({"python": "3.11.9"}, [("c", WARN)], "Python 3.11.9, but 3.11.7 on a"),
        ({"python": "3.12.1"}, [("c", FAIL)], "Python 3.12.1"),
        ({"packages": {"torch": "2.12.0", "deepspeed": "0.19.8"}}, [("c", FAIL)], "torch 2.12.0, but 2.13.0 on a"),
        ({"packages": {"torch": "2.13.0", "deepspeed": None}}, [("c", FAIL)], "deepspeed is not installed"),
        ({"vidcls__digest": "ffff"}, [("c", FAIL)], "vidcls' sources ffff, but 0123456789ab on a"),
    ],
)
def test_code(changes: dict[str, Any], expected: list[tuple[str, str]], words: str) -> None:
    findings = list(judge.judge_code(three(**changes), "make it"))
    assert told(findings) == expected
    assert all(words in finding.text for finding in findings)


def test_most_hosts_are_right_about_versions() -> None:
    facts = three()
    facts["a"]["packages"]["torch"] = "2.12.0"
    assert told(judge.judge_code(facts, "")) == [("a", FAIL)]
    for host in facts:
        facts[host]["packages"]["torch"] = None
    assert told(judge.judge_code(facts, "")) == [("a", FAIL), ("b", FAIL), ("c", FAIL)]


def test_one_machine_under_two_names() -> None:
    assert told(judge.judge_same_machine(three())) == []
    assert told(judge.judge_same_machine(three(hostname="a"))) == [("c", FAIL)]
    assert told(judge.judge_same_machine(three(hostname="a", boot="2"))) == []


@pytest.mark.parametrize(
    ("offset", "uncertainty", "level"),
    [
        (0.0, 0.0, None),
        (2.0, 0.0, None),
        (2.1, 0.2, None),  # may be 1.9
        (2.3, 0.2, WARN),
        (-2.3, 0.2, WARN),
        (30.0, 0.0, WARN),
        (-30.5, 0.1, FAIL),
        (3600.0, 1.0, FAIL),
    ],
)
def test_clock(offset: float, uncertainty: float, level: str | None) -> None:
    findings = list(judge.judge_clock("a", offset, uncertainty))
    assert [finding.level for finding in findings] == ([] if level is None else [level])
    assert all(("ahead" if offset > 0 else "behind") in finding.text for finding in findings)


@pytest.mark.parametrize(
    ("changes", "ranks", "levels"),
    [
        ({}, 8, []),
        ({"memory__available": 20 * GB}, 8, [WARN]),
        ({"memory__available": 24 * GB}, 8, []),
        ({"memory__available": 7 * GB}, 8, [FAIL]),
        ({"shm__free": 64 * 2**20}, 1, [FAIL]),  # what Docker gives
        ({"shm__free": 80 * 10**6}, 1, []),
        ({"shm__free": 500 * 10**6}, 8, [FAIL]),
        ({"shm__left": {"deepspeed_allreduce_buffer_0_a_1_0": 69_000_000}}, 1, [WARN]),
    ],
)
def test_memory(changes: dict[str, Any], ranks: int, levels: list[str]) -> None:
    assert [finding.level for finding in judge.judge_memory("a", changed(**changes), ranks)] == levels


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, []),
        ({"limits__open files": 256}, ["open files: 256"]),
        ({"limits__processes": 100}, ["processes: 100"]),
        ({"limits__file size": 10**9}, ["file size"]),
        ({"infiniband": True}, ["locked memory: 65536"]),
        ({"infiniband": True, "limits__locked memory": None}, []),
        ({"tasks_left": 50}, ["50 more threads"]),
    ],
)
def test_limits(changes: dict[str, Any], words: list[str]) -> None:
    findings = list(judge.judge_limits("a", changed(**changes)))
    assert len(findings) == len(words)
    assert all(word in finding.text for word, finding in zip(words, findings, strict=True))
    assert {finding.level for finding in findings} <= {WARN}


def test_build() -> None:
    assert list(judge.judge_build("a", changed())) == []  # no nvcc is needed without an accelerator
    assert told(judge.judge_build("a", changed(accelerators=8))) == [("a", WARN)]
    findings = list(
        judge.judge_build("a", changed(build__ninja="not found", **{"build__c++": "Python.h: No such file"}))
    )
    assert told(findings) == [("a", WARN), ("a", WARN)]
    assert "python3-dev" in findings[1].fix


@pytest.mark.parametrize(
    ("devices", "count", "slots", "level", "words"),
    [
        (8, 8, 8, None, ""),
        (8, 8, 9, FAIL, "slots=9 for 8 accelerators"),
        (8, 8, 4, WARN, "slots=4 for 8 accelerators"),
        (8, 0, 8, FAIL, "8 accelerators, but torch sees none: driver too old"),
        (0, 0, 8, FAIL, "no accelerator, but others have some"),
    ],
)
def test_slots(devices: int, count: int, slots: int, level: str | None, words: str) -> None:
    facts = {"a": changed(accelerators=8), "b": changed(accelerators=devices)}
    seen = {
        "a": {"count": 8, "names": [], "warnings": []},
        "b": {"count": count, "names": [], "warnings": ["driver too old"]},
    }
    findings = list(judge.judge_slots(facts, seen, {"a": 8, "b": slots}))
    assert told(findings) == ([] if level is None else [("b", level)])
    assert all(words in finding.text for finding in findings)


def test_slots_without_accelerators() -> None:
    seen = {"a": {"count": 0, "names": [], "warnings": []}}
    assert list(judge.judge_slots({"a": changed()}, seen, {"a": 8})) == []
    assert list(judge.judge_slots({"a": changed()}, seen, {})) == []
    assert told(judge.judge_slots({"a": changed()}, seen, {"a": 9})) == [("a", WARN)]
    broken = list(judge.judge_slots({"a": changed()}, {"a": {"error": "import torch: no libcudart"}}, {}))
    assert [(finding.check, finding.level) for finding in broken] == [("code", FAIL)]


@pytest.mark.parametrize(
    ("own", "has_interface", "wrong"),
    [
        ("10.0.0.1", False, False),
        ("fd00::1", False, False),
        ("fe80::1%eth0", False, False),
        ("127.0.1.1", False, True),
        ("::1", False, True),
        (None, False, True),
        ("127.0.1.1", True, False),
    ],
)
def test_own_name(own: str | None, has_interface: bool, wrong: bool) -> None:
    assert told(judge.judge_own_name("a", changed(own_address=own), has_interface)) == ([("a", FAIL)] if wrong else [])


@pytest.mark.parametrize(
    ("said", "wrong"),
    [
        ("10.0.0.1 172.17.0.1 \n", None),
        ("fd00::1\n", None),
        ("Welcome to node1!\n10.0.0.1\n", "begins with 'Welcome'"),
        ("", "prints nothing"),
    ],
)
def test_master_address(said: str, wrong: str | None) -> None:
    findings = list(judge.judge_master("me@node1", said))
    assert told(findings) == ([] if wrong is None else [("me@node1", FAIL)])
    assert all(wrong in f.text and f.fix.endswith("launch with --master_addr node1") for f in findings if wrong)


@pytest.mark.parametrize(("free", "level"), [(100 * GB, None), (9 * GB, WARN), (0, FAIL)])
def test_space(free: int, level: str | None) -> None:
    findings = list(judge.judge_space("a", {"folder": "/runs", "free": free, "total": 200 * GB}))
    assert [finding.level for finding in findings] == ([] if level is None else [level])


@pytest.mark.parametrize(
    ("up", "down", "usual", "words"),
    [
        (1.1e9, 1.2e9, 1.1e9, None),
        (117e6, 117e6, 0.0, None),
        (11e6, 117e6, 0.0, "11 MB/s to a, 117 MB/s back (a gigabit is 118)"),
        (0.2e9, 1.2e9, 1.1e9, "200 MB/s to a, 1200 MB/s back (other hosts: 1100)"),
    ],
)
def test_link(up: float, down: float, usual: float, words: str | None) -> None:
    findings = list(judge.judge_link("b", "a", {"up": up, "down": down}, usual))
    assert [finding.text for finding in findings] == ([] if words is None else [words])


def test_a_finding_has_a_known_check_and_level() -> None:
    for check, level in (("clocks", FAIL), ("clock", "bad")):
        with pytest.raises(AssertionError):
            Finding("a", check, level, "", "")
