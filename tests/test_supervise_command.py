"""launch/supervise.py with a `deepspeed` that trains nothing: every way on, and every end."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from tests.support.fake_deepspeed import install, launches
from tests.support.launch import ROOT, session_processes

pytestmark = pytest.mark.launch

DONE = {"steps": 2, "outcome": "finished"}
LIMIT = 60.0  # seconds; each run here takes a few


class Supervised:
    """One run in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.output = folder / "run"
        self.recipe = folder / "recipe.yaml"
        self.processes: list[subprocess.Popen] = []
        self.values: dict[str, Any] = {
            "model_name_or_path": "tiny",
            "dataset": "data/x",
            "num_action_classes": 4,
            "per_device_train_batch_size": 8,
            "max_steps": 10,
            "output_dir": str(self.output),
        }

    def start(
        self, acts: list[dict[str, Any]], *options: object, launcher: tuple[object, ...] = ("--num_gpus", 2)
    ) -> subprocess.Popen:
        command = install(self.folder / "fake", acts)
        self.recipe.write_text(yaml.safe_dump(self.values))
        words = [sys.executable, "launch/supervise.py", "--backoff", 0.05, *options]
        words += ["--", command, *launcher, "launch/train.py", self.recipe]
        with self.log.open("w") as log:
            process = subprocess.Popen(
                [str(word) for word in words],
                cwd=ROOT,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, "PATH": f"{self.folder}:{os.environ['PATH']}"},
            )
        self.processes.append(process)
        return process

    def run(self, acts: list[dict[str, Any]], *options: object, **more: Any) -> int:
        return self.start(acts, *options, **more).wait(LIMIT)

    @property
    def log(self) -> Path:
        return self.folder / "log.txt"

    @property
    def said(self) -> str:
        return self.log.read_text()

    @property
    def launches(self) -> list[dict[str, Any]]:
        return launches(self.folder / "fake")

    @property
    def rows(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.output / "supervise.jsonl").read_text().splitlines()]

    @property
    def verdicts(self) -> list[str]:
        return [row["verdict"] for row in self.rows]

    def wait_for(self, what: Callable[[], object]) -> None:
        deadline = time.monotonic() + LIMIT
        while not what():
            assert time.monotonic() < deadline, self.said
            time.sleep(0.05)

    def close(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.kill()
            process.wait()
        for launched in self.launches:
            assert session_processes(launched["pid"]) == []


@pytest.fixture
def supervised(tmp_path: Path) -> Iterator[Supervised]:
    run = Supervised(tmp_path)
    yield run
    run.close()


def test_a_killed_run_goes_on_and_finishes(supervised: Supervised) -> None:
    (supervised.output / "old").mkdir(parents=True)
    supervised.values["overwrite_output_dir"] = True
    acts = [
        {"begins": False, "exit": 1},
        {"steps": 3, "saves": 2, "exit": 247, "report": {"kind": "killed", "step": 3, "code": 137}},
        {**DONE, "steps": 8},
    ]
    assert supervised.run(acts) == 0
    assert supervised.verdicts == ["failed", "killed", "finished"]
    resumes = [launch["run"] for launch in supervised.launches]
    assert [run["overwrite_output_dir"] for run in resumes] == [True, True, False]
    assert [run["resume_from_checkpoint"] for run in resumes] == [None, None, "latest"]
    assert len({launch["options"]["master_port"] for launch in supervised.launches}) == 3
    rows = supervised.rows
    assert [row["number"] for row in rows] == [1, 2, 3]
    assert [(row["resumed_from"], row["last_step"], row["saved"]) for row in rows] == [
        (0, 0, 0),
        (0, 3, 2),
        (2, 10, 10),
    ]
    assert rows[1]["cause"] == "rank 1 on node2 in phase step at step 3: killed: told to"
    summary = json.loads((supervised.output / "supervise" / "summary.json").read_text())
    assert (summary["code"], summary["restarts"], summary["lost_steps"]) == (0, 2, 1)
    # 10 steps of 16 clips (2 ranks) at 8 a second
    assert summary["useful_seconds"] == pytest.approx(20)
    assert supervised.said.count("launch 1 begins") == 1
    assert "launch 2 begins" in (supervised.output / "supervise" / "attempt-3.log").read_text()


def test_a_user_error_is_not_repeated(supervised: Supervised) -> None:
    assert supervised.run([{"exit": 2}]) == 2
    assert supervised.verdicts == ["user_error"]


def test_exit_code_0_alone_is_no_success(supervised: Supervised) -> None:
    """Neither is the word of an earlier launch."""
    supervised.output.mkdir()
    (supervised.output / "outcome.json").write_text('{"outcome": "finished"}')
    assert supervised.run([{"begins": False}]) == 1
    assert supervised.verdicts == ["false_success"] * 3
    assert "exit code 0, but the run does not say that it has finished" in supervised.said


def test_what_comes_again_at_the_same_step_ends_it_by_name(supervised: Supervised) -> None:
    acts = [{"exit": 71, "report": {"kind": "diverged", "step": 3, "clips": "a-0.tar:7"}}]
    assert supervised.run(acts) == 76
    assert supervised.verdicts == ["diverged", "diverged"]
    assert "diverged 2 times in a row at step 3, without progress: rank 1 on node2" in supervised.said
    assert "clips a-0.tar:7" in supervised.said


def test_restarts_are_limited_and_wait_longer_each_time(supervised: Supervised) -> None:
    acts = [{"exit": 247, "report": {"kind": "killed", "step": n}} for n in range(9)]
    assert supervised.run(acts, "--max-restarts", 4, "--max-backoff", 0.3) == 247
    assert len(supervised.launches) == 5
    waits = [line.split(" in ")[1].split(" s")[0] for line in supervised.said.splitlines() if "the next one in" in line]
    assert waits == ["0.05", "0.1", "0.2", "0.3"]
    assert "--max-restarts 4 is reached" in supervised.said


def test_a_launch_that_does_not_end_after_a_failure_is_ended(supervised: Supervised) -> None:
    acts = [{"steps": 1, "report": {"kind": "peer_lost", "step": 1}, "hangs": True}, DONE]
    assert supervised.run(acts, "--drain", 0.5) == 0
    assert supervised.verdicts == ["peer_lost", "finished"]
    assert supervised.rows[0]["asked"] == "drain"


def test_a_silent_launch_is_ended(supervised: Supervised) -> None:
    assert supervised.run([{"hangs": True}, DONE], "--silence", 2) == 0
    assert supervised.verdicts == ["silent", "finished"]


def test_slow_steps_are_signs_of_life(supervised: Supervised) -> None:
    assert supervised.run([{"steps": 4, "seconds": 1.2, "outcome": "finished"}], "--silence", 3) == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_saves_and_stops(supervised: Supervised, number: int) -> None:
    process = supervised.start([{"steps": 1, "hangs": True}])
    supervised.wait_for(lambda: (supervised.output / "checkpoint-1").exists())
    process.send_signal(number)
    assert process.wait(LIMIT) == 75
    assert supervised.verdicts == ["stopped"]
    assert "the run saved and stopped" in supervised.said
    assert not (supervised.output / "STOP").exists()


def test_a_run_that_does_not_stop_is_killed(supervised: Supervised) -> None:
    process = supervised.start([{"hangs": True, "stops": False}], "--stop-timeout", 1)
    supervised.wait_for(lambda: supervised.launches)
    process.send_signal(signal.SIGTERM)
    assert process.wait(LIMIT) == 75
    assert "not stopped after 1 s: killed" in supervised.said
    assert not (supervised.output / "STOP").exists()


def test_a_later_signal_kills_at_once(supervised: Supervised) -> None:
    process = supervised.start([{"hangs": True, "stops": False}])
    supervised.wait_for(lambda: supervised.launches)
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGTERM)  # a cluster manager's second, to the whole group
    time.sleep(6)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.wait(15) == 75
    assert supervised.rows[0]["asked"] == "force"


