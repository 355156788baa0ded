"""tools/doctor.py as it is typed: on this machine, and over an ssh that says what OpenSSH said of real faults."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path

import pytest

from tests.support.launch import DEEPSPEED, PYTHON, ROOT, free_port, run
from vidcls.doctor.environment import check_environment
from vidcls.hosts import read_hostfile

pytestmark = pytest.mark.launch
DOCTOR = "tools/doctor.py"
# Runs what it is told on this machine, or fails as OpenSSH does.
SSH = """#!/bin/sh
while [ "$1" = -T ] || [ "$1" = -o ] || [ "$1" = -p ]; do [ "$1" = -T ] || shift; shift; done
host=$1; shift
case $host in
  refused) echo "ssh: connect to host refused port 22: Connection refused" >&2; exit 255 ;;
  changed) echo "@    WARNING: REMOTE HOST IDENTIFICATION HAS CHANGED!     @" >&2; exit 255 ;;
esac
exec sh -c "$*"
"""
PDSH = """#!/bin/sh
shift 5  # -S -f 1024 -w HOSTS
exec sh -c "$(echo "$*" | sed 's/%n/0/')"
"""


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder at the front of PATH with an ssh and a pdsh that stay on this machine."""
    folder = tmp_path / "commands"
    folder.mkdir()
    for name, text in (("ssh", SSH), ("pdsh", PDSH)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("HOME", str(tmp_path))  # no .deepspeed_env of the user's
    return folder


def test_this_machine(tmp_path: Path, small_shards: Path) -> None:
    out = tmp_path / "runs" / "new"
    words = [PYTHON, DOCTOR, "--output-dir", out, "--data", small_shards, "--port", free_port(), "--json"]
    done = run(words, log=tmp_path / "log")
    told = json.loads(done.output)
    (cells,) = told["checks"].values()
    assert set(cells) == {"code", "port", "folder", "data", "memory", "limits", "build", "slots"}
    assert (cells["code"], cells["port"], cells["data"]) == ("ok", "ok", "ok")
    assert done.code == (1 if "FAIL" in cells.values() else 0)
    (facts,) = told["facts"].values()
    assert facts["data"][str(small_shards)]["clips"] == 26
    assert [path.name for path in tmp_path.iterdir()] == ["log"]  # nothing is made, nothing is left


def test_a_hostfile_of_sound_and_broken_hosts(tmp_path: Path, commands: Path) -> None:
    hostfile = tmp_path / "hosts"
    hostfile.write_text("".join(f"{name} slots=1\n" for name in ("one", "twin", "refused", "changed")))
    words = [PYTHON, DOCTOR, "--hostfile", hostfile, "--port", free_port(), "--output-dir", tmp_path]
    done = run(words, log=tmp_path / "log")
    assert done.code == 1, done.output
    names = list(read_hostfile(hostfile))
    heading, *lines = (line.split() for line in done.output.splitlines())
    table = {words[0]: dict(zip(heading, words, strict=True)) for words in lines if words[0] in names}
    assert list(table) == names
    for name in ("one", "twin"):
        assert {table[name][check] for check in ("ssh", "code", "clock", "port")} == {"ok"}
    assert table["twin"]["link"] in ("ok", "warn")
    for name, words in (("refused", "connection refused"), ("changed", "host key changed")):
        assert table[name]["ssh"] == "FAIL"
        assert set(list(table[name].values())[2:]) == {"-"}
        assert re.search(rf"^FAIL {name} ssh: {words}.* Fix: ", done.output, re.MULTILINE)
    assert "twin and one are one machine" in done.output  # which they are
    assert not list(tmp_path.glob(".vidcls-doctor-*"))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--hostfile", "/nowhere/hosts"], "error: hostfile '/nowhere/hosts': No such file"),
        (["--port", "70000"], "--port: must be from 1 to 65535"),
        (["--timeout", "0"], "--timeout: must be from 1 to 3600"),
    ],
)
def test_mistakes_are_answered(tmp_path: Path, words: list[str], said: str) -> None:
    done = run([PYTHON, DOCTOR, *words], log=tmp_path / "log")
    assert done.code == 2
    assert said in done.output


@pytest.mark.parametrize(
    ("text", "trains", "code", "found"),
    [("X=1\n", True, 0, 0), ("# X=1\n", False, 0, 1), ("X=1\n\n", False, 1, 1)],
)
def test_the_real_launcher_falls_into_the_traps_that_are_named(
    tmp_path: Path, commands: Path, text: str, trains: bool, code: int, found: int
) -> None:
    (tmp_path / ".deepspeed_env").write_text(text)
    (tmp_path / "hosts").write_text("one slots=1\ntwo slots=1\n")
    (tmp_path / "train.py").write_text("open('trained', 'w').close()\n")
    words = [DEEPSPEED, "--hostfile", "hosts", "--master_port", str(free_port()), "train.py"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert (tmp_path / "trained").exists() is trains, done.stdout + done.stderr
    assert done.returncode == code
    assert len(list(check_environment("here", tmp_path, {"HOME": str(tmp_path)}))) == found


def test_help_names_defaults_and_units() -> None:
    done = subprocess.run([PYTHON, DOCTOR, "--help"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    for words in ("(29500)", "seconds that a host may take", "(this machine alone)", "Exit codes: 0 nothing fails"):
        assert words in " ".join(done.stdout.split())
    assert "--probe" not in done.stdout
