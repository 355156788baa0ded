"""What happens to a run of two ranks has a name, every process goes, and a resume is the same run."""

from __future__ import annotations

import fcntl
import json
import os
import resource
import shutil
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.support import launch
from vidcls.faults.exits import Exit

pytestmark = pytest.mark.launch
KILLED = 247  # what launch.py makes of -9
LIMITS = ("ddp_timeout=12", "data_timeout=6", "step_timeout=16", "save_timeout=60", "stop_timeout=60")
STEPS = 100_000


def words(shards: Path, out: Path, *overrides: str) -> list[str]:
    common = ("per_device_train_batch_size=2", "save_steps=100000", "logging_steps=1", "report_to=none")
    more = ("plot_loss=false", "self_check=false", f"dataset={shards}", f"output_dir={out}")
    return ["launch/train.py", "launch/recipes/quickstart.yaml", *common, *more, *LIMITS, *overrides]


class Running:
    """A launched run that has done a few steps."""

    def __init__(self, shards: Path, folder: Path, *overrides: str) -> None:
        self.out, self.log = folder / "run", folder / "log"
        line = words(shards, self.out, f"max_steps={STEPS}", *overrides)
        self.process = launch.start(launch.launcher_words(2, line[0], *line[1:]), log=self.log)
        until = time.monotonic() + 120
        while self.log.read_text().count("\nstep ") < 3:
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            assert time.monotonic() < until, self.log.read_text()[-3000:]
            time.sleep(0.2)

    def rank(self, number: int) -> psutil.Process:
        """The process of a rank; its loader workers, forks of it, have another parent."""
        mark = f"--local_rank={number}"
        own = [p for p in launch.session_processes(self.process.pid) if mark in p.cmdline()]
        (found,) = [p for p in own if "deepspeed.launcher.launch" in p.parent().cmdline()]
        return found

    def worker(self, number: int) -> psutil.Process:
        rank = self.rank(number)
        return next(child for child in rank.children() if child.cmdline() == rank.cmdline())

    def end(self, seconds: float) -> int:
        """The command's exit code, once every process is gone, which must be within `seconds`."""
        try:
            left = launch.wait_until_gone(self.process.pid, seconds)
            assert not left, f"{left}\n{self.log.read_text()[-3000:]}"
        finally:
            launch.end_session(self.process.pid)
        assert not launch.shared_buffers()
        return self.process.wait(5)

    def reports(self) -> dict[int, dict[str, Any]]:
        found = [json.loads(path.read_text()) for path in (self.out / "failures").glob("*.json")]
        return {report["rank"]: report for report in found}


def kill_rank(run: Running) -> None:
    run.rank(1).kill()


def stop_rank(run: Running) -> None:
    run.rank(1).suspend()


def kill_worker(run: Running) -> None:
    run.worker(1).kill()


def stop_worker(run: Running) -> None:
    run.worker(1).suspend()


def kill_launcher(run: Running) -> None:
    run.rank(1).parent().parent().kill()


def starve_rank(run: Running) -> None:
    """As `ulimit -v` would, set so low that the next large piece of memory is refused."""
    rank = run.rank(1)
    rank.rlimit(resource.RLIMIT_AS, (rank.memory_info().vms - 2**28, resource.RLIM_INFINITY))