def test_a_signal_while_it_waits_ends_it(supervised: Supervised) -> None:
    process = supervised.start([{"exit": 247}], "--backoff", 100)
    supervised.wait_for(lambda: "the next one in" in supervised.said)
    process.send_signal(signal.SIGTERM)
    assert process.wait(15) == 75
    assert len(supervised.launches) == 1


def test_a_stop_that_somebody_else_asked_for_is_passed_on(supervised: Supervised) -> None:
    process = supervised.start([{"steps": 1, "hangs": True}])
    supervised.wait_for(lambda: (supervised.output / "checkpoint-1").exists())
    (supervised.output / "STOP").touch()
    assert process.wait(LIMIT) == 75
    assert "somebody else" in supervised.said


def test_a_stale_stop_file_is_removed(supervised: Supervised) -> None:
    supervised.output.mkdir()
    (supervised.output / "STOP").touch()
    assert supervised.run([DONE]) == 0
    assert not supervised.launches[0]["stop_file"]


def test_the_launch_ends_with_its_supervisor(supervised: Supervised) -> None:
    process = supervised.start([{"hangs": True}])
    supervised.wait_for(lambda: supervised.launches)
    process.kill()
    process.wait()
    supervised.wait_for(lambda: not psutil.pid_exists(supervised.launches[0]["pid"]))


