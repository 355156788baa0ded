"""DeepSpeed's compiled ops: where they are kept, and that one process at a time compiles them.

DeepSpeed compiles an op the first time it is used (one to four minutes) through torch's extension loader, which
serialises processes by an empty file named `lock`. A process killed while it holds that file makes every later run
wait for ever, silently. Here the lock is one that the kernel takes back from the dead.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib
import importlib.util
import os
import platform
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PROCESSORS = Path("/proc/cpuinfo")


def load_op(builder_name: str) -> Any:
    """The op of a DeepSpeed builder ("FusedAdamBuilder"), compiled if it has to be; None where there is no such op.

    Raises:
        Exception: whatever the op builder raises when the compiler is missing or fails.
    """
    from deepspeed.accelerator import get_accelerator

    builder = get_accelerator().create_op_builder(builder_name)
    if builder is None:
        return None
    folder = _prepare_folder()
    with _alone(folder / ".vidcls.lock"):
        cached = folder / builder.name
        # We are alone: a torch lock that is there belongs to a process that died.
        (cached / "lock").unlink(missing_ok=True)
        if not any(cached.glob("*.so")):
            _say(f"compiling DeepSpeed's {builder.name} (once; one to four minutes)")
        with known_processor():
            return builder.load(verbose=False)


@contextlib.contextmanager
def known_processor() -> Iterator[None]:
    """Have DeepSpeed's builders learn from the kernel which processor this is.

    They ask py-cpuinfo, twice an op, which starts processes to run machine code: two seconds of every start on a CPU.
    """
    found = _processor()
    if found is None or importlib.util.find_spec("cpuinfo") is None:
        yield
        return
    cpuinfo: Any = importlib.import_module("cpuinfo")
    asked = cpuinfo.get_cpu_info
    cpuinfo.get_cpu_info = lambda: found
    try:
        yield
    finally:
        cpuinfo.get_cpu_info = asked


def _processor() -> dict[str, Any] | None:
    """What the builders read of py-cpuinfo's answer; None where the kernel tells it in other words."""
    if platform.machine() != "x86_64":
        return None
    with contextlib.suppress(OSError):
        for line in PROCESSORS.read_text(encoding="utf-8", errors="replace").splitlines():
            name, _, words = line.partition(":")
            if name.strip() == "flags":
                return {"arch": "X86_64", "flags": words.split()}
    return None


def _prepare_folder() -> Path:
    """The cache of compiled ops: TORCH_EXTENSIONS_DIR, by default inside the virtual environment.

    torch's default, ~/.cache, is shared by all environments, and each compiles again what another one compiled last.
    So does another version of ninja, which is why this environment's comes first in PATH.
    """
    commands = str(Path(sys.executable).parent)
    if os.environ["PATH"].split(os.pathsep)[0] != commands:
        os.environ["PATH"] = commands + os.pathsep + os.environ["PATH"]
    if sys.prefix != sys.base_prefix and os.access(sys.prefix, os.W_OK):
        os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(Path(sys.prefix) / "torch_extensions"))
    folder = Path(os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(Path.home() / ".cache" / "torch_extensions")))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    with path.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _say("waiting for another process on this machine that compiles DeepSpeed's ops")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _say(text: str) -> None:
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"vidcls: {text}", flush=True)