@pytest.mark.parametrize(
    ("act", "codes", "kind", "message"),
    [
        (kill_rank, (KILLED,), "killed", "vanished without a word"),
        (stop_rank, (Exit.PEER_LOST, Exit.STUCK, KILLED), "stuck", "the process is stopped"),
        (kill_worker, (Exit.DATA,), "data", "a loader worker was killed by signal 9 (Killed); waited for"),
        (stop_worker, (Exit.DATA,), "data", "a loader worker gave nothing for 6 seconds; waited for"),
        (starve_rank, (Exit.OUT_OF_MEMORY,), "out_of_memory", "allocate memory|MemoryError|bad_alloc"),
        (kill_launcher, (-signal.SIGKILL,), "launcher_gone", "the launcher, or the SSH session to it, is gone"),
    ],
)
def test_what_ends_a_rank_has_a_name(
    small_shards: Path,
    tmp_path: Path,
    act: Callable[[Running], None],
    codes: tuple[int, ...],
    kind: str,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # What a rank keeps of freed memory would be enough for it, step after step: large pieces come from the kernel, each
    # time. Small ones do not: where C++ code that cannot raise is refused one, the process ends without a word.
    if act is starve_rank:
        monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", str(2**16))
    run = Running(small_shards, tmp_path)
    act(run)
    code = run.end(60)
    assert code in codes, run.log.read_text()[-3000:]
    reports = run.reports()
    assert reports[1]["kind"] == kind
    assert any(part in reports[1]["message"] for part in message.split("|"))
    if act is stop_worker:
        assert reports[1]["clips"].startswith(f"{small_shards}/shard-0")
        assert reports[1]["phase"] == "data"
    if act not in (kill_launcher, stop_rank):  # the other rank says which one it followed
        assert reports[0]["kind"] == "peer_lost"
        assert "first, rank 1 on" in reports[0]["message"]
    assert not (run.out / "outcome.json").exists()


def rows(out: Path) -> list[tuple[Any, ...]]:
    found = [json.loads(line) for line in (out / "train_log.jsonl").read_text().splitlines()]
    return [(row["step"], row["loss"], row["grad_norm"]) for row in found]


def test_asked_to_stop_a_run_saves_and_goes_on_as_if_it_had_not(small_shards: Path, tmp_path: Path) -> None:
    """By a signal to one rank, then by the STOP file; against the same steps without a stop."""
    run = Running(small_shards, tmp_path, "log_order=true")
    run.rank(1).send_signal(signal.SIGTERM)
    assert run.end(60) == Exit.STOPPED, run.log.read_text()[-3000:]
    outcome = json.loads((run.out / "outcome.json").read_text())
    assert outcome["outcome"] == "stopped"
    first = outcome["step"]
    assert (run.out / f"checkpoint-{first}" / "COMPLETE").exists()

    again = Running(small_shards, tmp_path, "log_order=true", "resume_from_checkpoint=latest")
    (again.out / "STOP").touch()
    assert again.end(60) == Exit.STOPPED, again.log.read_text()[-3000:]
    second = json.loads((again.out / "outcome.json").read_text())["step"]
    assert second > first
    assert not (again.out / "STOP").exists()
    assert not (again.out / "failures").exists()

    straight = tmp_path / "straight"
    line = words(small_shards, straight, f"max_steps={STEPS}", "log_order=true")
    process = launch.start(launch.launcher_words(2, line[0], *line[1:]), log=tmp_path / "straight.log")
    try:
        until = time.monotonic() + 120
        while f"step {second}/" not in (tmp_path / "straight.log").read_text():
            assert process.poll() is None
            assert time.monotonic() < until
            time.sleep(0.2)
        (straight / "STOP").touch()
        assert process.wait(60) == Exit.STOPPED
    finally:
        launch.end_session(process.pid)
    assert rows(again.out) == rows(straight)[:second]
    for rank in (0, 1):
        name = f"order/rank-{rank:05d}.jsonl"
        told = [json.loads(text) for text in (again.out / name).read_text().splitlines()]
        assert [row["step"] for row in told] == list(range(second))
        assert told == [json.loads(text) for text in (straight / name).read_text().splitlines()][:second]


def alone(shards: Path, folder: Path, *overrides: str, **environment: str) -> launch.Finished:
    """One process, with these variables."""
    line = ["env", *(f"{name}={value}" for name, value in environment.items()), launch.PYTHON]
    return launch.run([*line, *words(shards, folder / "run", *overrides)], log=folder / "log", timeout=120)


def test_a_loss_that_is_not_finite_ends_the_run_and_names_the_clips(small_shards: Path, tmp_path: Path) -> None:
    overrides = ("learning_rate=1e30", "max_grad_norm=0", "warmup_ratio=0", "max_steps=50", "max_nonfinite_steps=2")
    done = alone(small_shards, tmp_path, *overrides, "bf16=false")
    assert done.code == Exit.DIVERGED, done.output[-3000:]
    assert "max_nonfinite_steps: 2 such steps in a row: training has diverged" in done.output
    (path,) = (tmp_path / "run" / "failures").glob("*.json")
    report = json.loads(path.read_text())
    assert report["kind"] == "diverged"
    assert "_clip_0" in report["message"]


def test_a_run_killed_after_its_last_save_is_done(small_shards: Path, tmp_path: Path) -> None:
    assert alone(small_shards, tmp_path, "max_steps=2").code == Exit.DONE
    before = rows(tmp_path / "run")
    (tmp_path / "run" / "outcome.json").unlink()
    (tmp_path / "run" / "training_loss.png").mkdir()  # a picture that cannot be written is no reason to fail
    overrides = ("max_steps=2", "resume_from_checkpoint=latest", "self_check=true", "plot_loss=true")
    done = alone(small_shards, tmp_path, *overrides)
    assert done.code == Exit.DONE, done.output[-3000:]
    assert "no picture of the loss: IsADirectoryError" in done.output
    assert json.loads((tmp_path / "run" / "outcome.json").read_text())["outcome"] == "finished"
    assert rows(tmp_path / "run") == before
    assert (
        alone(
            small_shards, tmp_path, "max_steps=1", "resume_from_checkpoint=latest", "resume_with_changes=[max_steps]"
        ).code
        == Exit.USER_ERROR
    )


def test_an_output_folder_in_use(small_shards: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with (tmp_path / "run" / "run.lock").open("w") as lock:
        lock.write("another host")
        lock.flush()
        fcntl.lockf(lock, fcntl.LOCK_EX)
        done = alone(small_shards, tmp_path, "max_steps=2", "overwrite_output_dir=true")
    assert done.code == Exit.USER_ERROR, done.output[-3000:]
    assert "is in use by another run (another host)" in done.output
    assert not [*(tmp_path / "run").glob("checkpoint-*")]


def test_an_address_that_nobody_knows(small_shards: Path, tmp_path: Path) -> None:
    group = {"RANK": "1", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "nosuch.invalid", "MASTER_PORT": "29999"}
    done = alone(small_shards, tmp_path, "max_steps=2", **group)
    assert done.code == Exit.LAUNCH, done.output[-3000:]
    assert "MASTER_ADDR nosuch.invalid, MASTER_PORT 29999" in done.output
    assert "cannot resolve the address" in done.output


def test_a_port_that_is_taken(small_shards: Path, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        group = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        done = alone(small_shards, tmp_path, "max_steps=2", **group)
    assert done.code == Exit.LAUNCH, done.output[-3000:]
    assert f"MASTER_PORT {port}: the ranks could not meet: another process has taken the port" in done.output


def test_a_shard_replaced_after_the_start(small_shards: Path, tmp_path: Path) -> None:
    copy = tmp_path / "shards"
    shutil.copytree(small_shards, copy)
    run = Running(copy, tmp_path)
    for path in copy.glob("*.tar"):
        damaged = bytearray(path.read_bytes())
        damaged[700::512] = bytes(len(damaged[700::512]))
        replacement = path.with_suffix(".new")
        replacement.write_bytes(damaged)
        os.replace(replacement, path)
    assert run.end(60) == Exit.DATA, run.log.read_text()[-3000:]
    reports = run.reports()
    assert any("checksum differs from the index" in report["message"] for report in reports.values())