def test_one_supervisor_at_a_time(supervised: Supervised) -> None:
    folder = supervised.output / "supervise"
    folder.mkdir(parents=True)
    with (folder / "run.lock").open("w") as lock:
        lock.write('{"host": "elsewhere", "pid": 7}')
        lock.flush()
        fcntl.lockf(lock, fcntl.LOCK_EX)
        assert supervised.run([DONE]) == 2
    assert "elsewhere" in supervised.said
    assert supervised.launches == []


@contextlib.contextmanager
def held_by_a_lost_rank(supervised: Supervised) -> Iterator[subprocess.Popen]:
    """A supervisor whose first launch has failed, while a rank that is cut off still holds the output folder."""
    supervised.output.mkdir()
    with (supervised.output / "run.lock").open("w") as lock:
        lock.write("rank 0 of a host that was cut off")
        lock.flush()
        fcntl.lockf(lock, fcntl.LOCK_EX)
        process = supervised.start([{"exit": 71}, DONE])
        supervised.wait_for(lambda: "rank 0 of a host that was cut off" in supervised.said)
        yield process


def test_ranks_of_the_last_attempt_are_waited_for(supervised: Supervised) -> None:
    with held_by_a_lost_rank(supervised) as process:
        time.sleep(2)
        assert len(supervised.launches) == 1
    assert process.wait(LIMIT) == 0


def test_a_signal_while_ranks_of_the_last_attempt_are_waited_for_ends_it(supervised: Supervised) -> None:
    with held_by_a_lost_rank(supervised) as process:
        process.send_signal(signal.SIGTERM)
        assert process.wait(15) == 75
    assert len(supervised.launches) == 1


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_stpes": 3}, "did you mean 'max_steps'"),
        ({"save_only_model": True}, "save_only_model: true cannot be supervised"),
        ({"do_train": False}, "do_train: false cannot be supervised"),
        ({"train_batch_size": 9, "gradient_accumulation_steps": None}, "these rank counts fit"),
        ({"output_dir": "/proc/nowhere"}, "cannot be written"),
    ],
)
def test_mistakes_are_found_before_a_launch(supervised: Supervised, values: dict, message: str) -> None:
    supervised.values |= values
    assert supervised.run([DONE]) == 2
    assert message in supervised.said
    assert supervised.launches == []


def test_an_output_folder_that_is_away_is_waited_for(supervised: Supervised) -> None:
    """As a network file system may be."""
    acts = [{"exit": 71}, DONE]
    process = supervised.start(acts, "--backoff", 3, "--max-backoff", 3)
    supervised.wait_for(lambda: "the next one in" in supervised.said)
    supervised.output.rename(supervised.folder / "gone")
    supervised.output.write_text("no folder")
    supervised.wait_for(lambda: supervised.said.count("no_output") >= 3)
    supervised.output.unlink()
    (supervised.folder / "gone").rename(supervised.output)
    assert process.wait(LIMIT) == 0
    assert supervised.verdicts == ["peer_lost", "finished"]  # the rows in between could not be written


def test_a_run_whose_checkpoints_have_vanished_does_not_start_over(supervised: Supervised) -> None:
    """An empty mount point."""
    acts = [{"steps": 2, "exit": 71}, DONE]
    process = supervised.start(acts, "--backoff", 2, "--max-backoff", 2)
    supervised.wait_for(lambda: "the next one in" in supervised.said)
    supervised.output.rename(supervised.folder / "gone")
    supervised.output.mkdir()
    supervised.wait_for(lambda: supervised.said.count("no longer has the checkpoint of step 2") >= 2)
    supervised.output.rename(supervised.folder / "mount point")
    (supervised.folder / "gone").rename(supervised.output)
    assert process.wait(LIMIT) == 0
    assert len(supervised.launches) == 2
    assert supervised.rows[-1]["resumed_from"] == 2


class Hosts:
    """An `ssh` for which a host answers unless a file is in the way."""

    def __init__(self, supervised: Supervised, names: list[str]) -> None:
        self.folder = supervised.folder
        self.hostfile = self.folder / "hosts"
        self.hostfile.write_text("".join(f"{name} slots=2\n" for name in names))
        ssh = self.folder / "ssh"
        ssh.write_text(
            f'#!/bin/sh\nwhile [ "$1" != true ]; do host=$1; shift; done\n'
            f"[ -e {self.folder}/down-$host ] || exit 0\n"
            'echo "connect to host $host: Connection refused" >&2\nexit 255\n'
        )
        ssh.chmod(0o755)

    def down(self, name: str) -> None:
        (self.folder / f"down-{name}").touch()

    def up(self, name: str) -> None:
        (self.folder / f"down-{name}").unlink()


