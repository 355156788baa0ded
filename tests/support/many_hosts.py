"""Runs over several hosts, and what whoever started them sees of a fault.

tests/many_hosts and benchmarks/faults.py share this; the faults are in host_faults.py. Commands are typed on host 1,
and rank r is on host r + 1.
"""

from __future__ import annotations

import contextlib
import json
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import yaml

from tests.support.hosts import Hosts
from tests.support.launch import DEEPSPEED, PYTHON

START_SECONDS = 240.0  # on a busy machine
GONE_SECONDS = 60.0  # the bar: by then nothing of a run that failed is left on any host
# What supervise.py adds by itself and docs/clusters.md advises: ssh alone waits 20 minutes for a host that is silent.
SSH = {"PDSH_SSH_ARGS_APPEND": "-o ServerAliveInterval=5 -o ServerAliveCountMax=3 -o ConnectTimeout=5"}
# Limits are short, so that nobody waits; their order is that of the defaults: collectives first, then the guardian.
RECIPE: dict[str, Any] = {
    "model_name_or_path": "tiny",
    "lora_rank": 8,
    "lora_dropout": 0.1,
    "train_batch_size": 6,  # 1, 2 and 3 ranks divide it
    "gradient_accumulation_steps": 1,
    "learning_rate": 2e-3,
    "lr_scheduler_type": "constant",  # the numbers of a step do not depend on how many are to come
    "bf16": True,
    "max_steps": 100_000,
    "save_steps": 20,
    "save_total_limit": 2,
    "logging_steps": 1,
    "plot_loss": False,
    "report_to": "none",
    "self_check": False,
    "ddp_timeout": 20,
    "data_timeout": 10,
    "step_timeout": 25,
    "stop_timeout": 60,
    "seed": 7,
}


def deepspeed_words(hosts: Hosts) -> list[object]:
    return [DEEPSPEED, "--hostfile", hosts.hostfile]


class Run:
    """A command on host 1 that trains on the hosts. When its block is left, the hosts are as they were before."""

    def __init__(self, hosts: Hosts, shards: Path, folder: Path, words: list[object], **options: object) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.hosts, self.out, self.log = hosts, folder / "run", folder / "log"
        self.recipe = folder / "recipe.yaml"
        content = {**RECIPE, "dataset": str(shards), "output_dir": str(self.out), **options}
        self.recipe.write_text(yaml.safe_dump(content))
        self._before = {process.pid for number in hosts.numbers() for process in hosts.processes(number)}
        self.started = time.monotonic()
        self.process = hosts.start(1, [*words, "launch/train.py", self.recipe], self.log, **SSH)

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        for number in self.hosts.numbers():
            self.hosts.boot(number)
        self.process.wait(30)

    @property
    def said(self) -> str:
        return self.log.read_text(errors="replace")

    def rows(self) -> list[dict[str, Any]]:
        with contextlib.suppress(OSError):
            lines = (self.out / "train_log.jsonl").read_text().splitlines(keepends=True)
            return [json.loads(line) for line in lines if line.endswith("\n")]
        return []

    def wait_for(self, has_come: Callable[[], object], seconds: float = START_SECONDS) -> None:
        until = time.monotonic() + seconds
        while not has_come():
            assert self.process.poll() is None, f"exit code {self.process.poll()}:\n{self.said[-6000:]}"
            assert time.monotonic() < until, self.said[-6000:]
            time.sleep(0.05)

    def wait_for_step(self, step: int) -> None:
        self.wait_for(lambda: (rows := self.rows()) and rows[-1]["step"] >= step)

    def wait_for_save(self) -> None:
        self.wait_for(lambda: any(self.out.glob("checkpoint-*/COMPLETE")))

    def ranks(self) -> dict[int, psutil.Process]:
        """Rank -> its process, of those that live."""
        found = {}
        for number in self.hosts.numbers():
            for process in self.hosts.processes(number):
                with contextlib.suppress(psutil.Error):
                    above, words = process.parent(), process.cmdline()
                    if above and "deepspeed.launcher.launch" in above.cmdline() and "--local_rank=0" in words:
                        found[number - 1] = process
        return found

    def command(self) -> psutil.Process:
        """The deepspeed command."""
        return next(each for each in self.hosts.processes(1) if str(DEEPSPEED) in each.cmdline()[:2])

    def left(self) -> list[str]:
        """What of the run is still on the hosts. sshd's own sessions are not: over a cut link it keeps them for as long
        as it is set to (ClientAliveInterval)."""
        found = []
        for number in self.hosts.numbers():
            for process in self.hosts.processes(number):
                with contextlib.suppress(psutil.Error):
                    words = " ".join(process.cmdline())
                    if process.pid not in self._before and not words.startswith("sshd"):
                        found.append(f"{self.hosts.name(number)}: {words}")
        return found

    def reports(self) -> list[dict[str, Any]]:
        """The ranks' last words, oldest first."""
        found = [json.loads(path.read_text()) for path in (self.out / "failures").glob("*.json")]
        return sorted(found, key=lambda report: report["time"])


