"""What a host is: versions, addresses, memory, limits, compiler, accelerators. Collected here, judged elsewhere."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import resource
import shutil
import socket
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "deepspeed", "transformers", "peft", "safetensors", "numpy")
SHM = Path("/dev/shm")
BUFFERS = "deepspeed_allreduce_buffer_"
SOURCES = ("vidcls/**/*.py", "launch/**/*.py", "launch/**/*.yaml", "ds_configs/*.json")
LIMITS = {
    "open files": resource.RLIMIT_NOFILE,
    "processes": resource.RLIMIT_NPROC,
    "address space": resource.RLIMIT_AS,
    "file size": resource.RLIMIT_FSIZE,
    "processor time": resource.RLIMIT_CPU,
    "locked memory": resource.RLIMIT_MEMLOCK,
}
# Imports torch as every rank will: a build that does not suit the driver, or a library that is missing, shows here.
ASK_TORCH = """
import json, warnings
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    import torch
    count = torch.cuda.device_count()
    names = [torch.cuda.get_device_name(i) for i in range(count)]
print(json.dumps({"count": count, "names": names, "warnings": [str(w.message).strip() for w in said]}))
"""


def gather() -> dict[str, Any]:
    """Everything about this host that needs no other host, as JSON."""
    return {
        "hostname": socket.gethostname(),
        "boot": _text("/proc/sys/kernel/random/boot_id"),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "vidcls": sources(),
        "addresses": addresses(),
        "own_address": own_address(),
        "cpus": len(os.sched_getaffinity(0)),
        "memory": memory(),
        "shm": shared_memory(),
        "limits": {name: _finite(resource.getrlimit(which)[0]) for name, which in LIMITS.items()},
        "tasks_left": _tasks_left(),
        "infiniband": any(Path("/sys/class/infiniband").glob("*")),
        "build": build_tools(),
        "accelerators": len(list(Path("/dev").glob("nvidia[0-9]*"))) or int(Path("/dev/kfd").exists()),
    }


def sources() -> dict[str, str]:
    """Where the vidcls that a rank would import is, and a digest of its sources and of what is beside them."""
    spec = importlib.util.find_spec("vidcls")
    assert spec is not None
    assert spec.origin is not None
    root = Path(spec.origin).parents[1]
    digest = hashlib.sha256()
    for path in sorted(path for pattern in SOURCES for path in root.glob(pattern)):
        digest.update(f"{path.relative_to(root)}\0{path.stat().st_size}\0".encode() + path.read_bytes())
    return {"folder": str(root), "digest": digest.hexdigest()}


def addresses() -> list[str]:
    """What `hostname -I` says: DeepSpeed takes the first word of the first host's for the rendezvous."""
    try:
        done = subprocess.run(["hostname", "-I"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return done.stdout.split()


def own_address() -> str | None:
    """What this host's own name resolves to: gloo tells it to the other ranks."""
    with contextlib.suppress(OSError):
        return str(socket.getaddrinfo(socket.gethostname(), None, type=socket.SOCK_STREAM)[0][4][0])
    return None


def memory() -> dict[str, int]:
    """Bytes of this host, or of the control group (container) that this process is confined to."""
    table = dict(re.findall(r"^(MemTotal|MemAvailable):\s+(\d+) kB", _text("/proc/meminfo"), re.MULTILINE))
    total, available = (1024 * int(table[name]) for name in ("MemTotal", "MemAvailable"))
    limit, used = _cgroup("memory.max"), _cgroup("memory.current")
    if limit is not None and used is not None and limit < total:
        total, available = limit, min(available, limit - used)
    return {"total": total, "available": available}


def shared_memory() -> dict[str, Any]:
    """/dev/shm: its size, what is free (bytes), and DeepSpeed's buffers in it that nobody uses any more."""
    if not SHM.is_dir():
        return {"total": 0, "free": 0, "left": {}}
    usage = shutil.disk_usage(SHM)
    left = {}
    for path in SHM.glob(f"{BUFFERS}*"):
        with contextlib.suppress(OSError):
            # Whether another user's buffer is mapped can only be seen by root.
            if os.geteuid() in (0, path.stat().st_uid):
                left[path.name] = path.stat().st_size
    for name in _mapped() if left else ():
        left.pop(name, None)
    return {"total": usage.total, "free": usage.free, "left": left}


def _mapped() -> set[str]:
    found: set[str] = set()
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with contextlib.suppress(OSError):
            found.update(re.findall(rf"{SHM}/({BUFFERS}\S+)", maps.read_text(errors="replace")))
    return found


def build_tools() -> dict[str, str | None]:
    """Why DeepSpeed's ops cannot be compiled here, by tool; None: it is fine. nvcc only counts where there is a GPU."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"  # as vidcls.ops has it
    compiler = os.environ.get("CXX", "c++")
    found: dict[str, str | None] = {
        name: None if shutil.which(name, path=path) else "not found" for name in ("ninja", "nvcc")
    }
    if cuda := os.environ.get("CUDA_HOME"):
        found["nvcc"] = None if (Path(cuda) / "bin" / "nvcc").is_file() else f"not in CUDA_HOME={cuda}"
    words = [compiler, "-x", "c++", "-fsyntax-only", f"-I{sysconfig.get_paths()['include']}", "-"]
    try:
        done = subprocess.run(
            words, input="#include <vector>\n#include <Python.h>\n", capture_output=True, text=True, timeout=30
        )
        error = re.search(r"error: (.*)", done.stderr)
        found[compiler] = None if done.returncode == 0 else (error[1] if error else f"exit code {done.returncode}")
    except OSError:
        found[compiler] = "not found"
    except subprocess.TimeoutExpired:
        found[compiler] = "takes more than 30 s for two lines"
    return found


def ask_torch(seconds: float) -> dict[str, Any]:
    """{count, names, warnings} of the accelerators that torch sees, or {error} where it cannot be imported."""
    try:
        done = subprocess.run([sys.executable, "-c", ASK_TORCH], capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return {"error": f"importing torch takes more than {seconds:.0f} s"}
    if done.returncode:
        said = done.stderr.strip().splitlines()
        return {"error": f"import torch: {said[-1] if said else f'exit code {done.returncode}'}"}
    return json.loads(done.stdout.splitlines()[-1])


def _tasks_left() -> int | None:
    limit, used = _cgroup("pids.max"), _cgroup("pids.current")
    return None if limit is None or used is None else limit - used


def _cgroup(name: str) -> int | None:
    """A number of this process's control group (version 2); None where there is no limit or no such file."""
    own = re.search(r"^0::/?(.*)$", _text("/proc/self/cgroup"), re.MULTILINE)
    for folder in (Path("/sys/fs/cgroup") / (own[1] if own else ""), Path("/sys/fs/cgroup")):
        text = _text(folder / name)
        if text:
            return int(text) if text.isdigit() else None
    return None


def _text(path: str | Path) -> str:
    try:
        return Path(path).read_text(encoding="utf-8").strip()
    except OSError:
        return ""


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _finite(limit: int) -> int | None:
    return None if limit == resource.RLIM_INFINITY else limit
