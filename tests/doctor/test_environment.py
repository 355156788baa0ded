"""Traps of `.deepspeed_env`, proven with the very line of shell that DeepSpeed makes of it."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from vidcls.doctor.environment import (
    check_environment,
    check_launcher,
    environment_files,
    exported,
    read_environment,
)
from vidcls.doctor.findings import FAIL, WARN

ROOT = Path(__file__).parents[2]


def launch(text: str) -> str:
    """What is printed by a launch with this file: deepspeed.launcher.runner.main and PDSHRunner, 0.19.8, in short.

    "crash" when reading the file raises, "nothing" when the command behind the exports is not reached; else what it
    says of X and Y.
    """
    line = ""
    for entry in text.splitlines(keepends=True):
        try:
            key, value = entry.split("=", maxsplit=1)
        except ValueError:
            return "crash"
        value = value.strip()
        if re.search(r"[^\w@%+=:,./-]", value):
            value = f'"{value}"'
        line += f"export {key.strip()}={value}; "
    done = subprocess.run(
        ["sh", "-c", line + ' printf "trained %s %s" "$X" "$Y"'],
        capture_output=True,
        text=True,
        env={"HOME": "/home/me"},
        timeout=20,
    )
    return done.stdout if done.stdout.startswith("trained") else f"nothing, exit code {done.returncode}"


@pytest.mark.parametrize(
    ("text", "happens", "level"),
    [
        ("X=1\nY=a,b:/c\n", "trained 1 a,b:/c", None),
        ("X=two words\n", "trained two words ", None),
        ("X=$HOME/x\nY=a=b\n", "trained /home/me/x a=b", None),
        ("X = 1\n", "trained 1 ", None),
        ("X=1\n\nY=2\n", "crash", FAIL),
        ("# no equals sign\nX=1\n", "crash", FAIL),
        ("X\n", "crash", FAIL),
        ("# X=1\nY=2\n", "nothing, exit code 0", FAIL),
        ("X=1\n  # Y=2\n", "nothing, exit code 0", FAIL),
        ("export X=1\n", "trained 1 ", FAIL),  # works by chance with pdsh, not with --launcher openmpi
        ("X Y=1\n", "trained  1", FAIL),
        ('X="two words"\n', "trained two ", WARN),
        ("X='1'\n", "trained '1' ", WARN),
        ("X=$(echo 5)\n", "trained 5 ", WARN),
    ],
)
def test_faults_are_those_that_go_wrong(text: str, happens: str, level: str | None) -> None:
    assert launch(text) == happens
    assert [fault.level for fault in read_environment(text)[1]] == ([] if level is None else [level])


def test_the_example_is_without_faults() -> None:
    variables, faults = read_environment((ROOT / "launch" / "deepspeed_env.example").read_text())
    assert faults == []
    assert variables
    assert launch((ROOT / "launch" / "deepspeed_env.example").read_text()).startswith("trained")


def test_both_files_are_read_and_named(tmp_path: Path) -> None:
    home, here = tmp_path / "home", tmp_path / "here"
    home.mkdir()
    here.mkdir()
    (home / ".deepspeed_env").write_text("X=1\nY=1\n")
    (here / ".deepspeed_env").write_text("X=2\n# bad\n")
    environment = {"HOME": str(home), "PYTHONHASHSEED": "0", "PYTHONPATH": "/p", "OMP_NUM_THREADS": "1", "LANG": "C"}
    taken = exported(environment, here)
    assert taken == {"X": "2", "Y": "1", "PYTHONHASHSEED": "0", "PYTHONPATH": f"{here}:/p"}
    bad, left = check_environment("a", here, environment)
    assert (bad.level, left.level) == (FAIL, WARN)
    assert f"{here}/.deepspeed_env, line 2" in bad.text
    assert left.text.startswith("OMP_NUM_THREADS")
    (here / ".deepspeed_env").write_text("OMP_NUM_THREADS=1\n")
    assert list(check_environment("a", here, environment)) == []
    assert environment_files(home, environment) == [home / ".deepspeed_env"]  # typed in the home folder: once
    assert environment_files(here, {**environment, "DS_ENV_FILE": "other"}) == []


def test_pdsh_or_openmpi(tmp_path: Path) -> None:
    assert [finding.level for finding in check_launcher("a", str(tmp_path))] == [FAIL]
    for name in ("ompi_info", "pdsh"):
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
        assert [f.level for f in check_launcher("a", str(tmp_path))] == ([WARN] if name == "ompi_info" else [])
