"""Trainings whose checkpoints are written in each way, whole and disturbed, in one start. What a rank saw of each case
goes to TOP/rankN.json: the error, the optimizer steps that it had done by then, and what was said.

[deepspeed --num_gpus N] tests/support/background_saves.py SHARDS TOP CASE...
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

from vidcls import distributed
from vidcls.command import command_arguments
from vidcls.config import config_from_values
from vidcls.faults.causes import DivergedError
from vidcls.training import loop, saver, saving
from vidcls.training.patience import Patience
from vidcls.training.setup import setup

RECIPE: dict[str, Any] = {
    "model_name_or_path": "tiny",
    "lora_rank": 4,
    "train_batch_size": 2,
    "gradient_accumulation_steps": 1,
    "max_steps": 4,
    "save_steps": 2,
    "logging_steps": 1,
    "plot_loss": False,
    "html_report": False,
    "report_to": "none",
    "self_check": False,
    "dataloader_num_workers": 0,
    "ema_decay": 0.9,
}
WRITE = saving.write_tensors
released = threading.Event()


def in_thread(write: Callable[..., Any], at: int, then: Callable[[Path], None]) -> Callable[..., Any]:
    """The call number `at` of `write_tensors` does `then` with its folder first."""
    calls = 0

    def disturbed(folder: Path, *rest: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == at:
            then(folder)
        return write(folder, *rest)

    return disturbed


def refuse(folder: Path) -> None:
    time.sleep(0.05)
    if distributed.rank() == distributed.world_size() - 1:
        raise OSError(28, "No space left on device", "a shard of the last rank")


def die(folder: Path) -> None:
    time.sleep(0.05)
    (folder / "half").write_bytes(bytes(100))
    os.kill(os.getpid(), signal.SIGKILL)


@contextlib.contextmanager
def disturbed(case: str) -> Iterator[None]:
    """What is patched for a case of this name."""
    then = {"refused": refuse, "killed": die, "stuck": lambda folder: released.wait(60)}.get(case)
    slow = {"waits": 0.4, "diverged": 0.4}.get(case)
    changes: list[Any] = []
    if then:
        changes.append(patch.object(saving, "write_tensors", in_thread(WRITE, 2, then)))
    if slow:
        slowed = in_thread(WRITE, 1, lambda folder: time.sleep(slow))
        changes.append(patch.object(saving, "write_tensors", slowed))
    if case == "stuck":
        changes.append(patch.object(saver, "LATE_SECONDS", 0.1))
    if case == "diverged":
        look = Patience.after_step

        def diverge(self: Patience, step: int, **rest: Any) -> str | None:
            if step == 3:
                raise DivergedError("planted")
            return look(self, step, **rest)

        changes.append(patch.object(Patience, "after_step", diverge))
    with contextlib.ExitStack() as stack:
        for change in changes:
            stack.enter_context(change)
        yield


def values_of(case: str) -> dict[str, Any]:
    """The recipe of a case: STAGE-behind and STAGE-standing, or one of those that are disturbed."""
    stage, _, how = case.partition("-")
    if stage in ("2", "3"):
        return {"deepspeed": f"ds_configs/zero{stage}.json", "async_save": how == "behind"}
    return {
        "refused": {"max_steps": 100, "save_steps": 15},
        "killed": {"max_steps": 100, "save_steps": 15},
        "stuck": {"max_steps": 100, "save_steps": 15, "save_timeout": 1},
        "waits": {"save_steps": 1, "max_steps": 2},
        "diverged": {"max_steps": 6},
    }[case]


def run_case(case: str, shards: Path, top: Path) -> dict[str, Any]:
    steps, lines, stepped, say = 0, list[str](), loop.train_step, loop._say

    def counted(*arguments: Any, **named: Any) -> Any:
        nonlocal steps
        steps += 1
        return stepped(*arguments, **named)

    def heard(log: Any, line: str | None) -> None:
        lines.append(line or "")
        say(log, line)

    told = ""
    config = config_from_values({**RECIPE, "dataset": str(shards), "output_dir": str(top / case), **values_of(case)})
    with patch.object(loop, "train_step", counted), patch.object(loop, "_say", heard), disturbed(case):
        try:
            loop.train(setup(config))
        except RuntimeError as error:
            told = f"{type(error).__name__}: {error}"
    threads = [thread.name for thread in threading.enumerate()]
    return {"error": told, "steps": steps, "lines": [line for line in lines if line], "threads": threads}


def main() -> None:
    shards, top, *cases = command_arguments()
    results: dict[str, Any] = {}
    for case in cases:
        distributed.start(60)
        path = Path(top) / f"rank{distributed.rank()}.json"
        results[case] = run_case(case, Path(shards), Path(top))
        path.write_text(json.dumps(results))
    released.set()
    distributed.stop()


if __name__ == "__main__":
    main()
    sys.exit(0)