def test_a_lost_host_is_left_out_and_taken_in_again(supervised: Supervised) -> None:
    """6 ranks of 8 clips; 4 ranks keep the 48; and all 6 again as soon as the host has answered twice."""
    hosts = Hosts(supervised, ["node1", "node2", "node3"])
    launcher = ("--hostfile", hosts.hostfile, "--master_addr", "10.0.0.1")
    hosts.down("node1")
    acts = [{"steps": 1, "hangs": True}, {"steps": 2, "outcome": "finished"}]
    process = supervised.start(acts, "--rejoin-every", 0.3, launcher=launcher)
    supervised.wait_for(lambda: (supervised.output / "checkpoint-1").exists())
    time.sleep(1.5)
    assert process.poll() is None
    hosts.up("node1")
    assert process.wait(LIMIT) == 0
    first, second = supervised.launches
    assert first["hosts"] == ["node2 slots=2", "node3 slots=2"]
    assert first["batch"] == [48, 6, 2]
    assert "master_addr" not in first["options"]
    assert second["hosts"] == ["node1 slots=2", "node2 slots=2", "node3 slots=2"]
    assert second["batch"] == [None, 8, None]
    assert second["options"]["master_addr"] == "10.0.0.1"
    assert first["ssh"].startswith("-o ServerAliveInterval=5 -o ServerAliveCountMax=3")
    assert supervised.verdicts == ["rejoin", "finished"]
    assert supervised.rows[0]["dropped"]["node1"].startswith("connection refused")
    assert supervised.said.count("node1 answers again") == 1


def test_a_run_that_does_not_stop_for_a_host_is_killed_and_goes_on_with_it(supervised: Supervised) -> None:
    hosts = Hosts(supervised, ["node1", "node2"])
    hosts.down("node2")
    acts = [{"steps": 1, "hangs": True, "stops": False}, DONE]
    process = supervised.start(acts, "--rejoin-every", 0.2, "--stop-timeout", 1, launcher=("-H", hosts.hostfile))
    supervised.wait_for(lambda: (supervised.output / "checkpoint-1").exists())
    hosts.up("node2")
    assert process.wait(LIMIT) == 0
    assert "not stopped after 1 s: killed" in supervised.said
    assert supervised.launches[1]["hosts"] == ["node1 slots=2", "node2 slots=2"]


def test_the_last_host_is_reached_by_ssh_too(supervised: Supervised) -> None:
    hosts = Hosts(supervised, ["node1", "node2"])
    hosts.down("node1")
    assert supervised.run([DONE], launcher=("-H", hosts.hostfile)) == 0
    assert supervised.launches[0]["options"]["force_multi"] is True


def test_too_few_hosts_are_waited_for(supervised: Supervised) -> None:
    hosts = Hosts(supervised, ["node1", "node2"])
    hosts.down("node1")
    process = supervised.start([DONE], "--min-hosts", 2, "--max-backoff", 0.5, launcher=("-H", hosts.hostfile))
    supervised.wait_for(lambda: supervised.said.count("1 hosts answer; --min-hosts 2") >= 3)
    hosts.up("node1")
    assert process.wait(LIMIT) == 0
    assert len(supervised.launches) == 1
    assert set(supervised.verdicts) == {"no_hosts", "finished"}


def test_hosts_that_never_answer_end_it(supervised: Supervised) -> None:
    hosts = Hosts(supervised, ["node1"])
    hosts.down("node1")
    assert supervised.run([DONE], "--max-restarts", 2, launcher=("-H", hosts.hostfile)) == 78
    assert supervised.verdicts == ["no_hosts"] * 3
    assert supervised.launches == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "No such file"),
        ("node1\n", "line 1: 'node1': must be a host name and its ranks"),
        ("node1 slots=2\nnode1 slots=2\n", "node1 is on line 1 already"),
        ("# nothing\n", "names no host"),
    ],
)
def test_a_wrong_hostfile_is_named(supervised: Supervised, text: str | None, message: str) -> None:
    """DeepSpeed would train on this host alone, and exit with 0."""
    path = supervised.folder / "hosts"
    if text is not None:
        path.write_text(text)
    assert supervised.run([DONE], launcher=("-H", path)) == 2
    assert message in supervised.said
    assert supervised.launches == []
