"""A real run under its supervisor: killed, asked to stop, started again, and still the run that was never disturbed."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from tests.support import launch

pytestmark = pytest.mark.launch

LIMIT = 240.0
RECIPE: dict[str, Any] = {
    "model_name_or_path": "tiny",
    "lora_rank": 8,
    "lora_dropout": 0.1,
    "per_device_train_batch_size": 2,
    "learning_rate": 2e-3,
    "max_steps": 150,
    "save_steps": 5,
    "logging_steps": 1,
    "plot_loss": False,
    "report_to": "none",
    "dataloader_num_workers": 0,
    "seed": 7,
}


def rows(folder: Path) -> list[dict[str, Any]]:
    path = folder / "train_log.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    found = [json.loads(line) for line in lines if line.endswith("\n")]
    return [{key: row[key] for key in ("step", "loss", "grad_norm", "lr")} for row in found]


def wait_for_step(process: subprocess.Popen, folder: Path, step: int, log: Path) -> None:
    deadline = time.monotonic() + LIMIT
    while not (found := rows(folder)) or found[-1]["step"] < step:
        assert time.monotonic() < deadline, log.read_text()[-4000:]
        assert process.poll() is None, log.read_text()[-4000:]
        time.sleep(0.02)


def wait_for_text(log: Path, text: str) -> None:
    deadline = time.monotonic() + LIMIT
    while text not in log.read_text():
        assert time.monotonic() < deadline, log.read_text()[-4000:]
        time.sleep(0.2)


def ranks(process: subprocess.Popen) -> list[psutil.Process]:
    found = []
    for each in psutil.Process(process.pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if any(word.startswith("--local_rank=") for word in each.cmdline()):
                found.append(each)
    return found


def test_a_disturbed_run_is_bit_for_bit_the_run_that_was_not(tmp_path: Path, small_shards: Path) -> None:
    def recipe(name: str) -> Path:
        path = tmp_path / f"{name}.yaml"
        content = {**RECIPE, "dataset": str(small_shards), "output_dir": str(tmp_path / name)}
        path.write_text(yaml.safe_dump(content))
        return path

    done = launch.deepspeed(2, "launch/train.py", recipe("whole"), log=tmp_path / "whole.log")
    assert done.code == 0, done.output[-4000:]

    output, log = tmp_path / "disturbed", tmp_path / "disturbed.log"
    command = [launch.DEEPSPEED, "--num_gpus", 2, "launch/train.py", recipe("disturbed")]
    words = [sys.executable, "launch/supervise.py", "--backoff", 1, "--", *command]
    process = launch.start(words, log=log)
    launched: list[int] = []
    try:
        wait_for_step(process, output, 7, log)
        victim = ranks(process)[1]
        launched.append(os.getsid(victim.pid))
        victim.send_signal(signal.SIGKILL)
        wait_for_text(log, "attempt 2 on")
        wait_for_step(process, output, 20, log)
        launched.append(os.getsid(ranks(process)[0].pid))
        process.send_signal(signal.SIGTERM)
        assert process.wait(LIMIT) == 75, log.read_text()[-4000:]
        again = launch.run(words, log=tmp_path / "again.log")
        assert again.code == 0, again.output[-4000:]
    finally:
        launch.end_session(process.pid)
        left = [launch.end_session(session) for session in launched]
    assert left == [[], []]

    attempts = [json.loads(line) for line in (output / "supervise.jsonl").read_text().splitlines()]
    assert [attempt["verdict"] for attempt in attempts] == ["killed", "stopped", "finished"]
    killed, stopped, finished = attempts
    assert killed["saved"] == stopped["resumed_from"] >= 5
    assert "rank 1" in killed["cause"]
    assert stopped["saved"] == finished["resumed_from"] >= 20
    assert rows(output)[-1]["step"] == RECIPE["max_steps"]
    assert rows(output) == rows(tmp_path / "whole")
