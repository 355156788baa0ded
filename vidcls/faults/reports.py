"""Last words: what a rank, or its guardian, writes into output_dir/failures/ before it leaves."""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

FOLDER_NAME = "failures"
CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Report:
    """One rank's end. kind: an Exit's name in lower case, or "killed" for one that vanished."""

    launch: str
    rank: int
    world_size: int
    pid: int
    kind: str
    code: int
    message: str
    phase: str
    step: int | None
    clips: str

    def say(self, where: Path | None) -> None:
        """Tell it in one line on stderr. The launcher that reads stderr may be gone."""
        step = "" if self.step is None else f" at step {self.step}"
        clips = f"; clips {self.clips}" if self.clips else ""
        about = f"{self.kind} in phase {self.phase}{step}: {self.message}{clips}"
        place = f" ({where})" if where else ""
        line = f"vidcls: rank {self.rank} on {socket.gethostname()} leaves: {about}{place}"
        with contextlib.suppress(OSError, ValueError):
            print(line, file=sys.stderr, flush=True)


def write_report(output_dir: Path | None, report: Report, stacks: str) -> Path | None:
    """Write the report and the stacks beside it; None when there is no place for them. Never raises OSError."""
    if output_dir is None:
        return None
    folder = output_dir / FOLDER_NAME
    when = time.strftime("%Y%m%d-%H%M%S", time.gmtime())
    path = folder / f"{when}-rank{report.rank}-{socket.gethostname()}{_ending(report.launch)}"
    content = {
        **asdict(report),
        "host": socket.gethostname(),
        "time": time.time(),
        "memory": memory_state(),
        "disk": disk_state(output_dir),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if stacks:
            path.with_suffix(".stacks.txt").write_text(stacks, encoding="utf-8")
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        temporary.replace(path)
    except OSError:  # a full or vanished disk may be the very reason
        return None
    return path


def read_reports(output_dir: Path, launch: str) -> list[dict[str, Any]]:
    """The reports of one launch, oldest first; unreadable ones are left out."""
    found = []
    with contextlib.suppress(OSError):
        for path in (output_dir / FOLDER_NAME).glob(f"*{_ending(launch)}"):
            with contextlib.suppress(OSError, ValueError):
                content = json.loads(path.read_text(encoding="utf-8"))
                if content["launch"] == launch:
                    found.append(content)
    return sorted(found, key=lambda content: content["time"])


def _ending(launch: str) -> str:
    """Of a report's name: whoever looks for those of one launch every second need not open the others."""
    return f"-{launch}.json" if launch else ".json"


def memory_state() -> dict[str, Any]:
    """Of the host in bytes, and how often the kernel has killed for want of memory in this control group."""
    memory = psutil.virtual_memory()
    state: dict[str, Any] = {"total": memory.total, "available": memory.available}
    with contextlib.suppress(OSError):
        state["shm_free"] = shutil.disk_usage("/dev/shm").free
    if (kills := out_of_memory_kills()) is not None:
        state["out_of_memory_kills"] = kills
    return state


def disk_state(output_dir: Path) -> dict[str, int]:
    """Bytes of the file system that output_dir is, or will be, on."""
    existing = next((place for place in (output_dir, *output_dir.absolute().parents) if place.exists()), Path("/"))
    try:
        usage = shutil.disk_usage(existing)
    except OSError:
        return {}
    return {"total": usage.total, "free": usage.free}


def out_of_memory_kills() -> int | None:
    """How many processes the kernel has killed for want of memory in this control group; None if it does not say."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        own = Path("/proc/self/cgroup").read_text(encoding="ascii").rsplit("::", 1)[1].strip().lstrip("/")
        for line in (CGROUP / own / "memory.events").read_text(encoding="ascii").splitlines():
            name, count = line.split()
            if name == "oom_kill":
                return int(count)
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/vmstat").read_text(encoding="ascii").splitlines():
            name, count = line.split()
            if name == "oom_kill":
                return int(count)
    return None