@dataclass(frozen=True)
class Seen:
    """What a fault led to.

    code: of the command, as a shell has it. ranks_seconds, seconds: from the fault (from the command's start, when the
    fault was there before) until no rank was left, and until nothing was, on any host; None: more than GONE_SECONDS.
    """

    code: int | None
    ranks_seconds: float | None
    seconds: float | None
    said: str
    reports: tuple[Mapping[str, Any], ...]
    left: tuple[str, ...]

    @property
    def words(self) -> str:
        """All that there is to read."""
        told = [f"rank {report['rank']}: {report['kind']}: {report['message']}" for report in self.reports]
        return "\n".join([*told, self.said])


def see(run: Run, since: float, limit: float = GONE_SECONDS) -> Seen:
    """Watch a run that has failed to its end, or for `limit` seconds."""
    ranks_gone = gone = None
    begun = False
    while time.monotonic() - since < limit:
        passed = time.monotonic() - since
        ended, ranks = run.process.poll() is not None, run.ranks()
        begun = begun or ended or bool(ranks)  # before there are ranks, none are gone
        if ranks:
            ranks_gone = None
        elif begun and ranks_gone is None:
            ranks_gone = round(passed, 1)
        if ended and not run.left():
            gone = round(passed, 1)
            break
        time.sleep(0.2)
    code = run.process.poll()
    code = code if code is None or code >= 0 else 128 - code
    return Seen(code, ranks_gone, gone, run.said, tuple(run.reports()), tuple(run.left()))


@dataclass(frozen=True)
class Resumed:
    """What the supervisor made of a fault.

    seconds: from the fault to the first step after it, None when there was none. ranks: that took it.
    """

    code: int
    seconds: float | None
    ranks: int | None
    attempts: tuple[Mapping[str, Any], ...]
    said: str
    rows: tuple[Mapping[str, Any], ...]


def supervise_words(hosts: Hosts, *launcher: object) -> list[object]:
    options = ["--backoff", 1, "--drain", 25]
    return [PYTHON, "launch/supervise.py", *options, "--", *(launcher or deepspeed_words(hosts))]


STEP = re.compile(r"^\S+: step (\d+)/", re.MULTILINE)


def steps_said(text: str) -> list[int]:
    return [int(step) for step in STEP.findall(text)]


def see_resumed(run: Run, since: float, attempt: int = 2, more_steps: int = 25) -> Resumed:
    """Watch a supervised run until it has done `more_steps` steps in an attempt, or has ended; then it is stopped."""
    mark, first = f"supervise: attempt {attempt} on", None
    until = since + START_SECONDS
    while run.process.poll() is None:
        assert time.monotonic() < until, run.said[-6000:]
        steps = steps_said(run.said.partition(mark)[2])
        if steps and first is None:
            first = round(time.monotonic() - since, 1)
        if len(steps) >= more_steps:
            (run.out / "STOP").touch()
            run.process.wait(START_SECONDS)
        time.sleep(0.1)
    text = run.out / "supervise.jsonl"
    attempts = tuple(json.loads(line) for line in text.read_text().splitlines()) if text.exists() else ()
    code = run.process.wait()
    ranks = attempts[attempt - 1]["ranks"] if first is not None else None
    ranks = sum(attempts[attempt - 1]["hosts"].values()) if first is not None and ranks is None else ranks
    return Resumed(code, first, ranks, attempts, run.said, tuple(run.rows()))
