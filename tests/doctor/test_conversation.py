"""The talk with a probe: faults are named, nothing waits for ever, and clocks are told apart from the way to them."""

from __future__ import annotations

import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vidcls.doctor.conversation import ProbeError, Session, ask_clock, clock_offset, remote_command
from vidcls.doctor.probe import MARK

TOLD = {"python": "/py", "script": "/doctor.py", "directory": "/here"}


def session(program: str) -> Session:
    return Session("a", [sys.executable, "-c", program], TOLD)


@pytest.mark.parametrize(
    ("samples", "offset", "uncertainty"),
    [
        ([(100.0, 100.5, 101.0)], 0.0, 0.5),
        ([(100.0, 112.5, 101.0)], 12.0, 0.5),
        ([(100.0, 85.5, 101.0)], -15.0, 0.5),
        # all of the delay on one way: the error is exactly the uncertainty
        ([(100.0, 111.0, 101.0)], 10.5, 0.5),
        # the shortest round trip counts, whatever the others say
        ([(100.0, 100.9, 101.0), (102.0, 102.005, 102.01), (103.0, 104.9, 105.0)], 0.0, 0.005),
        # recorded over ssh between two namespaced hosts of one machine, whose clocks are one: 0 is right
        (
            [
                (1795642300.639747, 1795642300.640047, 1795642300.640283),
                (1795642300.640349, 1795642300.640547, 1795642300.640766),
                (1795642300.640785, 1795642300.640945, 1795642300.641116),
                (1795642300.641136, 1795642300.641329, 1795642300.641482),
            ],
            0.0,
            0.000166,
        ),
    ],
)
def test_round_trips_are_taken_off(
    samples: list[tuple[float, float, float]], offset: float, uncertainty: float
) -> None:
    found = clock_offset(samples)
    assert found == pytest.approx((offset, uncertainty), abs=1e-4)


@pytest.mark.parametrize("shift", [0.0, 47.0, -3600.0])
def test_a_shifted_clock_is_measured(shift: float) -> None:
    talk = session(
        f"import sys, time\nfor line in sys.stdin: time.sleep(0.02); "
        f"print({MARK!r} + '{{\"result\": %r}}' % (time.time() + {shift}), flush=True)"
    )
    try:
        offset, uncertainty = ask_clock(talk, 60)
    finally:
        talk.end()
    assert uncertainty >= 0.01
    assert abs(offset - shift) <= uncertainty


def test_what_start_files_print_is_passed_over() -> None:
    talk = session(
        f"print('Welcome!\\n\\n{{}}'); print({MARK!r} + '{{\"result\": 7}}', flush=True); print('bye'); input()"
    )
    try:
        assert talk.hear("start", 60) == 7
    finally:
        talk.end()


@pytest.mark.parametrize(
    ("program", "check", "words"),
    [
        ("raise SystemExit(91)", "code", "no such working directory: make /here visible"),
        ("raise SystemExit(92)", "code", "no interpreter: /py must be there"),
        ("raise SystemExit(93)", "code", "no checkout: /doctor.py must be there"),
        ("import nosuchpackage", "code", "No module named 'nosuchpackage'"),
        (f'print({MARK!r} + \'{{"error": "OSError: x"}}\', flush=True); input()', None, "start: OSError: x"),
    ],
)
def test_a_probe_that_fails_says_why(program: str, check: str | None, words: str) -> None:
    talk = session(program)
    try:
        with pytest.raises(ProbeError) as caught:
            talk.hear("start", 60)
    finally:
        talk.end()
    assert caught.value.check == check
    assert words in str(caught.value)


def test_a_probe_that_hangs_is_killed() -> None:
    talk = session(f"import time; print({MARK!r} + '{{\"result\": 1}}', flush=True); time.sleep(100)")
    assert talk.hear("start", 60) == 1
    started = time.monotonic()
    with pytest.raises(ProbeError, match=r"no answer to 'facts' within 0 s"):
        talk.ask("facts", 0.2)
    with pytest.raises(ProbeError):
        talk.ask("facts", 5)
    talk.end()
    assert time.monotonic() - started < 30


def test_the_remote_command_does_as_a_launch(tmp_path: Path) -> None:
    """Folder, interpreter and exports; values are expanded where it runs, and odd names survive two shells."""
    folder = tmp_path / "a 'folder' with $HOME"
    folder.mkdir()
    script = folder / "show me.py"
    script.write_text("import os, sys; print(os.getcwd(), os.environ['X'], os.environ['Y'], sys.argv[1:])")
    variables = {"X": "plain", "Y": "two $HOME"}
    command = remote_command(sys.executable, str(script), str(folder), variables, 30)
    done = subprocess.run(
        ["sh", "-c", command], capture_output=True, text=True, env={"HOME": "/home/me"}, cwd="/", timeout=60
    )
    assert done.stdout.strip() == f"{folder} plain two /home/me ['--probe', '30']"
    for wrong, code in (
        (remote_command(sys.executable, str(script), "/nowhere", {}, 30), 91),
        (remote_command("/nowhere/python", str(script), "/", {}, 30), 92),
        (remote_command(sys.executable, "/nowhere/doctor.py", "/", {}, 30), 93),
    ):
        assert subprocess.run(shlex.split(wrong), capture_output=True, timeout=60).returncode == code
