"""The hostfile is read as DeepSpeed means it or refused by name; what ssh says becomes a named fault."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from vidcls.hosts import Answer, probe, read_hostfile, run_for, ssh_fault, ssh_words


def test_hostfile_keeps_its_order(tmp_path: Path) -> None:
    path = tmp_path / "hosts"
    path.write_text(
        "# two hosts\n\nb.example.org slots=2\n  me@a-1   slots=16 # eight cards twice\nc slots=1 max_slots=4\n"
    )
    assert list(read_hostfile(path).items()) == [("b.example.org", 2), ("me@a-1", 16), ("c", 1)]


def test_the_example_is_a_hostfile() -> None:
    assert read_hostfile(Path(__file__).parents[1] / "launch" / "hostfile.example") == {"node1": 8, "node2": 8}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a slots=2\na slots=2\n", "line 2: 'a slots=2': a is on line 1 already"),
        ("a\n", "line 1: 'a': must be a host name and its ranks"),
        ("\na slots=two\n", "line 2: 'a slots=two'"),
        ("a slots=2x\n", "must be a host name and its ranks"),  # DeepSpeed takes the 2
        ("a slots = 2\n", "must be a host name and its ranks"),
        ("a slots=0\n", "slots must be at least 1"),
        ("a,b slots=1\n", "'a,b' must be one host name"),
        ("node[1-4] slots=1\n", "'node[1-4]' must be one host name"),
        ("-oProxyCommand=date slots=1\n", "must be one host name"),
        ("fe80::1 slots=1\n", "must be one host name"),
        ("# nobody\n\n", "names no host"),
        ("", "names no host"),
    ],
)
def test_faults_of_a_hostfile_are_named(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "hosts"
    path.write_text(text)
    with pytest.raises(ValueError, match="hostfile") as caught:
        read_hostfile(path)
    assert words in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_missing_or_binary_hostfile_is_named(tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe slots=1")
    for name, words in (("missing", "No such file"), (".", "Is a directory"), ("binary", "not UTF-8")):
        with pytest.raises(ValueError, match=words):
            read_hostfile(tmp_path / name)


# What OpenSSH 9 wrote when each of these was brought about.
SSH = [
    ("ssh: connect to host dr2 port 22: Connection refused", "connection refused"),
    ("ssh: connect to host dr2 port 22: Connection timed out", "timed out"),
    ("Timeout, server dr2 not responding.", "timed out"),
    ("ssh: connect to host dr2 port 22: No route to host", "no route to host"),
    ("ssh: Could not resolve hostname dr2: Name or service not known", "unknown host name"),
    (
        "@    WARNING: REMOTE HOST IDENTIFICATION HAS CHANGED!     @\nHost key verification failed.",
        "host key changed",
    ),
    ("No ED25519 host key is known for dr2 and you have requested strict checking.", "host key unknown"),
    ("Host key verification failed.", "host key unknown"),
    ("root@dr2: Permission denied (publickey).", "permission denied"),
    ("Received disconnect from 10.0.0.2 port 22:2: Too many authentication failures", "permission denied"),
    ("kex_exchange_identification: read: Connection reset by peer", "connection closed"),
    ("Connection timed out during banner exchange", "timed out"),
    ("", "connection lost"),
    ("something new", "failed"),
]


@pytest.mark.parametrize(("said", "name"), SSH)
def test_what_ssh_says_is_named(said: str, name: str) -> None:
    fault = ssh_fault("me@dr2", Answer(255, "", said))
    assert fault is not None
    assert fault.name == name
    assert "dr2" in fault.fix


def test_exit_codes_of_remote_commands_are_not_faults_of_ssh() -> None:
    assert ssh_fault("dr2", Answer(1, "", "Permission denied")) is None
    silent = ssh_fault("dr2", Answer(None, "", ""))
    assert silent is not None
    assert silent.name == "no answer in time"


def test_ssh_never_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ssh_words("dr2")
    assert words[0] == "ssh"
    assert words[-1] == "dr2"
    assert {"BatchMode=yes", "ConnectTimeout=5"} <= set(words)
    assert "-p" not in words
    assert ssh_words("dr2", 2222)[-3:] == ["-p", "2222", "dr2"]


def test_a_command_that_hangs_is_ended_with_what_it_started(tmp_path: Path) -> None:
    """Also one that closes nothing: its grandchild would hold a pipe open."""
    note = tmp_path / "pid"
    started = time.monotonic()
    answer = run_for(["sh", "-c", f"echo before; (sleep 60 & echo $! >{note}; wait)"], 0.5)
    assert time.monotonic() - started < 20
    assert (answer.code, answer.output) == (None, "before\n")
    state = Path(f"/proc/{note.read_text().strip()}/stat")
    assert not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z"


@pytest.mark.parametrize(
    ("program", "words"),
    [
        ("exit 0", None),
        ("echo 'ssh: connect to host dr2 port 22: Connection refused' >&2; exit 255", "connection refused: dr2"),
        ("exit 3", "`ssh dr2 true` exits with 3"),
        ("sleep 60", "no answer in time"),
    ],
)
def test_probe_names_the_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str, words: str | None
) -> None:
    ssh = tmp_path / "ssh"
    ssh.write_text(f"#!/bin/sh\n{program}\n")
    ssh.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    found = probe("dr2", 0.5 if "sleep" in program else 20)
    assert found == words if words is None else found is not None and found.startswith(words)


def test_probe_without_ssh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert probe("dr2", 5) == "no ssh command: install openssh-client on this host"
