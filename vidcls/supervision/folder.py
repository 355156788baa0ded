"""What a run leaves in its output folder, as a supervisor reads it: without torch, and at any moment."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

from vidcls.faults.guard import STOP_NAME
from vidcls.faults.reports import read_reports
from vidcls.manifest import CheckpointError, read_manifest

# Written by vidcls.training, which cannot be imported here: it imports torch.
OUTCOME_NAME = "outcome.json"
LOG_NAME = "train_log.jsonl"
CONFIG_NAME = "config.yaml"
STATE_NAME = "training_state.json"


class RunFolder:
    def __init__(self, path: Path) -> None:
        self.path = path

    def newest_checkpoint(self) -> Path | None:
        """The newest that is sealed and has all it takes to resume. Its files' digests are the run's to verify."""
        whole = [path for path in self.path.glob("checkpoint-*") if _can_resume(path)]
        return max(whole, key=lambda path: int(path.name.partition("-")[2]), default=None)

    def outcome(self) -> dict[str, Any]:
        """{} when the last launch did not end well."""
        return read_object(self.path / OUTCOME_NAME)

    def forget_outcome(self) -> None:
        """So that the next one can only be the next launch's, whatever the clocks of the hosts say."""
        (self.path / OUTCOME_NAME).unlink(missing_ok=True)

    def reports(self, launch: str) -> list[dict[str, Any]]:
        """The last words of the ranks of a launch, oldest first."""
        return read_reports(self.path, launch)

    def rows(self) -> list[dict[str, Any]]:
        """The log's rows, in its order; a line cut by a kill is left out."""
        rows = []
        with contextlib.suppress(OSError), (self.path / LOG_NAME).open(encoding="utf-8") as lines:
            for line in lines:
                with contextlib.suppress(ValueError):
                    rows.append(json.loads(line))
        return [row for row in rows if isinstance(row, dict) and "step" in row]

    def log_size(self) -> int:
        with contextlib.suppress(OSError):
            return (self.path / LOG_NAME).stat().st_size
        return 0

    def begun(self) -> tuple[int, int] | None:
        """Changes whenever a run begins here: it writes its configuration."""
        with contextlib.suppress(OSError):
            stat = (self.path / CONFIG_NAME).stat()
            return stat.st_mtime_ns, stat.st_ino
        return None

    def ask_to_stop(self) -> None:
        """Raises OSError where nothing can be written."""
        self.path.mkdir(parents=True, exist_ok=True)
        (self.path / STOP_NAME).touch()

    def take_back_stop(self) -> None:
        (self.path / STOP_NAME).unlink(missing_ok=True)


def _can_resume(folder: Path) -> bool:
    if not folder.name.partition("-")[2].isdigit() or not (folder / STATE_NAME).is_file():
        return False
    try:
        read_manifest(folder)
    except CheckpointError:
        return False
    return True


def step_of(checkpoint: Path | None) -> int:
    """Optimizer steps done at a checkpoint; 0 without one."""
    if checkpoint is None:
        return 0
    return int(read_object(checkpoint / STATE_NAME).get("step", 0))


def global_batch_of(checkpoint: Path | None) -> int | None:
    if checkpoint is None:
        return None
    stream = read_object(checkpoint / STATE_NAME).get("stream", {})
    return stream.get("global_batch") if isinstance(stream, dict) else None


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; {} where there is none, or none that is whole."""
    with contextlib.suppress(OSError, ValueError):
        content = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(content, dict):
            return content
    return {}
