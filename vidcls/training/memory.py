"""How much memory a rank may use, and how much it used at most: of its accelerator, or on a CPU of the host's.

A host's memory ends where its control group's does (the kernel's cgroup-v1/memory.rst and cgroup-v2.rst).
"""

from __future__ import annotations

import ctypes
import socket
import sys
from dataclasses import dataclass
from pathlib import Path

import psutil
from deepspeed.accelerator import get_accelerator

from vidcls import distributed

GROUPS = Path("/sys/fs/cgroup")
PEAK_OF_NOW = "5"  # into clear_refs: VmHWM begins anew (proc_pid_clear_refs(5))


def group_free(groups: Path = GROUPS, membership: Path = Path("/proc/self/cgroup")) -> int | None:
    """Bytes left in this process's control group and those above it, of either version; None without a limit.

    Pages of files that nobody uses are left: the kernel takes them back before it kills.
    """
    found: list[int] = []
    lines = membership.read_text().splitlines() if membership.exists() else []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, names = groups, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            root = groups / "memory"
        else:
            continue
        folder = root / path.lstrip("/")
        for each in (folder, *folder.parents):
            if each == root.parent:
                break
            found += _left(each, *names)
    return min(found, default=None)


def _left(folder: Path, limit: str, used: str, inactive: str) -> list[int]:
    try:
        most = (folder / limit).read_text().strip()
        current = int((folder / used).read_text())
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return []  # the root of all groups has no limit
    return [] if most == "max" else [max(0, int(most) - current + int(stat.get(inactive, 0)))]


def host_free() -> int:
    """Bytes that this host's processes may still take, pages of files that can be read again among them."""
    left = group_free()
    free = psutil.virtual_memory().available
    return free if left is None else min(free, left)


@dataclass(frozen=True)
class HostMemory:
    """Of a rank on CPU: what it has resident, pages of mapped files included.

    total: bytes it may come to, its own and its share of what is free on the host. All ranks must make it together.
    """

    total: int

    @classmethod
    def share(cls) -> HostMemory:
        hosts = distributed.gather_objects(socket.gethostname())
        total = psutil.Process().memory_info().rss + host_free() // hosts.count(socket.gethostname())
        distributed.barrier()  # nobody takes more before all have looked
        return cls(total)

    def start(self) -> int:
        """Begin to watch; the bytes in use."""
        if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
            libc.malloc_trim(0)  # what is free again would hide what is asked for next
        Path("/proc/self/clear_refs").write_text(PEAK_OF_NOW)
        return psutil.Process().memory_info().rss

    def peak(self) -> int:
        """The most bytes in use since `start`."""
        status = Path("/proc/self/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024


class DeviceMemory:
    """Of an accelerator that a rank has to itself: what its allocator has reserved."""

    def __init__(self) -> None:
        self._accelerator = get_accelerator()
        # Others' memory on the device, and the driver's, is neither free nor the allocator's own.
        self.total = int(self._accelerator.available_memory() + self._accelerator.memory_allocated())

    def start(self) -> int:
        self._accelerator.empty_cache()
        self._accelerator.reset_peak_memory_stats()
        return int(self._accelerator.memory_reserved())

    def peak(self) -> int:
        self._accelerator.synchronize()
        return int(self._accelerator.max_memory_reserved())


def rank_memory() -> HostMemory | DeviceMemory:
    """All ranks must call it."""
    return HostMemory.share() if distributed.accelerator_name() == "cpu" else DeviceMemory()
