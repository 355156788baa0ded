"""A `deepspeed` that trains nothing: what each launch does stands in a file, and all it was told is written down.

`install` makes the command. ACTS is a JSON list with one object a launch (the last one counts for all that follow):
    steps          rows of the log to write, from where the run goes on (0)
    saves          how many of them have a checkpoint (all)
    seconds        between the steps (0)
    report         a failure report: {"kind": ..., "step": ..., ...}; with "launch": of another launch
    outcome        "finished", or nothing
    begins         false: the output folder is never opened (true)
    stops          false: a STOP file is not obeyed (true)
    hangs          the command never ends (false)
    exit           the code to leave with (0)
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from vidcls.manifest import seal

ROOT = Path(__file__).parents[2]


def install(folder: Path, acts: list[dict[str, Any]]) -> Path:
    """The command, which acts so; `launches(folder)` tells what it was given."""
    folder.mkdir()
    (folder / "acts.json").write_text(json.dumps(acts), encoding="utf-8")
    command = folder / "deepspeed"
    command.write_text(
        f"#!{sys.executable}\nimport sys\nsys.path.insert(0, {str(ROOT)!r})\n"
        f"from tests.support.fake_deepspeed import main\nmain({str(folder)!r})\n",
        encoding="utf-8",
    )
    command.chmod(0o755)
    return command


def launches(folder: Path) -> list[dict[str, Any]]:
    path = folder / "launches.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def main(folder: str) -> None:
    from vidcls.config import load_config
    from vidcls.supervision.command import parse_command

    acts = json.loads(Path(folder, "acts.json").read_text(encoding="utf-8"))
    number = len(launches(Path(folder)))
    act = acts[min(number, len(acts) - 1)]
    words = [word for word in sys.argv if not word.startswith("--launch-name=")]
    name = next(word.partition("=")[2] for word in sys.argv if word.startswith("--launch-name="))
    command = parse_command(words)
    config = load_config(command.recipe, list(command.overrides))
    hostfile = command.options.get("hostfile")
    told = {
        "pid": os.getpid(),
        "options": dict(command.options),
        "hosts": Path(hostfile).read_text().splitlines() if hostfile else None,
        "run": {key: config.flat()[key] for key in ("resume_from_checkpoint", "overwrite_output_dir")},
        "batch": [
            config.optim.train_batch_size,
            config.optim.per_device_train_batch_size,
            config.optim.gradient_accumulation_steps,
        ],
        "ssh": os.environ.get("PDSH_SSH_ARGS_APPEND"),
        "stop_file": Path(config.run.output_dir, "STOP").exists(),
    }
    with Path(folder, "launches.jsonl").open("a") as file:
        file.write(json.dumps(told) + "\n")
    print(f"launch {number} begins", flush=True)
    sys.exit(_act(act, Path(config.run.output_dir), config.run.resume_from_checkpoint, number, name))


def _act(act: dict[str, Any], output: Path, resume: str | None, number: int, launch: str) -> int:
    step = 0
    if act.get("begins", True):
        output.mkdir(parents=True, exist_ok=True)
        (output / "outcome.json").unlink(missing_ok=True)
        steps = [int(path.name.partition("-")[2]) for path in output.glob("checkpoint-*")]
        step = max(steps, default=0) if resume == "latest" else 0
        (output / "config.yaml").write_text(f"launch: {number}\n")
        rows = [row for row in _rows(output) if row["step"] <= step]
        (output / "train_log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for done in range(act.get("steps", 0)):
        step += 1
        time.sleep(act.get("seconds", 0))
        with (output / "train_log.jsonl").open("a") as log:
            log.write(json.dumps({"step": step, "loss": 1.0, "samples_per_second": 8.0}) + "\n")
        if done < act.get("saves", 10**9):
            _save(output, step)
        if act.get("stops", True) and (output / "STOP").exists():
            _save(output, step)
            return _end(output, "stopped", step, 75)
    if "report" in act:
        tell(output, {"launch": launch, "rank": 1, "host": "node2", **act["report"]})
    while act.get("hangs"):
        time.sleep(0.1)
        if act.get("stops", True) and (output / "STOP").exists():
            _save(output, step)
            return _end(output, "stopped", step, 75)
    if "outcome" in act:
        return _end(output, act["outcome"], step, act.get("exit", 0))
    return act.get("exit", 0)


def tell(output: Path, report: dict[str, Any]) -> None:
    """Write a report into failures/."""
    failures = output / "failures"
    failures.mkdir(parents=True, exist_ok=True)
    content = {"phase": "step", "message": "told to", "time": time.time(), "code": 1, **report}
    name = f"{time.time_ns()}-rank{report['rank']}-{report['launch']}.json"
    (failures / name).write_text(json.dumps(content), encoding="utf-8")


def _rows(output: Path) -> list[dict[str, Any]]:
    path = output / "train_log.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _save(output: Path, step: int) -> None:
    folder = output / f"checkpoint-{step}"
    folder.mkdir(exist_ok=True)
    (folder / "training_state.json").write_text(json.dumps({"step": step, "stream": {"global_batch": 16}}))
    seal(folder)


def _end(output: Path, word: str, step: int, code: int) -> int:
    (output / "outcome.json").write_text(json.dumps({"outcome": word, "step": step}))
    (output / "STOP").unlink(missing_ok=True)
    return code
